r"""Attribution: which inputs, or which places in a layer, an output rests on; through captum.

Attributions explain f(x), one output of the model per example: the raw output, thus a logit in classification (wrap
the model with a softmax to explain probabilities). Methods return an :class:`Attribution`; models are compared by how
far they rest on the same inputs::

    explained = integrated_gradients(model, images)
    agreement = compare_attributions(model, other, images, method=partial(occlusion, window=3))
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from captum.attr import IntegratedGradients, LayerAttribution, Occlusion
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from scipy import stats
from torch import Tensor, nn

from analysis.cut import Cut, Output, find_layer
from analysis.inputs import call, device_of, evaluation, one_tensor, plain_kernels, replaced
from analysis.plotting import DIVERGING, PALETTE


@dataclass(frozen=True)
class Attribution:
    """What each part of an input, or of a layer's output, adds to the explained output.

    Attributes:
        values: (N, ...), as the inputs or the layer's output are shaped; on the model's device.
        target: (N,) int64, the index of the explained output of each example.
        delta: (N,) convergence delta, Σ values − (f(x) − f(baseline)): 0 for an exact integral. Where it is not small
            against f(x) − f(baseline), take more steps. None for methods that promise no such sum.
    """

    values: Tensor
    target: Tensor
    delta: Tensor | None = None


def integrated_gradients(
    model: nn.Module,
    inputs: Tensor,
    target: int | Tensor | None = None,
    baseline: float | Tensor = 0.0,
    steps: int = 64,
    chunk_size: int = 16,
    *,
    layer: str | None = None,
) -> Attribution:
    r"""Integrated gradients (Sundararajan et al. 2017), (x − b) ∫₀¹ ∇f(b + t (x − b)) dt, by Gauss-Legendre quadrature.

    Complete: the values of an example sum to f(x) − f(b), up to its ``delta``. captum keeps the weights of the
    quadrature in float32, so that even in float64 the relative error is about 1e-7.

    Over the output of a layer, they go from its value at the baseline to its value at the input. They are complete if
    all that the output knows of the input passes through the layer; a connection around it shows as a large ``delta``.

    Args:
        model: maps (N, ...) to (N, C), or to (N,) or (N, 1); explained in eval mode, and left as it was found.
        inputs: (N, ...), floating; for a layer also integers, such as the ids of tokens (N, L) for an embedding.
        target: output to explain: an index for all, or (N,) indices. None takes the largest output of each example,
            the predicted class.
        baseline: b, the input that stands for "nothing there": a number, or a tensor that broadcasts to the inputs; of
            ids an id, or a tensor of ids, such as that of padding.
        steps: points of the quadrature.
        chunk_size: examples explained at once; takes the memory of a batch of chunk_size · steps.
        layer: name of a module, as in ``model.named_modules()``, that returns one tensor; the values then have the
            shape of its output. None explains by the inputs themselves.

    Raises:
        ValueError: inputs, a baseline or outputs that are not finite or not of these shapes, an unknown target or an
            unknown layer.

    Examples:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(model.weight, 3.0)
        >>> integrated_gradients(model, torch.tensor([[1.0, 2.0]]), steps=2).values
        tensor([[3., 6.]])
    """
    _positive(steps=steps)

    def by_inputs(f: Output, _: Cut | None, x: Tensor, y: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return IntegratedGradients(f).attribute(x, b, target=y, n_steps=steps, return_convergence_delta=True)

    def by_layer(f: Output, cut: Cut | None, x: Tensor, y: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        assert cut is not None  # noqa: S101  (a layer is named)
        method, hidden, start = IntegratedGradients(cut.above), cut.below(x), cut.below(b)
        values = method.attribute(hidden, start, target=y, n_steps=steps, additional_forward_args=(x,))
        with torch.no_grad():
            difference = (f(x) - f(b)).gather(1, y[:, None])[:, 0]
        return values, values.flatten(1).sum(1) - difference

    attribute = by_inputs if layer is None else by_layer
    return _explain(attribute, model, inputs, target, baseline, chunk_size, layer)


def grad_cam(
    model: nn.Module,
    inputs: Tensor,
    layer: str,
    target: int | Tensor | None = None,
    relu: bool = True,
    chunk_size: int = 256,
) -> Attribution:
    """Grad-CAM (Selvaraju et al. 2017): max(0, Σ_k w_k A_k), with A the layer's maps and w_k the mean of ∂f/∂A_k.

    Args:
        model: see :func:`integrated_gradients`.
        inputs: ``(N, C, *space)``, such as images (N, C, H, W).
        layer: name of a convolution, as a rule the last one, or of another module whose output is ``(N, K, *space)``.
        target: see :func:`integrated_gradients`.
        relu: cut negative values off, as published.
        chunk_size: examples explained at once.

    Returns:
        Attribution with values ``(N, 1, *space)``, upsampled to the inputs' size linearly; there is no ``delta``.

    Raises:
        ValueError: see :func:`integrated_gradients`; or a layer whose output has no spatial dimensions.
    """

    def attribute(f: Output, cut: Cut | None, x: Tensor, y: Tensor, b: Tensor) -> tuple[Tensor, None]:
        assert cut is not None  # noqa: S101  (a layer is named)
        maps = cut.below(x).requires_grad_()
        (gradient,) = torch.autograd.grad(cut.above(maps, x).gather(1, y[:, None]).sum(), maps, materialize_grads=True)
        space = tuple(range(2, maps.ndim))
        weights = gradient.mean(space, keepdim=True) if space else gradient
        values = (weights * maps.detach()).sum(1, keepdim=True)
        return values.clamp(min=0) if relu else values, None

    explained = _explain(attribute, model, inputs, target, 0.0, chunk_size, layer)
    space = tuple(inputs.shape[2:])
    if not space or explained.values.ndim != inputs.ndim:
        raise ValueError(
            "Grad-CAM needs inputs (N, C, *space) and a layer of as many dimensions, such as a convolution; "
            f"the inputs are {tuple(inputs.shape)} and the maps of {layer!r} {tuple(explained.values.shape)}"
        )
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(space)]
    values = LayerAttribution.interpolate(explained.values, space, interpolate_mode=mode)
    return Attribution(values, explained.target)


def occlusion(
    model: nn.Module,
    inputs: Tensor,
    target: int | Tensor | None = None,
    baseline: float | Tensor = 0.0,
    *,
    window: int = 1,
    stride: int = 1,
    chunk_size: int = 64,
) -> Attribution:
    """Occlusion (Zeiler and Fergus 2014): f(x) − f(x with a window set to the baseline), mean over a feature's windows.

    No gradient is used. captum averages in float32.

    Args:
        model: see :func:`integrated_gradients`.
        inputs: (N, D) tabular, or ``(N, C, *space)`` such as images (N, C, H, W), floating.
        target: see :func:`integrated_gradients`.
        baseline: see :func:`integrated_gradients`.
        window: its length along every dimension but the channels, all of which it covers.
        stride: how far it moves each time; 1 to ``window``. The last windows may reach beyond the edge.
        chunk_size: examples explained at once; takes the memory of a batch of 8 · chunk_size.

    Returns:
        Attribution with values shaped as the inputs; there is no ``delta``.

    Raises:
        ValueError: see :func:`integrated_gradients`; or a window larger than the inputs, or a stride than the window.
    """
    _positive(window=window, stride=stride)
    space = inputs.shape[2:] if inputs.ndim > 2 else inputs.shape[1:]
    if space and window > min(space):
        raise ValueError(f"window {window} is larger than the inputs, of size {tuple(space)}")
    if stride > window:
        raise ValueError(f"stride {stride} is larger than window {window}: it would leave out features between windows")
    channels = tuple(inputs.shape[1:2]) if inputs.ndim > 2 else ()
    windows, strides = (channels + (length,) * len(space) for length in (window, stride))

    def attribute(f: Output, _: Cut | None, x: Tensor, y: Tensor, b: Tensor) -> tuple[Tensor, None]:
        return Occlusion(f).attribute(x, windows, strides, b, y, perturbations_per_eval=8), None

    return _explain(attribute, model, inputs, target, baseline, chunk_size)


def attribution_agreement(a: Tensor, b: Tensor, top_k: int | None = None) -> pd.DataFrame:
    """How far two attributions of the same examples agree.

    Args:
        a: (N, ...) values, D features per example.
        b: the same shape.
        top_k: how many features count as the most important; None takes a tenth of D, at least one.

    Returns:
        One row per example:

        - ``spearman``: rank correlation of the D values, in [−1, 1]; NaN if either is constant. Features that are 0 in
          both, such as pixels that equal the baseline, are ties that raise it.
        - ``overlap``: share of the ``top_k`` features of largest magnitude that both have in common, in [0, 1]; for
          unrelated attributions it is ``top_k``/D on average. A feature whose value is 0 is not among them: where fewer
          are left the share is of the larger number, and NaN where none is.

    Raises:
        ValueError: different shapes, no examples, NaN or infinity, or a ``top_k`` outside [1, D].

    Examples:
        >>> a, b = torch.tensor([[3.0, -2.0, 1.0, 0.0]]), torch.tensor([[3.0, 2.0, -1.0, 0.0]])
        >>> attribution_agreement(a, b, top_k=2)
           spearman  overlap
        0       0.2      1.0
    """
    if a.shape != b.shape or a.ndim < 2 or a.numel() == 0:
        raise ValueError(f"attributions must have one shape (N, ...), got {tuple(a.shape)} and {tuple(b.shape)}")
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError("attributions hold NaN or infinity")
    x, y = (values.detach().flatten(1).cpu().double().numpy() for values in (a, b))
    features = x.shape[1]
    top_k = max(1, features // 10) if top_k is None else top_k
    if not 1 <= top_k <= features:
        raise ValueError(f"top_k must be from 1 to the number of features, {features}; got {top_k}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)  # NaN, as documented
        spearman = [stats.spearmanr(p, q).statistic for p, q in zip(x, y, strict=True)]
    overlap = []
    for pair in zip(np.abs(x), np.abs(y), strict=True):
        p, q = (set(np.argsort(-values, kind="stable")[: min(top_k, np.count_nonzero(values))]) for values in pair)
        overlap.append(len(p & q) / max(len(p), len(q)) if p or q else np.nan)
    return pd.DataFrame({"spearman": spearman, "overlap": overlap})


def compare_attributions(
    model: nn.Module,
    other: nn.Module,
    inputs: Tensor,
    method: Callable[..., Attribution] = integrated_gradients,
    target: int | Tensor | None = None,
    top_k: int | None = None,
) -> pd.DataFrame:
    """Whether two models rest the same output on the same inputs: :func:`attribution_agreement` of their attributions.

    Args:
        model: see :func:`integrated_gradients`.
        other: the model to compare it with, of as many outputs.
        inputs: (N, ...), floating.
        method: :func:`integrated_gradients`, :func:`occlusion`, or any ``method(model, inputs=..., target=...)``, with
            options of its own by ``functools.partial``: ``partial(integrated_gradients, layer="2")``.
        target: the output to explain in both models; None takes the one that ``model`` predicts.
        top_k: see :func:`attribution_agreement`.

    Returns:
        One row per example: target, spearman, overlap.

    Raises:
        ValueError: as ``method`` and :func:`attribution_agreement` do.
    """
    first = method(model, inputs=inputs, target=target)
    second = method(other, inputs=inputs, target=first.target)
    agreement = attribution_agreement(first.values, second.values.to(first.values.device), top_k)
    return agreement.assign(target=first.target.cpu().numpy())[["target", "spearman", "overlap"]]


def plot_image_attribution(
    image: Tensor, values: Tensor, ax: Axes | None = None, limit: float | None = None, colorbar: bool = True
) -> Axes:
    """One image with its attribution laid over it: red raises the explained output, blue lowers it.

    Opacity grows with magnitude, so that the image, in light grey, shows where little is attributed.

    Args:
        image: (H, W) or (C, H, W).
        values: (H, W) or (C, H, W), summed over channels.
        ax: the axes; None takes the current ones.
        limit: magnitude of the deepest colour, to give several panels one scale; None takes the largest in ``values``.
        colorbar: draw the scale.

    Raises:
        ValueError: other shapes, NaN, or a limit that is not positive.

    Examples:
        >>> ax = plot_image_attribution(torch.rand(1, 8, 8), torch.randn(1, 8, 8))
    """
    if image.ndim not in (2, 3) or values.ndim not in (2, 3) or image.shape[-2:] != values.shape[-2:]:
        raise ValueError(
            "image and values must be (H, W) or (C, H, W) with the same H and W, "
            f"got {tuple(image.shape)} and {tuple(values.shape)}"
        )
    if not (torch.isfinite(image).all() and torch.isfinite(values).all()):
        raise ValueError("image or values hold NaN or infinity")
    grey, total = (part.detach().cpu().double().reshape(-1, *part.shape[-2:]) for part in (image, values))
    heat = total.sum(0).numpy()
    limit = np.abs(heat).max() or 1.0 if limit is None else limit
    if limit <= 0:
        raise ValueError(f"limit must be positive, got {limit}")
    picture = grey.mean(0).numpy()
    low, high = picture.min(), picture.max()
    ax = plt.gca() if ax is None else ax
    ax.imshow(picture, cmap="gray", vmin=2 * low - high, vmax=high if high > low else low + 1)  # black becomes grey
    over = ax.imshow(heat, cmap=_overlay(), vmin=-limit, vmax=limit)
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    sns.despine(ax=ax, left=True, bottom=True)
    if colorbar:
        ax.figure.colorbar(over, ax=ax, label="Attribution", shrink=0.8)
    return ax


def plot_feature_attributions(
    values: Tensor, ax: Axes | None = None, *, names: Sequence[str] | None = None, top: int | None = 10
) -> Axes:
    """A bar per feature: the attribution of one example, or the mean magnitude over several; the largest first.

    Args:
        values: (N, D), or (D,) for one example.
        ax: the axes; None takes the current ones.
        names: D names of the features; None numbers them.
        top: how many features to draw; None draws all.

    Raises:
        TypeError: names where the axes should be.
        ValueError: other shapes, NaN, or a wrong number of names.

    Examples:
        >>> ax = plot_feature_attributions(torch.randn(20, 3), names=["age", "income", "rooms"])
    """
    if not (ax is None or isinstance(ax, Axes)):
        raise TypeError(f"ax must be axes, got {type(ax).__name__}; give the names of the features by names=")
    if values.ndim not in (1, 2) or values.numel() == 0 or not torch.isfinite(values).all():
        raise ValueError(f"values must be finite, of shape (N, D) or (D,); got shape {tuple(values.shape)}")
    names = [str(d) for d in range(values.shape[-1])] if names is None else list(names)
    if len(names) != values.shape[-1]:
        raise ValueError(f"got {len(names)} names for {values.shape[-1]} features")
    several = values.ndim == 2 and len(values) > 1
    bars = values.detach().abs().mean(0) if several else values.detach().flatten()
    order = bars.abs().argsort(descending=True, stable=True)[:top].cpu()
    ax = sns.barplot(x=bars.cpu()[order].numpy(), y=[names[d] for d in order], color=PALETTE[0], saturation=1, ax=ax)
    ax.axvline(0, color="0.5", linewidth=0.8)
    ax.set(xlabel="Mean |attribution|" if several else "Attribution", ylabel="")
    ax.grid(False, axis="y")
    return ax


def _overlay() -> LinearSegmentedColormap:
    """Opaque blue to transparent to opaque red: the ends of the diverging colour map."""
    blue, red = (sns.color_palette(DIVERGING, as_cmap=True)(end) for end in (0.0, 1.0))
    steps = [(0, blue), (0.5, (*blue[:3], 0)), (0.5, (*red[:3], 0)), (1, red)]
    return LinearSegmentedColormap.from_list("overlay", steps)


def _explain(
    attribute: Callable[[Output, Cut | None, Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]],
    model: nn.Module,
    inputs: Tensor,
    target: int | Tensor | None,
    baseline: float | Tensor,
    chunk_size: int,
    layer: str | None = None,
) -> Attribution:
    """Chunk by chunk, ``attribute(f, cut, x, target, baseline)`` -> (values, delta).

    f: (n, ...) -> (n, C) calls the model in eval mode, and ``cut`` is the model cut at the layer, if one is named.
    """
    _positive(chunk_size=chunk_size)
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs must be a tensor, got {type(inputs).__name__}; a layer is named after them, layer=...")
    ids = layer is not None and inputs.dtype in (torch.int32, torch.int64)
    if inputs.ndim < 2 or not (inputs.is_floating_point() or ids) or len(inputs) == 0:
        found = f"{inputs.dtype} {tuple(inputs.shape)}"
        raise ValueError(
            f"inputs must be floating, of shape (N, ...) with N >= 1; got {found}. Token ids are explained at their "
            "embedding, integrated_gradients(..., layer=...)"
        )
    device = device_of(model) or inputs.device
    inputs = inputs.detach().to(device)
    given = torch.as_tensor(baseline, dtype=None if ids else inputs.dtype)
    if ids and given.is_floating_point() and not torch.equal(given, given.round()):
        raise ValueError(f"the baseline of token ids must be ids, whole numbers; got {baseline}")
    try:
        baselines = given.to(device, inputs.dtype).detach().expand_as(inputs)
    except RuntimeError:
        found = f"{tuple(given.shape)}"
        raise ValueError(f"a baseline of shape {found} does not broadcast to inputs {tuple(inputs.shape)}") from None
    for name, tensor in (("inputs", inputs), ("the baseline", baselines)):
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} must not hold NaN or infinity; clean the data first")

    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with evaluation(model), plain_kernels(model, order=1), replaced(model, parameters), torch.enable_grad():

        def f(x: Tensor) -> Tensor:
            outputs = one_tensor(call(model, {}, x))
            return outputs[:, None] if outputs.ndim == 1 else outputs

        with torch.no_grad():
            outputs = torch.cat([f(x) for x in inputs.split(chunk_size)])
        targets = _targets(outputs, target, len(inputs))
        cut = None if layer is None else Cut(f, find_layer(f, model, layer, inputs[:1]))
        values, deltas = [], []
        for x, y, b in zip(*(part.split(chunk_size) for part in (inputs, targets, baselines)), strict=True):
            value, delta = attribute(f, cut, x, y, b)
            values.append(value.detach() if ids else value.detach().to(inputs.dtype))
            if delta is not None:
                deltas.append(delta.detach())
    return Attribution(torch.cat(values), targets, torch.cat(deltas) if deltas else None)


def _targets(outputs: Tensor, target: int | Tensor | None, examples: int) -> Tensor:
    """The (N,) int64 indices of the outputs to explain."""
    if outputs.ndim != 2 or len(outputs) != examples:
        raise ValueError(f"the model must return (N, C) or (N,) for {examples} examples, got {tuple(outputs.shape)}")
    if not torch.isfinite(outputs).all():
        raise ValueError("the model's outputs hold NaN or infinity: has the training diverged?")
    if target is None:
        return outputs.argmax(1)
    targets = torch.as_tensor(target, device=outputs.device)
    if targets.ndim > 1 or targets.numel() not in (1, examples) or targets.is_floating_point():
        raise ValueError(f"target must be an index, or {examples} of them; got {targets.dtype} {tuple(targets.shape)}")
    if targets.min() < 0 or targets.max() >= outputs.shape[1]:
        raise ValueError(f"target must be from 0 to {outputs.shape[1] - 1}, got {targets.min()} to {targets.max()}")
    return targets.long().expand(examples).clone()


def _positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
