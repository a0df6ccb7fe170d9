"""A folder with a Hugging Face model builds it again; ``from_pretrained`` refuses it, and takes a dense export."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import smet_compile as smet
from smet_compile.ops import find_sites

transformers = pytest.importorskip("transformers")

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_hidden_layers": 2, "vocab_size": 64,
}  # fmt: skip
MOE = SHAPE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}
GPT2 = {"n_embd": 32, "n_head": 2, "n_layer": 2, "vocab_size": 64, "n_positions": 32}


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, **options))


def half() -> Any:
    """Makes a model in bfloat16 whose rotary frequencies stay in float32, as ``from_pretrained`` does."""
    return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SHAPE), dtype=torch.bfloat16)


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))


def mixture() -> Any:
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**MOE))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    smet.save_compact(smet.sparsify(llama(), 0.3), tmp_path / "compact")
    return tmp_path / "compact"


@pytest.mark.parametrize(
    "make",
    [llama, lambda: llama(tie_word_embeddings=True), half, gpt2, mixture],
    ids=["llama", "tied", "bfloat16", "gpt2", "mixture"],
)
def test_the_class_is_built_from_its_configuration(make: Callable[[], Any], tmp_path: Path) -> None:
    model = smet.sparsify(make(), 0.3).eval()
    smet.save_compact(model, tmp_path)
    state = torch.get_rng_state()
    loaded = smet.load_compact(tmp_path)
    assert not loaded.training  # as by from_pretrained
    assert torch.equal(torch.get_rng_state(), state)
    assert type(loaded) is type(model) and find_sites(loaded).keys() == find_sites(model).keys()
    for name, tensor in model.state_dict().items():
        other = loaded.state_dict()[name]
        assert other.dtype == tensor.dtype and torch.equal(other, tensor), name
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) is (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()


@pytest.mark.parametrize("name", ["AutoModelForCausalLM", "AutoModel", "LlamaForCausalLM", "LlamaModel"])
@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}, {"use_safetensors": False}], ids=str)
def test_from_pretrained_refuses_the_folder(name: str, options: dict[str, Any], folder: Path) -> None:
    with pytest.raises(ValueError, match=r"load this folder with smet_compile\.load_compact"):
        getattr(transformers, name).from_pretrained(folder, **options)


def test_from_pretrained_refuses_the_folder_with_another_configuration(folder: Path) -> None:
    """Without the text in the configuration, as for versions that do not know it, there is no file to load."""
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        transformers.LlamaForCausalLM.from_pretrained(folder, config=transformers.LlamaConfig(**SHAPE))


def test_a_dense_export_says_nothing_of_sparsity(folder: Path, tmp_path: Path) -> None:
    """Other libraries refuse models with leftovers such as a quantization or sparsity config."""
    llama().save_pretrained(tmp_path / "plain")
    loaded = smet.load_compact(folder)
    smet.export_dense(loaded).save_pretrained(tmp_path / "dense")
    plain, dense = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "dense"))
    assert dense == plain
    assert not {key for key in dense if "quantization" in key or "spars" in key or "weights" in key}
    names = {path.name for path in (tmp_path / "dense").iterdir()}
    assert names == {path.name for path in (tmp_path / "plain").iterdir()}
    files = b"".join(path.read_bytes() for path in (tmp_path / "dense").iterdir())
    assert b"smet" not in files and b"topology" not in files
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    for name, tensor in smet.export_dense(loaded).state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_class_that_transformers_lacks_needs_a_model(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["OurOwn"]}))
    with pytest.raises(ValueError, match=r"expected one class of transformers .* got \['OurOwn'\]; build the dense"):
        smet.load_compact(folder)
    assert find_sites(smet.load_compact(folder, llama()))


def test_without_transformers_a_model_is_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="pass model=, or pip install transformers"):
        smet.load_compact(folder)


def test_the_hub_reads_the_card(folder: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard.load(folder / "README.md")
    assert card.data.library_name == "smet_compile" and "sparse-training" in card.data.tags
    assert "# LlamaForCausalLM, sparse" in card.text


def test_compressed_tensors_no_longer_reads_bitmasks() -> None:
    """Its format "sparse-bitmask" is a name without a compressor, so nobody could read a file of that format."""
    base = pytest.importorskip("compressed_tensors.compressors.base")
    names = set(base.BaseCompressor.registered_names())
    assert "pack-quantized" in names and not {name for name in names if "bitmask" in name}
