from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """Runs steps in eager mode, where they do the same without the seconds of compiling."""
    with torch.compiler.set_stance("force_eager"):
        yield
