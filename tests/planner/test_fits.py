"""``fits`` finds the largest density, or the largest batch."""

import pytest

import smet_compile as smet

SETTING = {"block_shape": 16, "sequence": 32, "compiled": False, "vocabulary": 256}


def test_the_largest_density() -> None:
    found = smet.plan("9m", batch=2, fits="10MB", **SETTING)
    assert found.sparse.peak <= 10_000_000 < smet.plan("9m", found.density + 0.01, batch=2, **SETTING).sparse.peak
    assert smet.plan("9m", batch=2, fits="10GiB", **SETTING).density == 1


def test_the_largest_batch() -> None:
    found = smet.plan("9m", 0.25, fits=50_000_000, **SETTING)
    assert found.density == 0.25 and found.batch > 1 and found.sparse.peak <= 50_000_000
    assert smet.plan("9m", 0.25, batch=found.batch + 1, **SETTING).sparse.peak > 50_000_000


@pytest.mark.parametrize("left_open", [{"density": 0.25}, {"batch": 1}], ids=str)
def test_nothing_fits(left_open: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"fits: expected at least [\d,]+ bytes \(.* MB\), the least there is"):
        smet.plan("9m", fits="1MB", **left_open, **SETTING)
