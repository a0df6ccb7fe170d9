"""In whole compiled models of transformers every matrix is fused, and the losses are those of eager mode."""

import pytest
import torch

from smet_compile.tracing import Capture
from tests.models.compiled import ONE_LAYER, Setting, assert_same_losses, own_loss, train
from tests.models.fused import assert_fused, assert_parts_fused

BREAKS = {"t5"} if torch.__version__ < "2.13" else set()  # copies its config, which that Dynamo does not trace
VIT = {"intermediate_size": 40}  # 48 would make a weight as large as the convolution of the patches

SETTINGS = [  # each model, dtype and kind of block is compiled both ways; a model of two layers stands for deeper ones
    (Setting("llama", torch.float64, 16), "step"),
    (Setting("llama", torch.float32, 1, own_loss, config=ONE_LAYER), "loop"),
    (Setting("gpt2", torch.float64, 1, config=ONE_LAYER), "loop"),
    (Setting("gpt2", torch.float32, 16, own_loss, config=ONE_LAYER), "step"),
    (Setting("bert", torch.float64, 1, config=ONE_LAYER), "step"),
    (Setting("bert", torch.float32, 16, own_loss, config=ONE_LAYER), "loop"),
    (Setting("vit", torch.float64, 16, config=VIT | ONE_LAYER), "loop"),
    (Setting("vit", torch.float32, 1, own_loss, config=VIT | ONE_LAYER), "step"),
    (Setting("t5", torch.float64, 1, config=ONE_LAYER), "step"),
    (Setting("t5", torch.float32, 16, own_loss, config=ONE_LAYER), "loop"),
]


@pytest.mark.parametrize(("setting", "how"), SETTINGS, ids=str)
def test_all_is_fused_and_losses_equal_eager(setting: Setting, how: str) -> None:
    capture = Capture()
    compiled = train(setting, how, backend=capture)
    check = assert_parts_fused if setting.name in BREAKS else assert_fused
    check(compiled, capture)
    assert_same_losses(compiled, train(setting))
