"""Loss networks M_φ, and the task losses L_T they are meta-learned against.

A loss network is a small multilayer perceptron ℓ_φ : ℝ² → ℝ, applied to each output separately and averaged
(paper, section "Loss Function Representation"):

    M_φ(y, f) = 1/(B·C) Σ_b Σ_c ℓ_φ(y_bc, p_bc)                                                          (1)

with y the one-hot target and p = softmax(f) in classification, and y the target and p = f in regression.

In regression nothing in (1) ties the minimum of a learned loss to p = y. An *anchored* network replaces ℓ_φ by its
remainder above the tangent at the target, the Bregman form

    ℓ_φ(y, p) − ℓ_φ(y, y) − ∂_p ℓ_φ(y, y) (p − y),                                                       (2)

whose value and slope vanish at p = y for every φ. This is our addition, not the paper's.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adalfl_lite.checks import check_targets
from adalfl_lite.files import atomic_save, load_payload

KINDS = ("classification", "regression")
FORMAT = "adalfl-loss-network-1"

Loss = Callable[[Tensor, Tensor], Tensor]


def check_kind(kind: str) -> str:
    """Return ``kind`` if it is "classification" or "regression", else raise ``ValueError``."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    return kind


def task_loss(kind: str) -> Loss:
    """L_T: mean cross-entropy of logits (B, C) and classes (B,), or mean squared error of (B, K) and (B, K)."""
    return _cross_entropy if check_kind(kind) == "classification" else _squared_error


def task_error(kind: str) -> Loss:
    """What is reported: the error rate in [0, 1] for classification, the mean squared error for regression."""
    return _error_rate if check_kind(kind) == "classification" else _squared_error


def _cross_entropy(prediction: Tensor, target: Tensor) -> Tensor:
    check_classification(prediction, target)
    try:
        return F.cross_entropy(prediction, target)
    except IndexError:  # on the CPU; a GPU stops at an assertion of its own
        check_targets(target, classes=prediction.shape[1])
        raise


def _squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    check_regression(prediction, target)  # torch would broadcast (B,) and (B, 1) to (B, B)
    return F.mse_loss(prediction, target)


def _one_hot(target: Tensor, classes: int) -> Tensor:
    """(B, C) of zeros and ones; like ``F.one_hot``, which does not vmap."""
    try:
        return torch.zeros(len(target), classes, device=target.device).scatter(1, target[:, None], 1.0)
    except RuntimeError:  # on the CPU, as above
        check_targets(target, classes=classes)
        raise


def _error_rate(prediction: Tensor, target: Tensor) -> Tensor:
    check_classification(prediction, target)
    return (prediction.argmax(-1) != target).float().mean()


class SmoothLeakyReLU(nn.Module):
    """φ(x) = (1 − γ)/β · log(1 + e^{βx}) + γx: smooth, unbounded, slope γ on the far left and 1 on the far right.

    Unlike a softplus it never flattens: its slope is at least γ, so a loss built from it keeps a gradient everywhere
    (paper, section on the loss network's activation).

    Args:
        beta: β > 0, the sharpness of the bend at zero; β → ∞ gives the leaky ReLU.
        gamma: 0 <= γ < 1, the slope on the left.
    """

    def __init__(self, beta: float = 10.0, gamma: float = 0.01):
        super().__init__()
        if not beta > 0:
            raise ValueError(f"beta must be positive, got {beta}")
        if not 0 <= gamma < 1:
            raise ValueError(f"gamma must lie in [0, 1), got {gamma}")
        self.beta, self.gamma = beta, gamma

    def forward(self, x: Tensor) -> Tensor:
        """Apply φ elementwise."""
        return (1 - self.gamma) * F.softplus(x, self.beta) + self.gamma * x

    def slope(self, x: Tensor) -> Tensor:
        """φ'(x)."""
        return (1 - self.gamma) * torch.sigmoid(self.beta * x) + self.gamma

    def extra_repr(self) -> str:
        """Show β and γ in ``print(network)``."""
        return f"beta={self.beta}, gamma={self.gamma}"


class StoredLoss(nn.Module):
    """A loss with parameters that can be kept in a file; ``config`` is what its constructor is called with."""

    format: ClassVar[str]
    what: ClassVar[str]
    kind: str
    config: dict[str, Any]

    def save(self, path: str | os.PathLike) -> None:
        """Write the parameters and ``config`` to ``path``, atomically."""
        atomic_save({"format": self.format, "config": self.config, "state": self.state_dict()}, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """Read a loss of this class written by :meth:`save`, onto the CPU.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is damaged, or holds something else.
        """
        payload = load_payload(path, cls.format)
        try:
            loss, state = cls(**payload["config"]), payload["state"]
            loss.to(next(iter(state.values())).dtype).load_state_dict(state)
        except (KeyError, TypeError, RuntimeError, StopIteration) as error:
            raise ValueError(f"{path} is not a whole {cls.what}: {error}") from error
        if not all(parameter.isfinite().all() for parameter in loss.parameters()):
            raise ValueError(f"{path} holds a {cls.what} whose parameters are not finite; use an earlier one")
        return loss


class LossNetwork(StoredLoss):
    """M_φ, equation (1): a learned loss. Called like any torch loss, ``loss_network(prediction, target)``.

    Build it with :meth:`classification`, :meth:`regression` or :meth:`ml3`; the constructor exposes every choice.

    Args:
        kind: "classification" or "regression".
        hidden: widths of the hidden layers; the paper has two layers of 40.
        activation: "smooth_leaky_relu" (paper) or "relu" (ML³).
        output_activation: "smooth_leaky_relu", "softplus" (ML³) or "identity".
        beta, gamma: of the smooth leaky ReLU, see :class:`SmoothLeakyReLU`.
        bias: whether the layers have biases.
        anchored: use the Bregman form, equation (2).
        reduction: "mean" over the outputs (equation 1) or "sum" over them (ML³); always the mean over the batch.
        generator: draws the Xavier-uniform initial weights; the global generator if None.

    Raises:
        ValueError: an unknown choice, named.
    """

    format = FORMAT
    what = "loss network"

    def __init__(
        self,
        kind: str,
        *,
        hidden: Sequence[int] = (40, 40),
        activation: str = "smooth_leaky_relu",
        output_activation: str = "smooth_leaky_relu",
        beta: float = 10.0,
        gamma: float = 0.01,
        bias: bool = False,
        anchored: bool = False,
        reduction: str = "mean",
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        check_kind(kind)
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        self.kind, self.reduction, self.anchored = kind, reduction, anchored
        self.config = {
            "kind": kind,
            "hidden": list(hidden),
            "activation": activation,
            "output_activation": output_activation,
            "beta": beta,
            "gamma": gamma,
            "bias": bias,
            "anchored": anchored,
            "reduction": reduction,
        }
        if min(hidden, default=1) < 1:
            raise ValueError(f"hidden must hold positive widths, got {tuple(hidden)}")
        widths = [2, *hidden, 1]
        layers: list[nn.Module] = []
        for position, (fan_in, fan_out) in enumerate(zip(widths, widths[1:], strict=False)):
            layer = nn.Linear(fan_in, fan_out, bias=bias)
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            if bias:
                nn.init.zeros_(layer.bias)
            last = position == len(widths) - 2
            layers += [layer, _activation(output_activation if last else activation, beta, gamma)]
        self.network = nn.Sequential(*layers)

    @classmethod
    def classification(cls, **options: Any) -> LossNetwork:
        """The paper's loss network over (one-hot target, softmax probability)."""
        return cls("classification", **options)

    @classmethod
    def regression(cls, **options: Any) -> LossNetwork:
        """The loss network over (target, prediction), anchored at the target unless ``anchored=False`` (the paper)."""
        return cls("regression", **{"anchored": True, **options})

    @classmethod
    def default(cls, kind: str, **options: Any) -> LossNetwork:
        """:meth:`classification` or :meth:`regression`."""
        return cls.classification(**options) if check_kind(kind) == "classification" else cls.regression(**options)

    @classmethod
    def ml3(cls, kind: str, **options: Any) -> LossNetwork:
        """The loss network of ML³ (Bechtle et al. 2021): 2-50-50-1, ReLU, Softplus output, sum over the outputs,

        M_φ(y, f) = 1/B Σ_b Σ_c ℓ_φ(y_bc, p_bc), learned through one step of a fresh model at a time. As the method
        "ml3" of this package it gets AdaLFL's budget: 2,500 meta steps, and the best of eight rehearsals is kept.
        """
        defaults: dict[str, Any] = {
            "hidden": (50, 50),
            "activation": "relu",
            "output_activation": "softplus",
            "reduction": "sum",
            "bias": True,
        }
        return cls(kind, **{**defaults, **options})

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """M_φ of a batch, a scalar.

        Args:
            prediction: raw model output f: logits (B, C), or predictions (B, K) (or (B,), read as (B, 1)).
            target: classes (B,), int64, each in [0, C); or float (B, K).

        Raises:
            ValueError: shapes, dtypes or labels do not fit; the message gives both.
        """
        return self._reduce(self.elementwise(prediction, target))

    def elementwise(self, prediction: Tensor, target: Tensor) -> Tensor:
        """ℓ_φ(y_bc, p_bc) of every example and output, shape (B, C), before it is averaged."""
        dtype = next(self.parameters()).dtype
        return self.pointwise(*output_pairs(self.kind, prediction, target, dtype))

    def pointwise(self, output: Tensor, target: Tensor) -> Tensor:
        """ℓ_φ(target, output) on tensors of equal (or broadcastable) shape: the bare two-argument function.

        In classification ``output`` is a probability and ``target`` 0 or 1.
        """
        output, target = torch.broadcast_tensors(output, target)
        losses = self._network(target, output)
        if not self.anchored:
            return losses
        value, slope = self._value_and_slope(target)
        return losses - value - slope * (output - target)

    @torch.no_grad()
    def grid(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """ℓ_φ on a grid: (T, P) for targets of shape (T,) and outputs of shape (P,)."""
        reference = next(self.parameters())
        return self.pointwise(outputs.to(reference)[None, :], targets.to(reference)[:, None])

    def clone(self) -> LossNetwork:
        """An independent copy with the same φ."""
        return copy.deepcopy(self)

    def _network(self, target: Tensor, output: Tensor) -> Tensor:
        return self.network(torch.stack([target, output], dim=-1)).squeeze(-1)

    def _value_and_slope(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """ℓ_φ(y, p) and ∂_p ℓ_φ(y, p) at p = y, the slope carried forward layer by layer."""
        value = torch.stack([target, target], dim=-1)
        slope = torch.stack([torch.zeros_like(target), torch.ones_like(target)], dim=-1)
        for layer in self.network:
            slope = F.linear(slope, layer.weight) if isinstance(layer, nn.Linear) else slope * _slope(layer, value)
            value = layer(value)
        return value.squeeze(-1), slope.squeeze(-1)

    def _reduce(self, losses: Tensor) -> Tensor:
        return losses.mean() if self.reduction == "mean" else losses.sum() / losses.shape[0]

    def extra_repr(self) -> str:
        """Show the kind, the reduction and the anchor in ``print(network)``."""
        return f"kind={self.kind!r}, reduction={self.reduction!r}, anchored={self.anchored}"


def output_pairs(kind: str, prediction: Tensor, target: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(p, y) of equation (1), both (B, C): probabilities and one-hot targets, or predictions and targets.

    Raises:
        ValueError: shapes, dtypes or labels do not fit ``kind``.
    """
    if kind == "classification":
        check_classification(prediction, target)
        return prediction.to(dtype).softmax(-1), _one_hot(target, prediction.shape[1]).to(dtype)
    check_regression(prediction, target)
    return prediction.to(dtype), target.to(dtype)


def check_classification(prediction: Tensor, target: Tensor) -> None:
    """Raise ``ValueError`` unless ``prediction`` is (B, C) floating point and ``target`` (B,) int64."""
    if prediction.ndim != 2 or not prediction.is_floating_point():
        raise ValueError(
            f"classification needs logits of shape (B, C), got {tuple(prediction.shape)} of {prediction.dtype}"
        )
    if target.shape != prediction.shape[:1] or target.dtype != torch.int64:
        raise ValueError(
            f"classification needs int64 class indices of shape ({prediction.shape[0]},), "
            f"got {tuple(target.shape)} of {target.dtype}"
        )


def check_regression(prediction: Tensor, target: Tensor) -> None:
    """Raise ``ValueError`` unless both are floating point and of one shape, (B, K) or (B,)."""
    if prediction.shape != target.shape or prediction.ndim not in (1, 2):
        raise ValueError(
            f"regression needs prediction and target of one shape (B, K), "
            f"got {tuple(prediction.shape)} and {tuple(target.shape)}"
        )
    if not (prediction.is_floating_point() and target.is_floating_point()):
        raise ValueError(f"regression needs floating-point tensors, got {prediction.dtype} and {target.dtype}")


def _slope(activation: nn.Module, x: Tensor) -> Tensor:
    """The derivative of one of the activations below at x."""
    if isinstance(activation, SmoothLeakyReLU):
        return activation.slope(x)
    if isinstance(activation, nn.Softplus):
        return torch.sigmoid(x)
    return (x > 0).to(x.dtype) if isinstance(activation, nn.ReLU) else torch.ones_like(x)


def _activation(name: str, beta: float, gamma: float) -> nn.Module:
    if name == "smooth_leaky_relu":
        return SmoothLeakyReLU(beta, gamma)
    if name in ("relu", "softplus", "identity"):
        return {"relu": nn.ReLU, "softplus": nn.Softplus, "identity": nn.Identity}[name]()
    raise ValueError(f"activation must be smooth_leaky_relu, relu, softplus or identity; got {name!r}")
