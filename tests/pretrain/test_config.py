import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy
import pytest

from smet_compile.pretrain.config import OPTION_TYPES, resolve
from smet_compile.pretrain.folder import read_config, write_config
from smet_compile.pretrain.training import build_training, rate_fraction, rate_schedule


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
        ("steps", 0, "--steps: expected a whole number of at least 1, got 0"),
        ("save_every", 0, "--save-every: expected a whole number of at least 1, got 0"),
        ("embedding_lr", 0.0, "--embedding-lr: expected a finite number above 0, got 0.0"),
        ("initial_block_warmup", -1, "--initial-block-warmup: expected a whole number of at least 0, got -1"),
        ("lr", -1.0, "--lr: expected a finite number above 0, got -1.0"),
        ("sequence", 1, "--sequence: expected a whole number of at least 2, got 1"),
        ("lr", math.inf, "--lr: expected a finite number above 0, got inf"),
        ("density", math.nan, r"--density: expected a number in \(0, 1\], got nan"),
        ("drop_fraction", 1.0, r"--drop-fraction: expected a number in \[0, 1\), got 1.0"),
        ("final_drop_fraction", -0.1, r"--final-drop-fraction: expected a number in \[0, 1\), got -0.1"),
        ("schedule", "cosin", "--schedule: expected one of cosine, linear, constant, none, got 'cosin'"),
        ("lr_density_exponent", 5000.0, r"--lr-density-exponent: expected an exponent p .*, got 5000.0"),
        ("lr_density_exponent", -5000.0, r"--lr-density-exponent: expected an exponent p .*, got -5000.0"),
        ("block", "１６", "--block: expected a side such as 16 .*, got '１６'"),
        ("block", "²", "--block: expected a side such as 16 .*, got '²'"),
        ("block", "1x", "--block: expected a side such as 16 .*, got '1x'"),
        ("block", "16x16x16", "--block: expected a side such as 16 .*, got '16x16x16'"),
        ("block", "99999999999999999999", "--block: expected a side such as 16 .*, got '9999"),
        ("block", "70000", "--block: expected sides from 1 to 65536, got '70000'"),
        ("seed", 2**70, r"--seed: expected a whole number in \[0, 9223372036854775807\], got 1180591620717411303424"),
        ("device", "meta", "--device: expected a torch device .*, got 'meta'"),
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
    assert resolve(every=7).block_warmup == resolve(every=7).initial_block_warmup == 7
    assert resolve(block_warmup=9).initial_block_warmup == 9 and resolve().initial_block_warmup == resolve().every
    assert resolve(lr=0.2).embedding_lr == 0.2 and resolve().embedding_lr == resolve().lr


@pytest.mark.parametrize(
    ("options", "schedule"),
    [
        ({}, "cosine"),
        ({"block": "1x16"}, "cosine"),
        ({"block": "16x1", "method": "smet-rigl"}, "cosine"),
        ({"block": "16"}, "none"),
        ({"block": "2x3", "method": "set-naive"}, "cosine"),
        ({"block": "16", "schedule": "linear"}, "linear"),
        ({"schedule": "none"}, "none"),
        ({"method": "static"}, "none"),
        ({"method": "static", "block": "16", "schedule": "none"}, "none"),
    ],
    ids=str,
)
def test_tiles_move_only_where_a_method_or_a_schedule_says_so(options: dict[str, str], schedule: str) -> None:
    assert resolve(**options).schedule == schedule


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_a_static_topology_has_no_schedule(schedule: str) -> None:
    with pytest.raises(ValueError, match=f"--schedule: expected none, since --method static .*, got {schedule}; pass"):
        resolve(method="static", schedule=schedule)


def test_dense_training_has_density_one() -> None:
    assert resolve(method="dense", density=0.3).density == 1.0


def test_a_config_comes_back_from_its_file(tmp_path: Path) -> None:
    config = resolve(preset="nano", block="1x16", lr=0.1 + 0.2)
    write_config(tmp_path / "config.json", config)
    assert read_config(tmp_path / "config.json") == config


def written(folder: Path, **changes: Any) -> Path:
    """Writes the config.json of a run, with changes made by hand."""
    path = folder / "config.json"
    write_config(path, resolve(preset="nano", steps=24, lr=0.5, moment_dtype="int8", dtype="bfloat16", seed=7))
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def test_a_file_that_is_not_the_config_of_a_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"preset": "tiny"}')
    with pytest.raises(
        ValueError, match=r"config\.json: expected the options of a run, got a file without method, den"
    ):
        read_config(path)


def test_an_option_of_a_newer_version_is_named_with_its_value(tmp_path: Path) -> None:
    path = written(tmp_path, densty=0.3, model_type="llama")
    with pytest.raises(
        ValueError,
        match=r"config\.json: expected options .*, got densty: 0\.3, model_type: 'llama'; resume with .*take",
    ):
        read_config(path)


def test_a_run_of_the_first_version_goes_on(tmp_path: Path) -> None:
    """Its file has none of the options that were added since, however many those become."""
    path = tmp_path / "config.json"
    old = {"preset": "nano", "method": "smet-rigl", "density": 0.3, "block": "1", "steps": 40, "batch": 4}
    old |= {"accumulate": 1, "sequence": 32, "lr": 3e-3, "every": 2, "seed": 0}
    path.write_text(json.dumps(old))
    config = read_config(path)
    assert (config.grow, config.distribution, config.clip, config.model) == ("gradient", "uniform", 0.0, "none")
    assert (config.log, config.column, config.pattern) == ("none", "text", "none")


@pytest.mark.parametrize("name", OPTION_TYPES)
def test_an_option_that_was_added_later_gets_its_default(name: str, tmp_path: Path) -> None:
    path = written(tmp_path)
    values = json.loads(path.read_text())
    del values[name]
    path.write_text(json.dumps(values))
    assert read_config(path) == resolve(**values)
    left_out = {"moment_dtype": "bfloat16", "every": 1, "save_every": 2, "steps": 40, "lr": 3e-3, "eager": False}
    assert name not in left_out or getattr(read_config(path), name) == left_out[name]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "expected JSON, got"),
        (b"", "expected JSON, got"),
        (b'{"preset": "caf\xe9"}', "expected JSON, got 'utf-8' codec"),
        (b"\0" * 300, "expected JSON, got"),
        (b"[" * 100_000, "expected JSON, got"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "expected JSON, got"),
        (b"[1, 2]", r"expected a JSON object of options, got \[1, 2\]"),
        (b"null", "expected a JSON object of options, got None"),
        (b'"tiny"', "expected a JSON object of options, got 'tiny'"),
    ],
)
def test_a_file_that_is_no_config(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json: " + message):
        read_config(tmp_path / "config.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder: expected a file that can be read, got Is a directory"):
        read_config(tmp_path / "folder")


WRONG_FOR = {
    int: [True, 1.0, 1.5, "4", None, [], {}, math.nan, 2**63, -(2**70), 10**400, -1],
    float: [True, "0.3", None, [0.3], {}, math.nan, math.inf, -math.inf, 10**400],
    str: [1, True, None, [], {}, "", "a\0b", 0.5],
    bool: [0, 1, "true", None, [], 0.0],
}
WRONG = [(name, value) for name, kind in OPTION_TYPES.items() for value in WRONG_FOR[kind]]


def test_every_option_of_a_wrong_type_or_range_is_named_with_its_file(tmp_path: Path) -> None:
    assert len(WRONG) > 200
    for name, value in WRONG:
        option = f"--{name.replace('_', '-')}"
        with pytest.raises(ValueError, match=f"{option}: expected "):
            resolve(**{"preset": "nano", name: value})
        if value != 10**400:  # Python reads no number of that length from a file
            path = written(tmp_path, **{name: value})
            with pytest.raises(ValueError, match=rf"config\.json: {option}: expected .*; restore the file, or begin"):
                read_config(path)


def test_numbers_of_numpy_become_numbers_of_python() -> None:
    config = resolve(
        preset="nano", steps=numpy.int32(12), lr=numpy.float32(0.5), eager=numpy.bool_(True), density=Fraction(1, 4)
    )
    assert (config.steps, config.lr, config.eager, config.density) == (12, 0.5, True, 0.25)
    assert [type(getattr(config, name)) for name in ("steps", "lr", "eager", "density")] == [int, float, bool, float]
    assert type(resolve(lr=1).lr) is float


def test_a_config_is_written_whole_and_leaves_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path)
    for left in ("config.json.tmp", "config.json.0123456789abcdef.tmp"):
        (tmp_path / left).write_text("left by a kill")
    before = path.read_text()

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", no_space)
        with pytest.raises(OSError, match="No space left"):
            write_config(path, resolve())
    assert {entry.name: entry.read_text() for entry in tmp_path.iterdir()} == {"config.json": before}


def test_the_learning_rate_rises_then_falls_to_a_tenth() -> None:
    config = resolve(steps=100, warmup=10, lr=1.0)
    rates = [rate_fraction(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 and max(rates) == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert rate_fraction(resolve(steps=1), 0) > 0


def test_a_schedule_that_begins_later_gives_the_same_rates(tmp_path: Path) -> None:
    config = resolve(preset="nano", steps=12, warmup=3, lr=1e-2, embedding_lr=3e-2, device="cpu", eager=True)
    training = build_training(config, 256)
    whole, found = rate_schedule(training, config), []
    for _ in range(12):
        found.append(whole.get_last_lr())
        training.optimizer.step()
        whole.step()
    assert found[2] == [1e-2, 3e-2, 3e-2][: len(found[2])]
    assert [rate_schedule(training, config, first).get_last_lr() for first in range(12)] == found
