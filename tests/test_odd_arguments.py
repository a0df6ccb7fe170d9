"""Every public function copes with odd values for every argument.

A call is refused by a ValueError or a TypeError, with nothing changed; or what it made trains, moves its topology, is
saved and loaded.
"""

import itertools
import math
import numbers
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from tests.support.odd_values import ODD
from tests.support.snapshots import assert_same, snapshot
from tests.support.states import structure

LARGE = 10
_STRIDE = 47


class Run:
    """Makes a small model, its optimizer and its manager when asked for."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.plain = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
        self._model: nn.Module | None = None

    @property
    def model(self) -> nn.Module:
        if self._model is None:
            self._model = smet.sparsify(self.plain, 0.4)
        return self._model

    @property
    def optimizer(self) -> smet.ActiveAdamW:
        return smet.ActiveAdamW(self.model, lr=1e-2)

    def trained(self, optimizer: Any = None, manager: Any = None) -> None:
        """Trains for three steps with topology updates, saves a checkpoint and loads it."""
        model = self.model
        optimizer = optimizer or self.optimizer
        manager = manager or smet.TopologyManager(model, optimizer, total_steps=100, every=1)
        for seed in range(3):
            loss_of(model, seed).backward()
            optimizer.step()
            optimizer.zero_grad()
            manager.step()
        smet.save_checkpoint("run", model, optimizer, manager)
        before = snapshot(model, optimizer, manager)
        smet.load_checkpoint("run", model, optimizer, manager)
        assert_same(snapshot(model, optimizer, manager), before)


def loss_of(model: nn.Module, seed: int) -> Tensor:
    loss: Tensor = model(torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))).square().mean()
    return loss


def made_sparse(run: Run, argument: str, value: Any) -> None:
    if argument == "model":
        smet.sparsify(value, 0.4)
        return
    run._model = smet.sparsify(run.plain, **{"density": 0.4, argument: value})
    manager = smet.TopologyManager(run.model, optimizer := run.optimizer, total_steps=9, every=1, drop_fraction=0)
    run.trained(optimizer, manager)


def optimized(kind: type[smet.ActiveOptimizer]) -> Callable[[Run, str, Any], None]:
    def call(run: Run, argument: str, value: Any) -> None:
        if argument == "params":
            optimizer = kind(value, model=run.model)
        elif argument == "model":
            optimizer = kind(list(run.model.parameters()), model=value)
        else:
            optimizer = kind(run.model, **{argument: value})
        run.trained(optimizer)

    return call


def grouped(run: Run, argument: str, value: Any) -> None:
    first, *others = run.model.parameters()
    run.trained(smet.ActiveAdamW([{"params": [first], argument: value}, {"params": others}], model=run.model))


def managed(run: Run, argument: str, value: Any) -> None:
    optimizer = run.optimizer
    given = {"model": run.model, "optimizer": optimizer, "total_steps": 20, "every": 1} | {argument: value}
    manager = smet.TopologyManager(**given)
    if argument not in ("drop", "grow") or not callable(value):  # what a policy does is the user's
        run.trained(optimizer, manager)


def marked(run: Run, argument: str, value: Any) -> None:
    given = {"policy": lambda site, context: context.gradient_means(), "window": 2, "decay": 0.5} | {argument: value}
    policy = given.pop("policy")
    grow = smet.needs_gradient(policy, **given)
    if argument != "policy":  # what it does is the user's
        managed(run, "grow", grow)


def mixed(run: Run, argument: str, value: Any) -> None:
    managed(run, "grow", smet.mix_growth(value))


def scheduled(run: Run, argument: str, value: Any) -> None:
    stages = smet.cubic_density(**({"first": 1.0, "last": 0.2, "end": 90} | {argument: value}))
    assert all(0 < density <= 1 for _, density in stages)


def stepped(run: Run, argument: str, value: Any) -> None:
    given = {"model": run.model, "optimizer": run.optimizer, "loss_fn": loss_of} | {argument: value}
    step = smet.compile_train_step(**given)
    if argument == "loss_fn":  # what it does is the user's
        return
    with torch.compiler.set_stance("force_eager"):
        for seed in range(3):
            assert math.isfinite(step(seed))


def materialized(run: Run, argument: str, value: Any) -> None:
    with torch.device("meta"):
        model = smet.sparsify(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5)), 0.4)
    smet.materialize(**({"model": model, "device": "cpu"} | {argument: value}))
    assert loss_of(model, 0).isfinite()


def clipped(run: Run, argument: str, value: Any) -> str:
    given = {"parameters": run.model, "max_norm": 1.0, argument: value}
    return str(float(smet.clip_grad_norm_(**given)))


def decayed(run: Run, argument: str, value: Any) -> None:
    groups = smet.decay_groups(**({"model": run.model, "weight_decay": 0.1} | {argument: value}))
    run.trained(smet.ActiveAdamW(groups, model=run.model))


def sorted_by_rate(run: Run, argument: str, value: Any) -> None:
    given = {"model": run.model, "lr": 1e-3, "embedding_lr": 1e-2, "base_width": 8} | {argument: value}
    run.trained(smet.ActiveAdamW(smet.param_groups(**given), model=run.model))


def scaled(run: Run, argument: str, value: Any) -> None:
    smet.scale_initial_(**({"model": run.model, "std": 0.1, "base_width": 8} | {argument: value}))
    run.trained()


def registered(run: Run, argument: str, value: Any) -> None:
    given = {"kernel": smet.Kernel("odd", {"unpack": len}, lambda op, case: "is a test"), "before": None}
    kernel = (given | {argument: value})["kernel"]
    smet.register_kernel(**(given | {argument: value}))
    smet.unregister_kernel(kernel.name)


def exported(run: Run, argument: str, value: Any) -> None:
    smet.export_dense(**({"model": run.model} | {argument: value}))


def inspected(run: Run, argument: str, value: Any) -> None:
    str(smet.inspect(value) if argument == "model" else smet.inspect(run.model, **{argument: value}))


def explained(run: Run, argument: str, value: Any) -> None:
    given = {"model": run.model, "strict": False} | {argument: value}
    str(smet.explain(given["model"], torch.zeros(4, 6), strict=given["strict"]))


def corrected(run: Run, argument: str, value: Any) -> None:
    model = smet.sparsify(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)), 0.4)
    given = {"model": model, "optimizer": smet.ActiveSGD(model), "example": torch.randn(4, 6)} | {argument: value}
    example = given.pop("example")
    str(smet.correct_gradients(given.pop("model"), given.pop("optimizer"), example, **given))


def planned(run: Run, argument: str, value: Any) -> None:
    given: dict[str, Any] = {
        "model": run.plain,
        "inputs": lambda batch, sequence: torch.zeros(batch, 6),
        "loss_fn": lambda model, x: model(x).sum(),
        "compiled": False,
    }
    if argument == "vocabulary":
        given = {"model": "nano", "compiled": False}
    str(smet.plan(**(given | {argument: value})))


def saved(run: Run, argument: str, value: Any) -> None:
    given = {"path": "odd", "model": run.model, "optimizer": run.optimizer, "manager": None, "extra": None}
    given |= {argument: value}
    smet.save_checkpoint(**given)
    smet.load_checkpoint(given["path"], given["model"], given["optimizer"])


def loaded(run: Run, argument: str, value: Any) -> None:
    given = {"path": "good", "model": run.model, "optimizer": run.optimizer, "manager": None}
    smet.save_checkpoint("good", run.model, given["optimizer"])
    smet.load_checkpoint(**(given | {argument: value}))


def shared(run: Run, argument: str, value: Any) -> None:
    given = {"model": run.model, "folder": "odd_folder", "manager": None} | {argument: value}
    smet.save_compact(**given)
    smet.load_compact(given["folder"], run.model)


def taken(run: Run, argument: str, value: Any) -> None:
    given = {"folder": "good_folder", "model": run.model, "device": None}
    smet.save_compact(run.model, "good_folder")
    smet.load_compact(**(given | {argument: value}))


OPTIONS = ("lr", "betas", "eps", "weight_decay", "warmup_steps", "initial_warmup_steps", "lr_density_exponent")
OF_OPTIMIZER = ("params", "model", *OPTIONS, "moment_dtype", "stochastic_rounding", "seed")
CHOICES = ("drop", "grow", "schedule", "min_age", "window", "ablation_threshold")
FRACTIONS = ("drop_fraction", "final_drop_fraction", "stop_fraction")
WEIGHTS = ("density", "block_shape", "include", "exclude", "rules", "distribution")
SWITCHES = ("compiled", "fused_update", "checkpointing")
Call = Callable[[Run, str, Any], None]
FUNCTIONS: dict[str, tuple[Call, tuple[str, ...]]] = {
    "sparsify": (
        made_sparse,
        ("model", *WEIGHTS, "select", "pattern", "masks", "rescale", "seed", "dense_as_compact", "slabs"),
    ),
    "ActiveAdamW": (optimized(smet.ActiveAdamW), OF_OPTIMIZER),
    "NaiveAdamW": (optimized(smet.NaiveAdamW), OF_OPTIMIZER),
    "ActiveLion": (optimized(smet.ActiveLion), ("lr", "betas", "weight_decay", "warmup_steps")),
    "ActiveSGD": (optimized(smet.ActiveSGD), ("lr", "momentum", "weight_decay", "nesterov")),
    "ActiveScale": (optimized(smet.ActiveScale), ("lr", "momentum", "weight_decay", "betas")),
    "register_kernel": (registered, ("kernel", "before")),
    "unregister_kernel": (lambda run, argument, value: smet.unregister_kernel(value), ("name",)),
    "register_rule": (lambda run, argument, value: smet.register_rule(value), ("rule",)),  # type: ignore[arg-type, return-value]
    "ActiveAdamW, of a group": (grouped, ("params", *OPTIONS)),
    "TopologyManager": (
        managed,
        ("model", "optimizer", "total_steps", "every", *FRACTIONS, *CHOICES, "seed", "density_schedule"),
    ),
    "cubic_density": (scheduled, ("first", "last", "begin", "end", "num_stages")),
    "needs_gradient": (marked, ("policy", "window", "decay")),
    "mix_growth": (mixed, ("shares",)),
    "compile_train_step": (stepped, ("model", "optimizer", "loss_fn", "accumulate", "max_grad_norm")),
    "materialize": (materialized, ("model", "seed", "device", "initialize")),
    "clip_grad_norm_": (clipped, ("parameters", "max_norm", "norm_type", "error_if_nonfinite")),
    "decay_groups": (decayed, ("model", "weight_decay")),
    "param_groups": (sorted_by_rate, ("model", "lr", "embedding_lr", "weight_decay", "base_width")),
    "scale_initial_": (scaled, ("model", "std", "base_width")),
    "report": (lambda run, argument, value: str(smet.report(value)), ("model",)),  # type: ignore[arg-type, return-value]
    "export_dense": (exported, ("model", "layout")),
    "masks": (lambda run, argument, value: str(smet.masks(value)), ("model",)),  # type: ignore[arg-type, return-value]
    "correct_gradients": (corrected, ("model", "optimizer", "example", "depthwise", "scale_steps")),
    "inspect": (inspected, ("model", "manager", "optimizer")),
    "explain": (explained, ("model", "strict")),
    "plan": (
        planned,
        (
            "model",
            *WEIGHTS,
            "batch",
            "sequence",
            "dtype",
            "moment_dtype",
            "optimizer",
            *SWITCHES,
            "fits",
            "inputs",
            "loss_fn",
            "vocabulary",
            "density_schedule",
            "mesh",
            "tp_plan",
        ),
    ),
    "save_checkpoint": (saved, ("path", "model", "optimizer", "manager", "extra")),
    "load_checkpoint": (loaded, ("path", "model", "optimizer", "manager")),
    "save_compact": (shared, ("model", "folder", "manager")),
    "load_compact": (taken, ("folder", "model", "device")),
}
COMPILES = {("explain", "strict"), ("plan", "compiled"), ("plan", "fused_update")}


def outcome(call: Call, argument: str, value: Any) -> str:
    run = Run()
    if call is not made_sparse and call is not planned:
        assert run.model is not None
    states, shape = snapshot(run.plain), structure(run.plain)
    try:
        call(run, argument, value)
    except (ValueError, TypeError) as error:
        if in_use(error):
            return f"accepted, then {type(error).__name__}: {error}"
        assert_same(snapshot(run.plain), states)
        assert structure(run.plain) == shape
        return type(error).__name__
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finite = all(bool(parameter.isfinite().all()) for parameter in run.plain.parameters())
    large = isinstance(value, numbers.Real) and abs(value) > LARGE
    return "accepted" if finite or large else "accepted, then not finite"


def in_use(error: BaseException) -> bool:
    """Returns whether training raised, not the call."""
    names = []
    trace = error.__traceback__
    while trace is not None:
        names.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    return "trained" in names


def check(cases: list[tuple[str, str, str]]) -> Counter[str]:
    counts: Counter[str] = Counter()
    failed = []
    for function, argument, name in cases:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = outcome(FUNCTIONS[function][0], argument, ODD[name]())
        known = found in ("accepted", "ValueError", "TypeError")
        counts[found if known else "failed"] += 1
        if not known:
            failed.append(f"{function}({argument}={name}): {found}")
    assert not failed, "\n".join([f"{len(failed)} of {len(cases)}", *failed])
    return counts


def all_cases() -> list[tuple[str, str, str]]:
    return [
        (function, argument, name)
        for function, (_, arguments) in FUNCTIONS.items()
        for argument, name in itertools.product(arguments, ODD)
    ]


def test_every_public_function_has_its_cases() -> None:
    results = {"Correction", "Explanation", "Inspection", "Plan", "Report", "SiteEvent", "TopologyEvent", "TrainStep"}
    results |= {"TopologyContext"}
    results |= {"ActiveOptimizer", "Kernel", "Rule", "Slot"}  # parts that a user's own code is made of
    assert {name.partition(",")[0] for name in FUNCTIONS} == set(smet.__all__) - results


def test_some_odd_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries two or three values for every argument, other ones for each."""
    assert math.gcd(_STRIDE, len(ODD)) == 1
    monkeypatch.chdir(tmp_path)
    check([case for case in all_cases() if case[:2] not in COMPILES][::_STRIDE])


@pytest.mark.slow
@pytest.mark.parametrize("function", list(FUNCTIONS))
def test_all_odd_arguments(function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    counts = check([case for case in all_cases() if case[0] == function])
    print(function, dict(counts))
