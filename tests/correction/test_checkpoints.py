"""A resumed run goes on with the correction of the saved one, or says that it does not."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import smet_compile as smet
from smet_compile.ops import find_sites
from smet_compile.runtime.saved_correction import correction_entries, restore_correction
from tests.correction.networks import images, loss_of, sparse_net
from tests.support.altered_files import read_file, write_file

CORRECTED = {"conv.weight", "point.weight", "linear.weight"}


def sgd(model: nn.Module) -> Any:
    return smet.ActiveSGD(model, lr=0.05, momentum=0.9)


def adam(model: nn.Module) -> Any:
    return smet.ActiveAdamW(model, lr=0.01)


def train(model: nn.Module, optimizer: Any, num_steps: int = 3) -> list[float]:
    losses = []
    for step in range(num_steps):
        loss = loss_of(model, images(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def saved(path: Path, corrects: bool, make: Callable[[nn.Module], Any] = sgd, **options: Any) -> list[float]:
    """Trains, saves, and returns the losses of what would come next."""
    model = sparse_net()
    optimizer = make(model)
    if corrects:
        smet.correct_gradients(model, optimizer, images(), **options)
    train(model, optimizer)
    smet.save_checkpoint(path, model, optimizer)
    return train(model, optimizer)


def scaled(model: nn.Module) -> set[str]:
    return {name for name, site in find_sites(model).items() if site.compact.scales_rows}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run"


def quietly(path: Path, model: nn.Module, *others: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        smet.load_checkpoint(path, model, *others)


def test_the_correction_is_restored_without_an_example(path: Path) -> None:
    expected = saved(path, corrects=True)
    model = sparse_net()
    optimizer = sgd(model)
    quietly(path, model, optimizer)
    assert scaled(model) == CORRECTED
    assert train(model, optimizer) == expected
    assert "corrected: batch norm alone reads its output" in str(smet.report(model))


def test_without_an_optimizer_too(path: Path) -> None:
    saved(path, corrects=True)
    model = sparse_net()
    quietly(path, model)
    assert scaled(model) == CORRECTED


def test_a_model_in_wrappers(path: Path) -> None:
    expected = saved(path, corrects=True)
    model = sparse_net()
    optimizer = sgd(model)
    quietly(path, torch.compile(model, backend="eager"), optimizer)
    assert scaled(model) == CORRECTED and train(model, optimizer) == expected
    smet.save_checkpoint(path, torch.compile(model, backend="eager"), optimizer)
    plain = sparse_net()
    quietly(path, plain, sgd(plain))
    assert scaled(plain) == CORRECTED


def test_the_same_decision_is_no_reason_to_warn(path: Path) -> None:
    expected = saved(path, corrects=True)
    model = sparse_net()
    optimizer = sgd(model)
    smet.correct_gradients(model, optimizer, images())
    quietly(path, model, optimizer)
    assert train(model, optimizer) == expected


def test_a_run_without_correction_stays_without(path: Path) -> None:
    expected = saved(path, corrects=False)
    model = sparse_net()
    optimizer = sgd(model)
    quietly(path, model, optimizer)
    assert not scaled(model) and train(model, optimizer) == expected
    assert "batch norm" not in str(smet.report(model))


def test_a_corrected_model_says_that_the_saved_run_was_not(path: Path) -> None:
    expected = saved(path, corrects=False)
    model = sparse_net()
    optimizer = sgd(model)
    smet.correct_gradients(model, optimizer, images())
    with pytest.warns(
        UserWarning,
        match=r"3 weights go on with another correction .* conv\.weight: not corrected there, corrected here",
    ) as caught:
        smet.load_checkpoint(path, model, optimizer)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert scaled(model) == CORRECTED and train(model, optimizer) != expected


def test_another_decision_stays_and_is_said(path: Path) -> None:
    saved(path, corrects=True)
    model = sparse_net()
    optimizer = sgd(model)
    model.norm.eval()
    smet.correct_gradients(model, optimizer, images())
    with pytest.warns(
        UserWarning, match=r"1 weights .* conv\.weight: corrected there, not corrected here\. Leave corr"
    ):
        smet.load_checkpoint(path, model, optimizer)
    assert scaled(model) == CORRECTED - {"conv.weight"}


def test_scaled_steps_are_a_matter_of_the_optimizer(path: Path) -> None:
    expected = saved(path, corrects=True, make=adam, scale_steps=True)
    model = sparse_net()
    optimizer = adam(model)
    with pytest.warns(UserWarning, match="its steps are scaled there, not corrected here.*scale_steps=True"):
        smet.load_checkpoint(path, model, optimizer)
    assert not scaled(model) and train(model, optimizer) != expected
    model = sparse_net()
    optimizer = adam(model)
    smet.correct_gradients(model, optimizer, images(), scale_steps=True)
    quietly(path, model, optimizer)
    assert train(model, optimizer) == expected


def test_parts_of_weights_are_not_corrected() -> None:
    """A file of whole weights may be loaded where tensor parallelism has cut them."""
    model = sparse_net()
    smet.correct_gradients(model, sgd(model), images())
    entries, cut = correction_entries(model), sparse_net()
    for site in find_sites(cut).values():
        site.compact.__dict__["part"] = object()
    assert "Tensor parallelism cuts weights" in str(restore_correction(entries, cut))
    assert not scaled(cut)


def test_an_older_checkpoint_loads_as_before(path: Path) -> None:
    saved(path, corrects=True)
    tensors, body = read_file(path)
    del body["correction"]
    write_file(path, tensors, body)
    for corrects in (False, True):
        model = sparse_net()
        optimizer = sgd(model)
        if corrects:
            smet.correct_gradients(model, optimizer, images())
        quietly(path, model, optimizer)
        assert scaled(model) == (CORRECTED if corrects else set())


ENTRY = {"scales_rows": True, "scales_steps": False, "correction": "corrected"}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (None, "correction: expected a dict, got"),
        ({"other.weight": ENTRY}, "names of compact weights of this model, got 'other.weight'"),
        ({"conv.weight": []}, "correction.conv.weight: expected a dict"),
        ({"conv.weight": {"scales_rows": True}}, "correction.conv.weight: expected 'scales_steps' in it"),
        ({"conv.weight": ENTRY | {"scales_rows": 1}}, "conv.weight.scales_rows: expected a bool, got"),
        ({"conv.weight": ENTRY | {"correction": None}}, "conv.weight.correction: expected a str, got"),
        ({"conv.weight": ENTRY | {"scales_steps": True}}, "scaled gradients or scaled steps, got both"),
    ],
)
def test_what_no_run_saves(entries: Any, message: str, path: Path) -> None:
    saved(path, corrects=True)
    tensors, body = read_file(path)
    write_file(path, tensors, body | {"correction": entries})
    model = sparse_net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        smet.load_checkpoint(path, model)
    assert not scaled(model) and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
