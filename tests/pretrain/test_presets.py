import pytest

from smet_compile.presets import PRESETS, find_preset
from smet_compile.pretrain.config import resolve
from smet_compile.pretrain.training import build_model

LLAMA = {
    "9m": (128, 352, 4, 4),
    "20m": (256, 688, 4, 4),
    "60m": (512, 1376, 8, 8),
    "130m": (768, 2048, 12, 12),
    "240m": (768, 2416, 16, 24),
    "350m": (1024, 2736, 16, 24),
    "1b": (2048, 5461, 32, 24),
    "3b": (2560, 6848, 32, 32),
    "7b": (4096, 11008, 32, 32),
    "13b": (5120, 13824, 40, 40),
    "34b": (8192, 22016, 64, 48),
    "70b": (8192, 28672, 64, 80),
}
MILLIONS = {
    "9m": 9.0, "20m": 19.5, "60m": 58.1, "130m": 134.1, "350m": 368.0, "1b": 1339.1, "7b": 6738.4, "13b": 13015.9,
    "34b": 33744.0, "70b": 68976.6,
}  # fmt: skip


@pytest.mark.parametrize("name", LLAMA)
def test_shapes_are_those_of_the_authors(name: str) -> None:
    preset = PRESETS[name]
    assert (preset.hidden, preset.intermediate, preset.heads, preset.layers) == LLAMA[name]


@pytest.mark.parametrize("name", MILLIONS)
def test_parameters_at_a_vocabulary_of_32000(name: str) -> None:
    model = build_model(resolve(preset=name), 32000, "meta")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(MILLIONS[name], abs=0.06)


def test_tiny_is_small_enough_for_two_cores() -> None:
    model = build_model(resolve(preset="tiny"), 256, "meta")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert 1.0e6 < sum(p.numel() for p in model.parameters()) < 1.5e6


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"--preset: expected one of .*tiny.*70b, got 'huge'"):
        find_preset("huge")
