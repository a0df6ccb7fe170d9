"""Trains one case and returns its record."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import smet_compile as smet
from benchmarks.measuring import processor
from benchmarks.studies.case import Case
from benchmarks.studies.cloze import Cloze
from benchmarks.studies.corpus import Corpus
from benchmarks.studies.optimizers import DTYPES, make_optimizer
from benchmarks.studies.permuted import permute_units
from benchmarks.studies.probe import Probe
from benchmarks.studies.products import fast_products
from benchmarks.studies.scattered import scatter

FINAL_RATE = 0.1
FINAL_WINDOWS, CURVE_WINDOWS, PROBE_WINDOWS, NUM_CURVE_POINTS = 1024, 128, 8, 10
Step = Callable[[dict[str, Tensor]], Tensor]


@dataclass
class Trainee:
    """Holds a model, its optimizer and its manager, which is None where the topology cannot change."""

    model: Any
    optimizer: torch.optim.Optimizer
    manager: smet.TopologyManager | None


def corpus_of(case: Case) -> Corpus:
    return Corpus(case.shape.sequence, case.seed, case.text, case.vocabulary)


def build_model(case: Case, device: str | None = None) -> nn.Module:
    """Makes an unmodified Hugging Face LLaMA of the case's shape, its weights drawn from the case's seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = case.shape
    config = LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_hidden_layers=shape.layers,
        max_position_embeddings=shape.sequence,
        use_cache=False,
    )
    torch.manual_seed(case.seed)
    with torch.device(device or shape.device):
        return LlamaForCausalLM(config).to(DTYPES[case.dtype])


def build(case: Case) -> Trainee:
    """Makes the model of the case, sparse if it is to be, with optimizer and manager."""
    model = build_model(case)
    # sparsify keeps these objects: they then hold the active weights
    layers = [layer for layer in model.model.layers.modules() if isinstance(layer, nn.Linear)]
    matrices = [layer.weight for layer in layers]
    if case.density < 1:
        smet.sparsify(
            model,
            case.density,
            block_shape=case.block_shape,
            distribution=case.distribution,
            rescale=case.rescale,
            exclude="*.self_attn.*" if case.sparse == "feed_forward" else None,
            seed=case.seed,
        )
        if not case.even:
            scatter(model, case.seed)
        if case.permuted:
            permute_units([layer for layer in layers if parametrize.is_parametrized(layer)], case.seed)
    optimizer = make_optimizer(case, model, matrices)
    moves = case.density < 1 and (case.every > 0 or case.dense_from < 1)
    return Trainee(model, optimizer, _manager(case, model, optimizer) if moves else None)


def _manager(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer) -> smet.TopologyManager:
    return smet.TopologyManager(
        model,
        optimizer,
        total_steps=case.steps,
        every=case.every or case.steps,
        drop_fraction=case.drop_fraction,
        final_drop_fraction=case.final_drop_fraction,
        stop_fraction=case.stop_fraction,
        grow=case.grow,
        schedule="cosine" if case.every else "none",
        density_schedule=[(round(case.dense_from * case.steps), 1.0)] if case.dense_from < 1 else None,
        min_age=case.min_age,
        seed=case.seed,
        auto_step=False,  # a probe looks between the two steps
    )


def schedule(case: Case, step: int) -> float:
    """Returns the learning rate of step ``step`` (from 0), over its peak."""
    warmup = max(1, round(case.warmup * case.steps))
    if step < warmup:
        return (step + 1) / warmup
    if case.decay == "constant":
        return 1.0
    progress = (step - warmup) / max(1, case.steps - warmup)
    return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def held_out_loss(model: nn.Module, windows: Tensor, batch: int) -> float:
    """Returns the mean loss per predicted token, in nats, over (count, sequence) windows."""
    losses = [model(input_ids=part, labels=part).loss.double() * len(part) for part in windows.split(batch)]
    return float(torch.stack(losses).sum() / len(windows))


def train(case: Case, eager: bool = False) -> dict:
    """Trains and returns the record: the case, its losses, cloze, text, time. ``eager``: without the compiler.

    Losses are in nats per byte; those of training, ``train``, in nats per token.

    A run whose loss is no longer finite ends there, with the loss None: that is its result.
    """
    with fast_products(case.shape.device):
        return _train(case, eager)


def _train(case: Case, eager: bool) -> dict:
    torch._dynamo.reset()
    corpus, trainee = corpus_of(case), build(case)
    step_fn = two_calls(trainee.model, trainee.optimizer) if eager else compiled(trainee)
    feed = Feed(case, corpus, [group["lr"] for group in trainee.optimizer.param_groups])
    probe = _probe(case, trainee, corpus, feed)
    windows = corpus.held_out(FINAL_WINDOWS).to(case.shape.device)
    curve, losses, began = [], [], time.perf_counter()
    for step in range(case.steps):
        losses.append(feed.advance(step_fn, trainee.optimizer, step))
        if probe:
            probe.before_update(step + 1)
        if trainee.manager:
            trainee.manager.step()
        if probe:
            probe.after_update(step + 1)
        if not math.isfinite(losses[-1]):
            break
        if (step + 1) % max(1, case.steps // NUM_CURVE_POINTS) == 0:
            some = held_out_loss(trainee.model, windows[:: FINAL_WINDOWS // CURVE_WINDOWS], 32)
            curve.append([step + 1, some / corpus.bytes_per_token])
    finite = len(losses) == case.steps and math.isfinite(losses[-1])
    return {
        "key": case.key,
        "case": asdict(case),
        "loss": held_out_loss(trainee.model, windows, 32) / corpus.bytes_per_token if finite else None,
        "cloze": Cloze.of(corpus).ask(trainee.model, case.shape.device) if finite else None,
        "text": corpus.describe(),
        "curve": curve,
        "train": _means(losses, max(1, case.steps // 50)),
        "density": _density(trainee),
        "seconds": round(time.perf_counter() - began, 1),
        "windows": [asdict(window) for window in probe.windows] if probe else [],
        "torch": torch.__version__,
        "processor": processor(),
    }


@dataclass(frozen=True)
class Feed:
    """Gives each step its batch and its learning rates, the same to every model that asks. ``peaks``: by group."""

    case: Case
    corpus: Corpus
    peaks: list[float]

    def advance(self, step_fn: Step, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Makes step ``step`` (from 0), and returns its training loss."""
        for group, peak in zip(optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * schedule(self.case, step)
        batch = self.corpus.batch(step, self.case.shape.batch).to(self.case.shape.device)
        return step_fn({"input_ids": batch, "labels": batch}).item()


def _probe(case: Case, trainee: Trainee, corpus: Corpus, feed: Feed) -> Probe | None:
    if not case.probe or not case.every:
        return None

    def advance(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
        return feed.advance(two_calls(model, optimizer), optimizer, step)

    batch = corpus.held_out(PROBE_WINDOWS).to(case.shape.device)
    return Probe(trainee.model, trainee.optimizer, batch, advance, case.every, case.steps)


def compiled(trainee: Trainee) -> Step:
    """Returns a function that makes one optimizer step on a batch; for a dense model it is plain torch.

    On a CPU a model in bf16 multiplies in attention by torch's matrix products, since there its fused kernel computes
    in fp32: a step then takes .7 of the time.
    """
    model = trainee.model
    if model.dtype == torch.bfloat16 and model.device.type == "cpu":
        model.set_attn_implementation("eager")
    if not smet.report(model).sites:
        return two_calls(torch.compile(model), trainee.optimizer)
    return smet.compile_train_step(model, trainee.optimizer)


def two_calls(model: Callable, optimizer: torch.optim.Optimizer) -> Step:
    """Returns the loop that every script has, as a function."""

    def step(batch: dict[str, Tensor]) -> Tensor:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _means(losses: list[float], every: int) -> list[float]:
    return [round(sum(part) / len(part), 4) for part in (losses[i : i + every] for i in range(0, len(losses), every))]


def _density(trainee: Trainee) -> float:
    sites = smet.report(trainee.model).sites
    return sum(s.num_active for s in sites) / sum(s.num_blocks for s in sites) if sites else 1.0
