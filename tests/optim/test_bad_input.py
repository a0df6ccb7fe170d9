import pytest
import torch
from torch import nn

import smet_compile as smet
from tests.support.small_models import two_layers


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", -1.0),
        ("lr", float("nan")),
        ("betas", (1.0, 0.999)),
        ("betas", (0.9, -0.1)),
        ("eps", -1e-8),
        ("weight_decay", -0.1),
        ("warmup_steps", -1),
        ("state_dtype", torch.int8),
    ],
    ids=str,
)
def test_options_out_of_range(option: str, value: object) -> None:
    model = smet.sparsify(two_layers(), density=0.5)
    with pytest.raises(ValueError, match="beta" if option == "betas" else option):
        smet.ActiveAdamW(model, **{option: value})


def test_param_groups_need_the_model() -> None:
    model = smet.sparsify(two_layers(), density=0.5)
    with pytest.raises(ValueError, match="model"):
        smet.ActiveAdamW([{"params": list(model.parameters())}])


def test_a_state_of_another_model() -> None:
    model = smet.sparsify(two_layers(), density=0.5)
    other = smet.sparsify(nn.Sequential(nn.Linear(12, 20)), density=0.5)
    optimizer = smet.ActiveAdamW(model)
    with pytest.raises(ValueError, match=r"(?i)param"):
        optimizer.load_state_dict(smet.ActiveAdamW(other).state_dict())
