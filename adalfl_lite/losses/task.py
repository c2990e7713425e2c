"""The task losses L_T, and what a loss is given: predictions and targets of one of two kinds."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from adalfl_lite.checks import check_targets

KINDS = ("classification", "regression")

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
    # of a row that is no number argmax names some class, which may be the right one
    return ((prediction.argmax(-1) != target) | prediction.isnan().any(-1)).float().mean()


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
