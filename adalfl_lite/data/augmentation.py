"""Random crops and flips of whole batches where the images are: on their device, without a loader or a worker.

A stack of transforms made for single images gives all images of a batch the same crop; here each has its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def crop_and_flip(images: Tensor, padding: int = 4) -> Tensor:
    """Shift each image by up to ``padding`` pixels each way, and mirror every other one, at random.

    Args:
        images: (N, C, H, W); what is shifted in is zero, in normalised images the mean colour.
        padding: in pixels.

    Returns:
        As ``images``; the random numbers come from torch's global generator of their device.

    Raises:
        ValueError: the images have another number of dimensions, or ``padding`` is negative.
    """
    if images.ndim != 4:
        raise ValueError(f"images must be (N, C, H, W), got shape {tuple(images.shape)}; only images can be augmented")
    if padding < 0:
        raise ValueError(f"padding must be 0 or more, got {padding}")
    n, device = len(images), images.device
    top, left = torch.randint(2 * padding + 1, (2, n, 1), device=device)
    rows = top + torch.arange(images.shape[2], device=device)
    columns = left + torch.arange(images.shape[3], device=device)
    mirrored = torch.rand(n, 1, device=device) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    every = torch.arange(n, device=device)[:, None, None]
    padded = F.pad(images, [padding] * 4)
    return padded[every, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
