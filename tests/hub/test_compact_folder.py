"""A compact model goes into a folder and comes back bit for bit; a bad folder is a ValueError and changes nothing."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils import parametrize

import smet_compile as smet
from smet_compile.hub import content
from smet_compile.ops import find_sites
from tests.support.small_models import RaggedNet, two_layers
from tests.support.states import Unchanged
from tests.support.training import train

FILE = "compact.safetensors"


class Tied(nn.Module):
    """Has an embedding that is read twice, batch norm with buffers, a convolution, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 24)
        self.hidden = nn.Linear(24, 24)
        self.first = nn.Conv1d(24, 24, 1)
        self.convolution = nn.Conv1d(24, 24, 3, padding=1)
        self.norm = nn.BatchNorm1d(24)
        self.head = nn.Linear(24, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.full((24,), 2.0), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.hidden(self.embedding(tokens) * self.scale))
        result: Tensor = self.head(self.norm(self.convolution(self.first(hidden.mT))).mT)
        return result


def assert_same(loaded: nn.Module, model: nn.Module) -> None:
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    for name, site in find_sites(model).items():
        other = find_sites(loaded)[name]
        assert (other.layout, other.compact.pattern) == (site.layout, site.compact.pattern)


@pytest.mark.filterwarnings("ignore:sparsify. compact weights that take more memory")
@pytest.mark.parametrize(
    "options",
    [
        {"block_shape": 1},
        {"block_shape": (1, 16)},
        {"block_shape": 16},
        {"pattern": "fan_in"},
        {"slabs": {"first": (37, 0)}, "include": ["first", "experts.*"]},
        {"density": 1.0, "dense_as_compact": True},
    ],
    ids=str,
)
def test_a_model_comes_back(options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = smet.sparsify(RaggedNet(), **{"density": 0.5, **options})
    model(torch.randn(9, 50)).square().mean().backward()
    smet.ActiveAdamW(model, lr=1e-2).step()
    smet.save_compact(model, tmp_path)
    loaded = smet.load_compact(tmp_path, RaggedNet())
    assert_same(loaded, model)
    x = torch.randn(3, 50)
    assert torch.equal(loaded(x), model(x))
    again = smet.sparsify(RaggedNet(), **{"density": 0.5, "seed": 5, **options})
    assert smet.load_compact(tmp_path, again) is again
    assert_same(again, model)


@pytest.mark.filterwarnings("ignore:sparsify. the model's matrices as a whole")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tied_weights_buffers_and_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = smet.sparsify(Tied().to(dtype), 0.4, include="conv")
    model.norm.running_mean.uniform_()
    smet.save_compact(model, tmp_path)
    loaded = smet.load_compact(tmp_path, Tied().to(dtype))
    assert_same(loaded, model)
    assert loaded.head.weight is loaded.embedding.weight
    with safe_open(tmp_path / FILE, "pt") as file:
        names = set(file.keys())
    assert "head.weight" not in names and "embedding.weight" in names
    assert {"hidden.weight.values", "hidden.weight.topology", "convolution.weight.values"} <= names
    x = torch.arange(11)[None]
    assert torch.equal(loaded.eval()(x), model.eval()(x))


class Repeated(nn.Module):
    """Has one layer under three names, one of them inside a module that has two names itself."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(16, 16)
        inner = nn.Sequential(layer, nn.Tanh())
        self.first = nn.Linear(8, 16)
        self.layers = nn.ModuleList([layer, inner, inner])
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.last(x)
        return result


def repeated_folder(tmp_path: Path) -> nn.Module:
    model = smet.sparsify(Repeated(), 0.3)
    smet.save_compact(model, tmp_path)
    return model


@pytest.mark.parametrize("compact", [False, True])
def test_a_layer_with_several_names(compact: bool, tmp_path: Path) -> None:
    model = repeated_folder(tmp_path)
    into = smet.sparsify(Repeated(), 0.3, seed=4) if compact else Repeated()
    loaded = smet.load_compact(tmp_path, into)
    assert_same(loaded, model)
    assert loaded.layers[0] is loaded.layers[1][0] and len(find_sites(loaded)) == 3
    x = torch.randn(5, 8)
    assert torch.equal(loaded(x), model(x))
    num_weights = sum(p.numel() for p in model.parameters())
    num_bits = sum(site.compact.topology.numel() for site in find_sites(model).values())
    assert f"| bytes, compact | {4 * num_weights + num_bits:,} ({FILE}) |" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("compact", [False, True])
def test_a_layer_with_several_names_in_a_file_of_before(
    compact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files had the further names as they are in the state dict."""
    with monkeypatch.context() as patched:
        patched.setattr(content, "names_of_sites", lambda model: {name: [name] for name in find_sites(model)})
        model = repeated_folder(tmp_path)
    with safe_open(tmp_path / FILE, "pt") as file:
        assert any(
            "parametrizations" in name for name in json.loads(bytes(file.get_tensor("json").tolist()))["tensors"]
        )
    into = smet.sparsify(Repeated(), 0.3, seed=4) if compact else Repeated()
    assert_same(smet.load_compact(tmp_path, into), model)


def test_a_layer_with_several_names_is_not_several_layers(tmp_path: Path) -> None:
    repeated_folder(tmp_path)
    separate = Repeated()
    separate.layers[0] = nn.Linear(16, 16)
    with Unchanged(separate), pytest.raises(ValueError, match=r"only in"):
        smet.load_compact(tmp_path, separate)


def test_a_loaded_model_trains_on_and_exports(tmp_path: Path) -> None:
    model = smet.sparsify(two_layers(), 0.4)
    smet.save_compact(model, tmp_path)
    loaded = smet.load_compact(tmp_path, two_layers())
    for each in (model, loaded):
        optimizer = smet.ActiveAdamW(each, lr=1e-2)
        train(each, optimizer, smet.TopologyManager(each, optimizer, total_steps=8, every=2), steps=6)
    assert_same(loaded, model)
    dense, expected = smet.export_dense(loaded).state_dict(), smet.export_dense(model).state_dict()
    assert all(torch.equal(dense[name], expected[name]) for name in expected)
    assert "dense in the file" not in str(smet.report(loaded))


def test_a_wrapped_model_is_the_plain_one(tmp_path: Path) -> None:
    model = smet.sparsify(two_layers(), 0.4)
    smet.save_compact(torch.compile(model), tmp_path)
    into = torch.compile(two_layers())
    assert smet.load_compact(tmp_path, into) is into
    assert_same(into._orig_mod, model)


def test_a_model_that_is_one_layer(tmp_path: Path) -> None:
    model = smet.sparsify(nn.Linear(8, 8), 0.5)
    smet.save_compact(model, tmp_path)
    assert_same(smet.load_compact(tmp_path, nn.Linear(8, 8)), model)
    assert "# Linear, sparse" in (tmp_path / "README.md").read_text()


def test_a_model_on_the_meta_device_gets_memory(tmp_path: Path) -> None:
    model = smet.sparsify(two_layers(), 0.4)
    smet.save_compact(model, tmp_path)
    with torch.device("meta"):
        empty = two_layers()
    assert_same(smet.load_compact(tmp_path, empty, device="cpu"), model)


def test_a_buffer_that_no_file_holds_is_named(tmp_path: Path) -> None:
    smet.save_compact(smet.sparsify(Tied(), 0.4), tmp_path)
    with torch.device("meta"):
        empty = Tied()
    with pytest.raises(ValueError, match="scale were written by no reset_parameters"):
        smet.load_compact(tmp_path, empty)
    with pytest.raises(ValueError, match="device: expected one of this machine, got 'nothing'"):
        smet.load_compact(tmp_path, device="nothing")


@pytest.mark.filterwarnings("ignore:TopologyManager. 0.weight .4 active blocks")
def test_the_card_says_what_the_model_is(tmp_path: Path) -> None:
    model = smet.sparsify(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)), 0.25, block_shape=16)
    optimizer = smet.ActiveAdamW(model, lr=1e-2)
    manager = smet.TopologyManager(model, optimizer, total_steps=8, every=2, schedule="cosine", min_age=0)
    for _ in range(4):
        model(torch.randn(3, 64)).sum().backward()
        optimizer.step()
        manager.step()
    smet.save_compact(model, tmp_path, manager=manager)
    card = (tmp_path / "README.md").read_text()
    assert "| density of the compact weights | 0.2500 (2,048 of 8,192) |" in card
    assert "| block shape | 16x16 |" in card
    assert '2 topology updates in 4 of 8 steps, every 2; drop "magnitude", grow "random"' in card
    biases = 2 * 64 * 4
    assert f"| bytes, compact | {2048 * 4 + 2 * 2 + biases:,} ({FILE}) |" in card
    assert f"| bytes, dense | {8192 * 4 + biases:,} |" in card
    assert f"torch {torch.__version__}" in card and "Sequential(...)" in card
    with safe_open(tmp_path / FILE, "pt") as file:
        names = set(file.keys()) - {"json"}
        held = sum(file.get_tensor(name).nbytes for name in names)
    assert held == 2048 * 4 + 2 * 2 + biases


def test_a_card_of_somebody_else_stays(tmp_path: Path) -> None:
    model = smet.sparsify(two_layers(), 0.4)
    card = tmp_path / "README.md"
    smet.save_compact(model, tmp_path)
    written = card.read_text()
    card.write_text(written + "more\n")
    smet.save_compact(model, tmp_path)
    assert card.read_text() == written
    card.write_text("mine\n")
    smet.save_compact(model, tmp_path)
    assert card.read_text() == "mine\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    smet.save_compact(smet.sparsify(two_layers(), 0.4), tmp_path)
    return tmp_path


def wider() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 21), nn.Tanh(), nn.Dropout(), nn.Linear(21, 7))


def tied() -> nn.Module:
    model = two_layers()
    model[2] = nn.Linear(12, 20, bias=False)
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (wider, "0.weight: expected a weight of shape [20, 12] read as [20, 12], got [21, 12] read as [21, 12]"),
        (RaggedNet, "0.weight is only in the file: it is of another model"),
        (lambda: two_layers().double(), "expected torch.float64 of shape"),
        (lambda: nn.Sequential(*two_layers(), nn.Linear(7, 7)), "is only in this model: the file is of another model"),
        (tied, "0.weight: expected a weight that can be sparse, got one that cannot: tied to 2.weight"),
        (lambda: smet.sparsify(two_layers(), 0.5), "of another model, density or dtype"),
        (lambda: smet.sparsify(two_layers(), 0.4, block_shape=(1, 2)), "0.weight: expected block shape [1, 2], got"),
    ],
)
def test_another_model_is_refused(make: Callable[[], nn.Module], message: str, folder: Path) -> None:
    model = make()
    with Unchanged(model), pytest.raises(ValueError, match=re.escape(message)):
        smet.load_compact(folder, model)


@pytest.mark.parametrize("place", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_an_altered_file_is_refused(place: float, folder: Path) -> None:
    content = bytearray((folder / FILE).read_bytes())
    content[int(place * len(content))] ^= 1
    (folder / FILE).write_bytes(bytes(content))
    model = two_layers()
    with Unchanged(model), pytest.raises(ValueError, match=re.escape(str(folder / FILE))):
        smet.load_compact(folder, model)


def test_a_cut_file_is_refused(folder: Path) -> None:
    content = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[:-9])
    with pytest.raises(ValueError, match="not a whole compact model"):
        smet.load_compact(folder, two_layers())


def test_a_checkpoint_is_another_file(folder: Path) -> None:
    model = smet.sparsify(two_layers(), 0.4)
    smet.save_checkpoint(folder / FILE, model, smet.ActiveAdamW(model, lr=1e-2))
    with pytest.raises(ValueError, match="compact model: expected 'class' in it, found none"):
        smet.load_compact(folder, two_layers())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree["layouts"]["0.weight"].__setitem__(2, [1, 2]), "0.weight"),
        (lambda tree: tree["layouts"]["0.weight"].append("5:4"), "pattern: expected None"),
        (lambda tree: tree["layouts"]["0.weight"].append("2:4"), "0.weight"),
        (lambda tree: tree["layouts"].update({"0.weight": 3}), "0.weight: expected a layout"),
        (lambda tree: tree["layouts"].pop("0.weight"), "0.weight"),
        (lambda tree: tree["tensors"].pop("0.weight.topology"), "0.weight.topology: expected this tensor"),
        (lambda tree: tree["tensors"].pop("0.bias"), "0.bias is only in this model"),
        (lambda tree: tree["tensors"]["0.weight.topology"].zero_(), "expected an active block, got none"),
        (lambda tree: tree["tensors"]["0.weight.topology"].fill_(255), "expected torch.float32 of shape (240,)"),
        (lambda tree: tree.update(tensors=3), "tensors: expected a dict"),
        (lambda tree: tree.update(more=3), "upgrade smet_compile"),
    ],
)
def test_a_file_that_no_model_has_is_refused(
    change: Callable[[dict[str, Any]], Any], message: str, folder: Path
) -> None:
    """The checksum is right here: the file was written by somebody else."""
    from smet_compile.runtime.checkpoint_file import make_flattener, read_tree, write_flat

    tree = read_tree(folder / FILE)
    change(tree)
    flattener = make_flattener()
    tensors = tree.pop("tensors")
    if isinstance(tensors, dict):
        tensors = {name: flattener.flatten(tensor, name) for name, tensor in tensors.items()}
    write_flat(folder / FILE, tree | {"tensors": tensors}, flattener)
    model = two_layers()
    with Unchanged(model), pytest.raises(ValueError, match=re.escape(message)):
        smet.load_compact(folder, model)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_a_further_parametrization_is_refused(tmp_path: Path) -> None:
    model = smet.sparsify(two_layers(), density=0.5)
    parametrize.register_parametrization(model[0], "weight", Twice())
    with pytest.raises(
        ValueError, match=r"0\.weight: expected a compact weight that is read as it is, .* Twice changes"
    ):
        smet.save_compact(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_mistakes_of_saving_are_named(tmp_path: Path) -> None:
    model = smet.sparsify(two_layers(), 0.4)
    with pytest.raises(ValueError, match="expected compact weights, got none"):
        smet.save_compact(two_layers(), tmp_path / "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="expected a folder, got the file"):
        smet.save_compact(model, tmp_path / "file")
    number: Any = 3
    with pytest.raises(ValueError, match="expected a TopologyManager or None, got 3"):
        smet.save_compact(model, tmp_path / "new", manager=number)
    with torch.device("meta"):
        empty = two_layers()
    with pytest.raises(ValueError, match="expected a tensor with data"):
        smet.save_compact(smet.sparsify(empty, 0.4), tmp_path / "new")
    assert not list(tmp_path.glob("new/*"))
    (tmp_path / "model-00001-of-00002.safetensors").write_text("")
    with pytest.raises(ValueError, match=r"expected one without dense weights, got .* with model-00001"):
        smet.save_compact(model, tmp_path)


def test_mistakes_of_loading_are_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"without compact[.]safetensors; download a repository first"):
        smet.load_compact(folder / "nothing")
    with pytest.raises(ValueError, match=r"expected a dense model to load into, since .* has no config.json"):
        smet.load_compact(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "no such type"}))
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"expected a configuration that transformers reads .*; pass model="):
        smet.load_compact(folder)
