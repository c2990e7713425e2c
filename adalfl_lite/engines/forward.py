"""The engine "forward": exact, and without a second derivative of the base model.

With f the training output, g = ∂M_φ/∂f, and v = ∇_θ' L_T one ordinary backward pass on the meta batch, ::

    w = (∂U/∂g)ᵀ v                      (1)  the optimizer's own derivative
    u = J_f(θ) w                        (2)  one forward-mode pass, no graph
    ∇_φ L_T = ∇_φ ⟨∂M_φ/∂f (f, y), u⟩   (3)  of the small loss network alone

It follows from ∇_θ M_φ = J_fᵀ g: differentiating θ' = U(θ, J_fᵀ g) along φ gives (∂U/∂g) J_fᵀ ∂g/∂φ, and the products
are taken from the left. Row b of u says how example b's output would move along the (negative) meta-direction: which
examples shape the loss. Cost: two forward-backward passes and a tangent pass, which for a large model are between 8/3
and 3 plain steps. The outputs of layers with a large fan-in are kept for the tangent pass, which need not compute them
again; they are what is needed beyond plain training's memory.

Two engines save more time: :mod:`~adalfl_lite.engines.shared` and :mod:`~adalfl_lite.engines.finite_difference`; both
are :func:`forward_mode` with one thing changed. Models and optimizers that forward mode cannot serve are for
:mod:`~adalfl_lite.engines.unrolled`.

Each checks (2) at every step by the identity ⟨∇_θ M_φ, w⟩ = ⟨g, u⟩, both sides of which are the derivative of M_φ along
w (:func:`~adalfl_lite.engines.tangents.check_agreement`): where they differ, the model's backward pass is not the one
that u belongs to, and the step is refused.

All update the model and the optimizer exactly as ``optimizer.step()`` would, momentum and BatchNorm buffers included;
the meta batch passes through the model in its current mode and leaves buffers and the random state as they were. A step
that fails leaves everything as it was (:class:`~adalfl_lite.passes.Undo`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from adalfl_lite.checks import check_scalar
from adalfl_lite.engines.base import MetaStep, Problem
from adalfl_lite.engines.closed_form import Along, derivatives, in_closed_form
from adalfl_lite.engines.distributed import average
from adalfl_lite.engines.recorded import ForwardPass, meta_pass, training_pass
from adalfl_lite.engines.steps import (
    CHANGED,
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
    Tangents,
    bound_of,
    check_agreement,
    inner_product,
    output_tangent,
    tolerance_of,
)
from adalfl_lite.losses.network import LossNetwork
from adalfl_lite.losses.task import output_pairs
from adalfl_lite.passes import Buffers, RandomState, Undo, optimizer_parameters

KEPT_FAN_IN = 1000
"""The outputs of layers with at least so many inputs are kept for the tangent pass, see
:class:`~adalfl_lite.engines.tangents.LayerOutputs`."""

TangentOf = Callable[[Problem, ForwardPass, Mapping[int, Tensor], Tangents], Tensor | None]
"""u = J_f(θ) w as a recorded pass was: (problem, pass, buffers and unmoved parameters, θ and w) -> (B, C)."""


class Forward:
    """One step with M_φ and its meta-gradient by equations (1) to (3); an :class:`~adalfl_lite.engines.base.Engine`."""

    def __init__(self, problem: Problem):
        self.problem = problem

    def __call__(self, batch: Batches, meta_batch: Batches, undo: Undo | None = None) -> MetaStep:
        """Take the step, and differentiate it: see :meth:`adalfl_lite.engines.base.Engine.__call__`."""
        problem, parts = self.problem, micro_batches(batch)
        # of several micro batches each has its graph freed before the next, and its outputs with it
        fan_in = KEPT_FAN_IN if len(parts) == 1 else math.inf
        with undo or Undo(problem.model, problem.optimizer) as undo:
            check_step(problem.model, problem.optimizer)
            training = (training_pass(problem.model, part, problem.autocast, fan_in) for part in parts)
            recorded = zip(shares_of(parts), training, strict=True)
            return forward_mode(problem, recorded, micro_batches(meta_batch), undo)[0]


def exact_tangent(
    problem: Problem, training: ForwardPass, state: Mapping[int, Tensor], tangents: Tangents
) -> Tensor | None:
    """Equation (2), a :data:`TangentOf`: None where the output does not depend on what moves."""
    return output_tangent(
        problem.model, state, tangents, training.batch[0], problem.autocast, training.outputs, training.found
    )


def forward_mode(
    problem: Problem,
    training: Iterator[tuple[float, ForwardPass]],
    meta_parts: Sequence[Batch],
    undo: Undo,
    *,
    tangent_of: TangentOf = exact_tangent,
    approximate: bool = False,
    keep: bool = False,
) -> tuple[MetaStep, ForwardPass]:
    """Equations (1) to (3), for a batch in parts: the heart of the engines that use forward mode.

    The order matters. The optimizer's derivative is taken while its state is the old one; the meta pass sees the new θ
    and the new buffers; the tangent pass sees the old θ, the old buffers and the random state of the training pass.

    Args:
        problem: see there.
        training: the share of each part in the batch, and its pass, which is made as it is asked for: the graph of one
            has gone before the next begins.
        meta_parts: the micro batches on which L_T is taken.
        undo: holds copies of θ.
        tangent_of: how u is found.
        approximate: u is not exact, and the identity is checked with the tolerance for that.
        keep: return the pass over the last meta part with its graph.

    Returns:
        The step, and the pass over the last meta part.
    """
    group, parameters = problem.process_group, optimizer_parameters(problem.optimizer)

    # g: the step's gradient ∇_θ M_φ, and ∂M_φ/∂f of each part
    found = _training_gradient(problem, training, undo)
    after = RandomState(problem.model)  # of the model's passes, and of the loss network's

    # θ' = U(θ, g), and its derivative by g while the optimizer's state is still the old one
    pullback = take_step(problem.optimizer, parameters, found.reached, found.gradients, problem.clipping)

    # v = ∇_θ' L_T, on the model as the step left it
    meta_loss, v, meta = _gradient_after(problem, meta_parts, [parameters[i] for i in found.reached], keep)

    # equation (1): w = (∂U/∂g)ᵀ v
    w = pullback(average(v, group))
    del v

    # equations (2) and (3), at the old θ
    tangents, meta_gradient, along = _along(problem, found, undo.before, w, tangent_of)
    after.restore()

    # the identity ⟨∇_θ M_φ, w⟩ = ⟨∂M_φ/∂f, u⟩; of several processes, means of both sides
    *meta_gradient, meta_loss, along = average([*meta_gradient, meta_loss, along], group)
    dtypes = [problem.autocast or found.parts[0].training.prediction.dtype, *(g.dtype for g in found.gradients)]
    tolerance = tolerance_of(*dtypes, finite_difference=approximate)

    def bound() -> Tensor:
        slopes = [part.share * part.derivative.value for part in found.parts]
        whole = [torch.zeros_like(s) if u is None else u for s, u in zip(slopes, tangents, strict=True)]
        return average([bound_of(slopes, whole)], group)[0]

    check_agreement(found.gradients, w, along, bound, tolerance=tolerance)
    prediction = joined([part.training.prediction for part in found.parts])
    known = [tangent for tangent in tangents if tangent is not None]
    tangent = joined(known) if len(known) == len(tangents) else None
    return MetaStep(meta_gradient, found.training_loss, meta_loss, prediction, tangent), meta


@dataclass(frozen=True)
class _Part:
    """What remains of the training pass over a micro batch once its graph has gone."""

    share: float
    """Of the whole batch."""
    training: ForwardPass
    derivative: OutputDerivative


@dataclass(frozen=True)
class _TrainingGradient:
    """g = ∇_θ M_φ of a whole batch."""

    parts: list[_Part]
    reached: list[int]
    """Which of the optimizer's parameters the output depends on."""
    gradients: list[Tensor]
    """Of those, in their order; means over all processes."""
    training_loss: Tensor


def _training_gradient(
    problem: Problem, training: Iterator[tuple[float, ForwardPass]], undo: Undo
) -> _TrainingGradient:
    """∇_θ M_φ, by the backward pass of the model's own loop: whatever hooks into that shows in the identity."""
    parameters, group = optimizer_parameters(problem.optimizer), problem.process_group
    parts: list[_Part] = []
    for share, passed in training:
        # a loss network alone is small: its slope is taken first, then pulled back through the model
        derivative = OutputDerivative(problem.loss_network, passed.prediction.detach(), passed.batch[1])
        check_early(average([derivative.loss], group)[0], problem.model)
        backward(passed.prediction, parameters, weighted(share, [derivative.value])[0])
        parts.append(_Part(share, replace(passed, prediction=passed.prediction.detach()), derivative))
        del passed  # and with it the graph
    if not undo.unmoved():
        raise ValueError(CHANGED)
    training_loss = average([total([(part.share, part.derivative.loss) for part in parts])], group)[0]
    found = [parameter.grad for parameter in parameters]
    reached = [i for i, gradient in enumerate(found) if gradient is not None]
    gradients = average([gradient for gradient in found if gradient is not None], group)
    return _TrainingGradient(parts, reached, gradients, training_loss)


def _gradient_after(
    problem: Problem, meta_parts: Sequence[Batch], moved: list[Tensor], keep: bool
) -> tuple[Tensor, list[Tensor], ForwardPass]:
    """L_T and v = ∇_θ' L_T at the new θ, means over the parts; and the pass over the last part."""
    v: list[Tensor] = []
    losses = []
    buffers = Buffers(problem.model)
    for share, part in zip(shares_of(meta_parts), meta_parts, strict=True):
        meta, loss, found = meta_pass(problem.model, buffers, part, problem.task_loss, moved, problem.autocast, keep)
        losses.append((share, loss))
        v = add(v, weighted(share, found))
        del found
    return total(losses), v, meta


def _along(
    problem: Problem, found: _TrainingGradient, before: Sequence[Tensor], w: Sequence[Tensor], tangent_of: TangentOf
) -> tuple[list[Tensor | None], list[Tensor], Tensor]:
    """u of each part, equation (2); ∇_φ ⟨∂M_φ/∂f, u⟩, equation (3); and ⟨∂M_φ/∂f, u⟩."""
    parameters = optimizer_parameters(problem.optimizer)
    moving = {id(parameters[i]): (before[i], direction) for i, direction in zip(found.reached, w, strict=True)}
    unreached = {id(parameters[i]): before[i] for i in set(range(len(before))) - set(found.reached)}
    along = torch.zeros((), device=found.training_loss.device)
    tangents: list[Tensor | None] = []
    meta_gradient: list[Tensor] = []
    for part in found.parts:
        part.training.random.restore()  # dropout draws its mask again
        tangent = tangent_of(problem, part.training, {**part.training.buffers.fresh(), **unreached}, moving)  # (2)
        u = torch.zeros_like(part.training.prediction) if tangent is None else tangent
        along = along + part.share * inner_product(part.derivative.value, u)
        tangents.append(tangent)
        meta_gradient = add(meta_gradient, weighted(part.share, part.derivative.gradient_along(u)))  # (3)
    return tangents, meta_gradient, along


class OutputDerivative:
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
        return list(torch.autograd.grad(self.graph, phi, tangent, allow_unused=True, materialize_grads=True))
