"""One step of learning, and its meta-gradient: ∇_φ L_T(f_{θ'(φ)}(x_val), y_val) with θ' = U(θ, ∇_θ M_φ).

``forward_mode_step``, for one inner step, never forms a second derivative of the base model. With f the training
output, g = ∂M_φ/∂f, and v = ∇_θ' L_T one ordinary backward pass on the meta batch,

    w = (∂U/∂g)ᵀ v           the optimizer's own derivative, elementwise                                     (1)
    u = J_f(θ) w             one forward-mode pass of the base model, without a graph                       (2)
    ∇_φ L_T = ∇_φ ⟨∂M_φ/∂f (f, y), u⟩    derivatives of the small loss network alone                       (3)

It follows from ∇_θ M_φ = J_fᵀ g: differentiating θ' along φ gives (∂U/∂g) J_fᵀ ∂g/∂φ, and the products are taken from
the left. Row b of u says how example b's output would move along the (negative) meta-direction: which examples shape
the loss. Cost: two forward-backward passes and a tangent pass, which for a large model are between 8/3 and 3 plain
steps. The outputs of layers with a large fan-in are kept for the tangent pass, which need not compute them again; they
are what is needed beyond plain training's memory. Two options save more time:

- ``finite_difference=True`` replaces (2) by one more forward pass, and is approximate;
- ``shared_forward_step`` takes the *next training batch* as its meta batch. The forward pass that gives v is then the
  next step's training pass, kept until φ is known, with the outputs of all its layers; same numbers, one forward pass
  less.

Models and optimizers that forward mode cannot serve are for :mod:`adalfl_lite.engines.unrolled`.

Each checks (2) at every step by the identity ⟨∇_θ M_φ, w⟩ = ⟨g, u⟩, both sides of which are the derivative of M_φ along
w (:func:`~adalfl_lite.engines.tangents.check_agreement`): where they differ, the model's backward pass is not the one
that u belongs to, and the step is refused.

All update the model and the optimizer exactly as ``optimizer.step()`` would, momentum and BatchNorm buffers included;
the meta batch passes through the model in its current mode and leaves buffers and the random state as they were. A step
that fails leaves everything as it was (:class:`~adalfl_lite.passes.Undo`).

A batch may come as a list of micro batches: the step is that on their union (where no layer mixes the examples of a
batch), weighted by their lengths, and takes the memory of one of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from adalfl_lite.checks import check_scalar
from adalfl_lite.engines.closed_form import Along, derivatives, in_closed_form
from adalfl_lite.engines.distributed import average
from adalfl_lite.engines.steps import (
    CHANGED,
    NO_CLIPPING,
    Batch,
    Batches,
    add,
    backward,
    check_early,
    check_step,
    joined,
    micro_batches,
    shares_of,
    take_step,
    total,
    weighted,
)
from adalfl_lite.engines.tangents import (
    LayerOutputs,
    bound_of,
    check_agreement,
    finite_difference_tangent,
    inner_product,
    output_tangent,
    tolerance_of,
)
from adalfl_lite.engines.updates import Clipping
from adalfl_lite.losses.network import LossNetwork
from adalfl_lite.losses.task import Loss, output_pairs
from adalfl_lite.passes import (
    Attributes,
    Buffers,
    RandomState,
    Undo,
    buffers_of,
    clones,
    forward,
    optimizer_parameters,
    parameters_of,
    replaced,
    same_values,
    unmarked,
    write,
)

KEPT_FAN_IN = 1000
"""``forward_mode_step`` keeps the outputs of layers with at least so many inputs for the tangent pass, see
:class:`~adalfl_lite.engines.tangents.LayerOutputs`."""


@dataclass(frozen=True)
class MetaStep:
    """What one step leaves behind; θ and the optimizer state have been updated in place."""

    meta_gradient: list[Tensor] = field(repr=False)
    """∇_φ L_T, one tensor per parameter of the loss network that requires a gradient."""
    learned_loss: Tensor
    """M_φ on the training batch before the update, a scalar. Its size means nothing, for only its slope trains; what
    tells how training goes is ``task_loss``."""
    task_loss: Tensor
    """L_T on the meta batch after the update, a scalar."""
    prediction: Tensor = field(repr=False)
    """Training output f before the update, (B, C)."""
    output_tangent: Tensor | None = field(repr=False)
    """u of equation (2), (B, C); None from ``unrolled_step``, or where f does not depend on θ."""


def forward_mode_step(
    model: nn.Module,
    loss_network: nn.Module,
    optimizer: Optimizer,
    batch: Batches,
    meta_batch: Batches,
    task_loss: Loss,
    *,
    finite_difference: bool = False,
    clipping: Clipping = NO_CLIPPING,
    autocast: torch.dtype | None = None,
    process_group: ProcessGroup | None = None,
    undo: Undo | None = None,
) -> MetaStep:
    """One base step with M_φ and its meta-gradient by equations (1) to (3).

    Args:
        model: f_θ; its parameters that ``optimizer`` holds are updated in place.
        loss_network: M_φ, called as (prediction, target) -> scalar.
        optimizer: any torch.optim optimizer over ``model``'s parameters with a differentiable update.
        batch: (inputs, targets) for the base step, or a list of such micro batches.
        meta_batch: (inputs, targets) on which L_T is taken at the new θ', or a list of such micro batches.
        task_loss: L_T, called as (prediction, target) -> scalar.
        finite_difference: approximate u by one more forward pass, see :mod:`adalfl_lite.engines.tangents`.
        clipping: of the gradient, before the optimizer has it.
        autocast: dtype for the model's passes; the losses see float32 predictions.
        process_group: processes that hold equal shares of the batches, see :mod:`adalfl_lite.engines.distributed`.
        undo: of these models and optimizers, if the step is part of something that may fail later.

    Raises:
        NotImplementedError: the model has no derivative of this kind, or one that is not its backward pass's.
        FloatingPointError: the learned loss is not finite (seen here on the CPU only).
        ValueError, TypeError: something above cannot work, with the reason.
    """
    parts = micro_batches(batch)
    fan_in = KEPT_FAN_IN if len(parts) == 1 and not finite_difference else math.inf
    with undo or Undo(model, optimizer) as undo:
        check_step(model, optimizer)
        passes = (_training_pass(model, part, autocast, fan_in) for part in parts)
        shares, meta_parts = shares_of(parts), micro_batches(meta_batch)
        return _step(
            model,
            loss_network,
            optimizer,
            zip(shares, passes, strict=True),
            meta_parts,
            task_loss,
            undo,
            finite_difference=finite_difference,
            keep=False,
            clipping=clipping,
            autocast=autocast,
            group=process_group,
        )[0]


def shared_forward_step(
    model: nn.Module,
    loss_network: nn.Module,
    optimizer: Optimizer,
    batch: Batches,
    next_batch: Batches,
    task_loss: Loss,
    kept: ForwardPass | None = None,
    *,
    clipping: Clipping = NO_CLIPPING,
    autocast: torch.dtype | None = None,
    process_group: ProcessGroup | None = None,
    undo: Undo | None = None,
) -> tuple[MetaStep, ForwardPass]:
    """:func:`forward_mode_step` with the next training batch as its meta batch, and the pass over it, kept.

    Hand the pass to the next call. It is used if that call's ``batch`` is this ``next_batch``, the same two tensors,
    and neither they nor the model have changed; otherwise it is dropped and the batch passes through the model again.
    So the result is the same in every case; only the time differs.
    """
    if len(micro_batches(batch)) + len(micro_batches(next_batch)) != 2:
        raise ValueError("engine='shared' takes one batch at a time; for micro batches use engine='forward'")
    (first,), (second,) = micro_batches(batch), micro_batches(next_batch)
    with undo or Undo(model, optimizer) as undo:
        check_step(model, optimizer)
        fits = kept is not None and kept.fits(model, first)
        training = _taken_up(model, kept) if kept is not None and fits else _training_pass(model, first, autocast, 0)
        return _step(
            model,
            loss_network,
            optimizer,
            iter([(1.0, training)]),
            [second],
            task_loss,
            undo,
            finite_difference=False,
            keep=True,
            clipping=clipping,
            autocast=autocast,
            group=process_group,
        )


@dataclass(frozen=True)
class ForwardPass:
    """A forward pass with its graph, and what it takes to repeat it, or to let it count later."""

    batch: Batch
    prediction: Tensor
    buffers: Buffers
    """The model's buffers before the pass."""
    random: RandomState
    """The random state before the pass."""
    new_random: RandomState
    """And after it."""
    found: Attributes
    """The modules' attributes before the pass."""
    outputs: LayerOutputs = field(repr=False)
    """What its layers gave, as far as it was kept."""
    new_buffers: dict[int, Tensor] = field(default_factory=dict)
    """What the pass made of the buffers; empty if it changed the model's own."""
    attributes: Attributes | None = None
    """What it made of the modules' attributes; None if it changed the model's own."""
    circumstances: list[Any] = field(default_factory=list)
    """All that the pass depended on, and copies of its tensors."""

    def fits(self, model: nn.Module, batch: Batch) -> bool:
        """Whether a training pass over ``batch`` would repeat this pass."""
        if any(ours is not theirs for ours, theirs in zip(self.batch, batch, strict=True)):
            return False
        tensors, copies, *rest = self.circumstances
        now, _, *rest_now = _circumstances(model, batch, copy=False)
        if rest != rest_now or len(now) != len(tensors) or any(a is not b for a, b in zip(now, tensors, strict=True)):
            return False
        if self.random != self.new_random and self.random != RandomState(model):  # it would draw other numbers now
            return False
        return same_values(now, copies)  # also what was changed by way of .data or numpy


@dataclass(frozen=True)
class _Part:
    """What remains of the training pass over a micro batch once its graph has gone."""

    share: float
    """Of the whole batch."""
    training: ForwardPass
    derivative: _OutputDerivative


def _step(
    model: nn.Module,
    loss_network: nn.Module,
    optimizer: Optimizer,
    training: Iterator[tuple[float, ForwardPass]],
    meta_parts: Sequence[Batch],
    task_loss: Loss,
    undo: Undo,
    *,
    finite_difference: bool,
    keep: bool,
    clipping: Clipping,
    autocast: torch.dtype | None,
    group: ProcessGroup | None,
) -> tuple[MetaStep, ForwardPass]:
    """Equations (1) to (3), for a batch in parts.

    Args:
        training: the share of each part in the batch, and its pass, which is made as it is asked for: the graph of one
            has gone before the next begins.
        undo: holds copies of θ.
        keep: return the pass over the meta batch with its graph.
        model, loss_network, optimizer, meta_parts, task_loss: see :func:`forward_mode_step`, and so are the others.
    """
    parameters, before = optimizer_parameters(optimizer), undo.before

    # ∇_θ M_φ, by the backward pass of the model's own loop: whatever hooks into that is in the identity below
    parts: list[_Part] = []
    for share, passed in training:
        derivative = _OutputDerivative(loss_network, passed.prediction.detach(), passed.batch[1])
        check_early(average([derivative.loss], group)[0], model)
        backward(passed.prediction, parameters, weighted(share, [derivative.value])[0])
        parts.append(_Part(share, replace(passed, prediction=passed.prediction.detach()), derivative))
        del passed
    if not undo.unmoved():
        raise ValueError(CHANGED)
    after = RandomState(model)  # of the model's passes, and of the loss network's
    learned_loss = average([total([(part.share, part.derivative.loss) for part in parts])], group)[0]
    found = [parameter.grad for parameter in parameters]
    reached = [i for i, gradient in enumerate(found) if gradient is not None]
    gradients = average([gradient for gradient in found if gradient is not None], group)
    del found

    # θ' = U(θ, g)
    pullback = take_step(optimizer, parameters, reached, gradients, clipping)

    # v = ∇_θ' L_T
    moved = [parameters[i] for i in reached]
    v: list[Tensor] = []
    meta_losses = []
    buffers = Buffers(model)
    for share, meta_part in zip(shares_of(meta_parts), meta_parts, strict=True):
        meta, meta_loss, gradient_v = meta_pass(model, buffers, meta_part, task_loss, moved, autocast, keep)
        meta_losses.append((share, meta_loss))
        v = add(v, weighted(share, gradient_v))
        del gradient_v

    # equation (1): w = (∂U/∂g)ᵀ v
    w = pullback(average(v, group))
    del v

    # equation (2): u = J_f(θ) w, for each part as its training pass was
    tangents = {id(parameters[i]): (before[i], direction) for i, direction in zip(reached, w, strict=True)}
    unreached = {id(parameters[i]): before[i] for i in set(range(len(before))) - set(reached)}
    along = torch.zeros((), device=learned_loss.device)
    found_tangents: list[Tensor | None] = []
    meta_gradient: list[Tensor] = []
    for part in parts:
        passed = part.training
        state = {**passed.buffers.fresh(), **unreached}
        passed.random.restore()
        tangent: Tensor | None
        if finite_difference:
            tangent = finite_difference_tangent(
                model, state, tangents, passed.batch[0], autocast, passed.prediction, passed.found
            )
        else:
            tangent = output_tangent(model, state, tangents, passed.batch[0], autocast, passed.outputs, passed.found)
        u = torch.zeros_like(passed.prediction) if tangent is None else tangent
        along = along + part.share * inner_product(part.derivative.value, u)
        found_tangents.append(tangent)

        # equation (3): ∇_φ ⟨∂M_φ/∂f, u⟩
        meta_gradient = add(meta_gradient, weighted(part.share, part.derivative.gradient_along(u)))
    after.restore()

    *meta_gradient, task, along = average([*meta_gradient, total(meta_losses), along], group)
    dtypes = [autocast or parts[0].training.prediction.dtype, *(g.dtype for g in gradients)]
    tolerance = tolerance_of(*dtypes, finite_difference=finite_difference)

    def bound() -> Tensor:
        slopes = [part.share * part.derivative.value for part in parts]
        tangents = [torch.zeros_like(s) if u is None else u for s, u in zip(slopes, found_tangents, strict=True)]
        return average([bound_of(slopes, tangents)], group)[0]

    check_agreement(gradients, w, along, bound, tolerance=tolerance)
    prediction = joined([part.training.prediction for part in parts])
    tangent = None if any(t is None for t in found_tangents) else joined([t for t in found_tangents if t is not None])
    return MetaStep(meta_gradient, learned_loss, task, prediction, tangent), meta


class _OutputDerivative:
    """∂M_φ/∂f of a batch, and equation (3): in closed form where that is known, else by double backward."""

    def __init__(self, loss_network: nn.Module, prediction: Tensor, target: Tensor):
        self.network = loss_network
        self.along: Along | None = None
        if isinstance(loss_network, LossNetwork) and in_closed_form(loss_network):
            self.dtype = next(loss_network.parameters()).dtype
            pairs = output_pairs(loss_network.kind, prediction, target, self.dtype)
            with torch.no_grad():
                self.loss, value, self.along = derivatives(loss_network, None, *pairs)
            self.value = value.view_as(prediction).to(prediction.dtype)
        else:
            output = prediction.detach().requires_grad_(True)
            loss = loss_network(output, target)
            check_scalar(loss)
            (self.graph,) = torch.autograd.grad(loss, output, create_graph=True)
            self.loss, self.value, self.dtype = loss.detach(), self.graph.detach(), self.graph.dtype

    def gradient_along(self, tangent: Tensor) -> list[Tensor]:
        """∇_φ ⟨∂M_φ/∂f, u⟩, one tensor per parameter that requires a gradient."""
        parameters, tangent = list(self.network.parameters()), tangent.to(self.dtype)
        if self.along is not None:
            with torch.no_grad():
                found = self.along(tangent)
            return [gradient for p, gradient in zip(parameters, found, strict=True) if p.requires_grad]
        phi = [p for p in parameters if p.requires_grad]
        options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
        return list(torch.autograd.grad(self.graph, phi, tangent, **options))


def _training_pass(model: nn.Module, batch: Batch, autocast: torch.dtype | None, fan_in: float) -> ForwardPass:
    """f(x) as in plain training: buffers, attributes and random state move on."""
    random, buffers, found, parameters = RandomState(model), Buffers(model), Attributes(model), parameters_of(model)
    versions = [parameter._version for parameter in parameters]
    with LayerOutputs(fan_in) as outputs:
        prediction = forward(model, batch[0], autocast)
    if [parameter._version for parameter in parameters] != versions:
        raise ValueError(CHANGED)
    return ForwardPass(batch, own(prediction), buffers, random, RandomState(model), found, outputs)


def own(prediction: Tensor) -> Tensor:
    """The prediction, cloned where it may be a view of a parameter, which will move."""
    return prediction.clone() if prediction._is_view() or prediction.is_leaf else prediction


def meta_pass(
    model: nn.Module,
    buffers: Buffers,
    batch: Batch,
    task_loss: Loss,
    parameters: list[Tensor],
    autocast: torch.dtype | None,
    keep: bool = False,
) -> tuple[ForwardPass, Tensor, list[Tensor]]:
    """f(x) on copies of the buffers, L_T and its gradient; the caller restores the random state.

    The backward pass is taken before the model has its own buffers back, since a checkpoint passes through it again.
    """
    random, found, new_buffers = RandomState(model), Attributes(model), buffers.fresh()
    with unmarked(model), replaced(model, new_buffers):
        with LayerOutputs(0 if keep else math.inf) as outputs:
            prediction = own(forward(model, batch[0], autocast))
        attributes = Attributes(model) if keep else None
        loss = task_loss(prediction, batch[1])
        options: dict[str, Any] = {"retain_graph": keep, "allow_unused": True, "materialize_grads": True}
        v = list(torch.autograd.grad(loss, parameters, **options)) if parameters else []
    states = (buffers, random, RandomState(model), found, outputs, new_buffers, attributes)
    circumstances = _circumstances(model, batch) if keep else []
    return ForwardPass(batch, prediction, *states, circumstances), loss.detach(), v


def _taken_up(model: nn.Module, kept: ForwardPass) -> ForwardPass:
    """Let a meta pass count as the training pass: buffers, attributes and the random state move on as it left them."""
    with torch.no_grad():
        for buffer in buffers_of(model):
            write(buffer, kept.new_buffers[id(buffer)])
    if kept.attributes is not None:
        kept.attributes.restore()
    if kept.random == kept.new_random:  # the pass draws no numbers; whoever has drawn some since may keep them
        now = RandomState(model)
        return replace(kept, random=now, new_random=now)
    kept.new_random.restore()
    return kept


def _circumstances(model: nn.Module, batch: Batch, copy: bool = True) -> list[Any]:
    """The tensors that a pass depends on, copies of them, how often they changed in place, and modules' attributes."""
    tensors = [batch[0], *parameters_of(model), *buffers_of(model)]
    return [
        tensors,
        clones(tensors) if copy else [],
        [(t._version, t.requires_grad) for t in tensors],
        Attributes(model),
    ]
