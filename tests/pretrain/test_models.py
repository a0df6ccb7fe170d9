"""`--model CONFIG.json` trains causal models of Hugging Face by their config, and refuses others by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from smet_compile.pretrain.config import RunConfig, resolve
from smet_compile.pretrain.folder import read_config, write_config
from smet_compile.pretrain.loop import pretrain, resume
from smet_compile.pretrain.training import build_model, build_training, train_step
from tests.pretrain.runs import SMALL_MODEL, StopAfter, losses, small_config

pytestmark = SMALL_MODEL

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "qwen3": {**SIZES, "num_key_value_heads": 1, "head_dim": 16},
    "mixtral": {**SIZES, "num_key_value_heads": 1, "num_local_experts": 4},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
}


def written(folder: Path, name: str, **changes: Any) -> str:
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"model_type": name, "vocab_size": 50_257, **SHAPES.get(name, {}), **changes}))
    return str(path)


def config_of(folder: Path, name: str, **changes: Any) -> RunConfig:
    options: dict[str, Any] = {"preset": "nano", "steps": 6, "every": 1, "device": "cpu", "eager": True}
    return resolve(model=written(folder, name), **(options | changes))


@pytest.mark.parametrize("name", SHAPES)
def test_models_of_every_kind_train(name: str, tmp_path: Path) -> None:
    config = config_of(tmp_path, name)
    training = build_training(config, 256)
    assert type(training.model).__name__.lower().startswith(name)
    batch = torch.randint(256, (1, 2, 32))
    found = [train_step(training, batch) for _ in range(4)]
    assert found[-1][0] < found[0][0] and training.manager is not None and len(training.manager.history) > 1


def test_a_run_keeps_the_shape_when_its_file_is_gone(tmp_path: Path) -> None:
    config = small_config(tmp_path, model=written(tmp_path, "gpt2"))
    pretrain(config, tmp_path / "whole")
    pretrain(config, tmp_path / "run", StopAfter(5))
    (tmp_path / "gpt2.json").unlink()
    assert resume(tmp_path / "run")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert "# smet, gpt2, density 0.3" in (tmp_path / "run" / "report.md").read_text()


def test_a_config_with_a_model_comes_back_from_its_file(tmp_path: Path) -> None:
    config = config_of(tmp_path, "qwen3")
    write_config(tmp_path / "config.json", config)
    assert read_config(tmp_path / "config.json") == config and config.shape_name == "qwen3"
    (tmp_path / "config.json").write_text(Path(written(tmp_path, "qwen3")).read_text())
    assert resolve(preset="nano", steps=6, every=1, device="cpu", eager=True, model=str(tmp_path)) == config


def test_every_model_reads_the_past_alone(tmp_path: Path) -> None:
    (tmp_path / "bert.json").write_text(json.dumps({"model_type": "bert", **SIZES}))
    model = build_model(resolve(preset="nano", model=str(tmp_path / "bert.json")), 256, "cpu").eval()
    tokens = torch.randint(255, (1, 8))
    other = tokens.clone()
    other[0, -1] += 1
    assert torch.equal(model(input_ids=tokens).logits[:, :-1], model(input_ids=other).logits[:, :-1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "--model: expected JSON, got"),
        ("[]", "--model: expected a JSON object with model_type, got"),
        ('{"hidden_size": 4}', "--model: expected a JSON object with model_type, got"),
        ('{"model_type": "xyz"}', "--model: expected a kind of model that transformers .* knows, got 'xyz'"),
        ('{"model_type": "t5"}', "--model: expected a causal language model, got t5"),
        ('{"model_type": "gpt2", "n_positions": 8}', r"--sequence: expected at most 8 \(max_position_embeddings of"),
        ('{"model_type": "gpt2", "quantization_config": {}}', "--model: expected a model that is not quantized"),
        ('{"model_type": "qwen3", "head_dim": "x"}', "--model: expected a config of qwen3, got one that it refuses"),
    ],
)
def test_other_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        build_model(resolve(preset="nano", model=str(tmp_path / "x.json")), 256, "meta")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--model: expected a file that can be read, got .*none\.json \(No such file"):
        resolve(model=str(tmp_path / "none.json"))


def test_a_model_that_no_memory_holds_is_refused(tmp_path: Path) -> None:
    config = small_config(tmp_path, model=written(tmp_path, "qwen3", intermediate_size=2**40))
    with pytest.raises(ValueError, match=r"--model: expected the dense weights, .* to fit into .* GiB"):
        pretrain(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
