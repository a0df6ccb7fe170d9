from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """For what does not depend on the compiler: the step does the same in eager, and takes no second to begin."""
    with torch.compiler.set_stance("force_eager"):
        yield
