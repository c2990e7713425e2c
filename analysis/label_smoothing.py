r"""Label smoothing that a loss implies: the ε whose smoothed cross-entropy pushes the logits as the loss does.

Cross-entropy with labels smoothed by ε (Szegedy et al. 2016) has, in an example's logits f with p = softmax(f), one-hot
target y and C classes, the gradient p − (1 − ε) y − ε/C. With a free scale s it is linear in s and in s·ε:

    g = s (p − y) + s·ε (y − 1/C),                                                                          (1)

so the s and ε that fit the gradients ∂M/∂f of any loss M best, in least squares over examples and outputs, have a
closed form. R² says how much of ∂M/∂f they explain: where it is low, M is no label smoothing, whatever ε is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from analysis.gradients import Data, on_device
from analysis.inputs import Batch, Loss, preserved
from analysis.plotting import SEQUENTIAL, label

NEARLY_UNIFORM = 1e-6


@dataclass(frozen=True)
class LabelSmoothing:
    """Equation (1) fitted to gradients, see :func:`fit_label_smoothing`."""

    epsilon: float
    """ε, not confined to [0, 1]: below 0 the loss pushes predictions further out than cross-entropy does. NaN where it
    is not determined: the predictions are uniform or exactly the labels, or the gradients are zero."""
    scale: float
    """s; where it is not positive, M pushes away from the labels and ε means nothing."""
    r2: float
    """1 − ‖∂M/∂f − g‖² / ‖∂M/∂f‖², in [0, 1]; NaN if the gradients are zero or the predictions exactly the labels."""
    identifiability: float
    """Sine of the angle between p − y and y − 1/C, in [0, 1]. As predictions become uniform the two become parallel,
    every ε fits equally well, and errors in the gradients grow in ε by one over this number."""
    examples: int
    """The number of examples."""


@dataclass(frozen=True)
class LogitStatistics:
    """Means over examples of what label smoothing bounds, see :func:`logit_statistics`."""

    confidence: float
    """max_c p_c, in [1/C, 1]."""
    margin: float
    """The logit of the target minus the largest of the others; negative where the prediction is wrong."""
    norm: float
    """‖f − mean_c f_c‖: logits without the constant that softmax ignores."""


@dataclass(frozen=True)
class PenultimateStatistics:
    """How the features before the last layer cluster by class, see :func:`penultimate_statistics`."""

    norm: float
    """Mean of ‖h‖ over examples."""
    within_class: float
    """Σ ‖h − mean of its class‖² / Σ ‖h − mean‖², in [0, 1]; 0 if each class is a point. NaN if all features agree."""


def fit_label_smoothing(prediction: Tensor, target: Tensor, gradient: Tensor) -> LabelSmoothing:
    """Fit equation (1) to gradients by least squares, in float64.

    With a = p − y and d = y − 1/C over all examples and outputs, and d⊥ = d − a ⟨a, d⟩/‖a‖²,
    s·ε = ⟨∂M/∂f, d⊥⟩ / ‖d⊥‖² and s = ⟨∂M/∂f − s·ε d, a⟩ / ‖a‖².

    Args:
        prediction: logits f, (B, C), C at least 2.
        target: classes, int64 (B,).
        gradient: ∂M/∂f of each example, (B, C), as :func:`logit_gradient` gives it.

    Raises:
        ValueError: shapes or classes that do not fit, or values that are not finite.

    Examples:
        >>> f, y = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 0.5]]), torch.tensor([0, 0, 1])
        >>> g = logit_gradient(lambda f, y: 3 * nn.functional.cross_entropy(f, y, label_smoothing=0.1), f, y)
        >>> fit = fit_label_smoothing(f, y, g)
        >>> round(fit.epsilon, 4), round(fit.scale, 4), round(fit.r2, 4)
        (0.1, 3.0, 1.0)
    """
    _check(prediction, target)
    if gradient.shape != prediction.shape:
        raise ValueError(f"gradients {tuple(gradient.shape)} do not have the shape {tuple(prediction.shape)} of logits")
    g = gradient.detach().double()
    if not torch.isfinite(g).all():
        raise ValueError("a gradient in logit space is NaN or infinite; check the loss")
    classes = prediction.shape[1]
    y = nn.functional.one_hot(target, classes).double()
    a, d = prediction.detach().double().softmax(1) - y, y - 1 / classes
    along = (a * d).sum() / a.square().sum()
    across = d - along * a
    identifiability = (across.norm() / d.norm()).item()
    determined = identifiability > NEARLY_UNIFORM  # else a and d are parallel: ε = 0 explains all that any ε can
    scale_epsilon = (g * across).sum() / across.square().sum() if determined else g.new_zeros(())
    scale = ((g - scale_epsilon * d) * a).sum() / a.square().sum()
    r2 = 1 - (g - scale * a - scale_epsilon * d).square().sum() / g.square().sum()
    epsilon = (scale_epsilon / scale).item() if determined else float("nan")
    return LabelSmoothing(epsilon, scale.item(), r2.item(), identifiability, len(g))


def logit_gradient(loss: Loss, prediction: Tensor, target: Tensor) -> Tensor:
    """∂M/∂f of each example, (B, C): the gradient of a loss that is a mean over the batch, times B.

    Args:
        loss: M, (prediction, target) -> scalar.
        prediction: logits f, (B, C).
        target: classes, int64 (B,).

    Raises:
        ValueError: shapes or classes that do not fit, or a loss that is not a finite scalar.
    """
    _check(prediction, target)
    with torch.enable_grad():
        leaf = prediction.detach().clone().requires_grad_()
        value = loss(leaf, target)
        if value.ndim or not torch.isfinite(value):
            raise ValueError(f"the loss must be a finite scalar, got {value.detach().cpu()}")
        (gradient,) = torch.autograd.grad(value, leaf)
    return gradient * len(prediction)


def label_smoothing(model: nn.Module, loss: Loss, data: Data) -> LabelSmoothing:
    """The label smoothing that fits a loss at the predictions of a model, :func:`fit_label_smoothing`.

    Args:
        model: f_θ, a classifier, run in the modes it is in.
        loss: M, (prediction, target) -> scalar, a mean over the batch.
        data: one (inputs, targets) pair or a loader, with targets int64 (B,).

    Raises:
        ValueError: bad data, logits or classes that do not fit, or a loss that is not a finite scalar.

    Examples:
        >>> model, data = nn.Linear(2, 3), (torch.randn(8, 2), torch.randint(3, (8,)))
        >>> round(label_smoothing(model, nn.CrossEntropyLoss(label_smoothing=0.2), data).epsilon, 4)
        0.2
    """
    with preserved(model), torch.no_grad():
        parts = [(f, y, logit_gradient(loss, f, y)) for f, y in _predictions(model, data)]
    return fit_label_smoothing(*(torch.cat(column) for column in zip(*parts, strict=True)))


def logit_statistics(model: nn.Module, data: Data) -> LogitStatistics:
    """Confidence, margin and norm of the logits, which label smoothing keeps finite; the model runs in eval mode.

    Under cross-entropy with labels smoothed by ε > 0 an example's loss is least at the margin
    log((1 − ε + ε/C) / (ε/C)); without smoothing at none, and margin and norm grow for as long as training lasts.

    Args:
        model: f_θ, a classifier.
        data: one (inputs, targets) pair or a loader, with targets int64 (B,).

    Raises:
        ValueError: bad data, or logits or classes that do not fit.
    """
    with preserved(model, training=False), torch.no_grad():
        parts = [_logit_statistics(f.double(), y) for f, y in _predictions(model, data)]
    return LogitStatistics(*torch.cat(parts).mean(0).tolist())


def penultimate_statistics(model: nn.Module, data: Data, layer: str | None = None) -> PenultimateStatistics:
    """Norm and clustering of the features that enter the last layer; the model runs in eval mode.

    Label smoothing draws the features of each class into a tight cluster (Müller, Kornblith and Hinton 2019).

    Args:
        model: f_θ, a classifier.
        data: one (inputs, targets) pair or a loader, with targets int64 (B,).
        layer: name of the module whose input is meant, flattened to (B, D); by default the last ``nn.Linear``.

    Raises:
        ValueError: bad data, no such layer, or logits or classes that do not fit.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if layer is None and not linear:
        raise ValueError("the model has no nn.Linear; name the layer whose input is meant")
    name = layer if layer is not None else linear[-1]
    if name not in dict(model.named_modules()):
        raise ValueError(f"the model has no module {name!r}; its modules are {', '.join(dict(model.named_modules()))}")
    inputs: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs.append(arguments[0].detach().flatten(1).double())

    hook: RemovableHandle = model.get_submodule(name).register_forward_pre_hook(keep)
    try:
        with preserved(model, training=False), torch.no_grad():
            targets = torch.cat([y for _, y in _predictions(model, data)])
    finally:
        hook.remove()
    features = torch.cat(inputs)
    within = sum(_scatter(features[targets == c]) for c in targets.unique())
    return PenultimateStatistics(features.norm(dim=1).mean().item(), float(within / _scatter(features)))


def _scatter(features: Tensor) -> Tensor:
    return (features - features.mean(0)).square().sum()


def _logit_statistics(f: Tensor, y: Tensor) -> Tensor:
    """Confidence, margin and norm of each example, (B, 3)."""
    others = f.scatter(1, y[:, None], -torch.inf).amax(1)
    margin = f.gather(1, y[:, None])[:, 0] - others
    return torch.stack([f.softmax(1).amax(1), margin, (f - f.mean(1, keepdim=True)).norm(dim=1)], dim=1)


def _predictions(model: nn.Module, data: Data) -> Iterator[Batch]:
    """Logits and targets, batch by batch."""
    for inputs, targets in on_device(data, model):
        prediction = model(inputs)
        _check(prediction, targets)
        yield prediction, targets


def _check(prediction: Tensor, target: Tensor) -> None:
    if prediction.ndim != 2 or prediction.shape[1] < 2 or not prediction.is_floating_point():
        raise ValueError(f"logits must be (B, C) with C > 1, got {tuple(prediction.shape)} of {prediction.dtype}")
    if target.shape != prediction.shape[:1] or target.dtype != torch.int64:
        raise ValueError(
            f"targets must be int64 classes ({len(prediction)},), got {tuple(target.shape)} of {target.dtype}"
        )
    if not torch.isfinite(prediction).all():
        raise ValueError("the logits hold NaN or infinity; has the model diverged?")
    if not 0 <= target.min() <= target.max() < prediction.shape[1]:
        raise ValueError(f"classes {target.min()} to {target.max()} do not fit {prediction.shape[1]} logits")


def plot_label_smoothing(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw ε over training, each point coloured by R²: dark points are no label smoothing, whatever their height.

    For a mean over seeds see :func:`analysis.plotting.plot_learning_curves` with ``y="epsilon"``.

    Args:
        frame: one run, with the columns step, epsilon and r2, as :class:`analysis.recorder.Recorder` makes of
            :func:`label_smoothing`. Points whose ε is not determined are left out.
        ax: where to draw; the current axes if None.

    Raises:
        ValueError: a missing column, or no row with an ε.

    Examples:
        >>> frame = pd.DataFrame({"step": [0, 50, 100], "epsilon": [0.3, 0.2, 0.1], "r2": [0.2, 0.8, 0.9]})
        >>> ax = plot_label_smoothing(frame)
    """
    if missing := [column for column in ("step", "epsilon", "r2") if column not in frame]:
        raise ValueError(f"the frame lacks the column {', '.join(missing)}; it has {', '.join(map(str, frame))}")
    frame = frame[np.isfinite(frame["epsilon"].astype(float))]
    if not len(frame):
        raise ValueError("no step has an ε that is determined")
    ax = plt.gca() if ax is None else ax
    ax.axhline(0, color="0.5", linewidth=0.6, zorder=0)
    ax.plot(frame["step"], frame["epsilon"], color="0.6", zorder=1)
    points = ax.scatter(
        frame["step"], frame["epsilon"], c=frame["r2"], vmin=0, vmax=1, cmap=SEQUENTIAL, s=18, zorder=2, clip_on=False
    )
    ax.figure.colorbar(points, ax=ax, label="R² of the fit")
    ax.set(xlabel=label("step"), ylabel="Label smoothing ε")
    return ax
