"""Builds the model, its optimizer and its topology manager, and takes one step of training them."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import smet_compile as smet
from smet_compile.convert.distribution import Distribution
from smet_compile.format.arguments import described
from smet_compile.presets import build_preset
from smet_compile.pretrain.config import DTYPES, METHODS, MOMENT_DTYPES, Method, RunConfig, parse_pattern
from smet_compile.pretrain.model_config import NO_MODEL, build_from_config
from smet_compile.pretrain.world import ALONE, World, set_gradient_sync
from smet_compile.runtime.policies import GrowName
from smet_compile.runtime.schedules import ScheduleName
from smet_compile.shards import reshard
from smet_compile.shards.styles import styles_of

FINAL_RATE_FRACTION = 0.1


class GradientBytes:
    """Notes the bytes of each gradient at an optimizer's first step: 0 where an update was fused into backward."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._bytes: dict[nn.Parameter, int] | None = None
        optimizer.register_step_pre_hook(self._note)

    def _note(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._bytes is not None:  # a hook cannot remove itself: the optimizer is walking through its hooks
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._bytes = {p: p.grad.nbytes for p in parameters if p.grad is not None}

    def bytes_of(self, parameter: nn.Parameter) -> int:
        return (self._bytes or {}).get(parameter, 0)


@dataclass
class Training:
    """Holds all that a step changes, and `step`, which takes a micro-batch. `manager` is None in dense training.

    `peak_rates` are those of the parameter groups; the first is `--lr`.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    manager: smet.TopologyManager | None
    step: Callable[[dict[str, Tensor]], Tensor]
    world: World = ALONE
    gradients: GradientBytes = field(init=False)
    peak_rates: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.peak_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.gradients = GradientBytes(self.optimizer)


def build_model(config: RunConfig, vocab_size: int, device: str) -> nn.Module:
    """Returns an unmodified Hugging Face model of the preset's or the config's shape; on "meta" it takes no memory."""
    if config.model != NO_MODEL:
        return build_from_config(config.model, vocab_size, config.sequence, DTYPES[config.dtype], device)
    return build_preset(config.preset, vocab_size, config.sequence, DTYPES[config.dtype], device)


def build_training(config: RunConfig, vocab_size: int, world: World = ALONE) -> Training:
    """Returns a new model, made sparse, sharded over the ranks and given an optimizer as the method says."""
    torch.manual_seed(config.seed)
    model = build_model(config, vocab_size, config.device)
    slabs = slabs_of(config, model)
    world.cut_layers(model)
    method = METHODS[config.method]
    if method is None:
        optimizer = dense_optimizer(config, world.shard(model, DTYPES[config.dtype]))
        return Training(model, optimizer, None, _step(config, model, optimizer, world), world)
    sparsify_as(config, model, slabs)
    world.shard(model, DTYPES[config.dtype])
    optimizer, manager = sparse_parts(config, model)
    return Training(model, optimizer, manager, _step(config, model, optimizer, world), world)


def sparsify_as(config: RunConfig, model: nn.Module, slabs: dict[str, tuple[int, int]] | None) -> None:
    """Makes a model sparse as the options say."""
    smet.sparsify(
        model,
        config.density,
        block_shape=config.block_shape,
        distribution=cast(Distribution, config.distribution),
        pattern=parse_pattern(config.pattern),
        seed=config.seed,
        slabs=slabs,
    )


def sparse_parts(config: RunConfig, model: nn.Module) -> tuple[torch.optim.Optimizer, smet.TopologyManager]:
    """Returns the optimizer and the manager of a sparse model."""
    method = METHODS[config.method]
    assert method is not None
    optimizer = _sparse_optimizer(config, method, model)
    manager = smet.TopologyManager(
        model,
        optimizer,
        total_steps=config.steps,
        every=config.every,
        drop_fraction=config.drop_fraction,
        final_drop_fraction=config.final_drop_fraction,
        grow=cast(GrowName, config.grow),
        schedule=cast(ScheduleName, config.schedule),
        min_age=config.min_age,
        seed=config.seed,
        auto_step=False,  # it steps when gradients are gone, and checkpoints hold its state
    )
    return optimizer, manager


def slabs_of(config: RunConfig, model: nn.Module) -> dict[str, tuple[int, int]] | None:
    """Returns the slabs of each weight that tensor parallelism may cut: rows or columns, by the model's own plan."""
    if config.slabs == 1:
        return None
    shape: Any = cast(Any, model.config).get_text_config()
    heads: int = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    if heads % config.slabs:
        raise ValueError(
            f"--slabs: expected a number that divides the {heads} heads of keys of {_shape_text(config)}, got "
            f"{config.slabs}; pass another --slabs, or another N of --shard tp=N"
        )
    return {name: (config.slabs, 0 if style == "colwise" else 1) for name, style in styles_of(model).items()}


def _shape_text(config: RunConfig) -> str:
    return f"preset {config.preset}" if config.model == NO_MODEL else f"this {config.shape_name}"


def expect_device(device: str) -> None:
    """Raises ValueError where this machine cannot compute on `device`."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"--device: expected a device of this machine such as cpu, got {described(device)} ({reason}); "
            "pass another one"
        ) from error


def dense_optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Returns plain AdamW."""
    return torch.optim.AdamW(_groups(config, model), lr=config.lr)


def _groups(config: RunConfig, model: nn.Module) -> list[dict[str, Any]]:
    """Returns the parameter groups; where all rates are alike, they are those of runs of older versions."""
    own_rate = None if config.embedding_lr == config.lr else config.embedding_lr
    return smet.param_groups(model, config.lr, embedding_lr=own_rate, weight_decay=config.weight_decay)


def _sparse_optimizer(config: RunConfig, method: Method, model: nn.Module) -> torch.optim.Optimizer:
    make = smet.NaiveAdamW if method.naive else smet.ActiveAdamW
    return make(
        _groups(config, model),
        lr=config.lr,
        warmup_steps=0 if method.naive else config.block_warmup,
        initial_warmup_steps=0 if method.naive else config.initial_block_warmup,
        lr_density_exponent=config.lr_density_exponent,
        moment_dtype=MOMENT_DTYPES[config.moment_dtype],
        model=model,
        seed=config.seed,
    )


def rate_fraction(config: RunConfig, step: int) -> float:
    """Returns the rate of step `step` (from 0) over the peak: linear warm-up to 1, then a cosine to 10%."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return FINAL_RATE_FRACTION + (1 - FINAL_RATE_FRACTION) * cosine


def rate_schedule(training: Training, config: RunConfig, first: int = 0) -> LambdaLR:
    """Gives all parameter groups the rate of the step after the first `first` ones; `step()` goes on to the next."""
    for group, peak in zip(training.optimizer.param_groups, training.peak_rates, strict=True):
        group["initial_lr"] = peak
    return LambdaLR(training.optimizer, lambda step: rate_fraction(config, step), last_epoch=first - 1)


class TwoCallStep:
    """Calls `loss.backward()`, and after `accumulate` of them `optimizer.step()`, as any training script does."""

    def __init__(self, model: Callable[..., Any], optimizer: torch.optim.Optimizer, config: RunConfig) -> None:
        self.model = model
        self.optimizer = optimizer
        self.accumulate = config.accumulate
        self.clip = config.clip
        self._num_accumulated = 0

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        self._num_accumulated += 1
        is_last = self._num_accumulated == self.accumulate
        set_gradient_sync(self.model, is_last)
        loss: Tensor = self.model(**batch).loss
        (loss / self.accumulate).backward()
        if is_last:
            self._num_accumulated = 0
            if self.clip:
                smet.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], self.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach()


def _step(config: RunConfig, model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> Callable[..., Tensor]:
    if config.eager or world.replicas is not None:
        return TwoCallStep(model, optimizer, config)
    if config.method == "dense":
        return TwoCallStep(torch.compile(model), optimizer, config)
    return smet.compile_train_step(model, optimizer, accumulate=config.accumulate, max_grad_norm=config.clip or None)


@contextmanager
def _explaining_failed_compilation() -> Iterator[None]:
    """Turns a failed compilation into a ValueError that names --eager, which needs no C++ compiler, say."""
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"torch.compile failed ({reason}); train without it: --eager") from error


Outcome = tuple[float, smet.TopologyEvent | None]


def train_step(training: Training, batch: Tensor) -> Outcome:
    """Takes one step on (accumulate, batch, sequence) tokens; returns its mean loss and topology update, if any.

    Each rank gives its rows of the micro-batches; the loss is the mean of all.
    """
    with _explaining_failed_compilation():
        losses = [training.step({"input_ids": micro_batch, "labels": micro_batch}) for micro_batch in batch]
    event = training.manager.step() if training.manager else None
    return training.world.mean(torch.stack(losses).mean()).item(), event


@torch.no_grad()
def validation_loss(training: Training, windows: torch.Tensor, config: RunConfig) -> float:
    """Returns the mean loss per token over (W, sequence) held-out windows, of which each rank takes a share."""
    training.model.eval()
    sums = [_summed_loss(training, part) for part in windows.to(config.device).split(config.batch)]
    training.model.train()
    reshard(training.model)
    return float(training.world.sum_over_readers(torch.stack(sums).sum()) / len(windows))


def _summed_loss(training: Training, windows: Tensor) -> Tensor:
    """Returns the sum of the losses of this rank's share of the windows.

    A rank without a share computes one window all the same, since the others wait for its part of the weights.
    """
    share = training.world.share_of(windows)
    shown = share if len(share) else windows[:1]
    return training.model(input_ids=shown, labels=shown).loss.double() * len(share)
