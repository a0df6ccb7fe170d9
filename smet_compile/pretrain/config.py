"""Defines the settings of a run: a run is a function of its `RunConfig`, whose fields are command-line options."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, get_args

import torch

from smet_compile.convert.distribution import Distribution
from smet_compile.format import arguments
from smet_compile.format.arguments import described
from smet_compile.format.patterns import check_pattern, n_of_m
from smet_compile.presets import PRESETS, find_preset
from smet_compile.pretrain.model_config import NO_MODEL, name_of_model, read_model_config
from smet_compile.pretrain.option_errors import name_options
from smet_compile.runtime.policies import GrowName
from smet_compile.runtime.schedules import DEFAULT_SCHEDULE, SCHEDULES, Schedule, find_min_age

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MOMENT_DTYPES: dict[str, Any] = {**DTYPES, "int8": "int8"}
DISTRIBUTIONS: tuple[str, ...] = get_args(Distribution)
GROWTHS: tuple[str, ...] = get_args(GrowName)
TRACKERS = ("none", "tensorboard", "wandb", "trackio")
LONGEST_SIDE = 65_536
ADVICE = {int: "pass a whole number such as 400", float: "pass a number such as 0.3"}
DIGITS = {
    int: r"[+-]?[0-9]+",
    float: r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(?i:nan|inf|infinity)",
}
MOST_DIGITS = 80


@dataclass(frozen=True)
class Method:
    """Describes a training method: `grow` is the default of `--grow`; `naive` picks `NaiveAdamW`."""

    grow: GrowName = "random"
    naive: bool = False


STATIC = "static"
METHODS: dict[str, Method | None] = {
    "smet": Method(),
    "smet-rigl": Method(grow="gradient"),
    "set-naive": Method(naive=True),
    "rigl-naive": Method(grow="gradient", naive=True),
    STATIC: Method(),
    "dense": None,
}


def _option(text: str, *, known: Iterable[str] = (), **bounds: float) -> Any:
    """Declares an option by its help, and by the names or the bounds that the library's checks take."""
    return field(metadata={"help": text, "known": tuple(known), "bounds": bounds})


class Sharding(NamedTuple):
    """Says how many whole copies of the model the ranks hold together, and among how many of them layers are cut.

    `replicas` is None where each rank holds a copy of its own.
    """

    replicas: int | None = None
    tp: int = 1


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Holds all settings of a pre-training run, checked at construction; `resolve` fills in those that are left out."""

    preset: str = _option(f"Model shape: {', '.join(PRESETS)}. Default: tiny.", known=PRESETS)
    model: str = _option(
        "config.json of any Hugging Face causal model, for its shape; --preset then gives steps, batch and rate."
    )
    method: str = _option(f"Training method: {', '.join(METHODS)}. Default: smet.", known=METHODS)
    density: float = _option("Active fraction of each sparse weight, in (0, 1]. Default: 0.3.", above=0, at_most=1)
    block: str = _option("Block of sparsity: 1 (single weights), 16 (16x16 tiles), 1x16 (runs). Default: 1.")
    distribution: str = _option(
        f"How layers share the density out: {', '.join(DISTRIBUTIONS)}. Default: uniform.", known=DISTRIBUTIONS
    )
    steps: int = _option("Optimizer steps. Default: by preset.", at_least=1)
    batch: int = _option("Sequences in a micro-batch. Default: by preset.", at_least=1)
    accumulate: int = _option("Micro-batches in a step. Default: by preset.", at_least=1)
    sequence: int = _option("Tokens in a sequence. Default: by preset.", at_least=2)
    lr: float = _option("Peak learning rate at density 1. Default: by preset.", above=0)
    embedding_lr: float = _option(
        "Peak learning rate of embeddings, output head, norms and biases. Default: --lr.", above=0
    )
    lr_density_exponent: float = _option("p: a weight of density d trains at lr / d**p. Default: 1.")
    weight_decay: float = _option("Decoupled weight decay of matrices. Default: 0.", at_least=0)
    clip: float = _option("Largest norm of all gradients together; 0 clips none. Default: 0.", at_least=0)
    warmup: int = _option("Learning-rate warm-up in steps. Default: 5% of --steps.", at_least=0)
    every: int = _option("Steps between topology updates. Default: 100, less in runs under 1600 steps.", at_least=1)
    block_warmup: int = _option("Warm-up of a grown block in steps (smet). Default: --every.", at_least=0)
    initial_block_warmup: int = _option(
        "Warm-up of the blocks to start from, in steps (smet, static). Default: --block-warmup.", at_least=0
    )
    drop_fraction: float = _option("Share of blocks moved by the first update. Default: 0.2.", at_least=0, below=1)
    final_drop_fraction: float = _option(
        "Share of blocks moved at the schedule's end. Default: 0.005.", at_least=0, below=1
    )
    schedule: str = _option(
        f"How that share falls: {', '.join(SCHEDULES)} (it stays). Default: cosine; none for static, smet with tiles.",
        known=SCHEDULES,
    )
    grow: str = _option(
        f"How new blocks are chosen: {', '.join(GROWTHS)}. Default: random, gradient for -rigl.", known=GROWTHS
    )
    min_age: int = _option("Steps for which a grown block is not dropped. Default: 2 updates, if they fit.", at_least=0)
    pattern: str = _option("Which blocks may be active: none, fan_in, or N:M such as 2:4. Default: none.")
    data: str = _option("stdlib, text:GLOB, or hf:NAME[:CONFIG], a data set or folder to stream. Default: stdlib.")
    column: str = _option("Column of hf: data that holds the text. Default: text.")
    tokenizer: str = _option("bytes, or the path of a Hugging Face tokenizer. Default: bytes.")
    dtype: str = _option(f"Weights: {', '.join(DTYPES)}. Default: float32.", known=DTYPES)
    moment_dtype: str = _option(
        f"Adam's moments, of sparse methods: {', '.join(MOMENT_DTYPES)}. Default: --dtype.", known=MOMENT_DTYPES
    )
    device: str = _option("Torch device. Default: cuda where there is one, else cpu.")
    shard: str = _option(
        "Share weights and optimizer out among the processes of torchrun: none, fsdp, hsdp=R (R replicas, each shared "
        "out), tp=N (layers cut among N, the rest as fsdp). Default: none. Without torchrun one process trains alone. "
        "Goes with --resume, too."
    )
    elastic: bool = _option(
        "Let ranks and layout change while the run goes on (switch, join), and go on with the run in --out after a "
        "restart. --shard takes fsdp=2,tp=2, too. Default: no."
    )
    slabs: int = _option(
        "Slabs of a weight, which share out its active blocks: N of tp=N divides them. Default: N, else 1.", at_least=1
    )
    eager: bool = _option("Train without torch.compile: no compile time, more memory. Default: compiled.")
    seed: int = _option("Seed of weights, topology and batches. Default: 0.", at_least=0)
    log: str = _option(f"Where metrics go, too: {', '.join(TRACKERS)}. Default: none.", known=TRACKERS)
    save_every: int = _option("Steps between checkpoints. Default: 10% of --steps, at most 1000.", at_least=1)
    eval_every: int = _option("Steps between validations. Default: 10% of --steps, at most 1000.", at_least=1)
    eval_windows: int = _option("Sequences of held-out text in a validation. Default: 256.", at_least=1)

    def __post_init__(self) -> None:
        for name in OPTION_TYPES:
            object.__setattr__(self, name, _checked(name, getattr(self, name)))
        object.__setattr__(self, "model", read_model_config(self.model))
        parse_block(self.block, "--block")
        if self.method == STATIC and self.schedule != "none":
            raise ValueError(
                f"--schedule: expected none, since --method {STATIC} keeps the topology, got {self.schedule}; "
                "pass --method smet"
            )
        rate = _sparse_rate(self.lr, self.density, self.lr_density_exponent)
        if not 0 < rate < math.inf:
            raise ValueError(
                f"--lr-density-exponent: expected an exponent p for which lr / density**p = {self.lr:g} / "
                f"{self.density:g}**p is a positive number, got {self.lr_density_exponent}; pass one closer to 0"
            )
        try:
            find_min_age(self.min_age, self.plain_schedule)
        except ValueError as error:
            raise name_options(error, OPTIONS_OF_ARGUMENTS) from error
        parse_pattern(self.pattern)
        if not _is_device(self.device):
            raise ValueError(f"--device: expected a torch device such as cpu or cuda:0, got {described(self.device)}")
        tp = 1 if self.elastic else parse_shard(self.shard).tp
        if self.slabs % tp:
            raise ValueError(
                f"--shard: expected tp=N with an N that divides the run's {self.slabs} slabs, got {self.shard}; pass "
                "another N, or begin a new run with --slabs"
            )

    @property
    def shape_name(self) -> str:
        """Returns the name of the model's shape: the preset, or the kind of model that `model` describes."""
        return self.preset if self.model == NO_MODEL else name_of_model(self.model)

    @property
    def block_shape(self) -> tuple[int, int]:
        """Returns `block` as (rows, columns): "16" is (16, 16), "1x16" is (1, 16)."""
        return parse_block(self.block, "--block")

    @property
    def sharding(self) -> Sharding:
        """Returns what `--shard` says."""
        return parse_shard(self.shard)

    @property
    def plain_schedule(self) -> Schedule:
        """Returns how often and how much the topology changes, at most."""
        return Schedule(self.every, self.steps, self.drop_fraction, self.final_drop_fraction)

    @property
    def step_tokens(self) -> int:
        """Returns the number of tokens that one optimizer step sees."""
        return self.accumulate * self.batch * self.sequence


OPTION_TYPES: dict[str, Any] = {item.name: item.type for item in fields(RunConfig)}
_DECLARED = {item.name: item.metadata for item in fields(RunConfig)}


def option_name(field: str) -> str:
    """Returns the command-line option of a field: --lr-density-exponent of lr_density_exponent."""
    return "--" + field.replace("_", "-")


OPTIONS_OF_ARGUMENTS = {name: option_name(name) for name in OPTION_TYPES if name != "model"} | {
    "block_shape": "--block", "total_steps": "--steps", "warmup_steps": "--block-warmup",
}  # fmt: skip
"""Options by the arguments of the library that they become; its `model` is the model itself."""


def from_text(text: Any, kind: type) -> Any:
    """Returns the number that `text` writes in plain digits, or `text` itself, which the check of a number refuses."""
    is_number = kind in DIGITS and len(text) <= MOST_DIGITS and re.fullmatch(DIGITS[kind], text)
    return kind(text) if is_number else text


def check_number(option: str, value: object, kind: type, **bounds: Any) -> int | float:
    """Returns `value` as an int or a finite float within the bounds; a ValueError names `option` otherwise."""
    check = arguments.whole_number if kind is int else arguments.number
    return check(option, value, advice=ADVICE[kind], **bounds)


def check_text(option: str, value: object) -> str:
    """Returns `value`, a text that may be part of a path; a ValueError names `option` otherwise."""
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(
            f"{option}: expected text that is not empty and holds no NUL character, got {described(value)}; "
            "leave the option out for its default"
        )
    return str(value)


def _checked(name: str, value: object) -> Any:
    option, kind, declared = option_name(name), OPTION_TYPES[name], _DECLARED[name]
    if kind is bool:
        return arguments.flag(option, value)
    if kind is not str:
        return check_number(option, value, kind, **declared["bounds"])
    text = check_text(option, value)
    return arguments.one_of(option, text, declared["known"]) if declared["known"] else text


def parse_block(text: str, option: str) -> tuple[int, int]:
    """Returns (rows, columns) of "16" or "1x16"; a ValueError names `option` for anything else."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdecimal() and len(side) < 9 for side in sides):
        raise ValueError(f"{option}: expected a side such as 16 or a shape such as 1x16, got {described(text)}")
    rows, columns = int(sides[0]), int(sides[-1])
    if not 1 <= min(rows, columns) <= max(rows, columns) <= LONGEST_SIDE:
        raise ValueError(f"{option}: expected sides from 1 to {LONGEST_SIDE}, got {described(text)}; pass 16, say")
    return rows, columns


def parse_pattern(text: str) -> str | None:
    """Returns the pattern as `sparsify` takes it; "none" is None. A ValueError names --pattern for anything else."""
    try:
        return None if text == "none" else check_pattern(text)
    except ValueError as error:
        raise ValueError(
            f"--pattern: expected none, fan_in, or N:M with 0 < N < M, got {described(text)}; pass 2:4, say"
        ) from error


def parse_shard(text: str) -> Sharding:
    """Reads "none", "fsdp", "hsdp=R" (R replicas) or "tp=N" (layers cut among N ranks)."""
    kind, _, number = text.partition("=")
    if text in ("none", "fsdp"):
        return Sharding(None if text == "none" else 1)
    if kind not in ("hsdp", "tp") or not re.fullmatch("[0-9]{1,8}", number) or not int(number):
        raise ValueError(
            "--shard: expected none, fsdp, hsdp=R such as hsdp=2 (2 replicas), or tp=N such as tp=2 (layers cut among "
            f"2 ranks), got {described(text)}"
        )
    return Sharding(int(number)) if kind == "hsdp" else Sharding(1, int(number))


def _sparse_rate(lr: float, density: float, exponent: float) -> float:
    """Returns lr / density**exponent; 0 or infinity where floats cannot hold it."""
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


def _default_density(given: dict[str, Any]) -> float:
    ratio = n_of_m(parse_pattern(given.get("pattern", "none")))
    return ratio[0] / ratio[1] if ratio else 0.3


def _default_schedule(given: dict[str, Any]) -> str:
    """Returns "none" for a method that keeps the topology, and for "smet" with tiles, which better stay in place."""
    method = given.get("method", "smet")
    stays = method == STATIC or (method == "smet" and min(parse_block(given.get("block", "1"), "--block")) > 1)
    return "none" if stays else DEFAULT_SCHEDULE


def _default_growth(given: dict[str, Any]) -> str:
    method = METHODS.get(given.get("method", "smet"))
    return method.grow if method else "random"


def _default_min_age(every: int, given: dict[str, Any]) -> int:
    fractions = given.get("drop_fraction", 0.2), given.get("final_drop_fraction", 0.005)
    return find_min_age(None, Schedule(every, 0.0, *fractions))


def _default_slabs(given: dict[str, Any]) -> int:
    shard = given.get("shard", "none")
    if not given.get("elastic"):
        return parse_shard(shard).tp
    found = re.search(r"\btp=([1-9][0-9]*)", shard)
    return int(found[1]) if found else 1


def resolve(**given: Any) -> RunConfig:
    """Returns a complete `RunConfig` of the options `given`; the others follow from preset and number of steps.

    Dense training has density 1 whatever is given. Raises ValueError for a value that no run can have.
    """
    given = {name: _checked(name, value) if name in OPTION_TYPES else value for name, value in given.items()}
    preset = find_preset(given.get("preset", "tiny"))
    steps = given.get("steps", preset.steps)
    every = given.get("every", max(1, min(100, steps // 16)))
    tenth = max(1, min(1000, steps // 10))
    defaults = {
        "preset": "tiny", "method": "smet", "model": NO_MODEL, "density": _default_density(given), "block": "1",
        "distribution": "uniform", "steps": steps, "batch": preset.batch, "accumulate": preset.accumulate,
        "sequence": preset.sequence, "lr": preset.lr, "embedding_lr": given.get("lr", preset.lr),
        "lr_density_exponent": 1.0, "weight_decay": 0.0, "clip": 0.0, "warmup": steps // 20,
        "every": every, "block_warmup": every, "initial_block_warmup": given.get("block_warmup", every),
        "drop_fraction": 0.2, "final_drop_fraction": 0.005, "schedule": _default_schedule(given),
        "grow": _default_growth(given), "min_age": _default_min_age(every, given), "pattern": "none",
        "data": "stdlib", "column": "text", "tokenizer": "bytes",
        "dtype": "float32", "moment_dtype": given.get("dtype", "float32"),
        "device": "cuda" if torch.cuda.is_available() else "cpu", "shard": "fsdp" if given.get("elastic") else "none",
        "slabs": _default_slabs(given), "elastic": False, "eager": False, "seed": 0, "log": "none",
        "save_every": tenth, "eval_every": tenth, "eval_windows": 256,
    }  # fmt: skip
    config = RunConfig(**(defaults | given))
    return replace(config, density=1.0) if config.method == "dense" else config
