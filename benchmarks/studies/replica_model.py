"""Computes the losses of many small LLaMAs at once: each product is one batched product over all of them.

Shape suffixes: E models, B windows, S bytes of a window, T = B S, D hidden, H heads, V bytes there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.studies.case import Case, Shape
from benchmarks.studies.trainer import build_model

_EPS, _THETA = 1e-6, 10_000.0  # of norms and rotary embeddings, as in LLaMA
Losses = Callable[[list[Tensor], Tensor], Tensor]


def initial_values(case: Case) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the parameters that `build_model` draws for the case, and the names of linear layers' weights."""
    model = build_model(case)
    modules = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    linear = [f"{name}.weight" for name in modules if name.startswith("model.layers.")]
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, linear


class ManyModels:
    """Computes the mean loss per byte of E models of one shape.

    Args:
        names: of the parameters, in the order in which they are given to ``losses``.
        head_scales: factors (E,) on the logits.
    """

    def __init__(self, shape: Shape, names: Sequence[str], head_scales: Sequence[float]) -> None:
        self._shape, self._names = shape, tuple(names)
        self._head_scales_E11 = torch.tensor(head_scales, device=shape.device).view(-1, 1, 1)
        self._cos, self._sin = _rotations(shape)

    def losses(self, parameters: list[Tensor], tokens_EBS: Tensor) -> Tensor:
        """Returns the loss (E,) of each model on its own windows; parameters have a first dimension E."""
        p = dict(zip(self._names, parameters, strict=True))
        E, B, S = tokens_EBS.shape
        x_ETD = _embed(p["model.embed_tokens.weight"], tokens_EBS)
        for layer in range(self._shape.layers):
            prefix = f"model.layers.{layer}."
            x_ETD = x_ETD + self._attention(p, prefix, _norm(x_ETD, p[prefix + "input_layernorm.weight"]), B)
            x_ETD = x_ETD + _feed_forward(p, prefix, _norm(x_ETD, p[prefix + "post_attention_layernorm.weight"]))
        x_ETD = _norm(x_ETD, p["model.norm.weight"])
        logits_ETV = _linear(x_ETD, p["lm_head.weight"]) * self._head_scales_E11
        predicted = logits_ETV.view(E, B, S, -1)[:, :, :-1].flatten(0, 2)
        targets = tokens_EBS[:, :, 1:].flatten()
        return F.cross_entropy(predicted, targets, reduction="none").view(E, -1).mean(1)

    def _attention(self, p: dict[str, Tensor], prefix: str, h_ETD: Tensor, B: int) -> Tensor:
        E, T, D = h_ETD.shape
        heads = (E * B, T // B, self._shape.heads, D // self._shape.heads)
        q, k, v = (
            _linear(h_ETD, p[f"{prefix}self_attn.{name}_proj.weight"]).view(heads).transpose(1, 2) for name in "qkv"
        )
        mixed = F.scaled_dot_product_attention(self._rotate(q), self._rotate(k), v, is_causal=True)
        return _linear(mixed.transpose(1, 2).reshape(E, T, D), p[prefix + "self_attn.o_proj.weight"])

    def _rotate(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * self._cos + torch.cat((-second, first), -1) * self._sin


def _rotations(shape: Shape) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines (S, D / H) of rotary position embeddings."""
    size = shape.hidden // shape.heads
    speeds = 1.0 / (_THETA ** (torch.arange(0, size, 2).float() / size))
    angles = torch.outer(torch.arange(shape.sequence).float(), speeds)
    angles = torch.cat((angles, angles), -1).to(shape.device)
    return angles.cos(), angles.sin()


def _embed(table_EVD: Tensor, tokens_EBS: Tensor) -> Tensor:
    E, V, D = table_EVD.shape
    first_E1 = torch.arange(E, device=table_EVD.device).view(E, 1) * V
    return F.embedding(tokens_EBS.view(E, -1) + first_E1, table_EVD.reshape(E * V, D))


def _norm(x_ETD: Tensor, weight_ED: Tensor) -> Tensor:
    return x_ETD * torch.rsqrt(x_ETD.pow(2).mean(-1, keepdim=True) + _EPS) * weight_ED.unsqueeze(1)


def _linear(x_ETD: Tensor, weight_EOD: Tensor) -> Tensor:
    return torch.bmm(x_ETD, weight_EOD.mT)


def _feed_forward(p: dict[str, Tensor], prefix: str, h_ETD: Tensor) -> Tensor:
    gate = _linear(h_ETD, p[prefix + "mlp.gate_proj.weight"])
    up = _linear(h_ETD, p[prefix + "mlp.up_proj.weight"])
    return _linear(F.silu(gate) * up, p[prefix + "mlp.down_proj.weight"])
