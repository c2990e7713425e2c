"""S learners as one program over stacked tensors: what each would learn alone, in far less time.

Each step is that of the learner alone, to rounding. What many steps make of rounding is another matter: a training that
is sensitive to it, as Algorithm 1 is over thousands of meta steps, ends elsewhere, as it would on another machine.
A small model leaves a processor idle, so ten seeds in one program cost about as much as three one after another
(``benchmarks/seeds.py``). The learners never meet. How tensors are stacked is told in
:mod:`adalfl_lite.engines.stacked`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from adalfl_lite.checks import check_initialised
from adalfl_lite.engines.stacked import (
    Stack,
    StackedForward,
    StackedLoss,
    StackedStep,
    check_elementwise,
    check_stackable,
    keep_freed_memory,
    meta_step,
)
from adalfl_lite.engines.steps import Batch
from adalfl_lite.learn.base import Learner, Plain
from adalfl_lite.learn.learning_rate import OnlineLearningRate
from adalfl_lite.learn.online import OnlineLoss
from adalfl_lite.losses.network import LossNetwork
from adalfl_lite.losses.task import Loss, task_loss
from adalfl_lite.passes import Undo

KIND_OF = {
    task_loss("classification"): "classification",
    F.cross_entropy: "classification",
    task_loss("regression"): "regression",
    F.mse_loss: "regression",
}
"""The task losses that a stack has of its own, and their kinds."""


class Stacked(Learner):
    """S learners of one kind, all in step: every step is to each what it would be alone, to rounding, if it is finite.

    Args:
        learners: S of :class:`~adalfl_lite.learn.Plain`, of :class:`~adalfl_lite.learn.OnlineLoss` or of
            :class:`~adalfl_lite.learn.OnlineLearningRate`, that have taken no step yet: with models of one architecture
            without dropout (BatchNorm keeps statistics per model), optimizers SGD, Adam or AdamW with the same settings
            over all parameters, and the task loss of their kind or loss networks of one architecture. They are used up:
            train this in their place; their models and losses follow where :meth:`write_back` is called, which ``fit``
            does.

    Raises:
        ValueError, TypeError: they do not fit together, or cannot be stacked, with the reason.
    """

    def __init__(self, learners: Sequence[Plain | OnlineLoss | OnlineLearningRate]):
        learners = list(learners)
        if not learners:
            raise ValueError("nothing to stack: give one learner or more")
        first = learners[0]
        if wrong := [one for one in learners if type(one) is not type(first)]:
            raise TypeError(f"a stack is of one kind, got {type(first).__name__} and {type(wrong[0]).__name__}")
        for one in learners:
            _check_member(one)
        for parts in ([one.models[0] for one in learners], [one.losses[0] for one in learners]):
            modules = [id(part) for part in parts if isinstance(part, nn.Module)]
            if len(set(modules)) < len(modules):
                raise ValueError("two learners of a stack share a model or a loss; give each its own")
        self.models, self.losses = [one.models[0] for one in learners], [one.losses[0] for one in learners]
        for model in self.models:
            check_initialised(model)
        # a stack trains with loss networks or with the task loss, and measures with the task loss: nothing else
        kinds = {_kind_of(loss) for loss in self.losses}
        kinds |= {_kind_of_task_loss(one.task_loss) for one in learners if not isinstance(one, Plain)}
        if len(kinds) != 1:
            raise ValueError(f"a stack has one task loss, got those of {' and '.join(sorted(kinds))}; stack them apart")
        networks = [loss for loss in self.losses if isinstance(loss, nn.Module)]
        if networks and len(networks) != len(learners):
            raise ValueError("some are trained with a loss network and some are not; stack them apart")
        check_stackable(self.models, networks)
        if isinstance(first, OnlineLoss) and not all(p.requires_grad for n in networks for p in n.parameters()):
            raise ValueError("some weights of a loss network are frozen; train such learners one by one")
        keep_freed_memory()
        self.stack = Stack(self.models)
        self.loss = StackedLoss([n for n in networks if isinstance(n, LossNetwork)]) if networks else None
        optimizers = [one.optimizer for one in learners]
        self.described = _described(learners, self.loss)
        # learned rates are kept apart, one for each learner
        rate = 1.0 if isinstance(first, OnlineLearningRate) else None
        self.optimizer = _of_stack(optimizers, self.models, self.stack.parameters, rate)
        self.engine = StackedForward(self.stack, self.loss, self.optimizer, kinds.pop())
        self.adapts = first.adapts
        self.meta_optimizer: Optimizer | None = None
        self.log_rates: Tensor | None = None
        if isinstance(first, OnlineLoss) and self.loss is not None:
            metas = [one.meta_optimizer for one in learners if isinstance(one, OnlineLoss)]
            self.meta_optimizer = _of_stack(metas, networks, self.loss.parameters)
        elif isinstance(first, OnlineLearningRate):
            rates = [one.learning_rate for one in learners if isinstance(one, OnlineLearningRate)]
            metas = [one.meta_optimizer for one in learners if isinstance(one, OnlineLearningRate)]
            self.log_rates = torch.stack([rate.log_rates.detach() for rate in rates])
            self.meta_optimizer = _of_stack(metas, rates, [self.log_rates])

    def collate(self, batches: Sequence[Batch]) -> Batch:
        """Batches of one size, one a model, below each other: inputs (S, B, ...) and targets (S, B) or (S, B, K)."""
        inputs, targets = zip(*batches, strict=True)
        return torch.stack(inputs), torch.stack(targets)

    def step(self, batch: Any, meta_batch: Any = None) -> StackedStep:
        """One step of every learner on its part of stacked batches, see :meth:`collate`; an exception undoes it.

        Raises:
            FloatingPointError: something of a learner is not finite; its place is named.
            NotImplementedError: the models cannot pass as a stack.
        """
        if self.adapts and meta_batch is None:
            raise ValueError("what is learned beside the models needs a meta batch; give step(batch, meta_batch)")
        return self.try_step(batch, meta_batch, strict=True)

    def try_step(self, batch: Batch, meta_batch: Batch | None = None, *, strict: bool = False) -> StackedStep:
        """:meth:`step`, which lets a learner that is not finite be, and keeps what it learned as it was."""
        others = [] if self.meta_optimizer is None else [self.meta_optimizer]
        saved = {name: buffer.clone() for name, buffer in self.stack.buffers.items()}
        try:
            with Undo(self.stack.model, self.optimizer, *others) as undo:
                if self.log_rates is not None and meta_batch is not None:
                    result = self._step_of_rates(batch, meta_batch, undo)
                else:
                    result = self.engine(batch, meta_batch if self.adapts else None, undo)
                if strict and not (finite := result.finite()).all():
                    bad = ", ".join(str(i) for i, good in enumerate(finite.tolist()) if not good)
                    raise FloatingPointError(f"a loss of learner {bad} was not finite; lower the learning rate")
                if self.meta_optimizer is not None:
                    meta_step(self.meta_optimizer, result)
        except BaseException:
            # buffers of the stack are no part of the model that Undo knows
            for name, buffer in saved.items():
                self.stack.buffers[name].copy_(buffer)
            raise
        return result

    def _step_of_rates(self, batch: Batch, meta_batch: Batch, undo: Undo) -> StackedStep:
        """Algorithm 4 for S rates, though the optimizer has one: θ' = θ + α (U(θ, g; 1) − θ), for U is proportional."""
        rates = self.log_rates.exp()  # type: ignore[union-attr]
        # the optimizer's rate is 1 here, so that the parameters have moved by the whole of −d(θ, g)
        learned = self.engine(batch, None, undo).training_loss
        slopes = torch.zeros_like(rates)
        with torch.no_grad():
            moved = []
            old = iter(undo.before)
            for i, group in enumerate(self.optimizer.param_groups):
                for parameter in group["params"]:
                    before = next(old)
                    # α of each learner, along the leading dimension
                    scale = rates[:, i].to(before).view(-1, *[1] * (before.ndim - 1))
                    # θ' = θ − α d: what each optimizer would have done with its own rate
                    parameter.copy_(before + scale * (parameter - before))
                    moved.append((parameter, before, i))
        meta_loss, v = self.engine.gradient_after(meta_batch)
        found = {id(parameter): gradient for parameter, gradient in zip(self.stack.parameters, v, strict=True)}
        for parameter, before, i in moved:  # equation (1) of learn.learning_rate
            step = parameter.detach() - before
            slopes[:, i] += (found[id(parameter)] * step).flatten(1).sum(1).double()
        return StackedStep(learned, meta_loss, [slopes])

    def state_dict(self) -> dict[str, Any]:
        """Everything, stacked; loadable with ``weights_only=True``."""
        state: dict[str, Any] = {"models": self.stack.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.loss is not None:
            state["losses"] = self.loss.state_dict()
        if self.meta_optimizer is not None:
            state["meta_optimizer"] = self.meta_optimizer.state_dict()
        if self.log_rates is not None:
            state["learning_rates"] = {"log_rates": self.log_rates}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back a state that :meth:`state_dict` of one of the same make gave."""
        self.stack.load_state_dict(state["models"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.loss is not None:
            self.loss.load_state_dict(state["losses"])
        if self.meta_optimizer is not None:
            self.meta_optimizer.load_state_dict(state["meta_optimizer"])
        if self.log_rates is not None:
            self.log_rates.copy_(state["learning_rates"]["log_rates"])

    def write_back(self) -> None:
        """Bring the S models and loss networks to where the stack is."""
        self.stack.write_back()
        if self.loss is not None:
            self.loss.write_back()

    def learning_rates(self) -> list[float]:
        """The base learning rate of each model, that of its first parameter group."""
        return super().learning_rates() if self.log_rates is None else self.log_rates[:, 0].exp().tolist()

    def watched(self) -> dict[str, Tensor]:
        """By name, what must be finite for training to go on: the stacked parameters."""
        names = [name for name, _ in self.stack.model.named_parameters()]
        return {f"parameter {name}": p for name, p in zip(names, self.stack.parameters, strict=True)}

    def describe(self) -> dict[str, Any]:
        """See :meth:`~adalfl_lite.learn.base.Learner.describe`: what the members have in common."""
        return self.described


def _kind_of(loss: Loss) -> str:
    """The kind of a loss that a stack trains with: of a loss network, or of a task loss."""
    return loss.kind if isinstance(loss, LossNetwork) else _kind_of_task_loss(loss)


def _kind_of_task_loss(loss: Loss) -> str:
    """The kind of a task loss, "classification" or "regression"; ``TypeError`` if it is none."""
    kind = KIND_OF.get(loss)
    if kind is None:
        name = getattr(loss, "__name__", type(loss).__name__)
        raise TypeError(
            f"{name} cannot be stacked; give LossNetworks of known layers, or the task loss of one kind, such as"
            " torch.nn.functional.cross_entropy"
        )
    return kind


def _check_member(learner: Learner) -> None:
    """Raise for a learner that is of another kind, is under way, or has a setting which a stack has not."""
    if type(learner) not in (Plain, OnlineLoss, OnlineLearningRate):  # a subclass may do something else in its step
        name = type(learner).__name__
        raise TypeError(f"{name} cannot be stacked; give Plain, OnlineLoss or OnlineLearningRate learners")
    if learner.optimizer.state:
        raise ValueError("a learner has taken steps already; stack fresh ones, and load a state into the stack")
    described = learner.describe()
    for name in ("autocast", "clip_gradient_norm", "clip_gradient_value", "clip_meta_gradient", "engine"):
        if (value := described.get(name)) is not None:
            raise ValueError(f"{name}={value!r} is not for a stack; leave it out, or train one by one")
    if isinstance(learner, OnlineLoss) and (learner.problem.process_group or learner.compiled):
        raise ValueError("process_group= and compile= are not for a stack; leave them out, or train one by one")


def _described(learners: Sequence[Learner], loss: StackedLoss | None) -> dict[str, Any]:
    """What the first member describes, and what others do differently, by name with a value for each."""
    found = [one.describe() for one in learners]
    values = {name: [one[name] for one in found] for name in found[0]}
    different = {name: of_all for name, of_all in values.items() if any(one != of_all[0] for one in of_all)}
    return {**found[0], "loss": None if loss is None else str(learners[0].losses[0]), "members": different}


def _of_stack(
    optimizers: Sequence[Optimizer],
    modules: Sequence[nn.Module],
    stacked: Sequence[Tensor],
    rate: float | None = None,
) -> Optimizer:
    """One optimizer over stacked tensors, of the same kind, groups and settings as those of the members.

    Where there is a ``rate``, it has that one, whatever theirs are.
    """
    first = optimizers[0]
    check_elementwise(first)
    layouts = []
    for optimizer, module in zip(optimizers, modules, strict=True):
        place = {id(parameter): i for i, parameter in enumerate(module.parameters())}
        layouts.append([[place[id(p)] for p in group["params"]] for group in optimizer.param_groups])
        if sorted(i for group in layouts[-1] for i in group) != list(range(len(place))):
            raise ValueError(
                "the optimizer of a stacked learner must hold every parameter; build it from .parameters()"
            )
        if layouts[-1] != layouts[0] or _settings(optimizer, rate) != _settings(first, rate):
            raise ValueError("the optimizers differ in kind, groups or settings; all must be the same")
    make: Any = type(first)
    return make(
        [
            {**settings, "params": [stacked[i] for i in layout]}
            for settings, layout in zip(_settings(first, rate)[1:], layouts[0], strict=True)
        ]
    )


def _settings(optimizer: Optimizer, rate: float | None) -> list[Any]:
    """The kind of an optimizer, and the settings of its groups, with the ``rate`` if there is one."""
    left_out = ("params", "initial_lr")  # the latter is a scheduler's
    groups = [{name: value for name, value in g.items() if name not in left_out} for g in optimizer.param_groups]
    if rate is not None:
        groups = [{**group, "lr": rate} for group in groups]
    return [type(optimizer), *groups]
