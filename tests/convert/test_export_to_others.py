"""The dense copy goes into torch.export, ONNX and torchao; a compact model names what to do first."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from tests.support.small_models import RaggedNet

FIRST = "export_dense"


def compact_net(block_shape: int | tuple[int, int] = 1) -> nn.Module:
    torch.manual_seed(0)
    return smet.sparsify(RaggedNet(), 0.5, block_shape=block_shape).eval()


def batch() -> Tensor:
    return torch.randn(5, 50, generator=torch.Generator().manual_seed(1))


def assert_near(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strict", [False, True])
def test_torch_export_of_the_dense_copy(strict: bool, tmp_path: Path) -> None:
    model, x = compact_net(), batch()
    program = torch.export.export(smet.export_dense(model), (x,), strict=strict)
    assert not [node for node in program.graph.nodes if "smet" in str(node.target)]
    torch.export.save(program, tmp_path / "model.pt2")
    assert_near(torch.export.load(tmp_path / "model.pt2").module()(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_onnx_of_the_dense_copy(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, x = compact_net(), batch()
    torch.onnx.export(smet.export_dense(model), (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_near(torch.from_numpy(got), model(x))


def test_int8_of_the_dense_copy() -> None:
    """A zero stays zero in 8 bits, and a weight moves by half a step of its row at most."""
    quantization = pytest.importorskip("torchao.quantization")
    model = smet.sparsify(nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 32)), 0.4).eval()
    dense = smet.export_dense(model)
    quantization.quantize_(dense, quantization.Int8WeightOnlyConfig())
    for number in (0, 2):
        weight, quantized = model[number].weight.detach(), dense[number].weight
        assert type(quantized) is not nn.Parameter
        restored = quantized.dequantize()
        assert bool((restored[weight == 0] == 0).all())
        step = weight.abs().amax(1, keepdim=True) / 127
        assert bool(((restored - weight).abs() <= 0.51 * step).all())
    x = torch.randn(5, 64)
    with torch.no_grad():
        assert float((dense(x) - model(x)).norm() / model(x).norm()) < 0.02


def onnx_by_script(model: nn.Module, x: Tensor, folder: Path) -> Any:
    pytest.importorskip("onnx")
    return torch.onnx.export(model, (x,), folder / "model.onnx", dynamo=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:sparsify. experts")
@pytest.mark.parametrize("block_shape", [1, (16, 16)], ids=str)
@pytest.mark.parametrize(
    "export",
    [
        lambda model, x, folder: torch.export.export(model, (x,)),
        lambda model, x, folder: torch.export.draft_export(model, (x,)),
        onnx_by_script,
    ],
    ids=["torch.export", "draft_export", "onnx"],
)
def test_a_compact_model_is_refused(export: Callable[..., Any], block_shape: Any, tmp_path: Path) -> None:
    model = compact_net(block_shape)
    before = model(batch())
    with pytest.raises(ValueError, match=FIRST):
        export(model, batch(), tmp_path)
    assert torch.equal(model(batch()), before)


def test_a_compact_model_is_refused_by_a_strict_export() -> None:
    """Dynamo turns any error of a model into its own, with the text."""
    with pytest.raises(torch._dynamo.exc.Unsupported, match=FIRST):
        torch.export.export(compact_net(), (batch(),), strict=True)


def test_a_compact_model_is_refused_by_onnx(tmp_path: Path) -> None:
    """The exporter turns any error of torch.export into its own, with the text and the cause."""
    pytest.importorskip("onnxscript")
    with pytest.raises(torch.onnx.OnnxExporterError, match=FIRST) as caught:
        torch.onnx.export(compact_net(), (batch(),), tmp_path / "model.onnx", dynamo=True, verbose=False)
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_a_compact_model_is_refused_by_torchao(name: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = compact_net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=FIRST):
        quantization.quantize_(model, getattr(quantization, name)())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:smet_compile. a compiled graph runs without the passes")
def test_a_compact_model_is_still_compiled_as_one_graph() -> None:
    model, x = compact_net(), batch()
    assert_near(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))
