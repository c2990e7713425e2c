"""Algorithm 2: the loss network adapts after every step of the base model (paper, section on online adaptation)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from adalfl_lite.checks import check_batch, check_finite, check_values
from adalfl_lite.engines import ENGINES, EXACT
from adalfl_lite.engines.base import Engine, MetaStep, Problem
from adalfl_lite.engines.compiled import Compiled
from adalfl_lite.engines.distributed import start_equal
from adalfl_lite.engines.steps import Batches, advance, check_step, micro_batches
from adalfl_lite.engines.unrolled import Unrolled
from adalfl_lite.engines.updates import Clipping
from adalfl_lite.learn.base import Learner, check_same_device, describe_training
from adalfl_lite.losses.task import Loss, task_loss
from adalfl_lite.passes import Undo, optimizer_parameters
from adalfl_lite.provenance import describe_function, describe_optimizer

META_LEARNING_RATE = {"classification": 1e-4, "regression": 1e-3}
"""η of Algorithm 2, by the kind of the loss network; one without a kind has that of classification."""


class OnlineLoss(Learner):
    """Trains a model with a loss network that is updated after each of the model's steps:

        θ ← U(θ, ∇_θ M_φ(train batch)),     φ ← φ − η ∇_φ L_T(meta batch, θ)    (1)

    The loop, the data and the optimizer stay yours; replace ``loss.backward(); optimizer.step()`` by :meth:`step`.

    Args:
        model: f_θ. Its mode is respected: call ``model.train()`` yourself.
        loss_network: M_φ, usually a :class:`~adalfl_lite.losses.LossNetwork`; any module of (prediction, target).
        optimizer: torch.optim optimizer over the model's parameters, with a differentiable update.
        meta_optimizer: optimizer over ``loss_network.parameters()``; by default Adam.
        meta_learning_rate: η of the default meta-optimizer, by default :data:`META_LEARNING_RATE` of the loss network's
            kind; 0 freezes φ. Refused beside a ``meta_optimizer``, which has its own.
        task_loss: L_T(prediction, target), which knows the model by its prediction alone; by default the one of
            ``loss_network.kind``.
        clip_meta_gradient: scale ∇_φ L_T down to this norm where it is longer; None, the default, leaves it.
        clip_gradient_norm: scale ∇_θ M_φ down to this norm where it is longer, before the optimizer has it, as
            ``torch.nn.utils.clip_grad_norm_`` does; the meta-gradient goes through it.
        clip_gradient_value: or clamp its entries to this size, as ``clip_grad_value_`` does.
        engine: a name in :data:`~adalfl_lite.engines.ENGINES`: "forward" (exact, fast), "shared" (the same, faster
            where the meta batch is the next training batch), "finite-difference" (approximate, faster) or "unrolled"
            (reference).
        autocast: dtype, such as ``torch.bfloat16``, for the base model's passes; φ and the losses keep their own.
        process_group: of ``torch.distributed``, such as ``torch.distributed.group.WORLD``: every process hands an equal
            share of each batch to :meth:`step`, and all learn as one process with the whole batches would. They start
            from the first one's θ and φ. BatchNorm sees the shares, as in torch's own data parallelism.
        compile: a mode of ``torch.compile`` for the whole step, such as "default", or "reduce-overhead", which on a GPU
            records CUDA graphs; None does not compile. For engine "forward", models without dropout and a
            :class:`~adalfl_lite.losses.network.LossNetwork`. The first step takes long, see
            :mod:`adalfl_lite.engines.compiled`.

    Raises:
        ValueError, TypeError: something above cannot work, with the reason.
    """

    adapts = True

    def __init__(
        self,
        model: nn.Module,
        loss_network: nn.Module,
        optimizer: Optimizer,
        *,
        meta_optimizer: Optimizer | None = None,
        meta_learning_rate: float | None = None,
        task_loss: Loss | None = None,
        clip_meta_gradient: float | None = None,
        clip_gradient_norm: float | None = None,
        clip_gradient_value: float | None = None,
        engine: str = "forward",
        autocast: torch.dtype | None = None,
        process_group: ProcessGroup | None = None,
        compile: str | None = None,
    ):
        check_engine(engine)
        check_meta_rate(meta_learning_rate, meta_optimizer)
        clipping = Clipping(clip_gradient_norm, clip_gradient_value)
        if clip_meta_gradient is not None and not clip_meta_gradient > 0:
            raise ValueError(f"clip_meta_gradient must be positive, or None not to clip; got {clip_meta_gradient}")
        # refusals first; from here on things are made, and nothing has moved yet
        check_step(model, optimizer, gradients=False)
        _check_loss_network(loss_network, model, meta_optimizer)
        measured = task_loss or default_task_loss(loss_network)
        self.problem = Problem(model, loss_network, optimizer, measured, clipping, autocast, process_group)
        self.engine = engine
        if compile is not None:
            if engine != "forward":
                raise ValueError(f"compile={compile!r} needs engine='forward' and no process_group; leave it out")
            self._take: Engine = Compiled(self.problem, compile)
        if meta_learning_rate is None:
            kind = getattr(loss_network, "kind", "classification")
            meta_learning_rate = META_LEARNING_RATE.get(kind, META_LEARNING_RATE["classification"])
        self.meta_learning_rate = None if meta_optimizer else meta_learning_rate
        self.meta_optimizer = meta_optimizer or torch.optim.Adam(loss_network.parameters(), lr=meta_learning_rate)
        self.clip_meta_gradient = clip_meta_gradient
        self.model, self.loss_network, self.optimizer, self.task_loss = model, loss_network, optimizer, measured
        self.models, self.losses = [model], [loss_network]
        self._begun = False
        if process_group is not None:
            start_equal([model, loss_network], process_group)

    @property
    def engine(self) -> str:
        """The name of the engine that takes the steps; another may be set between two steps."""
        return self._engine

    @engine.setter
    def engine(self, name: str) -> None:
        check_engine(name)
        self._take = ENGINES[name](self.problem)
        self._engine = name

    @property
    def compiled(self) -> Compiled | None:
        """The compiled engine, where ``compile`` was given."""
        return self._take if isinstance(self._take, Compiled) else None

    def step(self, batch: Batches, meta_batch: Batches | None = None) -> MetaStep:
        """One update of θ on ``batch``, then one of φ on ``meta_batch``; each is (inputs, targets).

        Either may be a list of such pairs, micro batches: the step is then that on all of them together, each weighted
        by its length, and takes the memory of one.

        With ``engine="shared"``, let ``meta_batch`` be the next training batch, and hand the same two tensors to the
        next call as its ``batch``: their forward pass is then run once instead of twice. Any other batch is right too,
        but saves nothing.

        An exception leaves θ, φ, both optimizers' states, buffers, ``.grad`` and the random state as they were, so that
        another step, or another engine, can follow as if this one had not been tried.

        Raises:
            FloatingPointError: the learned loss, the task loss or the meta-gradient is not finite; catch it to leave
                the batch out, or to go back to an earlier :meth:`state_dict`.
            NotImplementedError: the engine has no right derivative of this model; the message names one that has.
            ValueError, TypeError: a batch is not what the model and the losses take; or something would change
                gradients unseen, such as a hook.
        """
        if meta_batch is None:
            raise ValueError(
                "a learned loss needs a meta batch; give step(batch, meta_batch), of validation data if any"
            )
        for name, given in (("batch", batch), ("meta_batch", meta_batch)):
            for part in micro_batches(given):
                check_batch(part, name, self.model)
        # class labels in one and floats in the other would be two different losses
        dtypes = [micro_batches(given)[0][1].dtype for given in (batch, meta_batch)]
        if dtypes[0] != dtypes[1]:
            raise ValueError(f"targets are {dtypes[0]} in batch, {dtypes[1]} in meta_batch; give the same")
        with self._undo() as undo:
            try:
                # equation (1), left: θ moves, and with it comes ∇_φ L_T
                result = self._meta_gradient([batch], meta_batch, undo)
                # equation (1), right: φ moves
                self.apply_meta_gradient(result)
                advance(self.loss_network)
            # say so if it was the data: a NaN in a batch is not a rate that is too large
            except FloatingPointError:
                for name, given in (("batch", batch), ("meta_batch", meta_batch)):
                    for part in micro_batches(given):
                        check_values(part, name)
                raise
        return result

    def meta_gradient(self, batches: Sequence[Batches], meta_batch: Batches) -> MetaStep:
        """Update θ on ``batches``, one inner step each, and return ∇_φ L_T; φ stays. Errors as in :meth:`step`."""
        if len(batches) != 1 and self.problem.process_group is not None:
            raise ValueError(f"with a process_group one inner step is taken at a time, got {len(batches)} batches")
        with self._undo() as undo:
            return self._meta_gradient(batches, meta_batch, undo)

    def _undo(self) -> Undo:
        """Of a whole step; the first one shows whether the model changes parameters that are frozen."""
        return Undo(self.model, self.optimizer, self.meta_optimizer, frozen=not self._begun, loss=self.loss_network)

    def _meta_gradient(self, batches: Sequence[Batches], meta_batch: Batches, undo: Undo) -> MetaStep:
        name = "unrolled" if len(batches) != 1 else self.engine
        try:
            if len(batches) == 1:
                result = self._take(batches[0], meta_batch, undo)
            else:
                result = Unrolled(self.problem).unroll(batches, meta_batch, undo)
            self._begun = True
            return result
        except NotImplementedError as error:
            # before anyone is told to use another engine, that engine is tried on this very step
            remedy = self._remedy(name, batches, meta_batch)
            raise NotImplementedError(f"engine={name!r} cannot serve this model: {error}; {remedy}") from error

    def _remedy(self, failed: str, batches: Sequence[Batches], meta_batch: Batches) -> str:
        """What to do about a step that ``failed`` cannot take: another engine, if one has just been seen to take it."""
        if self.problem.process_group is None and len(batches) == 1:
            for name in ("forward", "unrolled", "finite-difference"):
                if name != failed and self._serves(name, batches[0], meta_batch):
                    approximate = "" if name in EXACT else ", which is approximate"
                    return f"engine={name!r} can{approximate}"
        return "no engine can; remove() the hook, or replace that part of the model by one that torch can differentiate"

    def _serves(self, name: str, batch: Batches, meta_batch: Batches) -> bool:
        """Whether an engine can take this step; it is undone."""
        try:
            with self._undo() as undo:
                ENGINES[name](self.problem)(batch, meta_batch, undo)
                raise _Undone
        except _Undone:
            return True
        except (NotImplementedError, RuntimeError, ValueError, TypeError):
            return False

    def apply_meta_gradient(self, result: MetaStep) -> None:
        """One step of the meta-optimizer with ``result.meta_gradient``, checked to be finite, and clipped if so wished.

        Raises:
            FloatingPointError: see :meth:`step`.
        """
        named = [(name, p) for name, p in self.loss_network.named_parameters() if p.requires_grad]
        values = {"learned loss": result.training_loss, "task loss": result.meta_loss}
        values |= {f"meta-gradient of {name}": g for (name, _), g in zip(named, result.meta_gradient, strict=True)}
        check_finite(values, self.model, ", or initialise the loss network for this optimizer (adalfl_lite.initialise)")
        for (_, parameter), gradient in zip(named, result.meta_gradient, strict=True):
            parameter.grad = gradient
        # on .grad, where torch's own function expects it
        if self.clip_meta_gradient is not None:
            nn.utils.clip_grad_norm_([parameter for _, parameter in named], self.clip_meta_gradient)
        self.meta_optimizer.step()
        # a .grad that stayed would be added to by the user's own backward pass through φ
        for _, parameter in named:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """θ, φ and both optimizers' states, loadable with ``weights_only=True``."""
        return {
            "model": self.model.state_dict(),
            "loss_network": self.loss_network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "meta_optimizer": self.meta_optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave; ``ValueError`` naming what it lacks."""
        if missing := self.state_dict().keys() - state.keys():
            raise ValueError(f"the state lacks {', '.join(sorted(missing))}; give what state_dict() returned")
        self.model.load_state_dict(state["model"])
        self.loss_network.load_state_dict(state["loss_network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.meta_optimizer.load_state_dict(state["meta_optimizer"])

    def describe(self) -> dict[str, Any]:
        """See :meth:`~adalfl_lite.learn.base.Learner.describe`; exact engines, which agree, are not told apart."""
        clipping, autocast = self.problem.clipping, self.problem.autocast
        return {
            **describe_training(self.model, self.loss_network, self.optimizer, clipping, autocast),
            **describe_function("task_loss", self.task_loss),
            "online": True,
            "learn": "loss",
            **describe_meta_optimizer(self.meta_learning_rate, self.meta_optimizer),
            "clip_meta_gradient": self.clip_meta_gradient,
            "engine": None if self.engine in EXACT else self.engine,
        }


class _Undone(Exception):
    """Raised to undo a step that was taken on trial."""


def default_task_loss(loss_network: nn.Module) -> Loss:
    """L_T for the network's ``kind``; ``ValueError`` if it has none."""
    kind = getattr(loss_network, "kind", None)
    if kind is None:
        raise ValueError(f"{type(loss_network).__name__} has no attribute 'kind'; pass task_loss=...")
    return task_loss(kind)


def check_engine(name: str) -> None:
    """Raise ``ValueError`` for a name that is not in :data:`~adalfl_lite.engines.ENGINES`."""
    if name not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}; got {name!r}")


def check_meta_rate(meta_learning_rate: float | None, meta_optimizer: Optimizer | None) -> None:
    """Raise ``ValueError`` for an η that is negative or infinite, or one beside a meta-optimizer that has its own."""
    if meta_learning_rate is None:
        return
    if not 0 <= meta_learning_rate < math.inf:
        raise ValueError(f"meta_learning_rate must be 0 or more and finite, got {meta_learning_rate}")
    if meta_optimizer is not None:
        raise ValueError("meta_learning_rate has no effect on a meta_optimizer of your own; leave one of the two out")


def describe_meta_optimizer(meta_learning_rate: float | None, meta_optimizer: Optimizer) -> dict[str, Any]:
    """η of the default meta-optimizer, or the settings of another."""
    if meta_learning_rate is not None:
        return {"meta_learning_rate": meta_learning_rate, "meta_optimizer": None}
    return {"meta_optimizer": describe_optimizer(meta_optimizer)}


def _check_loss_network(loss_network: nn.Module, model: nn.Module, meta_optimizer: Optimizer | None) -> None:
    if not isinstance(loss_network, nn.Module):
        raise TypeError(
            f"the loss network must be a torch.nn.Module, got {type(loss_network).__name__};"
            " LossNetwork.classification() and LossNetwork.regression() make one"
        )
    phi = {id(parameter) for parameter in loss_network.parameters() if parameter.requires_grad}
    if not phi:
        raise ValueError(
            f"{type(loss_network).__name__} has no parameter that requires a gradient; to keep the loss as it is,"
            " train without OnlineLoss, or unfreeze it and use meta_learning_rate=0"
        )
    check_same_device(loss_network, model)
    if phi & {id(parameter) for parameter in model.parameters()}:
        raise ValueError("the model and the loss network share a parameter; give each its own")
    if meta_optimizer is not None and not phi >= {id(parameter) for parameter in optimizer_parameters(meta_optimizer)}:
        raise ValueError("meta_optimizer holds a parameter that is not φ; build it from loss_network.parameters()")
