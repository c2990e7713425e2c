r"""The learning rate that a loss implies: how much of its gradient is the task loss's gradient, rescaled.

For a loss M that trains, learned or not, and the task loss L, both differentiated along θ on the same data, ::

    ∇M = c ∇L + r,        c = ⟨∇M, ∇L⟩ / ‖∇L‖²,        ⟨r, ∇L⟩ = 0.    (1)

A step on M with learning rate α is a step on L with learning rate c·α, plus a part −α r that no learning rate explains.
c(t)·α over training is the schedule that M implies; ‖r‖/‖∇M‖ = √(1 − cos²) says how much that leaves out.

All of it is about the gradient, before any optimizer. Plain gradient descent takes for c ∇L exactly the step it takes
for ∇L with the learning rate c·α. With momentum that holds as far as c changes little over the momentum's memory; a
schedule also scales weight decay, which M does not; and Adam divides by the gradient's own scale, so that what it sees
of c is mostly its changes over time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from torch import Tensor, nn

from analysis.gradients import mean_gradients
from analysis.inputs import Data, Loss, State, flat, layers, require_columns
from analysis.plotting import DIVERGING, SEQUENTIAL, colours, label, legend_above, plain_ticks


@dataclass(frozen=True)
class EffectiveLR:
    """Equation (1) in numbers, see :func:`effective_learning_rate`."""

    scale: float
    """c; NaN if ∇L = 0."""
    cosine: float
    """⟨∇M, ∇L⟩ / (‖∇M‖ ‖∇L‖), the alignment, in [−1, 1]; NaN if either gradient is zero."""
    residual_norm: float
    """‖r‖; NaN if ∇L = 0."""
    residual_ratio: float
    """‖r‖ / ‖∇M‖, in [0, 1]; NaN if either gradient is zero."""
    gradient_norm: float
    """‖∇M‖."""
    task_gradient_norm: float
    """‖∇L‖."""


def decompose(gradient: Tensor, task_gradient: Tensor) -> tuple[float, Tensor]:
    """c and r of equation (1), for two gradients of equal shape.

    Returns:
        c, and r of the gradients' shape; both NaN if ``task_gradient`` is zero.

    Raises:
        ValueError: the shapes differ.

    Examples:
        >>> import torch
        >>> decompose(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.0]))
        (1.5, tensor([0., 1.]))
    """
    if gradient.shape != task_gradient.shape:
        raise ValueError(f"gradients of one shape, got {tuple(gradient.shape)} and {tuple(task_gradient.shape)}")
    scale = (gradient * task_gradient).sum() / task_gradient.square().sum()  # c = ⟨∇M, ∇L⟩ / ‖∇L‖²
    return scale.item(), gradient - scale * task_gradient  # r = ∇M − c ∇L


@overload
def effective_learning_rate(
    model: nn.Module,
    loss: Loss,
    task_loss: Loss,
    data: Data,
    state: State | None = ...,
    *,
    by_layer: Literal[False] = ...,
) -> EffectiveLR: ...


@overload
def effective_learning_rate(
    model: nn.Module,
    loss: Loss,
    task_loss: Loss,
    data: Data,
    state: State | None = ...,
    *,
    by_layer: Literal[True],
) -> pd.DataFrame: ...


def effective_learning_rate(
    model: nn.Module,
    loss: Loss,
    task_loss: Loss,
    data: Data,
    state: State | None = None,
    *,
    by_layer: bool = False,
) -> EffectiveLR | pd.DataFrame:
    """Equation (1) over all parameters of the model that require a gradient, or layer by layer.

    Args:
        model: f_θ, run in the modes it is in.
        loss: M, (prediction, target) -> scalar, a mean over the batch.
        task_loss: L, likewise.
        data: one (inputs, targets) pair or a loader; on all of it both gradients are taken.
        state: parameters and buffers to use instead of the model's.
        by_layer: of each layer's parameters by themselves: a DataFrame with one row per layer, in the model's order,
            with the columns layer and the fields of :class:`EffectiveLR`. Layers that differ in c are a preconditioner,
            which no single learning rate imitates.

    Raises:
        ValueError: bad data, a loss that is not a finite scalar, or no parameter that requires a gradient.

    Examples:
        >>> import torch
        >>> model, data = nn.Linear(2, 3), (torch.randn(8, 2), torch.randint(3, (8,)))
        >>> task_loss = nn.functional.cross_entropy
        >>> found = effective_learning_rate(model, lambda p, y: 5 * task_loss(p, y), task_loss, data)
        >>> round(found.scale, 4), round(found.cosine, 4)
        (5.0, 1.0)
    """
    gradients = mean_gradients(model, [loss, task_loss], data, state)
    if not by_layer:
        return _measure(*map(flat, gradients))
    return pd.DataFrame(
        {"layer": layer, **vars(_measure(*(flat(gradient, names) for gradient in gradients)))}
        for layer, names in layers(model).items()
    )


def implied_schedule(frame: pd.DataFrame, learning_rate: float | Callable[[int], float]) -> pd.DataFrame:
    """Add α(t) and the learning rate c(t)·α(t) that the loss implies for the task loss.

    Args:
        frame: with the columns step and scale, as :class:`analysis.recorder.Recorder` makes of
            :func:`effective_learning_rate`.
        learning_rate: α > 0 of the optimizer, or α(step).

    Returns:
        The frame with two more columns, learning_rate and effective_lr. To train with the task loss under the schedule
        ``found``, the control that tells what M does beyond it (exact for plain gradient descent)::

            factors = found.effective_lr / found.learning_rate.iloc[0]  # of α(0), which the optimizer is built with
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: np.interp(t, found.step, factors))

    Raises:
        ValueError: a missing column, no row, or a learning rate that is not positive and finite.

    Examples:
        >>> implied_schedule(pd.DataFrame({"step": [0, 100], "scale": [2.0, 0.5]}), learning_rate=0.1)
           step  scale  learning_rate  effective_lr
        0     0    2.0            0.1          0.20
        1   100    0.5            0.1          0.05
    """
    require_columns(frame, "step", "scale")
    rates = [learning_rate(step) if callable(learning_rate) else learning_rate for step in frame["step"]]
    if wrong := [rate for rate in rates if not 0 < rate < np.inf]:
        raise ValueError(f"learning_rate must be positive and finite, got {wrong[0]}")
    return frame.assign(learning_rate=rates, effective_lr=frame["scale"] * rates)


def _measure(gradient: Tensor, task_gradient: Tensor) -> EffectiveLR:
    scale, residual = decompose(gradient, task_gradient)
    norms = gradient.norm(), task_gradient.norm()
    # each divided by its own norm first: the product of two small norms may be zero
    cosine = (gradient / norms[0]) @ (task_gradient / norms[1])
    ratio = residual.norm() / norms[0]
    return EffectiveLR(scale, cosine.item(), residual.norm().item(), ratio.item(), norms[0].item(), norms[1].item())


def plot_schedule(
    frame: pd.DataFrame,
    ax: Axes | None = None,
    y: str = "effective_lr",
    hue: str | None = None,
    log: bool = False,
) -> Axes:
    """Draw the implied learning rate over training, beside α dashed; or the scale or cosine of one run or several.

    For a mean over seeds see :func:`analysis.plotting.plot_learning_curves`.

    Args:
        frame: with the columns step and ``y``; for "effective_lr", of :func:`implied_schedule`.
        ax: where to draw; the current axes if None.
        y: "effective_lr", "scale", "cosine", "residual_ratio" or another column.
        hue: a column that tells lines apart, such as "layer".
        log: use a logarithmic axis; values that are not positive leave a gap.

    Raises:
        ValueError: a missing column, no row, or a step that occurs twice in a line (tell its lines apart by ``hue``).

    Examples:
        >>> frame = pd.DataFrame({"step": [0, 50, 100], "scale": [2.0, 3.0, 0.5]})
        >>> ax = plot_schedule(implied_schedule(frame, learning_rate=0.1))
    """
    require_columns(frame, "step", y, *([hue] if hue else []))
    if frame.duplicated(["step", *([hue] if hue else [])]).any():
        raise ValueError("a step occurs more than once in a line; select one run, or tell lines apart by hue")
    ax = plt.gca() if ax is None else ax
    named = frame.assign(**{hue: frame[hue].astype(str)}) if hue else frame.assign(line="implied by the loss")
    column = hue or "line"
    palette = colours(named[column])
    values = named.assign(**{y: named[y].where(named[y] > 0)}) if log else named
    for name, line in values.groupby(column, sort=False):
        ax.plot(line["step"], line[y], color=palette[str(name)], label=str(name), marker=".", markersize=4)
    if y == "effective_lr" and "learning_rate" in frame:
        base = frame.drop_duplicates("step")
        ax.plot(base["step"], base["learning_rate"], color="0.5", linestyle="--", label="of the optimizer")
    if y in ("cosine", "residual_ratio"):
        ax.set_ylim(-1.05 if y == "cosine" else -0.03, 1.05)
    if log:
        ax.set_yscale("log")
        plain_ticks(ax.yaxis)
    elif y != "residual_ratio":
        ax.axhline(0, color="0.5", linewidth=0.6, zorder=0)
    ax.set(xlabel=label("step"), ylabel=label(y))
    if len(ax.get_legend_handles_labels()[1]) > 1:
        ax.legend()
        legend_above(ax)
    return ax


def plot_layer_schedule(frame: pd.DataFrame, ax: Axes | None = None, y: str = "scale", log: bool = False) -> Axes:
    """Draw a quantity of every layer over training as a heat map; for one step :func:`analysis.gradients.plot_layers`.

    Args:
        frame: with the columns step, layer and ``y``, one row for each step and layer.
        ax: where to draw; the current axes if None.
        y: the column that gives the colours. Their scale begins at 0, or is centred on it where there are negative
            values; a cosine's ends at 1.
        log: use a logarithmic colour scale.

    Raises:
        ValueError: a missing column, no row, a layer twice at a step, or ``log`` with values that are not positive.

    Examples:
        >>> frame = pd.DataFrame({"step": [0, 0, 9, 9], "layer": ["a", "b"] * 2, "scale": [2.0, 3.0, 1.0, 0.5]})
        >>> ax = plot_layer_schedule(frame)
    """
    require_columns(frame, "step", "layer", y)
    if frame.duplicated(["step", "layer"]).any():
        raise ValueError("a layer occurs more than once at a step; select one run")
    if log and frame[y].min() <= 0:
        raise ValueError(f"log needs positive values, the smallest is {frame[y].min()}; use log=False")
    ax = plt.gca() if ax is None else ax
    table = frame.pivot(index="layer", columns="step", values=y).loc[frame["layer"].unique()]
    signed = frame[y].min() < 0
    largest = 1 if y == "cosine" else frame[y].abs().max()
    norm = LogNorm(frame[y].min(), frame[y].max()) if log else Normalize(-largest if signed else 0, largest)
    cmap = DIVERGING if signed else SEQUENTIAL
    rows = range(len(table))
    edges = _edges(table.columns), _edges(rows)
    cells = ax.pcolormesh(*edges, table, norm=norm, cmap=sns.color_palette(cmap, as_cmap=True))
    ax.figure.colorbar(cells, ax=ax, label=label(y))
    ax.grid(False)
    ax.invert_yaxis()
    ax.set(xlabel=label("step"), ylabel="", yticks=rows, yticklabels=table.index)
    return ax


def _edges(centres: Sequence[float]) -> np.ndarray:
    """Of cells that meet half way between these; one cell alone is as wide as one."""
    values = np.asarray(centres, dtype=float)
    # matplotlib's shading="nearest" does the same for several, and gives one alone no width
    if len(values) == 1:
        return values + [-0.5, 0.5]
    middles = (values[1:] + values[:-1]) / 2
    return np.concatenate([[2 * values[0] - middles[0]], middles, [2 * values[-1] - middles[-1]]])
