"""Algorithm 2: the loss network adapts after every step of the base model (paper, section on online adaptation)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adalfl_lite.losses import Loss, task_loss
from adalfl_lite.metagradient import Batch, MetaStep, forward_mode_step, trained_parameter_names, unrolled_step

ENGINES = ("forward", "unrolled")

META_LEARNING_RATE = 1e-5


class OnlineLoss:
    """Trains a model with a loss network that is updated after each of the model's steps:

        θ ← U(θ, ∇_θ M_φ(train batch)),     φ ← φ − η ∇_φ L_T(meta batch, θ)                             (1)

    The loop, the data and the optimizer stay yours; replace ``loss.backward(); optimizer.step()`` by :meth:`step`.

    Args:
        model: f_θ. Its mode is respected: call ``model.train()`` yourself.
        loss_network: M_φ, usually a :class:`~adalfl_lite.losses.LossNetwork`; any module of (prediction, target).
        optimizer: torch.optim optimizer over the model's parameters, with a differentiable update.
        meta_optimizer: optimizer over ``loss_network.parameters()``; by default Adam.
        meta_learning_rate: η of the default meta-optimizer; 0 freezes φ. Ignored when ``meta_optimizer`` is given.
        task_loss: L_T(prediction, target); by default the one of ``loss_network.kind``.
        engine: "forward" (exact, fast) or "unrolled" (reference), see :mod:`adalfl_lite.metagradient`.
        autocast: dtype, such as ``torch.bfloat16``, for the base model's passes; φ and the losses keep their own.

    Raises:
        ValueError, TypeError: something above cannot work, with the reason.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_network: nn.Module,
        optimizer: Optimizer,
        *,
        meta_optimizer: Optimizer | None = None,
        meta_learning_rate: float = META_LEARNING_RATE,
        task_loss: Loss | None = None,
        engine: str = "forward",
        autocast: torch.dtype | None = None,
    ):
        if engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}; got {engine!r}")
        if not meta_learning_rate >= 0:
            raise ValueError(f"meta_learning_rate must be 0 or more, got {meta_learning_rate}")
        trained_parameter_names(model, optimizer)
        self.model, self.loss_network, self.optimizer = model, loss_network, optimizer
        self.meta_optimizer = meta_optimizer or torch.optim.Adam(loss_network.parameters(), lr=meta_learning_rate)
        self.task_loss = task_loss or default_task_loss(loss_network)
        self.engine, self.autocast = engine, autocast

    def step(self, batch: Batch, meta_batch: Batch) -> MetaStep:
        """One update of θ on ``batch``, then one of φ on ``meta_batch``; each is (inputs, targets).

        Raises:
            FloatingPointError: the learned loss, the task loss or the meta-gradient is not finite; φ is left unchanged.
        """
        result = self.meta_gradient([batch], meta_batch)
        self.apply_meta_gradient(result)
        return result

    def meta_gradient(self, batches: Sequence[Batch], meta_batch: Batch) -> MetaStep:
        """Update θ on ``batches`` (one inner step each) and return ∇_φ L_T, leaving φ alone."""
        arguments = (self.model, self.loss_network, self.optimizer)
        if self.engine == "unrolled" or len(batches) > 1:
            return unrolled_step(*arguments, batches, meta_batch, self.task_loss, autocast=self.autocast)
        return forward_mode_step(*arguments, batches[0], meta_batch, self.task_loss, autocast=self.autocast)

    def apply_meta_gradient(self, result: MetaStep) -> None:
        """One step of the meta-optimizer with ``result.meta_gradient``, after checking that all of it is finite."""
        check_finite(result)
        parameters = [p for p in self.loss_network.parameters() if p.requires_grad]
        for parameter, gradient in zip(parameters, result.meta_gradient, strict=True):
            parameter.grad = gradient
        self.meta_optimizer.step()
        for parameter in parameters:
            parameter.grad = None

    def state_dict(self) -> dict:
        """θ, φ and both optimizers' states, loadable with ``weights_only=True``."""
        return {
            "model": self.model.state_dict(),
            "loss_network": self.loss_network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "meta_optimizer": self.meta_optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.model.load_state_dict(state["model"])
        self.loss_network.load_state_dict(state["loss_network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.meta_optimizer.load_state_dict(state["meta_optimizer"])


def default_task_loss(loss_network: nn.Module) -> Loss:
    """L_T for the network's ``kind``; ``ValueError`` if it has none."""
    kind = getattr(loss_network, "kind", None)
    if kind is None:
        raise ValueError(f"{type(loss_network).__name__} has no attribute 'kind'; pass task_loss=...")
    return task_loss(kind)


def check_finite(result: MetaStep) -> None:
    """Raise ``FloatingPointError`` naming the first of learned loss, task loss and meta-gradient that is not finite."""
    named: list[tuple[str, Tensor]] = [("learned loss", result.learned_loss), ("task loss", result.task_loss)]
    named += [(f"meta-gradient of parameter {i}", gradient) for i, gradient in enumerate(result.meta_gradient)]
    for name, tensor in named:
        if not torch.isfinite(tensor).all():
            raise FloatingPointError(
                f"the {name} is not finite after this step; lower the base learning rate, "
                "or initialise the loss network for this optimizer (adalfl_lite.initialise)"
            )
