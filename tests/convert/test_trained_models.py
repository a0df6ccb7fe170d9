"""A model of ``from_pretrained`` of which a random part would be kept brings a warning, which says what to pass."""

import warnings
from pathlib import Path
from typing import Any

import pytest

import smet_compile as smet

transformers = pytest.importorskip("transformers")

MESSAGE = r'7 weights \(model.layers.0.self_attn.q_proj.weight, ...\) were loaded.*select="magnitude"'


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_a_random_part_of_a_loaded_model_warns(saved: Path) -> None:
    with pytest.warns(UserWarning, match=MESSAGE) as caught:
        smet.sparsify(load(saved), 0.5)
    assert [warning.filename for warning in caught] == [__file__]


def test_what_was_asked_for_or_is_new_or_whole_does_not(saved: Path) -> None:
    fresh = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(saved))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for select in ("random", "magnitude"):
            smet.sparsify(load(saved), 0.5, select=select)
        smet.sparsify(fresh, 0.5)
        smet.sparsify(load(saved), 1.0)
        masks = smet.masks(smet.sparsify(load(saved), 0.5, select="magnitude"))
        smet.sparsify(load(saved), masks=masks)


def test_an_error_made_of_the_warning_leaves_the_model_as_it_was(saved: Path) -> None:
    model = load(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=MESSAGE):
            smet.sparsify(model, 0.5)
    assert not smet.report(model).sites


def test_a_trainer_warns_once(saved: Path) -> None:
    from smet_compile.integrations.transformers import sparse_training

    arguments = transformers.TrainingArguments(saved / "out", max_steps=6, report_to=[], use_cpu=True)
    trainer = transformers.Trainer(load(saved), arguments)
    with pytest.warns(UserWarning, match=MESSAGE) as caught:
        sparse_training(trainer, density=0.5, every=2)
    assert sum("from_pretrained" in str(warning.message) for warning in caught) == 1
