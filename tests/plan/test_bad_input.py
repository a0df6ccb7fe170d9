import pytest
import torch
from torch import nn

import smet_compile as smet

CASES = [
    ({"model": "huge"}, "model: expected one of nano, .*70b, got 'huge'"),
    ({"model": 3}, "model: expected an nn.Module or one of"),
    ({"density": 0}, "density: expected a number in"),
    ({"density": 1.5}, "density: expected a number in"),
    ({"block_shape": 0}, "block_shape: expected a positive integer"),
    ({"batch": 0}, "batch: expected a whole number of at least 1, got 0"),
    ({"sequence": 2.5}, "sequence: expected a whole number of at least 1"),
    ({"dtype": "float8"}, "dtype: expected None or one of float32, .*got 'float8'"),
    ({"optimizer": "adam"}, "optimizer: expected one of adamw, lion, sgd, scale, got 'adam'"),
    ({"moment_dtype": torch.float16}, "moment_dtype: expected None or one of float32, bfloat16, int8"),
    ({"compiled": False, "fused_update": True}, "fused_update: expected False for eager training"),
    ({"fits": "lots"}, "fits: expected bytes such as"),
    ({"fits": "1GB", "density": 0.5, "batch": 2}, "fits: expected density or batch left open, got both"),
    ({"distribution": "fair"}, "distribution: expected one of"),
    ({"exclude": "*nothing*"}, "exclude: .* matches none"),
    ({"vocabulary": 0}, "vocabulary: expected a whole number"),
    ({"sequence": 2**63}, r"sequence: expected a whole number in \[1, 134217728\], got 9223372036854775808"),
    ({"sequence": 10**30}, "sequence: expected a whole number in"),
    ({"batch": 10**30}, "batch: expected a whole number in"),
    ({"batch": True}, "batch: expected a whole number of at least 1, got True"),
    ({"vocabulary": 2.0}, "vocabulary: expected a whole number"),
    ({"fits": float("nan")}, "fits: expected bytes such as .*, got nan; give"),
    ({"fits": -1}, "fits: expected bytes such as"),
    ({"fits": "GB"}, "fits: expected bytes such as"),
    ({"fits": "-1GB"}, "fits: expected bytes such as"),
    ({"fits": True}, "fits: expected bytes such as"),
    ({"fits": "9e99GB"}, "fits: expected bytes such as"),
    ({"dtype": torch.ones(2)}, "dtype: expected None or one of"),
    ({"moment_dtype": ["int8"]}, "moment_dtype: expected None or one of"),
    ({"compiled": 1}, "compiled: expected True or False, got 1"),
    ({"checkpointing": "yes"}, "checkpointing: expected True or False"),
    ({"fused_update": 0}, "fused_update: expected True or False"),
    ({"inputs": 3}, r"inputs: expected a function \(batch, sequence\)"),
    ({"loss_fn": "loss"}, r"loss_fn: expected a function \(model, inputs\)"),
    ({"density": float("nan")}, "density: expected a number in"),
    ({"density": "0.5"}, "density: expected a number in"),
    ({"block_shape": 4096}, "block_shape: expected blocks that save memory|nothing to make sparse"),
    ({"rules": [("*", 0.5)]}, "rules: expected a dict from globs to densities"),
    ({"include": 3}, "include: expected a glob or a list of globs"),
    ({"sparse_efficiency": 0.7}, "sparse_efficiency: expected none without tokens, got 0.7; pass tokens="),
    ({"tokens": 1e9, "sparse_efficiency": 0}, r"sparse_efficiency: expected a number in \(0, 100\], got 0"),
    ({"tokens": 1e9, "sparse_efficiency": "fast"}, "sparse_efficiency: expected a number in .*got 'fast'"),
    ({"tokens": 0}, "tokens: expected a number in .*got 0; pass 20e9, say"),
    ({"tokens": "20B"}, "tokens: expected a number in .*got '20B'"),
    ({"tokens": float("nan")}, "tokens: expected a number in .*got nan"),
    ({"tokens": True}, "tokens: expected a number in .*got True"),
    ({"tokens": 1e9, "density": 1.0, "density_schedule": [(10, 0.5)]}, "tokens: expected none beside density_schedule"),
    ({"mesh": 8}, "mesh: expected a dict from dimensions to numbers of ranks, got 8"),
    ({"mesh": {}}, "mesh: expected a dict from dimensions to numbers of ranks, got {}"),
    ({"mesh": [("dp", 8)]}, "mesh: expected a dict from dimensions to numbers of ranks, got"),
    ({"mesh": {"dp": 0}}, r"mesh\['dp'\]: expected a whole number of at least 1, got 0"),
    ({"mesh": {"dp": 2.0}}, r"mesh\['dp'\]: expected a whole number of at least 1, got 2.0"),
    ({"mesh": {"dp": 2**40}}, r"mesh\['dp'\]: expected a whole number in \[1, 1048576\]"),
    ({"mesh": {"dp": 2, "replicate": 0}}, r"mesh\['replicate'\]: expected a whole number of at least 1, got 0"),
    ({"mesh": {"dp": 8, "pp": 2}}, "mesh: expected 'dp' .* and at most 'replicate' beside it .*, got 'pp'"),
    ({"mesh": {3: 2}}, "mesh: expected 'dp' .* and at most 'replicate' beside it .*, got 3"),
    ({"mesh": {"replicate": 2}}, "mesh: expected 'dp' .* beside it .*, got replicate alone"),
    (
        {"mesh": {"dp": 8, "tp": 3}},
        r"model.layers.0.self_attn.q_proj.weight: expected rows that 3 slabs .* divide, got",
    ),
    ({"mesh": {"dp": 8, "tp": 2}, "tp_plan": {"*": "colwise"}}, r"tp_plan: .* alone, got model, a LlamaModel"),
    ({"mesh": {"dp": 8}, "tp_plan": 3}, "tp_plan: expected a dict from globs over names of modules"),
    ({"mesh": {"dp": 2}, "fits": "1GB"}, "mesh: expected none beside fits, got both"),
    ({"mesh": {"dp": 2}, "density_schedule": [(5, 0.1)]}, "mesh: expected none beside density_schedule, got both"),
]


@pytest.mark.parametrize(("arguments", "message"), CASES, ids=str)
def test_a_bad_argument_is_refused_by_name(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        smet.plan(**({"model": "nano", "compiled": False} | arguments))  # type: ignore[arg-type]


def test_a_model_that_is_compact_takes_no_density() -> None:
    model = smet.sparsify(nn.Sequential(nn.Linear(8, 8)), 0.5)
    with pytest.raises(ValueError, match=r"density: expected none for a model that is compact already, got 0\.5"):
        smet.plan(model, 0.5)


def test_a_model_that_takes_no_tokens_needs_inputs() -> None:
    with pytest.raises(ValueError, match=r"inputs: expected a function .* for Linear, which is no language model"):
        smet.plan(nn.Linear(8, 8), 0.5)
    with pytest.raises(ValueError, match=r"Linear cannot be run on shapes alone: .*; see inputs= and loss_fn="):
        smet.plan(nn.Linear(8, 8), 0.5, inputs=lambda b, s: torch.zeros(b, 9), loss_fn=lambda m, x: m(x).sum())


def test_only_a_language_model_reads_tokens() -> None:
    step = {"inputs": lambda b, s: torch.zeros(b, 8), "loss_fn": lambda m, x: m(x).sum(), "compiled": False}
    with pytest.raises(
        ValueError, match="tokens: expected a language model, with sequence=, got none; leave tokens out"
    ):
        smet.plan(nn.Linear(8, 8), 0.5, tokens=1e9, **step)
    of_tokens = {"inputs": lambda b, s: torch.zeros(b, s, 8), "sequence": 16}
    with pytest.raises(ValueError, match="tokens: expected a language model with linear layers beside its embedding"):
        smet.plan(nn.Linear(8, 8), 0.5, tokens=1e9, include="*", **(step | of_tokens))


def test_checkpointing_needs_a_model_that_has_it() -> None:
    with pytest.raises(ValueError, match="checkpointing: expected a model with gradient_checkpointing_enable"):
        smet.plan(nn.Linear(8, 8), 0.5, inputs=lambda b, s: {"input": torch.zeros(b, 8)}, checkpointing=True)


def test_a_plan_warns_of_too_few_blocks_for_their_rows() -> None:
    step = {"inputs": lambda b, s: torch.zeros(b, 32), "loss_fn": lambda m, x: m(x).sum(), "compiled": False}
    few = smet.plan(nn.Linear(32, 64), 0.1, block_shape=8, **step)
    assert any("weight (3 blocks for 8 rows and 4 columns of blocks): some outputs" in each for each in few.warnings)
    enough = smet.plan(nn.Linear(32, 64), 0.25, block_shape=8, **step)
    assert not any("columns of blocks" in each for each in enough.warnings)


def test_a_plan_says_why_moments_take_more_than_dense_ones() -> None:
    step = {"inputs": lambda b, s: torch.zeros(b, 30), "loss_fn": lambda m, x: m(x).sum(), "compiled": False}
    over = smet.plan(nn.Linear(30, 60), 1.0, block_shape=16, density_schedule=[(9, 0.5)], **step).warnings
    assert any("weights take 992 B more than dense ones, since blocks hang over the edges" in each for each in over)
    assert not any("moments take" in each for each in over)
    half = {"inputs": lambda b, s: torch.zeros(b, 30, dtype=torch.bfloat16)}
    wide = smet.plan(nn.Linear(30, 60).bfloat16(), 0.9, **(step | half)).warnings
    assert any("moments take" in each and "have the dtype of the weights" in each for each in wide)
    assert not any("hang over" in each for each in wide)
