"""Runs one compiled step in its own process, and prints as JSON what caches and passes did and which ops ran."""

import json

import torch
import torch._functorch.config
import torch._inductor.config
from torch._dynamo.utils import counters

from smet_compile.passes import pipeline
from tests.passes.compiled import randn
from tests.passes.test_inductor import linear_only, ops_of


def main() -> None:
    torch.manual_seed(0)
    num_passes = 0
    run = pipeline.run_passes

    def counted(*args: object) -> object:
        nonlocal num_passes
        num_passes += 1
        return run(*args)

    pipeline.run_passes = counted
    torch._inductor.config.fx_graph_cache = True
    torch._functorch.config.enable_autograd_cache = True
    model, x = linear_only(), randn(5, 16)
    ops = ops_of(torch.compile(model), model, x)
    found = counters["aot_autograd"]
    hits, misses = found["autograd_cache_hit"], found["autograd_cache_miss"]
    print(json.dumps({"hits": hits, "misses": misses, "passes": num_passes, "ops": sorted(ops)}))


if __name__ == "__main__":
    main()
