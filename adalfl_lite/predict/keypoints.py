"""Keypoint regression on drawn figures: where are the joints of a stick figure? Images, heat maps and a small network.

A figure is a tree of ten bones. Every bone turns against the one it hangs from by a random angle. Most figures stand,
their angles small; some are acrobats, bent and leaning at large ones, so that the rare examples are the hard ones.
The left limbs are drawn dimmer than the right ones, or nothing in the image would tell left from right.

The target of a joint is a heat map, a Gaussian around it. Maps are flattened to (N, K·16·16) where they are a
regression target, so that everything for regression in this package applies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adalfl_lite.checks import check_counts
from adalfl_lite.data.dataset import Dataset, Split

SIDE, MAP_SIDE = 32, 16
"""Pixels of an image, and cells of a heat map, along each side."""

# joint: (the joint it hangs from, bone length in pixels, resting angle against that bone, brightness); 0 is downwards
_SKELETON: dict[str, tuple[str, float, float, float]] = {
    "neck": ("hip", 7.0, math.pi, 1.0),
    "head": ("neck", 3.5, 0.0, 1.0),
    "left elbow": ("neck", 4.5, math.pi + 0.5, 0.55),
    "left hand": ("left elbow", 4.5, 0.0, 0.55),
    "right elbow": ("neck", 4.5, math.pi - 0.5, 1.0),
    "right hand": ("right elbow", 4.5, 0.0, 1.0),
    "left knee": ("hip", 5.0, 0.25, 0.55),
    "left foot": ("left knee", 5.0, 0.0, 0.55),
    "right knee": ("hip", 5.0, -0.25, 1.0),
    "right foot": ("right knee", 5.0, 0.0, 1.0),
}

JOINTS = ("hip", *_SKELETON)
"""The K = 11 joints, in the order of the heat maps."""

BONES = tuple((JOINTS.index(parent), JOINTS.index(joint)) for joint, (parent, *_) in _SKELETON.items())
"""Pairs of joints that a line connects."""

STANDING, ACROBAT = 0.2, 0.7
"""Standard deviation of the angles, in radians; that by which the whole figure leans included."""


@dataclass(frozen=True)
class Figures:
    """N drawn figures.

    Attributes:
        images: (N, 1, 32, 32) float32, from 0 (background) to 1, with noise.
        heatmaps: (N, K, 16, 16) float32, 1 at a joint, falling off as a Gaussian of one cell.
        joints: (N, K, 2) float32, x and y in pixels.
        acrobat: (N,) bool.
    """

    images: Tensor
    heatmaps: Tensor
    joints: Tensor
    acrobat: Tensor


def draw_figures(count: int, *, acrobats: float = 0.2, noise: float = 0.05, seed: int = 0) -> Figures:
    """Draw so many figures.

    Args:
        count: N.
        acrobats: the probability that a figure is one.
        noise: standard deviation of the noise of each pixel.
        seed: of everything.

    Raises:
        ValueError: a count below 1, a probability outside [0, 1], or negative noise.
    """
    check_counts(count=count)
    if not 0 <= acrobats <= 1 or not noise >= 0:
        raise ValueError(f"acrobats must lie in [0, 1] and noise be 0 or more, got {acrobats} and {noise}")
    generator = torch.Generator().manual_seed(seed)
    acrobat = torch.rand(count, generator=generator) < acrobats
    joints = _pose(acrobat, generator)
    images = _render(joints)
    images += noise * torch.randn(images.shape, generator=generator)
    return Figures(images, _heatmaps(joints), joints, acrobat)


def figures_dataset(
    train: int = 1000, valid: int = 200, test: int = 500, *, acrobats: float = 0.2, seed: int = 0
) -> Dataset:
    """Figures as a data set for regression: images, and heat maps flattened to (N, K·16·16)."""
    check_counts(train=train, valid=valid, test=test)
    figures = draw_figures(train + valid + test, acrobats=acrobats, seed=seed)
    rows = torch.arange(len(figures.images)).split([train, valid, test])
    first, second, third = (Split(figures.images[part], figures.heatmaps[part].flatten(1), part) for part in rows)
    return Dataset("figures", "regression", first, second, third, len(JOINTS) * MAP_SIDE**2, (1, SIDE, SIDE))


def peaks(heatmaps: Tensor) -> Tensor:
    """The position (N, K, 2) of the largest value of each map, x and y in cells; maps (N, K, 16, 16) or flattened."""
    highest = heatmaps.reshape(len(heatmaps), -1, MAP_SIDE**2).argmax(2)
    return torch.stack([highest % MAP_SIDE, highest // MAP_SIDE], 2)


def missed_joints(prediction: Tensor, target: Tensor, *, within: float = 1.5) -> Tensor:
    """The fraction of joints whose peak lies farther than ``within`` cells from the target's; maps as in `peaks`."""
    return ((peaks(prediction) - peaks(target)).float().norm(dim=2) > within).float().mean()


class HeatmapNet(nn.Module):
    """A small encoder and decoder: images (B, 1, 32, 32) to heat maps, flattened to (B, joints·16·16).

    Three scales, 16, 8 and 4 cells, and back to 16, where the maps of the way down are joined. Every hidden layer ends
    in an ``nn.ReLU`` of its own, for a :class:`~adalfl_lite.predict.loss_prediction.FeatureTap` to find.

    Args:
        joints: K.
        width: channels at the finest scale; twice and four times as many at the coarser ones.
    """

    def __init__(self, joints: int = len(JOINTS), width: int = 8):
        super().__init__()
        self.fine = _convolution(1, width, kernel=5, stride=2)
        self.middle = _convolution(width, 2 * width)
        self.coarse = _convolution(2 * width, 4 * width)
        self.joined_middle = _convolution(6 * width, 2 * width)
        self.joined_fine = _convolution(3 * width, 2 * width)
        self.maps = nn.Conv2d(2 * width, joints, 1)

    def forward(self, images: Tensor) -> Tensor:
        """The heat maps of a batch of images, flattened to (B, K)."""
        fine = self.fine(images)
        middle = self.middle(F.max_pool2d(fine, 2))
        coarse = self.coarse(F.max_pool2d(middle, 2))
        middle = self.joined_middle(torch.cat([middle, F.interpolate(coarse, scale_factor=2)], 1))
        fine = self.joined_fine(torch.cat([fine, F.interpolate(middle, scale_factor=2)], 1))
        return self.maps(fine).flatten(1)


def _convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2), nn.ReLU())


def _pose(acrobat: Tensor, generator: torch.Generator) -> Tensor:
    """Joints (N, K, 2) in pixels, the middle of each figure within two pixels of the middle of the image."""
    count = len(acrobat)
    spread = torch.where(acrobat, ACROBAT, STANDING)
    angles, places = {"hip": spread * torch.randn(count, generator=generator)}, {"hip": torch.zeros(count, 2)}
    for joint, (parent, length, rest, _) in _SKELETON.items():
        angles[joint] = angles[parent] + rest + spread * torch.randn(count, generator=generator)
        direction = torch.stack([angles[joint].sin(), angles[joint].cos()], 1)
        places[joint] = places[parent] + length * direction
    joints = torch.stack([places[joint] for joint in JOINTS], 1)
    middle = (joints.amin(1) + joints.amax(1)) / 2
    shift = 4 * torch.rand(count, 2, generator=generator) - 2
    return joints - (middle - shift)[:, None] + (SIDE - 1) / 2


def _render(joints: Tensor) -> Tensor:
    """Images (N, 1, 32, 32): every bone a soft line, the head a blob; where they cross, the brightest counts."""
    axis = torch.arange(float(SIDE))
    pixels = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).reshape(-1, 2)
    head = joints[:, JOINTS.index("head"), None]
    images = (-(pixels - head).square().sum(-1) / 4).exp()
    for (start, end), (*_, brightness) in zip(BONES, _SKELETON.values(), strict=True):
        a, bone = joints[:, start, None], (joints[:, end] - joints[:, start])[:, None]
        along = ((pixels - a) * bone).sum(-1, keepdim=True) / bone.square().sum(-1, keepdim=True)
        distance = (pixels - a - along.clamp(0, 1) * bone).square().sum(-1)
        images = torch.maximum(images, brightness * (-distance).exp())
    return images.reshape(-1, 1, SIDE, SIDE)


def _heatmaps(joints: Tensor) -> Tensor:
    centres = (torch.arange(float(MAP_SIDE)) + 0.5) * SIDE / MAP_SIDE - 0.5
    x, y = ((centres - joints[..., i, None]) * MAP_SIDE / SIDE for i in (0, 1))
    return (-(y.square()[..., :, None] + x.square()[..., None, :]) / 2).exp()
