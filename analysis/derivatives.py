"""Products with the Jacobian of a model, by the same rules as its backward pass, and what torch cannot differentiate.

For f = f_θ(x) a backward pass gives Jᵀs. Forward mode gives J w, but it looks into blocks under ``torch.no_grad``,
which a backward pass holds constant, and not at hooks and at backward passes written by hand, which change what a
backward pass gives. So J w is taken here from the backward pass itself, by a second one: Jᵀs is linear in s, and ::

    J w = ∇_s ⟨Jᵀs, w⟩,        ⟨Jᵀs, w⟩ = ⟨s, J w⟩.    (1)

The second equation is checked: it fails where a backward pass is not linear in s, or its own derivative in torch is
wrong.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

TORCHSCRIPT = ("`torch.jit.script` is deprecated", FutureWarning)
"""A warning of torch about itself: as a dependency of curvlinops is imported, and at the first forward-mode pass."""

NO_DERIVATIVE = (
    "a part of the model or of the loss cannot be differentiated as this needs ({}); write that part in operations "
    "that torch differentiates twice, or set requires_grad=False on the parameters before it to leave them out"
)
NOT_LINEAR = (
    "the backward pass of the model has no right derivative: ⟨Jᵀs, w⟩ = {:.6g}, but ⟨s, Jw⟩ = {:.6g}. That happens "
    "with scale_grad_by_freq=True in an embedding, with hooks that clip gradients, or in a custom autograd.Function; "
    "take that out, or set requires_grad=False on the parameters before it to leave them out"
)


class NoDerivative(NotImplementedError):
    """What torch cannot differentiate as asked, with what to do about it."""


@contextmanager
def explained() -> Iterator[None]:
    """Turn torch's errors about missing derivatives into a ``NotImplementedError`` that says what to do."""
    try:
        yield
    except (torch.OutOfMemoryError, NoDerivative):
        raise
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if "use_reentrant=True" in text or "Checkpointing is not compatible" in text:
            raise NoDerivative(
                "reentrant checkpointing gives no gradients of chosen tensors; use checkpoint(..., use_reentrant=False)"
            ) from error
        if isinstance(error, NotImplementedError) or any(words in text for words in MISSING):
            raise NoDerivative(NO_DERIVATIVE.format(text[:200])) from error
        raise


MISSING = ("derivative for", "differentiate twice", "not implemented")


def backward(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], graph: bool = False
) -> list[Tensor]:
    """Σ ∂⟨output, cotangent⟩/∂input for each of ``inputs``, zero where there is no dependence; the graph is kept."""
    # torch refuses outputs without a graph: they depend on no input, and add nothing to the sum
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not pairs:
        return [torch.zeros_like(leaf) for leaf in inputs]
    outs, seeds = zip(*pairs, strict=True)
    found = torch.autograd.grad(
        outs, list(inputs), seeds, retain_graph=True, create_graph=graph, allow_unused=True, materialize_grads=True
    )
    return [_dense(part) for part in found]


def backward_columns(outputs: Sequence[Tensor], inputs: Sequence[Tensor], columns: Sequence[Tensor]) -> list[Tensor]:
    """:func:`backward` of K cotangents each, stacked in front, ``(K, *shape)``: at once if possible, else in a loop."""
    count = len(columns[0])
    if count > 1:
        pairs = [(o, c) for o, c in zip(outputs, columns, strict=True) if o.requires_grad]
        if not pairs:
            return [leaf.new_zeros(count, *leaf.shape) for leaf in inputs]
        outs, seeds = zip(*pairs, strict=True)
        # is_grads_batched is vmap over the backward pass: K products in one pass, with the memory of K
        try:
            found = torch.autograd.grad(
                outs, list(inputs), seeds, retain_graph=True, is_grads_batched=True, allow_unused=True
            )
            return [
                leaf.new_zeros(count, *leaf.shape) if g is None else _dense(g)
                for g, leaf in zip(found, inputs, strict=True)
            ]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # an operation in the backward pass without a rule for batches
            pass
    rows = [backward(outputs, inputs, [column[k] for column in columns]) for k in range(count)]
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


def _dense(gradient: Tensor) -> Tensor:
    """An embedding with ``sparse=True`` has sparse gradients."""
    return gradient if gradient.layout is torch.strided else gradient.to_dense()


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Σ ⟨a, b⟩ over real and imaginary parts, float64."""
    pairs = [(real(x), real(y)) for x, y in zip(a, b, strict=True)]
    return torch.stack([(x.double() * y.double()).sum() for x, y in pairs]).sum()


def real(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of real numbers; any other as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def check_adjoint(pulled: Sequence[Tensor], direction: Sequence[Tensor], cotangent: Tensor, tangent: Tensor) -> None:
    """Check ⟨Jᵀs, w⟩ = ⟨s, J w⟩ up to the precision of the tensors.

    Raises:
        ValueError: a product is not finite.
        NotImplementedError: the two differ.
    """
    first, second = inner(pulled, direction), inner([cotangent], [tangent])  # ⟨Jᵀs, w⟩ and ⟨s, J w⟩
    # either number is a sum that may cancel to almost nothing, so rounding is judged against ‖Jᵀs‖ ‖w‖ + ‖s‖ ‖J w‖
    sizes = [inner(part, part).sqrt() for part in (list(pulled), list(direction), [cotangent], [tangent])]
    check_equal(first, second, sizes[0] * sizes[1] + sizes[2] * sizes[3], cotangent, NOT_LINEAR)


def check_equal(first: Tensor, second: Tensor, scale: Tensor, like: Tensor, words: str) -> None:
    """Raise ``NotImplementedError`` with ``words`` unless two numbers agree, up to rounding relative to ``scale``.

    Raises:
        ValueError: one of them is not finite.
    """
    if not (torch.isfinite(first) and torch.isfinite(second)):
        raise ValueError(
            f"a product with derivatives of the model is not finite, {first.item()} and {second.item()}; look for "
            "roots and norms at zero, and for overflow in half precision: try float32"
        )
    single_on_gpu = like.is_cuda and like.dtype == torch.float32
    # √eps leaves room for the rounding of many layers, and a wrong derivative is off by far more; TF32 has 10 bits
    tolerance = 5e-3 if single_on_gpu else torch.finfo(like.dtype).eps ** 0.5
    if not (first - second).abs() <= tolerance * scale:
        raise NoDerivative(words.format(first.item(), second.item()))


def tangent(
    prediction: Tensor,
    leaves: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
    cotangent: Tensor,
    forward: Callable[[dict[str, Tensor]], Tensor],
) -> Tensor:
    """J w by equation (1), or by forward mode where a backward pass cannot be differentiated; checked either way.

    Args:
        prediction: f, with its graph.
        leaves: θ, in that graph, by name.
        direction: w, by the same names.
        cotangent: s, of the shape of f.
        forward: computes f again at other θ, with the same random numbers.

    Raises:
        NotImplementedError: neither way is open, or the check fails.
    """
    w = [direction[name] for name in leaves]
    s = cotangent.detach().clone().requires_grad_()
    try:
        pulled = backward([prediction], list(leaves.values()), [s], graph=True)  # Jᵀs, as a function of s
        (found,) = backward(pulled, [s], w)  # equation (1): ∇_s ⟨Jᵀs, w⟩ = J w; its value does not depend on s
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # the backward pass is not differentiable; forward mode needs no second one
        pulled = backward([prediction], list(leaves.values()), [cotangent])
        found = _forward_mode(forward, leaves, direction, error)
    check_adjoint([g.detach() for g in pulled], w, cotangent, found)
    return found.detach()


def _forward_mode(
    forward: Callable[[dict[str, Tensor]], Tensor],
    leaves: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
    reason: RuntimeError,
) -> Tensor:
    values = {name: leaf.detach() for name, leaf in leaves.items()}
    moves = {name: direction[name] for name in leaves}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", *TORCHSCRIPT)
            return cast(Tensor, torch.func.jvp(forward, (values,), (moves,))[1])
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        texts = "; ".join(" ".join(str(e).split())[:150] for e in (reason, error))
        raise NoDerivative(NO_DERIVATIVE.format(texts)) from error
