r"""When a loss stops pushing: its gradient over training, set against the gap between training and validation.

A learned loss M that flattens late in training ends it, as early stopping would. Two measures of how hard it pushes:

- ``gradient_norm``: ‖∇M‖. It also falls, under any loss, because the model has fitted its data.
- ``scale``: c = ⟨∇M, ∇L⟩/‖∇L‖² of :mod:`analysis.effective_lr`, its push down the task loss L in units of the task
  loss's own. c → 0 while ‖∇L‖ does not is M stopping where L would go on.

Each is taken relative to its largest absolute value over training.
"""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from torch import nn

from analysis.effective_lr import effective_learning_rate
from analysis.inputs import Data, Loss, call, finite_scalar, on_device, preserved, require_columns, still
from analysis.plotting import PALETTE, label, legend_above, plain_ticks

MEASURES = {"scale": "c", "gradient_norm": "‖∇M‖", "task_gradient_norm": "‖∇L‖"}


@dataclass(frozen=True)
class StoppingPoint:
    """When a loss stopped pushing, and what that did, see :func:`stopping_point`. Losses are task losses."""

    step: int | None
    """The first recorded step from which the push stays below the threshold to the end; None if it does not."""
    remaining: float
    """The relative push at the last record, in [0, 1]."""
    best_step: int
    """The recorded step of the least validation loss: where early stopping with hindsight would have stopped."""
    valid_loss: float
    """At ``step``; NaN if it is None."""
    best_valid_loss: float
    """At ``best_step``."""
    final_valid_loss: float
    """At the last record."""
    gap: float
    """Validation minus training loss at ``step``; NaN if it is None."""
    final_gap: float
    """The same at the last record. Above ``gap``, the model went on to overfit although the push had gone."""


def push_and_gap(model: nn.Module, loss: Loss, task_loss: Loss, train: Data, valid: Data) -> dict[str, float]:
    """How hard a loss pushes, and how far training and validation have come apart.

    Args:
        model: f_θ. Gradients are taken in the modes it is in, task losses in eval mode.
        loss: M, (prediction, target) -> scalar, a mean over the batch.
        task_loss: L, likewise.
        train: one (inputs, targets) pair or a loader, which is read twice: the examples that M trains on.
        valid: held-out examples.

    Returns:
        scale, gradient_norm, task_gradient_norm on ``train`` (as :class:`analysis.effective_lr.EffectiveLR` has them),
        train_loss, valid_loss, and their difference gap = valid_loss − train_loss.

    Raises:
        ValueError: bad data, a loss that is not a finite scalar, or no parameter that requires a gradient.

    Examples:
        >>> model, data = nn.Linear(2, 1), (torch.randn(8, 2), torch.randn(8, 1))
        >>> found = push_and_gap(model, lambda p, y: 3 * (p - y).square().mean(), nn.MSELoss(), data, data)
        >>> round(found["scale"], 4), found["gap"]
        (3.0, 0.0)
    """
    gradients = vars(effective_learning_rate(model, loss, task_loss, train))
    train_loss, valid_loss = _mean_loss(model, task_loss, train), _mean_loss(model, task_loss, valid)
    push = {name: gradients[name] for name in MEASURES}
    return {**push, "train_loss": train_loss, "valid_loss": valid_loss, "gap": valid_loss - train_loss}


def relative_push(frame: pd.DataFrame, by: str = "scale") -> pd.Series:
    """The column's absolute values divided by the largest of them, in [0, 1], indexed by step, in order.

    Raises:
        ValueError: a missing column, no row, a step that occurs twice, NaN or infinity, or nothing but zeros.
    """
    values = _ordered(frame, by).set_index("step")[by].abs()
    if not values.max() > 0:
        raise ValueError(f"{by} is zero at every step; the loss never pushed")
    return values / values.max()


def stopping_point(frame: pd.DataFrame, threshold: float = 0.1, by: str = "scale") -> StoppingPoint:
    """When the push fell below ``threshold`` times its largest value and stayed there.

    The answer is as fine as the records, and where only the last one or two are below, it is weak: train longer.

    Args:
        frame: one run, one row per step, with the columns step, ``by``, train_loss and valid_loss, as
            :class:`analysis.recorder.Recorder` makes of :func:`push_and_gap`.
        threshold: in (0, 1).
        by: "scale", "gradient_norm" or another column.

    Raises:
        ValueError: a threshold outside (0, 1), or what :func:`relative_push` refuses.

    Examples:
        >>> frame = pd.DataFrame({"step": [0, 10, 20, 30], "scale": [2.0, 0.1, 0.4, 0.1]})
        >>> frame = frame.assign(train_loss=[1.0, 0.6, 0.4, 0.3], valid_loss=[1.0, 0.7, 0.6, 0.8])
        >>> found = stopping_point(frame)
        >>> found.step, found.best_step, found.final_gap
        (30, 20, 0.5)
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must lie in (0, 1), got {threshold}")
    runs = _ordered(frame, by, "train_loss", "valid_loss")
    push = relative_push(frame, by).to_numpy()
    steps, valid = runs["step"].to_numpy(), runs["valid_loss"].to_numpy()
    gap = valid - runs["train_loss"].to_numpy()
    # how many records from the end back are below without a break; the first of them is the stop
    stop = len(push) - int(np.logical_and.accumulate(push[::-1] < threshold).sum())
    stops = stop < len(push)
    return StoppingPoint(
        step=int(steps[stop]) if stops else None,
        remaining=float(push[-1]),
        best_step=int(steps[valid.argmin()]),
        valid_loss=float(valid[stop]) if stops else float("nan"),
        best_valid_loss=float(valid.min()),
        final_valid_loss=float(valid[-1]),
        gap=float(gap[stop]) if stops else float("nan"),
        final_gap=float(gap[-1]),
    )


def _mean_loss(model: nn.Module, task_loss: Loss, data: Data) -> float:
    """The mean over examples in eval mode."""
    total, count = 0.0, 0
    with preserved(model, task_loss, training=False), torch.no_grad():
        for inputs, targets in on_device(data, model):
            value = still(task_loss)(call(model, {}, inputs), targets)
            total += finite_scalar(value, "the task loss").item() * len(inputs)
            count += len(inputs)
    return total / count


def _ordered(frame: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """The columns behind step, in the order of the steps, checked."""
    require_columns(frame, "step", *columns)
    if frame["step"].duplicated().any():
        raise ValueError("a step occurs more than once; select one run")
    for column in columns:
        if not np.isfinite(frame[column].to_numpy(dtype=float)).all():
            raise ValueError(f"{column} holds NaN or infinity; did the run diverge?")
    return frame[["step", *columns]].sort_values("step", ignore_index=True)


def plot_early_stopping(
    frame: pd.DataFrame, axes: tuple[Axes, Axes] | None = None, threshold: float = 0.1, by: str = "scale"
) -> tuple[Axes, Axes]:
    """Draw the relative push over training above the task losses, whose gap is shaded, logarithmic if positive.

    Dotted lines mark where the push ended, the dot the best validation loss.

    Args:
        frame: as in :func:`stopping_point`. Besides ``by``, whichever of scale, gradient_norm and task_gradient_norm
            it has are drawn thin, but for one that is zero throughout or has a gap.
        axes: (upper, lower); two stacked axes that share x, on the current figure, if None.
        threshold: of :func:`stopping_point`; dashed.
        by: the column that decides.

    Returns:
        The two axes.

    Raises:
        ValueError: what :func:`stopping_point` raises.

    Examples:
        >>> frame = pd.DataFrame({"step": [0, 10, 20], "scale": [2.0, 0.1, 0.1], "gradient_norm": [1.0, 0.6, 0.2]})
        >>> upper, lower = plot_early_stopping(frame.assign(train_loss=[1.0, 0.6, 0.4], valid_loss=[1.0, 0.7, 0.6]))
    """
    found = stopping_point(frame, threshold, by)
    upper, lower = plt.gcf().subplots(2, 1, sharex=True) if axes is None else axes
    for i, column in enumerate(dict.fromkeys([by, *MEASURES])):
        if column in frame and (column == by or (np.isfinite(frame[column]).all() and frame[column].any())):
            push, width = relative_push(frame, column), 1.6 if column == by else 0.8
            upper.plot(push.index, push, color=PALETTE[2 + i], linewidth=width, label=MEASURES.get(column, column))
    upper.axhline(threshold, color="0.5", linestyle="--", linewidth=0.8)
    runs = _ordered(frame, "train_loss", "valid_loss")
    for i, part in enumerate(("train", "valid")):
        lower.plot(runs["step"], runs[f"{part}_loss"], color=PALETTE[i], label={"valid": "validation"}.get(part, part))
    lower.fill_between(runs["step"], runs["train_loss"], runs["valid_loss"], color="0.5", alpha=0.2, linewidth=0)
    if found.step is not None:
        for ax in (upper, lower):
            ax.axvline(found.step, color="0.4", linestyle=":")
    lower.plot([found.best_step], [found.best_valid_loss], "o", color=PALETTE[1], markersize=4)
    upper.set(ylabel="Push", ylim=(-0.03, 1.06))
    upper.tick_params(labelbottom=False)
    lower.set(xlabel=label("step"), ylabel="Task loss")
    if runs[["train_loss", "valid_loss"]].min(axis=None) > 0:
        lower.set_yscale("log")
        plain_ticks(lower.yaxis)
    for ax in (upper, lower):
        ax.legend()
        legend_above(ax)
    return upper, lower
