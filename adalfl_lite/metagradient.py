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

All update the model and the optimizer exactly as ``optimizer.step()`` would, momentum and BatchNorm buffers included;
the meta batch passes through the model in its current mode and leaves buffers and the random state as they were.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from adalfl_lite.checks import check_finite, check_scalar, check_trainable
from adalfl_lite.closed_form import Along, derivatives, layers_of
from adalfl_lite.distributed import average
from adalfl_lite.losses import Loss, LossNetwork, output_pairs
from adalfl_lite.tangents import LayerOutputs, finite_difference_tangent, forward, output_tangent
from adalfl_lite.updates import (
    check_differentiable,
    functional_update,
    optimizer_parameters,
    update_pullback,
)

Batch = tuple[Tensor, Tensor]

KEPT_FAN_IN = 1000
"""``forward_mode_step`` keeps the outputs of layers with at least so many inputs for the tangent pass, see
:class:`~adalfl_lite.tangents.LayerOutputs`."""


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
    batch: Batch,
    meta_batch: Batch,
    task_loss: Loss,
    *,
    finite_difference: bool = False,
    autocast: torch.dtype | None = None,
    process_group: ProcessGroup | None = None,
) -> MetaStep:
    """One base step with M_φ and its meta-gradient by equations (1) to (3).

    Args:
        model: f_θ; its parameters that ``optimizer`` holds are updated in place.
        loss_network: M_φ, called as (prediction, target) -> scalar.
        optimizer: any torch.optim optimizer over ``model``'s parameters with a differentiable update.
        batch: (inputs, targets) for the base step.
        meta_batch: (inputs, targets) on which L_T is taken at the new θ'.
        task_loss: L_T, called as (prediction, target) -> scalar.
        finite_difference: approximate u by one more forward pass, see :mod:`adalfl_lite.tangents`.
        autocast: dtype for the model's passes; the losses see float32 predictions.
        process_group: processes that hold equal shares of the batches, see :mod:`adalfl_lite.distributed`.
    """
    training = _training_pass(model, batch, autocast, math.inf if finite_difference else KEPT_FAN_IN)
    arguments = (model, loss_network, optimizer, training, meta_batch, task_loss)
    options: dict[str, Any] = {"autocast": autocast, "group": process_group}
    return _step(*arguments, finite_difference=finite_difference, keep=False, **options)[0]


def shared_forward_step(
    model: nn.Module,
    loss_network: nn.Module,
    optimizer: Optimizer,
    batch: Batch,
    next_batch: Batch,
    task_loss: Loss,
    kept: ForwardPass | None = None,
    *,
    autocast: torch.dtype | None = None,
    process_group: ProcessGroup | None = None,
) -> tuple[MetaStep, ForwardPass]:
    """:func:`forward_mode_step` with the next training batch as its meta batch, and the pass over it, kept.

    Hand the pass to the next call. It is used if that call's ``batch`` is this ``next_batch``, the same two tensors,
    and neither they nor the model have changed; otherwise it is dropped and the batch passes through the model again.
    So the result is the same in every case; only the time differs.
    """
    fits = kept is not None and kept.fits(model, batch)
    training = _taken_up(model, kept) if kept is not None and fits else _training_pass(model, batch, autocast, 0)
    arguments = (model, loss_network, optimizer, training, next_batch, task_loss)
    return _step(*arguments, finite_difference=False, keep=True, autocast=autocast, group=process_group)


@dataclass(frozen=True)
class ForwardPass:
    """A forward pass with its graph, and what it takes to repeat it, or to let it count later."""

    batch: Batch
    prediction: Tensor
    buffers: dict[str, Tensor]
    """The model's buffers before the pass."""
    new_buffers: dict[str, Tensor]
    """What the pass made of them; empty if it changed the model's own."""
    random: RandomState
    """The random state before the pass."""
    new_random: RandomState
    """And after it."""
    outputs: LayerOutputs = field(repr=False)
    """What its layers gave, as far as it was kept."""
    versions: list[Any]

    def fits(self, model: nn.Module, batch: Batch) -> bool:
        """Whether a training pass over ``batch`` would repeat this pass."""
        same = all(ours is theirs for ours, theirs in zip(self.batch, batch, strict=True))
        return same and self.versions == _versions(model, batch)


def _step(
    model: nn.Module,
    loss_network: nn.Module,
    optimizer: Optimizer,
    training: ForwardPass,
    meta_batch: Batch,
    task_loss: Loss,
    *,
    finite_difference: bool,
    keep: bool,
    autocast: torch.dtype | None,
    group: ProcessGroup | None,
) -> tuple[MetaStep, ForwardPass]:
    names = trained_parameter_names(model, optimizer)
    parameters = optimizer_parameters(optimizer)
    before = [parameter.detach().clone() for parameter in parameters]
    inputs, targets = training.batch
    prediction = training.prediction.detach()

    derivative = _OutputDerivative(loss_network, prediction, targets)
    (learned_loss,) = average([derivative.loss], group)
    check_early(learned_loss, model, training.buffers)
    gradients = gradients_of(training.prediction, parameters, grad_outputs=derivative.value)
    reached = [i for i, gradient in enumerate(gradients) if gradient is not None]
    for i, gradient in zip(reached, average([g for g in gradients if g is not None], group), strict=True):
        gradients[i] = gradient
    pullback = update_pullback(optimizer, gradients)
    apply_gradients(optimizer, parameters, gradients)
    del gradients

    meta = _meta_pass(model, meta_batch, autocast, keep)
    meta_loss = task_loss(meta.prediction, meta_batch[1])
    moved = [parameters[i] for i in reached]
    v = torch.autograd.grad(meta_loss, moved, retain_graph=keep, allow_unused=True, materialize_grads=True)
    w = pullback(average(v, group))
    del v

    tangents = {names[i]: (before[i], direction) for i, direction in zip(reached, w, strict=True)}
    unreached = {names[i]: before[i] for i in set(range(len(before))) - set(reached)}
    state = {**training.buffers, **unreached}
    training.random.restore()
    tangent: Tensor | None
    if finite_difference:
        tangent = finite_difference_tangent(model, state, tangents, inputs, autocast, prediction)
    else:
        tangent = output_tangent(model, state, tangents, inputs, autocast, training.outputs)
    training.new_random.restore()

    meta_gradient = derivative.gradient_along(torch.zeros_like(prediction) if tangent is None else tangent)
    *meta_gradient, meta_loss = average([*meta_gradient, meta_loss.detach()], group)
    return MetaStep(meta_gradient, learned_loss, meta_loss, prediction, tangent), meta


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
    batches: Sequence[Batch],
    meta_batch: Batch,
    task_loss: Loss,
    *,
    autocast: torch.dtype | None = None,
) -> MetaStep:
    """``len(batches)`` base steps with M_φ, differentiated by double backward through all of them.

    Arguments and result are those of :func:`forward_mode_step`; ``learned_loss`` and ``prediction`` are the first
    step's. The real optimizer takes the same steps, so θ and its state end bit for bit where torch.optim puts them.
    """
    if not batches:
        raise ValueError("unrolled_step needs at least one training batch, got none")
    names = trained_parameter_names(model, optimizer)
    phi = [p for p in loss_network.parameters() if p.requires_grad]
    parameters = optimizer_parameters(optimizer)
    theta = [parameter.detach().clone().requires_grad_(parameter.requires_grad) for parameter in parameters]
    state = None
    first: list[Tensor] = []
    for inputs, targets in batches:
        buffers = buffers_of(model)
        prediction = forward(model, dict(zip(names, theta, strict=True)), inputs, autocast)
        learned_loss = loss_network(prediction, targets)
        check_scalar(learned_loss)
        check_early(learned_loss.detach(), model, buffers)
        gradients = gradients_of(learned_loss, theta, create_graph=True)
        theta, state = functional_update(optimizer, theta, gradients, state)
        apply_gradients(optimizer, parameters, [None if g is None else g.detach() for g in gradients])
        first = first or [learned_loss.detach(), prediction.detach()]
    random_after = RandomState(model)
    buffers = buffers_of(model)
    meta_inputs, meta_targets = meta_batch
    replaced = {**dict(zip(names, theta, strict=True)), **buffers}
    meta_loss = task_loss(forward(model, replaced, meta_inputs, autocast), meta_targets)
    random_after.restore()
    meta_gradient = torch.autograd.grad(meta_loss, phi, allow_unused=True, materialize_grads=True)
    return MetaStep(list(meta_gradient), first[0], meta_loss.detach(), first[1], None)


def plain_step(
    model: nn.Module, loss: Loss, optimizer: Optimizer, batch: Batch, *, autocast: torch.dtype | None = None
) -> Tensor:
    """An ordinary training step with a fixed loss, handcrafted or learned; returns that loss before the step.

    Nothing but the optimizer's parameters gets a gradient: a learned loss is not differentiated by φ.
    """
    optimizer.zero_grad()
    value = loss(forward(model, {}, batch[0], autocast), batch[1])
    check_scalar(value)
    value.backward(inputs=[parameter for parameter in optimizer_parameters(optimizer) if parameter.requires_grad])
    optimizer.step()
    return value.detach()


def trained_parameter_names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """The name in ``model`` of each of the optimizer's parameters, in the optimizer's order.

    Raises:
        TypeError: the optimizer's update is not differentiable.
        ValueError: the optimizer holds a parameter that is not the model's, or none that requires a gradient.
        RuntimeError: gradients are switched off.
    """
    check_differentiable(optimizer)
    check_trainable(model, optimizer)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for parameter in optimizer_parameters(optimizer)]


def gradients_of(output: Tensor, parameters: Sequence[Tensor], **options: Any) -> list[Tensor | None]:
    """Gradients of ``output``; None where it does not depend on a parameter or the parameter is frozen."""
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    found = iter(torch.autograd.grad(output, wanted, allow_unused=True, **options))
    return [next(found) if parameter.requires_grad else None for parameter in parameters]


def apply_gradients(optimizer: Optimizer, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """One step of the optimizer with these gradients, which do not stay."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    for parameter in parameters:
        parameter.grad = None


def check_early(learned_loss: Tensor, model: nn.Module, buffers: dict[str, Tensor]) -> None:
    """Before θ moves: raise, with the buffers as they were, if the loss is not finite.

    A GPU would have to be waited for; there a loss that is not finite is seen after the step, by ``OnlineLoss``.
    """
    if learned_loss.device.type == "cpu" and not torch.isfinite(learned_loss):
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        check_finite({"learned loss": learned_loss}, model)


def _training_pass(model: nn.Module, batch: Batch, autocast: torch.dtype | None, fan_in: float) -> ForwardPass:
    """f(x) as in plain training: buffers and random state move on."""
    random, buffers, parameters = RandomState(model), buffers_of(model), list(model.parameters())
    versions = [parameter._version for parameter in parameters]
    with LayerOutputs(fan_in) as outputs:
        prediction = forward(model, {}, batch[0], autocast)
    if [parameter._version for parameter in parameters] != versions:
        raise RuntimeError("the model changes its parameters in place in its forward pass; do that between the steps")
    return ForwardPass(batch, prediction, buffers, {}, random, RandomState(model), outputs, [])


def _meta_pass(model: nn.Module, batch: Batch, autocast: torch.dtype | None, keep: bool) -> ForwardPass:
    """f(x) on copies of the buffers; the caller restores the random state."""
    random, buffers, new_buffers = RandomState(model), buffers_of(model), buffers_of(model)
    with LayerOutputs(0 if keep else math.inf) as outputs:
        prediction = forward(model, new_buffers, batch[0], autocast)
    states = (buffers, new_buffers, random, RandomState(model))
    return ForwardPass(batch, prediction, *states, outputs, _versions(model, batch) if keep else [])


def _taken_up(model: nn.Module, kept: ForwardPass) -> ForwardPass:
    """Let a meta pass count as the training pass: the model's buffers and the random state move on as it left them."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(kept.new_buffers[name])
    if RandomState(model) == kept.random:  # else random numbers were drawn since; do not draw them again
        kept.new_random.restore()
        return kept
    return replace(kept, new_random=RandomState(model))


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the model's buffers, by name."""
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def _versions(model: nn.Module, batch: Batch) -> list[Any]:
    """Changes whenever a tensor that a pass depends on is changed in place, or a module its mode."""
    tensors = [*batch, *model.parameters(), *model.buffers()]
    return [[(t.data_ptr(), t._version) for t in tensors], [module.training for module in model.modules()]]


@contextmanager
def eval_mode(*modules: nn.Module) -> Iterator[None]:
    """Run a block with the modules in eval mode; every layer's own mode is put back."""
    modes = [(layer, layer.training) for module in modules for layer in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for layer, training in modes:
            layer.training = training


class RandomState:
    """The random state of the CPU and of the model's GPU, to come back to."""

    def __init__(self, model: nn.Module):
        parameters = model.parameters() if torch.cuda.is_initialized() else ()  # else none is on a GPU
        devices = {parameter.device for parameter in parameters if parameter.device.type == "cuda"}
        self.cpu = torch.get_rng_state()
        self.cuda = {device: torch.cuda.get_rng_state(device) for device in devices}

    def restore(self) -> None:
        """Bring it back."""
        torch.set_rng_state(self.cpu)
        for device, state in self.cuda.items():
            torch.cuda.set_rng_state(state, device)

    def __eq__(self, other: object) -> bool:
        """Whether the next random numbers would be the same."""
        if not isinstance(other, RandomState) or self.cuda.keys() != other.cuda.keys():
            return False
        pairs = [(self.cpu, other.cpu), *((self.cuda[device], other.cuda[device]) for device in self.cuda)]
        return all(torch.equal(ours, theirs) for ours, theirs in pairs)
