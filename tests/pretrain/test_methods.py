import math
from pathlib import Path

import pytest
import torch

import smet_compile as smet
from smet_compile.pretrain.data import open_data
from smet_compile.pretrain.loop import pretrain
from smet_compile.pretrain.metrics import of_kind, read_metrics
from smet_compile.pretrain.tokenizer import ByteTokenizer
from smet_compile.pretrain.training import build_training, rate_schedule, train_step
from tests.pretrain.runs import SMALL_MODEL, losses, moves, small_config

pytestmark = SMALL_MODEL


@pytest.mark.parametrize("method", ["smet", "smet-rigl", "set-naive", "rigl-naive", "static", "dense"])
def test_every_method_trains(method: str, tmp_path: Path) -> None:
    config = small_config(tmp_path, method=method, steps=24, lr=1e-2)
    assert pretrain(config, tmp_path / "run")
    train = [loss for kind, _, loss in losses(tmp_path / "run") if kind == "train"]
    assert len(train) == 24 and all(map(math.isfinite, train))
    assert train[-1] < train[0] - 0.3
    events = moves(tmp_path / "run")
    assert bool(events) == (method not in ("static", "dense"))
    assert all(event["num_dropped"] > 0 for event in events)


@pytest.mark.parametrize("block", ["16", "1x16"])
def test_blocks(block: str, tmp_path: Path) -> None:
    pretrain(small_config(tmp_path, block=block, density=0.5, steps=4, every=1, schedule="cosine"), tmp_path / "run")
    assert len(moves(tmp_path / "run")) >= 2


def test_tiles_stay_where_they_are_by_default(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    config = small_config(tmp_path, block="16", density=0.5, steps=4, every=1)
    training = build_training(config, 256)
    assert training.manager is not None and training.manager.settings["schedule"] == "none"
    assert training.manager.next_update is None and not [w for w in recwarn if "tiles" in str(w.message)]
    pretrain(config, tmp_path / "run")
    assert moves(tmp_path / "run") == []
    assert "The topology did not change" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_the_schedule_is_the_managers(schedule: str, tmp_path: Path) -> None:
    training = build_training(small_config(tmp_path, schedule=schedule), 256)
    assert training.manager is not None and training.manager.settings["schedule"] == schedule


@pytest.mark.parametrize("moments", ["bfloat16", "float32", "int8"])
def test_bfloat16(moments: str, tmp_path: Path) -> None:
    config = small_config(tmp_path, dtype="bfloat16", moment_dtype=moments)
    training = build_training(config, 256)
    assert {parameter.dtype for parameter in training.model.parameters()} == {torch.bfloat16}
    batch = open_data(config, ByteTokenizer()).train.batch(0)
    train_step(training, batch)
    states = training.optimizer.state.values()
    stored = "uint8" if moments == "int8" else moments
    assert {state["exp_avg_sq"].dtype for state in states} == {getattr(torch, stored)}
    assert pretrain(config, tmp_path / "run")


def test_smet_and_its_baselines_differ_only_as_they_say(tmp_path: Path) -> None:
    built = {m: build_training(small_config(tmp_path, method=m), 256) for m in ("smet", "smet-rigl", "set-naive")}
    first = list(built["smet"].model.state_dict().items())
    for training in built.values():
        assert all(torch.equal(training.model.state_dict()[name], tensor) for name, tensor in first)
    assert built["smet"].optimizer.defaults["warmup_steps"] == 3
    assert built["set-naive"].optimizer.defaults["warmup_steps"] == 0
    assert built["smet-rigl"].manager is not None and built["smet-rigl"].manager.settings["grow"] == "gradient"


@pytest.mark.parametrize("method", ["smet", "set-naive", "dense"])
def test_embeddings_have_a_rate_of_their_own(method: str, tmp_path: Path) -> None:
    config = small_config(tmp_path, method=method, lr=1e-3, embedding_lr=8e-3, warmup=2)
    training = build_training(config, 256)
    rate_schedule(training, config)
    batch = open_data(config, ByteTokenizer()).train.batch(0)
    before = training.model.model.embed_tokens.weight.detach().clone()
    train_step(training, batch)
    assert [group["lr"] for group in training.optimizer.param_groups] == pytest.approx([5e-4, 4e-3, 4e-3])
    moved = (training.model.model.embed_tokens.weight.detach() - before).abs().max()
    assert float(moved) == pytest.approx(4e-3, rel=0.01)


def test_the_blocks_to_start_from_have_a_warmup_of_their_own(tmp_path: Path) -> None:
    for options, expected in (({"initial_block_warmup": 7}, (3, 7)), ({}, (3, 3)), ({"method": "set-naive"}, (0, 0))):
        (group, *_) = build_training(small_config(tmp_path, **options), 256).optimizer.param_groups
        assert (group["warmup_steps"], group["initial_warmup_steps"]) == expected


def test_accumulation_is_one_larger_batch(tmp_path: Path) -> None:
    config = small_config(tmp_path, method="dense", batch=4)
    batch = open_data(config, ByteTokenizer()).train.batch(0)
    one = build_training(config, 256)
    two = build_training(small_config(tmp_path, method="dense", batch=2, accumulate=2), 256)
    loss, _ = train_step(one, batch)
    accumulated, _ = train_step(two, batch.view(2, 2, -1))
    assert accumulated == pytest.approx(loss, rel=1e-6)
    for ours, theirs in zip(two.model.parameters(), one.model.parameters(), strict=True):
        moments = [run.optimizer.state[p]["exp_avg"] for run, p in ((two, ours), (one, theirs))]
        torch.testing.assert_close(*moments, rtol=1e-4, atol=1e-7)


def test_a_record_for_each_thing_that_happens(tmp_path: Path) -> None:
    pretrain(small_config(tmp_path, eval_every=5), tmp_path / "run")
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in of_kind(records, "train")] == list(range(1, 13))
    assert [record["step"] for record in of_kind(records, "eval")] == [5, 10, 12]
    assert [record["step"] for record in of_kind(records, "topology")] == [e["step"] for e in moves(tmp_path / "run")]
    assert [record["kind"] for record in records][-1] == "end"


def test_a_density_that_leaves_too_little_to_grow_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="drop"):
        pretrain(small_config(tmp_path, density=0.9), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "grow"),
    [({}, "random"), ({"method": "rigl-naive"}, "gradient"), ({"grow": "momentum"}, "momentum"),
     ({"method": "smet-rigl", "grow": "random"}, "random")],
    ids=str,
)  # fmt: skip
def test_growth_is_that_of_the_method_unless_it_is_given(options: dict[str, str], grow: str, tmp_path: Path) -> None:
    training = build_training(small_config(tmp_path, **options), 256)
    assert training.manager is not None and training.manager.settings["grow"] == grow


def test_layers_share_the_density_out_as_asked(tmp_path: Path) -> None:
    training = build_training(small_config(tmp_path, distribution="erk"), 256)
    sites = smet.report(training.model).sites
    assert len({round(site.density, 3) for site in sites}) > 1
    assert sum(site.num_active for site in sites) / sum(site.num_blocks for site in sites) == pytest.approx(
        0.3, abs=1e-3
    )


@pytest.mark.parametrize("method", ["smet", "dense"])
def test_gradients_are_clipped_together_after_accumulation(method: str, tmp_path: Path) -> None:
    norms = []
    for clip in (0.0, 1e-3):
        training = build_training(small_config(tmp_path, method=method, accumulate=2, clip=clip), 256)

        def note(optimizer: torch.optim.Optimizer, *_: object) -> None:
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            norms.append(float(torch.nn.utils.get_total_norm(grads)))

        training.optimizer.register_step_pre_hook(note)
        train_step(training, torch.randint(256, (2, 2, 32)))
    assert norms[0] > 0.1 and norms[1] == pytest.approx(1e-3, rel=1e-2) and len(norms) == 2


def test_a_compiled_step_is_given_the_norm(tmp_path: Path) -> None:
    step = build_training(small_config(tmp_path, eager=False, clip=0.5), 256).step
    assert isinstance(step, smet.TrainStep) and not step.fused and step.max_grad_norm == 0.5
