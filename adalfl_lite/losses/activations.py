"""The activations of a loss network: one table of how each is made, and of its derivatives.

A new one is a row of :data:`ACTIVATIONS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
        """φ(x) of every entry, of the shape of x."""
        return (1 - self.gamma) * F.softplus(x, self.beta) + self.gamma * x

    def slope(self, x: Tensor) -> Tensor:
        """φ'(x) of every entry, of the shape of x."""
        return (1 - self.gamma) * torch.sigmoid(self.beta * x) + self.gamma

    def extra_repr(self) -> str:
        """Show β and γ in ``print(network)``."""
        return f"beta={self.beta}, gamma={self.gamma}"


Evaluated = tuple[Tensor, Tensor, Tensor | None, float]
"""σ(z), σ'(z), and a sigmoid and a factor with σ'' = factor · sigmoid (1 − sigmoid); None where σ'' = 0."""


@dataclass(frozen=True)
class Activation:
    """What is known of an activation σ; its functions get the module first."""

    kind: type[nn.Module]
    """The module's class."""
    make: Callable[[float, float], nn.Module]
    """The module, from β and γ."""
    slope: Callable[[Any, Tensor], Tensor]
    """σ'(z), which autograd can differentiate."""
    evaluate: Callable[[Any, Tensor], Evaluated]
    """σ and its derivatives, fast and without a graph."""


def _smooth_leaky_relu(activation: SmoothLeakyReLU, z: Tensor) -> Evaluated:
    beta, gamma = activation.beta, activation.gamma
    sigmoid = (beta * z).sigmoid_()
    derivative = torch.lerp(sigmoid, torch.ones((), dtype=z.dtype, device=z.device), gamma)
    # log(1 + e^x) = x − log sigmoid(x), three times as fast; where that rounds, the value is near 0
    tiny = torch.finfo(z.dtype).tiny
    softplus = sigmoid.clamp_min(tiny).log_().mul_(-1 / beta).add_(z).clamp_min_(0)
    return softplus.lerp_(z, gamma), derivative, sigmoid, (1 - gamma) * beta


def _softplus(activation: nn.Softplus, z: Tensor) -> Evaluated:
    sigmoid = torch.sigmoid(activation.beta * z)
    return activation(z), sigmoid, sigmoid, activation.beta


def _relu(activation: nn.ReLU, z: Tensor) -> Evaluated:
    return z.clamp_min(0), (z > 0).to(z.dtype), None, 0.0


def _identity(activation: nn.Identity, z: Tensor) -> Evaluated:
    return z, torch.ones_like(z), None, 0.0


ACTIVATIONS = {
    "smooth_leaky_relu": Activation(SmoothLeakyReLU, SmoothLeakyReLU, lambda a, z: a.slope(z), _smooth_leaky_relu),
    "relu": Activation(nn.ReLU, lambda beta, gamma: nn.ReLU(), lambda a, z: (z > 0).to(z.dtype), _relu),
    "softplus": Activation(
        nn.Softplus, lambda beta, gamma: nn.Softplus(), lambda a, z: torch.sigmoid(a.beta * z), _softplus
    ),
    "identity": Activation(nn.Identity, lambda beta, gamma: nn.Identity(), lambda a, z: torch.ones_like(z), _identity),
}
"""By the name that :class:`~adalfl_lite.losses.LossNetwork` takes."""

BY_KIND = {activation.kind: activation for activation in ACTIVATIONS.values()}
"""The same by the class of the module."""


def make_activation(name: str, beta: float, gamma: float) -> nn.Module:
    """The activation of that name; ``ValueError`` naming the known ones if there is none."""
    if name not in ACTIVATIONS:
        known = list(ACTIVATIONS)
        raise ValueError(f"activation must be {', '.join(known[:-1])} or {known[-1]}; got {name!r}")
    return ACTIVATIONS[name].make(beta, gamma)
