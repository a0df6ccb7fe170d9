from pathlib import Path
from typing import Any

import pytest

from smet_compile.pretrain.config import read_config, resolve, write_config
from smet_compile.pretrain.training import learning_rate


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("method", "magic", "--method: expected one of smet, .*dense, got 'magic'"),
        ("preset", "huge", "--preset: expected one of .*, got 'huge'"),
        ("dtype", "float8", "--dtype: expected one of float32, bfloat16, got 'float8'"),
        ("moment_dtype", "int4", "--moment-dtype: expected one of float32, bfloat16, int8, got 'int4'"),
        ("density", 0.0, r"--density: expected a number in \(0, 1\], got 0.0"),
        ("density", 1.5, r"--density: expected a number in \(0, 1\], got 1.5"),
        ("block", "16y16", "--block: expected a side such as 16 .*, got '16y16'"),
        ("block", "0", "--block: expected .*, got '0'"),
        ("steps", 0, "--steps: expected at least 1, got 0"),
        ("save_every", 0, "--save-every: expected at least 1, got 0"),
        ("lr", -1.0, "--lr: expected a positive number, got -1.0"),
        ("sequence", 1, "--sequence: expected at least 2 tokens, got 1"),
        ("device", "abacus", "--device: expected a torch device .*, got 'abacus'"),
    ],
)
def test_a_bad_option_is_named(option: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(**{option: value})


@pytest.mark.parametrize(("text", "shape"), [("1", (1, 1)), ("64", (64, 64)), ("1x16", (1, 16))])
def test_block_shapes(text: str, shape: tuple[int, int]) -> None:
    assert resolve(block=text).block_shape == shape


def test_defaults_follow_from_preset_and_steps() -> None:
    demo, long = resolve(preset="tiny", steps=400), resolve(preset="130m")
    assert (demo.every, demo.block_warmup, demo.warmup) == (25, 25, 20)
    assert (long.every, long.block_warmup, long.steps, long.step_tokens) == (100, 100, 20_000, 131_072)
    assert resolve(every=7).block_warmup == 7


def test_dense_training_has_density_one() -> None:
    assert resolve(method="dense", density=0.3).density == 1.0


def test_a_config_comes_back_from_its_file(tmp_path: Path) -> None:
    config = resolve(preset="nano", block="1x16", lr=0.1 + 0.2)
    write_config(tmp_path / "config.json", config)
    assert read_config(tmp_path / "config.json") == config


def test_a_config_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"preset": "tiny"}')
    with pytest.raises(ValueError, match=r"expected exactly the options of this version.*density"):
        read_config(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: expected JSON"):
        read_config(path)


def test_the_learning_rate_rises_then_falls_to_a_tenth() -> None:
    config = resolve(steps=100, warmup=10, lr=1.0)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 and max(rates) == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert learning_rate(resolve(steps=1), 0) > 0
