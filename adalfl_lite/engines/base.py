"""What every engine is given, :class:`Problem`; what it gives, :class:`MetaStep`; and what it is, :class:`Engine`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from adalfl_lite.engines.steps import NO_CLIPPING, Batches, check_apart, check_autocast, check_model, check_step
from adalfl_lite.engines.updates import Clipping
from adalfl_lite.losses.task import Loss
from adalfl_lite.passes import Undo


@dataclass(frozen=True)
class Problem:
    """The two levels of a meta step: a model learns from M_φ, and φ from the task loss of what the model becomes.

    Raises:
        ValueError, TypeError: the model or the optimizer is one that no engine serves, with the reason.
    """

    model: nn.Module
    """f_θ; its parameters that ``optimizer`` holds are updated in place."""
    loss_network: nn.Module
    """M_φ, called as (prediction, target) -> scalar; left alone."""
    optimizer: Optimizer
    """Any torch.optim optimizer over the model's parameters with a differentiable update."""
    task_loss: Loss
    """L_T, called as (prediction, target) -> scalar."""
    clipping: Clipping = NO_CLIPPING
    """Of ∇_θ M_φ, before the optimizer has it."""
    autocast: torch.dtype | None = None
    """dtype of the model's passes; the losses see float32 predictions."""
    process_group: ProcessGroup | None = None
    """Processes that hold equal shares of the batches, see :mod:`adalfl_lite.engines.distributed`."""

    def __post_init__(self) -> None:
        """Refuse what no engine serves, before anything moved."""
        # a .grad that is there already is looked for at each step, not here
        check_step(self.model, self.optimizer, gradients=False)
        check_apart(self.model, self.optimizer)
        check_model(self.model)
        check_autocast(self.autocast)


@dataclass(frozen=True)
class MetaStep:
    """What one step leaves behind; θ and the optimizer's state have been updated in place."""

    meta_gradient: list[Tensor] = field(repr=False)
    """∇_φ L_T, one tensor per parameter of the loss network that requires a gradient."""
    training_loss: Tensor
    """M_φ on the training batch before the update, a scalar. Its size means nothing, for only its slope trains; what
    tells how training goes is ``meta_loss``."""
    meta_loss: Tensor
    """L_T on the meta batch after the update, a scalar."""
    prediction: Tensor = field(repr=False)
    """Training output f before the update, (B, C)."""
    output_tangent: Tensor | None = field(repr=False)
    """u = J_f(θ) w, (B, C): how far each output would move along the step's meta-direction; None from the engine
    "unrolled", or where f does not depend on θ."""


class Engine(Protocol):
    """Takes a step of a :class:`Problem` and differentiates it. What it cannot do, its constructor refuses.

    A new one is a file in this folder and a line in :data:`adalfl_lite.engines.ENGINES`.
    """

    def __init__(self, problem: Problem) -> None:
        """Raise ``ValueError`` or ``TypeError``, with the reason, for a problem that this engine does not serve."""

    def __call__(self, batch: Batches, meta_batch: Batches, undo: Undo | None = None) -> MetaStep:
        """One step of the model on ``batch``, and ∇_φ of the task loss that it leads to on ``meta_batch``.

        Args:
            batch, meta_batch: (inputs, targets), or a list of such micro batches.
            undo: of this model and optimizer, where the step is part of something that may fail later.

        Raises:
            NotImplementedError: the model has no derivative of this kind, or one that is not its backward pass's.
            FloatingPointError: M_φ is not finite (seen here on the CPU only).
            ValueError, TypeError: a batch, or something about the model now, cannot work, with the reason.
        """
