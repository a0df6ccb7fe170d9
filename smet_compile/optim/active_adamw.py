"""ActiveAdamW: SMET's optimizer. NaiveAdamW: what mask libraries do, to measure against."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from smet_compile.format import TopologyChange, arguments
from smet_compile.format.arguments import described, flag, number, seed_number, whole_number
from smet_compile.ops import check, find_sites
from smet_compile.ops.adamw_all import update_all
from smet_compile.ops.optimizers import changes_nothing, has_state, register, registered_holders
from smet_compile.ops.outside_graphs import outside_graphs, prepare
from smet_compile.ops.reference import compute_dtype
from smet_compile.ops.saved_groups import Saved, check_groups
from smet_compile.optim import generations
from smet_compile.optim.held import hold
from smet_compile.optim.state import check_state, moment_dtype, new_state

_STATE_DTYPES = (None, torch.float32, torch.bfloat16, "int8")
_TRAINED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MOST_STEPS = 2**53
_MOST_EXPONENT = 10.0


class ActiveAdamW(Optimizer):
    """AdamW whose moments exist for active weights only, with local age and warm-up (SMET, arXiv 2606.00888).

    For block i of a compact weight of density d, t_i its age in steps (1 at the first update after growth)::

        m ← β1 m + (1 - β1) g          m̂ = m / (1 - β1^t_i)
        v ← β2 v + (1 - β2) g²         v̂ = v / (1 - β2^t_i)
        θ ← θ - α d^(-p) min(1, t_i / W) (m̂ / (√v̂ + ε) + λ θ)

    Every other parameter gets plain AdamW (d = 1, no warm-up, its own step count).

    Args:
        params: the model; or parameters or parameter groups, with ``model=`` given.
        lr: α, a number or a 0-d tensor. betas: β1, β2. eps: ε. weight_decay: λ.
        warmup_steps: W, for blocks; 0 for none. lr_density_exponent: p.
        state_dtype: of the moments: None for fp32 (fp64 for fp64 weights), torch.bfloat16, or "int8": one byte each
            and two scales for every tile or 1024 dense weights.
        stochastic_rounding: for bf16 weights, and bf16 or 8-bit moments; None and True: yes, False: to nearest.
        model: whose parameters ``params`` are. seed: of the rounding.

    A block whose gradient is not finite keeps weight and moments, is counted in ``num_skipped_blocks``, and ages.
    All of lr, betas, eps, weight_decay, warmup_steps and lr_density_exponent may differ by group.

    Raises:
        ValueError: an argument out of range; groups without ``model``; a parameter that is not the model's; a compact
            weight that is sharded; a complex parameter. In a step: a gradient for a dtype that is not trained.
    """

    shared_step: ClassVar[bool] = False

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        warmup_steps: int = 100,
        lr_density_exponent: float = 1.0,
        state_dtype: torch.dtype | Literal["int8"] | None = None,
        stochastic_rounding: bool | None = None,
        model: nn.Module | None = None,
        seed: int = 0,
    ) -> None:
        if isinstance(params, nn.Module):
            if model is not None and model is not params:
                raise ValueError(f"model: expected none beside a model, got {described(model)}; leave it out")
            model, params = params, list(params.parameters())
        if model is None:
            raise ValueError(
                f"{type(self).__name__}: expected a model, or parameters with model=..., got parameters alone; pass "
                "model= so that compact weights are known"
            )
        arguments.module("model", model)
        if not any(
            state_dtype is known or (isinstance(known, str) and state_dtype == known) for known in _STATE_DTYPES
        ):
            raise ValueError(
                f'state_dtype: expected None, torch.float32, torch.bfloat16 or "int8", got {described(state_dtype)}'
            )
        self.state_dtype = state_dtype
        self.stochastic_rounding = stochastic_rounding is None or flag("stochastic_rounding", stochastic_rounding)
        self.seed = seed_number("seed", seed)
        _check_initialised(type(self).__name__, model)
        self._model = model
        self._held = hold(model)
        defaults = _check_options(
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "warmup_steps": warmup_steps,
                "lr_density_exponent": lr_density_exponent,
            }
        )
        self._options = frozenset(defaults)  # torch adds others to its own copy, when a state is loaded
        self._is_first_step = True
        super().__init__(params, defaults)
        register(self)
        prepare()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        checked = _check_options(self.defaults | param_group)
        super().add_param_group(param_group | {key: checked[key] for key in param_group if key in self.defaults})
        self._held = hold(self._model) | self._held
        for parameter in self.param_groups[-1]["params"]:
            if parameter not in self._held:
                del self.param_groups[-1]
                raise ValueError(
                    f"{type(self).__name__}: got a parameter of shape {tuple(parameter.shape)} that is none of the "
                    "model's; add it to the model first"
                )
            if parameter.requires_grad and parameter.is_complex():
                del self.param_groups[-1]
                raise _not_trained(self._held[parameter].name, parameter)

    @outside_graphs("ActiveAdamW.step runs in eager mode; compile what calls it without fullgraph=True")
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient. Returns the closure's loss, if there is one.

        A first step in which every rate is 0 and every gradient is zero only makes the state:
        ``torch.distributed.checkpoint`` steps so before it saves or loads.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        held = [(p, group) for group in self.param_groups for p in group["params"]]
        for parameter, _ in held:
            if parameter.requires_grad or parameter.grad is not None:
                self._held[parameter].check(parameter)
        trained = [(p, group) for p, group in held if p.grad is not None]
        for parameter, _ in trained:
            if parameter.dtype not in _TRAINED:
                raise _not_trained(self._held[parameter].name, parameter)
            if parameter.grad is not None and parameter.grad.is_sparse:
                raise ValueError(
                    f"{self._held[parameter].name}: expected a dense gradient, got a sparse one; use sparse=False"
                )
        only_makes_state = not has_state(self) and changes_nothing(self)
        updates = [(p, p.grad, *self.update_arguments(p, group)) for p, group in trained]
        if only_makes_state:
            return loss
        if self._is_first_step:
            self._is_first_step = False
            self._warn_of_untrained()
        update_all(updates)
        return loss

    def _warn_of_untrained(self) -> None:
        """Groups made by name ("...weight" decays) miss compact weights, whose parameters are called ``original``."""
        sites = {n: s.values for n, s in find_sites(self._model).items() if s.values.grad is not None}
        held = {id(p) for each in registered_holders(sites.values()) for g in each.param_groups for p in g["params"]}
        names = [name for name, values in sites.items() if id(values) not in held and values.requires_grad]
        if names:
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            warnings.warn(
                f"{type(self).__name__}: {shown} got a gradient and are in no parameter group, so they are never "
                "trained unless another optimizer, or that of another rank, holds them. A compact weight is the "
                "parameter '...parametrizations.weight.original': choose it by that name, or make the groups with "
                "smet.decay_groups(model, weight_decay); freeze it with requires_grad_(False) to leave it as it is",
                stacklevel=7,
            )

    def update_arguments(self, parameter: nn.Parameter, group: dict[str, Any]) -> tuple[Any, ...]:
        """What ``smet::active_adamw_`` takes after the gradient; state is made where there is none yet."""
        held = self._held[parameter]
        if not self.state[parameter]:
            self.state[parameter] = new_state(parameter, held.site, moment_dtype(parameter, self.state_dtype))
        state = self.state[parameter]
        compact = held.site.compact if held.site else None
        if compact is not None:
            compact.check()
        arguments = (
            state["exp_avg"],
            state["exp_avg_sq"],
            state.get("scales"),
            state["num_skipped"],
            state["step"],
            _rate(group["lr"]),
            state.get("generation"),
            state.get("births"),
            compact.topology if compact else None,
            compact.index if compact else [],
            *(compact.op_layout() if compact else ([], [], [])),
        )
        check.update(held.name, parameter, *arguments)
        return (
            *arguments,
            held.density ** -group["lr_density_exponent"],
            *group["betas"],
            group["eps"],
            group["weight_decay"],
            group["warmup_steps"] if compact else 0,
            self.shared_step,
            zlib.crc32(f"{self.seed} {held.name}".encode()) if self.stochastic_rounding else None,
        )

    def check_parameter(self, parameter: nn.Parameter) -> None:
        """Raises ValueError where ``parameter`` is no longer what it was when the optimizer was made."""
        self._held[parameter].check(parameter)

    @property
    def num_skipped_blocks(self) -> int:
        """How often a block's gradient was not finite (of plain parameters: an entry's), over all steps."""
        return sum(int(state["num_skipped"]) for state in self.state.values() if state)

    @torch.no_grad()
    def on_topology_change(self, change: TopologyChange) -> None:
        """Moves the state of one compact parameter: survivors bit for bit, newcomers zero and of age 0.

        Scales of 8-bit moments stay: they belong to groups of dense positions, whoever is active there. What a wrapper
        keeps in the same place, shaped like the values (Lookahead's slow weights), moves too.
        """
        state = self.state.get(change.values)
        if not state or change.survived.all():
            return
        for key, rows in state.items():
            if key in ("exp_avg", "exp_avg_sq", "generation") or _is_beside(key, rows, change):
                change.remap_(rows)
        group = next(g for g in self.param_groups if any(p is change.values for p in g["params"]))
        mature = generations.mature_after(group["betas"], group["warmup_steps"], compute_dtype(change.values.dtype))
        state["generation"], state["births"] = generations.add_generation(
            state["generation"], state["births"], ~change.survived, state["step"], mature
        )

    def block_ages(self, values: nn.Parameter) -> Tensor:
        """(N,) int64: optimizer steps since each block of a compact parameter was grown."""
        state = self.state.get(values)
        if not state:
            return torch.zeros(values.shape[0], dtype=torch.int64, device=values.device)
        return generations.ages(state["generation"], state["births"], state["step"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads ``state_dict()`` of the same model, every state tensor in the dtype it was saved in.

        torch's own method casts all state to the parameter's dtype, which destroys integers in a bf16 model.

        Raises:
            ValueError: see ``check_state_dict``. Nothing has then changed.
        """
        saved = self.check_state_dict(state_dict)
        loaded: dict[Tensor, dict[str, Tensor]] = {}
        for key, state in state_dict["state"].items():
            parameter = saved[key].parameter
            loaded[parameter] = {k: v.to(parameter.device, copy=True) for k, v in state.items()}
        super().load_state_dict(state_dict)
        self.state.update(loaded)

    def check_state_dict(self, state_dict: Any) -> dict[Hashable, Saved]:
        """Returns, by the number that stands for it, each parameter and its saved group.

        Raises:
            ValueError: an option that the constructor would refuse; state of other parameters, or of another dtype or
                shape; counts, ages or scales that no training makes. Moments may be anything: an overflow is kept.
        """
        saved = check_groups(state_dict, self, self._options)
        for i, group in enumerate(state_dict["param_groups"]):
            try:
                _check_options({option: group[option] for option in self._options})
            except (ValueError, TypeError) as error:
                raise ValueError(f"param_groups[{i}]: {error}") from error
        for key, state in state_dict["state"].items():
            if key not in saved:
                raise ValueError("optimizer state: expected that of this model's parameters, got that of others")
            parameter = saved[key].parameter
            held = self._held[parameter]
            check_state(held.name, parameter, held.site, moment_dtype(parameter, self.state_dtype), state)
        return saved

    def __getstate__(self) -> dict[str, Any]:
        ours = ("state_dtype", "stochastic_rounding", "seed", "_model", "_held", "_options", "_is_first_step")
        return super().__getstate__() | {key: getattr(self, key) for key in ours}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"_is_first_step": True} | state)
        register(self)


class NaiveAdamW(ActiveAdamW):
    """The naive rule, as a baseline: bias corrections by the parameter's step count, not the block's age.

    After a late update its first step on a grown block is (1 - β1) / √(1 - β2) = 3.16 times too large. Takes the
    arguments of ``ActiveAdamW``; ``warmup_steps`` is 0 unless given.
    """

    shared_step = True

    def __init__(self, params: nn.Module | Iterable[Any], *args: Any, warmup_steps: int = 0, **options: Any) -> None:
        super().__init__(params, *args, warmup_steps=warmup_steps, **options)


_STATE = frozenset({"step", "exp_avg", "exp_avg_sq", "num_skipped", "scales", "generation", "births"})


def _is_beside(key: str, rows: Any, change: TopologyChange) -> bool:
    if key in _STATE or not isinstance(rows, Tensor) or rows.shape != change.values.shape:
        return False
    return rows.data_ptr() != change.values.data_ptr()


def _rate(lr: float | Tensor) -> Tensor:
    """On the host unless the user put it elsewhere, whatever the default device is."""
    return lr.to(torch.float64) if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64, device="cpu")


def _check_initialised(optimizer: str, model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise ValueError(
                f"{optimizer}: {name} is not initialised yet; run a forward first, then make the optimizer"
            )


def _not_trained(name: str, parameter: Tensor) -> ValueError:
    return ValueError(
        f"{name}: expected a parameter of float64, float32, bfloat16 or float16, got {parameter.dtype}; train it by "
        "an optimizer of torch.optim, and give ActiveAdamW the other parameters with model="
    )


def _check_options(options: dict[str, Any]) -> dict[str, Any]:
    """Returns ``options`` with the numbers as plain Python; a ValueError names the first that is out of range.

    The bounds are those of what is computed from an option: a step count is an int64, a rate a finite number.
    """
    return options | {
        "lr": _check_rate(options["lr"]),
        "betas": _check_betas(options["betas"]),
        "eps": number("eps", options["eps"], at_least=0),
        "weight_decay": number("weight_decay", options["weight_decay"], at_least=0),
        "warmup_steps": whole_number("warmup_steps", options["warmup_steps"], at_least=0, at_most=_MOST_STEPS),
        "lr_density_exponent": number(
            "lr_density_exponent", options["lr_density_exponent"], at_least=-_MOST_EXPONENT, at_most=_MOST_EXPONENT
        ),
    }


def _check_rate(lr: Any) -> float | Tensor:
    """A tensor stays one: a compiled step reads it anew each time."""
    if not isinstance(lr, Tensor):
        return number("lr", lr, at_least=0)
    if lr.dim() != 0 or lr.is_complex() or lr.dtype == torch.bool:
        raise ValueError(
            f"lr: expected a number or a real tensor without dimensions, got {described(lr)}; pass a float"
        )
    number("lr", lr.detach(), at_least=0)
    return lr


def _check_betas(betas: Any) -> tuple[float, float]:
    is_list = isinstance(betas, Sequence) and not isinstance(betas, str | bytes)
    listed = list(betas) if is_list or getattr(betas, "shape", None) == (2,) else []
    if len(listed) != 2:
        raise ValueError(
            f"betas: expected two numbers in [0, 1), got {described(betas)}; pass a pair such as (0.9, 0.999)"
        )
    first, second = (number("betas", beta, at_least=0, below=1) for beta in listed)
    return first, second
