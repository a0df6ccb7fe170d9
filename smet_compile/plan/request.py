"""Checks the arguments of ``plan``, and plans a run for them or for the largest density or batch that fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from smet_compile.convert import Globs
from smet_compile.convert.distribution import Distribute, Distribution
from smet_compile.format import arguments
from smet_compile.format.arguments import described
from smet_compile.format.densities import DensitySchedule, check_density, check_density_schedule
from smet_compile.ops import find_sites
from smet_compile.plan.equal_bytes import check_comparison
from smet_compile.plan.mesh import check_mesh
from smet_compile.plan.report import Plan, make_plan
from smet_compile.plan.run import PlannedRun, Request
from smet_compile.plan.shapes import Inputs, LossFn, Step, empty_copy, token_batch
from smet_compile.plan.stored import OPTIMIZERS, bytes_text, parse_bytes
from smet_compile.presets import PRESETS, VOCABULARY, build_preset, find_preset
from smet_compile.shards.styles import Style, styles_of

_DENSITY = 0.3
_PARTS = 10_000
"""Densities that are solved for are multiples of 1 / this number."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_MOMENT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": "int8"}
DtypeName = Literal["float32", "bfloat16", "float16", "float64"]
OptimizerName = Literal["adamw", "lion", "sgd", "scale"]
Dtype = torch.dtype | str | None


def plan(
    model: nn.Module | str,
    density: float | None = None,
    *,
    block_shape: int | Sequence[int] = 1,
    batch: int | None = None,
    sequence: int | None = None,
    dtype: torch.dtype | DtypeName | None = None,
    moment_dtype: torch.dtype | Literal["int8", "float32", "bfloat16"] | None = None,
    optimizer: OptimizerName = "adamw",
    compiled: bool = True,
    fused_update: bool | None = None,
    checkpointing: bool = False,
    fits: str | float | None = None,
    include: Globs = None,
    exclude: Globs = None,
    rules: Mapping[str, float] | None = None,
    distribution: Distribution | Mapping[str, float] | Distribute = "uniform",
    inputs: Inputs | None = None,
    loss_fn: LossFn | None = None,
    vocabulary: int = VOCABULARY,
    density_schedule: DensitySchedule | None = None,
    mesh: Mapping[str, int] | None = None,
    tp_plan: Mapping[str, Style] | None = None,
    tokens: float | None = None,
    sparse_efficiency: float | None = None,
) -> Plan:
    """Plans a training step: bytes by kind, peak memory and operations, as formulas and numbers beside dense training.

    ``model`` stays as it is and may be on the meta device; nothing is computed, so any size takes seconds::

        print(smet.plan("7b", density=0.25, block_shape=64, batch=1, sequence=256, dtype="bfloat16"))
        smet.plan("1b", block_shape=64, fits="24GB").density       # the largest that fits
        smet.plan("1b", 0.25, block_shape=64, fits="24GB").batch   # density given: the largest batch

    Stored bytes are exact; activations and scratch are predicted (docs/planning.md says how well).

    Args:
        model: a dense model, one that is compact already (then without ``density``), or the name of a preset.
        density: the density of the weights made sparse; 0.3 unless given or solved for.
        block_shape: the unit of sparsity, as ``sparsify`` takes it.
        batch: the sequences of a step. Default: the preset's; 1 of a model.
        sequence: the tokens of a sequence. Default: the preset's.
        dtype: the dtype of the weights. Default: a model's own; float32 of presets.
        moment_dtype: the dtype of the moments: None (float32), a dtype, or "int8".
        optimizer: "adamw", "lion", "sgd" (with momentum) or "scale": decides how many moments are stored. The dense
            training beside it is AdamW's always.
        compiled: whether ``torch.compile`` compiles the step, which else is eager.
        fused_update: whether ``compile_train_step`` makes the update in backward; default: as ``compiled``.
        checkpointing: whether activations are computed again, by the model's ``gradient_checkpointing_enable``.
        fits: "24GB", "22.5GiB" or bytes: solves for the largest density whose peak fits, or for the largest batch
            where a density is given (or the model is compact) and a batch is not.
        include: globs of the weights to make sparse, as ``sparsify`` takes them.
        exclude: globs of the weights to leave dense.
        rules: glob → density.
        distribution: how the density is shared out over the weights, as ``sparsify`` takes it.
        inputs: (batch, sequence) → what the model is called with. Default: ``input_ids`` and ``labels``.
        loss_fn: (model, inputs) → loss. Default: ``model(**inputs).loss``.
        vocabulary: the vocabulary size of a preset, in tokens.
        density_schedule: as ``TopologyManager`` takes it: ``plan.stages`` holds the bytes of each stage. ``density`` is
            that of the beginning, and may be 1.
        mesh: ranks that share the parameters by FSDP2, and copies of them as in HSDP: ``{"dp": 64, "replicate": 2}``.
            ``plan.per_rank`` then holds what a rank stores and sends; all other numbers are those of one device.
            "tp" beside them cuts layers by tensor parallelism, before FSDP2 shares the parts out: ``{"dp": 8, "tp":
            4}``. ``batch`` is that of a rank; ranks of "tp" have one batch together. ``plan.on_mesh(mesh)`` counts
            another mesh at once.
        tp_plan: which ``nn.Linear`` layers "tp" cuts: globs over names of modules → "colwise" (rows of the weight) or
            "rowwise" (columns), as ``parallelize_module`` has them. Default: the plan that a model of Hugging Face
            brings; its embeddings and head stay whole on every rank of "tp".
        tokens: those that a language model reads, each once. ``plan.equal_bytes`` then compares it, by the loss that
            a scaling law predicts, with the dense model of as many bytes: after as many tokens, and in as much time.
        sparse_efficiency: the rate of products with compact weights over that of dense ones on your card, counting
            active operations alone. Default: for tiles what the choice of kernels on a GPU assumes, by arithmetic (0.55
            for tiles of 128, 0.4 for 64, 0.2 for 32 in 16 bits, 0.5 in fp32), else that of a dense model as wide.

    Raises:
        ValueError: an argument out of range, an unknown preset, as ``sparsify`` does, a model that cannot be run on
            shapes alone or that "tp" cannot cut, or nothing that fits (with the least bytes there are).
    """
    density = None if density is None else check_density("density", density)
    batch = None if batch is None else _count("batch", batch)
    sequence = None if sequence is None else _count("sequence", sequence, at_most=2**27)
    arguments.one_of("optimizer", optimizer, list(OPTIMIZERS))
    compiled = arguments.flag("compiled", compiled)
    checkpointing = arguments.flag("checkpointing", checkpointing)
    if inputs is not None:
        arguments.function("inputs", inputs, "(batch, sequence) → what the model is called with")
    if loss_fn is not None:
        arguments.function("loss_fn", loss_fn, "(model, inputs) → loss")
    limit = None if fits is None else parse_bytes("fits", fits)
    stages = [] if density_schedule is None else check_density_schedule(density_schedule)
    if stages and limit is not None:
        raise ValueError("density_schedule: expected none beside fits, got both; plan the schedule and read its peaks")
    checked_mesh = None if mesh is None else check_mesh(mesh)
    if checked_mesh and (stages or limit is not None):
        raise ValueError(
            f"mesh: expected none beside {'density_schedule' if stages else 'fits'}, got both; plan a mesh and read "
            "plan.per_rank"
        )
    tokens, sparse_efficiency = _check_comparison(tokens, sparse_efficiency, bool(stages))
    if fused_update is not None and arguments.flag("fused_update", fused_update) and not compiled:
        raise ValueError("fused_update: expected False for eager training (compiled=False), got True; compile the step")
    on_meta, name, default_batch, sequence = _on_meta(model, dtype, sequence, vocabulary)
    if tp_plan is not None or (checked_mesh and checked_mesh.parts > 1):
        styles_of(on_meta, tp_plan)
    is_compact = bool(find_sites(on_meta))
    if is_compact and density is not None:
        raise ValueError(f"density: expected none for a model that is compact already, got {density}; leave it out")
    _check_inputs(on_meta, inputs, sequence)
    if tokens is not None and sequence is None:
        raise ValueError(
            "tokens: expected a language model, with sequence=, got none; leave tokens out, or pass sequence="
        )
    if checkpointing and not hasattr(on_meta, "gradient_checkpointing_enable"):
        raise ValueError(
            "checkpointing: expected a model with gradient_checkpointing_enable, got "
            f"{type(on_meta).__name__}; checkpoint in its forward, and leave this out"
        )
    request = Request(
        name=name,
        model=on_meta,
        step=Step(inputs or token_batch, loss_fn, sequence is not None, checkpointing),
        block_shape=block_shape,
        sequence=sequence,
        moment_dtype=_dtype("moment_dtype", moment_dtype, _MOMENT_DTYPES),
        optimizer=optimizer,
        compiled=compiled,
        fused_update=compiled if fused_update is None else fused_update,
        selection={"include": include, "exclude": exclude, "rules": rules, "distribution": distribution}
        | {"dense_as_compact": bool(stages)},
        mesh=checked_mesh,
        tp_plan=tp_plan,
        tokens=tokens,
        sparse_efficiency=sparse_efficiency,
    )
    chosen = None if is_compact else _DENSITY if density is None else density
    if limit is None:
        return make_plan(PlannedRun(request, chosen), batch or default_batch, stages)
    if (density is not None or is_compact) and batch is None:
        return _plan_largest_batch(PlannedRun(request, chosen), limit)
    if density is not None or is_compact:
        raise ValueError("fits: expected density or batch left open, got both; leave one out")
    return _plan_largest_density(request, batch or default_batch, limit)


def _on_meta(
    model: nn.Module | str, dtype: Dtype, sequence: int | None, vocabulary: int
) -> tuple[nn.Module, str, int, int | None]:
    """Returns (the model on the meta device, its name, default batch, sequence)."""
    wanted = _dtype("dtype", dtype, DTYPES)
    if isinstance(model, nn.Module):
        return empty_copy(model, dtype=wanted), type(model).__name__, 1, sequence
    if not isinstance(model, str):
        raise ValueError(f"model: expected an nn.Module or one of {', '.join(PRESETS)}, got {described(model)}")
    vocabulary = _count("vocabulary", vocabulary)
    preset = find_preset(model, "model")
    sequence = sequence or preset.sequence
    return build_preset(model, vocabulary, sequence, wanted or torch.float32), model, preset.batch, sequence


def _check_comparison(
    tokens: float | None, sparse_efficiency: float | None, has_stages: bool
) -> tuple[float | None, float | None]:
    """Checks the arguments of the comparison with a dense model of as many bytes."""
    if tokens is None and sparse_efficiency is None:
        return None, None
    if tokens is None:
        raise ValueError(
            f"sparse_efficiency: expected none without tokens, got {described(sparse_efficiency)}; pass tokens=, which "
            "the run reads"
        )
    if has_stages:
        raise ValueError(
            "tokens: expected none beside density_schedule, got both: the scaling law is one of constant density; "
            "leave one out"
        )
    return check_comparison(tokens, sparse_efficiency)


def _dtype(argument: str, given: Any, known: Mapping[str, Any]) -> Any:
    found = known.get(given) if isinstance(given, str) else given
    is_known = isinstance(found, str | torch.dtype) and found in known.values()
    if not is_known and given is not None:
        raise ValueError(f"{argument}: expected None or one of {', '.join(known)}, got {described(given)}")
    return found


def _count(argument: str, given: Any, at_most: int = 2**31 - 1) -> int:
    """Checks a number. The bounds keep sizes of tensors, also attention's square of the sequence, below 2^63."""
    return arguments.whole_number(argument, given, at_least=1, at_most=at_most)


def _check_inputs(model: nn.Module, inputs: Inputs | None, sequence: int | None) -> None:
    if inputs is not None:
        return
    if not hasattr(getattr(model, "config", None), "vocab_size"):
        raise ValueError(
            f"inputs: expected a function (batch, sequence) → inputs for {type(model).__name__}, which is no language "
            'model of transformers, got none; pass inputs=lambda batch, sequence: {"x": torch.zeros(batch, ...)}'
        )
    if sequence is None:
        raise ValueError("sequence: expected the number of tokens in a sequence, got none; pass sequence=")


def _plan_largest_batch(run: PlannedRun, limit: int) -> Plan:
    """Plans the largest batch whose peak is at most ``limit`` bytes."""
    least = run.peak(1)
    if least > limit:
        raise _nothing_fits(limit, least, "at batch 1", "lower the density, or allow more")
    return make_plan(run, _largest(lambda batch: run.peak(batch) <= limit))


def _plan_largest_density(request: Request, batch: int, limit: int) -> Plan:
    """Plans the largest density whose peak is at most ``limit`` bytes.

    Searches by the bytes stored at each density and the timeline of a run at one density, then makes sure by a plan.
    """
    run = PlannedRun(request, _DENSITY)
    least = run.peak(batch, 1 / _PARTS)
    nothing = _nothing_fits(limit, least, f"at density {1 / _PARTS:g} and batch {batch}", "lower batch or sequence")
    if least > limit:
        raise nothing
    parts = _largest(lambda parts: parts <= _PARTS and run.peak(batch, parts / _PARTS) <= limit)
    for fewer in range(parts, 0, -max(1, parts // 100)):
        found = make_plan(PlannedRun(request, fewer / _PARTS), batch)
        if found.sparse.peak <= limit:
            return found
    raise nothing


def _largest(is_allowed: Callable[[int], bool]) -> int:
    """Returns the largest allowed number. 1 is allowed, and so is all below an allowed number."""
    high = 2
    while is_allowed(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_allowed(middle) else (low, middle)
    return low


def _nothing_fits(limit: int, least: float, where: str, advice: str) -> ValueError:
    return ValueError(
        f"fits: expected at least {least:,.0f} bytes ({bytes_text(least)}), the least there is {where}, got "
        f"{limit:,}; {advice}"
    )
