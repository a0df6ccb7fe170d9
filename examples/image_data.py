"""Images for the examples: 24 classes of glyphs with textures, made from a seed, and a loader for CIFAR folders.

A class is one of eight glyphs drawn in one of three textures. Every image has a turn, a size, a slant, a place, a bend,
colours, a background of lines, noise and a patch that hides a part of it, all at random.
"""

import math
import pickle
from pathlib import Path

import torch

NUM_CLASSES = 24
SIZE = 32
_GLYPHS = [
    [(-0.6, -0.8, -0.6, 0.8), (-0.6, 0.8, 0.6, 0.8)],
    [(-0.7, -0.7, 0.7, -0.7), (0.0, -0.7, 0.0, 0.8)],
    [(-0.6, -0.8, 0.6, 0.8), (0.6, -0.8, -0.6, 0.8)],
    [(-0.6, -0.7, 0.6, -0.7), (0.6, -0.7, -0.6, 0.7), (-0.6, 0.7, 0.6, 0.7)],
    [(-0.6, -0.8, -0.6, 0.8), (0.6, -0.8, 0.6, 0.8), (-0.6, 0.0, 0.6, 0.0)],
    [(-0.6, -0.8, -0.6, 0.8), (-0.6, -0.8, 0.6, -0.8), (-0.6, 0.0, 0.4, 0.0)],
    [(-0.7, 0.8, 0.0, -0.8), (0.0, -0.8, 0.7, 0.8), (-0.35, 0.2, 0.35, 0.2)],
    [(-0.7, -0.8, 0.0, 0.0), (0.7, -0.8, 0.0, 0.0), (0.0, 0.0, 0.0, 0.8)],
]
"""Each glyph is a list of strokes (x, y, x, y), y pointing down."""


def made_images(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (count, 3, 32, 32) fp32 of mean about 0, and their classes (count,) int64."""
    generator = torch.Generator().manual_seed(seed)
    parts = [_draw(min(500, count - first), generator) for first in range(0, count, 500)]
    return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])


def _draw(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, *(shape or (1, 1)), generator=generator)

    labels = torch.randint(NUM_CLASSES, (count,), generator=generator)
    line = torch.linspace(-1, 1, SIZE)
    y, x = (grid.expand(count, -1, -1) for grid in torch.meshgrid(line, line, indexing="ij"))
    x, y = x + uniform(-0.25, 0.25), y + uniform(-0.25, 0.25)
    x = x + uniform(0, 0.15) * torch.sin(uniform(2, 5) * y + uniform(0, 6))
    y = y + uniform(0, 0.15) * torch.sin(uniform(2, 5) * x + uniform(0, 6))
    turn, size, slant = uniform(-0.5, 0.5), uniform(0.55, 1.0), uniform(-0.3, 0.3)
    u = (x * turn.cos() + y * turn.sin()) / size
    v = (y * turn.cos() - x * turn.sin()) / size + slant * u
    ink = _ink(u, v, labels // 3, uniform(0.1, 0.2))
    texture = _texture(u, v, labels % 3, uniform(0, 6), uniform(11, 17))
    angle = uniform(0, math.pi)
    lines = torch.sin(uniform(3, 9) * (x * angle.cos() + y * angle.sin()) + uniform(0, 6))
    colours = uniform(-1, 1, 3, 1, 1)
    image = ink[:, None] * (colours + texture[:, None]) + (1 - ink[:, None]) * (0.5 * lines[:, None] - 0.6 * colours)
    hidden = ((x - uniform(-0.8, 0.8)).abs() < 0.22) & ((y - uniform(-0.8, 0.8)).abs() < 0.22)
    image = torch.where(hidden[:, None], uniform(-1, 1, 3, 1, 1), image)
    return image + 0.3 * torch.randn(image.shape, generator=generator), labels


def _ink(u: torch.Tensor, v: torch.Tensor, glyphs: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
    """Returns how much of the glyph's strokes covers each place, from 0 to 1."""
    nearest = torch.full_like(u, math.inf)
    for number, strokes in enumerate(_GLYPHS):
        for ax, ay, bx, by in strokes:
            length = (bx - ax) ** 2 + (by - ay) ** 2
            along = (((u - ax) * (bx - ax) + (v - ay) * (by - ay)) / length).clamp(0, 1)
            distance = (u - ax - along * (bx - ax)).hypot(v - ay - along * (by - ay))
            mine = (glyphs == number)[:, None, None]
            nearest = torch.where(mine, torch.minimum(nearest, distance), nearest)
    return torch.sigmoid((width - nearest) * 20)


def _texture(
    u: torch.Tensor, v: torch.Tensor, kinds: torch.Tensor, phase: torch.Tensor, rate: torch.Tensor
) -> torch.Tensor:
    """Returns stripes along the glyph, stripes across it, or a chequer."""
    along, across = torch.sin(rate * u + phase), torch.sin(rate * v + phase)
    return torch.stack((along, across, 1.4 * along * across))[kinds, torch.arange(len(kinds))]


def cifar(folder: Path, is_test: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads CIFAR-10 or CIFAR-100 from its unpacked Python version (``cifar-10-batches-py``, ``cifar-100-python``).

    Returns images of mean 0 and deviation 1 for each colour, and labels. The files are pickles: read your own only.
    """
    names = ["test", "test_batch"] if is_test else ["train", *(f"data_batch_{number}" for number in range(1, 6))]
    paths = [folder / name for name in names if (folder / name).exists()]
    if not paths:
        raise ValueError(
            f"{folder}: expected the files of CIFAR ({', '.join(names)}), got none; unpack the archive there"
        )
    parts = [pickle.loads(path.read_bytes(), encoding="latin1") for path in paths]
    images = torch.cat([torch.as_tensor(part["data"]).view(-1, 3, SIZE, SIZE) for part in parts]).float() / 255
    labels = torch.cat([torch.as_tensor(part.get("fine_labels", part.get("labels"))) for part in parts])
    mean, deviation = torch.tensor([0.49, 0.48, 0.45]), torch.tensor([0.25, 0.24, 0.26])
    return (images - mean.view(3, 1, 1)) / deviation.view(3, 1, 1), labels
