"""Take a trained model, keep the largest tenth of its weights, fine-tune, and get a plain model back.

Nothing here but torch: the model is an nn.Sequential that guesses the next byte from the sixteen before it,
on the source code of Python's standard library.

    python examples/sparsify_trained_model.py
"""

import argparse
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import smet_compile as smet

CONTEXT = 16


def read_text() -> Tensor:
    """The modules of the standard library, one after the other: (num_bytes,) int64."""
    sources = sorted(Path(os.__file__).parent.glob("*.py"))
    return torch.tensor(list(b"".join(path.read_bytes() for path in sources)))


def make_model() -> nn.Sequential:
    read = [nn.Embedding(256, 32), nn.Flatten(), nn.Linear(CONTEXT * 32, 512), nn.GELU()]
    return nn.Sequential(*read, nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 256))


def loss_at_random(model: nn.Module, text: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Mean cross-entropy, in nats per byte, of the next byte at ``size`` random places of ``text``."""
    starts = torch.randint(len(text) - CONTEXT, (size, 1), generator=generator)
    windows = text[starts + torch.arange(CONTEXT + 1)]
    return cross_entropy(model(windows[:, :-1]), windows[:, -1])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, text: Tensor, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        loss_at_random(model, text, 256, generator).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def validate(name: str, model: nn.Module, text: Tensor) -> float:
    loss = loss_at_random(model, text, 8192, torch.Generator().manual_seed(1)).item()
    print(f"{name:42s} {loss:.3f} nats per byte")
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000, help="dense; fine-tuning takes a third of it")
    parser.add_argument("--density", type=float, default=0.1)
    args = parser.parse_args()

    torch.manual_seed(0)
    text = read_text()
    training, held_out = text[: -len(text) // 10], text[-len(text) // 10 :]
    model = make_model()
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-3), training, args.steps)
    validate("dense", model, held_out)

    smet.sparsify(model, density=args.density, select="magnitude")
    print(smet.report(model))
    validate("sparse", model, held_out)

    # A new optimizer for the new parameters; a model that is trained already wants gentler steps than 1/d.
    optimizer = smet.ActiveAdamW(model, lr=1e-3, lr_density_exponent=0.5, warmup_steps=20)
    smet.TopologyManager(model, optimizer, total_steps=args.steps // 3, every=args.steps // 10, grow="gradient")
    train(model, optimizer, training, args.steps // 3)
    sparse_loss = validate("sparse, fine-tuned", model, held_out)

    with tempfile.TemporaryDirectory() as folder:
        torch.save(smet.export_dense(model).state_dict(), f"{folder}/model.pt")
        plain = make_model()
        plain.load_state_dict(torch.load(f"{folder}/model.pt"))
    assert abs(validate("exported, saved, loaded into a plain one", plain, held_out) - sparse_loss) < 1e-4


if __name__ == "__main__":
    main()
