"""Runs torchtitan's own Trainer on a CPU, in a process of its own; writes what came of each run as JSON.

torchtitan looks for an accelerator when it is imported, and takes CUDA where it finds none. Here it finds a CPU that
answers what it asks of a device. The attention of its language models has no backward on a CPU, so the plain one stands
in its place.

    RANK=0 WORLD_SIZE=1 ... python -m tests.integrations.titan_run TO '[{"folder": "a"}, {"folder": "a", "load": 3}]'
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

VOCABULARY, LENGTH, ROWS, STEPS = 64, 16, 4, 6
"""ROWS is the batch of all ranks together."""


def give_a_device(change: Callable[..., None] = setattr) -> None:
    """Makes a CPU the device that torchtitan finds; ``change`` sets attributes of torch."""
    device = types.SimpleNamespace(
        device_count=lambda: 1,
        current_device=lambda: 0,
        get_device_name=lambda device=None: "CPU",
        get_device_properties=lambda device=None: types.SimpleNamespace(total_memory=2**34),
        memory_stats=lambda device=None: {},
    )
    for name in ("set_device", "reset_peak_memory_stats", "empty_cache", "synchronize"):
        setattr(device, name, lambda *args: None)
    change(torch._utils, "_get_available_device_type", lambda: "cpu")
    change(torch._utils, "_get_device_module", lambda kind: device)
    if not hasattr(distributed, "set_timeout"):  # torch 2.13 has it under another name
        distributed.set_timeout = distributed.distributed_c10d._set_pg_timeout


def sum_by_gloo() -> None:
    """Has FSDP add up gradients by a plain sum; gloo has no sum that multiplies first."""
    from torch.distributed.fsdp import FSDPModule
    from torchtitan.distributed import fsdp

    divide = fsdp.disable_fsdp_gradient_division

    def disable(model: nn.Module) -> None:
        divide(model)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)

    fsdp.disable_fsdp_gradient_division = disable


def registry() -> dict[str, Any]:
    """Returns configurations of data and tokenizer, which torchtitan otherwise reads from files."""
    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.components.tokenizer import BaseTokenizer

    class Tokens(BaseTokenizer):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseTokenizer.Config):
            pass

        def __init__(self, config: Any, *, tokenizer_path: str) -> None:
            super().__init__()

        def encode(self, *args: Any) -> list[int]:
            return []

        def decode(self, *args: Any) -> str:
            return ""

        def get_vocab_size(self) -> int:
            return VOCABULARY

    class Batches(BaseDataLoader):
        """Gives each rank its rows of batches that are functions of their number."""

        @dataclass(kw_only=True, slots=True)
        class Config(BaseDataLoader.Config):
            pass

        def __init__(self, config: Any, *, dp_world_size: int, dp_rank: int, **others: Any) -> None:
            self.number, self.part = 0, (dp_rank, dp_world_size)

        def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
            rank, world = self.part
            while True:
                generator = torch.Generator().manual_seed(self.number)
                tokens = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=generator).chunk(world)[rank]
                self.number += 1
                yield {"input": tokens[:, :-1].contiguous()}, tokens[:, 1:].contiguous()

        def state_dict(self) -> dict[str, Any]:
            return {"number": self.number}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.number = state["number"]

    return {"dataloader": Batches.Config(), "tokenizer": Tokens.Config()}


def small_model(spec: Any) -> None:
    """Gives the debug model two layers of width 32."""
    from functools import partial

    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config

    width, heads = 32, 4
    model, normal, ones = spec.model, partial(nn.init.trunc_normal_, std=0.1), {"weight": nn.init.ones_}
    model.dim, model.vocab_size, model.layers = width, VOCABULARY, model.layers[:2]
    model.tok_embeddings = Embedding.Config(
        num_embeddings=VOCABULARY, embedding_dim=width, param_init={"weight": normal}
    )
    model.lm_head = Linear.Config(in_features=width, out_features=VOCABULARY, param_init={"weight": normal})
    model.norm = RMSNorm.Config(normalized_shape=width, param_init=ones)
    for layer in model.layers:
        layer.attention_norm = layer.ffn_norm = RMSNorm.Config(normalized_shape=width, param_init=ones)
        layer.attention = make_gqa_config(
            dim=width,
            n_heads=heads,
            n_kv_heads=heads,
            wqkv_param_init={"weight": normal},
            wo_param_init={"weight": normal},
            inner_attention=ScaledDotProductAttention.Config(),
            fuse_qkv=False,
            rope=ComplexRoPE.Config(dim=width // heads, max_seq_len=LENGTH),
        )
        layer.feed_forward = make_ffn_config(
            dim=width, hidden_dim=64, w1_param_init={"weight": normal}, w2w3_param_init={"weight": normal}
        )


def make_config(folder: str, load: int | None, backend: str, tp: int, checkpointing: bool) -> Any:
    from torchtitan.components.loss import CrossEntropyLoss
    from torchtitan.distributed.activation_checkpoint import FullAC
    from torchtitan.models.llama3.config_registry import llama3_debugmodel

    config = llama3_debugmodel()
    small_model(config.model_spec)
    for name, each in registry().items():
        setattr(config, name, each)
    config.loss = CrossEntropyLoss.Config(global_vocab_size=VOCABULARY)
    parallelism, training = config.parallelism, config.training
    parallelism.spmd_backend, parallelism.tensor_parallel_degree = backend, tp
    parallelism.data_parallel_shard_degree = -1
    ranks = int(os.environ["WORLD_SIZE"]) // tp
    training.local_batch_size, training.seq_len, training.steps = ROWS // ranks, LENGTH, STEPS
    training.mixed_precision_param, training.disable_cuda_graphs = "float32", True
    config.validator.enable = False
    config.dump_folder, config.optimizer.implementation = folder, "for-loop"
    config.activation_checkpoint = FullAC.Config() if checkpointing else None
    config.checkpoint.enable, config.checkpoint.interval = True, 3
    if load is not None:
        config.checkpoint.load_step = load
    return config


def small_sparse() -> Any:
    """Stands for a function of a registry of one's own."""
    from smet_compile.integrations.torchtitan import sparse_training

    return sparse_training(make_config(".", None, "partial_dtensor", 1, False), 0.4, every=2)


def train(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Returns the losses, the logged numbers, the updates and a digest of the compact weights of one run."""
    import smet_compile as smet
    from smet_compile.integrations.torchtitan import sparse_training

    kinds = {"load": None, "backend": "partial_dtensor", "tp": 1, "checkpointing": False} | options
    config = make_config(str(folder), **{k: v for k, v in kinds.items() if k not in ("sparse", "folder")})
    sparse = {"every": 2, "stop_fraction": 1.0, "min_age": 0} | options.get("sparse", {})
    trainer = sparse_training(config, 0.4, **sparse).build()
    logged: list[dict[str, Any]] = []
    logger = trainer.metrics_processor.logger
    logger.log = lambda numbers, step: logged.append(numbers)
    trainer.train()
    manager, model = trainer.optimizers.manager, trainer.model_parts[0]
    smet.save_compact(model, folder / "shared", manager=manager)
    trainer.close()
    distributed.barrier()
    plain = smet.load_compact(folder / "shared", config.model_spec.model.build())
    dense = smet.export_dense(plain).state_dict()
    return {
        "losses": [numbers["loss_metrics/global_avg_loss"] for numbers in logged],
        "densities": [numbers["smet/density"] for numbers in logged],
        "updates": [event.step for event in manager.history],
        "total_steps": manager.settings["total_steps"],
        "zeros": {name: float((dense[name] == 0).float().mean()) for name in manager.sites},
        "digest": hashlib.sha256((folder / "shared/compact.safetensors").read_bytes()).hexdigest(),
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    give_a_device()
    sum_by_gloo()
    to = Path(sys.argv[1])
    results = [train(to / options["folder"], options) for options in json.loads(sys.argv[2])]
    if os.environ["RANK"] == "0":
        (to / "results.json").write_text(json.dumps(results))
    distributed.destroy_process_group()
