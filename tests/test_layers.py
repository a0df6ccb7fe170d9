"""Imports point down only: the package keeps to the rules of ``support/rooms.py``, and these find what breaks them."""

from pathlib import Path

import pytest

from tests.support.rooms import ROOMS, violations

ROOT = Path(__file__).parents[1]


def test_imports_point_down_only() -> None:
    assert not violations(ROOT), "\n" + "\n".join(violations(ROOT))


def test_every_room_on_disk_has_a_rule() -> None:
    on_disk = {path.parent.name for path in (ROOT / "smet_compile").glob("*/__init__.py")}
    assert on_disk <= ROOMS.keys()


def make_tree(root: Path, path: str, source: str) -> list[str]:
    """Returns the broken rules of a package that is one file at ``path``, beside a door."""
    for name, text in {"__init__.py": '__all__ = ["sparsify"]', path: source}.items():
        file = root / "smet_compile" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return violations(root)


@pytest.mark.parametrize(
    ("path", "source", "module"),
    [
        ("format/layout.py", "from smet_compile.ops import find_sites", "smet_compile.ops.find_sites"),
        ("format/layout.py", "import numpy", "numpy"),
        ("ops/sites.py", "from smet_compile import convert", "smet_compile.convert"),
        ("ops/sites.py", "from smet_compile import sparsify", "smet_compile.sparsify"),
        ("ops/library.py", "def f():\n    import triton.language", "triton.language"),
        ("convert/rules.py", "from ..passes.verify import x", "smet_compile.passes.verify.x"),
        ("convert/find.py", "import transformers", "transformers"),
        ("passes/fuse.py", "import smet_compile.runtime.manager", "smet_compile.runtime.manager"),
        ("passes/fuse.py", "import runtime", "runtime"),
        ("runtime/manager.py", "from smet_compile.passes import x", "smet_compile.passes.x"),
        ("runtime/manager.py", "from .. import api", "smet_compile.api"),
        ("api.py", "from smet_compile.plan import plan", "smet_compile.plan.plan"),
        ("plan/run.py", "from smet_compile.runtime import manager", "smet_compile.runtime.manager"),
        ("runtime/manager.py", "import_module('smet_compile.pretrain')", "smet_compile.pretrain"),
        ("api.py", "import torch\ntorch._inductor.config.x = 1", "torch._inductor"),
        ("api.py", "from torch import _inductor", "torch._inductor"),
        ("explain.py", "from torch._inductor import config", "torch._inductor.config"),
        ("tracing.py", "import triton", "triton"),
        ("tracing.py", "from smet_compile.ops import find_sites", "smet_compile.ops.find_sites"),
        ("__init__.py", "from smet_compile.pretrain import run", "smet_compile.pretrain.run"),
        ("tools/x.py", "import math", "math"),
        ("../examples/x.py", "from smet_compile.format import Layout", "smet_compile.format.Layout"),
        ("../examples/x.py", "import smet_compile.ops as ops", "smet_compile.ops"),
        ("../examples/x.py", "import smet_compile as smet\nsmet.ops.find_sites(1)", "smet_compile.ops"),
        ("../examples/x.py", "import smet_compile as smet\nsmet._hidden", "smet_compile._hidden"),
    ],
)
def test_a_violation_is_caught(path: str, source: str, module: str, tmp_path: Path) -> None:
    line = len(source.splitlines())
    (found,) = make_tree(tmp_path, path, source)
    assert found.split(";")[0].endswith(f"{Path(path).name}:{line} imports {module}")


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("format/layout.py", "import math\nimport torch.nn\nfrom .blocks import pack"),
        ("ops/kernels/update.py", "import triton\nfrom smet_compile.format import Layout"),
        ("optim/adamw.py", "from smet_compile.ops import find_sites"),
        ("passes/fuse.py", "import torch\nfrom torch._inductor.pattern_matcher import x"),
        ("runtime/manager.py", "import runtime_checks_of_someone_else"),
        ("tracing.py", "from torch._inductor.decomposition import x\nfrom smet_compile.passes import pipeline"),
        ("microscope/recording.py", "from smet_compile.tracing import leave_no_trace"),
        ("api.py", "from smet_compile import convert, passes, optim"),
        ("pretrain/loop.py", "import rich, transformers, smet_compile as smet\nsmet.sparsify"),
        ("__main__.py", "from smet_compile.pretrain import main"),
        ("../examples/x.py", "import torch, smet_compile as smet\nsmet.sparsify(1).weight"),
        ("../examples/x.py", "from smet_compile import sparsify\ntorch.nn.Linear(1, 1)"),
    ],
)
def test_a_near_miss_is_not(path: str, source: str, tmp_path: Path) -> None:
    assert make_tree(tmp_path, path, source) == []


def test_a_violation_says_rule_and_reason(tmp_path: Path) -> None:
    found = make_tree(tmp_path, "ops/library.py", "import triton")
    assert found == [
        "smet_compile/ops/library.py:1 imports triton; only smet_compile/ops/kernels imports triton; "
        "the library imports and runs on machines without a GPU or a compiler"
    ]
