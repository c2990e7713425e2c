"""Newton losses: a Newton step in output space in the place of the gradient (Petersen et al. 2024).

The loss at the outputs z_b is replaced by the quadratic ½ Σ_b ‖z*_b − z_b‖² / B around the target ::

    z*_b = z̄_b − (1/B Σ_k H_k + λI)⁻¹ ∇_z ℓ(z̄_b, y_b),    (1)

z̄ the outputs held fixed, H_k = ∇²_z ℓ(z_k, y_k): the Hessian variant. The Fisher variant has ∇ℓ_k ∇ℓ_kᵀ for H_k, so it
needs no second derivative, and the method's authors apply it to the backward pass alone. Both give the model the
gradient (H̄ + λI)⁻¹ ∇ℓ, and so do we: the value is the loss itself, its gradient with respect to the outputs is (1)'s.

For a convex loss, such as the task losses here, H̄ is positive semi-definite and λ > 0 makes the inverse exist.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from adalfl_lite.losses.task import Loss, task_loss

DAMPING = 0.1
"""Our λ. Where a loss has little curvature a step grows by at most 1/λ, with the Hessian or Fisher matrix at zero."""


class NewtonLoss(nn.Module):
    """The task loss of ``kind`` with the output gradient of equation (1).

    Args:
        kind: "classification" or "regression".
        curvature: "hessian" or "fisher".
        damping: λ > 0.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(self, kind: str, curvature: str = "hessian", *, damping: float = DAMPING):
        super().__init__()
        if curvature not in ("hessian", "fisher"):
            raise ValueError(f"curvature must be 'hessian' or 'fisher', got {curvature!r}")
        if not damping > 0:
            raise ValueError(f"damping must be positive, got {damping}")
        self.kind, self.loss, self.curvature, self.damping = kind, task_loss(kind), curvature, damping

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The mean task loss of prediction (B, C) and target."""
        return _Preconditioned.apply(prediction, target, self.loss, self.curvature, self.damping)


class _Preconditioned(torch.autograd.Function):
    """The value of the loss itself, with the gradient of equation (1) as its own."""

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, target: Tensor, loss: Loss, curvature: str, damping: float) -> Tensor:
        with torch.enable_grad():
            output = prediction.detach().requires_grad_(True)
            value = loss(output, target)
            (gradient,) = torch.autograd.grad(value, output)  # of the mean: ∇ℓ_b / B
        rows, columns = gradient.shape
        if curvature == "hessian":
            # H̄ = 1/B Σ_k ∇²_z ℓ(z_k, y_k), (C, C)
            single = vmap(jacrev(jacrev(lambda z, y: loss(z[None], y[None]))))
            matrix = single(prediction.detach(), target).mean(0)
        else:
            # 1/B Σ_k ∇ℓ_k ∇ℓ_kᵀ; the rows at hand are ∇ℓ_k / B, so B times their product
            matrix = rows * gradient.T @ gradient
        # (H̄ + λI)⁻¹ ∇ℓ_b / B of every row b
        matrix = matrix + damping * torch.eye(columns, dtype=matrix.dtype, device=matrix.device)
        ctx.save_for_backward(torch.linalg.solve(matrix, gradient.T).T)
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return outer[0] * gradient, None, None, None, None
