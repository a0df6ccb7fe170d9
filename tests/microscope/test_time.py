"""LLaMA-1B in tiles of 64 is looked through in under ten seconds."""

import time

import pytest
import torch

import smet_compile as smet
from smet_compile.presets import build_preset
from tests.microscope.programs import scattered


@pytest.mark.slow
def test_llama_1b_in_tiles_of_64_takes_less_than_ten_seconds() -> None:
    """Weights are on the meta device, topologies real. Processor time counts: others may use the machine as well."""
    model = scattered(smet.sparsify(build_preset("1b"), 0.25, block_shape=64), 0)
    tokens = torch.zeros(1, 64, dtype=torch.int64)
    smet.inspect(smet.sparsify(build_preset("nano", device="cpu"), 0.5), input_ids=tokens[:, :8])  # imports
    began = time.process_time()
    found = smet.inspect(model, input_ids=tokens)
    assert time.process_time() - began < 10
    assert len(found.sites) == 7 * 24 and sum(site.num_weights for site in found.sites) > 1.2e9
    assert found.notes == () and found.path_log10_share is not None
