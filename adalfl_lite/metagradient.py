"""One step of learning, and its meta-gradient: ∇_φ L_T(f_{θ'(φ)}(x_val), y_val) with θ' = U(θ, ∇_θ M_φ).

Two engines compute the same number.

``forward_mode_step``, for one inner step, never forms a second derivative of the base model. With f the training
output, g = ∂M_φ/∂f, and v = ∇_θ' L_T one ordinary backward pass on the meta batch,

    w = (∂U/∂g)ᵀ v           the optimizer's own derivative, elementwise                                     (1)
    u = J_f(θ) w             one forward-mode pass of the base model, without a graph                       (2)
    ∇_φ L_T = ∇_φ ⟨∂M_φ/∂f (f, y), u⟩    a double backward through the small loss network alone               (3)

It follows from ∇_θ M_φ = J_fᵀ g: differentiating θ' along φ gives (∂U/∂g) J_fᵀ ∂g/∂φ, and the products are taken from
the left. Row b of u says how example b's output would move along the (negative) meta-direction: which examples shape
the loss. Cost: two forward-backward passes and a tangent pass, 8/3 of a plain step, at plain training's memory.

``unrolled_step`` differentiates through any number of inner steps with autograd: the reference, and the engine for
models or optimizers forward mode cannot serve.

Both update the model and the optimizer exactly as ``optimizer.step()`` would, momentum and BatchNorm buffers included;
the meta batch passes through the model in its current mode and leaves buffers and the random state as they were.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.optim import Optimizer

from adalfl_lite.checks import check_finite, check_output, check_scalar, check_trainable
from adalfl_lite.losses import Loss
from adalfl_lite.updates import (
    check_differentiable,
    functional_update,
    optimizer_parameters,
    update_pullback,
)

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class MetaStep:
    """What one step leaves behind; θ and the optimizer state have been updated in place."""

    meta_gradient: list[Tensor]
    """∇_φ L_T, one tensor per parameter of the loss network that requires a gradient."""
    learned_loss: Tensor
    """M_φ on the training batch before the update, a scalar."""
    task_loss: Tensor
    """L_T on the meta batch after the update, a scalar."""
    prediction: Tensor
    """Training output f before the update, (B, C)."""
    output_tangent: Tensor | None
    """u of equation (2), (B, C); None from the unrolled engine."""


def forward_mode_step(
    model: nn.Module,
    loss_network: nn.Module,
    optimizer: Optimizer,
    batch: Batch,
    meta_batch: Batch,
    task_loss: Loss,
    *,
    autocast: torch.dtype | None = None,
) -> MetaStep:
    """One base step with M_φ and its exact meta-gradient by equations (1) to (3).

    Args:
        model: f_θ; its parameters that ``optimizer`` holds are updated in place.
        loss_network: M_φ, called as (prediction, target) -> scalar.
        optimizer: any torch.optim optimizer over ``model``'s parameters with a differentiable update.
        batch: (inputs, targets) for the base step.
        meta_batch: (inputs, targets) on which L_T is taken at the new θ'.
        task_loss: L_T, called as (prediction, target) -> scalar.
        autocast: dtype for the model's passes; the losses see float32 predictions.
    """
    names = trained_parameter_names(model, optimizer)
    phi = [p for p in loss_network.parameters() if p.requires_grad]
    parameters = optimizer_parameters(optimizer)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    before = [parameter.detach().clone() for parameter in parameters]
    random_before = _random_state(model)

    inputs, targets = batch
    versions = [parameter._version for parameter in parameters]
    prediction = _forward(model, {}, inputs, autocast)
    if [parameter._version for parameter in parameters] != versions:
        raise RuntimeError("the model changes its parameters in place in its forward pass; do that between the steps")
    output = prediction.detach().requires_grad_(True)
    learned_loss = loss_network(output, targets)
    _check_early(learned_loss, model, buffers)
    (output_gradient,) = torch.autograd.grad(learned_loss, output, create_graph=True)
    gradients = _gradients(prediction, parameters, grad_outputs=output_gradient.detach())
    reached = [i for i, gradient in enumerate(gradients) if gradient is not None]
    random_after = _random_state(model)

    pullback = update_pullback(optimizer, gradients)
    _apply(optimizer, parameters, gradients)

    meta_inputs, meta_targets = meta_batch
    meta_buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    meta_loss = task_loss(_forward(model, meta_buffers, meta_inputs, autocast), meta_targets)
    moved = [parameters[i] for i in reached]
    raw = torch.autograd.grad(meta_loss, moved, allow_unused=True)
    v = [torch.zeros_like(p) if d is None else d for p, d in zip(moved, raw, strict=True)]
    w = pullback(v)

    state = {**buffers, **{names[i]: before[i] for i in range(len(before)) if i not in set(reached)}}
    tangents = {names[i]: (before[i], direction) for i, direction in zip(reached, w, strict=True)}
    random_before()
    tangent = _output_tangent(model, state, tangents, inputs, autocast)
    random_after()

    if tangent is None:
        meta_gradient = [torch.zeros_like(p) for p in phi]
    else:
        found = torch.autograd.grad(output_gradient, phi, tangent.to(output_gradient.dtype), allow_unused=True)
        meta_gradient = [torch.zeros_like(p) if d is None else d for p, d in zip(phi, found, strict=True)]
    return MetaStep(meta_gradient, learned_loss.detach(), meta_loss.detach(), prediction.detach(), tangent)


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
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        prediction = _forward(model, dict(zip(names, theta, strict=True)), inputs, autocast)
        learned_loss = loss_network(prediction, targets)
        _check_early(learned_loss, model, buffers)
        gradients = _gradients(learned_loss, theta, create_graph=True)
        theta, state = functional_update(optimizer, theta, gradients, state)
        _apply(optimizer, parameters, [None if g is None else g.detach() for g in gradients])
        first = first or [learned_loss.detach(), prediction.detach()]
    random_after = _random_state(model)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    meta_inputs, meta_targets = meta_batch
    replaced = {**dict(zip(names, theta, strict=True)), **buffers}
    meta_loss = task_loss(_forward(model, replaced, meta_inputs, autocast), meta_targets)
    random_after()
    found = torch.autograd.grad(meta_loss, phi, allow_unused=True)
    meta_gradient = [torch.zeros_like(p) if d is None else d for p, d in zip(phi, found, strict=True)]
    return MetaStep(meta_gradient, first[0], meta_loss.detach(), first[1], None)


def plain_step(
    model: nn.Module, loss: Loss, optimizer: Optimizer, batch: Batch, *, autocast: torch.dtype | None = None
) -> Tensor:
    """An ordinary training step with a fixed loss, handcrafted or learned; returns that loss before the step."""
    optimizer.zero_grad()
    value = loss(_forward(model, {}, batch[0], autocast), batch[1])
    check_scalar(value)
    value.backward()
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


def _gradients(output: Tensor, parameters: Sequence[Tensor], **options: Any) -> list[Tensor | None]:
    """Gradients of ``output``; None where it does not depend on a parameter or the parameter is frozen."""
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    found = iter(torch.autograd.grad(output, wanted, allow_unused=True, **options))
    return [next(found) if parameter.requires_grad else None for parameter in parameters]


def _apply(optimizer: Optimizer, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    for parameter in parameters:
        parameter.grad = None


def _forward(model: nn.Module, replaced: dict[str, Tensor], inputs: Tensor, autocast: torch.dtype | None) -> Tensor:
    """f(x) with some parameters or buffers replaced; in-place changes to replaced buffers are discarded with them."""
    if autocast is None:
        return check_output(functional_call(model, replaced, (inputs,)))
    device_type = next(model.parameters()).device.type
    with torch.autocast(device_type, dtype=autocast, cache_enabled=False):
        return check_output(functional_call(model, replaced, (inputs,))).float()


def _check_early(learned_loss: Tensor, model: nn.Module, buffers: dict[str, Tensor]) -> None:
    """Before θ moves: raise, with the buffers as they were, if the loss is no finite scalar.

    A GPU would have to be waited for; there a loss that is not finite is seen after the step, by ``OnlineLoss``.
    """
    check_scalar(learned_loss)
    if learned_loss.device.type == "cpu" and not torch.isfinite(learned_loss):
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        check_finite({"learned loss": learned_loss.detach()}, model)


def _output_tangent(
    model: nn.Module,
    state: dict[str, Tensor],
    tangents: dict[str, tuple[Tensor, Tensor]],
    inputs: Tensor,
    autocast: torch.dtype | None,
) -> Tensor | None:
    """u = J_f w at the parameters in ``tangents``; None if the output does not depend on them."""
    with torch.no_grad(), forward_ad.dual_level(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)  # by torch itself
        duals = {name: forward_ad.make_dual(primal, tangent) for name, (primal, tangent) in tangents.items()}
        try:
            output = _forward(model, {**state, **duals}, inputs, autocast)
        except NotImplementedError as error:
            raise NotImplementedError(
                f"this model uses an operation without a forward-mode derivative ({error}); use engine='unrolled'"
            ) from error
        return forward_ad.unpack_dual(output).tangent


def _random_state(model: nn.Module) -> Callable[[], None]:
    """Remember the random state of the CPU and of the model's GPU; calling the result brings it back."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    cpu = torch.get_rng_state()
    cuda = [(device, torch.cuda.get_rng_state(device)) for device in devices]

    def restore() -> None:
        torch.set_rng_state(cpu)
        for device, state in cuda:
            torch.cuda.set_rng_state(state, device)

    return restore
