"""What needs several rooms at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from smet_compile.convert import Globs, check_choice, check_density, choose, make_compact, remember_reasons, report
from smet_compile.convert.compact import SELECTS
from smet_compile.convert.doubts import warn_if_dense, warn_if_larger, warn_if_rows_are_empty
from smet_compile.format import arguments
from smet_compile.ops import saved_weights


def sparsify(
    model: nn.Module,
    density: float = 0.3,
    *,
    block_shape: int | Sequence[int] = 1,
    include: Globs = None,
    exclude: Globs = None,
    rules: Mapping[str, float] | None = None,
    distribution: str = "uniform",
    select: str = "random",
    rescale: bool | None = None,
    seed: int = 0,
) -> nn.Module:
    """Makes the linear weights of ``model`` compact, in place: stored and trained only where they are active.

    Sparse by default: weights of ``nn.Linear``, Hugging Face ``Conv1D``, the projections of
    ``nn.MultiheadAttention``, and stacked expert weights (3-D parameters of modules that say they hold experts).
    Left dense by default, with the reason in ``report(model)``: embeddings, output embeddings, routers, tied
    weights, everything else. Call it before the optimizer is made.

    Args:
        model: any module; on the meta device only layouts are made.
        density: fraction of blocks that are active, in (0, 1]. At 1 the model stays dense and everything that follows
            works on it, as a baseline.
        block_shape: the unit of sparsity: 1 for single weights, B for (B, B) tiles, or (bm, bn).
        include: globs over qualified names of weights or their modules. Given, they are the whole selection, and
            a weight they match may be any parameter of two or more dimensions (convolutions, embeddings).
        exclude: globs of weights to leave dense.
        rules: glob → density for the chosen weights it matches, first match wins; 1 leaves a weight plain.
        distribution: "uniform", every weight at ``density``; "er" or "erk", Erdős-Rényi shares (see
            ``convert.budget.allocate``) with the total exact.
        select: "random" for a fresh model (tiles so that their rows and columns fill evenly), or "magnitude", the
            blocks of largest mean \\|w\\|, for a trained one.
        rescale: multiplies what stays by 1/√d, so that outputs keep their variance. Default: only for "random".
        seed: of the random selection.

    Returns: ``model``.

    Raises:
        ValueError: a density outside (0, 1], a block shape that is not positive or far larger than the matrices, a
            glob or rule that matches nothing, a weight that is compact already, or nothing to make sparse. The model
            is then unchanged.
    """
    arguments.module("sparsify", model)
    density = check_density("density", density)
    check_choice("select", select, SELECTS)
    rescale = select == "random" if rescale is None else arguments.flag("rescale", rescale)
    seed = arguments.seed_number("seed", seed)
    plan = choose(model, density, block_shape, include, exclude, rules, distribution)
    warn_if_larger(plan.choices)
    for choice in plan.choices:
        make_compact(choice, select, rescale, seed)
        saved_weights.install(choice.weight.module, owner=True)
    saved_weights.install(model)
    _install_passes()
    remember_reasons(model, plan.dense_reasons)
    warn_if_dense(report(model), density)
    warn_if_rows_are_empty(plan.choices)
    return model


def _install_passes() -> None:
    """Imported here, not above: the compiler takes seconds to import, and is not wanted before a weight is compact."""
    from smet_compile.passes.install import install

    install()
