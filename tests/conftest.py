import gc
import os
from collections.abc import Iterator

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: workers share cores

import pytest
import torch
from hypothesis import settings

from smet_compile.ops import direct

settings.register_profile("suite", deadline=None, max_examples=50)
settings.load_profile("suite")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leaves what was imported out of all later garbage collections, of which tests cause thousands."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def unpacked() -> Iterator[None]:
    """Makes eager linear layers read their weights, so that they compute the numbers of a dense model bit for bit."""
    with direct.unpacked():
        yield


@pytest.fixture
def older_objects_stay() -> None:
    """Leaves what there is by now out of garbage collection, which takes seconds after some thousand tests."""
    gc.freeze()
