"""Makes whole models sparse, trains them eagerly or compiled, and compares their losses."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import smet_compile as smet
from tests.models.classes import REAL_MODELS

NUM_STEPS, EVERY = 11, 4
UPDATES_AT = [4, 8]
ONE_LAYER = {"num_hidden_layers": 1, "num_decoder_layers": 1}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-4}

LossFn = Callable[[nn.Module, dict[str, Tensor]], Tensor]


def own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Returns the model's own loss, which is in fp32, whatever its weights are."""
    return model(**batch).loss


def loss_of_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Computes the loss in the dtype of the weights."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    if hasattr(model, "get_encoder") and model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return F.cross_entropy(model(**inputs).logits.flatten(0, -2), batch["labels"].flatten())


@dataclass(frozen=True)
class Setting:
    """Says how a model is trained.

    Args:
        name: in REAL_MODELS. block_shape, grow: of the topology. lengths: of the sequences, step after step.
        config: what is different from the model's small configuration. prepare: is called with the dense model.
    """

    name: str
    dtype: torch.dtype
    block_shape: int
    loss_fn: LossFn = loss_of_logits
    grow: str = "random"
    lengths: tuple[int, ...] = (7,)
    config: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[Any], Any] = lambda model: None

    def __str__(self) -> str:
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}-{self.block_shape}"

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        model = self._configured(REAL_MODELS[self.name].make()).to(self.dtype)
        self.prepare(model)
        return smet.sparsify(model, density=0.4, block_shape=self.block_shape)

    def _configured(self, model: Any) -> nn.Module:
        """Removes dropout, and lets no two heads share a key, so that no weight is half as large as another."""
        config = model.config
        chosen = {name: 0.0 for name, value in config.to_dict().items() if "drop" in name and type(value) is float}
        chosen |= {"num_key_value_heads": 2} if hasattr(config, "num_key_value_heads") else {}
        chosen["problem_type"] = "single_label_classification"  # else the first call sets it, and the second recompiles
        for key, value in (chosen | self.config).items():
            setattr(config, key, value)
        made = type(model)(config)
        made.loss_type = made.loss_type or "ForCausalLM"  # else transformers logs, which breaks the graph
        return made

    def batch(self, step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step % 3)
        if self.name == "vit":
            pixels = torch.randn(2, 3, 8, 8, generator=generator).to(self.dtype)
            return {"pixel_values": pixels, "labels": torch.randint(0, 3, (2,), generator=generator)}
        ids = torch.randint(0, 64, (2, self.lengths[step % len(self.lengths)]), generator=generator)
        return {"input_ids": ids, "labels": ids}


@dataclass(frozen=True)
class Trained:
    setting: Setting
    how: str
    model: nn.Module
    losses: list[float]


def train(setting: Setting, how: str = "eager", **compile_options: Any) -> Trained:
    """Trains by ``how``: "eager"; "loop" (``torch.compile``, two calls); or "step" (``compile_train_step``)."""
    torch._dynamo.reset()
    model = setting.make()
    optimizer = smet.ActiveAdamW(model, lr=1e-2, warmup_steps=5, stochastic_rounding=False)
    manager = smet.TopologyManager(
        model, optimizer, total_steps=2 * NUM_STEPS, every=EVERY, grow=setting.grow, schedule="cosine"
    )
    called = torch.compile(model, **compile_options) if how == "loop" else model
    if how == "step":
        step = smet.compile_train_step(model, optimizer, setting.loss_fn)
        step._compiled = torch.compile(step.forward, **compile_options)
    losses = []
    for number in range(NUM_STEPS):
        if how == "step":
            loss = step(setting.batch(number))
        else:
            loss = setting.loss_fn(called, setting.batch(number))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        manager.step()
        losses.append(loss.item())
    assert [event.step for event in manager.history] == UPDATES_AT
    return Trained(setting, how, model, losses)


def assert_same_losses(compiled: Trained, eager: Trained) -> None:
    pairs = list(zip(compiled.losses, eager.losses, strict=True))
    difference = max(abs(a - b) / abs(b) for a, b in pairs)
    assert difference <= TOLERANCE[compiled.setting.dtype], pairs
