"""Sparse training by torchtitan: one function changes the configuration of a run, and nothing of torchtitan itself."""

# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import dataclasses
import io
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config.override import derive
from torchtitan.protocols.module import Module
from torchtitan.trainer import Trainer

from smet_compile.api import sparsify
from smet_compile.convert import materialize
from smet_compile.integrations.options import split_options
from smet_compile.integrations.rehearsal import rehearse_options
from smet_compile.ops import find_sites
from smet_compile.optim import ActiveAdamW
from smet_compile.runtime import TopologyManager
from smet_compile.runtime.metrics import LOGGED

_KEY = "topology_manager"
_ACTIVE = "ActiveAdamW"
_BACKENDS = ("partial_dtensor", "spmd_types")


def sparse_training(config: Trainer.Config, density: float, **options: Any) -> Trainer.Config:
    """Has a torchtitan run train its model sparse; changes ``config`` in place and returns it.

    It stands in a function of a registry of one's own, which ``--module`` and ``--config`` name::

        def llama3_8b_sparse() -> Trainer.Config:
            return sparse_training(llama3_8b(), density=0.3, block_shape=64)

    Output embeddings stay dense, as elsewhere. The other weights become compact on the meta device, after tensor
    parallelism and before activation checkpointing, the compiler and FSDP. They are drawn by the model's own
    initialisers. Groups of ``AdamW`` get ``ActiveAdamW``. After each step the topology is updated when that is due, and
    its numbers are logged as ``smet/density`` and so on. Checkpoints hold the state of the manager.

    Args:
        density: active share.
        options: those of ``sparsify`` and ``TopologyManager``, by name; ``total_steps`` is the run's
            ``training.steps`` if it is left out. Options of ``ActiveAdamW`` go into the ``optimizer_kwargs`` of groups.

    Raises:
        ValueError: an option that neither knows, a value that no model takes, or an optimizer other than Adam and
            AdamW. When the trainer is made: pipeline, expert or context parallelism, the backend "full_dtensor", a
            model whose ``parallelize_fn`` has no activation checkpointing, a seed checkpoint.
    """
    functions: dict[str, Any] = {"sparsify": sparsify, "TopologyManager": TopologyManager}
    given = {"self", "model", "optimizer", "density", "auto_step"}
    split = split_options(options, functions, given)
    rehearse_options(split["TopologyManager"])
    groups = config.optimizer.param_groups
    for group in groups:
        if group.optimizer_name not in ("Adam", "AdamW", _ACTIVE):
            raise ValueError(
                f"optimizer: expected groups of Adam, AdamW or {_ACTIVE}, got {group.optimizer_name}, which does not "
                "move each weight on its own"
            )
    if config.model_spec is None:
        raise ValueError("model_spec: expected the model of the run, got None; set it before sparse_training")
    named = [
        dataclasses.replace(each, optimizer_name=_ACTIVE) if each.optimizer_name == "AdamW" else each for each in groups
    ]
    config.optimizer = derive(config.optimizer, SparseOptimizers.Config, param_groups=named)
    if type(config.metrics) is MetricsProcessor.Config:
        config.metrics = derive(config.metrics, SparseMetrics.Config)
    spec = config.model_spec
    run = _SparseRun({"density": density, **split["sparsify"]}, split["TopologyManager"], spec, config.debug)
    config.model_spec = dataclasses.replace(
        spec, parallelize_fn=run.parallelize, post_optimizer_build_fn=run.after_optimizers
    )
    return config


class SparseOptimizers(OptimizersContainer[Any]):
    """Makes active optimizers too, and keeps the topology manager of the run.

    Attributes:
        manager: the topology manager, once the optimizers are made.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        pass

    manager: TopologyManager | None = None
    _loaded: dict[str, Any] | None = None
    """The manager's state from a checkpoint, of which the weights may not be loaded yet."""

    @staticmethod
    def _build_impl_kwargs(config: OptimizersContainer.Config) -> dict[str, Any]:
        return {}  # an active optimizer chooses its kernels itself

    def _resolve_optimizer_factory(self, name: str) -> Any:
        if name != _ACTIVE:
            return OptimizersContainer._resolve_optimizer_factory(name)
        (model,) = self.model_parts
        return lambda groups, **options: ActiveAdamW(groups, model=model, **options)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._resume()  # before the first gradient, which growth may ask for
        super().zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        if self.manager is not None:
            self.manager.step()

    def state_dict(self) -> dict[str, Any]:
        """Returns torchtitan's flat state, with that of the manager under one key."""
        self._resume()
        found = super().state_dict()
        return found if self.manager is None else found | {_KEY: _to_bytes(self.manager.state_dict())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what ``state_dict`` returned. Raises ValueError where the manager has other settings."""
        others = {name: value for name, value in state_dict.items() if name != _KEY}
        if self.manager is None:
            super().load_state_dict(others)
            return
        if _KEY not in state_dict:
            raise ValueError(f"{_KEY}: expected the state of the manager, found none; resume a run of sparse_training")
        state = torch.load(io.BytesIO(state_dict[_KEY]), weights_only=True)
        self.manager.check_state_dict(state)
        super().load_state_dict(others)
        self._loaded = state

    def _resume(self) -> None:
        """Gives the manager the state of a checkpoint, once the model has its topologies."""
        state, self._loaded = self._loaded, None
        if state is not None and self.manager is not None:
            self.manager.load_state_dict(state)


def _to_bytes(state: dict[str, Any]) -> bytes:
    """Returns a state as one object, which ``torch.distributed.checkpoint`` saves and loads whole, however it grows."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


class SparseMetrics(MetricsProcessor):
    """Logs the numbers of the topology with torchtitan's own."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        pass

    def log(self, *args: Any, extra_metrics: dict[str, Any] | None = None, **kwargs: Any) -> None:
        manager = getattr(self.optimizers, "manager", None)
        numbers = {} if manager is None else manager.metrics(LOGGED)
        super().log(*args, extra_metrics={**(extra_metrics or {}), **numbers}, **kwargs)


class _SparseRun:
    """Knows what one run needs between its configuration and its first step."""

    def __init__(self, of_sparsify: dict[str, Any], of_manager: dict[str, Any], spec: Any, debug: Any) -> None:
        self._of_sparsify, self._of_manager = of_sparsify, of_manager
        self._spec, self._debug = spec, debug
        self._num_steps = 0

    def parallelize(self, model: nn.Module, *, parallel_dims: Any, training: Any, ac_config: Any, **others: Any) -> Any:
        """Parallelizes the model, and makes it sparse where activation checkpointing has its turn."""
        _check_parallelism(parallel_dims)
        self._num_steps = training.steps
        first = _Sparsify(self._of_sparsify, ac_config)
        parallel: Any = self._spec.parallelize_fn(
            model, parallel_dims=parallel_dims, training=training, ac_config=first, **others
        )
        if not find_sites(parallel):
            raise ValueError(
                f"model_spec: expected a parallelize_fn that applies activation checkpointing, got that of "
                f"{self._spec.name}, which does not; sparse_training makes the model sparse there"
            )
        seed = 0 if self._debug.seed is None else self._debug.seed
        parallel.init_weights = lambda **options: _initialize(parallel, seed, options.get("buffer_device"))
        return parallel

    def after_optimizers(self, optimizers: Any, model_parts: list[nn.Module], parallel_dims: Any) -> None:
        """Makes the topology manager."""
        if self._spec.post_optimizer_build_fn is not None:
            self._spec.post_optimizer_build_fn(optimizers, model_parts, parallel_dims)
        if not self._num_steps:
            raise ValueError("checkpoint: expected a run, got create_seed_checkpoint, which no sparse run can load")
        (model,) = model_parts
        found: list[Optimizer] = optimizers.optimizers
        optimizers.manager = TopologyManager(
            model, found, **({"total_steps": self._num_steps} | self._of_manager | {"auto_step": False})
        )


class _Sparsify:
    """Stands in the place of activation checkpointing: makes the model sparse, then does what it was to do."""

    def __init__(self, options: dict[str, Any], inner: Any) -> None:
        self._options, self._inner = options, inner

    def build(self, **options: Any) -> _Sparsify:
        policy = None if self._inner is None else self._inner.build(**options)
        return _Sparsify(self._options, policy)

    def apply(self, model: nn.Module) -> None:
        options = dict(self._options)
        if "include" not in options and isinstance(getattr(model, "lm_head", None), nn.Module):
            excluded = options.get("exclude") or []
            options["exclude"] = [*([excluded] if isinstance(excluded, str) else excluded), "lm_head"]
        sparsify(model, **options)
        if self._inner is not None:
            self._inner.apply(model)


def _check_parallelism(dims: Any) -> None:
    """Raises ValueError for what was not tried, or cannot be."""
    for name in ("pp", "ep", "cp"):
        degree = getattr(dims, name)
        if degree > 1:
            raise ValueError(f"parallelism: expected data and tensor parallelism, got {name}={degree}; leave it out")
    if dims.spmd_backend not in _BACKENDS:
        known = ", ".join(_BACKENDS)
        raise ValueError(
            f"parallelism.spmd_backend: expected one of {known}, got {dims.spmd_backend}; pass one of them"
        )


def _initialize(model: Any, seed: int, buffer_device: torch.device | None) -> None:
    """Draws every weight by the initialiser of its module, one dense weight at a time."""
    if model.enable_weight_tying:  # memory that was allocated module by module has parted them
        model.tok_embeddings.weight = model.lm_head.weight

    def draw(module: nn.Module) -> None:
        if not isinstance(module, Module):
            return
        if module._param_init is None:
            module._init_self_parameters()
        for name, initializer in (module._param_init or {}).items():
            tensor = getattr(module, name, None)
            if tensor is not None:
                initializer(tensor)
        _init_buffers(module, buffer_device)

    materialize(model, seed=seed, initialize=draw)


def _init_buffers(module: Module, device: torch.device | None) -> None:
    """Computes the buffers of a module; those that tensor parallelism has distributed stay so."""
    before = {name: buffer for name, buffer in module._buffers.items() if isinstance(buffer, DTensor)}
    with module._preserve_buffer_spmd_types():
        module._init_self_buffers(buffer_device=device)
    for name, old in before.items():
        new = module._buffers.get(name)
        if new is not None and not isinstance(new, DTensor):
            module._buffers[name] = distribute_tensor(new, old.device_mesh, list(old.placements))
