"""Makes compiled training steps of LLaMA shapes: dense, sparse in two calls, sparse with the update in backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import smet_compile as smet
from benchmarks import chosen
from benchmarks.layer import DENSITY, Block
from benchmarks.measuring import llama
from smet_compile.ops import find_sites
from smet_compile.pretrain.corpus import stdlib_paths

DENSE, TWO_CALLS, FUSED = "dense", "two calls", "fused update"
BYTES = 256
"""A vocabulary of the bytes of the standard library's text; a larger one gets random tokens."""


@dataclass(frozen=True)
class Shape:
    """Holds the sizes of a model and of the batch of a step."""

    hidden: int
    intermediate: int
    heads: int
    layers: int
    vocabulary: int
    sequence: int
    batch: int

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence

    def flops(self, density: float) -> float:
        """Counts the operations of forward and backward: the layers' weights, the head, and causal attention."""
        weights = self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.intermediate)
        attention = self.layers * self.sequence * self.hidden
        return 6 * self.tokens * (density * weights + self.hidden * self.vocabulary + attention)

    @property
    def bound(self) -> float:
        """Returns how many times fewer operations a sparse step has than a dense one."""
        return self.flops(1) / self.flops(DENSITY)

    def model(self, dtype: torch.dtype) -> nn.Module:
        return llama(self.layers, self.vocabulary, dtype, self.hidden, self.intermediate, self.heads).train()

    def batch_on(self, device: torch.device) -> dict[str, Tensor]:
        tokens = _text(self.tokens) if self.vocabulary == BYTES else torch.randint(self.vocabulary, (self.tokens,))
        on_device = tokens.view(self.batch, self.sequence).to(device)
        return {"input_ids": on_device, "labels": on_device}


@dataclass(frozen=True)
class Recipe:
    """Describes a training run. Moments are of the dtype of the weights."""

    method: str
    shape: Shape
    block: Block
    dtype: torch.dtype
    device: torch.device


class Training:
    """Trains a model, always on the same batch."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        with recipe.device:
            self.model = recipe.shape.model(recipe.dtype)
        self.batch = recipe.shape.batch_on(recipe.device)
        if recipe.method == DENSE:
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.model.parameters(), 1e-3, fused=True)
        else:
            smet.sparsify(self.model, DENSITY, block_shape=recipe.block)
            moment_dtype = torch.bfloat16 if recipe.dtype == torch.bfloat16 else None
            self.optimizer = smet.ActiveAdamW(self.model, 1e-3, moment_dtype=moment_dtype)
        self.step = self._fused() if recipe.method == FUSED else self._two_calls()

    @property
    def kernels(self) -> str:
        """Names the kernels of the products, and of the update where it is ours."""
        names = [chosen.of_products(find_sites(self.model).values())]
        if isinstance(self.optimizer, smet.ActiveAdamW):
            names.append(chosen.of_update(self.optimizer))
        return ", ".join(names)

    def formula_bytes(self) -> int:
        """Counts the bytes that are needed: weights, gradients, two moments of the weights' dtype, and the topology."""
        compact = {site.values for site in find_sites(self.model).values()} if self.recipe.method == FUSED else set()
        copies = sum(p.nbytes * (3 if p in compact else 4) for p in self.model.parameters())
        return copies + sum(buffer.nbytes for buffer in self.model.buffers())

    def _fused(self) -> Callable[[], Any]:
        step = smet.compile_train_step(self.model, self.optimizer)
        return lambda: step(self.batch)

    def _two_calls(self) -> Callable[[], Any]:
        compiled = torch.compile(self.model)

        def step() -> Tensor:
            loss: Tensor = compiled(**self.batch).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            return loss.detach()

        return step


@functools.cache
def training(recipe: Recipe) -> Training:
    """Returns the run of that recipe, the same one for every section, since compiling it takes long."""
    return Training(recipe)


def static_shapes() -> Any:
    """Keeps Dynamo from making a second model's sizes symbols, because they differ from the first one's."""
    import torch._dynamo

    return torch._dynamo.config.patch(automatic_dynamic_shapes=False)


def _text(num_bytes: int) -> Tensor:
    """Returns the first bytes of the standard library."""
    text = bytearray()
    for path in stdlib_paths():
        if len(text) < num_bytes:
            text += path.read_bytes()
    return torch.frombuffer(text[:num_bytes], dtype=torch.uint8).long()
