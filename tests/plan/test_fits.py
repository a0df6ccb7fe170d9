"""``fits`` finds the largest density, or the largest batch."""

import pytest

import smet_compile as smet

SETTING = {"block_shape": 8, "sequence": 32, "compiled": False, "vocabulary": 256}


def test_fits_finds_the_largest_density() -> None:
    found = smet.plan("nano", batch=1, fits="650kB", **SETTING)
    assert 0.05 < found.density < 0.95 and found.sparse.peak <= 650_000
    assert smet.plan("nano", found.density + 0.01, batch=1, **SETTING).sparse.peak > 650_000
    whole = smet.plan("nano", batch=1, fits="10GiB", **SETTING)
    assert whole.density == 1 and not whole.warnings


def test_fits_finds_the_largest_batch() -> None:
    found = smet.plan("nano", 0.25, fits=5e6, **SETTING)
    assert found.density == 0.25 and found.batch > 1 and found.sparse.peak <= 5_000_000
    assert smet.plan("nano", 0.25, batch=found.batch + 1, **SETTING).sparse.peak > 5_000_000


@pytest.mark.parametrize("left_open", [{"density": 0.25}, {"batch": 1}], ids=str)
def test_too_few_bytes_are_refused(left_open: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"fits: expected at least [\d,]+ bytes \(.* kB\), the least there is"):
        smet.plan("nano", fits="1kB", **left_open, **SETTING)
