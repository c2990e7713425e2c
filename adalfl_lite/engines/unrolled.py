"""The reference engine: any number of inner steps, differentiated by autograd through all of them.

It serves models and optimizers that forward mode cannot, and takes the memory of all its steps. For each of them the
gradient is taken in two factors, ∇_θ M_φ = J_fᵀ s with s = ∂M_φ/∂f, so that u = J_f w and w = ∂L_T/∂g come out of the
same backward pass, and ⟨g, w⟩ = ⟨s, u⟩ can be checked as in :mod:`adalfl_lite.engines.forward`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.overrides import TorchFunctionMode

from adalfl_lite.checks import check_scalar
from adalfl_lite.engines.base import MetaStep, Problem
from adalfl_lite.engines.steps import (
    CHANGED,
    Batch,
    Batches,
    apply_gradients,
    check_early,
    check_step,
    gradients_of,
    joined,
    micro_batches,
    shares_of,
    total,
    weighted,
)
from adalfl_lite.engines.tangents import (
    COMPOSITE,
    EMBEDDINGS,
    bound_of,
    check_agreement,
    check_embedding,
    inner_product,
    tolerance_of,
)
from adalfl_lite.engines.updates import functional_update
from adalfl_lite.passes import (
    Buffers,
    RandomState,
    Undo,
    clones,
    differentiable_kernels,
    forward,
    optimizer_parameters,
    replaced,
    same_values,
    unmarked,
)


class Unrolled:
    """Steps with M_φ, differentiated by double backward through all of them; an engine.

    The real optimizer takes the same steps, so θ and its state end bit for bit where torch.optim puts them. What the
    model holds constant in its backward pass (``torch.no_grad``, ``detach``) is a constant in the derivative of several
    steps too.
    """

    def __init__(self, problem: Problem):
        if problem.process_group is not None:
            raise ValueError("engine='unrolled' runs in one process; leave process_group out")
        if hasattr(problem.model, "_orig_mod"):
            raise ValueError("a compiled model has no double backward; use engine='forward', or do not compile it")
        self.problem = problem

    def __call__(self, batch: Batches, meta_batch: Batches, undo: Undo | None = None) -> MetaStep:
        """Take the step, and differentiate it: see :meth:`adalfl_lite.engines.base.Engine.__call__`."""
        return self.unroll([batch], meta_batch, undo)

    def unroll(self, batches: Sequence[Batches], meta_batch: Batches, undo: Undo | None = None) -> MetaStep:
        """A step on each of ``batches``, and ∇_φ of the task loss after the last one.

        ``training_loss`` and ``prediction`` are the first step's. Errors are those of a single step.
        """
        if not batches:
            raise ValueError("unrolling needs at least one training batch, got none")
        problem = self.problem
        model, optimizer = problem.model, problem.optimizer
        phi = [p for p in problem.loss_network.parameters() if p.requires_grad]
        with undo or Undo(model, optimizer) as undo, differentiable_kernels(model):
            check_step(model, optimizer)
            _check_no_module_hooks(model)
            parameters = optimizer_parameters(optimizer)
            # θ_0 as leaves of a graph that goes on through every step
            theta = [b.requires_grad_(p.requires_grad) for b, p in zip(clones(undo.before), parameters, strict=True)]
            state = None
            steps: list[_Unrolled] = []
            for batch in batches:
                step = _unrolled_gradient(problem, parameters, theta, micro_batches(batch))
                check_early(step.training_loss, model)
                check_delivered(parameters, step.gradients)
                gradients = problem.clipping(step.gradients)
                # the same step twice: θ_{k+1} = U(θ_k, g_k) with its graph, and the user's own parameters without
                theta, state = functional_update(optimizer, theta, gradients, state)
                apply_gradients(optimizer, parameters, [None if g is None else g.detach() for g in gradients])
                steps.append(step)
            random = RandomState(model)
            meta_loss = _meta_loss(problem, {id(p): t for p, t in zip(parameters, theta, strict=True)}, meta_batch)
            meta_gradient, pairs = _double_backward(meta_loss, phi, steps)
            random.restore()  # as after the last training pass: a backward pass may draw numbers, too
            if not same_values([p for p, _ in undo.frozen], [copy for _, copy in undo.frozen]):
                raise ValueError(CHANGED)
            _check_identity(problem, steps, pairs)
        first = steps[0]
        return MetaStep(meta_gradient, first.training_loss, meta_loss.detach(), first.prediction, None)


def _meta_loss(problem: Problem, theta: dict[int, Tensor], meta_batch: Batches) -> Tensor:
    """L_T at θ, with its graph; the buffers are left as they were."""
    model = problem.model
    buffers, losses = Buffers(model), []
    parts = micro_batches(meta_batch)
    for share, (inputs, targets) in zip(shares_of(parts), parts, strict=True):
        with unmarked(model), replaced(model, {**theta, **buffers.fresh()}), _twice_differentiable():
            losses.append((share, problem.task_loss(forward(model, inputs, problem.autocast), targets)))
    return total(losses)


def _check_identity(
    problem: Problem, steps: Sequence[_Unrolled], pairs: Sequence[tuple[list[Tensor], list[Tensor]]]
) -> None:
    """⟨g, w⟩ = ⟨s, u⟩ at every step: both sides are the derivative of M_φ along w."""
    for step, (w, u) in zip(steps, pairs, strict=True):
        given = [g.detach() for g in step.gradients if g is not None]
        slopes = [s.detach() for s in step.slopes]
        along = sum(inner_product(s, t) for s, t in zip(slopes, u, strict=True))
        precision = tolerance_of(problem.autocast or steps[0].prediction.dtype, *(g.dtype for g in given))
        check_agreement(given, w, torch.as_tensor(along), partial(bound_of, slopes, u), tolerance=precision)


@dataclass(frozen=True)
class _Unrolled:
    """An inner step's gradient with its graph."""

    gradients: list[Tensor | None]
    slopes: list[Tensor]
    """∂M_φ/∂f of each part, times its share."""
    training_loss: Tensor
    prediction: Tensor


def _unrolled_gradient(
    problem: Problem, parameters: Sequence[Tensor], theta: Sequence[Tensor], parts: Sequence[Batch]
) -> _Unrolled:
    """∇_θ M_φ at ``theta`` in the place of ``parameters``, as J_fᵀ ∂M_φ/∂f, so that both factors can be asked for."""
    model = problem.model
    gradients: list[Tensor | None] = [None] * len(theta)
    slopes, losses, predictions = [], [], []
    versions, copies = [t._version for t in theta], clones(theta)
    for share, (inputs, targets) in zip(shares_of(parts), parts, strict=True):
        with replaced(model, {id(p): t for p, t in zip(parameters, theta, strict=True)}), _twice_differentiable():
            prediction = forward(model, inputs, problem.autocast)
        if [t._version for t in theta] != versions or not same_values(theta, copies):
            raise ValueError(CHANGED)
        training_loss = problem.loss_network(prediction, targets)
        check_scalar(training_loss)
        # s = ∂M/∂f first, then J_fᵀ s: so both u = ∂L_T/∂s and w = ∂L_T/∂g can be asked for below
        with _differentiated_twice():
            (slope,) = weighted(share, torch.autograd.grad(training_loss, prediction, create_graph=True))
            found = gradients_of(prediction, theta, grad_outputs=slope, create_graph=True)
        for i, gradient in enumerate(found):
            # micro batches add up, each with its share in s already
            if gradient is not None:
                earlier = gradients[i]
                gradients[i] = gradient if earlier is None else earlier + gradient
        slopes.append(slope)
        losses.append((share, training_loss.detach()))
        predictions.append(prediction.detach())
    # views, for one gradient may be made of another, and the derivative along it must not count that way
    views = [None if g is None else g.view_as(g) for g in gradients]
    return _Unrolled(views, slopes, total(losses), joined(predictions))


def _double_backward(
    meta_loss: Tensor, phi: Sequence[Tensor], steps: Sequence[_Unrolled]
) -> tuple[list[Tensor], list[tuple[list[Tensor], list[Tensor]]]]:
    """∇_φ L_T, and for each step w = ∂L_T/∂g and u = ∂L_T/∂s, for its gradient g and the slopes s that made it."""
    # one double backward gives ∇_φ L_T and, for every step, both factors of the identity
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
    # an identity whose backward pass delivers exactly these gradients to the accumulators
    with torch.enable_grad():
        arriving = [p.view_as(p) for p, _ in pairs]
    torch.autograd.backward(arriving, [g for _, g in pairs], inputs=[p for p, _ in pairs])
    delivered = [p.grad for p, _ in pairs]
    for p, _ in pairs:
        p.grad = None
    # what arrives is what was sent, or a hook has changed it on the way
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
    """Around a pass of the engine "unrolled": what torch differentiates only once is written so that it can twice."""

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
