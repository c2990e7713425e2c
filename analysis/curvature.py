"""Curvature of any loss in parameter space: eigenvalues, trace and spectral density of the Hessian, and sharpness.

For a loss L(θ) = 1/N Σ_n ℓ(f_θ(x_n), y_n), a task loss or a learned one, the matrix is with respect to the trainable
parameters and one of

- ``"hessian"``: ∇²_θ L;
- ``"ggn"``: the generalised Gauss-Newton matrix 1/N Σ_n J_nᵀ (∇²_f ℓ_n) J_n, with J_n the Jacobian of f_θ(x_n). It has
  no negative eigenvalue if ℓ is convex in the prediction, as cross-entropy is and a learned loss need not be.

Neither is ever formed: curvlinops multiplies vectors with it. Batches of unequal size are weighted by their size, and
kept in memory.

The matrix belongs to the model in eval mode: dropout is off, and BatchNorm uses its running statistics, as constants.
With ``batchnorm="train"`` each batch is normalised by its own statistics, and differentiated through them.
The model is left as it was.

For example::

    pairs = top_eigenpairs(model, F.cross_entropy, (x, y), 2)
    ax = plot_plane(plane(model, F.cross_entropy, (x, y), pairs.vectors))
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from matplotlib.axes import Axes
from scipy.sparse.linalg import ArpackNoConvergence, eigsh
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from analysis.inputs import Batch, Loss, as_batches, evaluation_copy
from analysis.plotting import PALETTE

TORCHSCRIPT = ("`torch.jit.script` is deprecated", FutureWarning)
"""A warning of torch about itself: as a dependency of curvlinops is imported, and at the first forward-mode pass."""

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", *TORCHSCRIPT)
    from curvlinops import GGNLinearOperator, HessianLinearOperator, hutchinson_trace, hutchpp_trace
    from curvlinops.papyan2020traces.spectrum import fast_lanczos, lanczos_approximate_spectrum_from_iter

Data = Batch | Iterable[Batch]

MATRICES = ("hessian", "ggn")
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
        tolerance: of the residual ‖Av − λv‖, relative to |λ|; the error of a well separated λ is of its square.
        seed: of the vector to start from.

    Returns:
        Eigenvectors have norm one over all parameters together, and a positive largest entry.

    Raises:
        ValueError: an argument is not one of its choices, the data are empty or hold NaN, or the loss is no finite
            scalar.
        RuntimeError: the tolerance is not met after 1,000 restarts.
    """
    _check_choice("which", which, WHICH)
    with _operator(model, loss, data, matrix, batchnorm, seed) as (operator, parameters):
        size = operator.shape[0]
        if not 1 <= count < size:
            raise ValueError(f"count must be at least 1 and less than the {size} parameters, got {count}")
        precision = torch.zeros((), dtype=operator.dtype).numpy().dtype
        start = np.random.default_rng(seed).standard_normal(size).astype(precision)
        try:
            values, columns = eigsh(
                operator.to_scipy(precision), count, which=WHICH[which], v0=start, tol=tolerance, maxiter=1000
            )
        except ArpackNoConvergence as error:
            raise RuntimeError(
                f"{len(error.eigenvalues)} of {count} eigenvalues met the tolerance {tolerance}; use a larger one"
            ) from error
        order = np.argsort({"largest": -values, "smallest": values, "magnitude": -np.abs(values)}[which])
        vectors = []
        for column in columns.T[order]:
            flat = torch.as_tensor(column * np.sign(column[np.abs(column).argmax()]), device=operator.device)
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
    _check_choice("method", method, (*TRACES, "exact"))
    with _operator(model, loss, data, matrix, batchnorm, seed) as (operator, _):
        size = operator.shape[0]
        if method == "exact":
            total = 0.0
            for rows in torch.arange(size, device=operator.device).split(products):
                units = (torch.arange(size, device=operator.device)[:, None] == rows).to(operator.dtype)
                total += (operator @ units)[rows].trace().item()
            return Trace(total, 0.0)
        if not 1 <= products < size or (method == "hutch++" and products % 3):
            raise ValueError(
                f"products must be less than the {size} parameters, and a multiple of 3 for hutch++; got {products}"
            )
        if repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {repeats}")
        values = np.array([TRACES[method](operator, products).item() for _ in range(repeats)])
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
    with _operator(model, loss, data, matrix, batchnorm, seed) as (operator, _):
        if not 2 <= nodes <= operator.shape[0]:
            raise ValueError(f"nodes must be between 2 and the {operator.shape[0]} parameters, got {nodes}")
        if repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {repeats}")
        try:
            runs = [fast_lanczos(operator, nodes) for _ in range(repeats)]
        except torch.linalg.LinAlgError as error:
            raise ValueError(f"the Lanczos method broke down before {nodes} nodes; use fewer nodes") from error
    # the extreme Ritz values are where Lanczos converges first
    ritz = torch.stack([values for values, _ in runs])
    low, high = ritz.min().item(), ritz.max().item()
    if not low < high:
        raise ValueError(f"the spectrum from {low} to {high} has no extent")
    curves = [lanczos_approximate_spectrum_from_iter(run, (low, high), points, kappa=3.0, margin=0.05) for run in runs]
    density = torch.stack([density for _, density in curves]).double().mean(0)
    return SpectralDensity(curves[0][0].double().cpu().numpy(), density.cpu().numpy())


def sharpness(model: nn.Module, loss: Loss, data: Data, rho: float = 0.05, *, batchnorm: str = "eval") -> float:
    """Rise of the loss after the ascent step of SAM (Foret et al. 2021, equation 2): L(θ + ρ g/‖g‖) − L(θ).

    The step, with g = ∇_θ L, maximises L to first order in the ball ‖ε‖ ≤ ρ. The rise is at most that of the best step.

    Args:
        model: f_θ; its parameters with ``requires_grad`` move.
        loss: callable (prediction, target) -> scalar, the mean over its batch.
        data: one (inputs, targets) pair, or a loader; L is the mean over all examples.
        rho: ρ > 0, the radius.
        batchnorm: "eval" or "train".

    Raises:
        ValueError: a radius that is not positive; otherwise as in :func:`top_eigenpairs`.
    """
    return _rise(model, loss, data, rho, batchnorm, adaptive=False)


def adaptive_sharpness(model: nn.Module, loss: Loss, data: Data, rho: float = 0.5, *, batchnorm: str = "eval") -> float:
    """Rise of the loss after the ascent step of ASAM (Kwon et al. 2021): L(θ + ρ T²g/‖Tg‖) − L(θ), with T = |θ|.

    The step maximises L to first order where ‖ε/|θ|‖ ≤ ρ, elementwise. Unlike :func:`sharpness`, it does not
    change under rescalings of the weights that leave the function of the network as it is. Arguments, errors as there.
    """
    return _rise(model, loss, data, rho, batchnorm, adaptive=True)


def _rise(model: nn.Module, loss: Loss, data: Data, rho: float, batchnorm: str, adaptive: bool) -> float:
    if not rho > 0:
        raise ValueError(f"rho must be positive, got {rho}")
    with _plain_kernels(model), _prepared(model, loss, data, batchnorm) as (net, parameters, batches):
        total = sum(len(x) for x, _ in batches)
        gradient = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        before = after = 0.0

        def value(moved: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return loss(functional_call(net, moved, (x,)), y)

        for x, y in batches:
            found, batch_value = grad_and_value(value)(parameters, x, y)
            before += batch_value.item() * len(x) / total
            for name in gradient:
                gradient[name] += found[name] * (len(x) / total)
        scales = {name: p.abs() if adaptive else torch.ones_like(p) for name, p in parameters.items()}
        norm = torch.stack([(scales[name] * gradient[name]).norm() for name in gradient]).norm()
        if not torch.isfinite(norm):
            raise ValueError("the gradient of the loss is not finite; check the model and the loss")
        if norm == 0:
            return 0.0
        moved = {name: p + rho / norm * scales[name] ** 2 * gradient[name] for name, p in parameters.items()}
        for x, y in batches:
            after += value(moved, x, y).item() * len(x) / total
    return after - before


@contextmanager
def _prepared(
    model: nn.Module, loss: Loss, data: Data, batchnorm: str
) -> Iterator[tuple[nn.Module, dict[str, Tensor], list[Batch]]]:
    """A copy of the model, its trainable parameters, and the batches on their device, all checked."""
    _check_choice("batchnorm", batchnorm, ("eval", "train"))
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("the model has no trainable parameters; set requires_grad=True on those of interest")
    with evaluation_copy(model, batch_statistics=batchnorm == "train") as net, torch.no_grad():
        parameters: dict[str, Tensor] = {name: p for name, p in net.named_parameters() if name in trainable}
        device = parameters[trainable[0]].device
        batches = [(x.to(device), y.to(device)) for x, y in as_batches(data)]
        for position, (x, y) in enumerate(batches):
            value = loss(net(x), y)
            if value.ndim or not torch.isfinite(value):
                raise ValueError(f"batch {position}: the loss must be a finite scalar, got {value.cpu()}")
        yield net, parameters, batches


class _Mean(nn.Module):
    """A loss that tells curvlinops to weight batches by their size."""

    reduction = "mean"

    def __init__(self, loss: Loss):
        super().__init__()
        self.loss = loss

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.loss(prediction, target)


class _Hessian(HessianLinearOperator):
    """The Hessian of curvlinops, with the products of a batch by two reverse passes: H V is the pullback of ∇L at V.

    The ``jvp`` of ``jacrev`` that curvlinops takes, and ``torch.func.hessian``, are silently wrong in torch 2.15 where
    the scales of LayerNorm, InstanceNorm, or BatchNorm in train mode are parameters.
    """

    def _matmat_batch(self, X: Tensor, y: Tensor, M: list[Tensor]) -> list[Tensor]:
        names = {id(parameter): name for name, parameter in self._model_func.named_parameters()}
        parameters = {names[id(parameter)]: parameter.detach() for parameter in self._params}

        def value(moved: dict[str, Tensor]) -> Tensor:
            return self._loss_func(functional_call(self._model_func, moved, (X,)), y)

        pullback = vjp(grad(value), parameters)[1]
        vectors = dict(zip(parameters, M, strict=True))
        return list(vmap(pullback, in_dims=-1, out_dims=-1)(vectors)[0].values())


@contextmanager
def _operator(
    model: nn.Module, loss: Loss, data: Data, matrix: str, batchnorm: str, seed: int
) -> Iterator[tuple[_Hessian | GGNLinearOperator, dict[str, Tensor]]]:
    """The linear operator of a matrix, and the parameters it is over; torch's random state is seeded meanwhile.

    The one place that knows how curvlinops 3 wants a model: a module, and its parameters as a list.
    """
    _check_choice("matrix", matrix, MATRICES)
    with _plain_kernels(model), _prepared(model, loss, data, batchnorm) as (net, parameters, batches):
        operator = (_Hessian if matrix == "hessian" else GGNLinearOperator)(
            net,
            _Mean(loss),
            list(parameters.values()),
            batches,
            check_deterministic=False,  # it is: in eval mode, over a list of batches
            num_data=sum(len(x) for x, _ in batches),
        )
        cuda = operator.device.type == "cuda"
        generator = torch.cuda.default_generators[operator.device.index] if cuda else torch.default_generator
        generator.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", *TORCHSCRIPT)
            yield operator, parameters


@contextmanager
def _plain_kernels(model: nn.Module) -> Iterator[None]:
    """Without the fused kernels for attention and recurrence, which lack second derivatives or forward mode."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    libraries: list[Any] = [torch.backends.mkldnn, torch.backends.cudnn] if recurrent else []
    enabled, fast = [library.enabled for library in libraries], torch.backends.mha.get_fastpath_enabled()
    try:
        for library in libraries:
            library.enabled = False
        torch.backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for library, value in zip(libraries, enabled, strict=True):
            library.enabled = value
        torch.backends.mha.set_fastpath_enabled(fast)


def _check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


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
