"""A small ResNet for images of 32x32 with batch norm after every convolution, and its accuracy."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two 3x3 convolutions beside a 1x1 shortcut, with half the positions where the width doubles."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        stride = out // width
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


def resnet(num_classes: int, width: int, blocks: int, stages: int = 3) -> nn.Sequential:
    """Returns a network of ``blocks`` blocks in each stage; every stage after the first doubles the width."""
    stem = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
    widths = [width * 2**stage for stage in range(stages) for _ in range(blocks)]
    body = [Block(before, after) for before, after in zip([width, *widths], widths, strict=False)]
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes))


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Returns the part of the images that the model, in evaluation mode, classifies right."""
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True))
    model.train()
    return right / len(labels)
