"""Curvature of any loss in parameter space: eigenvalues, trace and spectral density of the Hessian, and sharpness.

For a loss L(θ) = 1/N Σ_n ℓ(f_θ(x_n), y_n), a task loss or a learned one, the matrix is with respect to the trainable
parameters and one of

- ``"hessian"``: ∇²_θ L;
- ``"ggn"``: the generalised Gauss-Newton matrix 1/N Σ_n J_nᵀ (∇²_f ℓ_n) J_n, with J_n the Jacobian of f_θ(x_n). It has
  no negative eigenvalue if ℓ is convex in the prediction, as cross-entropy is and a learned loss need not be.

Neither is ever formed: curvlinops works with products of it and vectors, see :mod:`analysis.matrices`. Batches of
unequal size are weighted by their size, and kept in memory. Of a model in half precision all is computed in float32.

What the model holds constant by ``torch.no_grad`` is constant in these matrices too, as it is in its backward pass. A
model whose backward pass has no right derivative, or none, is refused with a ``NotImplementedError``.

The matrix belongs to the model in eval mode: dropout is off, and BatchNorm uses its running statistics, as constants.
With ``batchnorm="train"`` each batch is normalised by its own statistics, and differentiated through them.
The model is left as it was.

For example::

    pairs = top_eigenpairs(model, F.cross_entropy, (x, y), 2)
    ax = plot_plane(plane(model, F.cross_entropy, (x, y), pairs.vectors))
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from matplotlib.axes import Axes
from scipy.sparse.linalg import ArpackNoConvergence, eigsh
from torch import Tensor, nn

from analysis.derivatives import TORCHSCRIPT, backward
from analysis.inputs import Data, Loss
from analysis.matrices import check_choice, operator, prepared
from analysis.plotting import PALETTE

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", *TORCHSCRIPT)
    from curvlinops import hutchinson_trace, hutchpp_trace
    from curvlinops.papyan2020traces.spectrum import fast_lanczos, lanczos_approximate_spectrum_from_iter

WHICH = {"largest": "LA", "smallest": "SA", "magnitude": "LM"}
TRACES = {"hutchinson": hutchinson_trace, "hutch++": hutchpp_trace}


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues (k,), float64, and their eigenvectors: orthonormal dictionaries from parameter names to tensors."""

    values: np.ndarray
    vectors: list[dict[str, Tensor]]


@dataclass(frozen=True)
class Trace:
    """An estimate of the trace and its standard error."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class SpectralDensity:
    """The density p(λ) = 1/P Σ_i δ(λ − λ_i), smoothed, at ``eigenvalues`` (n,), both float64.

    It integrates to one; of fewer than twenty nodes to less, for their wide bumps reach beyond the ends.
    """

    eigenvalues: np.ndarray
    density: np.ndarray


def top_eigenpairs(
    model: nn.Module,
    loss: Loss,
    data: Data,
    count: int = 1,
    *,
    which: str = "largest",
    matrix: str = "hessian",
    batchnorm: str = "eval",
    tolerance: float = 1e-4,
    seed: int = 0,
) -> Eigenpairs:
    """Extreme eigenvalues and eigenvectors, by the implicitly restarted Lanczos method (``scipy.sparse.linalg.eigsh``).

    Args:
        model: f_θ; its parameters with ``requires_grad`` count.
        loss: callable (prediction, target) -> scalar, the mean over its batch.
        data: one (inputs, targets) pair, or a loader, read once.
        count: how many pairs, fewer than there are parameters.
        which: "largest" (in order from the largest down), "smallest" (from the smallest up: the most negative
            curvature) or "magnitude" (from the largest absolute value down).
        matrix: "hessian" or "ggn".
        batchnorm: "eval" or "train".
        tolerance: of the residual ‖Av − λv‖, relative to the size of λ; a well separated λ has an error of its square.
        seed: of the vector to start from.

    Returns:
        Eigenvectors have norm one over all parameters together, and a positive largest entry.

    Raises:
        ValueError: an argument is not one of its choices, the data are empty or hold NaN, or the loss is no finite
            scalar.
        NotImplementedError: the model cannot be differentiated twice.
        RuntimeError: the tolerance is not met after 1,000 restarts.
    """
    check_choice("which", which, WHICH)
    with operator(model, loss, data, matrix, batchnorm, seed) as (linear, parameters):
        size = linear.shape[0]
        if not 1 <= count < size:
            raise ValueError(f"count must be at least 1 and less than the {size} parameters, got {count}")
        precision = torch.zeros((), dtype=linear.dtype).numpy().dtype
        # ARPACK would draw a vector to start from of its own, a new one in every call
        start = np.random.default_rng(seed).standard_normal(size).astype(precision)
        try:
            values, columns = eigsh(
                linear.to_scipy(precision), count, which=WHICH[which], v0=start, tol=tolerance, maxiter=1000
            )
        except ArpackNoConvergence as error:
            raise RuntimeError(
                f"{len(error.eigenvalues)} of {count} eigenvalues met the tolerance {tolerance}; use a larger one"
            ) from error
        order = np.argsort({"largest": -values, "smallest": values, "magnitude": -np.abs(values)}[which])
        vectors = []
        for column in columns.T[order]:
            # v and −v are both eigenvectors: take the one whose largest entry is positive
            flat = torch.as_tensor(column * np.sign(column[np.abs(column).argmax()]), device=linear.device)
            parts = flat.split([parameter.numel() for parameter in parameters.values()])
            shaped = zip(parameters.items(), parts, strict=True)
            vectors.append({name: part.reshape(parameter.shape) for (name, parameter), part in shaped})
    return Eigenpairs(values[order].astype(np.float64), vectors)


def trace(
    model: nn.Module,
    loss: Loss,
    data: Data,
    *,
    method: str = "hutch++",
    products: int = 12,
    repeats: int = 10,
    matrix: str = "hessian",
    batchnorm: str = "eval",
    seed: int = 0,
) -> Trace:
    """The trace, a mean over ``repeats`` independent and unbiased estimates from ``products`` matrix products each.

    Args:
        model: f_θ; its parameters with ``requires_grad`` count.
        loss: callable (prediction, target) -> scalar, the mean over its batch.
        data: one (inputs, targets) pair, or a loader, read once.
        method: "hutchinson", a mean of vᵀAv over random signs v; "hutch++" (Meyer et al. 2021), which takes the trace
            on a subspace that holds the large eigenvalues exactly; or "exact", a product with every unit vector.
        products: how many vectors are multiplied at once, fewer than there are parameters and for "hutch++" a
            multiple of 3; memory grows with them.
        repeats: how many estimates; "exact" needs none.
        matrix: "hessian" or "ggn".
        batchnorm: "eval" or "train".
        seed: of the random vectors.

    Returns:
        The standard error is that of the mean: NaN for a single estimate, 0 for "exact".

    Raises:
        ValueError: as in :func:`top_eigenpairs`.
    """
    check_choice("method", method, (*TRACES, "exact"))
    with operator(model, loss, data, matrix, batchnorm, seed) as (linear, _):
        size = linear.shape[0]
        if method == "exact":
            total = 0.0
            for rows in torch.arange(size, device=linear.device).split(products):
                # columns of the identity; of A times them only the diagonal of the block counts
                units = (torch.arange(size, device=linear.device)[:, None] == rows).to(linear.dtype)
                total += (linear @ units)[rows].trace().item()
            return Trace(total, 0.0)
        if not 1 <= products < size or (method == "hutch++" and products % 3):
            raise ValueError(
                f"products must be less than the {size} parameters, and a multiple of 3 for hutch++; got {products}"
            )
        if repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {repeats}")
        values = np.array([TRACES[method](linear, products).item() for _ in range(repeats)])
    error = values.std(ddof=1) / repeats**0.5 if repeats > 1 else np.nan
    return Trace(float(values.mean()), float(error))


def spectral_density(
    model: nn.Module,
    loss: Loss,
    data: Data,
    *,
    nodes: int = 64,
    repeats: int = 4,
    points: int = 1024,
    matrix: str = "hessian",
    batchnorm: str = "eval",
    seed: int = 0,
) -> SpectralDensity:
    """The density of eigenvalues, by stochastic Lanczos quadrature with Gaussian bumps (Papyan 2020, algorithm 2).

    A bump has fallen to a third of its height at half the distance between ``nodes`` points spread evenly over the
    spectrum: what is closer together cannot be told apart.

    Args:
        model: f_θ; its parameters with ``requires_grad`` count.
        loss: callable (prediction, target) -> scalar, the mean over its batch.
        data: one (inputs, targets) pair, or a loader, read once.
        nodes: Lanczos steps, each one product with the matrix; at least 2, at most as many as parameters.
        repeats: random starting vectors to average over.
        points: at which the density is returned, evenly spaced over the spectrum and 5 % around it.
        matrix: "hessian" or "ggn".
        batchnorm: "eval" or "train".
        seed: of the starting vectors.

    Raises:
        ValueError: as in :func:`top_eigenpairs`; or there are fewer different eigenvalues than nodes.
    """
    with operator(model, loss, data, matrix, batchnorm, seed) as (linear, _):
        if not 2 <= nodes <= linear.shape[0]:
            raise ValueError(f"nodes must be between 2 and the {linear.shape[0]} parameters, got {nodes}")
        if repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {repeats}")
        try:
            runs = [fast_lanczos(linear, nodes) for _ in range(repeats)]
        except torch.linalg.LinAlgError as error:
            raise ValueError(f"the Lanczos method broke down before {nodes} nodes; use fewer nodes") from error
    # the extreme Ritz values are where Lanczos converges first
    ritz = torch.stack([values for values, _ in runs])
    low, high = ritz.min().item(), ritz.max().item()
    if not low < high:
        raise ValueError(f"the spectrum from {low} to {high} has no extent")
    # every run is smoothed over one range, so that the densities can be averaged point by point; kappa = 3 lets a bump
    # fall to a third of its height half way between two nodes
    curves = [lanczos_approximate_spectrum_from_iter(run, (low, high), points, kappa=3.0, margin=0.05) for run in runs]
    density = torch.stack([density for _, density in curves]).double().mean(0)
    return SpectralDensity(curves[0][0].double().cpu().numpy(), density.cpu().numpy())


def sharpness(
    model: nn.Module,
    loss: Loss,
    data: Data,
    rho: float | None = None,
    *,
    adaptive: bool = False,
    batchnorm: str = "eval",
) -> float:
    """Rise of the loss after the ascent step of SAM (Foret et al. 2021, equation 2): L(θ + ρ g/‖g‖) − L(θ).

    The step, with g = ∇_θ L, maximises L to first order in the ball ‖ε‖ ≤ ρ. The rise is at most that of the best step.

    Adaptive, it is the step of ASAM (Kwon et al. 2021), L(θ + ρ T²g/‖Tg‖) − L(θ) with T = abs(θ), which maximises L to
    first order where ‖ε/T‖ ≤ ρ, elementwise. It does not change under rescalings of the weights that leave the function
    of the network as it is.

    Args:
        model: f_θ; its parameters with ``requires_grad`` move.
        loss: callable (prediction, target) -> scalar, the mean over its batch.
        data: one (inputs, targets) pair, or a loader; L is the mean over all examples.
        rho: ρ > 0, the radius; by default .05, adaptive .5, as in the papers.
        adaptive: measure the step relative to each weight's size.
        batchnorm: "eval" or "train".

    Raises:
        ValueError: a radius that is not positive; otherwise as in :func:`top_eigenpairs`.
    """
    rho = (0.5 if adaptive else 0.05) if rho is None else rho
    return _rise(model, loss, data, rho, batchnorm, adaptive)


def _rise(model: nn.Module, loss: Loss, data: Data, rho: float, batchnorm: str, adaptive: bool) -> float:
    if not rho > 0:
        raise ValueError(f"rho must be positive, got {rho}")
    with prepared(model, loss, data, batchnorm) as problem:
        total = sum(len(x) for x, _ in problem.batches)
        parameters = {name: leaf.detach() for name, leaf in problem.leaves.items()}
        gradient = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        before = after = 0.0
        # L(θ) and g = ∇L over all examples; each batch weighs as many as it has
        for x, y in problem.batches:
            with problem.open():
                value = problem.value(x, y)
                found = backward([value], list(problem.leaves.values()), [torch.ones_like(value)])
            before += value.item() * len(x) / total
            for name, part in zip(gradient, found, strict=True):
                gradient[name] += part * (len(x) / total)
        # T = abs(θ), or the identity: the step ρ T²g/‖Tg‖ maximises ⟨g, ε⟩ where ‖T⁻¹ε‖ ≤ ρ, by Cauchy and Schwarz
        scales = {name: p.abs() if adaptive else torch.ones_like(p) for name, p in parameters.items()}
        norm = torch.stack([(scales[name] * gradient[name]).norm() for name in gradient]).norm()
        if not torch.isfinite(norm):
            raise ValueError("the gradient of the loss is not finite; check the model and the loss")
        if norm == 0:
            return 0.0
        # θ + ρ T²g/‖Tg‖ takes the place of θ, and the loss is read there
        problem.leaves = {name: p + rho / norm * scales[name] ** 2 * gradient[name] for name, p in parameters.items()}
        for x, y in problem.batches:
            with problem.open(), torch.no_grad():
                after += problem.loss(model(x.clone()), y).item() * len(x) / total
    return after - before


def plot_spectral_density(
    spectrum: SpectralDensity, ax: Axes | None = None, label: str | None = None, log: bool = True
) -> Axes:
    """Draw a spectral density, by default on a logarithmic axis of eight decades, where single outliers show.

    Examples:
        >>> axis = np.linspace(-1, 4, 200)
        >>> ax = plot_spectral_density(SpectralDensity(axis, np.exp(-(axis**2) / 0.02) * 4))
    """
    ax = plt.gca() if ax is None else ax
    color = PALETTE[len(ax.get_lines()) % len(PALETTE)]
    sns.lineplot(x=spectrum.eigenvalues, y=spectrum.density, color=color, label=label, estimator=None, ax=ax)
    if log:
        top = max(np.nanmax(line.get_ydata()) for line in ax.get_lines())
        ax.set(ylim=(1e-8 * top, 3 * top), yscale="log")
    ax.set(xlabel="Eigenvalue", ylabel="Density")
    return ax
