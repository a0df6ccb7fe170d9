"""What a run has explored: which blocks were ever active, which were grown last. One bit each, on the CPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from smet_compile.format import count_active, pack_bits, spare_bits
from smet_compile.ops import Site
from smet_compile.ops.loaded import check_keys, kind_of


class Trace:
    """Bits per block of every site, beside the topology."""

    def __init__(self, sites: dict[str, Site]) -> None:
        self._sites = sites
        self._explored = {name: site.compact.topology.cpu().clone() for name, site in sites.items()}
        self._grown: dict[str, Tensor] = {}

    def record(self, name: str, active: Tensor, grown: Tensor) -> tuple[float | None, float]:
        """Takes in the masks after an update. Returns the share of the blocks grown at the update before that
        are still active (None at the first update), and the share of all blocks that was ever active."""
        active_bits = pack_bits(active).cpu()
        survival = None
        if name in self._grown and count_active(self._grown[name]) > 0:
            survival = count_active(self._grown[name] & active_bits) / count_active(self._grown[name])
        self._grown[name] = pack_bits(grown).cpu()
        self._explored[name] |= active_bits
        return survival, count_active(self._explored[name]) / self._sites[name].layout.num_blocks

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {"explored": dict(self._explored), "grown": dict(self._grown)}

    def check_state_dict(self, state: Any) -> None:
        """Raises ValueError where ``state`` is not that of these weights."""
        check_keys("trace", state, ("explored", "grown"))
        for part in ("explored", "grown"):
            if not isinstance(state[part], dict):
                raise ValueError(f"trace.{part}: expected a dict of bits, got {kind_of(state[part])}")
        for name in self._sites.keys() ^ state["explored"].keys() | state["grown"].keys() - self._sites.keys():
            raise ValueError(f"{name}: expected the topology history of the same weights, got that of other ones")
        for part in ("explored", "grown"):
            for name, bits in state[part].items():
                self._check_bits(name, part, bits)

    def _check_bits(self, name: str, part: str, bits: Any) -> None:
        expected, site = self._explored[name], self._sites[name]
        if not isinstance(bits, Tensor) or bits.dtype != expected.dtype or bits.shape != expected.shape:
            raise ValueError(
                f"{name}: expected a topology history of {tuple(expected.shape)} bytes, got {kind_of(bits)}; sparsify "
                "with the same block_shape"
            )
        if spare_bits(bits, site.layout.num_blocks):
            raise ValueError(f"{name}: expected zeros after the bits of {part} blocks, got others; use another file")
        count = count_active(bits)
        too_few, too_many = part == "explored" and count < site.num_active, part == "grown" and count > site.num_active
        if too_few or too_many:
            raise ValueError(f"{name}: got {count} {part} blocks, where {site.num_active} are active")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._explored = {name: bits.cpu().clone() for name, bits in state["explored"].items()}
        self._grown = {name: bits.cpu().clone() for name, bits in state["grown"].items()}
