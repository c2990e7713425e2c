"""Imitation: fit a loss network to a task loss before anything else, on outputs drawn at random."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adalfl_lite.engines.stacked import StackedLoss, task_losses
from adalfl_lite.engines.steps import Batch
from adalfl_lite.losses.network import LossNetwork
from adalfl_lite.losses.task import Loss

OUTPUT_SCALE = {"classification": 6.0, "regression": 3.0}
"""The outputs of :func:`draw_outputs` have standard deviations up to this: logits, or standardised predictions."""

IMITATION_LEARNING_RATE = 0.02
"""Of the Adam of :func:`imitate`."""


def imitate(
    loss_network: LossNetwork,
    task_loss: Loss,
    prediction: Tensor,
    *,
    steps: int = 800,
    learning_rate: float = IMITATION_LEARNING_RATE,
) -> float:
    """Fit φ so that M_φ pushes the outputs as the task loss does: min_φ E ‖∂M_φ/∂f − ∂L_T/∂f‖² / E ‖∂L_T/∂f‖².

    The outputs are drawn at random, from hesitant to certain, so this needs neither data nor a model.

    Args:
        loss_network: M_φ, changed in place.
        task_loss: L_T.
        prediction: an output of the base model, (B, C) or (B, K); only its shape, dtype and device are used.
        steps: steps of Adam.
        learning_rate: of Adam, annealed to zero along a cosine.

    Returns:
        The relative squared error at the last step.
    """
    optimizer = torch.optim.Adam(loss_network.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    error = torch.tensor(math.inf)
    for _ in range(steps):
        # fresh ones every time, so that φ fits the whole range and not a sample
        output, target = draw_outputs(loss_network.kind, prediction)
        output.requires_grad_(True)
        (wanted,) = torch.autograd.grad(task_loss(output, target), output)
        (given,) = torch.autograd.grad(loss_network(output, target), output, create_graph=True)
        # relative, so that the step size does not depend on the scale of the task loss
        error = (given - wanted).square().sum() / wanted.square().sum()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        schedule.step()
    return error.item()


def draw_outputs(kind: str, prediction: Tensor) -> Batch:
    """Random outputs, from hesitant to certain, of the shape, dtype and device of ``prediction``; and their targets."""
    like: dict[str, Any] = {"dtype": prediction.dtype, "device": prediction.device}
    output = OUTPUT_SCALE[kind] * torch.rand(len(prediction), 1, **like) * torch.randn(prediction.shape, **like)
    if kind == "classification":
        return output, torch.randint(prediction.shape[1], (len(prediction),), device=prediction.device)
    return output, torch.randn(prediction.shape, **like)


def imitate_stacked(loss: StackedLoss, kind: str, draw: Callable[[], Batch], *, steps: int) -> None:
    """:func:`imitate` for S loss networks at once, without a double backward.

    With g = ∂L_T/∂f the gradient of ‖∂M_φ/∂f − g‖² is the derivative of ∂M_φ/∂f in φ, along 2 (∂M_φ/∂f − g).

    Args:
        loss: S networks, changed in place.
        kind: of the task loss.
        draw: outputs (S, B, C) and their targets, as :func:`draw_outputs` draws them for one.
        steps: steps of Adam.
    """
    optimizer = torch.optim.Adam(loss.parameters, lr=IMITATION_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        output, target = draw()
        output.requires_grad_(True)
        (wanted,) = torch.autograd.grad(task_losses(kind, output, target).sum(), output)
        _, given, along = loss.derivatives(output.detach(), target)
        scale = wanted.square().flatten(1).sum(1)[:, None, None]  # each network's error is relative to its own
        for parameter, gradient in zip(loss.parameters, along(2 * (given - wanted) / scale), strict=True):
            parameter.grad = gradient
        optimizer.step()
        schedule.step()
