"""A run is a function of its `RunConfig`; each field is also a command-line option."""

import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from smet_compile.presets import PRESETS, find_preset
from smet_compile.pretrain.durable import write_atomically
from smet_compile.pretrain.methods import METHODS, find_method
from smet_compile.pretrain.option_values import checked, option_name, shown

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MOMENT_DTYPES: dict[str, Any] = {**DTYPES, "int8": "int8"}
LONGEST_SIDE = 65_536


def _option(text: str) -> Any:
    return field(metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of one pre-training run, checked at construction; `resolve` fills in what is not said."""

    preset: str = _option(f"Model shape: {', '.join(PRESETS)}. Default: tiny.")
    method: str = _option(f"Training method: {', '.join(METHODS)}. Default: smet.")
    density: float = _option("Active fraction of each sparse weight, in (0, 1]. Default: 0.3.")
    block: str = _option("Block of sparsity: 1 (single weights), 16 (16x16 tiles), 1x16 (runs). Default: 1.")
    steps: int = _option("Optimizer steps. Default: by preset.")
    batch: int = _option("Sequences in a micro-batch. Default: by preset.")
    accumulate: int = _option("Micro-batches in a step. Default: by preset.")
    sequence: int = _option("Tokens in a sequence. Default: by preset.")
    lr: float = _option("Peak learning rate at density 1. Default: by preset.")
    lr_density_exponent: float = _option("p: a weight of density d trains at lr / d**p. Default: 1.")
    weight_decay: float = _option("Decoupled weight decay of matrices. Default: 0.")
    warmup: int = _option("Learning-rate warm-up in steps. Default: 5% of --steps.")
    every: int = _option("Steps between topology updates. Default: 100, less in runs under 1600 steps.")
    block_warmup: int = _option("Warm-up of a new block in steps (smet, static). Default: --every.")
    drop_fraction: float = _option("Share of blocks moved by the first update. Default: 0.2.")
    final_drop_fraction: float = _option("Share of blocks moved at the schedule's end. Default: 0.005.")
    data: str = _option("stdlib, text:GLOB or hf:NAME[:CONFIG]. Default: stdlib.")
    tokenizer: str = _option("bytes, or the path of a Hugging Face tokenizer. Default: bytes.")
    dtype: str = _option(f"Weights: {', '.join(DTYPES)}. Default: float32.")
    moment_dtype: str = _option(f"Adam's moments, of sparse methods: {', '.join(MOMENT_DTYPES)}. Default: --dtype.")
    device: str = _option("Torch device. Default: cuda where there is one, else cpu.")
    eager: bool = _option("Train without torch.compile: no compile time, more memory. Default: compiled.")
    seed: int = _option("Seed of weights, topology and batches. Default: 0.")
    save_every: int = _option("Steps between checkpoints. Default: 10% of --steps, at most 1000.")
    eval_every: int = _option("Steps between validations. Default: 10% of --steps, at most 1000.")
    eval_windows: int = _option("Sequences of held-out text in a validation. Default: 256.")

    def __post_init__(self) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, _checked(item.name, getattr(self, item.name)))
        find_preset(self.preset)
        find_method(self.method)
        self._expect("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        self._expect("moment_dtype", self.moment_dtype in MOMENT_DTYPES, f"one of {', '.join(MOMENT_DTYPES)}")
        self._expect("sequence", self.sequence >= 2, "at least 2 tokens")
        for name in ("steps", "batch", "accumulate", "every", "save_every", "eval_every", "eval_windows"):
            self._expect(name, getattr(self, name) >= 1, "at least 1")
        self._expect("density", 0 < self.density <= 1, "a number in (0, 1]")
        self._expect("lr", 0 < self.lr < math.inf, "a positive number")
        for name in ("drop_fraction", "final_drop_fraction"):
            self._expect(name, 0 <= getattr(self, name) < 1, "a number in [0, 1)")
        for name in ("weight_decay", "warmup", "block_warmup", "seed"):
            self._expect(name, 0 <= getattr(self, name) < math.inf, "no negative number")
        rate = _sparse_rate(self.lr, self.density, self.lr_density_exponent)
        expected = f"an exponent p for which lr / density**p = {self.lr:g} / {self.density:g}**p is a positive number"
        self._expect("lr_density_exponent", 0 < rate < math.inf, expected)
        parse_block(self.block, "--block")
        self._expect("device", _is_device(self.device), "a torch device such as cpu or cuda:0")

    def _expect(self, name: str, met: bool, expected: str) -> None:
        if not met:
            raise ValueError(f"{option_name(name)}: expected {expected}, got {shown(getattr(self, name))}")

    @property
    def block_shape(self) -> tuple[int, int]:
        """`block` as (rows, columns): "16" is (16, 16), "1x16" is (1, 16)."""
        return parse_block(self.block, "--block")

    @property
    def step_tokens(self) -> int:
        """Tokens that one optimizer step sees."""
        return self.accumulate * self.batch * self.sequence


KINDS: dict[str, Any] = {item.name: item.type for item in fields(RunConfig)}


def parse_block(text: str, option: str) -> tuple[int, int]:
    """(rows, columns) of "16" or "1x16"; a ValueError that names `option` for anything else."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdecimal() and len(side) < 9 for side in sides):
        raise ValueError(f"{option}: expected a side such as 16 or a shape such as 1x16, got {shown(text)}")
    rows, columns = int(sides[0]), int(sides[-1])
    if not 1 <= min(rows, columns) <= max(rows, columns) <= LONGEST_SIDE:
        raise ValueError(f"{option}: expected sides from 1 to {LONGEST_SIDE}, got {shown(text)}")
    return rows, columns


def _checked(name: str, value: Any) -> Any:
    return checked(option_name(name), value, KINDS[name])


def _sparse_rate(lr: float, density: float, exponent: float) -> float:
    """lr / density**exponent, 0 or infinity or NaN where floats cannot hold it."""
    try:
        return lr / density**exponent
    except ZeroDivisionError:
        return math.inf
    except OverflowError:
        return 0.0


def _is_device(name: str) -> bool:
    try:
        return torch.device(name).type != "meta"
    except RuntimeError:
        return False


def resolve(**given: Any) -> RunConfig:
    """A complete `RunConfig` from the options `given`; the others follow from preset and number of steps.

    Dense training has density 1 whatever is given. Raises ValueError for a value that no run can have.
    """
    given = {name: _checked(name, value) if name in KINDS else value for name, value in given.items()}
    preset = find_preset(given.get("preset", "tiny"))
    steps = given.get("steps", preset.steps)
    every = given.get("every", max(1, min(100, steps // 16)))
    tenth = max(1, min(1000, steps // 10))
    defaults = {
        "preset": "tiny", "method": "smet", "density": 0.3, "block": "1",
        "steps": steps, "batch": preset.batch, "accumulate": preset.accumulate, "sequence": preset.sequence,
        "lr": preset.lr, "lr_density_exponent": 1.0, "weight_decay": 0.0, "warmup": steps // 20,
        "every": every, "block_warmup": every, "drop_fraction": 0.2, "final_drop_fraction": 0.005,
        "data": "stdlib", "tokenizer": "bytes", "dtype": "float32", "moment_dtype": given.get("dtype", "float32"),
        "device": _default_device(), "eager": False, "seed": 0,
        "save_every": tenth, "eval_every": tenth, "eval_windows": 256,
    }  # fmt: skip
    config = RunConfig(**(defaults | given))
    return replace(config, density=1.0) if config.method == "dense" else config


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def write_config(path: Path, config: RunConfig) -> None:
    """Write `config` as JSON; the file appears whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(asdict(config), indent=2) + "\n"))


def read_config(path: Path) -> RunConfig:
    """The config that `write_config` wrote, by this version or an older one.

    An option that is missing, as one that was added later, gets the default that follows from the others. Raises
    ValueError, which names the file and the option, for unknown options (of a newer version) and wrong values.
    """
    values = _read_json(path)
    wrong = set(values) - KINDS.keys()
    if 2 * len(values) < len(KINDS):
        wrong |= KINDS.keys() - set(values)
    if wrong:
        raise ValueError(f"{path}: expected exactly the options of this version, got another set "
                         f"({', '.join(sorted(wrong))}); resume with the version that wrote it")  # fmt: skip
    try:
        return resolve(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; restore the file, or begin a new run with --out") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: expected a file that can be read, got {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got {error}; begin a new run with --out") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object of options, got {shown(values)}; begin a new run with --out")
    return values
