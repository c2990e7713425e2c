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

``unrolled_step`` differentiates through any number of inner steps with autograd: the reference, and the engine for
models or optimizers forward mode cannot serve.

Each checks (2) at every step by the identity ⟨∇_θ M_φ, w⟩ = ⟨g, u⟩, both sides of which are the derivative of M_φ along
w (:func:`~adalfl_lite.tangents.check_agreement`): where they differ, the model's backward pass is not the one that u
belongs to, and the step is refused.

All update the model and the optimizer exactly as ``optimizer.step()`` would, momentum and BatchNorm buffers included;
the meta batch passes through the model in its current mode and leaves buffers and the random state as they were. A step
that fails leaves everything as it was (:class:`~adalfl_lite.passes.Undo`).

A batch may come as a list of micro batches: the step is that on their union (where no layer mixes the examples of a
batch), weighted by their lengths, and takes the memory of one of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.modules import module as torch_modules
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from adalfl_lite.checks import check_finite, check_scalar, check_trainable
from adalfl_lite.closed_form import Along, derivatives, layers_of
from adalfl_lite.distributed import average
from adalfl_lite.losses import Loss, LossNetwork, output_pairs
from adalfl_lite.passes import (
    Attributes,
    Buffers,
    RandomState,
    Undo,
    buffers_of,
    clones,
    differentiable_kernels,
    eval_mode,
    forward,
    optimizer_parameters,
    parameters_of,
    replaced,
    same_values,
    unmarked,
)
from adalfl_lite.tangents import (
    COMPOSITE,
    EMBEDDINGS,
    LayerOutputs,
    check_agreement,
    check_embedding,
    finite_difference_tangent,
    inner_product,
    output_tangent,
    tolerance_of,
)
from adalfl_lite.updates import (
    Clipping,
    changes_gradients,
    check_differentiable,
    check_no_gradient,
    check_no_hooks,
    functional_update,
    update_pullback,
)

__all__ = ["MetaStep", "eval_mode", "forward_mode_step", "plain_step", "shared_forward_step", "unrolled_step"]

Batch = tuple[Tensor, Tensor]

Batches = Batch | Sequence[Batch]
"""A batch, or a list of micro batches."""

KEPT_FAN_IN = 1000
"""``forward_mode_step`` keeps the outputs of layers with at least so many inputs for the tangent pass, see
:class:`~adalfl_lite.tangents.LayerOutputs`."""

NO_CLIPPING = Clipping()


@dataclass(frozen=True)
class MetaStep:
    """What one step leaves behind; θ and the optimizer state have been updated in place."""

    meta_gradient: list[Tensor] = field(repr=False)
    """∇_φ L_T, one tensor per parameter of the loss network that requires a gradient."""
    learned_loss: Tensor
    """M_φ on the training batch before the update, a scalar."""
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
        finite_difference: approximate u by one more forward pass, see :mod:`adalfl_lite.tangents`.
        clipping: of the gradient, before the optimizer has it.
        autocast: dtype for the model's passes; the losses see float32 predictions.
        process_group: processes that hold equal shares of the batches, see :mod:`adalfl_lite.distributed`.
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
            undo.before,
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
            undo.before,
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
    before: list[Tensor],
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
        before: copies of θ.
        keep: return the pass over the meta batch with its graph.
        model, loss_network, optimizer, meta_parts, task_loss: see :func:`forward_mode_step`, and so are the others.
    """
    parameters = optimizer_parameters(optimizer)

    # ∇_θ M_φ, by the backward pass of the model's own loop: whatever hooks into that is in the identity below
    parts: list[_Part] = []
    for share, passed in training:
        derivative = _OutputDerivative(loss_network, passed.prediction.detach(), passed.batch[1])
        check_early(average([derivative.loss], group)[0], model)
        backward(passed.prediction, parameters, weighted(share, [derivative.value])[0])
        parts.append(_Part(share, replace(passed, prediction=passed.prediction.detach()), derivative))
        del passed
    if not same_values(parameters, before):
        raise ValueError(CHANGED)
    learned_loss = average([total([(part.share, part.derivative.loss) for part in parts])], group)[0]
    found = [parameter.grad for parameter in parameters]
    reached = [i for i, gradient in enumerate(found) if gradient is not None]
    gradients = average([gradient for gradient in found if gradient is not None], group)
    del found

    # θ' = U(θ, g), and its derivative, which must be taken while the optimizer's state is the old one
    clipped: list[Tensor | None] = [None] * len(parameters)
    for i, gradient in zip(reached, clipping(gradients), strict=True):
        clipped[i] = gradient
    pullback, unclip = update_pullback(optimizer, clipped), clipping.pullback(gradients)
    if changes_gradients(optimizer):
        clipped = [None if g is None else g.clone() for g in clipped]
    apply_gradients(optimizer, parameters, clipped)
    del clipped

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
    w = unclip(pullback(average(v, group)))
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
    parts[-1].training.new_random.restore()

    *meta_gradient, task, along = average([*meta_gradient, total(meta_losses), along], group)
    dtypes = [autocast or parts[0].training.prediction.dtype, *(g.dtype for g in gradients)]
    tolerance = tolerance_of(*dtypes, finite_difference=finite_difference)

    def bound() -> Tensor:
        slopes = [part.share * part.derivative.value for part in parts]
        tangents = [torch.zeros_like(s) if u is None else u for s, u in zip(slopes, found_tangents, strict=True)]
        return average([_bound(slopes, tangents)], group)[0]

    check_agreement(gradients, w, along, bound, tolerance=tolerance)
    prediction = joined([part.training.prediction for part in parts])
    tangent = None if any(t is None for t in found_tangents) else joined([t for t in found_tangents if t is not None])
    return MetaStep(meta_gradient, learned_loss, task, prediction, tangent), meta


class _OutputDerivative:
    """∂M_φ/∂f of a batch, and equation (3): in closed form where that is known, else by double backward."""

    def __init__(self, loss_network: nn.Module, prediction: Tensor, target: Tensor):
        self.network = loss_network
        self.along: Along | None = None
        if type(loss_network) is LossNetwork and layers_of(loss_network.network) is not None:
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


def unrolled_step(
    model: nn.Module,
    loss_network: nn.Module,
    optimizer: Optimizer,
    batches: Sequence[Batches],
    meta_batch: Batches,
    task_loss: Loss,
    *,
    clipping: Clipping = NO_CLIPPING,
    autocast: torch.dtype | None = None,
    undo: Undo | None = None,
) -> MetaStep:
    """``len(batches)`` base steps with M_φ, differentiated by double backward through all of them.

    Arguments and result are those of :func:`forward_mode_step`; ``learned_loss`` and ``prediction`` are the first
    step's. The real optimizer takes the same steps, so θ and its state end bit for bit where torch.optim puts them.

    What the model holds constant in its backward pass (``torch.no_grad``, ``detach``) is a constant in the derivative
    of several steps too.
    """
    if not batches:
        raise ValueError("unrolled_step needs at least one training batch, got none")
    phi = [p for p in loss_network.parameters() if p.requires_grad]
    with undo or Undo(model, optimizer) as undo, differentiable_kernels(model):
        check_step(model, optimizer)
        _check_no_module_hooks(model)
        parameters = optimizer_parameters(optimizer)
        theta = [b.requires_grad_(p.requires_grad) for b, p in zip(clones(undo.before), parameters, strict=True)]
        state = None
        steps: list[_Unrolled] = []
        for batch in batches:
            step = _unrolled_gradient(model, loss_network, parameters, theta, micro_batches(batch), autocast)
            check_early(step.learned_loss, model)
            check_delivered(parameters, step.gradients)
            gradients = clipping(step.gradients)
            theta, state = functional_update(optimizer, theta, gradients, state)
            apply_gradients(optimizer, parameters, [None if g is None else g.detach() for g in gradients])
            steps.append(step)
        buffers, random = Buffers(model), RandomState(model)
        losses = []
        meta_parts = micro_batches(meta_batch)
        new = {id(p): t for p, t in zip(parameters, theta, strict=True)}
        for share, (inputs, targets) in zip(shares_of(meta_parts), meta_parts, strict=True):
            with unmarked(model), replaced(model, {**new, **buffers.fresh()}), _twice_differentiable():
                losses.append((share, task_loss(forward(model, inputs, autocast), targets)))
        meta_loss = total(losses)
        meta_gradient, pairs = _double_backward(meta_loss, phi, steps)
        random.restore()
        first = steps[0]
        for step, (w, u) in zip(steps, pairs, strict=True):
            given = [g.detach() for g in step.gradients if g is not None]
            slopes = [s.detach() for s in step.slopes]
            along = sum(inner_product(s, t) for s, t in zip(slopes, u, strict=True))
            precision = tolerance_of(autocast or first.prediction.dtype, *(g.dtype for g in given))
            check_agreement(given, w, torch.as_tensor(along), partial(_bound, slopes, u), tolerance=precision)
    return MetaStep(meta_gradient, first.learned_loss, meta_loss.detach(), first.prediction, None)


@dataclass(frozen=True)
class _Unrolled:
    """An inner step's gradient with its graph."""

    gradients: list[Tensor | None]
    slopes: list[Tensor]
    """∂M_φ/∂f of each part, times its share."""
    learned_loss: Tensor
    prediction: Tensor


def _bound(slopes: Sequence[Tensor], tangents: Sequence[Tensor]) -> Tensor:
    """Σ ‖∂M/∂f‖ ‖u‖ over the parts of a batch."""
    norms = [s.norm() * t.norm() for s, t in zip(slopes, tangents, strict=True)]
    return sum(norms[1:], norms[0])


def _unrolled_gradient(
    model: nn.Module,
    loss_network: nn.Module,
    parameters: Sequence[Tensor],
    theta: Sequence[Tensor],
    parts: Sequence[Batch],
    autocast: torch.dtype | None,
) -> _Unrolled:
    """∇_θ M_φ at ``theta`` in the place of ``parameters``, as J_fᵀ ∂M_φ/∂f, so that both factors can be asked for."""
    gradients: list[Tensor | None] = [None] * len(theta)
    slopes, losses, predictions = [], [], []
    versions, copies = [t._version for t in theta], clones(theta)
    for share, (inputs, targets) in zip(shares_of(parts), parts, strict=True):
        with replaced(model, {id(p): t for p, t in zip(parameters, theta, strict=True)}), _twice_differentiable():
            prediction = forward(model, inputs, autocast)
        if [t._version for t in theta] != versions or not same_values(theta, copies):
            raise ValueError(CHANGED)
        learned_loss = loss_network(prediction, targets)
        check_scalar(learned_loss)
        with _differentiated_twice():
            (slope,) = weighted(share, torch.autograd.grad(learned_loss, prediction, create_graph=True))
            found = gradients_of(prediction, theta, grad_outputs=slope, create_graph=True)
        for i, gradient in enumerate(found):
            if gradient is not None:
                earlier = gradients[i]
                gradients[i] = gradient if earlier is None else earlier + gradient
        slopes.append(slope)
        losses.append((share, learned_loss.detach()))
        predictions.append(prediction.detach())
    # views, for one gradient may be made of another, and the derivative along it must not count that way
    views = [None if g is None else g.view_as(g) for g in gradients]
    return _Unrolled(views, slopes, total(losses), joined(predictions))


def _double_backward(
    meta_loss: Tensor, phi: Sequence[Tensor], steps: Sequence[_Unrolled]
) -> tuple[list[Tensor], list[tuple[list[Tensor], list[Tensor]]]]:
    """∇_φ L_T, and for each step w = ∂L_T/∂g and u = ∂L_T/∂s, for its gradient g and the slopes s that made it."""
    wanted = [[g for g in step.gradients if g is not None] for step in steps]
    inputs: list[Tensor] = [*phi]
    for gradients, step in zip(wanted, steps, strict=True):
        inputs += [*gradients, *step.slopes]
    with _differentiated_twice():
        found = list(torch.autograd.grad(meta_loss, inputs, allow_unused=True, materialize_grads=True))
    meta_gradient, pairs = found[: len(phi)], []
    position = len(phi)
    for gradients, step in zip(wanted, steps, strict=True):
        middle, end = position + len(gradients), position + len(gradients) + len(step.slopes)
        pairs.append((found[position:middle], found[middle:end]))
        position = end
    return meta_gradient, pairs


def check_delivered(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Raise ``ValueError`` unless each parameter's ``.grad`` becomes the gradient that is on its way to it.

    torch shows no hooks of the nodes that accumulate gradients, as distributed libraries use them; but they run here.
    """
    pairs = [(p, g.detach()) for p, g in zip(parameters, gradients, strict=True) if g is not None]
    with torch.enable_grad():
        arriving = [p.view_as(p) for p, _ in pairs]
    torch.autograd.backward(arriving, [g for _, g in pairs], inputs=[p for p, _ in pairs])
    delivered = [p.grad for p, _ in pairs]
    for p, _ in pairs:
        p.grad = None
    same = all(d is not None for d in delivered) and same_values(
        [d for d in delivered if d is not None], [g for _, g in pairs]
    )
    if not same and all(torch.isfinite(g).all() for _, g in pairs):
        raise ValueError("a hook changes a gradient as it is accumulated, unseen by the meta-gradient; remove() it")


def _check_no_module_hooks(model: nn.Module) -> None:
    """Raise ``NotImplementedError`` for hooks that would change ∇L_T, too, as it passes backward through a module."""
    hooks = [torch_modules._global_backward_hooks, torch_modules._global_backward_pre_hooks]
    hooks += [hooks for m in model.modules() for hooks in (m._backward_hooks, m._backward_pre_hooks)]
    if any(hooks):
        raise NotImplementedError("a module has a backward hook, which would be differentiated as if it were the model")


@contextmanager
def _differentiated_twice() -> Iterator[None]:
    """Say what is missing where torch has no derivative of a backward pass."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise NotImplementedError(f"this model cannot be differentiated twice: {error}") from error


class _TwiceDifferentiable(TorchFunctionMode):
    """Around a pass of ``unrolled_step``: what torch differentiates only once is written so that it can do it twice."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in EMBEDDINGS:
            check_embedding(func.__name__, kwargs or {})
        return COMPOSITE.get(func, func)(*args, **(kwargs or {}))


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    with torch.autograd.graph.disable_saved_tensors_hooks(CHECKPOINTS), _TwiceDifferentiable():
        try:
            yield
        except RuntimeError as error:
            if CHECKPOINTS in str(error):
                raise NotImplementedError(CHECKPOINTS) from error
            raise


CHECKPOINTS = "a checkpoint, or another hook on saved tensors, would pass through the model again with other weights"


def plain_step(
    model: nn.Module,
    loss: Loss,
    optimizer: Optimizer,
    batch: Batches,
    *,
    clipping: Clipping = NO_CLIPPING,
    autocast: torch.dtype | None = None,
) -> Tensor:
    """An ordinary training step with a fixed loss, handcrafted or learned; returns that loss before the step.

    Nothing but the optimizer's parameters gets a gradient: a learned loss is not differentiated by φ.
    """
    optimizer.zero_grad()
    parameters = optimizer_parameters(optimizer)
    parts = micro_batches(batch)
    losses = []
    for share, (inputs, targets) in zip(shares_of(parts), parts, strict=True):
        value = loss(forward(model, inputs, autocast), targets)
        check_scalar(value)
        backward(weighted(share, [value])[0], parameters)
        losses.append((share, value.detach()))
    if clipping != NO_CLIPPING:
        for parameter, gradient in zip(parameters, clipping([p.grad for p in parameters]), strict=True):
            parameter.grad = gradient
    optimizer.step()
    return total(losses)


WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}
"""Classes of torch.distributed, by name, for to import them all takes long."""


def check_model(model: nn.Module) -> None:
    """Raise ``ValueError`` for a model that no engine serves, as far as its modules show it."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            check_embedding(name, vars(module))
        if WRAPPERS & {base.__name__ for base in type(module).__mro__}:
            raise ValueError(
                f"{type(module).__name__} averages gradients by hooks, which the meta-gradient would not see; give the"
                " model itself, and process_group="
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError("a scripted model does not let its parameters be replaced; give the one it was made from")


def check_apart(optimizer: Optimizer) -> None:
    """Raise ``ValueError`` if two parameters share memory: each step of one would be a step of the other, too."""
    spans = []
    for parameter in optimizer_parameters(optimizer):
        if parameter.numel() and parameter.device.type != "meta":
            extent = sum((n - 1) * abs(s) for n, s in zip(parameter.shape, parameter.stride(), strict=True)) + 1
            start = parameter.storage_offset()
            storage = parameter.untyped_storage().data_ptr()
            spans.append((storage, start, start + extent, tuple(parameter.shape)))
    spans.sort()
    for (storage, _, end, shape), (other, start, _, second) in itertools.pairwise(spans):
        if storage == other and start < end:
            raise ValueError(
                f"two parameters, of shapes {shape} and {second}, share memory; use one parameter in both places, or"
                " clone() one of them"
            )


def check_step(model: nn.Module, optimizer: Optimizer, gradients: bool = True) -> None:
    """Raise unless this optimizer can take a differentiable step of this model now.

    Args:
        model, optimizer: see :func:`forward_mode_step`.
        gradients: look for a ``.grad`` that is there already, too.

    Raises:
        TypeError: the optimizer's update is not differentiable.
        ValueError: the optimizer holds a parameter that is not the model's, or none that requires a gradient; a hook or
            a ``.grad`` would change the gradient unseen.
        RuntimeError: gradients are switched off.
    """
    check_differentiable(optimizer)
    check_trainable(model, optimizer)
    if gradients:
        check_no_gradient(optimizer)
    check_no_hooks(optimizer)


def micro_batches(batch: Batches) -> list[Batch]:
    """The parts of a batch: the pairs of a list of pairs, or the batch alone."""
    several = isinstance(batch, tuple | list) and len(batch) and all(isinstance(part, tuple | list) for part in batch)
    return list(batch) if several else [batch]  # type: ignore[arg-type, list-item]


def shares_of(parts: Sequence[Batch]) -> list[float]:
    """What part of all examples is in each micro batch."""
    counts = [len(targets) for _, targets in parts]
    return [count / sum(counts) for count in counts]


def weighted(share: float, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor times a share; the tensors themselves where it is 1."""
    return list(tensors) if share == 1 else [share * tensor for tensor in tensors]


def add(sums: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """The sums with another term; the term itself where there are none yet."""
    return [a + b for a, b in zip(sums, tensors, strict=True)] if sums else tensors


def total(losses: Sequence[tuple[float, Tensor]]) -> Tensor:
    """The mean loss of a batch from the shares and the losses of its parts."""
    first, *rest = [weighted(share, [loss])[0] for share, loss in losses]
    return sum(rest, first)


def joined(rows: Sequence[Tensor]) -> Tensor:
    """The rows of all parts."""
    return rows[0] if len(rows) == 1 else torch.cat(list(rows))


def gradients_of(output: Tensor, parameters: Sequence[Tensor], **options: Any) -> list[Tensor | None]:
    """Gradients of ``output``; None where it does not depend on a parameter or the parameter is frozen."""
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    found = iter(torch.autograd.grad(output, wanted, allow_unused=True, **options))
    return [next(found) if parameter.requires_grad else None for parameter in parameters]


def backward(output: Tensor, parameters: Sequence[Tensor], slope: Tensor | None = None) -> None:
    """Add to the ``.grad`` of the parameters that require one, and of nothing else."""
    output.backward(slope, inputs=[parameter for parameter in parameters if parameter.requires_grad])


def apply_gradients(optimizer: Optimizer, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """One step of the optimizer with these gradients, which do not stay."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    for parameter in parameters:
        parameter.grad = None


def check_early(learned_loss: Tensor, model: nn.Module) -> None:
    """Before θ moves: raise if the loss is not finite.

    A GPU would have to be waited for; there a loss that is not finite is seen after the step, by ``OnlineLoss``.
    """
    if learned_loss.device.type == "cpu" and not torch.isfinite(learned_loss):
        check_finite({"learned loss": learned_loss}, model)


CHANGED = "the model changes its parameters in place in its forward pass; do that between the steps"


def _training_pass(model: nn.Module, batch: Batch, autocast: torch.dtype | None, fan_in: float) -> ForwardPass:
    """f(x) as in plain training: buffers, attributes and random state move on."""
    random, buffers, found, parameters = RandomState(model), Buffers(model), Attributes(model), parameters_of(model)
    versions = [parameter._version for parameter in parameters]
    with LayerOutputs(fan_in) as outputs:
        prediction = forward(model, batch[0], autocast)
    if [parameter._version for parameter in parameters] != versions:
        raise ValueError(CHANGED)
    return ForwardPass(batch, prediction, buffers, random, RandomState(model), found, outputs)


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
            prediction = forward(model, batch[0], autocast)
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
            buffer.copy_(kept.new_buffers[id(buffer)])
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
