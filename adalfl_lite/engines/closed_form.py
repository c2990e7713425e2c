"""The derivatives of a loss network that learning it needs, in closed form, for one network or a stack of them.

Write ℓ_φ as layers z_k = W_k a_{k−1} + b_k, a_k = σ_k(z_k), with a_0 = (y, p) and ℓ = a_K. Its slope in p is carried
forward beside the value, ::

    s_0 = (0, 1),     t_k = W_k s_{k−1},     s_k = σ_k'(z_k) t_k,     ∂_p ℓ = s_K,    (1)

so that the gradient of M_φ with respect to the outputs takes no backward pass. For weights q, the gradient with
respect to φ of Σ q ∂_p ℓ, which is what the meta-gradient asks for, comes from one sweep back through (1)::

    t̄_k = σ_k' s̄_k,     z̄_k = σ_k'' t_k s̄_k + σ_k' ā_k,     s̄_{k−1} = t̄_k W_k,     ā_{k−1} = z̄_k W_k,    (2)

    ∂/∂W_k = t̄_kᵀ s_{k−1} + z̄_kᵀ a_{k−1},     ∂/∂b_k = Σ z̄_k,     from s̄_K = q and ā_K = 0.

Autograd finds the same numbers by a double backward with about three times the work; here a step passes through the
network once. The networks are stacks of :class:`torch.nn.Linear` and of the activations of
:data:`~adalfl_lite.losses.activations.ACTIVATIONS`; ``(S, n, m)`` weights are S networks at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from adalfl_lite.losses.activations import BY_KIND
from adalfl_lite.losses.network import LossNetwork


@dataclass(frozen=True)
class Layer:
    """z = W a + b and σ: weight (..., n, m), bias (..., n) or None, and the activation module."""

    weight: Tensor
    bias: Tensor | None
    activation: nn.Module


@dataclass(frozen=True)
class Tape:
    """What the sweep back needs of one layer: a_{k−1}, s_{k−1}, t_k, σ_k'(z_k), and what σ_k'' is computed from."""

    layer: Layer
    value_in: Tensor
    slope_in: Tensor
    tangent: Tensor
    derivative: Tensor
    sigmoid: Tensor | None
    curvature: float


def in_closed_form(loss: nn.Module) -> bool:
    """Whether the derivatives here are those of this loss: a LossNetwork as it comes, of known layers.

    Hooks, as of pruning, methods replaced on the instance and weights in two places would be passed by.
    """
    if type(loss) is not LossNetwork or layers_of(loss.network) is None or any(map(len, _GLOBAL_HOOKS)):
        return False
    modules = list(loss.modules())
    weights = [p for m in modules for p in m._parameters.values() if p is not None]
    plain = all(
        not (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks) for m in modules
    )
    replaced = any(callable(value) and hasattr(type(m), name) for m in modules for name, value in vars(m).items())
    return plain and not replaced and len({id(p) for p in weights}) == len(weights)


_GLOBAL_HOOKS = (
    torch_modules._global_forward_hooks,
    torch_modules._global_forward_pre_hooks,
    torch_modules._global_backward_hooks,
    torch_modules._global_backward_pre_hooks,
)


def layers_of(network: nn.Sequential, parameters: Sequence[Tensor] | None = None) -> list[Layer] | None:
    """The layers of a loss network's ``network``, with other ``parameters`` in their place if given.

    None if it holds anything but linear layers, each followed by an activation whose derivatives are known.
    """
    modules = list(network)
    remaining = iter(network.parameters() if parameters is None else parameters)
    layers = []
    for linear, activation in zip(modules[::2], modules[1::2], strict=False):
        if type(linear) is not nn.Linear or type(activation) not in BY_KIND:
            return None
        layers.append(Layer(next(remaining), None if linear.bias is None else next(remaining), activation))
    return layers if len(modules) == 2 * len(layers) else None


def value_and_slope(layers: Sequence[Layer], target: Tensor, output: Tensor) -> tuple[Tensor, Tensor, list[Tape]]:
    """ℓ_φ(y, p) and ∂_p ℓ_φ(y, p), equation (1), and the tape for :func:`mixed_gradient`.

    Args:
        layers: of one network, or of S networks.
        target, output: y and p, (..., N), with a leading S for S networks.

    Returns:
        Two tensors (..., N), and the tape.
    """
    value = torch.stack([target, output], dim=-1)
    # equation (1), from a_0 = (y, p) and s_0 = (0, 1)
    slope = torch.zeros_like(value[..., :1, :])
    slope[..., 1] = 1  # s_0, the same for every point
    tape = []
    for layer in layers:
        weight = layer.weight.mT
        # z_k = W_k a_{k−1} + b_k, and beside it t_k = W_k s_{k−1}
        z = value @ weight if layer.bias is None else value @ weight + layer.bias.unsqueeze(-2)
        tangent = slope @ weight
        activated, derivative, sigmoid, curvature = BY_KIND[type(layer.activation)].evaluate(layer.activation, z)
        tape.append(Tape(layer, value, slope, tangent, derivative, sigmoid, curvature))
        # a_k = σ_k(z_k) and s_k = σ_k'(z_k) t_k
        value, slope = activated, derivative * tangent
    return value.squeeze(-1), slope.squeeze(-1), tape


def mixed_gradient(tape: Sequence[Tape], weights: Tensor) -> list[Tensor]:
    """∇_φ Σ q ∂_p ℓ_φ(y, p), equation (2), for weights q (..., N): a tensor per weight and bias, in their order."""
    # equation (2): s̄_K = q, and ā_K = 0, for the value itself is not asked for
    slope_bar = weights.unsqueeze(-1)
    value_bar: Tensor | None = None
    gradients: list[Tensor] = []
    for entry in reversed(tape):
        # t̄_k = σ_k' s̄_k
        tangent_bar = entry.derivative * slope_bar
        # z̄_k = σ_k'' t_k s̄_k + σ_k' ā_k, the second term first; None stands for zero
        z_bar = None if value_bar is None else value_bar.mul_(entry.derivative)
        if entry.sigmoid is not None:  # σ'' = curvature · sigmoid (1 − sigmoid)
            bend = torch.ops.aten.sigmoid_backward(entry.tangent * slope_bar, entry.sigmoid)
            z_bar = bend.mul_(entry.curvature) if z_bar is None else z_bar.add_(bend, alpha=entry.curvature)
        # ∂/∂W_k = t̄_kᵀ s_{k−1} + z̄_kᵀ a_{k−1}; in the first layer s_0 is the same for every point, so its sum factors
        if entry.slope_in.shape[-2] == 1:
            weight_bar = tangent_bar.sum(-2).unsqueeze(-1) * entry.slope_in
        else:
            weight_bar = tangent_bar.mT @ entry.slope_in
        if z_bar is not None:
            weight_bar = weight_bar + z_bar.mT @ entry.value_in
        if entry.layer.bias is not None:
            # ∂/∂b_k = Σ z̄_k
            gradients.append(torch.zeros_like(entry.layer.bias) if z_bar is None else z_bar.sum(-2))
        gradients.append(weight_bar)
        if entry is not tape[0]:
            # s̄_{k−1} = t̄_k W_k and ā_{k−1} = z̄_k W_k
            slope_bar = _times(tangent_bar, entry.layer.weight)
            value_bar = None if z_bar is None else _times(z_bar, entry.layer.weight)
    return gradients[::-1]


def _times(vectors: Tensor, weight: Tensor) -> Tensor:
    """(..., N, n) times (..., n, m); a product of one column with one row is faster elementwise."""
    return vectors * weight if weight.shape[-2] == 1 else vectors @ weight


Along = Callable[[Tensor], list[Tensor]]


def derivatives(
    loss_network: LossNetwork, parameters: Sequence[Tensor] | None, output: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Along]:
    """M_φ, ∂M_φ/∂f and the function u ↦ ∇_φ ⟨∂M_φ/∂f, u⟩ of one :class:`~adalfl_lite.losses.LossNetwork`, or of S.

    Args:
        loss_network: one for which :func:`layers_of` knows the layers.
        parameters: φ to take in place of its own; for S networks stacked, with a leading S.
        output: p of :func:`~adalfl_lite.losses.task.output_pairs`, (B, C), or (S, B, C) for S networks.
        target: y of it.

    Returns:
        () and (B, C), or (S,) and (S, B, C); and the function, of a tangent u of the shape of f.
    """
    layers = layers_of(loss_network.network, parameters)
    if layers is None:
        raise ValueError("the loss network holds layers whose derivatives are not known in closed form")
    lead = layers[0].weight.ndim - 2
    p, y = output.flatten(lead), target.flatten(lead)
    points = p.shape[-1]
    # the mean over everything, or over the batch alone (ML³)
    count = points if loss_network.reduction == "mean" else output.shape[lead]
    if loss_network.anchored:  # the Bregman form also needs value and slope at p = y
        p, y = torch.cat([p, y], -1), torch.cat([y, y], -1)
    value, slope, tape = value_and_slope(layers, y, p)
    if loss_network.anchored:
        # the Bregman form, equation (2) of losses.network: its slope is ∂ℓ(y, p) − ∂ℓ(y, y)
        slope, base = slope[..., :points] - slope[..., points:], slope[..., points:]
        value = value[..., :points] - value[..., points:] - base * (p - y)[..., :points]

    def to_logits(vector: Tensor) -> Tensor:
        """Along the softmax, whose Jacobian is symmetric; nothing to do in regression."""
        if loss_network.kind == "regression":
            return vector
        # softmax: ∂p_c/∂f_d = p_c (δ_cd − p_d)
        return output * (vector - (output * vector).sum(-1, keepdim=True))

    def along(tangent: Tensor) -> list[Tensor]:
        # ⟨∂M/∂f, u⟩ = Σ q ∂_p ℓ with q = (∂p/∂f) u / count
        weights = to_logits(tangent).flatten(lead) / count
        return mixed_gradient(tape, torch.cat([weights, -weights], -1) if loss_network.anchored else weights)

    return value.sum(-1) / count, to_logits(slope.view(output.shape)) / count, along
