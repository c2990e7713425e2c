r"""Calibration: does a classifier that is 90% sure err once in ten?

The confidence of an example is the probability p̂ of its predicted class; a calibrated model is right on a fraction p
of the examples with confidence p. Every function takes logits and targets, and :func:`predictions` collects those of a
model over a loader, so that they compose::

    scores = calibration_scores(*predictions(model, loader))
    ax = plot_reliability(reliability_table(*predictions(model, loader)))
"""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from scipy.optimize import brentq
from torch import Tensor, nn

from analysis.inputs import Data, call, on_device, one_tensor, preserved
from analysis.plotting import colours, legend_above


def predictions(model: nn.Module, data: Data) -> tuple[Tensor, Tensor]:
    """The logits of ``model`` in eval mode, and the targets, over one (inputs, targets) pair or a loader of them.

    Args:
        model: maps inputs (B, ...) to logits (B, C); it is left as it was found.
        data: targets are class indices, integers of shape (B,). Batches are moved to the model's device.

    Returns:
        Logits (N, C) in the model's dtype and targets (N,) int64, both on the CPU.

    Raises:
        ValueError: no data, NaN or infinity in the data or the logits, or shapes that are no classification.
    """
    logits, targets = [], []
    with preserved(model, training=False), torch.no_grad():
        for x, y in on_device(data, model):
            logits.append(one_tensor(call(model, {}, x)).cpu())
            targets.append(y.cpu())
    return _checked(torch.cat(logits), torch.cat(targets))


@dataclass(frozen=True)
class CalibrationScores:
    """How good the probabilities of a classifier are. Lower is better in all but the accuracy.

    Attributes:
        examples: the number N of examples.
        accuracy: fraction of correct predictions.
        confidence: mean p̂; above the accuracy, the model is overconfident.
        ece: expected calibration error over bins of equal width, Σ_b n_b/N abs(accuracy_b − confidence_b).
        mce: the largest abs(accuracy_b − confidence_b) of these bins; noisy where a bin holds few examples.
        adaptive_ece: the expected calibration error over bins that hold equally many examples.
        nll: negative log-likelihood, the cross-entropy, in nats.
        brier: mean over examples of Σ_c (p_c − 1[c = y])², in [0, 2].
    """

    examples: int
    accuracy: float
    confidence: float
    ece: float
    mce: float
    adaptive_ece: float
    nll: float
    brier: float


def calibration_scores(logits: Tensor, targets: Tensor, bins: int = 15) -> CalibrationScores:
    """Calibration errors (Guo et al. 2017) and proper scores of predictions, in float64.

    The calibration errors are biased upwards: even calibrated predictions have some, by the noise of each bin's
    accuracy. Compare models on the same examples and bins, and lean on the proper scores, nll and brier, which have
    no bins.

    Args:
        logits: (N, C), before softmax.
        targets: (N,) class indices.
        bins: number of bins.

    Raises:
        ValueError: shapes or targets that are no classification, NaN or infinity, or fewer than one bin.

    Examples:
        >>> logits = torch.tensor([[0.8, 0.2]] * 5).log()  # 80% sure of class 0, and right in three of five
        >>> scores = calibration_scores(logits, torch.tensor([0, 0, 0, 1, 1]))
        >>> round(scores.ece, 3), round(scores.confidence - scores.accuracy, 3), round(scores.brier, 3)
        (0.2, 0.2, 0.56)
    """
    logits, targets = _checked(logits, targets)
    probabilities = logits.double().softmax(1)
    confidence, correct = _confidence(logits, targets)
    # top-label calibration is that of the event "the prediction is right"
    equal, adaptive = (reliability_table(logits, targets, bins, adaptive) for adaptive in (False, True))
    return CalibrationScores(
        examples=len(targets),
        accuracy=correct.double().mean().item(),
        confidence=confidence.mean().item(),
        ece=_ece(equal),
        mce=float(equal["gap"].abs().max()),
        adaptive_ece=_ece(adaptive),
        nll=F.cross_entropy(logits.double(), targets).item(),
        brier=(probabilities - F.one_hot(targets, logits.shape[1])).square().sum(1).mean().item(),
    )


def reliability_table(logits: Tensor, targets: Tensor, bins: int = 15, adaptive: bool = False) -> pd.DataFrame:
    """Accuracy against confidence, by bins of confidence.

    Args:
        logits: (N, C), before softmax.
        targets: (N,) class indices.
        bins: number of bins.
        adaptive: False: bins of equal width over [0, 1]. True: bins between quantiles of the confidence, which hold
            equally many examples, but for ties, which stay together (many ties make fewer bins).

    Returns:
        One row per bin [low, high) (the last one includes its high end): low, high, count, fraction (of all examples),
        confidence (mean p̂ in the bin), accuracy, and gap = accuracy − confidence, which is negative where the model is
        overconfident. The last three are NaN in an empty bin.

    Raises:
        ValueError: shapes or targets that are no classification, NaN or infinity, or fewer than one bin.
    """
    edges: np.ndarray = torch.linspace(0, 1, _at_least_one(bins) + 1, dtype=torch.float64).numpy()
    confidence, correct = (part.numpy() for part in _confidence(*_checked(logits, targets)))
    if adaptive:
        edges = np.unique(np.quantile(confidence, edges))
        edges = np.repeat(edges, 2) if len(edges) == 1 else edges
    bins = len(edges) - 1
    # bins are [low, high), so a value on an edge belongs above it; but for 1, which is in the last
    index = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, bins - 1)
    count = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):  # 0/0 in empty bins
        mean_confidence = np.bincount(index, confidence, bins) / count
        accuracy = np.bincount(index, correct, bins) / count
    return pd.DataFrame(
        {
            "low": edges[:-1],
            "high": edges[1:],
            "count": count,
            "fraction": count / count.sum(),
            "confidence": mean_confidence,
            "accuracy": accuracy,
            "gap": accuracy - mean_confidence,
        }
    )


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """Temperature scaling (Guo et al. 2017): the T > 0 for which softmax(logits / T) has the least cross-entropy.

    T > 1 says that the logits are too large: the model is overconfident. Dividing by T changes no prediction, so the
    calibration error left after it is not a matter of the logits' scale. Fit T on validation data, score test data.

    The cross-entropy is convex in β = 1/T; T is the root of its derivative mean_i(Σ_c p_c z_c − z_y), found by Brent's
    method in float64.

    Args:
        logits: (N, C), before softmax.
        targets: (N,) class indices.

    Raises:
        ValueError: see :func:`calibration_scores`; or there is no such T: every prediction is right (T would be 0),
            or the logits are no better than constant ones (T would be infinite).
    """
    logits, targets = _checked(logits, targets)
    z = logits.double()
    z = z - z.max(1, keepdim=True).values  # the same softmax, and 0 for the predicted class
    own = z.gather(1, targets[:, None]).mean().item()

    def slope(beta: float) -> float:
        return ((beta * z).softmax(1) * z).sum(1).mean().item() - own

    if slope(0.0) >= 0:
        raise ValueError("the logits tell no more than constant ones, so T is infinite: train the model first")
    if own == 0:
        raise ValueError("every prediction is right, so the best T is 0: fit T on more or harder held-out examples")
    # the derivative grows with β, from below 0 at β = 0 to above 0 somewhere: double until the root is bracketed
    high = 1.0
    while slope(high) < 0:
        high *= 2
    return 1 / brentq(slope, 0.0, high, xtol=1e-15, rtol=1e-14)


def plot_reliability(table: pd.DataFrame, ax: Axes | None = None, hue: str | None = None) -> Axes:
    """Reliability diagram: accuracy against confidence, a dot per bin whose area is the bin's share of the examples.

    Below the diagonal the model is overconfident. The legend gives the table's expected calibration error.

    Args:
        table: from :func:`reliability_table`; several models: concatenated, told apart by a column ``hue``.
        ax: the axes; None takes the current ones.
        hue: the column that names the model.

    Raises:
        ValueError: a column is missing, or no bin holds an example.

    Examples:
        >>> logits, targets = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0]]), torch.tensor([0, 1, 1])
        >>> ax = plot_reliability(reliability_table(logits, targets))
    """
    needed = ["confidence", "accuracy", "gap", "fraction", *([hue] if hue else [])]
    if missing := [column for column in needed if column not in table]:
        raise ValueError(f"the table lacks {missing}; it has {list(table.columns)}")
    filled = table[table["fraction"] > 0]
    if filled.empty:
        raise ValueError("the table has no bin with examples")
    groups = {str(name): group for name, group in filled.groupby(hue, sort=False)} if hue else {"": filled}
    ax = plt.gca() if ax is None else ax
    ax.plot([0, 1], [0, 1], color="0.5", linestyle="--", linewidth=1, zorder=1)
    for (name, group), colour in zip(groups.items(), colours(groups).values(), strict=True):
        title = f"{name} (ECE {_ece(group):.3f})" if hue else f"ECE {_ece(group):.3f}"
        sns.lineplot(group, x="confidence", y="accuracy", estimator=None, color=colour, label=title, ax=ax)
        area = 6 + 150 * group["fraction"]
        ax.scatter(
            group["confidence"],
            group["accuracy"],
            s=area,
            color=colour,
            alpha=0.6,
            linewidth=0,
            zorder=3,
            clip_on=False,
        )
    ax.set(xlabel="Confidence", ylabel="Accuracy", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    legend_above(ax)
    return ax


def _checked(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and int64 targets, detached and on the CPU, or a ``ValueError``."""
    if logits.ndim != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be floats (N, C) with C >= 2, got {logits.dtype} {tuple(logits.shape)}")
    if targets.shape != logits.shape[:1] or targets.is_floating_point() or targets.dtype == torch.bool:
        found = f"{targets.dtype} {tuple(targets.shape)}"
        raise ValueError(f"targets must be class indices, integers of shape ({len(logits)},); got {found}")
    if len(logits) == 0:
        raise ValueError("there are no examples")
    logits, targets = logits.detach().cpu(), targets.detach().cpu().long()
    if not torch.isfinite(logits).all():
        first = (~torch.isfinite(logits).all(1)).nonzero()[0].item()
        raise ValueError(f"logits hold NaN or infinity, first at example {first}: has the training diverged?")
    if targets.min() < 0 or targets.max() >= logits.shape[1]:
        raise ValueError(
            f"targets run from {targets.min()} to {targets.max()}, but the logits are of {logits.shape[1]} classes"
        )
    return logits, targets


def _confidence(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence p̂ (N,) float64, and whether the prediction is right (N,) bool."""
    confidence, predicted = logits.double().softmax(1).max(1)
    return confidence, predicted == targets


def _at_least_one(bins: int) -> int:
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    return bins


def _ece(table: pd.DataFrame) -> float:
    """Σ_b n_b/N abs(accuracy_b − confidence_b) over the bins of a reliability table."""
    return float((table["fraction"] * table["gap"].abs()).sum())
