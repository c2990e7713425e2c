"""Handcrafted losses other than the task loss, with the same interface: (prediction, target) -> scalar, a mean.

p is the softmax probability of the true class. The settings are those commonly used, not tuned for any task here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from adalfl_lite.checks import unknown
from adalfl_lite.losses.task import Loss, check_classification, check_regression


def label_smoothing(prediction: Tensor, target: Tensor, *, epsilon: float = 0.1) -> Tensor:
    """Cross-entropy with the target (1 − ε) one-hot + ε/C (Szegedy et al. 2016, section 7)."""
    check_classification(prediction, target)
    return F.cross_entropy(prediction, target, label_smoothing=epsilon)


def focal(prediction: Tensor, target: Tensor, *, gamma: float = 2.0) -> Tensor:
    """−(1 − p)^γ log p (Lin et al. 2017, equation 4): examples that are right already count less."""
    log_p = _log_true(prediction, target)
    return -((1 - log_p.exp()) ** gamma * log_p).mean()


def poly1(prediction: Tensor, target: Tensor, *, epsilon: float = 2.0) -> Tensor:
    """−log p + ε (1 − p), Poly-1 (Leng et al. 2022): the first term of cross-entropy's series in 1 − p, reweighted."""
    log_p = _log_true(prediction, target)
    return (-log_p + epsilon * (1 - log_p.exp())).mean()


def generalised_cross_entropy(prediction: Tensor, target: Tensor, *, q: float = 0.7) -> Tensor:
    """(1 − p^q)/q (Zhang and Sabuncu 2018, equation 6): cross-entropy as q → 0, half the absolute error at q = 1."""
    return ((1 - (q * _log_true(prediction, target)).exp()) / q).mean()


def symmetric_cross_entropy(
    prediction: Tensor, target: Tensor, *, alpha: float = 0.1, beta: float = 1.0, log_zero: float = -4.0
) -> Tensor:
    """α·CE + β·RCE (Wang et al. 2019): RCE = −Σ_c p_c log y_c, with log 0 replaced by A, is −A (1 − p).

    Poly-1 with another weighting. A = −4 is a default of ours; the noise decides which is best.
    """
    log_p = _log_true(prediction, target)
    return (-alpha * log_p - beta * log_zero * (1 - log_p.exp())).mean()


def absolute_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Σ_c abs(y_c − p_c) = 2 (1 − p) in classification, robust to label noise (Ghosh et al. 2017); else abs(y − f)."""
    if target.is_floating_point():
        check_regression(prediction, target)
        return F.l1_loss(prediction, target)
    return 2 * (1 - _log_true(prediction, target).exp()).mean()


def huber(prediction: Tensor, target: Tensor, *, delta: float = 1.0) -> Tensor:
    """½e² where abs e <= δ, δ (abs e − ½δ) beyond (Huber 1964); e = f − y, of standardised targets."""
    check_regression(prediction, target)
    return F.huber_loss(prediction, target, delta=delta)


def log_cosh(prediction: Tensor, target: Tensor) -> Tensor:
    """Log cosh e = abs e + log(1 + e^{−2 abs e}) − log 2: ½e² near zero, abs e far from it."""
    check_regression(prediction, target)
    error = (prediction - target).abs()
    return (error + F.softplus(-2 * error) - math.log(2)).mean()


def _log_true(prediction: Tensor, target: Tensor) -> Tensor:
    """log p of the true class, (B,)."""
    check_classification(prediction, target)
    return -F.cross_entropy(prediction, target, reduction="none")


FIXED: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "label-smoothing": (label_smoothing, ("classification",)),
    "focal": (focal, ("classification",)),
    "poly1": (poly1, ("classification",)),
    "generalised-ce": (generalised_cross_entropy, ("classification",)),
    "symmetric-ce": (symmetric_cross_entropy, ("classification",)),
    "absolute": (absolute_error, ("classification", "regression")),
    "huber": (huber, ("regression",)),
    "log-cosh": (log_cosh, ("regression",)),
}
"""Every loss above by its name as a method, and the kinds of task it is for."""


def summary(loss: Callable[..., Tensor]) -> str:
    """The first line of a loss's docstring: its formula and source."""
    return (loss.__doc__ or "").splitlines()[0]


def fixed_loss(name: str, **options: float) -> Loss:
    """The loss of that name in :data:`FIXED`, with some of its settings changed; ``ValueError`` if there is none."""
    if name not in FIXED:
        raise unknown("loss", name, FIXED)
    return partial(FIXED[name][0], **options)
