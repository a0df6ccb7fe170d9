"""Networks for images: made sparse, trained, moved, saved, loaded, exported; compiled they equal eager mode.

The families are written out in tests/support. Where torchvision is installed its own models run too, small and random.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.ops import find_sites
from smet_compile.tracing import Capture
from tests.support.image_models import FAMILIES

CORRECTED = {
    "resnet": {f"{block}.{name}.weight" for block in (1, 2) for name in ("conv1", "conv2", "conv3", "shortcut.0")},
    "pre-activation": {"1.conv1.weight", "2.conv1.weight", "3.conv1.weight"},
    "mobilenet": {"1.expand.0.weight", "1.project.0.weight", "2.expand.0.weight", "2.project.0.weight"},
    "densenet": {f"{layer}.{name}.weight" for layer in (1, 2, 3) for name in ("conv1", "conv2")},
}


def of_torchvision(name: str) -> nn.Module:
    models = importlib.import_module("torchvision.models")
    if name == "vit":
        return models.VisionTransformer(32, 8, 2, 2, 24, 48, num_classes=7)
    if name == "swin":
        return models.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [2, 2], num_classes=7, stochastic_depth_prob=0.0)
    if name == "convnext":
        setting = models.convnext.CNBlockConfig
        return models.ConvNeXt([setting(8, 16, 1), setting(16, None, 1)], num_classes=7)
    if name == "mobilenet_v3":
        return models.mobilenet_v3_small(num_classes=7, width_mult=0.25)
    if name == "resnet18":
        return models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=7)
    return models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=7, width_per_group=16)


OF_TORCHVISION = ("resnet18", "resnet50", "mobilenet_v3", "convnext", "vit", "swin")


def torchvision_works() -> bool:
    """Tells whether it is installed, and for this build of torch: one for another raises a RuntimeError."""
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        return False
    return True


NEEDS_TORCHVISION = pytest.mark.skipif(not torchvision_works(), reason="needs a torchvision for this build of torch")
MODELS: dict[str, Callable[[], nn.Module]] = dict(FAMILIES)
MODELS |= {f"torchvision {name}": lambda name=name: of_torchvision(name) for name in OF_TORCHVISION}  # type: ignore[misc]
parametrize = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=NEEDS_TORCHVISION) if n.startswith("torchvision") else n for n in MODELS]
)


def images(step: int = 0) -> Tensor:
    return torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def loss_of(model: Any, x: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), torch.arange(4) % 7)


def sparse(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().double()
    for module in model.modules():
        if hasattr(module, "p") and "ropout" in type(module).__name__:
            module.p = 0.0
    return smet.sparsify(model, 0.3, include="conv")


def corrected(model: nn.Module, optimizer: Any) -> set[str]:
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        with pytest.raises(ValueError, match="expected a model with batch norm, got one without"):
            smet.correct_gradients(model, optimizer, images())
        return set()
    return set(smet.correct_gradients(model, optimizer, images()).corrected)


def train(model: nn.Module, optimizer: Any, manager: Any, run: Any = None, num_steps: int = 3) -> list[float]:
    losses = []
    for step in range(num_steps):
        loss = loss_of(model if run is None else run, images(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        manager.step()
        losses.append(loss.item())
    return losses


def optimized(model: nn.Module) -> tuple[smet.ActiveSGD, smet.TopologyManager]:
    optimizer = smet.ActiveSGD(model, lr=0.01)
    manager = smet.TopologyManager(model, optimizer, total_steps=20, every=2, grow="gradient", min_age=0)
    return optimizer, manager


@pytest.mark.filterwarnings("ignore:sparsify", "ignore:TopologyManager")
@parametrize
def test_trains_moves_and_is_saved_and_exported(name: str, tmp_path: Path) -> None:
    model = sparse(name)
    optimizer, manager = optimized(model)
    found = corrected(model, optimizer)
    if name in FAMILIES:
        assert found == CORRECTED.get(name, set())
    train(model, optimizer, manager)
    assert len(manager.history) == 1
    smet.save_checkpoint(tmp_path / "run", model, optimizer, manager)
    expected = train(model, optimizer, manager, num_steps=2)

    resumed = sparse(name)
    others = optimized(resumed)
    assert corrected(resumed, others[0]) == found
    smet.load_checkpoint(tmp_path / "run", resumed, *others)
    assert train(resumed, *others, num_steps=2) == expected

    dense = smet.export_dense(model)
    assert not find_sites(dense) and find_sites(model)
    torch.testing.assert_close(dense.eval()(images()), model.eval()(images()), rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:sparsify", "ignore:TopologyManager")
@parametrize
def test_compiled_equals_eager(name: str) -> None:
    torch._dynamo.reset()
    model = sparse(name)
    twin = copy.deepcopy(model)
    optimizers = optimized(model), optimized(twin)
    for each, (optimizer, _) in ((model, optimizers[0]), (twin, optimizers[1])):
        corrected(each, optimizer)
    backend = Capture()
    actual = train(model, *optimizers[0], torch.compile(model, backend=backend, fullgraph=True))
    expected = train(twin, *optimizers[1])
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=1e-9, atol=1e-9)
    twin_values = {n: site.values for n, site in find_sites(twin).items()}
    for n, site in find_sites(model).items():
        torch.testing.assert_close(site.values, twin_values[n], rtol=1e-8, atol=1e-10, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.filterwarnings("ignore:sparsify")
@parametrize
def test_every_pointwise_convolution_is_fused(name: str) -> None:
    model = sparse(name)
    rows = {row.name: row for row in smet.explain(model, images()).sites}
    for n, site in find_sites(model).items():
        if isinstance(site.module, nn.Conv2d):
            if site.module.kernel_size == (1, 1):
                assert rows[n].forward == rows[n].input_gradient == rows[n].weight_gradient == "fused", rows[n]
            else:
                assert rows[n].forward.startswith(("read by a convolution of kernel", "read by a grouped")), rows[n]


@pytest.mark.filterwarnings("ignore:sparsify")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
def test_a_compiled_step_by_inductor(memory_format: torch.memory_format) -> None:
    """Generates code for 1x1 convolutions with stride and bias, corrected, with the update in backward."""
    torch._dynamo.reset()
    layers = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 1, stride=2), nn.BatchNorm2d(12), nn.Tanh(), nn.Conv2d(12, 8, 1)
    net = nn.Sequential(*layers, nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 9, 7)).double()
    model = smet.sparsify(net, 0.4, include="conv").to(memory_format=memory_format)
    twin = copy.deepcopy(model)
    optimizers = [smet.ActiveSGD(each, lr=0.05, warmup_steps=0) for each in (model, twin)]
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64).contiguous(memory_format=memory_format)
    for each, optimizer in zip((model, twin), optimizers, strict=True):
        assert smet.correct_gradients(each, optimizer, x).corrected == ("1.weight", "4.weight")
    step = smet.compile_train_step(model, optimizers[0], loss_of)
    for _ in range(3):
        loss = loss_of(twin, x)
        loss.backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        torch.testing.assert_close(step(x), loss.detach(), rtol=1e-10, atol=1e-12)
    assert step.fused
