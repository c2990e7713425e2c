"""Gradients: their size per layer, their noise, their agreement, and each example's influence on the task loss.

All functions take any model and any loss (prediction, target) -> scalar that is a mean over the batch, and leave the
model as it was. Batches are moved to the model's device. Parameters with ``requires_grad=False`` take no part.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.func import grad, vmap

from analysis.derivatives import backward, explained, real, tangent
from analysis.inputs import (
    Batch,
    Data,
    Loss,
    State,
    call,
    check_model,
    check_value,
    flat,
    layers,
    on_device,
    one_tensor,
    plain_kernels,
    preserved,
    repeatable,
    replaced,
    require_columns,
    split_state,
    still,
)
from analysis.plotting import PALETTE, label, plain_ticks


def mean_gradients(model: nn.Module, losses: Sequence[Loss], data: Data, state: State | None = None) -> list[State]:
    """∇_θ of each loss, a mean over the batches of ``data`` weighted by their length, from one forward pass per batch.

    The losses share the forward pass, so they see the same dropout masks. The model runs in the modes it is in.

    Args:
        model: f_θ.
        losses: each (prediction, target) -> scalar.
        data: one (inputs, targets) pair or a loader.
        state: parameters and buffers to use instead of the model's; names that are missing keep the model's.

    Returns:
        For each loss, {parameter name: gradient}, zero where the loss does not depend on a parameter.

    Raises:
        ValueError: bad data, a loss that is not a finite scalar or depends on no parameter, or no parameter that
            requires a gradient.
        NotImplementedError: a part of the model runs under reentrant checkpointing.
    """
    if callable(losses):
        raise TypeError(f"losses must be a list of losses, got one {type(losses).__name__}; give [loss]")
    check_model(model)
    with preserved(model, *losses), plain_kernels(model, order=1), torch.enable_grad():
        parameters, rest = split_state(model, state)
        leaves = {name: parameter.requires_grad_() for name, parameter in parameters.items()}
        totals = [{name: torch.zeros_like(leaf) for name, leaf in leaves.items()} for _ in losses]
        count = 0
        for inputs, targets in on_device(data, model):
            with replaced(model, rest | leaves), explained():
                prediction = model(inputs.clone())
                for loss, total in zip(losses, totals, strict=True):
                    value = check_value(still(loss)(prediction, targets))
                    for name, gradient in zip(
                        leaves, backward([value], list(leaves.values()), [torch.ones_like(value)]), strict=True
                    ):
                        total[name] += len(inputs) * gradient
            count += len(inputs)
    return [{name: gradient / count for name, gradient in total.items()} for total in totals]


def gradient_norms(model: nn.Module, loss: Loss, data: Data, state: State | None = None) -> pd.DataFrame:
    """‖∇_θ loss‖ per layer, beside ‖θ‖ and the ratio of the two.

    Returns:
        DataFrame with one row per layer: layer, parameters (their number), gradient_norm, weight_norm, ratio.
    """
    (gradient,) = mean_gradients(model, [loss], data, state)
    weights, _ = split_state(model, state)
    rows = []
    for layer, names in layers(model).items():
        g, w = flat(gradient, names).norm().item(), flat(weights, names).norm().item()
        parameters = sum(gradient[name].numel() for name in names)
        ratio = g / w if w else float("nan")
        rows.append({"layer": layer, "parameters": parameters, "gradient_norm": g, "weight_norm": w, "ratio": ratio})
    return pd.DataFrame(rows)


def gradient_cosine(
    model: nn.Module,
    loss: Loss,
    train: Data,
    valid: Data,
    *,
    valid_loss: Loss | None = None,
    state: State | None = None,
) -> float:
    """Cosine between the gradient of ``loss`` on ``train`` and of ``valid_loss`` (by default the same) on ``valid``.

    Positive: a step down the first also descends the second, to first order. NaN if either gradient is zero.
    """
    (first,) = mean_gradients(model, [loss], train, state)
    (second,) = mean_gradients(model, [valid_loss or loss], valid, state)
    a, b = flat(first), flat(second)
    return (a @ b / (a.norm() * b.norm())).item()


def per_sample_gradients(
    model: nn.Module, loss: Loss, batch: Batch, state: State | None = None, chunk_size: int = 32
) -> Tensor:
    """∇_θ of the loss on each example alone, (B, P), with the parameters in the order of ``model.named_parameters()``.

    The model runs in eval mode: an example has a gradient of its own only where BatchNorm and dropout do not tie it to
    the others. ``chunk_size`` examples are differentiated at once by torch.func.vmap, or one after the other where the
    model or the loss cannot be vectorised.
    """
    with preserved(model, loss, training=False), plain_kernels(model):
        chunks = _per_sample(model, loss, batch, state, chunk_size)
        return torch.cat([torch.cat([g.reshape(len(g), -1) for g in chunk.values()], dim=1) for chunk in chunks])


@dataclass(frozen=True)
class GradientNoise:
    """The mean and the spread of per-sample gradients, see :func:`gradient_noise`."""

    squared_norm: float
    """Unbiased estimate of ‖G‖², G the expected gradient; it can be negative where noise hides G."""
    trace: float
    """Unbiased estimate of tr(Σ), Σ the covariance of a single example's gradient."""
    noise_scale: float
    """B = tr(Σ) / ‖G‖², in examples; infinite where the estimate of ‖G‖² is not positive."""
    signal_to_noise: float
    """‖G‖ / √tr(Σ) of a single example; a batch of b has √b times as much. Zero where ‖G‖² is not positive."""
    examples: int
    """The number N of examples."""


@overload
def gradient_noise(
    model: nn.Module,
    loss: Loss,
    data: Data,
    state: State | None = ...,
    chunk_size: int = ...,
    *,
    by_layer: Literal[False] = ...,
) -> GradientNoise: ...


@overload
def gradient_noise(
    model: nn.Module,
    loss: Loss,
    data: Data,
    state: State | None = ...,
    chunk_size: int = ...,
    *,
    by_layer: Literal[True],
) -> pd.DataFrame: ...


def gradient_noise(
    model: nn.Module,
    loss: Loss,
    data: Data,
    state: State | None = None,
    chunk_size: int = 32,
    *,
    by_layer: bool = False,
) -> GradientNoise | pd.DataFrame:
    r"""Signal-to-noise ratio of the gradient and the simple noise scale B = tr(Σ)/‖G‖² (McCandlish et al. 2018, §2.2).

    From the gradients g_1 … g_N of single examples, with mean ḡ, the unbiased estimates are ::

        tr(Σ) = 1/(N − 1) Σ_i ‖g_i − ḡ‖²,        ‖G‖² = ‖ḡ‖² − tr(Σ)/N,

    which are those of their appendix A.1 for batches of 1 and of N examples. (Their ratio B is not unbiased.) B is the
    batch size at which noise and signal weigh the same: much smaller batches waste no examples, much larger ones do.

    Args:
        model: f_θ, run in eval mode as in :func:`per_sample_gradients`.
        loss: (prediction, target) -> scalar, the mean over a batch of per-example losses.
        data: one (inputs, targets) pair or a loader, at least two examples in all.
        state: parameters and buffers to use instead of the model's.
        chunk_size: examples differentiated at once; memory grows by one gradient per example in a chunk.
        by_layer: of each layer's parameters by themselves: a DataFrame with one row per layer, in the model's order,
            with the columns layer and the fields of :class:`GradientNoise`.

    Raises:
        ValueError: fewer than two examples, or data that cannot be meant.
    """
    means, scatters, count = _moments(model, loss, data, state, chunk_size)
    if not by_layer:
        return _noise(sum(m.square().sum().item() for m in means.values()), sum(scatters.values()), count)
    rows = []
    for layer, names in layers(model).items():
        squared = sum(means[name].square().sum().item() for name in names)
        rows.append({"layer": layer, **vars(_noise(squared, sum(scatters[name] for name in names), count))})
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Influence:
    """What one step on a batch does to another batch's task loss, example by example, see :func:`influence`."""

    prediction: Tensor
    """f_θ(x_b), (B, C)."""
    output_gradient: Tensor
    """∂M/∂f_b, (B, C)."""
    output_tangent: Tensor
    """u_b = −α J_f(θ; x_b) v, (B, C)."""
    influence: Tensor
    """s_b = ⟨∂M/∂f_b, u_b⟩, (B,): the first-order change of the task loss that example b's part of the step causes."""


def influence(
    model: nn.Module,
    loss: Loss,
    task_loss: Loss,
    batch: Batch,
    meta_data: Data,
    learning_rate: float,
    meta_state: State | None = None,
) -> Influence:
    r"""How each training example moves the task loss, and shapes a loss that is learned online.

    Take one step of plain gradient descent on the training batch, θ' = θ − α ∇_θ M, with M = M(f(θ; x), y) the loss
    that trains (learned or not) and α the learning rate, and let v = ∇L_T be the gradient of the task loss on
    ``meta_data``. By the chain rule ∇_θ M = Σ_b J_bᵀ ∂M/∂f_b, with J_b = J_f(θ; x_b), so to first order in α ::

        L_T(θ') − L_T(θ) ≈ ⟨v, θ' − θ⟩ = Σ_b ⟨∂M/∂f_b, −α J_b v⟩ = Σ_b ⟨∂M/∂f_b, u_b⟩ = Σ_b s_b .    (1)

    s_b < 0 means that the step's part due to example b lowers the task loss, s_b > 0 that it raises it. The same number
    read from the other side: u_b is how example b's output would move if θ took a step −αv down the *task* loss, so
    Σ_b s_b is also the first-order change of M under that step.

    If M = M_φ is learned, differentiating (1) along φ, with v held where it is taken, gives the meta-gradient ::

        ∇_φ L_T = Σ_b ∇_φ ⟨∂M_φ/∂f_b, u_b⟩ ,    (2)

    exact for v taken at θ' (``meta_state``): row u_b is all that the loss network learns of the model from example b.
    The influences s_b are those of TracIn (Pruthi et al. 2020) with signs turned, averaged over ``meta_data``.
    What the model holds constant by ``torch.no_grad`` or changes by a backward pass of its own is so here, too.

    Args:
        model: f_θ before the step, run in the modes it is in.
        loss: M, (prediction, target) -> scalar.
        task_loss: L_T, (prediction, target) -> scalar.
        batch: the training batch (x, y).
        meta_data: one (inputs, targets) pair or a loader, on which L_T is taken.
        learning_rate: α > 0. With Nesterov momentum μ the step that depends on this batch is α(1 + μ).
        meta_state: state dict of θ', at which to take v; by default v is taken at θ.

    Raises:
        TypeError: a loss that cannot be called. The order of the first edition, (model, loss, batch, meta_data,
            task_loss), is told by its types, and taken with a ``DeprecationWarning``.
        ValueError: bad data, a loss that is not finite, or a learning rate that is not positive.
        NotImplementedError: the model's backward pass has no derivative, and forward mode none either; or a wrong one,
            see :mod:`analysis.derivatives`.
    """
    order: tuple[Any, Any, Any] = task_loss, batch, meta_data
    if callable(order[2]) and not callable(order[0]):
        warnings.warn(
            "the arguments of influence are now (model, loss, task_loss, batch, meta_data, learning_rate); the order "
            "with task_loss after the data will go",
            DeprecationWarning,
            stacklevel=2,
        )
        batch, meta_data, task_loss = order
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be positive, got {learning_rate}")
    (v,) = mean_gradients(model, [task_loss], meta_data, meta_state)  # ∇L_T, at θ' if it is given
    ((inputs, targets),) = on_device([batch], model)
    with preserved(model, loss), plain_kernels(model), torch.enable_grad():
        parameters, _ = split_state(model, None)
        leaves = {name: parameter.requires_grad_() for name, parameter in parameters.items()}
        w = {name: -learning_rate * v[name] for name in leaves}  # the direction −αv, along which u_b = J_b w
        same_random_numbers = repeatable(model)
        with replaced(model, leaves), explained():
            prediction = one_tensor(model(inputs.clone()))
            # The loss is differentiated along f alone. If it is a mean over the batch, ∂M/∂f_b holds its 1/B.
            leaf = prediction.detach().requires_grad_()
            value = check_value(still(loss)(leaf, targets))
            (output_gradient,) = backward([value], [leaf], [torch.ones_like(value)])  # ∂M/∂f, (B, C)
            if not torch.isfinite(output_gradient).all():
                raise ValueError("the gradient of the loss with respect to the prediction is not finite")

            def again(replacements: dict[str, Tensor]) -> Tensor:
                with same_random_numbers():
                    return call(model, replacements, inputs)

            # one J w for the whole batch: row b of it is J_b w = u_b, as long as examples do not mix
            moved = tangent(prediction, leaves, w, output_gradient, again)
    scores = (real(output_gradient) * real(moved)).flatten(1).sum(1)  # equation (1): s_b = ⟨∂M/∂f_b, u_b⟩
    return Influence(leaf.detach(), output_gradient, moved, scores.detach())


def _per_sample(
    model: nn.Module, loss: Loss, data: Data, state: State | None, chunk_size: int
) -> Iterator[dict[str, Tensor]]:
    """Per-sample gradients in chunks, ``{name: (chunk, *shape)}``; to be called within ``preserved``, in eval mode."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    parameters, rest = split_state(model, state)
    if complex_ones := [name for name, parameter in parameters.items() if parameter.is_complex()]:
        raise ValueError(
            f"gradients of single examples need real parameters, {complex_ones[0]!r} is complex; freeze it"
        )
    quiet = still(loss)

    def loss_of_one(moved: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return quiet(call(model, rest | moved, x[None]), y[None])

    def one_by_one(moved: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        leaves = {name: value.detach().requires_grad_() for name, value in moved.items()}
        rows = []
        for i in range(len(x)):
            with replaced(model, rest | leaves), torch.enable_grad(), explained():
                value = check_value(quiet(model(x[i : i + 1].clone()), y[i : i + 1]))
                rows.append(backward([value], list(leaves.values()), [torch.ones_like(value)]))
        return {name: torch.stack(parts) for name, parts in zip(leaves, zip(*rows, strict=True), strict=True)}

    at_once = vmap(grad(loss_of_one), in_dims=(None, 0, 0))  # a batch of one for each example, side by side
    for inputs, targets in on_device(data, model):
        for x, y in zip(inputs.split(chunk_size), targets.split(chunk_size), strict=True):
            try:
                chunk = at_once(parameters, x, y)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # something cannot be vectorised
                chunk = one_by_one(parameters, x, y)
            if not all(torch.isfinite(g).all() for g in chunk.values()):
                raise ValueError("a per-sample gradient is not finite; check the loss and the data")
            yield chunk


def _moments(
    model: nn.Module, loss: Loss, data: Data, state: State | None, chunk_size: int
) -> tuple[dict[str, Tensor], dict[str, float], int]:
    """Mean, Σ_i ‖g_i − ḡ‖² and number of per-sample gradients, merged over chunks in float64 (Chan et al. 1979)."""
    means: dict[str, Tensor] = {}
    scatters: dict[str, float] = {}
    count = 0
    with preserved(model, loss, training=False), plain_kernels(model):
        for chunk in _per_sample(model, loss, data, state, chunk_size):
            new = len(next(iter(chunk.values())))
            for name, gradients in chunk.items():
                gradients = gradients.double()
                mean = gradients.mean(0)
                # of two groups of n and m, with means apart by δ: scatter = scatter + scatter + δ² nm/(n + m),
                # mean = mean + δ m/(n + m); no sum of squares is formed that would cancel
                shift = mean - means.get(name, torch.zeros_like(mean))
                between = shift.square().sum() * count * new / (count + new)
                scatters[name] = scatters.get(name, 0.0) + ((gradients - mean).square().sum() + between).item()
                means[name] = means.get(name, torch.zeros_like(mean)) + shift * new / (count + new)
            count += new
    if count < 2:
        raise ValueError(f"the noise of a gradient needs at least 2 examples, got {count}")
    return means, scatters, count


def _noise(squared_mean: float, scatter: float, count: int) -> GradientNoise:
    trace = scatter / (count - 1)  # tr(Σ)
    squared = squared_mean - trace / count  # ‖ḡ‖² is ‖G‖² + tr(Σ)/N in expectation
    noise_scale = trace / squared if squared > 0 else float("inf")
    signal_to_noise = noise_scale**-0.5 if noise_scale > 0 else float("inf")
    return GradientNoise(squared, trace, noise_scale, signal_to_noise, count)


def plot_layers(frame: pd.DataFrame, ax: Axes | None = None, x: str = "gradient_norm", log: bool = True) -> Axes:
    """One row per layer, in the model's order: of :func:`gradient_norms` or of any frame with a column ``layer``.

    Args:
        frame: one row per layer.
        ax: where to draw; the current axes if None.
        x: the column to draw.
        log: draw dots on a logarithmic axis, where values that are not positive leave a gap; else bars from zero.

    Raises:
        ValueError: a missing column, or ``log`` with no positive value.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> data = torch.randn(16, 2), torch.randint(3, (16,))
        >>> ax = plot_layers(gradient_norms(model, nn.functional.cross_entropy, data))
    """
    require_columns(frame, "layer", x)
    ax = plt.gca() if ax is None else ax
    if log:
        if not (frame[x] > 0).any():
            raise ValueError(f"log needs positive values, the largest {x} is {frame[x].max()}; use log=False")
        ax.plot(frame[x].where(frame[x] > 0), range(len(frame)), "o", color=PALETTE[0])
        ax.set(xscale="log", yticks=range(len(frame)), yticklabels=frame["layer"], ylim=(len(frame) - 0.5, -0.5))
        plain_ticks(ax.xaxis)
    else:
        sns.barplot(frame, x=x, y="layer", color=PALETTE[0], saturation=1, errorbar=None, ax=ax)
    ax.set(xlabel=label(x), ylabel="")
    return ax
