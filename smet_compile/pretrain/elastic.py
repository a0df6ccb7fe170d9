"""Trains a run whose ranks and layout change while it goes on: `pretrain --elastic`, `join` and `switch`."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import distributed, nn

import smet_compile as smet
from smet_compile.distributed import Blueprint, Change, LostRun, World, WorldOptions, ask, begin_group
from smet_compile.pretrain.config import DTYPES, METHODS, RunConfig
from smet_compile.pretrain.console import DeadUnitWarning, open_progress, print_plainly
from smet_compile.pretrain.data import open_data
from smet_compile.pretrain.folder import RunFolder, RunLock, write_atomically
from smet_compile.pretrain.loop import Run, StepLoop, Stop, explaining_failed_writes, open_console, restore_run
from smet_compile.pretrain.mesh_text import MeshText, fitting_mesh, parse_mesh
from smet_compile.pretrain.metrics import MetricsLog, NoLog, is_finished, mend_metrics
from smet_compile.pretrain.report import write_report
from smet_compile.pretrain.tokenizer import open_tokenizer
from smet_compile.pretrain.trackers import expect_tracker, open_log
from smet_compile.pretrain.training import (
    Training,
    TwoCallStep,
    build_model,
    slabs_of,
    sparse_parts,
    sparsify_as,
)
from smet_compile.pretrain.world import World as Ranks
from smet_compile.pretrain.world import choose_device, cut_layers, shard_blocks

_LOCK_SECONDS = 60.0
"""The process that wrote the run's files before gives them up at once; one that was killed has lost them."""


class ElasticRun:
    """Holds the part of one process in a run, which may be none.

    Args:
        stop: called after each step; where it returns True the run saves and ends early.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, stop: Stop, console: Any = None) -> None:
        if METHODS[config.method] is None:
            raise ValueError(f"--elastic: expected a sparse method, got {config.method}; pass --method smet")
        self._config, self._folder, self._stop = config, folder, stop
        self._given_console = console
        expect_tracker(config.log)
        self._tokenizer = open_tokenizer(config.tokenizer)
        self._data = open_data(config, self._tokenizer)
        self._files = ExitStack()
        self._peak_rates: list[float] = []
        self._loop: StepLoop | None = None
        self.is_first = False

    def begin(self) -> bool:
        """Trains on the ranks of the default process group; returns whether the run is finished."""
        size, shard = distributed.get_world_size(), self._config.shard
        mesh, why_not = fitting_mesh(self._config, shard, size)
        self._world = World(self._blueprint(), mesh=mesh.table(range(size)), names=mesh.names, options=self._options())
        return self._train(why_not)

    def join(self, address: str) -> bool:
        """Takes part in a run that goes on; returns whether it is finished."""
        self._world = World.join(self._blueprint(), address, self._options())
        return self._train("")

    def _options(self) -> WorldOptions:
        wish_file = str((self._folder.path / "wish.json").absolute())
        return WorldOptions(keep_source=True, wish_file=wish_file)

    def _blueprint(self) -> Blueprint:
        return Blueprint(self._build, self._optimize, initialize=self._initialize)

    def _build(self, mesh: Any) -> nn.Module:
        config, names = self._config, mesh.mesh_dim_names
        mesh_text(mesh).check(config)
        model = build_model(config, self._tokenizer.vocab_size, "meta")
        slabs = slabs_of(config, model)
        if "tp" in names:
            cut_layers(model, mesh["tp"])
        sparsify_as(config, model, slabs)
        others = tuple(name for name in names if name != "tp")
        if not others:
            return model
        return shard_blocks(model, mesh if others == names else mesh[others], DTYPES[config.dtype])

    def _optimize(self, model: nn.Module) -> Any:
        optimizer, manager = sparse_parts(self._config, model)
        self._peak_rates = [group["lr"] for group in optimizer.param_groups]
        return optimizer, manager, {"data": self._data.train}

    def _initialize(self, model: nn.Module) -> None:
        smet.materialize(model, seed=self._config.seed, device=self._config.device)

    def _train(self, why_not: str) -> bool:
        first, finished = 0, False
        self._world.on_change = self._changes
        with self._files, explaining_failed_writes(self._folder):
            if self._world.run is not None:
                run = self._attach()
                if run.world.on_first(lambda: is_finished(self._folder.metrics)):
                    self._world.end()
                    run.world.on_first(lambda: write_report(self._folder))
                    return True
                first = restore_run(run)
                run.world.on_first(lambda: self._start_files(run, first, why_not))
                self._open_loop(run, first)
            try:
                finished = self._take_steps(first)
            except LostRun as error:
                raise ValueError(f"{error}: {self._folder.resume_command}") from error
            if finished and self._loop is not None:
                self._loop.end(first)
            if finished and self.is_first:
                write_report(self._folder)
        return finished

    def _take_steps(self, first: int) -> bool:
        """Takes the steps of this process; returns whether the run has reached its end."""
        for step in self._world.steps(self._config.steps, start=first, stop=self._stop):
            assert self._loop is not None
            if self._loop.take(step + 1, self._stop):
                return False
        return not self._stop()

    def _start_files(self, run: Run, first: int, why_not: str) -> None:
        mend_metrics(self._folder.metrics, first, run.training.manager.history if run.training.manager else ())
        if not self._folder.config.exists():
            self._folder.create(self._config)
        run.lock.keep_folder()
        mesh, size = self._mesh, self._world.num_processes
        console = open_console(run.world, self._given_console)
        print_plainly(console, f"{mesh} on {mesh.size} of {size} ranks, from step {first}, in {self._folder.path}")
        if why_not:
            print_plainly(console, f"not as the run was: {why_not}")

    def _attach(self) -> Run:
        """Returns this process's part of the run; on the first rank, locks its folder."""
        own, config = self._world.run, self._config
        assert own is not None
        self._mesh = mesh_text(own.mesh)
        groups = tuple(own.mesh.get_group(dim) for dim in range(own.mesh.ndim))
        flat = own.mesh.mesh.flatten().tolist()
        world = Ranks(
            flat.index(distributed.get_rank()), len(flat), self._mesh.replicas, config.device, self._mesh.tp, groups
        )
        self.is_first = world.is_first
        lock = RunLock(self._folder.path, "--out")
        with world.together():
            if world.is_first:
                _enter_when_free(self._files, lock)
        training = Training(own.model, own.optimizer, own.manager, TwoCallStep(own.model, own.optimizer, config), world)
        training.peak_rates = self._peak_rates
        return Run(world, self._folder, lock, config, self._tokenizer, self._data, training)

    def _open_loop(self, run: Run, first: int) -> None:
        """Opens the log and the display, on the first rank, and says where others find the run."""
        console = open_console(run.world, self._given_console)
        opened = open_log(self._folder, self._config, first) if self.is_first else NoLog()
        log: MetricsLog = self._files.enter_context(opened)
        progress = self._files.enter_context(open_progress(console, first, self._config.steps))
        self._loop = StepLoop(run, first, log, progress, DeadUnitWarning(console))
        if self.is_first:
            about = {"address": self._world.address, "layout": str(self._mesh), "ranks": own_ranks(self._world)}
            write_atomically(self._folder.path / "world.json", lambda path: path.write_text(json.dumps(about) + "\n"))

    def _changes(self, change: Change) -> None:
        """Gives up this process's files after a switch, and opens those of its new part."""
        self._files.close()
        self._loop, self.is_first = None, False
        if self._world.run is None:
            return
        run = self._attach()
        self._open_loop(run, change.step)
        if self.is_first:
            self._folder.create(replace(self._config, shard=str(self._mesh)))
            what = "stays at" if change.refusal else "went back to" if change.went_back else "switched to"
            why = f", since the switch was refused: {change.refusal}" * bool(change.refusal)
            console = open_console(run.world, self._given_console)
            print_plainly(console, f"{what} {self._mesh} after {change.step} steps, in {change.pause:.2f} s{why}")


def own_ranks(world: World) -> list[int]:
    """Returns the numbers of the processes that train."""
    return [] if world.mesh is None else world.mesh.members


def mesh_text(mesh: Any) -> MeshText:
    """Says how the ranks of a mesh lie."""
    sizes = dict(zip(mesh.mesh_dim_names, mesh.mesh.shape, strict=True))
    return MeshText(sizes.get("replicate", 1), sizes.get("shard", 1), sizes.get("tp", 1))


def _enter_when_free(files: ExitStack, lock: RunLock) -> None:
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            files.enter_context(lock)
            return
        except ValueError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def as_it_was(config: RunConfig, folder: RunFolder) -> RunConfig:
    """Returns the run's options, with the layout that it had last where the folder holds it.

    Raises:
        ValueError: the folder holds a run with other options.
    """
    parse_mesh("--shard", config.shard, None)
    if not folder.config.exists():
        folder.expect_free()
        return config
    found = folder.open()
    if replace(found, shard=config.shard) != config:
        raise ValueError(
            f"--out: expected a folder without a run, or with this one, got {folder.path}, which holds a run with "
            "other options; choose another folder"
        )
    return found


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Joins the ranks that torchrun started, if that is not done."""
    choose_device(device)
    if not distributed.is_initialized():
        if "RANK" not in os.environ:
            raise ValueError("--elastic: expected processes that torchrun started, got one alone; start it by torchrun")
        begin_group("nccl" if torch.device(device).type == "cuda" else "gloo")
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


def pretrain_elastic(config: RunConfig, folder: RunFolder, stop: Stop, console: Any = None) -> tuple[bool, bool]:
    """Begins a run on the ranks that torchrun started, or goes on with it where the folder holds it.

    Returns whether it is finished, and whether this process is the one that says so.
    """
    run = ElasticRun(as_it_was(config, folder), folder, stop, console)
    with process_group(config.device):
        return run.begin(), run.is_first


def join_run(folder: RunFolder, stop: Stop) -> tuple[bool, bool]:
    """Takes part in a run that goes on."""
    config = folder.open("RUN")
    run = ElasticRun(config, folder, stop)
    choose_device(config.device)
    return run.join(address_of(folder)), run.is_first


def switch_run(folder: RunFolder, layout: str, ranks: list[int] | None, seconds: float) -> str:
    """Asks a run for another layout, and returns what became of it.

    Raises:
        ValueError: it cannot lie so, or the wish was refused. TimeoutError: nothing was said in so many seconds.
    """
    config = folder.open("RUN")
    mesh = parse_mesh("LAYOUT", layout, None if ranks is None else len(ranks))
    mesh.check(config)
    if ranks is not None and len(ranks) != mesh.size:
        raise ValueError(f"--ranks: expected {mesh.size} ranks for {mesh}, got {ranks}; pass as many")
    members = sorted(ranks) if ranks is not None else list(range(mesh.size))
    answer = ask(address_of(folder), mesh.table(members), names=mesh.names, seconds=seconds)
    if answer.startswith("refused"):
        raise ValueError(f"LAYOUT: {answer.removeprefix('refused: ')}")
    return answer


def address_of(folder: RunFolder) -> str:
    """Returns the address at which the processes of a run talk to each other.

    Raises:
        ValueError: the folder holds no elastic run.
    """
    path = folder.path / "world.json"
    try:
        address: str = json.loads(path.read_text())["address"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"RUN: expected the folder of a run that was begun with --elastic, got {folder.path}; begin it so"
        ) from error
    return address
