"""The activations of a loss network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SmoothLeakyReLU(nn.Module):
    """φ(x) = (1 − γ)/β · log(1 + e^{βx}) + γx: smooth, unbounded, slope γ on the far left and 1 on the far right.

    Unlike a softplus it never flattens: its slope is at least γ, so a loss built from it keeps a gradient everywhere
    (paper, section on the loss network's activation).

    Args:
        beta: β > 0, the sharpness of the bend at zero; β → ∞ gives the leaky ReLU.
        gamma: 0 <= γ < 1, the slope on the left.
    """

    def __init__(self, beta: float = 10.0, gamma: float = 0.01):
        super().__init__()
        if not beta > 0:
            raise ValueError(f"beta must be positive, got {beta}")
        if not 0 <= gamma < 1:
            raise ValueError(f"gamma must lie in [0, 1), got {gamma}")
        self.beta, self.gamma = beta, gamma

    def forward(self, x: Tensor) -> Tensor:
        """Apply φ elementwise."""
        return (1 - self.gamma) * F.softplus(x, self.beta) + self.gamma * x

    def slope(self, x: Tensor) -> Tensor:
        """φ'(x)."""
        return (1 - self.gamma) * torch.sigmoid(self.beta * x) + self.gamma

    def extra_repr(self) -> str:
        """Show β and γ in ``print(network)``."""
        return f"beta={self.beta}, gamma={self.gamma}"


def _slope(activation: nn.Module, x: Tensor) -> Tensor:
    """The derivative of one of the activations below at x."""
    if isinstance(activation, SmoothLeakyReLU):
        return activation.slope(x)
    if isinstance(activation, nn.Softplus):
        return torch.sigmoid(x)
    return (x > 0).to(x.dtype) if isinstance(activation, nn.ReLU) else torch.ones_like(x)


def _activation(name: str, beta: float, gamma: float) -> nn.Module:
    if name == "smooth_leaky_relu":
        return SmoothLeakyReLU(beta, gamma)
    if name in ("relu", "softplus", "identity"):
        return {"relu": nn.ReLU, "softplus": nn.Softplus, "identity": nn.Identity}[name]()
    raise ValueError(f"activation must be smooth_leaky_relu, relu, softplus or identity; got {name!r}")
