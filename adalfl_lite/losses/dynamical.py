"""Dynamical losses: cross-entropy whose class weights rise and fall in turn (Ruiz-Garcia et al. 2021)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AMPLITUDE, PERIOD = 70.0, 5000
"""The authors' setting for full-batch gradient descent on a small problem."""


class DynamicalLoss(nn.Module):
    """Cross-entropy with class weights Γ_c(t) that change with the number t of training steps,

        M_t = −1/B Σ_b Γ_{y_b}(t) log p_{y_b},    Γ_c = C Γ̃_c / Σ_k Γ̃_k.    (1)

    For ``period`` steps one class is emphasised: its Γ̃ goes 1 → A → 1 along a triangle while the others' stay 1; then
    the next class is, and so on in turn. To look at the loss changes nothing: t grows where :meth:`advance` is called,
    which ``fit`` does after every step, and a loop of your own does itself.

    Args:
        classes: C.
        amplitude: A >= 1; 1 is plain cross-entropy.
        period: T, steps for each class.

    Raises:
        ValueError: a setting out of range.
    """

    step: Tensor

    def __init__(self, classes: int, *, amplitude: float = AMPLITUDE, period: int = PERIOD):
        super().__init__()
        if classes < 2 or not amplitude >= 1 or period < 2:
            raise ValueError(
                "DynamicalLoss needs 2 or more classes, an amplitude of 1 or more and a period of 2 or more steps; "
                f"got {classes}, {amplitude}, {period}"
            )
        self.classes, self.amplitude, self.period = classes, amplitude, period
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def weights(self, step: int) -> Tensor:
        """Γ(t), shape (C,), summing to C."""
        # Γ̃ of the class whose turn it is goes 1 → A → 1 along a triangle, that of the others is 1
        phase = (step % self.period) / self.period
        weights = torch.ones(self.classes)
        weights[step // self.period % self.classes] += (self.amplitude - 1) * (1 - abs(2 * phase - 1))
        return self.classes * weights / weights.sum()  # Γ_c = C Γ̃_c / Σ_k Γ̃_k

    def advance(self) -> None:
        """Go from t to t + 1: a step of training has been taken."""
        self.step += 1

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """M_t of logits (B, C) and classes (B,)."""
        # equation (1): the mean over the batch of −Γ_{y_b} log p_{y_b}
        weights = self.weights(int(self.step)).to(prediction)
        return (weights[target] * F.cross_entropy(prediction, target, reduction="none")).mean()
