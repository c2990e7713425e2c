"""What trains a model: :class:`Learner`, and :class:`Plain`, the one that learns nothing beside it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adalfl_lite.checks import check_trainable
from adalfl_lite.engines.steps import Batch, Batches, check_autocast, plain_step
from adalfl_lite.engines.updates import Clipping
from adalfl_lite.losses.task import Loss
from adalfl_lite.provenance import describe_function, describe_model, describe_optimizer


class Step(Protocol):
    """What one step leaves behind; (S,) tensors where S models take it together."""

    @property
    def training_loss(self) -> Tensor:
        """The loss trained with, on the training batch before the step, a scalar."""

    @property
    def meta_loss(self) -> Tensor | None:
        """L_T on the meta batch after the step, a scalar; None where nothing is learned beside the model."""


class Learner:
    """Trains one model, or S of them together, a step at a time; :func:`~adalfl_lite.train.fit` runs it over data.

    A learner of your own has ``models``, ``losses``, ``optimizer`` and ``adapts``, and defines ``step``,
    ``state_dict``, ``load_state_dict`` and ``describe``.
    """

    models: Sequence[nn.Module]
    """f_θ, one or S; in the mode they are in."""
    losses: Sequence[Loss]
    """What each is trained with, (prediction, target) -> scalar."""
    optimizer: Optimizer
    """Of θ, or of S θ stacked."""
    adapts: bool
    """Whether something is learned beside the models, so that ``step`` takes a meta batch."""

    def step(self, batch: Batches, meta_batch: Batches | None = None) -> Step:
        """One step of everything that is learned.

        Args:
            batch: (inputs, targets) for the models' step, as :meth:`collate` gives them.
            meta_batch: (inputs, targets) on which L_T is taken after it; None where nothing else is learned.

        Raises:
            FloatingPointError: something is not finite.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """All that a step changes, loadable with ``weights_only=True``."""
        raise NotImplementedError

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back a state that :meth:`state_dict` of one of the same make gave."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """What tells this learner from others, by name: plain values, which are stored with a run."""
        raise NotImplementedError

    def collate(self, batches: Sequence[Batch]) -> Batch:
        """The batches of all models, as one that :meth:`step` takes: of a single model its own."""
        # one model, one batch: nothing to join
        (batch,) = batches
        return batch

    def write_back(self) -> None:
        """Bring ``models`` and ``losses`` to where training is, if they are kept elsewhere meanwhile."""

    def learning_rates(self) -> list[float]:
        """The base learning rate of each model, that of its first parameter group."""
        return [float(self.optimizer.param_groups[0]["lr"])] * len(self.models)

    def watched(self) -> dict[str, Tensor]:
        """By name, what must be finite for training to go on: the models' gradients and parameters."""
        named = [(name, p) for model in self.models for name, p in model.named_parameters()]
        # gradients first: where one is not finite, the parameters that follow from it are not either
        gradients = {f"gradient of {name}": p.grad for name, p in named if p.grad is not None}
        return gradients | {f"parameter {name}": p for name, p in named}


@dataclass(frozen=True)
class PlainStep:
    """What a step of :class:`Plain` leaves behind."""

    training_loss: Tensor
    """Before the step, a scalar."""
    meta_loss: None = None


class Plain(Learner):
    """Trains a model with a loss that is not learned meanwhile: handcrafted, or a loss network as it is.

    Args:
        model: f_θ.
        loss: (prediction, target) -> scalar. If it has a method ``advance``, that is called after every step, for a
            loss that changes while it is trained with.
        optimizer: any torch.optim optimizer over the model's parameters that needs no closure.
        clip_gradient_norm, clip_gradient_value: of ∇_θ of the loss before the optimizer has it, as torch's
            ``clip_grad_norm_`` and ``clip_grad_value_`` do.
        autocast: dtype for the model's passes, such as ``torch.bfloat16``.

    Raises:
        ValueError, TypeError: something above cannot work, with the reason.
    """

    adapts = False

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: Optimizer,
        *,
        clip_gradient_norm: float | None = None,
        clip_gradient_value: float | None = None,
        autocast: torch.dtype | None = None,
    ):
        check_has_parameters(model)
        if not callable(loss):
            raise TypeError(
                f"loss must be a function or a module, got {type(loss).__name__}; use one such as F.mse_loss"
            )
        check_trainable(model, optimizer)
        check_no_closure(optimizer)
        check_autocast(autocast)
        check_same_device(loss, model)
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.models, self.losses = [model], [loss]
        self.clipping, self.autocast = Clipping(clip_gradient_norm, clip_gradient_value), autocast

    def step(self, batch: Batches, meta_batch: Batches | None = None) -> PlainStep:
        """One step of the model; see :func:`~adalfl_lite.engines.plain_step`."""
        value = plain_step(self.model, self.loss, self.optimizer, batch, clipping=self.clipping, autocast=self.autocast)
        return PlainStep(value)

    def state_dict(self) -> dict[str, Any]:
        """θ, the optimizer's state, and the loss's where it is a module."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), **state_of_loss(self.loss)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back a state that :meth:`state_dict` of one of the same make gave."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if isinstance(self.loss, nn.Module):
            self.loss.load_state_dict(state["loss"])

    def describe(self) -> dict[str, Any]:
        """Model, loss, optimizer and clipping, as :meth:`Learner.describe` says."""
        return {
            **describe_training(self.model, self.loss, self.optimizer, self.clipping, self.autocast),
            "online": False,
        }


def state_of_loss(loss: Loss) -> dict[str, Any]:
    """{"loss": its state} of a loss that is a module; nothing of a function."""
    return {"loss": loss.state_dict()} if isinstance(loss, nn.Module) else {}


def describe_training(
    model: nn.Module, loss: Loss, optimizer: Optimizer, clipping: Clipping, autocast: torch.dtype | None
) -> dict[str, Any]:
    """What every learner of one model describes."""
    return {
        **describe_optimizer(optimizer),
        "model": describe_model(model),
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        **describe_function("loss", loss),
        "autocast": None if autocast is None else str(autocast),
        "clip_gradient_norm": clipping.norm,
        "clip_gradient_value": clipping.value,
    }


def check_has_parameters(model: nn.Module) -> None:
    """Raise ``TypeError`` if this is no model, ``ValueError`` if there is nothing to train in it."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be a torch.nn.Module, got {type(model).__name__}")
    if next(model.parameters(), None) is None:
        raise ValueError(f"the model has no parameters: there is nothing to train in a {type(model).__name__}")


def check_no_closure(optimizer: Optimizer) -> None:
    """Raise ``TypeError`` for an optimizer whose step evaluates the loss itself."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is not None:
        raise TypeError(
            f"{type(optimizer).__name__} needs a closure, which no learner has; use one such as SGD or Adam"
        )


def check_same_device(loss: Loss, model: nn.Module) -> None:
    """Raise ``ValueError`` if the loss is a module with parameters on another device than the model's."""
    parameter = next(loss.parameters(), None) if isinstance(loss, nn.Module) else None
    device = next(model.parameters()).device
    if parameter is not None and parameter.device != device:
        raise ValueError(
            f"the loss network is on {parameter.device}, the model on {device}; use loss_network.to({str(device)!r})"
        )
