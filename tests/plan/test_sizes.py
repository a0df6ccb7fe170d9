import pytest

from smet_compile.plan.stored import bytes_text, parse_bytes
from smet_compile.plan.timeline import Degrees, Term, choose_degrees


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24GB", 24 * 10**9),
        ("24 GiB", 24 * 2**30),
        ("1.5mb", 1_500_000),
        ("17", 17),
        ("8B", 8),
        (99, 99),
        (24e9, 24 * 10**9),
    ],
)
def test_bytes_are_read(text: str | float, expected: int) -> None:
    assert parse_bytes("fits", text) == expected


@pytest.mark.parametrize("text", ["", "GB", "24 apples", "-1GB", 0, -3, 0.5, float("inf"), True, None, "0GB", "1e9"])
def test_text_that_is_not_a_size_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match='fits: expected bytes such as "24GB"'):
        parse_bytes("fits", text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("number", "expected"), [(0, "0 B"), (999, "999 B"), (1234567, "1.23 MB"), (99_950, "100 kB"), (5.4e10, "54.0 GB")]
)
def test_bytes_are_written(number: float, expected: str) -> None:
    assert bytes_text(number) == expected


def test_degrees_are_read_off_shapes() -> None:
    degrees = choose_degrees(256, {4096, 11008, 32000})
    assert degrees == Degrees(11, 251)
    assert degrees.of_shape((11 * 251, 4096)) == (4096, Term(1, 1))
    assert degrees.of_shape((11, 32, 251, 251)) == (32, Term(1, 2))
    assert degrees.of_shape((11, 252)) == degrees.of_shape((11, 250)) == (1, Term(1, 1))
    assert degrees.of_shape((4096, 11008)) == (4096 * 11008, Term(0, 0))
    assert degrees.of_product(11 * 251 * 251 * 35) == (35, Term(1, 2))
