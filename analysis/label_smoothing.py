r"""Label smoothing that a loss implies: the ε whose smoothed cross-entropy pushes the logits as the loss does.

Cross-entropy with labels smoothed by ε (Szegedy et al. 2016) has, in an example's logits f with p = softmax(f), one-hot
target y and C classes, the gradient p − (1 − ε) y − ε/C. With a free scale s it is linear in s and in s·ε::

    g = s (p − y) + s·ε (y − 1/C),    (1)

so the s and ε that fit the gradients ∂M/∂f of any loss M best, in least squares over examples and outputs, have a
closed form. R² says how much of ∂M/∂f they explain: where it is low, M is no label smoothing, whatever ε is.

Least squares listens to the examples with large gradients, few and wrongly classified late in training. What label
smoothing does to the many others is told by signs alone: (1) raises the probability p_y of the target up to
1 − ε (1 − 1/C), and pulls it back above. :func:`resting_point` finds where M does, and the ε to which that belongs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import LogitLocator, NullLocator, StrMethodFormatter
from torch import Tensor, nn

from analysis.inputs import (
    Batch,
    Data,
    Loss,
    call,
    finite_scalar,
    on_device,
    one_tensor,
    preserved,
    require_columns,
    still,
)
from analysis.plotting import PALETTE, SEQUENTIAL, label

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
class RestingPoint:
    """Where a loss stops raising the probability of the target, see :func:`resting_point`."""

    probability: float
    """p*, in [0, 1]; 1 if it pulls back no example, 0 if it pulls back all."""
    epsilon: float
    """(1 − p*) C/(C − 1), the ε that rests there; 0 for cross-entropy."""
    agreement: float
    """Fraction of examples raised below p* or pulled back above it; 1 if the resting point is the same for all."""


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
    # the least-squares fit of g by s·a + sε·d, with d made orthogonal to a first: d⊥ = d − a ⟨a, d⟩/‖a‖²
    along = (a * d).sum() / a.square().sum()
    across = d - along * a
    identifiability = (across.norm() / d.norm()).item()  # the sine of the angle between a and d
    determined = identifiability > NEARLY_UNIFORM  # else a and d are parallel: ε = 0 explains all that any ε can
    scale_epsilon = (g * across).sum() / across.square().sum() if determined else g.new_zeros(())  # s·ε
    scale = ((g - scale_epsilon * d) * a).sum() / a.square().sum()  # s, of what s·ε leaves
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
    with preserved(loss), torch.enable_grad():
        leaf = prediction.detach().clone().requires_grad_()
        value = finite_scalar(still(loss)(leaf, target))
        (gradient,) = torch.autograd.grad(value, leaf)
    return gradient * len(prediction)


def implied_label_smoothing(model: nn.Module, loss: Loss, data: Data) -> LabelSmoothing:
    """The label smoothing that fits a loss at the predictions of a model, :func:`fit_label_smoothing`.

    Args:
        model: f_θ, a classifier, run in the modes it is in.
        loss: M, (prediction, target) -> scalar, a mean over the batch.
        data: one (inputs, targets) pair or a loader, with targets int64 (B,).

    Raises:
        ValueError: bad data, logits or classes that do not fit, or a loss that is not a finite scalar.

    Examples:
        >>> model, data = nn.Linear(2, 3), (torch.randn(8, 2), torch.randint(3, (8,)))
        >>> round(implied_label_smoothing(model, nn.CrossEntropyLoss(label_smoothing=0.2), data).epsilon, 4)
        0.2
    """
    return fit_label_smoothing(*_with_gradients(model, loss, data))


def target_gradients(model: nn.Module, loss: Loss, data: Data) -> pd.DataFrame:
    """How the loss pushes the logit of each example's target; arguments as in :func:`implied_label_smoothing`.

    Returns:
        One row per example: probability p_y of the target, and gradient ∂M/∂f_y; a negative one raises p_y.
        Cross-entropy gives p_y − 1, with labels smoothed by ε p_y − 1 + ε (1 − 1/C).
    """
    f, y, g = _with_gradients(model, loss, data)
    columns = {"probability": f.double().softmax(1), "gradient": g.double()}
    return pd.DataFrame({name: value.gather(1, y[:, None])[:, 0].cpu().numpy() for name, value in columns.items()})


def resting_point(frame: pd.DataFrame, classes: int) -> RestingPoint:
    """The p* that best separates the examples whose p_y the loss raises from those whose p_y it pulls back.

    Only signs matter, and every example counts the same; p* is as fine as the examples lie near it.

    Args:
        frame: from :func:`target_gradients`. Examples of gradient zero are not counted.
        classes: C.

    Raises:
        ValueError: fewer than 2 classes, a missing column, or no example with a gradient.

    Examples:
        >>> frame = pd.DataFrame({"probability": [0.2, 0.6, 0.8, 1.0], "gradient": [-0.7, -0.3, -0.1, 0.1]})
        >>> resting_point(frame, classes=10)  # doctest: +ELLIPSIS
        RestingPoint(probability=0.9, epsilon=0.11..., agreement=1.0)
    """
    if classes < 2:
        raise ValueError(f"classes must be at least 2, got {classes}")
    require_columns(frame, "probability", "gradient")
    frame = frame[frame["gradient"] != 0].sort_values("probability")
    if not len(frame):
        raise ValueError("no example has a gradient")
    raised = (frame["gradient"] < 0).to_numpy()
    # right[k] examples agree if the k of least probability are to be raised and the others to be pulled back
    right = np.concatenate([[0], np.cumsum(raised)]) + np.concatenate([np.cumsum(~raised[::-1])[::-1], [0]])
    best = int(right.argmax())
    edges = np.concatenate([[0.0], frame["probability"], [1.0]])
    inner = 0 < best < len(frame)
    p = float((edges[best] + edges[best + 1]) / 2 if inner else best > 0)
    return RestingPoint(p, (1 - p) * classes / (classes - 1), right[best].item() / len(frame))


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
    known = dict(model.named_modules(remove_duplicate=False))
    if name not in known:
        raise ValueError(f"the model has no module {name!r}; its modules are {', '.join(known)}")
    inputs: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs.extend(part.detach().flatten(1).double() for part in arguments[:1])

    with preserved(model, training=False), torch.no_grad():
        known[name].register_forward_pre_hook(keep)
        targets = torch.cat([y for _, y in _predictions(model, data)])
    features = torch.cat(inputs) if inputs else torch.empty(0)
    if len(features) != len(targets):
        raise ValueError(
            f"{name!r} is given {len(features)} features for {len(targets)} examples; name a layer that is called once "
            "in a forward pass, with a tensor as its first argument"
        )
    within = sum(_scatter(features[targets == c]) for c in targets.unique())
    return PenultimateStatistics(features.norm(dim=1).mean().item(), float(within / _scatter(features)))


def _scatter(features: Tensor) -> Tensor:
    return (features - features.mean(0)).square().sum()


def _logit_statistics(f: Tensor, y: Tensor) -> Tensor:
    """Confidence, margin and norm of each example, (B, 3)."""
    others = f.scatter(1, y[:, None], -torch.inf).amax(1)
    margin = f.gather(1, y[:, None])[:, 0] - others
    return torch.stack([f.softmax(1).amax(1), margin, (f - f.mean(1, keepdim=True)).norm(dim=1)], dim=1)


def _with_gradients(model: nn.Module, loss: Loss, data: Data) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets and ∂M/∂f of all examples."""
    with preserved(model, loss), torch.no_grad():
        parts = [(f, y, logit_gradient(loss, f, y)) for f, y in _predictions(model, data)]
    predictions, targets, gradients = zip(*parts, strict=True)
    return torch.cat(predictions), torch.cat(targets), torch.cat(gradients)


def _predictions(model: nn.Module, data: Data) -> Iterator[Batch]:
    """Logits and targets, batch by batch."""
    for inputs, targets in on_device(data, model):
        prediction = one_tensor(call(model, {}, inputs))
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


def plot_label_smoothing(frame: pd.DataFrame, ax: Axes | None = None, identifiability: float = 0.2) -> Axes:
    """Draw ε over training, each point coloured by R²: dark points are no label smoothing, whatever their height.

    For a mean over seeds see :func:`analysis.plotting.plot_learning_curves` with ``y="epsilon"``.

    Args:
        frame: one run, with the columns step, epsilon, r2 and identifiability, as
            :class:`analysis.recorder.Recorder` makes of :func:`implied_label_smoothing`.
        ax: where to draw; the current axes if None.
        identifiability: leave out the points where it is less, early in training for most, and those without an ε.

    Raises:
        ValueError: a missing column, or no point to draw.

    Examples:
        >>> frame = pd.DataFrame({"step": [0, 50, 100], "epsilon": [0.3, 0.2, 0.1], "r2": [0.2, 0.8, 0.9]})
        >>> ax = plot_label_smoothing(frame.assign(identifiability=1.0))
    """
    require_columns(frame, "step", "epsilon", "r2", "identifiability")
    frame = frame[np.isfinite(frame["epsilon"].astype(float)) & (frame["identifiability"] >= identifiability)]
    if not len(frame):
        raise ValueError(f"no step has an ε of identifiability {identifiability} or more; record later in training")
    ax = plt.gca() if ax is None else ax
    ax.axhline(0, color="0.5", linewidth=0.6, zorder=0)
    ax.plot(frame["step"], frame["epsilon"], color="0.6", zorder=1)
    points = ax.scatter(
        frame["step"], frame["epsilon"], c=frame["r2"], vmin=0, vmax=1, cmap=SEQUENTIAL, s=18, zorder=2, clip_on=False
    )
    ax.figure.colorbar(points, ax=ax, label="R² of the fit")
    ax.set(xlabel=label("step"), ylabel="Label smoothing ε")
    return ax


def plot_target_gradients(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the gradient at the target's logit against its probability; the dotted line is the resting point p*.

    Both axes are stretched where it matters: the horizontal one is the logit of p_y, the vertical one is linear around
    zero and logarithmic beyond a hundredth of the largest gradient.

    Args:
        frame: from :func:`target_gradients`.
        ax: where to draw; the current axes if None.

    Raises:
        ValueError: a missing column, or no example with a gradient.

    Examples:
        >>> probability = np.linspace(0.05, 0.995, 40)
        >>> frame = pd.DataFrame({"probability": probability, "gradient": probability - 0.9})
        >>> ax = plot_target_gradients(frame, plt.figure().gca())
    """
    p = resting_point(frame, classes=2).probability
    ax = plt.gca() if ax is None else ax
    largest = frame["gradient"].abs().max()
    ax.set_xscale("logit")
    ax.set_yscale("symlog", linthresh=largest / 100)
    ax.axhline(0, color="0.5", linewidth=0.6, zorder=0)
    within = frame["probability"].clip(1e-5, 1 - 1e-5)
    ax.scatter(within, frame["gradient"], s=6, alpha=0.5, color=PALETTE[0], linewidth=0)
    if 0 < p < 1:
        ax.axvline(p, color="0.4", linestyle=":")
    ax.xaxis.set_major_locator(LogitLocator(nbins=5))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    powers = 10.0 ** (np.floor(np.log10(largest)) - np.arange(2))
    ax.set_yticks([*-powers, 0, *powers[::-1]])
    ax.set(xlabel="Probability of the target", ylabel="∂M/∂f of the target")
    return ax
