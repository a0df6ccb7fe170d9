"""save_pretrained of an export loads in a process that has never heard of this library."""

from pathlib import Path

import torch

import smet_compile as smet
from tests.models.classes import REAL_MODELS
from tests.support.fresh_process import run_python
from tests.support.snapshots import same_bits

SCRIPT = """
import sys, torch, transformers
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    batch = torch.load(folder + "/batch.pt", weights_only=True)
    with torch.no_grad():
        torch.save(model(**batch).logits, folder + "/logits.pt")
assert not [name for name in sys.modules if name.startswith("smet")]
"""
NAMES = ["llama", "gpt2", "mixtral"]


def test_the_same_logits_in_a_fresh_process(tmp_path: Path) -> None:
    expected = {}
    for name in NAMES:
        model = smet.sparsify(REAL_MODELS[name].make(), density=0.4).eval()
        batch = REAL_MODELS[name].batch()
        with torch.no_grad():
            expected[name] = model(**batch).logits
        smet.export_dense(model).save_pretrained(tmp_path / name)
        torch.save(batch, tmp_path / name / "batch.pt")
    run_python("-c", SCRIPT, *[str(tmp_path / name) for name in NAMES])
    for name in NAMES:
        assert same_bits(torch.load(tmp_path / name / "logits.pt"), expected[name]), name
