"""TRL's SFTTrainer trains sparse as the Trainer does, and trains PEFT's adapters on a sparse base."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import smet_compile as smet
from smet_compile.integrations.transformers import sparse_training
from smet_compile.ops import find_sites
from tests.integrations.language import llama
from tests.support.snapshots import same_bits


def tokenizer() -> PreTrainedTokenizerFast:
    """Makes one token of each byte."""
    tokenizers = pytest.importorskip("tokenizers")
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    vocabulary = {text: place for place, text in enumerate([*sorted(byte_level.alphabet()), "<end>"])}
    bytes_alone = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    bytes_alone.pre_tokenizer = byte_level(add_prefix_space=False)
    bytes_alone.decoder = tokenizers.decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_alone, eos_token="<end>", pad_token="<end>")


def trainer_in(folder: Path, model: Any = None, adapters: Any = None) -> Any:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    settings = trl.SFTConfig(
        str(folder), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, max_steps=6, save_steps=3,
        logging_steps=1, per_device_train_batch_size=4, learning_rate=3e-3,
    )  # fmt: skip
    data = datasets.Dataset.from_list([{"text": f"sparse weights move, {number}"} for number in range(32)])
    model = llama(vocab_size=257) if model is None else model
    return trl.SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer(), peft_config=adapters)


def lora() -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    return peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


def assert_same_model(trainer: Any, other: Any) -> None:
    for name, tensor in trainer.model.state_dict().items():
        assert same_bits(tensor, other.model.state_dict()[name]), name


def test_it_fine_tunes_resumes_and_saves(tmp_path: Path) -> None:
    def run(checkpoint: Path | None = None) -> Any:
        trainer = trainer_in(tmp_path)
        callback = sparse_training(trainer, 0.3, every=2, warmup_steps=2)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert [event.step for event in callback.manager.history] == [2, 4]
        return trainer

    whole = run()
    assert whole.state.log_history[3]["smet/updates"] == 2 and "mean_token_accuracy" in whole.state.log_history[3]
    assert_same_model(whole, run(tmp_path / "checkpoint-3"))
    whole.save_model(tmp_path / "saved")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    dense = smet.export_dense(whole.model).state_dict()
    assert not any(info.values()) and all(same_bits(each, dense[key]) for key, each in loaded.state_dict().items())


def sparse_base() -> Any:
    return smet.sparsify(llama(vocab_size=257), 0.3)


def test_adapters_train_alone_on_a_sparse_base(tmp_path: Path) -> None:
    base = sparse_base()
    before = [site.values.detach().clone() for site in find_sites(base).values()]
    whole = trainer_in(tmp_path, base, lora())
    whole.train()
    after = [site.values for site in find_sites(base).values()]
    assert all(torch.equal(values, each) for values, each in zip(after, before, strict=True))
    trained = [name for name, parameter in whole.model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 8 and all("lora_" in name for name in trained)
    resumed = trainer_in(tmp_path, sparse_base(), lora())
    resumed.train(resume_from_checkpoint=tmp_path / "checkpoint-3")
    assert_same_model(whole, resumed)
    assert not (tmp_path / "checkpoint-3" / "model.safetensors").exists()


@pytest.mark.filterwarnings("ignore:.*the weight lie where no block is active")
@pytest.mark.filterwarnings("ignore:.*keeps every block from now on")
@pytest.mark.parametrize("export_first", [True, False])
def test_merged_adapters_are_saved_and_loaded(export_first: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(sparse_base(), lora())
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    tokens = torch.arange(8)[None]
    expected = adapted.eval()(tokens).logits
    whole: Any = smet.export_dense(adapted) if export_first else adapted
    whole.merge_and_unload().save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(loaded(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_sparse_training_of_adapters_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    for model, density in ((sparse_base(), None), (llama(vocab_size=257), 0.3)):
        trainer = trainer_in(tmp_path, peft.get_peft_model(model, lora()))
        with pytest.raises(ValueError, match="got frozen ones, as under adapters; make the base sparse before"):
            sparse_training(trainer, density)
