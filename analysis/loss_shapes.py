"""The shape of a loss: drawn over the prediction for each target, and put into numbers.

Answers what a learned loss looks like at a training step and how it changes over training (paper, Figures 1, 4 and 5).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from analysis.inputs import Loss, named_tensors, preserved, replaced, still
from analysis.plotting import colours, label

Pointwise = Callable[[Tensor, Tensor], Tensor]

TARGETS = {"classification": (0.0, 1.0), "regression": (-1.0, 0.0, 1.0)}
PREDICTIONS = {"classification": np.linspace(0.005, 0.995, 199), "regression": np.linspace(-3.0, 3.0, 241)}


def loss_curves(
    loss: Loss | Mapping[int, Loss],
    kind: str = "classification",
    targets: Sequence[float] | None = None,
    predictions: Sequence[float] | np.ndarray | Tensor | None = None,
    *,
    pointwise: bool = True,
) -> pd.DataFrame:
    r"""A loss and its derivative over the prediction, for each target.

    What is drawn depends on the loss:

    - **A learned loss** with a method ``pointwise(output, target)``: the bare function ℓ(y, p) of two numbers, with p
      the probability of an output in classification and the prediction in regression. Its derivative is ∂ℓ/∂p.
    - **Any other loss in classification** (torch's, a lambda, or a learned one with ``pointwise=False``): a problem of
      two classes and one example. p is the probability of class 1, the logits are f = (log(1 − p), log p), of which
      softmax makes (1 − p, p), and the target is class 0 or 1. The value is loss(f, target), the derivative its total
      derivative along p. Cross-entropy gives −log p for target 1 and −log(1 − p) for target 0.
    - **Any other loss in regression**: one example with one output: loss([[p]], [[y]]) and its derivative along p.

    So a learned loss is drawn beside cross-entropy on equal terms with ``pointwise=False``; its curve for target 1 is
    then ½ (ℓ(1, p) + ℓ(0, 1 − p)).

    Args:
        loss: one loss (prediction, target) -> scalar, or {training step: loss} for several.
        kind: "classification" or "regression".
        targets: targets y; by default 0 and 1, in regression −1, 0 and 1. Other losses in classification: only 0 and 1.
        predictions: increasing predictions p; by default 199 in [.005, .995], in regression 241 in [−3, 3]. The loss is
            evaluated on the device of a tensor given here, else on the CPU, always in float64.
        pointwise: draw the bare function where the loss has one.

    Returns:
        DataFrame with the columns target, prediction, value, derivative, and step (first) if ``loss`` is a mapping.

    Raises:
        ValueError: an unknown kind, predictions that do not increase, a target or a prediction outside the problem, no
            loss at all, or a value that is not finite.

    Examples:
        >>> import torch.nn.functional as F
        >>> loss_curves(F.mse_loss, "regression", targets=[1.0], predictions=[0.0, 1.0, 3.0])
           target  prediction  value  derivative
        0     1.0         0.0    1.0        -2.0
        1     1.0         1.0    0.0         0.0
        2     1.0         3.0    4.0         4.0
    """
    if kind not in TARGETS:
        raise ValueError(f"kind must be 'classification' or 'regression', got {kind!r}")
    if isinstance(loss, Mapping):
        if not loss:
            raise ValueError("no loss to draw: the mapping {step: loss} is empty")
        frames = [
            loss_curves(one, kind, targets, predictions, pointwise=pointwise).assign(step=step)
            for step, one in loss.items()
        ]
        frame = pd.concat(frames, ignore_index=True)
        return frame[["step", "target", "prediction", "value", "derivative"]]

    targets = TARGETS[kind] if targets is None else targets
    grid = torch.as_tensor(PREDICTIONS[kind] if predictions is None else predictions).double()
    if grid.ndim != 1 or len(grid) < 2 or not (grid.diff() > 0).all():
        raise ValueError("predictions must be an increasing sequence of at least two numbers")
    function = _bare_function(loss, kind, pointwise)
    if function is None:
        if kind == "classification" and not set(targets) <= {0, 1}:
            raise ValueError(f"a loss of logits and classes has the targets 0 and 1, got {tuple(targets)}")
        if kind == "classification" and not (0 < grid[0] and grid[-1] < 1):
            raise ValueError(f"probabilities must lie inside (0, 1), got {grid[0]:g} to {grid[-1]:g}")
        function = _loss_of_one(still(loss), kind)
    with _float64(loss, grid.device):
        return pd.concat([_curve(function, float(target), grid) for target in targets], ignore_index=True)


def shape_measures(frame: pd.DataFrame, tol: float = 0.01) -> pd.DataFrame:
    """The shape of each curve of :func:`loss_curves` in numbers, one row per (step and) target.

    All are taken over the drawn range of predictions, from p_1 to p_n, by the trapezoidal rule or at grid points.

    - ``flatness``: fraction of the range where abs(derivative) < tol · max abs(derivative); 1 for a constant loss.
    - ``convexity``: fraction of the grid's intervals over which the derivative does not fall (by more than rounding).
    - ``left_slope``, ``right_slope``: the derivative at p_1 and at p_n; the slopes of the asymptotes if the range is
      wide enough for the loss to have reached them.
    - ``minimum``: prediction of the least value; an end of the range if the loss falls towards it.

    Args:
        frame: from :func:`loss_curves`.
        tol: relative threshold of flatness, in (0, 1).

    Examples:
        >>> import torch.nn.functional as F
        >>> shape_measures(loss_curves(F.mse_loss, "regression", targets=[1.0]))
           target  flatness  convexity  left_slope  right_slope  minimum
        0     1.0    0.0125        1.0        -8.0          4.0      1.0
    """
    if not 0 < tol < 1:
        raise ValueError(f"tol must lie in (0, 1), got {tol}")
    keys = ["step", "target"] if "step" in frame else ["target"]
    rows = []
    for key, curve in frame.groupby(keys, sort=False):
        p, value, slope = (curve[name].to_numpy() for name in ("prediction", "value", "derivative"))
        steepest = np.abs(slope).max()
        flat = (np.abs(slope) < tol * steepest) if steepest > 0 else np.ones(len(p), dtype=bool)
        rows.append(
            {
                **dict(zip(keys, key, strict=True)),
                "flatness": np.trapezoid(flat.astype(float), p) / (p[-1] - p[0]),
                "convexity": np.mean(np.diff(slope) >= -1e-12 * steepest),
                "left_slope": slope[0],
                "right_slope": slope[-1],
                "minimum": p[value.argmin()],
            }
        )
    return pd.DataFrame(rows)


def _curve(function: Pointwise, target: float, grid: Tensor) -> pd.DataFrame:
    """Value and derivative of ``function(output, target)`` on the grid."""
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        output = grid.detach().clone().requires_grad_(True)
        value = function(output, torch.full_like(output, target)) + 0 * output  # attached, even if it is constant
        (derivative,) = torch.autograd.grad(value.sum(), output)
    for name, tensor in (("value", value), ("derivative", derivative)):
        if not torch.isfinite(tensor).all():
            where = grid[~torch.isfinite(tensor)][0]
            raise ValueError(
                f"the loss's {name} is not finite at target {target:g}, prediction {where:g}; "
                "choose predictions that avoid it"
            )
    columns = {"prediction": grid, "value": value.detach(), "derivative": derivative}
    return pd.DataFrame({"target": target} | {name: column.cpu().numpy() for name, column in columns.items()})


def _bare_function(loss: Loss, kind: str, pointwise: bool) -> Pointwise | None:
    """ℓ(output, target) of a learned loss; None if it has none, or is not wanted."""
    if not (pointwise and hasattr(loss, "pointwise")):
        return None
    own = getattr(loss, "kind", kind)
    if own != kind:
        raise ValueError(f"this is a loss for {own}, drawn for {kind}; pass kind={own!r}")
    return still(getattr(loss, "pointwise"))  # noqa: B009  (losses are duck-typed)


def _loss_of_one(loss: Loss, kind: str) -> Pointwise:
    """ℓ(output, target) of a loss of whole batches: one example at a time, since a loss may average over a batch."""

    def one(p: Tensor, y: Tensor) -> Tensor:
        if kind == "classification":
            return loss(torch.stack([torch.log1p(-p), torch.log(p)])[None], y.long()[None])
        return loss(p[None, None], y[None, None])

    def function(output: Tensor, target: Tensor) -> Tensor:
        return torch.stack([one(p, y).double().reshape(()) for p, y in zip(output, target, strict=True)])

    return function


@contextmanager
def _float64(loss: Loss, device: torch.device) -> Iterator[None]:
    """A block in which the tensors of a module are float64 ones on ``device``; a plain function stays as it is."""
    with preserved(loss), ExitStack() as stack:
        if isinstance(loss, nn.Module):
            tensors = {name: tensor.detach().to(device) for name, tensor in named_tensors(loss).items()}
            wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
            stack.enter_context(replaced(loss, wide))
        yield


def plot_loss_curves(
    frame: pd.DataFrame, ax: Axes | None = None, y: str = "value", hue: str = "target", palette: str | None = None
) -> Axes:
    """Draw the curves of :func:`loss_curves`, coloured by target, or by training step with a colour bar.

    Args:
        frame: from :func:`loss_curves`.
        ax: where to draw; the current axes if None.
        y: "value" or "derivative".
        hue: "target" or "step". With "step" the targets, if several, differ by line style.
        palette: a seaborn palette, or a colour map for "step"; colour-blind safe ones by default.

    Examples:
        >>> import torch.nn.functional as F
        >>> ax = plot_loss_curves(loss_curves(F.cross_entropy), y="derivative")
    """
    if y not in ("value", "derivative"):
        raise ValueError(f"y must be 'value' or 'derivative', got {y!r}")
    if hue not in ("target", "step") or hue not in frame:
        raise ValueError(f"hue must be 'target', or 'step' if the frame has that column; got {hue!r}")
    ax = plt.gca() if ax is None else ax
    if hue == "step":
        norm = mpl.colors.Normalize(frame["step"].min(), frame["step"].max())
        cmap = sns.color_palette(palette or "flare", as_cmap=True)
        for (target, curves), line in zip(frame.groupby("target"), itertools.cycle(["-", "--", ":", "-."])):
            sns.lineplot(
                curves,
                x="prediction",
                y=y,
                hue="step",
                hue_norm=norm,
                palette=cmap,
                units="step",
                estimator=None,
                linestyle=line,
                linewidth=1.2,
                legend=False,
                ax=ax,
            )
            ax.plot([], [], color="grey", linestyle=line, label=f"{target:g}")
        if frame["target"].nunique() > 1:
            ax.legend(title="target")
        ax.figure.colorbar(mpl.cm.ScalarMappable(norm, cmap), ax=ax, label=label("step"))
    else:
        named = frame.assign(target=[f"{target:g}" for target in frame["target"]])
        style = "step" if "step" in frame and frame["step"].nunique() > 1 else None
        colour = palette or colours(named["target"])
        sns.lineplot(named, x="prediction", y=y, hue="target", palette=colour, style=style, estimator=None, ax=ax)
    ax.set(xlabel="Prediction", ylabel="Loss" if y == "value" else "Derivative of the loss")
    return ax
