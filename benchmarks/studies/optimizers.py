"""Makes the optimizer of a run: ours, torch's, and those that people use to save memory, each by its authors' code.

GaLore (arXiv 2403.03507) and APOLLO (arXiv 2412.05270) project the gradient of a matrix to a rank, keep Adam's moments
there, and renew the projection every 200 steps. Rank and scale are those of their papers: a quarter of the width and
.25, a quarter and 1, rank 1 and 128 for APOLLO-Mini. They need packages: `pip install galore-torch apollo-torch
bitsandbytes tensorly`. Their code rounds 16-bit weights to the nearest, which loses small updates, so `In16Bits` puts
the stochastic rounding around it that all others have. 8-bit AdamW is torchao's.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import smet_compile as smet
from benchmarks.studies.case import Case
from benchmarks.studies.seeded import SeededAdamW

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": "int8"}
PACKAGES = {
    "galore": "galore_torch",
    "apollo": "apollo_torch",
    "apollo_mini": "apollo_torch",
    "torchao": "torchao",
    "torchao_8bit": "torchao",
}
GAP = 200  # steps from one projection to the next
_GALORE_SCALE = 0.25
_MINI_SCALE = 128


def is_installed(optimizer: str) -> bool:
    """Tells whether the package that a case's optimizer needs is here; ours and torch's need none."""
    return optimizer not in PACKAGES or importlib.util.find_spec(PACKAGES[optimizer]) is not None


def make_optimizer(case: Case, model: nn.Module, matrices: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Returns the optimizer of the case. ``matrices``: the weights of linear layers, which ``case.rate`` is for.

    All other parameters move at ``case.plain_rate``, or at ``case.rate`` where that is None.
    """
    if case.optimizer == "adamw":
        return _adamw(case, model, matrices)
    if case.optimizer not in _MAKERS:
        raise ValueError(f"optimizer: expected adamw or one of {', '.join(_MAKERS)}, got {case.optimizer!r}")
    if not is_installed(case.optimizer):
        raise ValueError(f"optimizer {case.optimizer}: expected the package {PACKAGES[case.optimizer]}, which is not "
                         "installed; pip install galore-torch apollo-torch bitsandbytes tensorly torchao")  # fmt: skip
    return _MAKERS[case.optimizer](case, model, matrices)


def _adamw(case: Case, model: nn.Module, matrices: list[nn.Parameter]) -> torch.optim.Optimizer:
    groups = _groups(case, model, matrices)
    if case.density == 1:
        return torch.optim.AdamW(groups, weight_decay=0.0)
    kind = SeededAdamW if case.seeded_moments else smet.ActiveAdamW if case.local_age else smet.NaiveAdamW
    return kind(
        groups,
        model=model,
        warmup_steps=case.block_warmup,
        lr_density_exponent=case.exponent,
        moment_dtype=DTYPES[case.moment_dtype],
        seed=case.seed,
    )


def _groups(case: Case, model: nn.Module, matrices: list[nn.Parameter], **of_matrices: Any) -> list[dict[str, Any]]:
    """Returns two groups: the linear layers' weights, with further options, and all others."""
    return [
        {"params": matrices, "lr": case.rate} | of_matrices,
        {"params": _others(model, matrices), "lr": _plain_rate(case)},
    ]


def _others(model: nn.Module, matrices: list[nn.Parameter]) -> list[nn.Parameter]:
    in_layers = {id(weight) for weight in matrices}
    return [p for p in model.parameters() if id(p) not in in_layers]


def _plain_rate(case: Case) -> float:
    return case.rate if case.plain_rate is None else case.plain_rate


def _scale(case: Case, model: nn.Module, matrices: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Makes SCALE (arXiv 2506.16659), here with a norm of 1 for each output unit.

    Its rate is therefore Adam's times the root of the width: then a weight of a square matrix moves by about ``rate``.
    """
    per_unit = math.sqrt(case.shape.hidden)
    others = _others(model, matrices)
    groups = [
        {"params": matrices, "lr": case.rate * per_unit},
        {"params": [p for p in others if p.dim() > 1], "lr": _plain_rate(case) * per_unit},
        {"params": [p for p in others if p.dim() == 1], "lr": _plain_rate(case)},
    ]
    return smet.ActiveScale(groups, model=model, seed=case.seed)


def _torchao(kind: str) -> Callable[[Case, nn.Module, list[nn.Parameter]], torch.optim.Optimizer]:
    def make(case: Case, model: nn.Module, matrices: list[nn.Parameter]) -> torch.optim.Optimizer:
        found: Any = importlib.import_module("torchao.optim")
        rounds = case.dtype == "bfloat16"
        groups = _groups(case, model, matrices)
        return getattr(found, kind)(groups, weight_decay=0.0, bf16_stochastic_round=rounds)

    return make


def _galore(case: Case, model: nn.Module, matrices: list[nn.Parameter]) -> torch.optim.Optimizer:
    found: Any = importlib.import_module("galore_torch")
    options = {"rank": case.shape.hidden // 4, "update_proj_gap": GAP, "scale": _GALORE_SCALE, "proj_type": "std"}
    groups = _groups(case, model, matrices, **options)
    groups[0]["lr"] /= _GALORE_SCALE  # the rate that its step has after its own scale
    return In16Bits.around(found.GaLoreAdamW(groups, no_deprecation_warning=True), case)


def _apollo(rank: int | None, scale_type: str, scale: float) -> Callable[..., torch.optim.Optimizer]:
    def make(case: Case, model: nn.Module, matrices: list[nn.Parameter]) -> torch.optim.Optimizer:
        found: Any = importlib.import_module("apollo_torch")
        options = {
            "rank": rank or case.shape.hidden // 4, "proj": "random", "scale_type": scale_type, "scale": scale,
            "update_proj_gap": GAP, "proj_type": "std",
        }  # fmt: skip
        return In16Bits.around(found.APOLLOAdamW(_groups(case, model, matrices, **options)), case)

    return make


_MAKERS: dict[str, Callable[[Case, nn.Module, list[nn.Parameter]], torch.optim.Optimizer]] = {
    "scale": _scale,
    "torchao": _torchao("_AdamW"),
    "torchao_8bit": _torchao("AdamW8bit"),
    "galore": _galore,
    "apollo": _apollo(None, "channel", 1.0),
    "apollo_mini": _apollo(1, "tensor", _MINI_SCALE),
}


class In16Bits:
    """Lets an optimizer compute in fp32 what is stored in bf16: weights, gradients, states, projections.

    Before a step all of them become fp32, after it weights and states are rounded stochastically, by draws of the
    seed. Python numbers stay as they are.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, seed: int) -> None:
        self._draws = torch.Generator().manual_seed(seed)
        optimizer.register_step_pre_hook(self._widen)
        optimizer.register_step_post_hook(self._narrow)

    @classmethod
    def around(cls, optimizer: torch.optim.Optimizer, case: Case) -> torch.optim.Optimizer:
        """Returns the optimizer, which rounds from then on where the case has bf16 weights."""
        if case.dtype == "bfloat16":
            cls(optimizer, case.seed)
        return optimizer

    def _widen(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for parameter in parameters_of(optimizer):
            if (grad := parameter.grad) is not None:
                parameter.grad = None
                parameter.data = parameter.data.float()
                parameter.grad = grad.float()
            for holder, name, tensor in state_tensors(optimizer, parameter):
                _set(holder, name, tensor.float())

    def _narrow(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for parameter in parameters_of(optimizer):
            if (grad := parameter.grad) is not None:
                parameter.grad = None
                parameter.data = self._rounded(parameter.data)
                parameter.grad = grad.bfloat16()
            for holder, name, tensor in state_tensors(optimizer, parameter):
                _set(holder, name, self._rounded(tensor))

    def _rounded(self, tensor: Tensor) -> Tensor:
        """Rounds fp32 to bf16 up or down with a chance that leaves the mean: random low bits, then none."""
        noise = torch.randint(0, 1 << 16, tensor.shape, generator=self._draws, dtype=torch.int32)
        bits = (tensor.contiguous().view(torch.int32) + noise) & -(1 << 16)
        rounded = bits.view(torch.float32).to(torch.bfloat16)
        return torch.where(tensor.isfinite(), rounded, tensor.to(torch.bfloat16))


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    """Returns the parameters that an optimizer moves."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def state_tensors(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> list[tuple[Any, str, Tensor]]:
    """Returns (holder, name, tensor) of every tensor that an optimizer keeps for a parameter, projections included."""
    found: list[tuple[Any, str, Tensor]] = []
    for name, kept in optimizer.state.get(parameter, {}).items():
        if isinstance(kept, Tensor):
            found.append((optimizer.state[parameter], name, kept))
        elif hasattr(kept, "ortho_matrix"):
            found.append((kept, "ortho_matrix", kept.ortho_matrix))
    return [each for each in found if each[2] is not None]


def _set(holder: Any, name: str, tensor: Tensor) -> None:
    if isinstance(holder, dict):
        holder[name] = tensor
    else:
        setattr(holder, name, tensor)
