"""The base optimizer's update as a differentiable function θ' = U(θ, g), and its pullback v ↦ (∂U/∂g)ᵀ v.

The base model itself is always updated by the user's own ``torch.optim`` optimizer. What meta-learning adds is a
derivative of that update with respect to the gradient it was given. SGD, Adam and AdamW are written here as pure
functions (torch's own differentiable SGD detaches its first momentum buffer, and so loses part of the derivative);
any other optimizer that accepts ``differentiable=True`` is differentiated through its own step on copies.

Complex parameters are pairs of real ones, as torch's optimizers view them.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizers

from adalfl_lite.passes import optimizer_parameters

Gradients = Sequence[Tensor | None]
Pullback = Callable[[Sequence[Tensor]], list[Tensor]]


def check_differentiable(optimizer: Optimizer) -> None:
    """Raise ``TypeError`` unless ``optimizer``'s update can be differentiated.

    Its groups must know ``differentiable``, and its ``step`` must be torch's own: what a subclass does beside it, such
    as clipping or projecting, would change θ unseen by the derivative.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if any("differentiable" not in group for group in optimizer.param_groups):
        raise TypeError(
            f"{type(optimizer).__name__} has no differentiable update; use one whose constructor accepts "
            "differentiable=True, such as torch.optim.SGD, Adam, AdamW, RMSprop or Adagrad"
        )
    check_own_step(optimizer)


def check_own_step(optimizer: Optimizer) -> None:
    """Raise ``TypeError`` unless ``optimizer.step`` is torch's own."""
    step = inspect.unwrap(optimizer.step)  # a learning rate scheduler wraps it
    if not step.__module__.startswith("torch.optim."):
        raise TypeError(
            f"{type(optimizer).__name__} has a step() of its own, {step.__qualname__}, whose derivative is not known;"
            " use an optimizer of torch.optim as it is. To clip, use clip_gradient_norm= or clip_gradient_value= of"
            " OnlineLoss; what changes weights, do between the steps"
        )


def check_no_gradient(optimizer: Optimizer) -> None:
    """Raise ``ValueError`` if a parameter has a ``.grad``, to which ``loss.backward()`` would add."""
    for parameter in optimizer_parameters(optimizer):
        if parameter.grad is not None:
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)} has a .grad already, which this step would not add to;"
                " call optimizer.zero_grad(set_to_none=True) before. To accumulate over micro batches, give step() a"
                " list of them"
            )


def check_no_hooks(optimizer: Optimizer, parameters: bool = True) -> None:
    """Raise ``ValueError`` for hooks that would change gradients or weights unseen by the derivative.

    Args:
        optimizer: may have none of its own, and there may be none on all optimizers.
        parameters: look at its parameters too.
    """
    for parameter in optimizer_parameters(optimizer) if parameters else ():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)} has a gradient hook, which the meta-gradient would not"
                " see; remove() it. To clip, use clip_gradient_norm= or clip_gradient_value= of OnlineLoss or fit"
            )
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    everywhere = (torch_optimizers._global_optimizer_pre_hooks, torch_optimizers._global_optimizer_post_hooks)
    if any(hooks) or any(everywhere):
        raise ValueError(
            "the optimizer has a step hook, which the meta-gradient would not see; remove() it. To clip, use"
            " clip_gradient_norm= or clip_gradient_value= of OnlineLoss or fit; what changes weights, do between the"
            " steps"
        )


@dataclass(frozen=True)
class Clipping:
    """What is done to the gradient before the optimizer has it: nothing, or one of torch's two ways of clipping.

    With c = ``norm`` and n the length of the whole gradient, g ← g · min(1, c / (n + 1e-6)), as
    ``torch.nn.utils.clip_grad_norm_``; or each entry is clamped to [−``value``, ``value``], as ``clip_grad_value_``.

    Raises:
        ValueError: a bound that is not positive, or both.
    """

    norm: float | None = None
    value: float | None = None

    def __post_init__(self) -> None:
        """Refuse a bound that is not positive, or two at once."""
        for name, bound in (("clip_gradient_norm", self.norm), ("clip_gradient_value", self.value)):
            if bound is not None and not bound > 0:
                raise ValueError(f"{name} must be positive, or None not to clip; got {bound}")
        if self.norm is not None and self.value is not None:
            raise ValueError("clip_gradient_norm and clip_gradient_value exclude each other; give one of them")

    def __call__(self, gradients: Gradients) -> list[Tensor | None]:
        """The clipped gradients, differentiable where the given ones carry a graph."""
        if self.value is not None:
            # clip_grad_value_: each entry by itself
            return [None if g is None else torch.clamp(g, -self.value, self.value) for g in gradients]
        if self.norm is not None and (given := [g for g in gradients if g is not None]):
            # clip_grad_norm_: one factor for the whole gradient, which itself depends on g
            factor, _ = self._factor(given)
            return [None if g is None else factor.to(g.dtype) * g for g in gradients]
        return list(gradients)

    def pullback(self, gradients: Sequence[Tensor]) -> Pullback:
        """The linear map w ↦ (∂ clipped/∂g)ᵀ w at these gradients."""
        if self.value is not None:
            # the derivative of a clamp: one where it leaves the entry, zero where it cuts
            inside = [g.abs() <= self.value for g in gradients]
            return lambda vectors: [torch.where(i, w, 0) for i, w in zip(inside, vectors, strict=True)]
        if self.norm is None:
            # nothing is clipped: the identity
            return list
        # of c g / (n + ε):  w ↦ c / (n + ε) · (w − ⟨g, w⟩ / (n (n + ε)) · g)
        factor, length = self._factor(gradients)
        inward = torch.where((factor < 1) & (length > 0), 1 / (length * (length + NORM_EPSILON)), 0.0)

        def pull(vectors: Sequence[Tensor]) -> list[Tensor]:
            along = sum((_real(g) * _real(w)).sum() for g, w in zip(gradients, vectors, strict=True)) * inward
            return [(factor * (w - along * g)).to(w.dtype) for g, w in zip(gradients, vectors, strict=True)]

        return pull

    def _factor(self, gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """min(1, c / (n + ε)), and n; torch's own function of the length has no derivative."""
        assert self.norm is not None  # noqa: S101  (for the type checker)
        length = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
        return torch.clamp(self.norm / (length + NORM_EPSILON), max=1.0), length


NORM_EPSILON = 1e-6
"""Of ``torch.nn.utils.clip_grad_norm_``."""


def _real(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of real numbers, a real one as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _like(tensor: Tensor, original: Tensor) -> Tensor:
    """A real tensor as the one it was a view of, complex where that is: the inverse of :func:`_real`."""
    return torch.view_as_complex(tensor.contiguous()) if original.is_complex() else tensor


def changes_gradients(optimizer: Optimizer) -> bool:
    """Whether ``optimizer.step()`` may change the gradients it is given: torch's foreach SGD does, for Nesterov."""
    return any(group.get("nesterov") for group in optimizer.param_groups)


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
        The derivative is taken as zero at an entry that has never had a gradient, where a square root would turn it
        into NaN: it belongs to a parameter that no batch has reached.
    """
    if state is None:
        # a copy: several unrolled steps carry their own state on, and the optimizer takes its own steps
        state = [_copied(optimizer.state.get(parameter, {})) for parameter in optimizer_parameters(optimizer)]
    # complex entries are two real ones to the rules below, as they are to torch
    real = [_real(parameter) for parameter in parameters]
    slopes = [None if g is None else _real(g) for g in gradients]
    entries = [_real_entries(of_one) for of_one in state]
    rule = rule_of(optimizer, RULES)
    if rule is None:
        # an optimizer whose formula is not written here: its own step, on copies, with a graph
        new, new_state = _update_of_twin(optimizer, real, [_without_nan(g) for g in slopes], entries)
    else:
        groups = [group for group in optimizer.param_groups for _ in group["params"]]
        results = [
            (parameter, of_one) if gradient is None else rule(parameter, gradient, of_one, group)
            for parameter, gradient, of_one, group in zip(real, slopes, entries, groups, strict=True)
        ]
        new, new_state = [parameter for parameter, _ in results], [of_one for _, of_one in results]
    return [_like(a, b) for a, b in zip(new, parameters, strict=True)], new_state


def _sgd(parameter: Tensor, gradient: Tensor, state: dict, group: dict) -> tuple[Tensor, dict]:
    """b ← μ b + (1 − d) g, or b ← g at first; θ ← θ − α (g + μ b) with Nesterov, else θ − α b."""
    gradient = -gradient if group["maximize"] else gradient
    # weight decay is a gradient too, and goes through the momentum with it
    gradient = gradient + group["weight_decay"] * parameter
    if not group["momentum"]:
        return parameter - group["lr"] * gradient, state
    buffer = state.get("momentum_buffer")
    buffer = gradient if buffer is None else group["momentum"] * buffer + (1 - group["dampening"]) * gradient
    # Nesterov looks ahead by one more momentum step from the new buffer
    step = gradient + group["momentum"] * buffer if group["nesterov"] else buffer
    return parameter - group["lr"] * step, {"momentum_buffer": buffer}


def _adam(parameter: Tensor, gradient: Tensor, state: dict, group: dict) -> tuple[Tensor, dict]:
    """Kingma and Ba (2015), Algorithm 1; with decoupled weight decay, Loshchilov and Hutter (2019), Algorithm 2."""
    gradient = -gradient if group["maximize"] else gradient
    # AdamW shrinks the weights by themselves; Adam lets the decay go through the moments
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
    reached = second > 0  # else the entry has never had a gradient: its derivative is taken as zero, not as α/ε
    # the root has an infinite slope at zero, so its argument is replaced there before the root is taken:
    # `where` alone would multiply that infinity by zero in the backward pass
    first = torch.where(reached, first, first.detach())
    root = torch.where(reached, (torch.where(reached, second, 1.0) / (1 - beta2**time)).sqrt(), 0.0)
    denominator = root + group["eps"]
    return parameter - group["lr"] / (1 - beta1**time) * first / denominator, new


RULES = {torch.optim.SGD: _sgd, torch.optim.Adam: _adam}


def rule_of(optimizer: Optimizer, table: dict[type[Optimizer], Callable]) -> Callable | None:
    """The entry of the class whose ``step`` the optimizer takes, also if it inherits that; None if there is none."""
    step = inspect.unwrap(type(optimizer).step)
    return next((rule for kind, rule in table.items() if inspect.unwrap(kind.step) is step), None)


def _without_nan(gradient: Tensor | None) -> Tensor | None:
    """The gradient, with a derivative of zero at entries that are zero where the optimizer's own is NaN."""
    if gradient is None or not gradient.requires_grad:
        return gradient
    # a view, so that the hook belongs to this use of the gradient alone
    guarded = gradient.view_as(gradient)
    zero = gradient.detach() == 0
    guarded.register_hook(lambda slope: torch.where(zero & slope.isnan(), 0.0, slope))
    return guarded


def _update_of_twin(
    optimizer: Optimizer, parameters: Sequence[Tensor], gradients: Gradients, state: list[dict]
) -> tuple[list[Tensor], list[dict]]:
    """The step of a copy of ``optimizer`` with ``differentiable=True``, over copies of the parameters and the state.

    torch keeps its step counts in float32 on this path, so the result carries about 1e-7 of relative error.
    """
    # not deepcopy: the copies must stay connected to the graph of θ
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


def _real_entries(entries: dict) -> dict:
    return {name: _real(value) if isinstance(value, Tensor) else value for name, value in entries.items()}


def _copied(entries: dict) -> dict:
    """The optimizer changes its state in place; a graph must not see that."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in entries.items()}


def update_pullback(optimizer: Optimizer, gradients: Gradients) -> Pullback:
    """The linear map v ↦ (∂U/∂g)ᵀ v at the current parameters and state. Call it before ``optimizer.step()``.

    The updates of SGD, Adam and AdamW treat every entry alike, so the map is a multiplication, entry by entry. Any
    other optimizer is differentiated through :func:`functional_update`.

    Returns:
        A function of one tensor per parameter that was given a gradient, returning as many tensors of those shapes.
    """
    # where ∂θ'/∂g is known entry by entry, no graph is needed
    slope = rule_of(optimizer, SLOPES)
    parameters = optimizer_parameters(optimizer)
    if slope is not None:
        groups = [group for group in optimizer.param_groups for _ in group["params"]]
        factors = [
            slope(_real(p.detach()), _real(g.detach()), _real_entries(optimizer.state.get(p, {})), group)
            for p, g, group in zip(parameters, gradients, groups, strict=True)
            if g is not None
        ]
        return lambda vectors: [
            _like(factor * _real(vector), vector) for factor, vector in zip(factors, vectors, strict=True)
        ]

    # otherwise one differentiable step from the state as it is now, kept until the vectors are known
    leaves = [None if g is None else g.detach().requires_grad_(True) for g in gradients]
    updated, _ = functional_update(optimizer, [parameter.detach() for parameter in parameters], leaves)
    outputs = [new for new, leaf in zip(updated, leaves, strict=True) if leaf is not None]
    inputs = [leaf for leaf in leaves if leaf is not None]
    return lambda vectors: list(torch.autograd.grad(outputs, inputs, list(vectors)))


def _sgd_slope(parameter: Tensor, gradient: Tensor, state: dict, group: dict) -> float | Tensor:
    """∂θ'/∂g = −α (1 − d), with Nesterov −α (1 + μ (1 − d)); at the first step torch's buffer is g itself, so d = 0."""
    momentum = group["momentum"]
    first = state.get("momentum_buffer") is None
    kept = 1.0 if momentum == 0 or first else 1.0 - group["dampening"]
    factor = 1.0 + momentum * kept if group["nesterov"] else kept
    return -group["lr"] * factor if not group["maximize"] else group["lr"] * factor


def _adam_slope(parameter: Tensor, gradient: Tensor, state: dict, group: dict) -> Tensor:
    """∂θ'/∂g of :func:`_adam`, with m, s its moments after the step, r = √(s/(1 − β₂ᵗ)) and D = r + ε:

    −α/(1 − β₁ᵗ) · [ (1 − β₁)/D − m (1 − β₂) g / ((1 − β₂ᵗ) r D²) ]
    """
    beta1, beta2 = group["betas"]
    time = float(state.get("step", 0)) + 1
    unbiased1, unbiased2 = 1 - beta1**time, 1 - beta2**time
    g = -gradient if group["maximize"] else gradient
    if not group.get("decoupled_weight_decay", False):
        g = g + group["weight_decay"] * parameter
    first = beta1 * state.get("exp_avg", 0) + (1 - beta1) * g
    second = beta2 * state.get("exp_avg_sq", 0) + (1 - beta2) * g**2
    moves = second > 0
    if group["amsgrad"]:
        largest = state.get("max_exp_avg_sq", torch.zeros_like(second))
        moves = moves & (second > largest)  # the denominator follows s only where that is the largest so far
        second = torch.maximum(second, largest)
    root = (second / unbiased2).sqrt()
    denominator = root + group["eps"]
    # the second moment moves with g as well: the larger the gradient, the more it divides itself
    bending = torch.where(moves, first * (1 - beta2) * g / (unbiased2 * root * denominator**2), 0.0)
    slope = -group["lr"] / unbiased1 * torch.where(second > 0, (1 - beta1) / denominator - bending, 0.0)
    return -slope if group["maximize"] else slope


SLOPES = {torch.optim.SGD: _sgd_slope, torch.optim.Adam: _adam_slope}
