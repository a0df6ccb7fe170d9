"""Tests which tensors count as compact weights of a model."""

import torch
from torch import nn

import smet_compile as smet
from smet_compile.ops import find_sites


def test_a_layer_compiled_by_itself_is_one_site() -> None:
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, nn.Linear(8, 8))
    smet.sparsify(model, density=0.5)
    model[0] = torch.compile(layer)
    assert list(find_sites(model)) == ["0.weight", "1.weight"]


def test_a_layer_used_twice_is_one_site() -> None:
    layer = nn.Linear(8, 8)
    model = smet.sparsify(nn.Sequential(layer, layer), density=0.5)
    assert list(find_sites(model)) == ["0.weight"]
