"""FSDP1 is refused by name, before and after sparsify; what only passes calls on is looked through."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import smet_compile as smet
from tests.support.small_models import two_layers

USES: dict[str, Callable[[nn.Module], Any]] = {
    "sparsify": lambda model: smet.sparsify(model, 0.5),
    "optimizer": smet.ActiveAdamW,
    "report": smet.report,
    "export": smet.export_dense,
    "inspect": lambda model: smet.inspect(model, torch.randn(2, 12)),
    "save": lambda model: smet.save_checkpoint("nowhere", model, smet.ActiveAdamW(model)),
}


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("use", USES)
@pytest.mark.filterwarnings("ignore:.*FSDP.*", "ignore::FutureWarning")
def test_flat_parameters_are_refused_by_name(use: str, one_rank: None) -> None:
    model = two_layers() if use == "sparsify" else smet.sparsify(two_layers(), 0.5)
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(ValueError, match=r"got FullyShardedDataParallel.*call sparsify, then fully_shard"):
        USES[use](wrapped)


def test_data_parallel_is_inspected_as_what_it_wraps() -> None:
    model = smet.sparsify(two_layers(), 0.5)
    model.eval()
    wanted = smet.inspect(model, torch.randn(2, 12))
    assert str(smet.inspect(nn.DataParallel(model), torch.randn(2, 12))) == str(wanted)
