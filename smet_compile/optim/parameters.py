"""Describes the parameters of a model for an optimizer, and caches their updates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smet_compile.format import WEIGHTS_OF_A_GROUP, Layout
from smet_compile.format.user_warning import warn_user
from smet_compile.ops import Site, canonical_name, find_sites
from smet_compile.ops.choose import update_all
from smet_compile.ops.gate import GENERATIONS_OF_A_BYTE, check_ages
from smet_compile.ops.optimizers import registered_holders
from smet_compile.ops.rules import Rule
from smet_compile.ops.sites import CONVOLUTIONS
from smet_compile.ops.updates import Update
from smet_compile.shards import Rows, local

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class Parameter:
    """Holds what an optimizer knows of a parameter besides its values.

    Args:
        name: its canonical name. site: None unless it is compact.
        first_shape: its shape when it was first seen.
        layout: the layout of a compact weight, or one that tells the rows of a dense matrix; None for a vector.
        units_are_columns: whether an output unit is a column of the matrix and not a row, as in an embedding, and in
            experts that say ``is_transposed``.
        is_head: whether it is the weight of the output layer. is_embedding: whether it is one of an embedding, tied to
            the output layer or not.
    """

    name: str
    site: Site | None
    first_shape: torch.Size
    layout: Layout | None = None
    units_are_columns: bool = False
    is_head: bool = False
    is_embedding: bool = False

    @property
    def density(self) -> float:
        return self.site.density if self.site else 1.0

    @property
    def num_inputs(self) -> int:
        """Counts the inputs that an output of a dense matrix reads: the fan-in of ``torch.nn.init``."""
        assert self.layout is not None, "a vector reads none"
        return self.layout.rows if self.units_are_columns else self.layout.cols

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape that it has to have: that of a compact weight changes with its number of blocks."""
        if self.site is None:
            return tuple(self.first_shape)
        return self.site.values_shape

    def place_of_rows(self, parameter: nn.Parameter, rule: Rule) -> dict[str, Any]:
        """Returns the arguments of an ``Update`` that say where the rows that this rank holds lie in the whole.

        Raises ValueError for a dense parameter that is cut by columns, whose output units ``rule`` normalizes.
        """
        rows, topology, first_place = self.rows_of(parameter), None, 0
        if self.site is not None:
            topology = self.site.topology_of(rows.here)
        else:
            number, of = rows.column_part
            if of > 1 and rule.normalized is not None:
                raise ValueError(
                    f"{self.name}: expected a weight with whole rows for the rule {rule.name}, got one that tensor "
                    "parallelism cuts by columns; make it compact, or train it by an optimizer of its own"
                )
            # Columns are not consecutive: no two parts share a place, that is all.
            row_size = math.prod(parameter.shape[1:]) // of
            first_place = (number * math.prod(parameter.shape[:1]) + rows.first + rows.here.start) * row_size
        return {
            "topology": topology,
            "first_place": first_place,
            "sum_over_ranks": rows.sum_ if rows.groups else None,
        }

    def rows_of(self, parameter: nn.Parameter) -> Rows:
        """Returns which rows of the parameter this rank holds."""
        return Rows.of(parameter) if self.site is None else self.site.rows

    def check(self, parameter: Tensor) -> None:
        """Raises ValueError where ``parameter`` is no longer what it was when the optimizer was made."""
        values = parameter if self.site is None else self.site.values_maybe
        if values is None:
            raise ValueError(
                f"{self.name}: the weight was made dense (remove_parametrizations, export_dense, ...) after the "
                "optimizer was made; make the optimizer anew"
            )
        if values is not parameter:
            raise ValueError(
                f"{self.name}: the model's weight was replaced (load_state_dict(assign=True), to_empty, ...) after "
                "the optimizer was made; make the optimizer anew"
            )
        if tuple(parameter.shape) != self.shape:
            raise ValueError(
                f"{self.name}: expected shape {self.shape}, got {tuple(parameter.shape)}: sparsify was "
                "called after the optimizer was made; make the optimizer anew"
            )


def check_initialised(optimizer: str, model: nn.Module) -> None:
    """Raises ValueError, which begins with ``optimizer``, where a lazy parameter has no shape yet."""
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise ValueError(
                f"{optimizer}: {name} is not initialised yet; run a forward first, then make the optimizer"
            )


def describe_parameters(model: nn.Module) -> dict[nn.Parameter, Parameter]:
    """Describes every parameter of ``model``."""
    by_values = {id(site.values): site for site in find_sites(model).values()}
    head = find_output_head(model)
    owners = {id(p): module for module in model.modules() for p in module._parameters.values() if p is not None}
    embeddings = {id(p) for each in model.modules() if isinstance(each, _EMBEDDINGS) for p in each.parameters()}
    found: dict[nn.Parameter, Parameter] = {}
    for name, parameter in model.named_parameters():
        site = by_values.get(id(parameter))
        owner = site.module if site else owners[id(parameter)]
        is_head = parameter is head
        if site is not None:
            layout: Layout | None = site.whole
        elif parameter.dim() > 1 and not nn.parameter.is_lazy(parameter):
            layout = Layout.of(parameter.shape, (1, 1), flatten=isinstance(owner, CONVOLUTIONS))
        else:
            layout = None
        by_column = not is_head and layout is not None and _units_are_columns(owner, layout)
        full_name = site.name if site else canonical_name(model, name)
        is_embedding = id(parameter) in embeddings
        found[parameter] = Parameter(full_name, site, parameter.shape, layout, by_column, is_head, is_embedding)
    return found


def _units_are_columns(owner: nn.Module, layout: Layout) -> bool:
    is_transposed_stack = len(layout.shape) == 3 and getattr(owner, "is_transposed", False) is True
    return isinstance(owner, nn.Embedding) or type(owner).__name__.endswith("Conv1D") or is_transposed_stack


def find_output_head(model: nn.Module) -> nn.Parameter | None:
    """Returns the weight of the output layer; None where the model has no matrix.

    It is the weight of the module that ``get_output_embeddings()`` returns, for the model or for a module inside it;
    where there is no such module, it is the last matrix, dense or compact.
    """
    compact = {id(site.values) for site in find_sites(model).values()}

    def matrices(module: nn.Module) -> list[nn.Parameter]:
        return [p for p in module.parameters() if id(p) in compact or (not nn.parameter.is_lazy(p) and p.dim() > 1)]

    for module in model.modules():
        try:
            head = module.get_output_embeddings()  # type: ignore[operator]
        except Exception:  # not a model of transformers, or one without an answer
            continue
        if isinstance(head, nn.Module) and matrices(head):
            return matrices(head)[0]
    return matrices(model)[-1] if matrices(model) else None


def find_misfit(
    optimizer: str,
    parameter: nn.Parameter,
    known: dict[nn.Parameter, Parameter],
    moment_dtype: torch.dtype | str | None,
) -> ValueError | None:
    """Returns the error for a parameter that ``optimizer`` cannot train; None where it can."""
    if parameter not in known:
        return ValueError(
            f"{optimizer}: got a parameter of shape {tuple(parameter.shape)} that is none of the model's; add it to "
            "the model first"
        )
    name, site = known[parameter].name, known[parameter].site
    if parameter.requires_grad and parameter.is_complex():
        return not_trained(name, parameter)
    has_whole_groups = not known[parameter].rows_of(parameter).groups or (site is not None and site.layout.tiles)
    if moment_dtype == "int8" and parameter.requires_grad and not has_whole_groups:
        return ValueError(
            f"{name}: expected a weight of tiles for 8-bit state on several ranks, got one whose groups of "
            f"{WEIGHTS_OF_A_GROUP} codes are cut into shards; train it by an optimizer of its own with "
            "moment_dtype=torch.bfloat16"
        )
    return None


def not_trained(name: str, parameter: Tensor) -> ValueError:
    """Returns the error for a parameter of a dtype that no rule moves."""
    return ValueError(
        f"{name}: expected a parameter of float64, float32, bfloat16 or float16, got {parameter.dtype}; train it by "
        "an optimizer of torch.optim, and give this one the other parameters with model="
    )


def warn_of_untrained(optimizer: str, model: nn.Module) -> None:
    """Warns of compact weights in no group: groups made by name miss them, as their names end in ``original``."""
    sites = {n: s.values for n, s in find_sites(model).items() if s.values.grad is not None}
    optimizers = registered_holders(sites.values())
    trained = {id(p) for each in optimizers for g in each.param_groups for p in g["params"]}
    names = [name for name, values in sites.items() if id(values) not in trained and values.requires_grad]
    if names:
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        warn_user(
            f"{optimizer}: {shown} got a gradient and are in no parameter group, so they are never "
            "trained unless another optimizer, or that of another rank, holds them. A compact weight is the "
            "parameter '...parametrizations.weight.original': choose it by that name, or make the groups with "
            "smet.param_groups(model, lr) or smet.decay_groups(model, weight_decay); freeze it with "
            "requires_grad_(False) to leave it as it is"
        )


class ReadyUpdate:
    """Caches an update from step to step, with everything that it was made from, to notice changes.

    Args:
        update: the update, of the rows that this rank holds. parameter: what it updates. known: its description.
        state: the optimizer's state for that parameter. options: the options of the parameter group except its rate.
    """

    def __init__(
        self,
        update: Update,
        parameter: nn.Parameter,
        known: Parameter,
        state: dict[str, Any],
        options: tuple[Any, ...],
    ) -> None:
        self.update = update
        self.parameter = parameter
        self.shape = update.values.shape
        self.known = known
        self.compact = known.site.compact if known.site else None
        self.topology = self.compact.active if self.compact else None
        self.state = state
        self.options = options
        self.items = tuple(state.items())
        held = (update.values, *(local(item) for _, item in self.items))
        self.tensors = [(tensor, tensor.data_ptr()) for tensor in held]
        generation, births = update.generation, update.births
        self.must_check_ages = (
            generation is not None
            and births is not None
            and (generation.dtype != torch.uint8 or births.numel() < GENERATIONS_OF_A_BYTE)
        )

    def count_change(self) -> None:
        """Lets backward notice that a shard has changed since forward: ``fully_shard`` keeps a parameter's version."""
        if self.compact is not None and self.update.values is not self.parameter:
            self.compact.num_changes += 1

    def with_gradient(
        self, grad: Tensor, state: dict[str, Any], options: tuple[Any, ...], rate: Tensor
    ) -> Update | None:
        """Returns the update with its next gradient here and rate; None where anything else has changed."""
        update, known = self.update, self.known
        values = update.values
        site = known.site
        if site is not None and site.values_maybe is not self.parameter:
            return None
        compact = self.compact
        if compact is not None and (compact.write_error is not None or not compact.is_still(self.topology)):
            return None
        if values is not self.parameter and local(self.parameter) is not values:
            return None
        if (
            state is not self.state
            or len(state) != len(self.items)
            or values.shape != self.shape
            or grad.layout is not torch.strided
            or grad.numel() != values.numel()
            or options != self.options
        ):
            return None
        for key, tensor in self.items:
            if state.get(key) is not tensor:
                return None
        for tensor, address in self.tensors:
            if tensor.data_ptr() != address:
                return None
        if self.must_check_ages:
            check_ages(known.name, update.generation, update.births, values.shape[0])
        update.grad, update.lr = grad, rate
        return update


def make_updates(updates: list[Update]) -> None:
    """Makes the updates. Those that are kept for the next step then hold no gradient, which may be freed."""
    try:
        update_all(updates)
    finally:
        for update in updates:
            update.grad = update.values
