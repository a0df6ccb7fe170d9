"""Every folder that the Trainer writes of a sparse model loads by from_pretrained."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.trainer
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, LlamaForCausalLM, Trainer

import smet_compile as smet
from smet_compile.integrations.transformers import sparse_training
from smet_compile.ops import find_sites
from tests.integrations.language import ROWS, arguments_in, llama
from tests.support.snapshots import assert_same, same_bits


def sparse_trainer(folder: Path, callbacks: Any = (), export: Path | None = None, **options: Any) -> Trainer:
    arguments = arguments_in(folder, max_steps=8, **options)
    trainer = Trainer(llama(), arguments, train_dataset=ROWS, eval_dataset=ROWS[:8], callbacks=list(callbacks))
    sparse_training(trainer, 0.3, every=3, warmup_steps=3, export=export)
    return trainer


def assert_loads(folder: Path, model: Any, is_checkpoint: bool = False) -> None:
    loaded, info = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert bool(info["unexpected_keys"]) is is_checkpoint
    dense = smet.export_dense(model).state_dict()
    for name, tensor in loaded.state_dict().items():
        assert same_bits(tensor, dense[name]), name


def test_every_folder_loads(tmp_path: Path) -> None:
    trainer = sparse_trainer(tmp_path / "run", export=tmp_path / "export")
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    assert_loads(tmp_path / "export", trainer.model)
    assert_loads(tmp_path / "saved", trainer.model)
    assert_loads(tmp_path / "run" / "checkpoint-8", trainer.model, is_checkpoint=True)


def test_a_model_that_was_made_sparse_in_part(tmp_path: Path) -> None:
    def of_part(folder: Path) -> Trainer:
        model = llama()
        smet.sparsify(model.model, density=0.3)
        trainer = Trainer(model, arguments_in(folder, max_steps=8), train_dataset=ROWS)
        sparse_training(trainer, every=2, export=tmp_path / "export")
        return trainer

    trainer = of_part(tmp_path / "run")
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    assert_loads(tmp_path / "export", trainer.model)
    assert_loads(tmp_path / "saved", trainer.model)
    assert_loads(tmp_path / "run" / "checkpoint-8", trainer.model, is_checkpoint=True)
    resumed = of_part(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert_same(resumed.model.state_dict(), trainer.model.state_dict())


def test_the_best_model_is_loaded_evaluated_and_exported(tmp_path: Path) -> None:
    """The best is said to be the one of the highest loss, so that an early one is."""
    trainer = sparse_trainer(
        tmp_path / "run",
        [EarlyStoppingCallback(1)],
        tmp_path / "export",
        **{"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "save_total_limit": 1},
        **{"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True},
    )
    trainer.train()
    assert trainer.state.global_step == 4 and trainer.state.best_global_step == 2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)
    assert_loads(tmp_path / "export", trainer.model)
    assert_loads(tmp_path / "run" / "checkpoint-2", trainer.model, is_checkpoint=True)


def in_stages(folder: Path) -> Trainer:
    best: Any = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    arguments = arguments_in(folder, max_steps=6, eval_strategy="steps", eval_steps=2, **best | {"save_steps": 2})
    trainer = Trainer(llama(), arguments, train_dataset=ROWS, eval_dataset=ROWS[:8])
    sparse_training(trainer, 1.0, dense_as_compact=True, every=2, density_schedule=[(3, 0.5), (5, 0.3)])
    return trainer


def test_density_stages(tmp_path: Path) -> None:
    """The best model is that of the first stage; a run goes on in any."""
    whole = in_stages(tmp_path)
    whole.train()
    assert whole.state.best_global_step == 2
    assert {site.density for site in find_sites(whole.model).values()} == {1.0}
    assert_loads(tmp_path / "checkpoint-2", whole.model, is_checkpoint=True)
    assert not any(module._load_state_dict_pre_hooks for module in smet.export_dense(whole.model).modules())
    last = saved_in(tmp_path / "checkpoint-6")
    for step in (2, 4):
        resumed = in_stages(tmp_path)
        resumed.args.load_best_model_at_end = False
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert {round(site.density, 1) for site in find_sites(resumed.model).values()} == {0.3}
        assert_same(saved_in(tmp_path / "checkpoint-6"), last)


def saved_in(folder: Path) -> Any:
    return load_file(folder / "model.safetensors"), torch.load(folder / "optimizer.pt", weights_only=True)


def test_what_goes_to_the_hub_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads: list[tuple[Path, bool]] = []

    class Hub:
        repo_id = "me/run"

        def create_repo(self, *args: Any, **kwargs: Any) -> Any:
            return self

        def upload_folder(self, folder_path: str, **kwargs: Any) -> Any:
            _, info = LlamaForCausalLM.from_pretrained(folder_path, output_loading_info=True)
            uploads.append((Path(folder_path), bool(info["missing_keys"])))
            return torch.futures.Future()

    monkeypatch.setattr(transformers.trainer, "hf_api", Hub)
    monkeypatch.setattr(Trainer, "_finish_current_push", lambda self: None)
    trainer = sparse_trainer(tmp_path, push_to_hub=True, hub_always_push=True)
    trainer.train()
    trainer.push_to_hub()
    assert uploads == [(tmp_path, False)] * 3
    assert_loads(tmp_path, trainer.model)


def test_a_sparse_run_does_not_go_on_from_dense_weights(tmp_path: Path) -> None:
    dense = Trainer(llama(), arguments_in(tmp_path, max_steps=4), train_dataset=ROWS)
    dense.train()
    with pytest.raises(RuntimeError, match="expected compact weights, got a dense one"):
        sparse_trainer(tmp_path).train(resume_from_checkpoint=True)
