"""Train a small ResNet sparse from the first step, with gradient growth (RigL) and SparseOpt's correction.

The images are made by program, or CIFAR's where a folder is given. Needs the extra `pretrain` for the plot.

    python examples/train_resnet.py --density 0.1 --epochs 8
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from image_data import cifar, made_images
from torch import Tensor, nn
from torch.nn import functional as F

import smet_compile as smet


class Block(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        stride = out // width
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


def resnet(num_classes: int, width: int, blocks: int) -> nn.Sequential:
    stem = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
    widths = [width * 2**stage for stage in range(3) for _ in range(blocks)]
    body = [Block(before, after) for before, after in zip([width, *widths], widths, strict=False)]
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes))


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True))
    model.train()
    return right / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--images", type=int, default=6000, help="how many to make for training")
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10 or CIFAR-100 to read instead")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=1, help="in each of three stages")
    parser.add_argument("--plain", action="store_true", help="leave out the correction")
    parser.add_argument("--out", type=Path, default=Path("resnet.png"))
    args = parser.parse_args()

    torch.manual_seed(0)
    images, labels = cifar(args.data) if args.data else made_images(args.images, seed=1)
    held_out = cifar(args.data, is_test=True) if args.data else made_images(max(500, args.images // 4), seed=2)
    model = resnet(int(labels.max()) + 1, args.width, args.blocks)
    total_steps = args.epochs * (len(labels) // 64)

    model = smet.sparsify(model, density=args.density, include="conv", distribution="erk")
    optimizer = smet.ActiveSGD(model, lr=0.1, momentum=0.9, weight_decay=1e-4, warmup_steps=0)
    if not args.plain and args.density < 1:
        print(smet.correct_gradients(model, optimizer, images[:64]))
    manager = smet.TopologyManager(
        model, optimizer, total_steps=total_steps, every=20, grow="gradient", drop_fraction=0.1
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps, cycle_momentum=False)
    print(smet.report(model))

    losses, accuracies = [], []
    for epoch in range(args.epochs):
        order = torch.randperm(len(labels))[: len(labels) // 64 * 64].split(64)
        for number, rows in enumerate(order, start=1):
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            manager.step()
            losses.append(loss.item())
            print(f"\repoch {epoch + 1}  step {number}/{len(order)}  loss {losses[-1]:.3f} ", end="", flush=True)
        accuracies.append(accuracy(model, *held_out))
        print(f" held-out accuracy {accuracies[-1]:.3f}")

    dense = smet.export_dense(model)
    print(
        f"accuracy {accuracy(dense, *held_out):.3f} at density {args.density}; {len(manager.history)} topology updates"
    )
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    left.plot(losses, linewidth=0.5)
    left.set(xlabel="step", ylabel="loss")
    right.plot(range(1, args.epochs + 1), accuracies, marker="o")
    right.set(xlabel="epoch", ylabel="held-out accuracy", ylim=(0, 1))
    plt.savefig(args.out, dpi=110)
    print(args.out)


if __name__ == "__main__":
    main()
