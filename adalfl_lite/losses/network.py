"""Loss networks M_φ, and the task losses L_T they are meta-learned against.

A loss network is a small multilayer perceptron ℓ_φ : ℝ² → ℝ, applied to each output separately and averaged
(paper, section "Loss Function Representation")::

    M_φ(y, f) = 1/(B·C) Σ_b Σ_c ℓ_φ(y_bc, p_bc)    (1)

with y the one-hot target and p = softmax(f) in classification, and y the target and p = f in regression.

In regression nothing in (1) ties the minimum of a learned loss to p = y. An *anchored* network replaces ℓ_φ by its
remainder above the tangent at the target, the Bregman form ::

    ℓ_φ(y, p) − ℓ_φ(y, y) − ∂_p ℓ_φ(y, y) (p − y),    (2)

whose value and slope vanish at p = y for every φ. This is our addition, not the paper's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adalfl_lite.losses.activations import BY_KIND, make_activation
from adalfl_lite.losses.stored import StoredLoss
from adalfl_lite.losses.task import check_kind, output_pairs

FORMAT = "adalfl-loss-network-1"


class NetworkOptions(TypedDict, total=False):
    """The settings of a :class:`LossNetwork` beside its kind, for the constructors that have defaults of their own."""

    hidden: Sequence[int]
    activation: str
    output_activation: str
    beta: float
    gamma: float
    bias: bool
    anchored: bool
    reduction: str
    generator: torch.Generator | None


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
            layers += [layer, make_activation(output_activation if last else activation, beta, gamma)]
        self.network = nn.Sequential(*layers)

    @classmethod
    def classification(cls, **options: Unpack[NetworkOptions]) -> LossNetwork:
        """The paper's loss network over (one-hot target, softmax probability)."""
        return cls("classification", **options)

    @classmethod
    def regression(cls, **options: Unpack[NetworkOptions]) -> LossNetwork:
        """The loss network over (target, prediction), anchored at the target unless ``anchored=False`` (the paper)."""
        options.setdefault("anchored", True)
        return cls("regression", **options)

    @classmethod
    def default(cls, kind: str, **options: Unpack[NetworkOptions]) -> LossNetwork:
        """The loss network of a kind of task: :meth:`classification` or :meth:`regression`."""
        return cls.classification(**options) if check_kind(kind) == "classification" else cls.regression(**options)

    @classmethod
    def ml3(cls, kind: str, **options: Unpack[NetworkOptions]) -> LossNetwork:
        """The loss network of ML³ (Bechtle et al. 2021): 2-50-50-1, ReLU, Softplus output, sum over the outputs,

        M_φ(y, f) = 1/B Σ_b Σ_c ℓ_φ(y_bc, p_bc), learned through one step of a fresh model at a time. As the method
        "ml3" of this package it gets AdaLFL's budget: 2,500 meta steps, and the best of eight rehearsals is kept.
        """
        published: NetworkOptions = {
            "hidden": (50, 50),
            "activation": "relu",
            "output_activation": "softplus",
            "reduction": "sum",
            "bias": True,
        }
        chosen: NetworkOptions = {**published, **options}
        return cls(kind, **chosen)

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
        # equation (2): ℓ(y, p) − ℓ(y, y) − ∂_p ℓ(y, y) (p − y)
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
        # as equation (1) of engines.closed_form: a_0 = (y, y), s_0 = (0, 1)
        value = torch.stack([target, target], dim=-1)
        slope = torch.stack([torch.zeros_like(target), torch.ones_like(target)], dim=-1)
        for layer in self.network:
            if isinstance(layer, nn.Linear):  # t_k = W_k s_{k−1}
                slope = F.linear(slope, layer.weight)
            else:  # s_k = σ_k'(z_k) t_k
                slope = slope * BY_KIND[type(layer)].slope(layer, value)
            value = layer(value)
        return value.squeeze(-1), slope.squeeze(-1)

    def _reduce(self, losses: Tensor) -> Tensor:
        """Equation (1): the mean over the batch, and over the outputs or their sum."""
        return losses.mean() if self.reduction == "mean" else losses.sum() / losses.shape[0]

    def extra_repr(self) -> str:
        """Show the kind, the reduction and the anchor in ``print(network)``."""
        return f"kind={self.kind!r}, reduction={self.reduction!r}, anchored={self.anchored}"
