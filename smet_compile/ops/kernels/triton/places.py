"""Lists where single weights lie, for the noise of their rounding: a thread that holds an entry must know its position.

A position is 16 bits of place within a span of 2^16 dense weights, and the number of the span. The spans of all entries
follow from that of the first in a piece, since entries are in order of position.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from smet_compile.format import Topology, positions_of
from smet_compile.ops.kernels.triton.adamw_step import ENTRIES_OF_A_PIECE
from smet_compile.ops.law import SPAN


class Places(NamedTuple):
    """Holds the positions of a parameter's single weights.

    Args:
        places: (N,) int16, read as unsigned: the position of each modulo 2^16. spans: (pieces,) int32: the span of the
            first weight in each piece of ENTRIES_OF_A_PIECE.
    """

    places: Tensor
    spans: Tensor


def places_of(topology: Topology) -> Places:
    """Returns the places of single weights. They are made once, take two bytes a weight, and live with the topology."""
    return topology.constant("places of single weights", lambda: _make(topology))


def _make(topology: Topology) -> Places:
    positions = positions_of(topology.mask())
    return Places(positions.to(torch.int16), (positions[:: ENTRIES_OF_A_PIECE.value] // SPAN).int())
