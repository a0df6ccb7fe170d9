"""Which weight feeds which, as a networkx graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smet_compile.microscope.flow import Flow

if TYPE_CHECKING:
    import networkx


def graph_of(flow: Flow, densities: dict[str, float]) -> networkx.DiGraph[str]:
    """Of the sites, whose densities are given, and of what lies between them."""
    import networkx

    graph: networkx.DiGraph[str] = networkx.DiGraph()
    graph.add_nodes_from(((name, {"kind": "site", "density": density}) for name, density in densities.items()))
    graph.add_edges_from(sorted(flow.feeds()))
    for name in graph:
        if name not in densities:
            graph.nodes[name]["kind"] = name if name in ("input", "output") else "dense"
    return graph
