"""Makes a model sparse: the public verb, its checks of arguments and its warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, TypeVar

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from smet_compile.convert import (
    Choice,
    Globs,
    Report,
    choose,
    describe_empty_rows,
    draw,
    make_compact,
    report,
    save_dense,
)
from smet_compile.convert.active_blocks import NUM_NAMED, SELECTS, Select, check_no_density_for_nonzero
from smet_compile.convert.choose import Selection
from smet_compile.convert.compact import Drawn
from smet_compile.convert.distribution import Distribute, Distribution
from smet_compile.convert.pruned import without_pruning
from smet_compile.format import arguments
from smet_compile.format.user_warning import warn_user
from smet_compile.shards import reshard

Model = TypeVar("Model", bound=nn.Module)
_MAX_DENSITY_RATIO = 1.5
"""Factor by which the density of the whole model may exceed the requested one without a warning."""


def sparsify(
    model: Model,
    density: float | None = None,
    *,
    block_shape: int | Sequence[int] = 1,
    include: Globs = None,
    exclude: Globs = None,
    rules: Mapping[str, float] | None = None,
    distribution: Distribution | Mapping[str, float] | Distribute = "uniform",
    select: Select | None = None,
    pattern: str | None = None,
    masks: Mapping[str, Tensor] | Literal["prune"] | None = None,
    rescale: bool | None = None,
    seed: int = 0,
    dense_as_compact: bool = False,
    slabs: Mapping[str, tuple[int, int]] | None = None,
) -> Model:
    """Makes the linear weights of ``model`` compact, in place: stored and trained only where they are active.

    Sparse by default: weights of ``nn.Linear``, Hugging Face ``Conv1D``, the projections of
    ``nn.MultiheadAttention``, and stacked expert weights (3-D parameters of modules that say they hold experts).
    Left dense by default, with the reason in ``report(model)``: embeddings, output embeddings, routers, tied
    weights, and everything else. Call it after ``parallelize_module``, before ``fully_shard``, and before the optimizer
    is made.

    Args:
        model: any module; on the meta device only layouts are made.
        density: fraction of blocks that are active, in (0, 1]. Default: 0.3; N/M with an "N:M" pattern; for "nonzero"
            it follows from the zeros. At 1 the model stays dense and everything that follows works on it, as a
            baseline; see ``dense_as_compact``.
        block_shape: the unit of sparsity: 1 for single weights, B for (B, B) tiles, or (bm, bn).
        include: globs over qualified names of weights or their modules. If given, they are the whole selection, and
            a weight they match may be any parameter of two or more dimensions (convolutions, embeddings). The text
            "conv" adds to the default selection all convolutions but the first and depthwise ones.
        exclude: globs of weights to leave dense.
        rules: glob → density for the chosen weights it matches, first match wins; 1 leaves a weight plain.
        distribution: "uniform", every weight at ``density``; "er" or "erk", Erdős-Rényi shares (see
            ``convert.distribution.allocate``) with the total exact; or a function of (layouts by name, density) that
            returns for each name a density, or a number of blocks as an int. A dict means the same as ``rules``.
        select: "random", the default, for a fresh model (tiles so that their rows and columns fill evenly);
            "magnitude", the blocks of largest mean \\|w\\|, for a trained one; or "nonzero" for a pruned one: of each
            weight the blocks that are not all zero, at least one, and a weight without a block of zeros stays dense.
        pattern: None; "fan_in", as many active blocks in every row of blocks, within one; or "N:M" such as "2:4", N
            active in every M single weights along a row.
        masks: says which weights are active, by the name of a weight or its module: dense bool tensors, as
            ``smet_compile.masks`` returns, or "prune" for those of ``torch.nn.utils.prune`` in the model, whose
            reparametrization ends. A block is active where any entry of its mask is true. Weights without a mask are
            chosen as usual where a density is given, and stay dense where none is.
        rescale: multiplies the active weights by 1/√d, so that outputs keep their variance. Default: only for "random",
            and not where a mask is given.
        seed: the seed of the random selection.
        dense_as_compact: makes weights that keep every block compact too, instead of leaving them plain: a run that
            begins dense, for a ``density_schedule`` of the manager, begins with ``sparsify(model, 1.0,
            dense_as_compact=True)``.
        slabs: glob → (count, dim): the weights that it matches consist of ``count`` slabs of rows (dim 0) or columns
            (dim 1), each with as many active blocks, chosen with a seed of its own. The result is the model that tensor
            parallelism over any number of ranks that divides ``count`` trains, whatever the number. A weight that
            ``parallelize_module`` has cut consists of as many slabs as there are ranks, where no other number is asked
            for.

    Returns: ``model``.

    Raises:
        ValueError: a density outside (0, 1], a block shape that is not positive or far larger than the matrices, a
            glob or rule that matches nothing, a weight that is compact already or sharded, nothing to make sparse,
            "nonzero" with a density or without data, a pattern that a weight or another argument does not allow, or a
            mask of another shape or name, all true or all false; a model that DistributedDataParallel wraps already.
            The model is then unchanged.

    A Hugging Face model with compact weights in it saves dense ones from now on: ``save_pretrained`` writes what
    ``export_dense`` returns.

    The model is unchanged too where a warning is made an error, where a module refuses its new weight, and where memory
    runs out: all checks come first, and the largest weight is packed first. Only after an interrupt (Ctrl-C) in
    between, or where another program took memory, are some weights compact and the others not. The exception then names
    the compact ones, whose inactive weights are lost.
    """
    arguments.module("sparsify", model)
    how = arguments.one_of("select", "random" if select is None else select, SELECTS)
    if how == "nonzero":
        check_no_density_for_nonzero(density, rules, distribution, masks)
    rescale = None if rescale is None else arguments.flag("rescale", rescale)
    seed = arguments.seed_number("seed", seed)
    dense_as_compact = arguments.flag("dense_as_compact", dense_as_compact)
    _check_unwrapped(model)
    reshard(model)  # a model that FSDP2 has gathered for a forward would look whole
    with _given(model, masks) as given:
        selection = choose(
            model,
            density,
            block_shape,
            include,
            exclude,
            rules,
            distribution,
            how,
            pattern,
            masks=given,
            dense_as_compact=dense_as_compact,
            slabs=slabs,
        )
        drawn = [draw(each, how, _rescales(each, how, rescale), seed) for each in selection.choices]
        _warn(model, selection, drawn)
        if select is None:
            _warn_if_trained(selection.choices)
        install_passes()
        make_compact(model, drawn, selection.dense_reasons)
        save_dense(model)
    return model


def _check_unwrapped(model: nn.Module) -> None:
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "sparsify: expected a model before it is wrapped, got DistributedDataParallel, which has made memory for "
            "gradients of dense weights; call sparsify first, then DistributedDataParallel or accelerator.prepare"
        )


def _given(model: nn.Module, masks: Any) -> Any:
    """Returns a context that gives the masks, and in which the model is no longer pruned by torch."""
    if isinstance(masks, str):
        arguments.one_of("masks", masks, ("prune",))
        return without_pruning(model)
    return nullcontext(masks)


def _rescales(choice: Choice, select: str, rescale: bool | None) -> bool:
    return select == "random" and choice.mask is None if rescale is None else rescale


def _warn(model: nn.Module, selection: Selection, drawn: Sequence[Drawn]) -> None:
    """Warns where the result is not what the arguments let expect."""
    _warn_if_larger(selection.choices)
    if selection.density is not None:
        num_dropped = sum(each.num_dropped_weights for each in drawn)
        _warn_if_dense(report(model), num_dropped, selection.dense_reasons, selection.density)
        _warn_if_rows_are_empty([choice for choice in selection.choices if choice.mask is None])


def install_passes() -> None:
    """Puts the compiler passes where ``torch.compile`` finds them.

    The import is here because it loads the compiler, which takes seconds, and only compact weights need it.
    """
    from smet_compile.passes.pipeline import install

    install()


def _warn_if_larger(choices: Sequence[Choice]) -> None:
    """Warns where the blocks of a weight hang over its edge so far that they take more memory than the dense weight."""
    larger = [choice for choice in choices if choice.values_bytes > choice.dense_bytes]
    if not larger:
        return
    named = ", ".join(
        f"{choice.weight.name} ({choice.values_bytes:,} bytes in blocks of {choice.layout.block_shape}, "
        f"{choice.dense_bytes:,} dense)"
        for choice in sorted(larger, key=lambda choice: choice.dense_bytes - choice.values_bytes)[:NUM_NAMED]
    )
    others = f" and {len(larger) - NUM_NAMED} more" if len(larger) > NUM_NAMED else ""
    warn_user(
        f"sparsify: compact weights that take more memory than dense ones: {named}{others}; take smaller blocks, or "
        "leave these weights dense with exclude="
    )


def _warn_if_dense(before: Report, num_dropped: int, dense_reasons: Mapping[str, str], density: float) -> None:
    """Warns where so much stays dense that little is saved.

    Args:
        before: the report of the model before anything becomes compact.
        num_dropped: how many single weights become inactive.
        dense_reasons: why each other weight stays dense.
        density: the density that was asked for.
    """
    whole_density = (before.num_active_weights - num_dropped) / max(1, before.num_weights)
    if whole_density <= _MAX_DENSITY_RATIO * density:
        return
    dense = [row for row in before.skipped if row.name in dense_reasons]
    largest = ", ".join(
        f"{row.name} ({row.num_weights:,} weights: {dense_reasons[row.name]})"
        for row in sorted(dense, key=lambda row: -row.num_weights)[:NUM_NAMED]
    )
    cause = f"largest left dense: {largest}" if largest else "a weight keeps at least one block; use smaller blocks"
    warn_user(
        f"sparsify: the model's matrices as a whole have density {whole_density:.2f}, more than "
        f"{_MAX_DENSITY_RATIO} times the {density} asked for; {cause}"
    )


def _warn_if_trained(choices: Sequence[Choice]) -> None:
    """Warns where a random part is kept of weights that ``from_pretrained`` of Hugging Face has loaded and marked."""
    loaded = [
        choice.weight.name
        for choice in choices
        if choice.mask is None
        and choice.num_active < choice.layout.num_blocks
        and getattr(choice.weight.tensor, "_is_hf_initialized", False)
    ]
    if loaded:
        warn_user(
            f"sparsify: {len(loaded)} weights ({loaded[0]}, ...) were loaded by from_pretrained, and most of what they "
            'learnt is lost where a random part of them is kept; pass select="magnitude" to keep the largest, or '
            'select="random" if that is meant'
        )


def _warn_if_rows_are_empty(choices: Sequence[Choice]) -> None:
    """Warns where a weight gets fewer active blocks than it has rows, or columns, of blocks."""
    empty = describe_empty_rows((choice.weight.name, choice.layout, choice.num_active) for choice in choices)
    if empty:
        warn_user(f"sparsify: {empty}, and see smet_compile.inspect")
