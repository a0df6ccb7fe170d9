"""Train a small LLaMA on real text, sparse from the first step to the last.

The model is Hugging Face's own class, unmodified; the text is the source code of Python's standard library,
read as bytes. Needs the extra `pretrain` (for transformers).

    python examples/train_llama.py --steps 300
"""

import argparse
import os
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import smet_compile as smet


def read_text() -> torch.Tensor:
    """The modules of the standard library, one after the other: a few million bytes, (num_bytes,) int64."""
    sources = sorted(Path(os.__file__).parent.glob("*.py"))
    return torch.tensor(list(b"".join(path.read_bytes() for path in sources)))


def draw_batch(text: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Eight windows of 128 bytes from random places; the model shifts the labels itself."""
    starts = torch.randint(len(text) - 128, (8,), generator=generator)
    windows = torch.stack([text[start : start + 128] for start in starts])
    return {"input_ids": windows, "labels": windows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--density", type=float, default=0.3)
    parser.add_argument("--compile", action="store_true", help="on a CPU this needs a C++ compiler")
    args = parser.parse_args()

    torch.manual_seed(0)
    text, generator = read_text(), torch.Generator().manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=344, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)

    model = smet.sparsify(model, density=args.density)
    optimizer = smet.ActiveAdamW(model, lr=1e-3, warmup_steps=20)
    manager = smet.TopologyManager(model, optimizer, total_steps=args.steps, every=20)
    compiled = torch.compile(model) if args.compile else model
    print(smet.report(model))

    losses = []
    for step in range(1, args.steps + 1):
        loss = compiled(**draw_batch(text, generator)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        event = manager.step()

        losses.append(loss.item())
        if event is not None:
            mean_loss = sum(losses[-20:]) / len(losses[-20:])
            print(f"step {step:4d}  loss {mean_loss:.3f}  {event.num_dropped} weights dropped, as many grown")

    dense = smet.export_dense(model)
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}; exported {type(dense).__name__}, plain again")


if __name__ == "__main__":
    main()
