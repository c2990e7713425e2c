"""The base optimizer's update as a differentiable function θ' = U(θ, g), and its pullback v ↦ (∂U/∂g)ᵀ v.

The base model itself is always updated by the user's own ``torch.optim`` optimizer. What meta-learning adds is a
derivative of that update with respect to the gradient it was given. SGD, Adam and AdamW are written here as pure
functions (torch's own differentiable SGD detaches its first momentum buffer, and so loses part of the derivative);
any other optimizer that accepts ``differentiable=True`` is differentiated through its own step on copies.
"""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

Gradients = Sequence[Tensor | None]
Pullback = Callable[[Sequence[Tensor]], list[Tensor]]


def optimizer_parameters(optimizer: Optimizer) -> list[Tensor]:
    """All parameters of ``optimizer``, in the order of its groups. Gradients here are always given in this order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def check_differentiable(optimizer: Optimizer) -> None:
    """Raise ``TypeError`` unless ``optimizer``'s update can be differentiated (its groups know ``differentiable``)."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if any("differentiable" not in group for group in optimizer.param_groups):
        raise TypeError(
            f"{type(optimizer).__name__} has no differentiable update; use one whose constructor accepts "
            "differentiable=True, such as torch.optim.SGD, Adam, AdamW, RMSprop or Adagrad"
        )


def functional_update(
    optimizer: Optimizer, parameters: Sequence[Tensor], gradients: Gradients, state: list[dict] | None = None
) -> tuple[list[Tensor], list[dict]]:
    """θ' = U(θ, g) as a differentiable function; ``optimizer`` and its parameters stay untouched.

    Args:
        optimizer: gives the rule, the hyper-parameters and, if ``state`` is None, the state to start from.
        parameters: θ, in the order of :func:`optimizer_parameters`; may carry a graph.
        gradients: g, same order and shapes; may carry a graph. ``None`` leaves a parameter as it is.
        state: per-parameter optimizer state returned by an earlier call (for several inner steps).

    Returns:
        θ' and the new state, differentiable with respect to ``parameters``, ``gradients`` and ``state``.
        Where a gradient entry is exactly zero its derivative is taken as zero: such an entry belongs to a parameter
        the batch does not reach, and Adam's √v̂ would turn it into NaN.
    """
    if state is None:
        state = [_copied(optimizer.state.get(parameter, {})) for parameter in optimizer_parameters(optimizer)]
    safe = [None if g is None else torch.where(g != 0, g, torch.zeros_like(g)) for g in gradients]
    rule = RULES.get(type(optimizer))
    if rule is None:
        return _update_of_twin(optimizer, parameters, safe, state)
    groups = [group for group in optimizer.param_groups for _ in group["params"]]
    results = [
        (parameter, entries) if gradient is None else rule(parameter, gradient, entries, group)
        for parameter, gradient, entries, group in zip(parameters, safe, state, groups, strict=True)
    ]
    return [new for new, _ in results], [entries for _, entries in results]


def _sgd(parameter: Tensor, gradient: Tensor, state: dict, group: dict) -> tuple[Tensor, dict]:
    """b ← μ b + (1 − d) g, or b ← g at first; θ ← θ − α (g + μ b) with Nesterov, else θ − α b."""
    gradient = -gradient if group["maximize"] else gradient
    gradient = gradient + group["weight_decay"] * parameter
    if not group["momentum"]:
        return parameter - group["lr"] * gradient, state
    buffer = state.get("momentum_buffer")
    buffer = gradient if buffer is None else group["momentum"] * buffer + (1 - group["dampening"]) * gradient
    step = gradient + group["momentum"] * buffer if group["nesterov"] else buffer
    return parameter - group["lr"] * step, {"momentum_buffer": buffer}


def _adam(parameter: Tensor, gradient: Tensor, state: dict, group: dict) -> tuple[Tensor, dict]:
    """Kingma and Ba (2015), Algorithm 1; with decoupled weight decay, Loshchilov and Hutter (2019), Algorithm 2."""
    gradient = -gradient if group["maximize"] else gradient
    if group.get("decoupled_weight_decay", False):
        parameter = parameter * (1 - group["lr"] * group["weight_decay"])
    else:
        gradient = gradient + group["weight_decay"] * parameter
    beta1, beta2 = group["betas"]
    time = float(state.get("step", 0)) + 1
    first = beta1 * state.get("exp_avg", 0) + (1 - beta1) * gradient
    second = beta2 * state.get("exp_avg_sq", 0) + (1 - beta2) * gradient**2
    new = {"step": time, "exp_avg": first, "exp_avg_sq": second}
    if group["amsgrad"]:
        second = torch.maximum(second, state.get("max_exp_avg_sq", torch.zeros_like(second)))
        new["max_exp_avg_sq"] = second
    denominator = (second / (1 - beta2**time)).sqrt() + group["eps"]
    return parameter - group["lr"] / (1 - beta1**time) * first / denominator, new


RULES = {torch.optim.SGD: _sgd, torch.optim.Adam: _adam, torch.optim.AdamW: _adam}


def _update_of_twin(
    optimizer: Optimizer, parameters: Sequence[Tensor], gradients: Gradients, state: list[dict]
) -> tuple[list[Tensor], list[dict]]:
    """The step of a copy of ``optimizer`` with ``differentiable=True``, over copies of the parameters and the state.

    torch keeps its step counts in float32 on this path, so the result carries about 1e-7 of relative error.
    """
    clones = [parameter.clone() for parameter in parameters]
    twin = copy.copy(optimizer)
    twin.defaults = {**optimizer.defaults, "differentiable": True}
    twin.state = defaultdict(dict)
    settings = {"differentiable": True, "foreach": False, "fused": None, "capturable": False}
    remaining = iter(clones)
    twin.param_groups = [
        {**group, "params": [next(remaining) for _ in group["params"]], **settings} for group in optimizer.param_groups
    ]
    for clone, entries, gradient in zip(clones, state, gradients, strict=True):
        clone.grad = gradient
        if entries:
            twin.state[clone] = _copied(entries)
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        twin.step()
    return clones, [twin.state.get(clone, {}) for clone in clones]


def _copied(entries: dict) -> dict:
    """The optimizer changes its state in place; a graph must not see that."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in entries.items()}


def update_pullback(optimizer: Optimizer, gradients: Gradients) -> Pullback:
    """The linear map v ↦ (∂U/∂g)ᵀ v at the current parameters and state. Call it before ``optimizer.step()``.

    For SGD with learning rate α, momentum μ and dampening d the update is linear in g, so the map is multiplication by
    −α (1 − d), with Nesterov −α (1 + μ (1 − d)); on the very first step torch sets the buffer to g itself, so d = 0.
    Any other optimizer is differentiated through :func:`functional_update`.

    Returns:
        A function of one tensor per parameter that was given a gradient, returning as many tensors of those shapes.
    """
    if type(optimizer) is torch.optim.SGD:
        factors = []
        index = 0
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if gradients[index] is not None:
                    factors.append(
                        _sgd_factor(group, first=optimizer.state.get(parameter, {}).get("momentum_buffer") is None)
                    )
                index += 1
        return lambda vectors: [factor * vector for factor, vector in zip(factors, vectors, strict=True)]

    leaves = [None if g is None else g.detach().requires_grad_(True) for g in gradients]
    detached = [parameter.detach() for parameter in optimizer_parameters(optimizer)]
    updated, _ = functional_update(optimizer, detached, leaves)
    outputs = [new for new, leaf in zip(updated, leaves, strict=True) if leaf is not None]
    inputs = [leaf for leaf in leaves if leaf is not None]
    return lambda vectors: list(torch.autograd.grad(outputs, inputs, list(vectors)))


def _sgd_factor(group: dict, first: bool) -> float | Tensor:
    momentum = group["momentum"]
    kept = 1.0 if momentum == 0 or first else 1.0 - group["dampening"]
    factor = 1.0 + momentum * kept if group["nesterov"] else kept
    return -group["lr"] * factor if not group["maximize"] else group["lr"] * factor
