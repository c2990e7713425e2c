"""u = J_f(θ) w: how the model's output on a batch moves when its parameters move along w.

:func:`output_tangent` is exact: forward-mode differentiation, dual numbers carried through the model, no graph. For
z = Wx a layer computes ż = Wẋ + Ẇx, and z again unless :class:`LayerOutputs` kept it from an earlier pass over the same
batch: the pass costs between two and three forward passes.
:func:`finite_difference_tangent` is approximate: one more forward pass, at θ + εw.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from adalfl_lite.checks import check_output

Tangents = Mapping[str, tuple[Tensor, Tensor]]
"""Parameter name -> (θ, w)."""

LAYERS = (F.linear, F.conv1d, F.conv2d, F.conv3d)


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
        output = func(*args, **(kwargs or {}))
        if func in LAYERS:
            worth = _weight(*args, **(kwargs or {}))[0].numel() >= self.fan_in
            self.kept.append((output.detach(), output._version) if worth else None)
        return output

    def take(self) -> Tensor | None:
        """What the next layer gave; None if it was not kept, or changed in place since."""
        output, version = (self.kept.popleft() if self.kept else None) or (None, 0)
        return None if output is None or output._version != version else output


def _weight(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
    return weight


def forward(model: nn.Module, replaced: dict[str, Tensor], inputs: Tensor, autocast: torch.dtype | None) -> Tensor:
    """f(x) with some parameters or buffers replaced; in-place changes to replaced buffers are discarded with them."""
    if autocast is None:
        return check_output(functional_call(model, replaced, (inputs,)) if replaced else model(inputs))
    device_type = next(model.parameters()).device.type
    with torch.autocast(device_type, dtype=autocast, cache_enabled=False):
        return check_output(functional_call(model, replaced, (inputs,))).float()


def output_tangent(
    model: nn.Module,
    state: dict[str, Tensor],
    tangents: Tangents,
    inputs: Tensor,
    autocast: torch.dtype | None,
    outputs: LayerOutputs | None = None,
) -> Tensor | None:
    """u = J_f(θ) w, (B, C), by forward-mode differentiation; None if the output does not depend on θ.

    Args:
        model: f.
        state: values for the other parameters and for the buffers; the model's own are left alone.
        tangents: θ and w.
        inputs: x.
        autocast: dtype for the pass.
        outputs: of a pass over x at θ, with the same random numbers; used up.

    Raises:
        NotImplementedError: an operation of the model has no forward-mode derivative.
    """
    with torch.no_grad(), forward_ad.dual_level(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)  # by torch itself
        duals = {name: forward_ad.make_dual(theta, w) for name, (theta, w) in tangents.items()}
        try:
            with _Rules(outputs or LayerOutputs(math.inf)):
                output = forward(model, {**state, **duals}, inputs, autocast)
        except NotImplementedError as error:
            raise NotImplementedError(
                f"this model uses an operation without a forward-mode derivative ({error}); use engine='unrolled'"
            ) from error
        return forward_ad.unpack_dual(output).tangent


@torch.no_grad()
def finite_difference_tangent(
    model: nn.Module,
    state: dict[str, Tensor],
    tangents: Tangents,
    inputs: Tensor,
    autocast: torch.dtype | None,
    prediction: Tensor,
) -> Tensor:
    """u ≈ (f(θ + εw) − f(θ)) / ε, (B, C), with f(θ) given as ``prediction``; arguments as above.

    The step ε = √δ (1 + ‖θ‖) / 10‖w‖ balances rounding, δ being the precision of the pass, against curvature and the
    kinks of ReLU and max pooling.
    """
    theta, w = (torch._foreach_norm([pair[i] for pair in tangents.values()]) for i in (0, 1))
    length = torch.stack(w).norm()
    if length == 0:
        return torch.zeros_like(prediction)
    precision = torch.finfo(autocast or prediction.dtype).eps
    epsilon = 0.1 * precision**0.5 * (1 + torch.stack(theta).norm()) / length
    moved = {name: theta + epsilon * w for name, (theta, w) in tangents.items()}
    return (forward(model, {**state, **moved}, inputs, autocast) - prediction) / epsilon


class _Rules(TorchFunctionMode):
    """Cheaper tangents than those that torch derives, of linear and convolution layers and of F.batch_norm."""

    def __init__(self, outputs: LayerOutputs) -> None:
        super().__init__()
        self.outputs = outputs

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.batch_norm:
            return _batch_norm(*args, **(kwargs or {}))
        if func in LAYERS:
            return _layer(func, self.outputs.take(), *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


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
