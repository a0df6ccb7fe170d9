"""Codes of 8-bit moments: what each of the 256 stands for, and how a number becomes one."""

import pytest
import torch
from torch import Tensor

from smet_compile.ops import law
from smet_compile.ops.law import SIGNED_CODES, UNSIGNED_CODES, CodeFormat, decode, encode

FORMATS = {"exp_avg": SIGNED_CODES, "exp_avg_sq": UNSIGNED_CODES}
SCALES = [1.0, 0.7, 3.0e-6, 1e-30, 123.4567, 3e38]
every_format = pytest.mark.parametrize("kind", FORMATS.values(), ids=FORMATS)
ALL = torch.arange(256, dtype=torch.uint8)


def numbers(kind: CodeFormat) -> Tensor:
    """Computes the numbers for codes 0 ... largest, relative to the scale, from exponents and 3 bits of mantissa."""
    upper = torch.arange(1, kind.largest + 1) + kind.offset
    return torch.cat([torch.zeros(1), (1 + upper % 8 / 8) * 2.0 ** (upper // 8 - 127)])


def noise(num: int, seed: int = 0) -> Tensor:
    key = law.block_keys(law.noise_key(seed, torch.tensor(3)), torch.tensor(5))
    return law.noise_bits(key, torch.arange(num), 1)


@every_format
def test_what_a_code_stands_for(kind: CodeFormat) -> None:
    assert numbers(kind)[-1] == 1 and numbers(kind)[1] == (1.25 * 2**-16 if kind.signed else 1.25 * 2**-32)
    for scale in SCALES:
        expected = torch.cat([numbers(kind), -numbers(kind)])[:256] * torch.tensor(scale)
        assert torch.equal(decode(ALL, torch.tensor(scale), kind), expected)


def test_the_root_of_a_square_has_the_range_of_the_moment() -> None:
    assert SIGNED_CODES.smallest == 1.25 * 2**-16
    assert UNSIGNED_CODES.smallest <= SIGNED_CODES.smallest**2 * 1.25


@pytest.mark.parametrize("scale", SCALES)
@every_format
def test_every_code_comes_back(kind: CodeFormat, scale: float) -> None:
    """It does so to nearest, and with any noise, though scale times number had to be rounded (to 24 bits, or to fewer
    where the product is below the least normal number). The one with a sign and no magnitude comes back as zero."""
    once = torch.where(ALL == 128, 0, ALL) if kind.signed else ALL
    extremes = (0, 2**16 - 1) if scale * kind.smallest > torch.finfo(torch.float32).tiny else ()
    for bits in (None, *(torch.full((256,), number) for number in (2**15, *extremes))):
        assert torch.equal(encode(decode(ALL, torch.tensor(scale), kind), torch.tensor(scale), kind, bits), once)


@pytest.mark.parametrize("with_noise", [False, True])
@every_format
def test_larger_numbers_get_no_smaller_codes(kind: CodeFormat, with_noise: bool) -> None:
    x = torch.cat([torch.zeros(1), torch.logspace(-45, 0, 20_001, dtype=torch.float64).float()])
    bits = torch.full((len(x),), 0x9ABC) if with_noise else None
    codes = encode(x, torch.tensor(1.0), kind, bits).int()
    assert bool((codes.diff() >= 0).all()) and codes[0] == 0 and codes[-1] == kind.largest
    assert bool((codes.unique() == torch.arange(kind.largest + 1)).all())


@every_format
def test_nearest_is_nearest(kind: CodeFormat) -> None:
    """Halves are rounded up; of an unsigned moment only zero itself becomes zero."""
    x = torch.rand(20_000, dtype=torch.float64).pow(8).float()
    table = numbers(kind)
    middles = (table[1:] + table[:-1]) / 2
    expected = torch.searchsorted(middles, x, right=True)
    if not kind.signed:
        expected = expected.clamp(min=1)
    assert torch.equal(encode(x, torch.tensor(1.0), kind, None).long(), expected)
    assert torch.equal(encode(middles, torch.tensor(1.0), kind, None).long(), torch.arange(1, len(table)))


@pytest.mark.parametrize("x", [0.9, 0.03, 1.3 * 2**-16, 0.2 * 2**-16, 1e-9])
@every_format
def test_noise_rounds_right_on_average(kind: CodeFormat, x: float) -> None:
    """It is right within five standard errors, except that squares below the smallest code are rounded up."""
    num = 200_000
    got = decode(encode(torch.full((num,), x), torch.tensor(1.0), kind, noise(num)), torch.tensor(1.0), kind).double()
    assert len(got.unique()) <= 2
    if not kind.signed and x < kind.smallest:
        assert got.unique().item() == kind.smallest
    else:
        assert abs(got.mean() - torch.tensor(x)) <= 5 * got.std() / num**0.5
        assert len(got.unique()) == 2 or x == 1e-9


@pytest.mark.parametrize("with_noise", [False, True])
def test_a_square_is_zero_only_where_it_is(with_noise: bool) -> None:
    tiny = torch.tensor([0.0, 1e-45, 1e-38, 1e-20, 1.0])
    codes = encode(tiny, torch.tensor(1.0), UNSIGNED_CODES, noise(5) if with_noise else None)
    assert (codes > 0).tolist() == [False, True, True, True, True]


@pytest.mark.parametrize("with_noise", [False, True])
@every_format
def test_zeros_alone(kind: CodeFormat, with_noise: bool) -> None:
    zero = torch.zeros(64)
    assert not encode(zero, torch.tensor(0.0), kind, noise(64) if with_noise else None).any()
    assert not decode(torch.zeros(3, dtype=torch.uint8), torch.tensor(5.0), kind).any()


def test_the_sign_changes_nothing_else() -> None:
    x = torch.rand(10_000, dtype=torch.float64).pow(8).float()
    plus, minus = (encode(y, torch.tensor(1.0), SIGNED_CODES, noise(10_000)) for y in (x, -x))
    assert torch.equal(plus, minus & 0x7F) and bool((minus >= 128)[x > 0].all())
