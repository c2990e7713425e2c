"""One look for every figure: sizes of a journal page, embedded fonts, colours that survive colour blindness.

Either in a block ::

    with theme("column"):
        ax = plot_learning_curves(history)
        save_figure(ax.figure, "curves.pdf")

or ``set_theme()`` once, at the top of a notebook. Plot functions take tidy data and an ``ax``, and return the ``ax``.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from analysis.statistics import bootstrap_interval, check_runs

WIDTHS = {"column": 3.25, "text": 6.75}
"""Widths of a figure in inches: one column, or the text, of a two-column page."""

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
"""Colours told apart under the common colour blindnesses: those of Okabe and Ito (2008), a brown for the yellow."""

SEQUENTIAL, DIVERGING = "viridis", "vlag"
"""Colour maps for quantities, and for signed quantities around zero."""

_LABELS = {
    "step": "Training step",
    "epoch": "Epoch",
    "seconds": "Wall-clock time (s)",
    "learning_rate": "Learning rate",
    "effective_lr": "Effective learning rate",
}


def _parameters(width: str | float, aspect: float) -> dict[Any, Any]:
    if isinstance(width, str) and width not in WIDTHS:
        raise ValueError(f"width must be {' or '.join(map(repr, WIDTHS))} or a number of inches, got {width!r}")
    inches = float(WIDTHS[width] if isinstance(width, str) else width)
    if inches <= 0 or aspect <= 0:
        raise ValueError(f"width and aspect must be positive, got {width} and {aspect}")
    small = {"font.size", "axes.labelsize", "axes.titlesize", "legend.fontsize", "xtick.labelsize", "ytick.labelsize"}
    return {
        **sns.axes_style("ticks"),
        **sns.plotting_context("paper"),
        **dict.fromkeys(small, 8),
        "axes.grid": True,
        "axes.linewidth": 0.8,
        "axes.prop_cycle": cycler(color=PALETTE),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.constrained_layout.use": True,
        "figure.dpi": 150,
        "figure.facecolor": "white",
        "figure.figsize": (inches, inches * aspect),
        "font.family": ["DejaVu Sans"],  # comes with matplotlib: the same everywhere, and has the Greek letters
        "grid.color": "0.92",
        "image.cmap": SEQUENTIAL,
        "legend.columnspacing": 1.2,
        "legend.frameon": False,
        "legend.handlelength": 1.8,
        "legend.handletextpad": 0.5,
        "legend.title_fontsize": 8,
        "lines.linewidth": 1.2,
        "pdf.fonttype": 42,  # TrueType, embedded: what publishers ask for
        "ps.fonttype": 42,
        "savefig.dpi": 300,
        "savefig.facecolor": "white",
        "svg.fonttype": "path",
        "svg.hashsalt": "0",  # the same figure gives the same file
        "xtick.major.width": 0.8,
        "ytick.major.width": 0.8,
    }


def set_theme(width: str | float = "text", aspect: float = 0.62) -> None:
    """Use the look for all figures from here on; for a block only, see :func:`theme`.

    Args:
        width: "column" (3.25 in), "text" (6.75 in), or a number of inches.
        aspect: height divided by width.

    Raises:
        ValueError: an unknown or non-positive width or aspect.
    """
    mpl.rcParams.update(_parameters(width, aspect))


@contextmanager
def theme(width: str | float = "text", aspect: float = 0.62) -> Iterator[None]:
    """The look of :func:`set_theme` for a ``with`` block: create, draw and save the figure inside it."""
    with mpl.rc_context(_parameters(width, aspect)):
        yield


def colours(names: Iterable[str]) -> dict[str, str]:
    """A colour of :data:`PALETTE` for each name, in order; past its end the colours repeat.

    >>> colours(["handcrafted", "adalfl"])
    {'handcrafted': '#0072B2', 'adalfl': '#D55E00'}
    """
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(dict.fromkeys(names))}


def label(column: str) -> str:
    """The axis label of a column: "test_error" becomes "Test error"."""
    return _LABELS.get(column, column[:1].upper() + column[1:].replace("_", " "))


def legend_above(ax: Axes) -> None:
    """Move the legend of ``ax`` above the axes, in as many columns as their width holds, so that it covers no data."""
    legend = ax.get_legend()
    if legend is None:
        return
    legend.set_in_layout(False)
    ax.figure.canvas.figure.draw_without_rendering()  # lays the axes out
    space = ax.get_tightbbox() or ax.bbox
    left = (space.x0 - ax.bbox.x0) / ax.bbox.width
    for columns in range(len(legend.get_texts()), 0, -1):
        sns.move_legend(ax, "lower left", bbox_to_anchor=(left, 1), ncol=columns, title=None, borderaxespad=0.3)
        legend = ax.get_legend() or legend
        if legend.get_window_extent().width <= space.width:
            return


def plain_ticks(axis: Axis) -> None:
    """Label a logarithmic axis that spans two decades or less at 1, 2, 5, with numbers as one writes them: 0.5."""
    low, high = axis.get_view_interval()
    if high <= 100 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())


def save_figure(fig: Figure, path: str | os.PathLike, dpi: int | None = None) -> Path:
    """Write a figure as PDF, SVG or PNG, whole or not at all; the same figure gives the same bytes.

    Args:
        fig: the figure; its size in inches is kept, so that type is as large in print as the theme says.
        path: ends in .pdf, .svg or .png; its folder is made if missing.
        dpi: of PNG, and of pictures inside PDF and SVG; None takes the theme's (300).

    Returns:
        The path written.

    Raises:
        ValueError: another ending.
    """
    path = Path(path)
    undated = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}, ".png": {}}
    if path.suffix not in undated:
        raise ValueError(f"{path.name!r} must end in {', '.join(undated)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        part = Path(folder) / path.name
        fig.savefig(part, dpi=dpi or mpl.rcParams["savefig.dpi"], metadata=undated[path.suffix])
        os.replace(part, path)
    return path


def _ordered(frame: pd.DataFrame, column: str, order: Sequence[str] | None) -> tuple[pd.DataFrame, list[str]]:
    present = list(frame[column].unique())
    order = present if order is None else list(order)
    if unknown := [name for name in order if name not in present]:
        raise ValueError(f"no rows for {column} {unknown}; there are {present}")
    return frame[frame[column].isin(order)], order


def plot_learning_curves(
    history: pd.DataFrame,
    ax: Axes | None = None,
    y: str = "test_error",
    x: str = "step",
    hue: str = "method",
    seed: str = "seed",
    order: Sequence[str] | None = None,
    confidence: float = 0.95,
    legend: bool = True,
) -> Axes:
    """Mean over seeds of ``y`` against ``x``, one line per ``hue``, with a bootstrap band of the mean.

    Lines differ in colour and dashes. Rows where ``y`` is missing (not measured at that step) are left out; the band
    is :func:`analysis.statistics.bootstrap_interval` at each x, and absent where there is one seed.

    Args:
        history: one row per run and step, with columns ``x``, ``y``, ``hue``, ``seed``, of one task.
        ax: the axes; None takes the current ones.
        y: column of values.
        x: column of steps.
        hue: column of methods.
        seed: column that tells the runs of a method apart.
        order: the methods to draw, in the order of the legend and the palette; None takes all.
        confidence: of the band.
        legend: draw the legend, above the axes; panels of one figure need it once.

    Raises:
        ValueError: a missing column, an infinite value, or a seed twice at one x (several tasks: select one).

    Warns:
        UserWarning: at some x fewer seeds of a method have a value than at others, so its mean is over fewer runs.

    >>> history = pd.DataFrame({"step": [0, 1, 0, 1], "test_error": [0.9, 0.5, 0.8, 0.4], "seed": [0, 0, 1, 1]})
    >>> plot_learning_curves(history.assign(method="adalfl")).get_ylabel()
    'Test error'
    """
    columns = [column for column in (x, y, hue, seed) if column in history]
    history = history[columns].dropna()
    check_runs(history, [hue, x], y, seed)
    history, order = _ordered(history, hue, order)
    for name, runs in history.groupby(hue, sort=False, observed=True):
        counts = runs.groupby(x)[seed].nunique()
        if counts.min() < counts.max():
            warnings.warn(
                f"the mean of {name!r} is over {counts.min()} to {counts.max()} seeds along the curve: "
                "did runs stop early or diverge?",
                stacklevel=2,
            )

    def band(values: pd.Series) -> tuple[float, float]:
        return bootstrap_interval(values, confidence=confidence, resamples=999) if len(values) > 1 else (np.nan, np.nan)

    ax = sns.lineplot(
        history,
        x=x,
        y=y,
        hue=hue,
        style=hue,
        hue_order=order,
        style_order=order,
        palette=colours(order),
        errorbar=band,
        err_kws={"linewidth": 0},
        legend=legend,
        ax=ax,
    )
    ax.set(xlabel=label(x), ylabel=label(y))
    legend_above(ax)
    return ax


def plot_comparison(
    results: pd.DataFrame,
    ax: Axes | None = None,
    x: str = "test_error",
    y: str = "method",
    seed: str = "seed",
    order: Sequence[str] | None = None,
    confidence: float = 0.95,
) -> Axes:
    """One row per method: a dot per seed, and the mean over seeds with its bootstrap interval.

    Within a row, dots are stacked by seed, lowest seed on top, so that equal heights in two rows are a pair.

    Args:
        results: one row per run, with columns ``x``, ``y``, ``seed``, of one task.
        ax: the axes; None takes the current ones.
        x: column of values.
        y: column of methods.
        seed: column of seeds.
        order: the methods to draw, from top to bottom; None takes all.
        confidence: of the interval.

    Raises:
        ValueError: a missing column, NaN or infinity, or a seed twice in a method (several tasks: select one).

    >>> results = pd.DataFrame({"method": list("aabb"), "seed": [0, 1, 0, 1], "test_error": [0.1, 0.2, 0.3, 0.2]})
    >>> [text.get_text() for text in plot_comparison(results).get_yticklabels()]
    ['a', 'b']
    """
    check_runs(results, [y], x, seed)
    results, order = _ordered(results, y, order)
    seeds = sorted(results[seed].unique())
    offsets = dict(zip(seeds, np.linspace(-0.25, 0.25, len(seeds)) if len(seeds) > 1 else [0.0], strict=True))
    rows = {name: row for row, name in enumerate(order)}
    heights = results[y].map(rows).astype(float) + results[seed].map(offsets).astype(float)
    palette = colours(order)
    ax = sns.scatterplot(
        x=results[x], y=heights, hue=results[y], palette=palette, s=12, alpha=0.45, linewidth=0, legend=False, ax=ax
    )
    for name, row in rows.items():
        values = results.loc[results[y] == name, x].to_numpy(dtype=float)
        mean = values.mean()
        low, high = bootstrap_interval(values, confidence=confidence) if len(values) > 1 else (mean, mean)
        ax.plot([low, high], [row, row], color=palette[name], linewidth=2, solid_capstyle="butt", zorder=3)
        ax.plot([mean], [row], "o", color=palette[name], markersize=5, markeredgecolor="white", zorder=4)
    ax.set(xlabel=label(x), ylabel="", yticks=range(len(order)), yticklabels=order, ylim=(len(order) - 0.5, -0.5))
    ax.grid(False, axis="y")
    return ax
