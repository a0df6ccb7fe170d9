"""canonicalize: one form for every product with a weight, and one for every gradient of one.

    bmm(view(x), view(permute(convert(unpack(values)))))  →  view(mm(x, permute(unpack(convert(values)))))
    addmm(b, x, permute(unpack(values)))                  →  the same: it is canonical
    mm(unpack(values), x)                                 →  permute(mm(permute(x), permute(unpack(values))))
    mm(x, permute(unpack(values)[a:b]))                   →  mm(x, permute(unpack(values)))[:, a:b]

    pack(convert(permute(mm(permute(x), gy))))            →  convert(pack(mm(permute(gy), x)))
    pack(mm(permute(gy), x) + mm(permute(hy), y))         →  pack(mm(permute(gy), x)) + pack(mm(permute(hy), y))

Permutations, views, copies and conversions leave the way between a weight and its product: conversions (autocast makes
pairs of them) go to the compact side, where they cost the density of what they cost before. After it the weight is
always the right operand, ``unpack`` or ``permute(unpack)``, and a gradient is ``pack(product(permute(left), right))``.
"""

from __future__ import annotations

from torch import fx

from smet_compile.passes.graph import PassReport
from smet_compile.passes.weight_gradients import canonicalize_gradients
from smet_compile.passes.weight_reads import canonicalize_reads


def canonicalize(graph: fx.Graph) -> PassReport:
    report = PassReport("canonicalize")
    canonicalize_reads(graph, report)
    canonicalize_gradients(graph, report)
    graph.eliminate_dead_code()
    return report
