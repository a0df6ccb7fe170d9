"""save_pretrained of a compact model writes what from_pretrained loads; checkpoints hold the compact weights too."""

import copy
import inspect
import textwrap
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BertModel,
    EncoderDecoderModel,
    LlamaForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.models.classes import REAL_MODELS
from tests.support.fresh_process import run_python
from tests.support.snapshots import same_bits

pytestmark = pytest.mark.filterwarnings("ignore:sparsify")
NAMES = sorted(REAL_MODELS)
BERT = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 64
}  # fmt: skip
BERT_DECODER = BERT | {"is_decoder": True, "add_cross_attention": True}


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


def tiny() -> Any:
    torch.manual_seed(0)
    return REAL_MODELS["llama"].make()


def put_under_a_head(model: Any) -> Any:
    return put(LlamaForSequenceClassification(model.config), model.model)


def put(outer: Any, part: nn.Module) -> Any:
    outer.model = part
    return outer


def encoder_in_a_pair() -> Any:
    pair = EncoderDecoderModel(
        encoder=BertModel(BertConfig(**BERT)), decoder=BertLMHeadModel(BertConfig(**BERT_DECODER))
    )
    smet.sparsify(pair.encoder, density=0.3)
    return pair


def part_alone() -> Any:
    model = tiny()
    smet.sparsify(model.model, density=0.3)
    return model


@pytest.mark.parametrize("folder", ["model", "checkpoint-7"])
@pytest.mark.parametrize("make", [part_alone, lambda: put_under_a_head(part_alone()), encoder_in_a_pair])
def test_a_model_with_a_compact_part(make: Any, folder: str, tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / folder)
    loaded, info = type(model).from_pretrained(tmp_path / folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert bool(info["unexpected_keys"]) is (folder != "model") and find_sites(model)
    dense = smet.export_dense(model).state_dict()
    assert all(same_bits(tensor, dense[name]) for name, tensor in loaded.state_dict().items())
    other = make()
    other.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="expected compact weights, got a dense one; resume from a"):
        other.load_state_dict(dense, strict=False)


def test_a_compact_part_from_before_transformers_was_imported(tmp_path: Path) -> None:
    script = f"""
        import torch
        from torch import nn
        import smet_compile as smet
        part = smet.sparsify(nn.Linear(16, 16), density=0.5)
        from transformers import PretrainedConfig, PreTrainedModel

        class Model(PreTrainedModel):
            config_class = PretrainedConfig

            def __init__(self, config, part=None):
                super().__init__(config)
                self.part = part or nn.Linear(16, 16)
                self.post_init()

        Model(PretrainedConfig(), part).save_pretrained({str(tmp_path)!r})
        loaded, info = Model.from_pretrained({str(tmp_path)!r}, output_loading_info=True)
        assert not any(info.values()), info
        assert torch.equal(loaded.part.weight, part.weight)
        print("saved")
    """
    assert run_python("-c", textwrap.dedent(script)).splitlines()[-1] == "saved"


class Twice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


@pytest.mark.parametrize("given", [False, True])
def test_what_the_module_reads_is_written(given: bool, tmp_path: Path) -> None:
    model = compact("llama")
    layer = model.model.layers[0].mlp.up_proj
    parametrize.register_parametrization(layer, "weight", Twice())
    model.save_pretrained(tmp_path, state_dict=model.state_dict() if given else None)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(loaded.model.layers[0].mlp.up_proj.weight, layer.weight) and layer.weight.any()


def test_copies_save_themselves_and_exports_keep_nothing(tmp_path: Path) -> None:
    model = compact("llama")
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for site in find_sites(copied).values():
            site.values.zero_()
    copied.save_pretrained(tmp_path)
    assert not type(model).from_pretrained(tmp_path).model.layers[0].self_attn.q_proj.weight.any()
    dense: Any = smet.export_dense(model)
    assert not any(module._load_state_dict_pre_hooks for module in dense.modules())
    repeated = smet.export_dense(smet.sparsify(Repeated(PretrainedConfig(tie_word_embeddings=True)), density=0.4))
    assert not any(module._load_state_dict_pre_hooks for module in repeated.modules())


def test_other_models_save_as_ever(tmp_path: Path) -> None:
    compact("llama")
    tiny().save_pretrained(tmp_path / "dense")
    assert same_bits(load_file(tmp_path / "dense" / "model.safetensors")["lm_head.weight"], tiny().lm_head.weight)
    names = [*inspect.signature(PreTrainedModel.save_pretrained).parameters]
    assert names[:4] == ["self", "save_directory", "is_main_process", "state_dict"] and "max_shard_size" in names
