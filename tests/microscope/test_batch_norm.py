"""Which sites feed batch norm: every pattern that a network has, and near misses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.microscope.batch_norm import EVALUATED, NO_BATCH_NORM, UNUSED, find_uses
from smet_compile.microscope.recording import record_forward
from smet_compile.ops import find_sites

IMAGES, ROWS, WORDS = (4, 6, 8, 8), (4, 6), (4, 5, 6)


class Net(nn.Module):
    """Has convolutions and linears of six features, norms, and a forward that is given."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(6, 6, 1)
        self.linear, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm, self.norm2, self.norm1 = nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.BatchNorm1d(6)
        self.tokens, self.flat, self.frozen = nn.BatchNorm1d(5), nn.BatchNorm1d(384), nn.BatchNorm2d(6).eval()
        self.wide, self.flats = nn.BatchNorm2d(12), nn.BatchNorm1d(768)
        self.layer, self.group = nn.LayerNorm(6), nn.GroupNorm(2, 6)
        self.apply_to = forward

    def forward(self, x: Tensor) -> Any:
        return self.apply_to(self, x)


def pre_activation(net: Net, x: Tensor) -> Tensor:
    """Is two blocks: the branches end in sums, of which batch norm sees one and the next sum sees the other."""
    x = x + net.other(torch.relu(net.norm(net.conv(x))))
    return net.norm2(x + net.grouped(x)).relu()


def post_activation(net: Net, x: Tensor) -> Tensor:
    return torch.relu(net.norm2(net.other(torch.relu(net.norm(net.conv(x))))) + x)


def densely(net: Net, x: Tensor) -> Tensor:
    """Is two dense layers, of which several batch norms read the first, and a concatenation of concatenations."""
    x = torch.cat((x, net.conv(x)), 1)
    first, second = net.wide(x).relu().chunk(2, 1)
    x = torch.cat((x, net.grouped(first), torch.cat((net.other(second), first), 1)), 1)
    return net.norm(x[:, 6:12]) + F.batch_norm(x, None, None, training=True).relu()[:, :6]


CORRECTED: dict[str, tuple[Callable[..., Any], tuple[int, ...], set[str]]] = {
    "conv, norm": (lambda net, x: net.norm(net.conv(x)).relu(), IMAGES, {"conv"}),
    "grouped, norm": (lambda net, x: net.norm(net.grouped(x)).relu(), IMAGES, {"grouped"}),
    "linear, norm": (lambda net, x: net.norm1(net.linear(x)).tanh(), ROWS, {"linear"}),
    "transposed words": (lambda net, x: net.norm1(net.linear(x).transpose(1, 2)).tanh(), WORDS, {"linear"}),
    "flattened words": (lambda net, x: net.norm1(net.linear(x).flatten(0, 1)).tanh(), WORDS, {"linear"}),
    "channels last": (
        lambda net, x: net.norm(net.linear(x.movedim(1, -1)).permute(0, 3, 1, 2)).relu(),
        IMAGES,
        {"linear"},
    ),
    "flattened image": (lambda net, x: net.flat(net.conv(x).flatten(1)).relu(), IMAGES, {"conv"}),
    "converted": (lambda net, x: net.norm(net.conv(x).double().float()).relu(), IMAGES, {"conv"}),
    "cloned": (
        lambda net, x: net.norm(net.conv(x).clone().contiguous(memory_format=torch.channels_last)).relu(),
        IMAGES,
        {"conv"},
    ),
    "functional": (
        lambda net, x: F.relu(F.batch_norm(net.conv(x), None, None, training=True)),
        IMAGES,
        {"conv"},
    ),
    "by its weight": (lambda net, x: net.norm(F.conv2d(x, net.conv.weight, padding=1)).relu(), IMAGES, {"conv"}),
    "in place afterwards": (lambda net, x: net.norm(net.conv(x)).relu_().mul_(2), IMAGES, {"conv"}),
    "twice": (lambda net, x: net.norm(net.conv(net.norm2(net.conv(x)).relu())).relu(), IMAGES, {"conv"}),
    "post-activation": (post_activation, IMAGES, {"conv", "other"}),
    "pre-activation": (pre_activation, IMAGES, {"conv"}),
    "sum with what no site made": (lambda net, x: net.norm(x + net.conv(x)).relu(), IMAGES, {"conv"}),
    "sum in place": (lambda net, x: net.norm(net.conv(x).add_(x)).relu(), IMAGES, {"conv"}),
    "concatenated": (lambda net, x: net.wide(torch.cat((x, net.conv(x)), 1)).relu(), IMAGES, {"conv"}),
    "concatenated, a part": (lambda net, x: net.norm(torch.cat((net.conv(x), x), -3)[:, :6]).relu(), IMAGES, {"conv"}),
    "two sites concatenated": (
        lambda net, x: net.wide(torch.cat((net.conv(x), net.grouped(x)), 1)).relu(),
        IMAGES,
        {"conv", "grouped"},
    ),
    "densely connected": (densely, IMAGES, {"conv", "grouped", "other"}),
    "concatenated and summed apart": (
        lambda net, x: net.wide(torch.cat((net.conv(x), x), 1) + torch.cat((x, net.other(x)), 1)).relu(),
        IMAGES,
        {"conv", "other"},
    ),
    "concatenated with nothing": (
        lambda net, x: net.norm(torch.cat((torch.empty(0), net.conv(x)), 1)).relu(),
        IMAGES,
        {"conv"},
    ),
    "concatenated along images with itself": (
        lambda net, x: net.norm(torch.cat((net.conv(x), net.conv(x + 1)))).relu(),
        IMAGES,
        {"conv"},
    ),
    "concatenated and flattened": (
        lambda net, x: net.flats(torch.cat((net.conv(x), x), 1).flatten(1)).relu(),
        IMAGES,
        {"conv"},
    ),
}
NOT_CORRECTED: dict[str, tuple[Callable[..., Any], tuple[int, ...], str]] = {
    "layer norm": (lambda net, x: net.layer(net.linear(x)), ROWS, "linear: read by a layer norm"),
    "group norm": (lambda net, x: net.group(net.conv(x)), IMAGES, "conv: read by a group norm"),
    "activation": (lambda net, x: net.norm(net.conv(x).relu()), IMAGES, "conv: read by a ReLU without batch norm"),
    "activation in place": (lambda net, x: net.norm(net.conv(x).relu_()), IMAGES, "conv: read by a ReLU without"),
    "also an activation": (
        lambda net, x: net.norm(y := net.conv(x)) + y.sigmoid(),
        IMAGES,
        "conv: read by sigmoid without batch norm",
    ),
    "also returned": (lambda net, x: (net.norm(y := net.conv(x)), y), IMAGES, "conv: returned by the model"),
    "also without": (
        lambda net, x: net.norm(net.conv(x)).relu() + net.conv(x).relu(),
        IMAGES,
        "conv: read by a ReLU without batch norm",
    ),
    "evaluation": (lambda net, x: net.frozen(net.conv(x)), IMAGES, f"conv: {EVALUATED}"),
    "tokens as channels": (lambda net, x: net.tokens(net.linear(x)), WORDS, "linear: several of its rows together"),
    "rows as batch": (
        lambda net, x: net.norm(net.conv(x).transpose(0, 1)[:4].repeat(1, 2, 1, 1)[:, :6]),
        IMAGES,
        "conv: read by repeat without",
    ),
    "two sites": (
        lambda net, x: net.norm(net.conv(x) + net.other(x)),
        IMAGES,
        "conv: in a sum with the outputs of other sites (other.weight)",
    ),
    "scaled": (lambda net, x: net.norm(2 * net.conv(x)), IMAGES, "conv: read by mul without"),
    "concatenated, and another reader": (
        lambda net, x: net.wide(y := torch.cat((net.conv(x), net.norm(net.other(x))), 1)) + y.sigmoid(),
        IMAGES,
        "conv: read by sigmoid without batch norm",
    ),
    "concatenated, one half without": (
        lambda net, x: (lambda a, b: net.norm(a) + b.relu())(*torch.cat((net.other(x), net.conv(x)), 1).chunk(2, 1)),
        IMAGES,
        "conv: read by a ReLU without batch norm",
    ),
    "concatenated along images": (
        lambda net, x: net.norm(torch.cat((net.conv(x), x))),
        IMAGES,
        "conv: normalizes its rows together with what others made",
    ),
    "concatenated along images with another": (
        lambda net, x: net.norm(torch.cat((net.conv(x), net.other(x)), 0)),
        IMAGES,
        "conv: normalizes its rows together with what others made",
    ),
    "concatenated along positions": (
        lambda net, x: net.norm(torch.cat((net.conv(x), x), -1)),
        IMAGES,
        "conv: normalizes its rows together with what others made",
    ),
    "concatenated along tokens, which are channels": (
        lambda net, x: net.norm1(torch.cat((net.linear(x), x[:, :1]), 1)),
        WORDS,
        "linear: batch norm normalizes several of its rows together",
    ),
    "concatenated, for evaluation": (
        lambda net, x: net.wide.eval()(torch.cat((net.conv(x), x), 1)) + net.norm(x).repeat(1, 2, 1, 1),
        IMAGES,
        f"conv: {EVALUATED}",
    ),
    "concatenated, for layer norm": (
        lambda net, x: net.norm1(x) + F.layer_norm(torch.cat((net.linear(x), x), 1), (12,))[:, :6],
        ROWS,
        "linear: read by a layer norm",
    ),
    "concatenated and returned": (
        lambda net, x: (net.wide(y := torch.cat((net.conv(x), x), 1)), y),
        IMAGES,
        "conv: returned by the model",
    ),
    "concatenated and summed with another": (
        lambda net, x: net.wide(torch.cat((net.conv(x), x), 1) + torch.cat((net.other(x), x), 1)),
        IMAGES,
        "conv: in a sum with the outputs of other sites (other.weight)",
    ),
    "a row summed with another of its own": (
        lambda net, x: net.norm(torch.cat([(y := net.conv(x))[:, 3:], y[:, :3]], 1) + y),
        IMAGES,
        "conv: batch norm normalizes several of its rows together",
    ),
    "standardized weight": (
        lambda net, x: net.norm(F.conv2d(x, net.conv.weight - net.conv.weight.mean(), padding=1)),
        IMAGES,
        "conv: the weight is read by mean",
    ),
    "weight decay by hand": (
        lambda net, x: net.norm(net.conv(x)) + net.conv.weight.square().sum(),
        IMAGES,
        "conv: the weight is read by pow",
    ),
    "transposed convolution": (lambda net, x: net.norm(net.up(x)), IMAGES, "up: a row is no output"),
    "weight on the left": (
        lambda net, x: net.norm1((net.linear.weight @ x.T).T),
        ROWS,
        "linear: the weight is read by mm",
    ),
    "no norm": (lambda net, x: net.second(net.linear(x).tanh()), ROWS, "linear: read by tanh"),
    "unread": (lambda net, x: (net.conv(x), x)[1], IMAGES, f"conv: {NO_BATCH_NORM}"),
    "unused": (lambda net, x: x + 1, IMAGES, f"conv: {UNUSED}"),
    "broadcast": (
        lambda net, x: net.norm(net.conv(x).mean((2, 3), keepdim=True) + x),
        IMAGES,
        "conv: read by mean without",
    ),
}


def reasons(net: nn.Module, *example: Tensor) -> dict[str, str]:
    smet.sparsify(net, 0.5, include=["*conv*", "*other*", "*grouped*", "*up*", "*linear*", "*second*"])
    sites = find_sites(net)
    names = {name: site for name, p in net.named_parameters() for site in sites.values() if site.values is p}
    return find_uses(record_forward(net, example, {}), names).reasons


@pytest.mark.parametrize("name", list(CORRECTED))
def test_found(name: str) -> None:
    forward, shape, expected = CORRECTED[name]
    found = reasons(Net(forward), torch.randn(shape))
    assert {site.removesuffix(".weight") for site, reason in found.items() if not reason} == expected, found


@pytest.mark.parametrize("name", list(NOT_CORRECTED))
def test_near_misses(name: str) -> None:
    forward, shape, expected = NOT_CORRECTED[name]
    site, _, text = expected.partition(": ")
    found = reasons(Net(forward), torch.randn(shape))
    assert text in found[f"{site}.weight"], found


def test_last_convolutions_of_pre_activation_branches() -> None:
    found = reasons(Net(pre_activation), torch.randn(IMAGES))
    assert "in a sum with the outputs of other sites (grouped.weight)" in found["other.weight"]
    assert "in a sum with the outputs of other sites (other.weight)" in found["grouped.weight"]


def test_a_forward_that_looks_at_its_data() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.norm(net.conv(x) if float(x.sum()) > 0 else net.other(x)).relu()

    found = reasons(Net(forward), torch.ones(IMAGES))
    assert found["conv.weight"] == "" and found["other.weight"] == UNUSED


def test_autocast() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return net.norm(net.conv(x)).relu() + net.norm1(net.linear(x.mean((2, 3))))[..., None, None]

    found = reasons(Net(forward), torch.randn(IMAGES))
    assert found["conv.weight"] == found["linear.weight"] == ""


def test_counts_batch_norms() -> None:
    net = Net(lambda net, x: net.frozen(net.norm(net.conv(x))))
    smet.sparsify(net, 0.5, include=["conv.weight"])
    (site,) = find_sites(net).values()
    use = find_uses(record_forward(net, (torch.randn(IMAGES),), {}), {"conv.parametrizations.weight.original": site})
    assert (use.num_training, use.num_evaluated) == (1, 1)


class Dense(nn.Module):
    """Puts what a convolution makes beside its input, summed with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 64, 1), nn.BatchNorm2d(67)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.cat((x, self.conv(x) + self.conv(x)), 1)).relu()


@pytest.mark.parametrize("make", [lambda: nn.Sequential(nn.Conv2d(3, 64, 1), nn.BatchNorm2d(64), nn.ReLU()), Dense])
def test_large_images_take_no_memory(make: Callable[[], nn.Module]) -> None:
    """The rows of an output are repeated without a copy, so that an example may be as large as a batch is."""
    net = smet.sparsify(make(), 0.5, include=["*"])
    with torch.device("meta"):
        images = torch.empty(4096, 3, 1024, 1024)
    (site,) = find_sites(net).values()
    (name,) = (name for name, p in net.named_parameters() if p is site.values)
    use = find_uses(record_forward(net, (images,), {}), {name: site})
    assert list(use.reasons.values()) == [""]
