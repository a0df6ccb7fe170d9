"""Train a small ResNet sparse from the first step, with gradient growth (RigL) and SparseOpt's correction.

The images are made by program, or CIFAR's where a folder is given. Needs the extra `pretrain` for the plots.

    python examples/train_resnet.py --density 0.1 --epochs 8
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from image_data import cifar, made_images
from resnet import accuracy, resnet
from torch.nn.functional import cross_entropy

import smet_compile as smet

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--density", type=float, default=0.1)
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--rate", type=float, default=0.4)
parser.add_argument("--images", type=int, default=6000, help="how many to make for training")
parser.add_argument("--data", type=Path, help="folder of CIFAR-10 or CIFAR-100 to read instead")
parser.add_argument("--plain", action="store_true", help="leave out the correction")
parser.add_argument("--out", type=Path, default=Path("resnet.png"))
args = parser.parse_args()

torch.manual_seed(0)
images, labels = cifar(args.data) if args.data else made_images(args.images, seed=1)
held_out = cifar(args.data, is_test=True) if args.data else made_images(max(500, args.images // 4), seed=2)
steps = args.epochs * (len(labels) // 64)

model = smet.sparsify(resnet(int(labels.max()) + 1, 16, 1), args.density, include="conv", distribution="erk")
optimizer = smet.ActiveSGD(model, lr=args.rate, momentum=0.9, weight_decay=1e-4, warmup_steps=0)
if not args.plain:
    print(smet.correct_gradients(model, optimizer, images[:64]))
manager = smet.TopologyManager(model, optimizer, total_steps=steps, every=20, grow="gradient", drop_fraction=0.1)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.rate, steps, cycle_momentum=False)
losses, accuracies = [], []
for epoch in range(args.epochs):
    for rows in torch.randperm(len(labels))[: len(labels) // 64 * 64].split(64):
        loss = cross_entropy(model(images[rows]), labels[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
        print(f"\repoch {epoch + 1}  step {len(losses)}/{steps}  loss {losses[-1]:.3f} ", end="", flush=True)
    accuracies.append(accuracy(model, *held_out))
    print(f" held-out accuracy {accuracies[-1]:.3f}")

print(f"accuracy {accuracy(smet.export_dense(model), *held_out):.3f} after {len(manager.history)} topology updates")
_, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
axes[0].plot(losses, linewidth=0.5)
axes[0].set(xlabel="step", ylabel="loss")
axes[1].plot(range(1, args.epochs + 1), accuracies, marker="o")
axes[1].set(xlabel="epoch", ylabel="held-out accuracy")
plt.savefig(args.out, dpi=110)
