"""Algorithms 3 and 4: a meta-learned learning rate, the control that tells how much of AdaLFL is its implied schedule.

The base model keeps its handcrafted loss; what is learned is α, by the *hypergradient* of the task loss after a step.
The step of SGD, Adam and their relatives is proportional to α: θ' = U(θ, g; α) = θ − α d(θ, g). So, exactly, ::

    ∂θ'/∂ log α = θ' − θ,      ∂L_T(θ')/∂ log α = ⟨∇_θ' L_T, θ' − θ⟩    (1)

(momentum's buffer taken as given, as everywhere in one-step meta-learning): the slope of the task loss along the step
just taken. Where it is positive the step went too far, and α falls. We learn log α, which keeps α positive and its
relative change per meta step independent of its size; the paper learns α itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from adalfl_lite.checks import check_batch, check_finite, check_trainable
from adalfl_lite.engines.recorded import meta_pass
from adalfl_lite.engines.steps import (
    CHANGED,
    Batch,
    Batches,
    add,
    advance,
    check_apart,
    check_autocast,
    check_model,
    micro_batches,
    plain_gradients,
    shares_of,
    total,
    weighted,
)
from adalfl_lite.engines.updates import Clipping, check_no_gradient, check_no_hooks, check_own_step
from adalfl_lite.learn.base import Learner, check_same_device, describe_training, state_of_loss
from adalfl_lite.learn.online import check_meta_rate, describe_meta_optimizer
from adalfl_lite.losses.task import Loss
from adalfl_lite.passes import Buffers, RandomState, Undo, eval_mode, optimizer_parameters
from adalfl_lite.provenance import describe_function

PROPORTIONAL = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
)
"""Optimizers whose step is proportional to their learning rate, weight decay included."""

RATE_META_LEARNING_RATE = 1e-3
"""η of Algorithm 4, about the relative change of α in a step."""


class LearningRate(nn.Module):
    """φ of Algorithms 3 and 4: log α, float64, one for each parameter group of the base optimizer.

    Args:
        rates: α > 0 of each group.
    """

    def __init__(self, rates: Sequence[float]):
        super().__init__()
        if wrong := [rate for rate in rates if not 0 < rate < float("inf")]:
            raise ValueError(f"learning rates must be positive and finite, got {wrong[0]}")
        self.log_rates = nn.Parameter(torch.tensor([float(rate) for rate in rates], dtype=torch.float64).log())

    @classmethod
    def of(cls, optimizer: Optimizer) -> LearningRate:
        """The learning rates that ``optimizer`` has now."""
        return cls([group["lr"] for group in optimizer.param_groups])

    @property
    def rates(self) -> list[float]:
        """α of each parameter group, in the optimizer's order."""
        return self.log_rates.detach().exp().tolist()

    def give_to(self, optimizer: Optimizer) -> Optimizer:
        """Set the rates of ``optimizer``'s groups to these, and return it; ``ValueError`` if there are others."""
        if len(optimizer.param_groups) != len(self.rates):
            raise ValueError(
                f"{len(self.rates)} learning rates for an optimizer of {len(optimizer.param_groups)} parameter groups;"
                " LearningRate.of(optimizer) has one for each"
            )
        for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate
        return optimizer


@dataclass(frozen=True)
class RateStep:
    """What one step leaves behind; θ, the optimizer's state and its learning rates have been updated in place."""

    meta_gradient: list[Tensor]
    """∂L_T(θ')/∂ log α, equation (1), a list of one tensor (groups,)."""
    training_loss: Tensor
    """The loss trained with, on the training batch before the update, a scalar."""
    meta_loss: Tensor
    """L_T on the meta batch after the update, a scalar."""


class OnlineLearningRate(Learner):
    """Algorithm 4: trains a model with a fixed loss and a learning rate that is updated after each step:

        θ ← U(θ, ∇_θ L(train batch); α),     log α ← log α − η ∂L_T(meta batch, θ)/∂ log α    (2)

    The interface of :class:`~adalfl_lite.learn.online.OnlineLoss`, so the two can be exchanged in a loop.

    Args:
        model: f_θ, in the mode it is in.
        loss: L, the loss to train with, (prediction, target) -> scalar.
        optimizer: one of :data:`PROPORTIONAL` over the model's parameters. Each of its parameter groups has a learning
            rate of its own: give it one group per layer to learn one per layer.
        learning_rate: α to start from; by default the optimizer's own.
        meta_optimizer: optimizer over ``learning_rate.parameters()``; by default Adam.
        meta_learning_rate: η of the default meta-optimizer, about the relative change of α per step, by default
            :data:`RATE_META_LEARNING_RATE`; 0 freezes α.
        task_loss: L_T; by default ``loss``.
        clip_gradient_norm, clip_gradient_value: of ∇_θ L, see :class:`~adalfl_lite.learn.online.OnlineLoss`.
        autocast: dtype for the base model's passes.

    Raises:
        TypeError: the optimizer's step is not proportional to its learning rate.
        ValueError: a learning rate is not positive, or the optimizer is not of this model.
    """

    adapts = True

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: Optimizer,
        *,
        learning_rate: LearningRate | None = None,
        meta_optimizer: Optimizer | None = None,
        meta_learning_rate: float | None = None,
        task_loss: Loss | None = None,
        clip_gradient_norm: float | None = None,
        clip_gradient_value: float | None = None,
        autocast: torch.dtype | None = None,
    ):
        if not isinstance(optimizer, PROPORTIONAL):
            known = ", ".join(kind.__name__ for kind in PROPORTIONAL)
            raise TypeError(
                f"the step of {type(optimizer).__name__} is not proportional to a learning rate; use one of {known}"
            )
        check_meta_rate(meta_learning_rate, meta_optimizer)
        check_autocast(autocast)
        check_model(model)
        check_apart(model, optimizer)
        self._check(model, optimizer)
        check_same_device(loss, model)
        _check_holds(meta_optimizer, learning_rate)
        self.clipping = Clipping(clip_gradient_norm, clip_gradient_value)
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.models, self.losses = [model], [loss]
        self.learning_rate = learning_rate or LearningRate.of(optimizer)
        self.learning_rate.give_to(optimizer)
        self.initial_rates = self.learning_rate.rates
        eta = RATE_META_LEARNING_RATE if meta_learning_rate is None else meta_learning_rate
        self.meta_learning_rate = None if meta_optimizer else eta
        self.meta_optimizer = meta_optimizer or torch.optim.Adam(self.learning_rate.parameters(), lr=eta)
        self.task_loss = task_loss or loss
        self.autocast = autocast

    def step(self, batch: Batches, meta_batch: Batches | None = None) -> RateStep:
        """One update of θ on ``batch``, then one of α on ``meta_batch``; each is (inputs, targets), or a list of them.

        An exception leaves everything as it was.

        Raises:
            FloatingPointError: a loss or the hypergradient is not finite.
            ValueError: a batch is not what the model takes.
        """
        if meta_batch is None:
            raise ValueError(
                "a learned rate needs a meta batch; give step(batch, meta_batch), of validation data if any"
            )
        for name, given in (("batch", batch), ("meta_batch", meta_batch)):
            for part in micro_batches(given):
                check_batch(part, name, self.model)
        with self._undo():
            result = self.meta_gradient(batch, meta_batch)
            (slopes,) = result.meta_gradient
            check_finite(
                {"loss": result.training_loss, "task loss": result.meta_loss, "hypergradient": slopes}, self.model
            )
            # equation (2), right: α moves along a slope in log α
            self.learning_rate.log_rates.grad = slopes
            self.meta_optimizer.step()
            self.learning_rate.log_rates.grad = None
            self.learning_rate.give_to(self.optimizer)
            advance(self.loss)
        return result

    def meta_gradient(self, batch: Batches, meta_batch: Batches) -> RateStep:
        """Update θ on ``batch`` and return the hypergradient, equation (1), leaving α alone."""
        with self._undo() as undo:
            self._check(self.model, self.optimizer)
            check_no_gradient(self.optimizer)
            parameters = optimizer_parameters(self.optimizer)
            # the rate of this step; the last meta step has changed it
            self.learning_rate.give_to(self.optimizer)
            loss = plain_gradients(
                self.model, self.loss, self.optimizer, batch, clipping=self.clipping, autocast=self.autocast
            )
            # the model moved its own parameters in its pass: then θ' − θ is not the optimizer's step
            if not undo.unmoved():
                raise ValueError(CHANGED)
            self.optimizer.step()
            self.optimizer.zero_grad()

            wanted = [parameter for parameter in parameters if parameter.requires_grad]
            # ∇_θ' L_T at the θ' that this step reached
            meta_loss, gradients = self._gradient_after(meta_batch, wanted)
            found = dict(zip(map(id, wanted), gradients, strict=True))
            slopes = []
            old = iter(undo.before)
            for group in self.optimizer.param_groups:
                # equation (1): ⟨∇_θ' L_T, θ' − θ⟩, group by group, each with its own α
                pairs = [(found.get(id(new)), new.detach() - next(old)) for new in group["params"]]
                slopes.append(sum(_inner_product(v, step) for v, step in pairs if v is not None))
        like = self.learning_rate.log_rates
        hypergradient = torch.stack([torch.as_tensor(slope, dtype=like.dtype, device=like.device) for slope in slopes])
        return RateStep([hypergradient], loss, meta_loss)

    def state_dict(self) -> dict[str, Any]:
        """θ, α, both optimizers' states and the loss's, where it is a module; loadable with ``weights_only=True``."""
        return {
            "model": self.model.state_dict(),
            "learning_rate": self.learning_rate.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "meta_optimizer": self.meta_optimizer.state_dict(),
            **state_of_loss(self.loss),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back a state that :meth:`state_dict` of one of the same make gave."""
        self.model.load_state_dict(state["model"])
        self.learning_rate.load_state_dict(state["learning_rate"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.meta_optimizer.load_state_dict(state["meta_optimizer"])
        if isinstance(self.loss, nn.Module) and "loss" in state:  # states of before had none
            self.loss.load_state_dict(state["loss"])

    def describe(self) -> dict[str, Any]:
        """What :class:`~adalfl_lite.learn.Plain` describes, and how the learning rate is learned."""
        found = describe_training(self.model, self.loss, self.optimizer, self.clipping, self.autocast)
        found |= {"initial_learning_rate": self.initial_rates, **describe_function("task_loss", self.task_loss)}
        how = describe_meta_optimizer(self.meta_learning_rate, self.meta_optimizer)
        return {**found, "online": True, "learn": "learning_rate", **how}

    def _gradient_after(self, meta_batch: Batches, parameters: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """L_T at the new θ, and its gradient; buffers and the random state are left as they were."""
        random, buffers = RandomState(self.model), Buffers(self.model)
        losses: list[tuple[float, Tensor]] = []
        gradients: list[Tensor] = []
        parts = micro_batches(meta_batch)
        for share, part in zip(shares_of(parts), parts, strict=True):
            _, loss, found = meta_pass(self.model, buffers, part, self.task_loss, parameters, self.autocast)
            losses.append((share, loss))
            gradients = add(gradients, weighted(share, found))
        random.restore()
        return total(losses), gradients

    def _undo(self) -> Undo:
        loss = self.loss if isinstance(self.loss, nn.Module) else None
        return Undo(self.model, self.optimizer, self.meta_optimizer, frozen=True, loss=loss)

    @staticmethod
    def _check(model: nn.Module, optimizer: Optimizer) -> None:
        """Refuse what would move θ beside the gradient's step; what changes the gradient before it is all the same."""
        check_own_step(optimizer)
        check_trainable(model, optimizer)
        check_no_hooks(optimizer, parameters=False)


def _inner_product(v: Tensor, step: Tensor) -> Tensor:
    """Of real numbers, or of complex ones as pairs of real ones; float64."""
    if v.is_complex():
        v, step = torch.view_as_real(v), torch.view_as_real(step)
    return (v * step).sum().double()


def _check_holds(meta_optimizer: Optimizer | None, learning_rate: LearningRate | None) -> None:
    """Raise ``ValueError`` unless the meta-optimizer is over the learning rate alone, and so moves it."""
    if meta_optimizer is None:
        return
    known = set() if learning_rate is None else {id(parameter) for parameter in learning_rate.parameters()}
    if {id(parameter) for parameter in optimizer_parameters(meta_optimizer)} != known:
        raise ValueError(
            "meta_optimizer does not hold the learning rate alone; with rate = LearningRate.of(optimizer), give"
            " learning_rate=rate and meta_optimizer=torch.optim.Adam(rate.parameters())"
        )


def implied_scale(model: nn.Module, loss: Loss, task_loss: Loss, batch: Batch) -> float:
    """c = ⟨∇M, ∇L⟩/‖∇L‖² on one batch, of ∇_θ M = c ∇_θ L + r: the scale by which M multiplies the learning rate of L.

    The model is run in eval mode, which is put back. NaN where ∇L = 0.
    """
    with eval_mode(model):
        prediction = model(batch[0])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    values = [f(prediction, batch[1]) for f in (loss, task_loss)]
    learned, task = (
        torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        for value in values
    )
    # the projection of ∇M on ∇L
    inner = sum((m * g).sum() for m, g in zip(learned, task, strict=True))
    return float(inner / sum(g.square().sum() for g in task))


def scaled_schedule(
    optimizer: Optimizer,
    steps: Sequence[float],
    scales: Sequence[float],
    schedule: Callable[[int], float] | None = None,
) -> LambdaLR:
    """A scheduler that multiplies the learning rate by a recorded c(t): the schedule of one run in another.

    Pass it to :func:`~adalfl_lite.train.loop.fit` as ``scheduler`` with the handcrafted loss, and the c(t) of
    :func:`analysis.effective_lr.effective_learning_rate` along a run with a learned loss: what remains of the learned
    loss's advantage is not the schedule it implies (exact for gradient descent without momentum and weight decay).

    Args:
        optimizer: of the base model, before its first step.
        steps: when the scales were recorded, in ascending order; in between they are interpolated linearly, and
            outside the nearest one holds.
        scales: c at those steps. Negative ones count as zero, for no optimizer descends with a negative rate.
        schedule: step -> factor of the learning rate, which c multiplies: the schedule the recorded run had anyway.

    Raises:
        ValueError: lengths differ, steps are out of order, or a scale is not finite.
    """
    times, values = np.asarray(steps, dtype=float), np.asarray(scales, dtype=float)
    if times.shape != values.shape or times.ndim != 1 or not len(times):
        raise ValueError(f"one scale for each step, got shapes {times.shape} and {values.shape}")
    if (np.diff(times) <= 0).any():
        raise ValueError("steps must be in ascending order; give the schedule of one run")
    if not np.isfinite(values).all():
        raise ValueError(f"the scale at step {times[~np.isfinite(values)][0]:g} is not finite")
    # an optimizer does not climb
    values = values.clip(min=0)
    return LambdaLR(optimizer, lambda step: float(np.interp(step, times, values)) * (schedule(step) if schedule else 1))
