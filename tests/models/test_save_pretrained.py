"""save_pretrained of a compact model writes what from_pretrained loads; checkpoints hold the compact weights too."""

import copy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.models.classes import REAL_MODELS
from tests.support.snapshots import same_bits

pytestmark = pytest.mark.filterwarnings("ignore:sparsify")
NAMES = sorted(REAL_MODELS)


def compact(name: str, block_shape: int = 1, seed: int = 0) -> Any:
    torch.manual_seed(0)
    return smet.sparsify(REAL_MODELS[name].make(), density=0.4, block_shape=block_shape, seed=seed).eval()


@torch.no_grad()
def logits_of(model: Any, name: str) -> torch.Tensor:
    return model.eval()(**REAL_MODELS[name].batch()).logits


@pytest.mark.parametrize("block_shape", [1, 5])
@pytest.mark.parametrize("name", NAMES)
def test_it_writes_dense_weights_alone(name: str, block_shape: int, tmp_path: Path) -> None:
    model = compact(name, block_shape)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert same_bits(logits_of(loaded, name), logits_of(smet.export_dense(model), name))
    assert find_sites(model)


@pytest.mark.parametrize("block_shape", [1, 5])
@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_loads_densely_and_compactly(name: str, block_shape: int, tmp_path: Path) -> None:
    model, folder = compact(name, block_shape), tmp_path / "checkpoint-7"
    model.save_pretrained(folder)
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all("parametrizations" in key for key in info["unexpected_keys"])
    assert same_bits(logits_of(loaded, name), logits_of(smet.export_dense(model), name))
    other = compact(name, block_shape, seed=1)
    result = other.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert not result.unexpected_keys
    for key, tensor in model.state_dict().items():
        assert same_bits(other.state_dict()[key], tensor), key


class Repeated(PreTrainedModel):
    """Has one layer under three names."""

    config_class = PretrainedConfig
    _tied_weights_keys: ClassVar = {f"layers.{i}.{k}": f"layers.0.{k}" for i in (1, 2) for k in ("weight", "bias")}

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList([nn.Linear(16, 16)] * 3)
        self.last = nn.Linear(16, 4)
        self.post_init()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        result: torch.Tensor = self.last(x)
        return result


@pytest.mark.parametrize("folder", ["model", "checkpoint-7"])
def test_a_layer_with_several_names(folder: str, tmp_path: Path) -> None:
    model = smet.sparsify(Repeated(PretrainedConfig(tie_word_embeddings=True)), density=0.4)
    model.save_pretrained(tmp_path / folder)
    loaded, info = Repeated.from_pretrained(tmp_path / folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all("parametrizations" in key for key in info["unexpected_keys"])
    x, dense = torch.randn(3, 16), smet.export_dense(model)
    assert loaded.layers[0] is loaded.layers[2] and torch.equal(loaded(x), dense(x))
    if folder == "model":
        return
    other = smet.sparsify(Repeated(PretrainedConfig(tie_word_embeddings=True)), density=0.4, seed=1)
    result = other.load_state_dict(load_file(tmp_path / folder / "model.safetensors"), strict=False)
    assert not result.unexpected_keys and not [key for key in result.missing_keys if "parametrizations" in key]
    assert all(same_bits(other.state_dict()[key], tensor) for key, tensor in model.state_dict().items())


def test_the_given_state_is_written(tmp_path: Path) -> None:
    model = compact("llama")
    doubled = {key: 2 * tensor if tensor.is_floating_point() else tensor for key, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=doubled)
    loaded = type(model).from_pretrained(tmp_path).state_dict()
    dense = smet.export_dense(model).state_dict()
    assert all(torch.equal(loaded[key], 2 * dense[key]) for key in dense)
    assert all(torch.equal(doubled[key], 2 * tensor) for key, tensor in model.state_dict().items() if "orig" in key)


def test_a_dense_checkpoint_is_refused_even_where_keys_may_miss() -> None:
    dense = REAL_MODELS["llama"].make().state_dict()
    model = compact("llama")
    before = {name: site.values.detach().clone() for name, site in find_sites(model).items()}
    with pytest.raises(RuntimeError, match="expected compact weights, got a dense one; resume from a"):
        model.load_state_dict(dense, strict=False)
    assert all(torch.equal(site.values, before[name]) for name, site in find_sites(model).items())


def test_a_state_with_the_names_of_wrappers_is_refused(tmp_path: Path) -> None:
    model = compact("llama")
    wrapped = {f"module.{key}": tensor for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="in the state dict, found none of this name; take that of the model itself"):
        model.save_pretrained(tmp_path, state_dict=wrapped)


def test_copies_save_themselves_and_exports_keep_nothing(tmp_path: Path) -> None:
    model = compact("llama")
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for site in find_sites(copied).values():
            site.values.zero_()
    copied.save_pretrained(tmp_path)
    assert not type(model).from_pretrained(tmp_path).model.layers[0].self_attn.q_proj.weight.any()
    dense: Any = smet.export_dense(model)
    for module in dense.modules():
        assert "save_pretrained" not in vars(module) and not module._load_state_dict_pre_hooks
    assert "save_pretrained" in vars(model) and isinstance(model, PreTrainedModel)


def test_other_models_save_as_ever() -> None:
    model = smet.sparsify(torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 4)), density=0.5)
    assert not any("save_pretrained" in vars(module) for module in model.modules())
