"""u = J_f(θ) w: how the model's output on a batch moves when its parameters move along w.

:func:`output_tangent` is exact: forward-mode differentiation, dual numbers carried through the model, no graph. For
z = Wx a layer computes ż = Wẋ + Ẇx, and z again unless :class:`LayerOutputs` kept it from an earlier pass over the same
batch: the pass costs between two and three forward passes.
:func:`finite_difference_tangent` is approximate: one more forward pass, at θ + εw.

The J_f that is wanted is the one by which the model's backward pass multiplies. Where the model holds something
constant under ``torch.no_grad`` the two would differ, for forward mode knows no such thing: :class:`_Rules` teaches it.
Any other difference shows in :func:`check_agreement`.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from adalfl_lite.passes import (
    Attributes,
    Replacements,
    differentiable_kernels,
    forward,
    parameters_of,
    replaced,
    unmarked,
)

Tangents = Mapping[int, tuple[Tensor, Tensor]]
"""id of a parameter -> (θ, w)."""

LAYERS = (F.linear, F.conv1d, F.conv2d, F.conv3d)

FINITE_DIFFERENCE_FACTOR, FINITE_DIFFERENCE_LIMIT = 30.0, 1.0
"""How much further than rounding alone :func:`finite_difference_tangent` may miss the identity of
:func:`check_agreement`, and how far at most."""


class LayerOutputs(TorchFunctionMode):
    """Around a forward pass: keeps what its linear and convolution layers give, for :func:`output_tangent`.

    Computing a number of an output again takes as many products as the layer has inputs for it, its fan-in; keeping it
    takes the memory of a number. So ``fan_in`` is the price: outputs of layers with less are not kept.
    """

    def __init__(self, fan_in: float) -> None:
        super().__init__()
        self.fan_in = fan_in
        self.kept: deque[tuple[Tensor, int] | None] = deque()

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The function's output; that of a layer is kept."""
        if func in EMBEDDINGS:
            check_embedding(func.__name__, kwargs or {})
        output = func(*args, **(kwargs or {}))
        if func in LAYERS:
            worth = _weight(*args, **(kwargs or {})).shape[1:].numel() >= self.fan_in
            # the version tells later whether an in-place operation has changed what was kept
            self.kept.append((output.detach(), output._version) if worth else None)
        return output

    def take(self) -> Tensor | None:
        """What the next layer gave; None if it was not kept, or changed in place since."""
        output, version = (self.kept.popleft() if self.kept else None) or (None, 0)
        return None if output is None or output._version != version else output


def _weight(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
    return weight


EMBEDDINGS = (F.embedding, F.embedding_bag)


def check_embedding(name: str, options: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for what an embedding does beside looking up rows: none of it has a right derivative."""
    if options.get("sparse"):
        raise ValueError(f"the layer {name!r} gives sparse gradients, which have no derivative; use sparse=False")
    if options.get("scale_grad_by_freq"):
        raise ValueError(
            f"the layer {name!r} scales its gradients by frequency, which no derivative sees; use"
            " scale_grad_by_freq=False"
        )
    if options.get("max_norm") is not None:
        raise ValueError(
            f"the layer {name!r} shortens its rows in place as it looks them up; use max_norm=None, and between the"
            f" steps weight.renorm_({options.get('norm_type', 2.0)}, 0, {options['max_norm']}) under torch.no_grad()"
        )


def output_tangent(
    model: nn.Module,
    state: Replacements,
    tangents: Tangents,
    inputs: Tensor,
    autocast: torch.dtype | None,
    outputs: LayerOutputs | None = None,
    attributes: Attributes | None = None,
) -> Tensor | None:
    """u = J_f(θ) w, (B, C), by forward-mode differentiation; None if the output does not depend on θ.

    Args:
        model: f; neither its parameters nor its buffers and attributes change.
        state: values for the other parameters and for the buffers, where they are not the model's own.
        tangents: θ and w.
        inputs: x.
        autocast: dtype for the pass.
        outputs: of a pass over x at θ, with the same random numbers; used up.
        attributes: of the modules, as that pass found them; None leaves them as they are.

    Raises:
        NotImplementedError: an operation of the model has no forward-mode derivative.
    """
    # Nothing requires a gradient, so no graph is built; but gradients are on, and so where they are off it is the model
    # that has switched them off.
    # what does not move gets no dual part, so that its tangent costs nothing
    fixed = {id(p): p.detach() for p in parameters_of(model) if id(p) not in tangents}
    rules = _Rules(outputs or LayerOutputs(math.inf))
    with torch.enable_grad(), forward_ad.dual_level(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)  # by torch itself
        # θ + εw with ε² = 0: every operation then carries its derivative along
        duals = {key: forward_ad.make_dual(theta, w) for key, (theta, w) in tangents.items()}
        with unmarked(model), replaced(model, {**fixed, **state, **duals}), differentiable_kernels(model):
            # the pass must begin as the training pass did, also where the model counts its calls
            if attributes is not None:
                attributes.restore()
            try:
                with rules:
                    output = forward(model, inputs, autocast)
            except torch.OutOfMemoryError:
                raise
            except (NotImplementedError, RuntimeError) as error:  # the latter from hooks on activations
                raise NotImplementedError(f"this model cannot be differentiated in forward mode: {error}") from error
        # no dual part: the output does not depend on what moves
        tangent = forward_ad.unpack_dual(output).tangent
    return None if tangent is None else tangent.detach()


@torch.no_grad()
def check_agreement(
    gradients: Sequence[Tensor],
    w: Sequence[Tensor],
    along: Tensor,
    bound: Callable[[], Tensor],
    *,
    tolerance: float,
) -> None:
    """Raise ``NotImplementedError`` unless ⟨g, w⟩ = ⟨∂M/∂f, u⟩: both are the derivative of M along w.

    The left side knows the model by its backward pass, the right side by u. They differ where the model's backward pass
    is not the transpose of its derivative as u has it: straight-through and reversal functions, hooks on activations,
    gradients scaled by hand.

    Args:
        gradients: g = ∇_θ M, by a backward pass.
        w: a direction in parameter space.
        along: ⟨∂M/∂f, u⟩, a scalar.
        bound: gives ‖∂M/∂f‖ ‖u‖, a scalar.
        tolerance: relative to Σ_i ‖g_i‖ ‖w_i‖ over the tensors i, plus ``bound``. Those too small to be normal are not
            compared: of a loss that has nothing left to say, rounding is all there is.
    """
    if not gradients:
        return
    # ⟨g, w⟩ tensor by tensor, for their sizes are the scale of the rounding below
    inner = [inner_product(a, b) for a, b in zip(gradients, w, strict=True)]
    ours, theirs = torch.stack([sum(inner[1:], inner[0]).to(along.dtype), along]).tolist()  # one look at the device
    # a first look that costs nothing more; rounding can exceed it where the terms cancel
    difference = abs(ours - theirs)
    if not difference > tolerance * (abs(ours) + abs(theirs)):  # neither where one is NaN: that is said elsewhere
        return
    # what cancels is measured by the lengths that went in, Σ‖g_i‖‖w_i‖ + ‖∂M/∂f‖‖u‖
    # (in double precision: of small numbers the squares are zeros)
    lengths = torch.stack([part.abs().double().norm() for part in (*gradients, *w)]).view(2, -1)
    # every term below may be off by the smallest normal number, and so may every g_i, which counts w_i times
    terms = sum(part.abs().double().sum() + part.numel() for part in w)
    underflow = torch.finfo(along.dtype).tiny * terms
    if difference > (tolerance * (torch.dot(*lengths) + bound()) + underflow).item():
        raise NotImplementedError(
            f"the model's backward pass and its derivative disagree (by {difference / max(abs(ours), abs(theirs)):.2%}"
            " along one direction): it has a hook on an activation or an operation with a gradient of its own, or draws"
            " random numbers that are not torch's"
        )


def bound_of(slopes: Sequence[Tensor], tangents: Sequence[Tensor]) -> Tensor:
    """Σ ‖∂M/∂f‖ ‖u‖ over the parts of a batch."""
    norms = [s.norm() * t.norm() for s, t in zip(slopes, tangents, strict=True)]
    return sum(norms[1:], norms[0])


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ of two tensors of one shape, of real numbers or of complex ones as pairs of real numbers; a scalar."""
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    # a dot product in half precision would overflow or lose what is being checked
    if a.dtype in (torch.float16, torch.bfloat16):
        a, b = a.float(), b.float()
    return torch.dot(a.reshape(-1), b.reshape(-1))


def tolerance_of(*dtypes: torch.dtype, finite_difference: bool = False) -> float:
    """Of :func:`check_agreement`, for passes of this precision: the root of the machine precision."""
    root = max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5
    return min(FINITE_DIFFERENCE_FACTOR * root, FINITE_DIFFERENCE_LIMIT) if finite_difference else root


class _Rules(TorchFunctionMode):
    """Constants where the model has switched gradients off; and cheaper tangents of layers and F.batch_norm."""

    def __init__(self, outputs: LayerOutputs) -> None:
        super().__init__()
        self.outputs = outputs

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # the model is inside torch.no_grad: its backward pass takes this for a constant, so must the tangent
        if not torch.is_grad_enabled():
            output = self.outputs.take() if func in LAYERS else None  # is constant itself, and kept in its order
            return _constant(func, args, kwargs or {}) if output is None else output
        # torch has no forward-mode rule for these; written out in operations that have one
        if func in COMPOSITE:
            with self:
                return COMPOSITE[func](*args, **(kwargs or {}))
        if func is F.batch_norm:
            return _batch_norm(*args, **(kwargs or {}))
        if func in LAYERS:
            return _layer(func, self.outputs.take(), *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _constant(func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What a function gives of numbers without their tangents; a tensor that it changes in place keeps its own."""
    values: dict[int, Tensor] = {}

    def value(tensor: Tensor) -> Tensor:
        primal = forward_ad.unpack_dual(tensor).primal
        values[id(primal)] = tensor
        return primal

    output = func(*tree_map_only(Tensor, value, args), **tree_map_only(Tensor, value, kwargs))
    return values.get(id(output), output)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """g v / ‖v‖, the norm over all dimensions but one."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """min(max(x + 3, 0), 6) / 6."""
    return F.relu6(input + 3) / 6


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """The sum or mean of the rows of each bag, by looking up, weighing and adding."""
    if mode not in ("sum", "mean"):
        raise NotImplementedError(f"an embedding bag with mode={mode!r} has no such derivative")
    check_embedding("embedding_bag", {"max_norm": max_norm, "scale_grad_by_freq": scale_grad_by_freq, "sparse": sparse})
    ids = input.reshape(-1)
    if offsets is None:
        count, bags = len(input), torch.arange(len(input), device=ids.device).repeat_interleave(input.shape[1])
    else:
        starts = offsets[:-1] if include_last_offset else offsets
        count = len(starts)
        bags = torch.searchsorted(starts, torch.arange(len(ids), device=ids.device), right=True) - 1
    weights = torch.ones_like(ids, dtype=weight.dtype)
    if padding_idx is not None:
        weights = weights * (ids != padding_idx % len(weight))
    sizes = torch.zeros(count, dtype=weight.dtype, device=ids.device).index_add(0, bags, weights)
    rows = F.embedding(ids, weight) * weights[:, None]
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(-1, 1)
    sums = torch.zeros(count, weight.shape[1], dtype=weight.dtype, device=ids.device).index_add(0, bags, rows)
    return sums / sizes.clamp(min=1)[:, None] if mode == "mean" else sums


COMPOSITE: dict[Callable, Callable[..., Tensor]] = {
    torch._weight_norm: _weight_norm,
    F.hardsigmoid: _hardsigmoid,
    F.embedding_bag: _embedding_bag,
}
"""Functions of torch that lack a derivative, or have a wrong one, as compositions of others that have it."""


def _layer(
    func: Callable[..., Tensor],
    output: Tensor | None,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *rest: Any,
    **options: Any,
) -> Tensor:
    """z = Wx + b, if it is not given as ``output``, with the tangent Wẋ + Ẇx + ḃ; torch also multiplies zeros."""
    x, x_tangent = forward_ad.unpack_dual(input)
    w, w_tangent = forward_ad.unpack_dual(weight)
    b, b_tangent = (None, None) if bias is None else forward_ad.unpack_dual(bias)
    if w_tangent is None and b_tangent is not None:
        return func(input, weight, bias, *rest, **options)
    z = func(x, w, b, *rest, **options) if output is None else output
    terms = [] if w_tangent is None else [func(x, w_tangent, b_tangent, *rest, **options)]
    terms += [] if x_tangent is None else [func(x_tangent, w, None, *rest, **options)]
    return forward_ad.make_dual(z, sum(terms[1:], terms[0])) if terms else z


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """In train mode, with a tangent that costs a fraction of the composite one that torch derives.

    With x̂ the normalised input and r = 1/√(variance + ε), the derivative of x̂ along ẋ is
    r (ẋ − mean ẋ − x̂ · mean(x̂ ẋ)): a symmetric map, so the backward kernel computes it. The tangent of γx̂ + β adds
    γ̇x̂ + β̇.
    """
    primal, tangent = forward_ad.unpack_dual(x)
    if not training or tangent is None or not x.dtype == tangent.dtype == (x if weight is None else weight).dtype:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    gain, gain_tangent = (None, None) if weight is None else forward_ad.unpack_dual(weight)
    shift, shift_tangent = (None, None) if bias is None else forward_ad.unpack_dual(bias)
    output, mean, scale = torch.native_batch_norm(
        primal, gain, shift, running_mean, running_var, training, momentum, eps
    )
    moved, _, _ = torch.ops.aten.native_batch_norm_backward(
        tangent, primal, gain, None, None, mean, scale, training, eps, [True, False, False]
    )
    per_channel = [1, -1] + [1] * (x.ndim - 2)
    if gain_tangent is not None:
        slope = gain_tangent * scale
        moved.addcmul_(primal, slope.view(per_channel)).sub_((slope * mean).view(per_channel))
    if shift_tangent is not None:
        moved.add_(shift_tangent.view(per_channel))
    return forward_ad.make_dual(output, moved)
