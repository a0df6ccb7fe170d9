"""Reads off a step how large the activations are that tensor parallelism adds up over ranks, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from smet_compile.plan.timeline import Amount, Degrees, Term, weighted_sum
from smet_compile.shards.styles import Style


@dataclass
class LayerTraffic:
    """Holds, for each ``nn.Linear`` by its name, the bytes of what its ranks would add up in a step.

    Args:
        degrees: the batch and the sequence of the step.
        outputs: what a "rowwise" layer returns: each rank has a summand of it.
        input_gradients: the gradients of what a "colwise" layer reads. ``parallelize_module`` adds up those of each
            layer on its own, also where several read one tensor.
    """

    degrees: Degrees
    outputs: dict[str, dict[Term, float]] = field(default_factory=dict)
    input_gradients: dict[str, dict[Term, float]] = field(default_factory=dict)

    def follow(self, model: nn.Module) -> None:
        """Counts forward and backward of ``model`` from now on; what is computed again counts again."""
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(partial(self._look, name), with_kwargs=True)

    def total(self, styles: Mapping[str, Style]) -> Amount:
        """Returns the bytes that the ranks of these layers add up, of those that the model of this step has."""
        by_style = {"colwise": self.input_gradients, "rowwise": self.outputs}
        return weighted_sum((1, by_style[style].get(name, {})) for name, style in styles.items())

    def _look(self, name: str, _: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Tensor) -> None:
        self._add(self.outputs, name, output)
        read: Tensor = args[0] if args else kwargs["input"]
        if read.requires_grad:
            read.register_hook(partial(self._add, self.input_gradients, name))

    def _add(self, amounts: dict[str, dict[Term, float]], name: str, tensor: Tensor) -> None:
        count, term = self.degrees.of_shape(tensor.shape)
        amount = amounts.setdefault(name, {})
        amount[term] = amount.get(term, 0.0) + count * tensor.element_size()
