"""Trains LLaMA-7b's shapes on one small part of a GPU, with 8-bit moments and the update in backward."""

from __future__ import annotations

import torch
from torch import nn

import smet_compile as smet
from benchmarks import chosen
from benchmarks.layer import DENSITY
from benchmarks.peak import Peak
from benchmarks.sections.step import QUICK_SHAPE
from benchmarks.settings import Settings
from benchmarks.tables import AWAITS_GPU, Row, Table, at_most
from benchmarks.training import Shape, static_shapes
from smet_compile.ops import find_sites

SHAPE = Shape(hidden=4096, intermediate=11008, heads=32, layers=32, vocabulary=32000, sequence=256, batch=1)
DTYPE = torch.bfloat16
BLOCK = 64
STEPS, WARMUP = 20, 2
LIMIT_BYTES = 12e9
PEAK = at_most(1)
LOSS = at_most(1)
INIT_STD = 0.02
NOTE = (
    f'bf16, density {DENSITY}, {BLOCK} tiles, `moment_dtype="int8"`, `compile_train_step`, {STEPS} steps on one batch '
    "of {tokens} tokens. Peak: the most that tensors hold, from the third step on, over 12 GB. Loss: of the last step "
    "over that of the first."
)


def tables(settings: Settings) -> list[Table]:
    place = settings.on_gpu()
    shape = settings.size(SHAPE, QUICK_SHAPE)
    rows = _rows(shape, place) if place else []
    for what, target in (("peak memory", PEAK), ("loss", LOSS)) if place is None else ():
        rows.append(Row(what, target=target, unmeasured=AWAITS_GPU))
    return [Table("LLaMA-7b's shapes on a GPU", "over the limit", NOTE.format(tokens=shape.tokens), rows)]


def _rows(shape: Shape, place: Settings) -> list[Row]:
    peak = Peak(place.device)
    model = sparse_model(shape, place.device)
    optimizer = smet.ActiveAdamW(model, 1e-4, moment_dtype="int8")
    step, batch = smet.compile_train_step(model, optimizer), shape.batch_on(place.device)
    losses = []
    with static_shapes():
        for number in range(place.size(STEPS, 4)):
            if number == WARMUP:
                peak.restart()
            losses.append(float(step(batch)))
    kernels = f"{chosen.of_products(find_sites(model).values())}, {chosen.of_update(optimizer)}"
    more = {"first loss": f"{losses[0]:.3f}", "last loss": f"{losses[-1]:.3f}"}
    return [
        Row("peak memory", kernels, [peak.bytes / LIMIT_BYTES], PEAK, {"peak, GB": f"{peak.bytes / 1e9:.2f}"}),
        Row("loss", kernels, [losses[-1] / losses[0]], LOSS, more),
    ]


def sparse_model(shape: Shape, device: torch.device) -> nn.Module:
    """Makes a model sparse layer by layer on the device, which never holds more than one dense layer."""
    with torch.device("meta"):
        model = shape.model(DTYPE)
    torch.manual_seed(0)
    for layer in model.model.layers:
        _initialise(layer, device)
        smet.sparsify(layer, DENSITY, block_shape=BLOCK)
    inner = model.model
    for outside in (inner.embed_tokens, inner.norm, model.lm_head):
        _initialise(outside, device)
    with device:
        inner.rotary_emb = type(inner.rotary_emb)(model.config)
    return model


def _initialise(module: nn.Module, device: torch.device) -> None:
    """Allocates parameters on the device and fills them: matrices at random, gains with one."""
    module.to_empty(device=device)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=INIT_STD) if parameter.dim() > 1 else nn.init.ones_(parameter)
