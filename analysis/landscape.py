"""Loss landscapes: slices along lines and planes of parameter space, trajectories in their PCA plane, and barriers.

A slice evaluates any loss, a task loss or a learned one at any step of its training, at θ = θ₀ + Σ_k c_k d_k for a
grid of coefficients c. Directions d are dictionaries from parameter names to tensors, so the eigenvectors of
:func:`analysis.curvature.top_eigenpairs` are directions, and so is the difference of two checkpoints.

For example::

    across = plane(model, F.cross_entropy, (x, y), random_directions(model, 2))
    ax = plot_plane(across)

Many grid points are evaluated at once, by ``torch.func.vmap`` over the parameters.

The running statistics of BatchNorm were measured at θ₀ and are wrong elsewhere. Say what to do by ``batchnorm``:

- ``"eval"``: use them as they are, as Li et al. (2018) do;
- ``"train"``: normalise each batch by its own statistics, as in training;
- ``"recalibrate"``: estimate them anew at every grid point, in one more pass over the data: the mean over batches,
  weighted by their size, of batch means and (unbiased) batch variances.

Everything else, dropout for one, is in eval mode, and the model is left as it was.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.func import vmap
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

from analysis.inputs import (
    Batch,
    Data,
    Loss,
    as_batches,
    batch_norms,
    call,
    checked_tensors,
    evaluation,
    plain_kernels,
    still,
    trainable,
)
from analysis.plotting import PALETTE, SEQUENTIAL

Direction = Mapping[str, Tensor]
"""A vector of parameter space: parameter names to tensors of the parameter's shape. Missing names are zero."""

BATCHNORM = ("eval", "train", "recalibrate")


@dataclass(frozen=True)
class Line:
    """Losses (n,) at ``positions`` (n,), both float64."""

    positions: np.ndarray
    losses: np.ndarray


@dataclass(frozen=True)
class Plane:
    """Losses (len(y), len(x)) on the grid of coordinates ``x`` along the first and ``y`` along the second direction."""

    x: np.ndarray
    y: np.ndarray
    losses: np.ndarray


@dataclass(frozen=True)
class Trajectory:
    """Checkpoints projected onto the plane of their first two principal components.

    Attributes:
        coordinates: (T, 2), of each checkpoint; the last is at (0, 0).
        explained_variance: (2,), the fraction of the checkpoints' variance along each direction.
        directions: the two orthonormal directions.
        origin: the last checkpoint, through which the plane passes.
    """

    coordinates: np.ndarray
    explained_variance: np.ndarray
    directions: tuple[Direction, Direction]
    origin: Direction

    def grid(self, points: int = 51, margin: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates x and y, ``points`` each, that cover the trajectory and ``margin`` of its extent around it."""
        low, high = self.coordinates.min(0), self.coordinates.max(0)
        border = margin * (high - low)
        x, y = np.linspace(low - border, high + border, points).T
        return x, y


def random_directions(model: nn.Module, count: int = 1, seed: int = 0) -> list[Direction]:
    """Random Gaussian directions, filter-normalised (Li et al. 2018, section 4).

    Each filter of a direction, d_ij of the tensor i, is scaled to the norm of the weights' filter:
    d_ij ← d_ij ‖θ_ij‖ / ‖d_ij‖. A filter is an entry along the first dimension: an output channel of a convolution,
    a row of a linear layer. Parameters of one dimension or none stay in place, as in the paper: biases, and the scales
    and shifts of BatchNorm and most other normalisation layers. (A LayerNorm over several dimensions has others.)

    Args:
        model: gives the trainable parameters (``requires_grad``).
        count: how many directions.
        seed: fixes the directions, on every device and in every precision.

    Raises:
        ValueError: no parameter is left to move.
    """
    parameters = {name: parameter.detach() for name, parameter in trainable(model).items()}
    if not any(weight.ndim > 1 for weight in parameters.values()):
        raise ValueError("the model trains only biases and other vectors, which filter normalisation leaves in place")
    generator = torch.Generator().manual_seed(seed)
    directions: list[Direction] = []
    for _ in range(count):
        direction = {}
        for name, weight in parameters.items():
            if weight.ndim < 2:
                direction[name] = torch.zeros_like(weight)
                continue
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight)
            scale = weight.flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1)  # ‖θ_ij‖ / ‖d_ij‖, of each filter j
            direction[name] = noise * scale.reshape(-1, *[1] * (weight.ndim - 1))
        directions.append(direction)
    return directions


def line(
    model: nn.Module,
    loss: Loss,
    data: Data,
    direction: Direction | None = None,
    *,
    positions: ArrayLike | None = None,
    origin: Direction | None = None,
    batchnorm: str = "eval",
    chunk_size: int | None = None,
    progress: bool = False,
) -> Line:
    """Loss at θ₀ + t·d for every t in ``positions``.

    Args:
        model: gives θ₀, unless ``origin`` does.
        loss: callable (prediction, target) -> scalar, the mean over its batch.
        data: one (inputs, targets) pair, or a loader, read once; the loss is the mean over all its examples.
        direction: d; a random filter-normalised one if None.
        positions: t, (n,); 51 points from -1 to 1 if None.
        origin: parameters and buffers of θ₀ by name, for example a ``state_dict``; what it lacks is the model's.
        batchnorm: "eval", "train" or "recalibrate", see above.
        chunk_size: how many grid points are evaluated at once; memory grows with it, and 1 is a plain loop. If None, a
            size that fits in the processor's cache: a loop for large models, where there is nothing to gain.
        progress: show a progress bar.

    Raises:
        ValueError: the names, shapes or values of a tensor do not fit the model, the data are empty or hold NaN, the
            loss is no scalar, or an argument is not one of its choices.

    Warns:
        RuntimeWarning: the model or the loss cannot be vectorised, and a loop took its place.
    """
    t = _axis("positions", positions)
    directions = [random_directions(model)[0] if direction is None else direction]
    losses = _losses(model, loss, data, origin, directions, t[:, None], batchnorm, chunk_size, progress)
    return Line(t, losses)


def plane(
    model: nn.Module,
    loss: Loss,
    data: Data,
    directions: Sequence[Direction] | None = None,
    *,
    x: ArrayLike | None = None,
    y: ArrayLike | None = None,
    origin: Direction | None = None,
    batchnorm: str = "eval",
    chunk_size: int | None = None,
    progress: bool = False,
) -> Plane:
    """Loss at θ₀ + x·d₁ + y·d₂ for every x and y: arguments, errors and warnings as in :func:`line`.

    For a trajectory of checkpoints::

        path = trajectory(model, checkpoints)
        x, y = path.grid()
        around = plane(model, loss, data, path.directions, x=x, y=y, origin=path.origin)
    """
    directions = random_directions(model, 2) if directions is None else directions
    if len(directions) != 2:
        raise ValueError(f"a plane needs 2 directions, got {len(directions)}")
    x, y = _axis("x", x), _axis("y", y)
    points = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    losses = _losses(model, loss, data, origin, directions, points, batchnorm, chunk_size, progress)
    return Plane(x, y, losses.reshape(len(y), len(x)))


def interpolate(
    model: nn.Module,
    loss: Loss,
    data: Data,
    start: Direction,
    end: Direction,
    *,
    positions: ArrayLike | None = None,
    batchnorm: str = "eval",
    chunk_size: int | None = None,
    progress: bool = False,
) -> Line:
    """Loss at (1 − t)·start + t·end (Goodfellow et al. 2015), by default at 25 points t from 0 to 1.

    ``start`` and ``end`` are checkpoints: dictionaries of all parameters, or state dicts. Running statistics that both
    hold are interpolated too, so that the losses at 0 and 1 are those of the checkpoints. Between two networks they
    collapse (Jordan et al. 2023): look at ``batchnorm="recalibrate"`` as well.

    Other arguments, errors and warnings as in :func:`line`.
    """
    names = dict(model.named_parameters()).keys()
    start, end = checked_tensors("start", start, model, names), checked_tensors("end", end, model, names)
    # whole numbers stay those of the start: BatchNorm's count of batches, for one
    moving = [name for name in start if name in end and start[name].is_floating_point()]
    direction = {name: end[name].to(start[name]) - start[name] for name in moving}
    t = _axis("positions", np.linspace(0, 1, 25) if positions is None else positions)
    losses = _losses(model, loss, data, start, [direction], t[:, None], batchnorm, chunk_size, progress)
    return Line(t, losses)


def barrier(path: Line) -> float:
    """Largest height of the losses above the chord from the first to the last position (Entezari et al. 2022).

    max_t L(t) − [(1 − t) L(0) + t L(1)], which is 0 on a convex path, and NaN if a loss is.

    Raises:
        ValueError: fewer than two positions.
    """
    if len(path.positions) < 2:
        raise ValueError(f"a barrier needs at least 2 positions, got {len(path.positions)}")
    fraction = (path.positions - path.positions[0]) / (path.positions[-1] - path.positions[0])
    # the height of the straight line between the ends, below each point
    chord = (1 - fraction) * path.losses[0] + fraction * path.losses[-1]
    return float((path.losses - chord).max())


def trajectory(model: nn.Module, checkpoints: Sequence[Direction]) -> Trajectory:
    """Principal components of the trainable parameters of at least 3 checkpoints (Li et al. 2018, section 7).

    With D the (T, P) matrix of the differences θ_t − θ_T to the last checkpoint, the directions are the first two right
    singular vectors of D with its mean over t removed, found from the (T, T) Gram matrix in float64.
    The plane passes through θ_T.

    Args:
        model: names the parameters; its values are not used.
        checkpoints: dictionaries of parameters, or state dicts, in order of time.

    Raises:
        ValueError: fewer than 3 checkpoints, or none that span a plane; a parameter is missing, misshapen or NaN.
    """
    given, names = list(checkpoints), list(trainable(model))
    if len(given) < 3:
        raise ValueError(f"a plane needs at least 3 checkpoints, got {len(given)}")
    checkpoints = [checked_tensors(f"checkpoint {i}", checkpoint, model, names) for i, checkpoint in enumerate(given)]

    def differences(name: str) -> Tensor:
        stacked = torch.stack([checkpoint[name].detach().double().flatten() for checkpoint in checkpoints])
        return stacked - stacked[-1]

    # D is (T, P) with P in the millions and T a few: all is found from the (T, T) matrix DDᵀ, layer by layer
    length = len(checkpoints)
    gram = torch.zeros(length, length, dtype=torch.float64)
    for name in names:
        gram += (difference := differences(name)).mm(difference.T).cpu()
    centring = torch.eye(length, dtype=torch.float64) - 1 / length
    # H DDᵀ H of the centred HD = U S Vᵀ has the eigenvectors U and the eigenvalues S²; eigh gives the smallest first
    eigenvalues, eigenvectors = torch.linalg.eigh(centring @ gram @ centring)
    variances, components = eigenvalues.flip(0)[:2], eigenvectors.flip(1)[:, :2]
    if not variances[1] > 1e-14 * variances[0]:
        raise ValueError("the checkpoints lie on a line (or are all equal) and span no plane; use interpolate instead")
    weights = centring @ components / variances.sqrt()  # V = Dᵀ H U S⁻¹ = Dᵀ · weights, never formed as a whole
    coordinates = gram @ weights  # D V: each θ_t − θ_T along the directions, so that the last checkpoint is at 0
    # an eigenvector has no sign of its own: the point farthest along an axis lies on its positive side
    signs = coordinates.gather(0, coordinates.abs().argmax(0, keepdim=True)).sign()
    coordinates, weights = coordinates * signs, weights * signs
    first, second = {}, {}
    for name in names:
        last = checkpoints[-1][name]
        rows = weights.T.to(last.device) @ differences(name)
        first[name], second[name] = rows.reshape(2, *last.shape).to(last)
    fractions = variances / eigenvalues.clamp(min=0).sum()
    return Trajectory(coordinates.numpy(), fractions.numpy(), (first, second), given[-1])


def _losses(
    model: nn.Module,
    loss: Loss,
    data: Data,
    origin: Direction | None,
    directions: Sequence[Direction],
    coefficients: np.ndarray,
    batchnorm: str,
    chunk_size: int | None,
    progress: bool,
) -> np.ndarray:
    """Losses (n,) at origin + coefficients (n, K) · directions (K)."""
    if batchnorm not in BATCHNORM:
        raise ValueError(f"batchnorm must be one of {', '.join(BATCHNORM)}; got {batchnorm!r}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    origin = {} if origin is None else checked_tensors("origin", origin, model)
    directions = [
        checked_tensors(f"direction {position}", direction, model) for position, direction in enumerate(directions)
    ]
    with evaluation(model, loss, batch_statistics=batchnorm == "train"), plain_kernels(model), torch.no_grad():
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        start = {name: origin.get(name, tensor).detach().to(tensor) for name, tensor in tensors.items()}  # θ₀
        checked_tensors("the model", start, model)
        # the K directions of each tensor, (K, *shape), zero where a direction lacks it; what none moves is left out
        slopes = {
            name: torch.stack([d[name].to(tensor) if name in d else torch.zeros_like(tensor) for d in directions])
            for name, tensor in start.items()
            if any(name in d for d in directions)
        }
        reference = next(iter(slopes.values()))
        batches = [(x.to(reference.device), y.to(reference.device)) for x, y in as_batches(data)]
        grid = torch.as_tensor(coefficients).to(reference)
        quiet = still(loss)

        def mean_loss(moved: dict[str, Tensor]) -> Tensor:
            values = {**start, **moved}
            if batchnorm == "recalibrate":
                values |= _running_statistics(model, values, batches)
            total = torch.zeros((), dtype=torch.float64, device=reference.device)
            for x, y in batches:
                value = quiet(call(model, values, x), y)
                if value.ndim:
                    raise ValueError(f"the loss must be a scalar, got a tensor of shape {tuple(value.shape)}")
                total = total + value * len(x)
            return total / sum(len(x) for x, _ in batches)

        def moved_by(rows: Tensor) -> dict[str, Tensor]:
            # θ₀ + Σ_k c_k d_k, of one point c (K,) or of several at once (n, K)
            return {name: start[name] + torch.tensordot(rows.to(d), d, dims=1) for name, d in slopes.items()}

        chunk_size = chunk_size or _chunk_size(start, batches)
        found: list[Tensor] = []
        with tqdm(total=len(grid), desc="landscape", unit="point", disable=not progress) as bar:
            if chunk_size > 1:
                try:
                    for rows in grid.split(chunk_size):
                        found.append(vmap(mean_loss)(moved_by(rows)))
                        bar.update(len(rows))
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:
                    mean_loss(moved_by(grid[0]))  # raises here if the model itself, not vmap, is the trouble
                    warnings.warn(
                        f"evaluating point by point, because the model or the loss cannot be vectorised: {error}",
                        RuntimeWarning,
                        stacklevel=3,
                    )
            for row in grid[sum(len(chunk) for chunk in found) :]:
                found.append(mean_loss(moved_by(row))[None])
                bar.update()
        return torch.cat(found).cpu().numpy()


def _running_statistics(model: nn.Module, values: dict[str, Tensor], batches: list[Batch]) -> dict[str, Tensor]:
    """The running statistics of every BatchNorm layer at ``values``, averaged over the batches and a layer's calls."""
    norms = {name: norm for name, norm in batch_norms(model).items() if norm.running_mean is not None}
    statistics: dict[str, Tensor] = {}
    calls: dict[str, list[Tensor]] = defaultdict(list)

    def record(name: str, norm: nn.Module) -> RemovableHandle:
        def hook(_: nn.Module, arguments: tuple[Tensor]) -> None:
            dims = [0, *range(2, arguments[0].ndim)]
            variance, mean = torch.var_mean(arguments[0], dims)
            for key, value in ((f"{name}.running_mean", mean), (f"{name}.running_var", variance)):
                calls[key].append(value)

        return norm.register_forward_pre_hook(hook)

    hooks = [record(name, norm) for name, norm in norms.items()]
    try:
        # in train mode a layer normalises by its batch, so that the layers above see what they would in training
        for norm in norms.values():
            norm.training = True
        for x, _ in batches:
            share = len(x) / sum(len(x) for x, _ in batches)
            call(model, values, x)
            for key, found in calls.items():
                statistics[key] = statistics.get(key, 0) + share * torch.stack(found).mean(0)
            calls.clear()
    finally:
        for norm, hook in zip(norms.values(), hooks, strict=True):
            norm.training = False
            hook.remove()
    return statistics


def _chunk_size(tensors: dict[str, Tensor], batches: list[Batch]) -> int:
    """As many points as keep parameters and inputs below 2²⁰ elements (on a GPU 2²⁴), and at most 256."""
    weights = sum(tensor.numel() for tensor in tensors.values())
    inputs = max(x.numel() for x, _ in batches)
    budget = 2**20 if batches[0][0].device.type == "cpu" else 2**24
    return min(max(budget // max(weights, inputs), 1), 256)


def _axis(name: str, values: ArrayLike | None) -> np.ndarray:
    axis = np.linspace(-1, 1, 51) if values is None else np.asarray(values, dtype=np.float64)
    if axis.ndim != 1 or len(axis) == 0 or not np.isfinite(axis).all():
        raise ValueError(f"{name} must be a list of finite numbers, got {values!r}")
    return axis


def plot_line(path: Line, ax: Axes | None = None, label: str | None = None) -> Axes:
    """Draw the loss along a line, for example of :func:`line` or :func:`interpolate`; several share an ``ax``.

    Examples:
        >>> ax = plot_line(Line(np.linspace(-1, 1, 5), np.linspace(-1, 1, 5) ** 2))
    """
    ax = plt.gca() if ax is None else ax
    color = PALETTE[len(ax.get_lines()) % len(PALETTE)]
    sns.lineplot(x=path.positions, y=path.losses, color=color, label=label, estimator=None, ax=ax)
    ax.set(xlabel="Position along the direction", ylabel="Loss")
    return ax


def plot_plane(across: Plane, ax: Axes | None = None, levels: int = 25, log: bool = False) -> Axes:
    """Draw the contours of the loss in a plane, evenly spaced in the loss or, with ``log``, in its logarithm.

    Args:
        across: from :func:`plane`; what is NaN or infinite stays white.
        ax: where to draw; the current axes if None.
        levels: how many contours.
        log: space them in the logarithm.

    Raises:
        ValueError: ``log`` with losses that are not positive, as learned losses may be; or no loss is finite.

    Examples:
        >>> axis = np.linspace(-1, 1, 5)
        >>> ax = plot_plane(Plane(axis, axis, axis**2 + axis[:, None] ** 2))
    """
    ax = plt.gca() if ax is None else ax
    losses = np.ma.masked_invalid(across.losses)
    if not losses.count():
        raise ValueError("no loss in the plane is finite; use a smaller range of x and y")
    low, high = losses.min(), losses.max()
    if log and low <= 0:
        raise ValueError(f"log needs positive losses, the smallest is {low}; use log=False")
    edges = np.geomspace(low, high, levels) if log else levels
    norm = LogNorm(low, high) if log else None
    filled = ax.contourf(across.x, across.y, losses, levels=edges, norm=norm, cmap=SEQUENTIAL)
    ax.contour(filled, colors="white", linewidths=0.4, alpha=0.6)
    ax.figure.colorbar(filled, ax=ax, label="Loss", format="%.3g")
    ax.set(xlabel="First direction", ylabel="Second direction")
    return ax


def plot_trajectory(path: Trajectory, ax: Axes | None = None) -> Axes:
    """Draw the checkpoints in their PCA plane, for example over :func:`plot_plane`; a star marks the last.

    The labels give the share of the checkpoints' variance along each axis.

    Examples:
        >>> ax = plot_trajectory(Trajectory(np.array([[2, 1], [1, 0.2], [0, 0]]), np.array([0.9, 0.1]), ({}, {}), {}))
    """
    ax = plt.gca() if ax is None else ax
    outline = [patheffects.withStroke(linewidth=3, foreground="white")]
    ax.plot(*path.coordinates.T, color=PALETTE[1], path_effects=outline)
    ax.plot(*path.coordinates.T, "o", markersize=4, color=PALETTE[1])
    ax.plot(*path.coordinates[-1], "*", markersize=14, color=PALETTE[1], markeredgecolor="white")
    first, second = path.explained_variance
    ax.set(xlabel=f"First component ({first:.1%})", ylabel=f"Second component ({second:.1%})")
    return ax
