"""Holds forwards as users write them by hand: each is a function of some linear layers and an input.

Shape suffixes: B batch, T tokens, F features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 8
Forward = Callable[["Layers", Any], Any]


class Layers(nn.Module):
    """Holds layers: ``first`` and ``second`` map features to features, ``wide`` to three times as many."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.wide = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.given = forward

    def forward(self, x: Any) -> Any:
        return self.given(self, x)


@dataclass
class Batch:
    """Is no pytree: torch does not see the tensors in it."""

    features: Tensor


def features() -> Tensor:
    return torch.randn(2, 3, WIDTH, dtype=torch.float64)


def tokens() -> Tensor:
    return torch.randint(0, WIDTH, (2, 3))


def gated_by_a_mean(m: Layers, x: Tensor) -> Tensor:
    """The mean is of other units of the same matrix than those that it scales."""
    a, b, _ = m.wide(x).chunk(3, dim=-1)
    return m.second(b * a.mean(-1, keepdim=True))


def attention_by_sums(m: Layers, x: Tensor) -> Tensor:
    q, k, v = m.wide(x).chunk(3, dim=-1)
    scores = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1).softmax(-1)
    return m.second((scores.unsqueeze(-1) * v.unsqueeze(-3)).sum(-2))


def halves_scaled_by_each_other(m: Layers, x: Tensor) -> Tensor:
    """Scales each half by the mean of the other, and goes on with the first alone."""
    halves = m.first(x).unflatten(-1, (2, -1))
    scaled = (halves.flip(-2) * halves.mean(-1, keepdim=True))[..., 0, :]
    return m.second(torch.cat([scaled, torch.zeros_like(scaled)], -1))


def weight_through_a_sigmoid(m: Layers, x: Tensor) -> Tensor:
    """Makes inactive weights one half, not zero."""
    return m.second(F.linear(x, torch.sigmoid(m.first.weight)))


def weight_plus_one(m: Layers, x: Tensor) -> Tensor:
    return m.second(F.linear(x, m.first.weight + 1))


def centred_weight(m: Layers, x: Tensor) -> Tensor:
    weight = m.first.weight
    return m.second(F.linear(x, weight - weight.mean(1, keepdim=True)))


def biased_scores(m: Layers, x: Tensor) -> Tensor:
    """The bias of the scores is made of the input."""
    q, k, v = m.wide(x).chunk(3, dim=-1)
    bias = m.first(x)[..., :3]
    out = F.scaled_dot_product_attention(*(part.unsqueeze(1) for part in (q, k, v)), attn_mask=bias.unsqueeze(1))
    return m.second(out.squeeze(1))


def weight_through_a_softmax(m: Layers, x: Tensor) -> Tensor:
    return m.second(F.linear(x, m.first.weight.softmax(1)))


def attention_of_dead_queries(m: Layers, x: Tensor) -> Tensor:
    """Without scores, attention takes the mean of the values."""
    query = torch.zeros(2, 1, 3, WIDTH, dtype=torch.float64)
    value = m.first(x).unsqueeze(1)
    return m.second(F.scaled_dot_product_attention(query, value, value).squeeze(1))


def scaled_by_a_sum_of_two(m: Layers, x: Tensor) -> Tensor:
    """Takes a scale over more than what it scales."""
    h, more = m.first(x), m.wide(x)[..., :WIDTH]
    return m.second(h * torch.rsqrt((h + more).square().mean(-1, keepdim=True) + 1))


def one_hot(m: Layers, ids: Tensor) -> Tensor:
    return m.second(torch.relu(m.first(F.one_hot(ids, WIDTH).double())))


def rows_of_a_table(m: Layers, ids: Tensor) -> Tensor:
    table = torch.linspace(0.5, 2, WIDTH * WIDTH, dtype=torch.float64).view(WIDTH, WIDTH)
    return m.second(m.first(table[ids]))


def selected_rows(m: Layers, ids: Tensor) -> Tensor:
    table = torch.linspace(0.5, 2, WIDTH * WIDTH, dtype=torch.float64).view(WIDTH, WIDTH)
    return m.second(m.first(table.index_select(0, ids.flatten())))


def rows_of_a_weight(m: Layers, ids: Tensor) -> Tensor:
    return m.second(torch.relu(m.first.weight.index_select(0, ids.flatten())))


def scattered_ones(m: Layers, ids: Tensor) -> Tensor:
    zeros = torch.zeros(2, WIDTH, dtype=torch.float64)
    return m.second(m.first(zeros.scatter(1, ids, 1.0)))


def binary_activation(m: Layers, x: Tensor) -> Tensor:
    return m.second((m.first(x) > 0).double())


def signs_by_where(m: Layers, x: Tensor) -> Tensor:
    h = m.first(x)
    return m.second(torch.where(h > 0, 1.0, -1.0).double())


def shifted_in_place(m: Layers, x: Tensor) -> Tensor:
    """The second half moves to where the first was, and only that goes on."""
    h = m.first(x)
    h[..., : WIDTH // 2] = h[..., WIDTH // 2 :]
    moved = h[..., : WIDTH // 2]
    return m.second(torch.cat([moved, torch.zeros_like(moved)], -1))


def written_into_what_was_there(m: Layers, x: Tensor) -> Tensor:
    buffer = torch.zeros(2, 3, 2 * WIDTH, dtype=torch.float64)
    torch.mul(m.first(x).detach(), 2, out=buffer[..., :WIDTH])
    return m.second(buffer[..., :WIDTH])


def added_to_a_list(m: Layers, x: Tensor) -> Tensor:
    made = [torch.zeros(2, 3, WIDTH, dtype=torch.float64)]
    torch._foreach_add_(made, [m.first(x)])
    return m.second(made[0])


def gate_above_a_half(m: Layers, x: Tensor) -> Tensor:
    """Makes one half of nothing, by hardtanh."""
    return m.second(F.hardtanh(m.first(x), 0.5, 2.0) * x)


def of_a_dataclass(m: Layers, batch: Batch) -> Batch:
    return Batch(m.second(torch.relu(m.first(batch.features))))


def rotated_as_complex(m: Layers, x: Tensor) -> Tensor:
    pairs = torch.view_as_complex(m.first(x).unflatten(-1, (-1, 2)).contiguous())
    angles = torch.polar(torch.ones(3, 1, dtype=torch.float64), torch.arange(3.0, dtype=torch.float64)[:, None])
    return m.second(torch.view_as_real(pairs * angles).flatten(-2))


def sums_by_einsum(m: Layers, x: Tensor) -> Tensor:
    h = torch.einsum("btf,gf->bgt", x, m.first.weight)
    return torch.einsum("bgt,fg->btf", h.relu(), m.second.weight)


def squeezed_and_excited(m: Layers, x: Tensor) -> Tensor:
    h = m.first(x)
    return h * torch.sigmoid(m.second(h.mean(1, keepdim=True)))


OF_TOKENS = (one_hot, rows_of_a_table, selected_rows, rows_of_a_weight, scattered_ones)
OF_FEATURES = (
    gated_by_a_mean, attention_by_sums, halves_scaled_by_each_other, weight_through_a_sigmoid, weight_plus_one,
    centred_weight, biased_scores, binary_activation, signs_by_where, shifted_in_place, written_into_what_was_there,
    added_to_a_list, gate_above_a_half, of_a_dataclass, rotated_as_complex, sums_by_einsum, squeezed_and_excited,
    weight_through_a_softmax, attention_of_dead_queries, scaled_by_a_sum_of_two,
)  # fmt: skip
NOT_KNOWN = (
    weight_through_a_sigmoid, weight_through_a_softmax, weight_plus_one, centred_weight, added_to_a_list,
)  # fmt: skip
"""Lists the forwards of which a note says that units are not kept apart."""
