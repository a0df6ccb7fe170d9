"""Answers without a GPU the questions that inductor asks before it makes CUDA graphs of a compiled step.

A graph uses static inputs in place and copies all others; what it changes has to be static, or the change is lost.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._inductor import compile_fx, cudagraph_utils
from torch._inductor.utils import get_first_incompatible_cudagraph_node, is_cudagraph_unsafe_fx_node
from torch.optim import SGD, Optimizer

import smet_compile as smet
from smet_compile.ops import captures, find_sites, torch_insides
from tests.train_step.setting import Batch, Net, active, batch_of, sparse

NUM_STEPS, EVERY = 6, 4


class Graph(NamedTuple):
    """Describes a compiled graph.

    Args:
        module: the graph. static, mutated: names of the inputs that stay in place, and of those that are changed.
        others: the shapes of the inputs that a CUDA graph would copy.
    """

    module: torch.fx.GraphModule
    is_backward: bool
    static: set[str]
    mutated: set[str]
    others: list[tuple[int, ...]]
    refusal: str | None


def compiled_graphs(step: smet.TrainStep, call: Callable[[], object]) -> list[Graph]:
    """Returns the graphs that inductor compiles during ``call``, as it would for CUDA graphs."""
    graphs: list[Graph] = []

    def inner(module: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        compiled = compile_fx.compile_fx_inner(module, inputs, **options)
        placeholders = module.graph.find_nodes(op="placeholder")
        static = set(options["static_input_idxs"])
        others = [tuple(node.meta["val"].shape) for i, node in enumerate(placeholders) if i not in static]
        refusal = cudagraph_utils.check_for_mutation_ignore_cuda_graph_managed_tensor(
            module, compiled.mutated_inputs, compiled.mutated_input_idxs, list(static)
        )
        named = [{placeholders[i].name for i in indices} for indices in (static, compiled.mutated_input_idxs)]
        graphs.append(Graph(module, bool(options.get("is_backward")), *named, others, refusal))
        return compiled

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graph_options = {"triton.cudagraphs": True, "fx_graph_cache": False}
        return compile_fx.compile_fx(module, inputs, inner_compile=inner, config_patches=graph_options)

    step.compile(backend=backend)
    with torch._functorch.config.patch(enable_autograd_cache=False):
        call()
    return graphs


def single(step: int) -> Batch:
    return {key: value.float() for key, value in batch_of(step).items()}


def train(step: smet.TrainStep, manager: smet.TopologyManager) -> list[Tensor]:
    losses = []
    for number in range(NUM_STEPS):
        losses.append(step(single(number)))
        manager.step()
    return losses


def make(block: int, grow: str, make_optimizer: Callable[..., Optimizer] = active, drop: Any = "magnitude") -> Any:
    torch.manual_seed(0)
    model = sparse(Net, block).float()
    optimizer = make_optimizer(model)
    manager = smet.TopologyManager(
        model, optimizer, total_steps=100, every=EVERY, grow=grow, drop=drop, schedule="cosine"
    )
    return smet.compile_train_step(model, optimizer), manager


def coded(model: Any) -> Optimizer:
    return smet.ActiveAdamW(model, lr=torch.tensor(1e-2), moment_dtype="int8")


@pytest.mark.filterwarnings("ignore:TopologyManager")
@pytest.mark.parametrize(
    ("block", "grow", "drop", "make_optimizer"),
    [(4, "gradient", "saliency", active), (1, "random", "magnitude", coded)],
    ids=["tiles", "single_weights"],
)
def test_everything_but_batch_and_tangent_stays_in_place(block: int, grow: str, drop: str, make_optimizer: Any) -> None:
    """Also in the second graph, for the step before an update, in which gradients are collected."""
    step, manager = make(block, grow, make_optimizer, drop)
    graphs = compiled_graphs(step, lambda: train(step, manager))
    assert [graph.is_backward for graph in graphs] == [False, True] * (2 if grow == "gradient" else 1)
    shapes = [tuple(value.shape) for value in single(0).values()]
    for graph in graphs:
        assert sorted(graph.others) == (sorted(shapes) if not graph.is_backward else [()])
        assert graph.mutated <= graph.static and bool(graph.mutated) == graph.is_backward
        assert graph.refusal is None
        assert get_first_incompatible_cudagraph_node(graph.module) is None


def test_updates_of_torch_optimizers_stay_outside_of_graphs() -> None:
    """They read their rate on the host, as torch's own steps do without ``capturable``."""
    step, manager = make(1, "random", lambda model: SGD(model.parameters(), 0.1, momentum=0.9))
    _, backward = compiled_graphs(step, lambda: train(step, manager))
    unsafe = [node for node in backward.module.graph.nodes if is_cudagraph_unsafe_fx_node(node)]
    assert [node.target for node in unsafe] == [torch.ops.smet.torch_optim_.default] * 2


def test_ops_of_the_library_may_be_captured() -> None:
    names = ("unpack", "pack", "masked_matmul", "sampled_matmul", "update_", "sampled_update_", "collect_gradient")
    ops = {name: getattr(torch.ops.smet, name).default for name in (*names, "torch_optim_")}
    assert {name for name, op in ops.items() if torch.Tag.cudagraph_unsafe in op.tags} == {"torch_optim_"}


@pytest.mark.filterwarnings("ignore:TopologyManager")
def test_reduce_overhead_equals_the_default() -> None:
    results = []
    for mode in (None, "reduce-overhead"):
        step, manager = make(4, "random")
        step.compile(mode=mode)
        results.append((torch.stack(train(step, manager)), dict(step.model.state_dict())))
    (losses, weights), (other_losses, other_weights) = results
    assert torch.equal(losses, other_losses)
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


@pytest.mark.usefixtures("uncompiled")
def test_what_moves_is_marked_again() -> None:
    step, _ = make(4, "random")
    step(single(0))
    optimizer = step.optimizer
    optimizer.load_state_dict(optimizer.state_dict())
    states = [state for values in (site.values for site in step.sites) for state in (optimizer.state[values],)]
    step(single(1))
    for state in states:
        assert all(hasattr(tensor, "_dynamo_static_input_type") for tensor in state.values())


class TestPretendedCapture:
    """On a CPU nothing is captured; here the package is told so."""

    @pytest.fixture
    def begin(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
        return lambda: monkeypatch.setattr(captures, "is_capturing", lambda device: True)

    @pytest.mark.usefixtures("uncompiled")
    @pytest.mark.parametrize("make_optimizer", [active, lambda model: SGD(model.parameters(), 0.1, momentum=0.9)])
    def test_state_cannot_be_made_in_it(self, begin: Callable[[], None], make_optimizer: Any) -> None:
        step, _ = make(4, "random", make_optimizer)
        before = {name: tensor.clone() for name, tensor in step.model.state_dict().items()}
        begin()
        with pytest.raises(RuntimeError, match="CUDA graph: expected the optimizer's state before the capture"):
            step(single(0))
        assert not step.optimizer.state
        assert all(torch.equal(before[name], tensor) for name, tensor in step.model.state_dict().items())

    def test_a_topology_has_to_be_checked_before(self, begin: Callable[[], None]) -> None:
        (site, *_) = find_sites(sparse()).values()
        copied = site.compact.topology.clone()
        begin()
        with pytest.raises(RuntimeError, match="expected a topology that was checked before the capture"):
            torch.ops.smet.unpack(site.values, copied, site.compact.lists, site.layout.text, None, None, False)

    @pytest.mark.usefixtures("uncompiled")
    def test_weights_that_a_graph_updates_are_not_moved_in_silence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A warning comes once for each capture, when a state is loaded or the number of blocks changes."""
        step, _ = make(1, "random")
        optimizer, (site, *_) = step.optimizer, step.sites
        step(single(0))
        optimizer.load_state_dict(optimizer.state_dict())  # no graph, no warning
        for move in (
            lambda: optimizer.load_state_dict(optimizer.state_dict()),
            lambda: site.compact.resize(site.values, ~site.mask()),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(captures, "is_capturing", lambda device: True)
                captures.note([site.values])
            with pytest.warns(UserWarning, match="a captured CUDA graph updates 1 weights that get new memory"):
                move()
            move()

    @pytest.mark.usefixtures("uncompiled")
    def test_a_captured_step_notes_its_weights(self, begin: Callable[[], None]) -> None:
        step, _ = make(1, "random")
        step(single(0))
        begin()
        step(single(1))
        with pytest.warns(UserWarning, match="updates 2 weights"):
            captures.warn_of_new_memory(site.values for site in step.sites)

    @pytest.mark.usefixtures("uncompiled")
    def test_a_manager_does_not_count_it(self, begin: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch_insides, "_warned", set())
        step, manager = make(1, "random")
        step(single(0))
        manager.step()
        begin()
        with pytest.warns(UserWarning, match="replays run no hooks"):
            step(single(1))
        manager.step()
        assert manager.num_steps == 1

    def test_a_number_that_is_given_in_it_becomes_part_of_it(self, begin: Callable[[], None]) -> None:
        """Later steps outside of the graph read the tensor that was there before."""
        rates = smet.optim.rates.Rates()
        cpu, params = torch.device("cpu"), list[Tensor]()
        first = rates.rate({"lr": 0.1, "params": params}, cpu)
        begin()
        captured = rates.rate({"lr": 0.2, "params": params}, cpu)
        assert captured is not first and (first.item(), captured.item()) == (0.1, 0.2)

    def test_chunks_do_not_follow_a_topology(self, begin: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
        """Rows of chunks follow from the topology at capture, so there is one chunk, with the same result."""
        monkeypatch.setenv("SMET_COMPILE_KERNEL", "torch")
        monkeypatch.setattr("smet_compile.ops.plain._WEIGHTS_IN_CACHE", 16)
        models = [sparse().bfloat16() for _ in range(2)]
        models[1].load_state_dict(models[0].state_dict())
        optimizers = [smet.ActiveLion(model, lr=1e-2, moment_dtype="int8") for model in models]
        for number in range(3):
            for model in models:
                torch.manual_seed(number)
                for parameter in model.parameters():
                    parameter.grad = torch.randn_like(parameter)
            optimizers[0].step()
            with pytest.MonkeyPatch.context() as patch:
                if number:
                    patch.setattr(captures, "is_capturing", lambda device: True)
                optimizers[1].step()
        for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(one, other)
            for name, tensor in optimizers[0].state[one].items():
                assert torch.equal(tensor, optimizers[1].state[other][name])
