"""Tests plain torch models: a CNN by include, attention, a transformer encoder with its fast path in eval."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.support.masked import fill_masked, masked_gradients, masks_of, parameter_of
from tests.support.snapshots import same_bits

CLOSE = {"atol": 1e-10, "rtol": 1e-10}


class SelfAttention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.ConvTranspose2d(8, 4, 2),
        nn.Flatten(),
        nn.Linear(4 * 49, 5),
    )


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 20, dropout=0.0, batch_first=True), 2)


MODELS = {
    "cnn": (cnn, (4, 3, 8, 8), {"include": ["0", "3", "4", "6.weight"]}, 4),
    "attention": (SelfAttention, (2, 5, 12), {}, 2),
    "attention_no_bias": (lambda: SelfAttention(bias=False), (2, 5, 12), {}, 2),
    "attention_bias_kv": (lambda: SelfAttention(add_bias_kv=True), (2, 5, 12), {}, 2),
    "attention_separate": (lambda: SelfAttention(kdim=12, vdim=12), (2, 5, 12), {}, 2),
    "encoder": (encoder, (2, 5, 12), {}, 8),
}


@pytest.mark.parametrize("block_shape", [1, (2, 3)], ids=str)
@pytest.mark.parametrize("name", list(MODELS))
def test_gradients_updates_and_export(name: str, block_shape: Any) -> None:
    make, input_shape, options, num_sites = MODELS[name]
    sparse = make().double()
    plain = copy.deepcopy(sparse)
    smet.sparsify(sparse, density=0.5, block_shape=block_shape, **options)
    assert len(find_sites(sparse)) == num_sites
    fill_masked(plain, sparse)
    x = torch.randn(input_shape, dtype=torch.float64)
    out, expected_out = sparse(x), plain(x)
    torch.testing.assert_close(out, expected_out, **CLOSE)
    out.square().mean().backward()
    expected_out.square().mean().backward()
    for parameter, expected in masked_gradients(plain, sparse).items():
        torch.testing.assert_close(parameter_of(sparse, parameter).grad, expected, **CLOSE)
    sparse.zero_grad()
    optimizer = smet.ActiveAdamW(sparse, lr=1e-2)
    manager = smet.TopologyManager(sparse, optimizer, total_steps=100, every=3, grow="gradient", schedule="cosine")
    before = masks_of(sparse)
    for _ in range(3):
        sparse(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        manager.step()
    assert all(not torch.equal(mask, before[site]) for site, mask in masks_of(sparse).items())
    dense = smet.export_dense(sparse)
    with torch.no_grad():
        torch.testing.assert_close(dense.eval()(x), sparse.eval()(x), **CLOSE)


def test_the_encoder_fast_path_sees_the_sparse_weights() -> None:
    """In eval without gradients a TransformerEncoderLayer is one op on dense weights."""
    sparse = smet.sparsify(encoder().double(), density=0.5).eval()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    slow = sparse(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), slow, **CLOSE)
        padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        sparse(x, src_key_padding_mask=padding)


def test_an_embedding_by_include() -> None:
    sparse = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 3)).double()
    plain = copy.deepcopy(sparse)
    smet.sparsify(sparse, density=0.5, include="0.weight")
    fill_masked(plain, sparse)
    ids = torch.tensor([1, 4, 4, 9])
    sparse(ids).sum().backward()
    plain(ids).sum().backward()
    grad = parameter_of(sparse, "0.weight").grad
    assert same_bits(grad, masked_gradients(plain, sparse)["0.weight"])
