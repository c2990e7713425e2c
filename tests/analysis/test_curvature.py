"""Curvature against dense matrices from torch.func, in float64."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from scipy.sparse.linalg import ArpackNoConvergence
from scipy.stats import norm as normal
from torch import nn
from torch.autograd import functional as AF
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from adalfl_lite.losses.network import LossNetwork
from analysis.curvature import (
    SpectralDensity,
    plot_spectral_density,
    sharpness,
    spectral_density,
    top_eigenpairs,
    trace,
)


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).double()


def convnet(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(8, 3)).double()
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(16, 1, 6, 6).double() + 1)  # running statistics unlike those of the data below
    return model


def data(model, n=15, seed=1):
    torch.manual_seed(seed)
    shape = (1, 6, 6) if isinstance(model[0], nn.Conv2d) else (5,)
    return torch.randn(n, *shape, dtype=torch.float64), torch.randint(3, (n,))


def learned_loss():
    network = LossNetwork.classification(generator=torch.Generator().manual_seed(2)).double()
    return lambda prediction, target: 30 * network(prediction, target)


NORMALISATIONS = nn.BatchNorm2d | nn.InstanceNorm2d | nn.LayerNorm | nn.GroupNorm
LOSSES = pytest.mark.parametrize("loss", [F.cross_entropy, learned_loss()], ids=["cross-entropy", "learned"])
MATRIX = pytest.mark.parametrize("matrix", ["hessian", "ggn"])


def dense(model, loss, batches, matrix="hessian", batchnorm="eval"):
    """The whole matrix from a function of one vector of parameters, by double backward if there are normalisations.

    There ``torch.func.hessian`` of torch 2.15 is wrong: it is not even symmetric.
    """
    normalised = any(isinstance(module, NORMALISATIONS) for module in model.modules())
    double, single = (AF.hessian, AF.jacobian) if normalised else (torch.func.hessian, torch.func.jacrev)
    net = copy.deepcopy(model).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and batchnorm == "train":
            module.train()
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    names, shapes = zip(*((name, p.shape) for name, p in net.named_parameters() if p.requires_grad), strict=True)
    theta = torch.cat([p.detach().flatten() for p in net.parameters() if p.requires_grad])

    def outputs(vector, x):
        parts = vector.split([shape.numel() for shape in shapes])
        parameters = {name: part.reshape(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return functional_call(net, parameters, (x,))

    def derivative(engine, function, at):
        return engine(function, at) if normalised else engine(function)(at)

    total = 0
    for x, y in batches:
        if matrix == "hessian":
            found = derivative(double, lambda vector, x=x, y=y: loss(outputs(vector, x), y), theta)
        else:
            jacobian = derivative(single, lambda vector, x=x: outputs(vector, x), theta).flatten(0, 1)
            prediction = outputs(theta, x)
            inner = derivative(double, lambda p, y=y: loss(p, y), prediction).reshape(2 * (prediction.numel(),))
            found = jacobian.T @ inner @ jacobian
        total = total + found.detach() * len(x) / sum(len(x) for x, _ in batches)
    return total


def flat(vector):
    return torch.cat([part.flatten() for part in vector.values()])


@LOSSES
@MATRIX
@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
def test_eigenpairs_are_those_of_the_dense_matrix(loss, matrix, which):
    model = mlp()
    x, y = data(model)
    batches = [(x[:10], y[:10]), (x[10:], y[10:])]
    if (which, matrix) == ("smallest", "ggn") and loss is F.cross_entropy:
        pytest.skip("its smallest eigenvalues are zero, of high multiplicity")
    a = dense(model, loss, batches, matrix)
    values = torch.linalg.eigvalsh(a)
    assert values[-1] > 1e-4
    order = {"largest": -values, "smallest": values, "magnitude": -values.abs()}[which].argsort()
    pairs = top_eigenpairs(model, loss, batches, 2, which=which, matrix=matrix, tolerance=1e-10)
    np.testing.assert_allclose(pairs.values, values[order[:2]], rtol=1e-9)
    vectors = torch.stack([flat(vector) for vector in pairs.vectors])
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(2).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(vectors @ a, torch.tensor(pairs.values)[:, None] * vectors, rtol=0, atol=1e-8)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert {name: part.shape for name, part in pairs.vectors[0].items()} == shapes


@pytest.mark.parametrize("batchnorm", ["eval", "train"])
@MATRIX
def test_batchnorm_by_its_running_or_by_the_batch_statistics(batchnorm, matrix):
    model = convnet()
    x, y = data(model)
    batches = [(x[:10], y[:10]), (x[10:], y[10:])]
    a = dense(model, F.cross_entropy, batches, matrix, batchnorm)
    pairs = top_eigenpairs(model, F.cross_entropy, batches, 2, matrix=matrix, batchnorm=batchnorm, tolerance=1e-10)
    np.testing.assert_allclose(pairs.values, torch.linalg.eigvalsh(a).flip(0)[:2], rtol=1e-9)
    found = trace(model, F.cross_entropy, batches, method="exact", matrix=matrix, batchnorm=batchnorm)
    assert found.value == pytest.approx(a.trace().item(), rel=1e-9)


@MATRIX
@pytest.mark.parametrize(
    "normalisation", [nn.LayerNorm([2, 4, 4]), nn.InstanceNorm2d(2, affine=True), nn.GroupNorm(2, 2)], ids=type
)
def test_other_normalisations(normalisation, matrix):
    model = convnet()
    model[1] = normalisation.double()
    a = dense(model, F.cross_entropy, [data(model)], matrix)
    pairs = top_eigenpairs(model, F.cross_entropy, data(model), 2, matrix=matrix, tolerance=1e-10)
    np.testing.assert_allclose(pairs.values, torch.linalg.eigvalsh(a).flip(0)[:2], rtol=1e-9)
    found = trace(model, F.cross_entropy, data(model), method="exact", matrix=matrix)
    assert found.value == pytest.approx(a.trace().item(), rel=1e-9)


@LOSSES
@MATRIX
def test_the_exact_trace_is_that_of_the_dense_matrix(loss, matrix):
    model = mlp()
    expected = dense(model, loss, [data(model)], matrix).trace().item()
    for products in (7, 12, 1000):
        found = trace(model, loss, data(model), method="exact", products=products, matrix=matrix)
        assert (found.value, found.standard_error) == (pytest.approx(expected, rel=1e-10), 0)


def test_hutchinson_is_the_mean_over_random_signs():
    model = mlp()
    a = dense(model, F.cross_entropy, [data(model)])
    found = trace(model, F.cross_entropy, data(model), method="hutchinson", products=5, repeats=3, seed=8)
    torch.manual_seed(8)
    signs = [torch.empty(len(a)).double().bernoulli_(0.5) * 2 - 1 for _ in range(15)]
    estimates = np.array([(v @ a @ v).item() for v in signs]).reshape(3, 5).mean(1)
    assert found.value == pytest.approx(estimates.mean(), rel=1e-9)
    assert found.standard_error == pytest.approx(estimates.std(ddof=1) / 3**0.5, rel=1e-9)


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
@LOSSES
def test_trace_estimates_are_within_their_error(loss, method):
    model = mlp()
    expected = dense(model, loss, [data(model)]).trace().item()
    found = trace(model, loss, data(model), method=method, products=3, repeats=60)
    assert 0 < found.standard_error < 0.3 * abs(expected)
    assert abs(found.value - expected) < 4 * found.standard_error


def test_hutch_plus_plus_is_exact_where_the_rank_is_low():
    model = mlp()
    x, y = data(model, 2)  # rank of the GGN at most 2 examples times 3 classes less one
    expected = dense(model, F.cross_entropy, [(x, y)], "ggn").trace().item()
    found = trace(model, F.cross_entropy, (x, y), matrix="ggn", products=12, repeats=1)
    assert found.value == pytest.approx(expected, rel=1e-10)
    assert np.isnan(found.standard_error)


@LOSSES
@MATRIX
def test_the_spectral_density_is_that_of_the_dense_matrix(loss, matrix):
    model = mlp()
    values, vectors = torch.linalg.eigh(dense(model, loss, [data(model)], matrix))
    nodes, repeats = 40, 3
    found = spectral_density(model, loss, data(model), matrix=matrix, nodes=nodes, repeats=repeats, seed=5)
    low, high = values[0].item(), values[-1].item()
    margin = 0.05 * (high - low)
    np.testing.assert_allclose(found.eigenvalues[[0, -1]], [low - margin, high + margin], rtol=1e-6, atol=1e-9)
    # what the starting vectors see of the spectrum, with the same Gaussian bump on every eigenvalue
    torch.manual_seed(5)
    starts = F.normalize(torch.stack([torch.randn(len(values), dtype=torch.float64) for _ in range(repeats)]))
    weights = (starts @ vectors).square().mean(0).numpy()
    sigma = 1.1 * (high - low) / (nodes - 1) / (8 * np.log(3)) ** 0.5
    expected = normal.pdf(found.eigenvalues[:, None], values, sigma) @ weights
    np.testing.assert_allclose(found.density, expected, atol=1e-3 * expected.max())
    assert np.trapezoid(found.density, found.eigenvalues) == pytest.approx(1, abs=1e-3)


def by_hand(model, loss, batches, rho, adaptive):
    """The ascent step by backward() and vectors."""
    twin = copy.deepcopy(model).eval()
    total = sum(len(x) for x, _ in batches)

    def mean():
        return sum(len(x) * loss(twin(x), y) for x, y in batches) / total

    before = mean()
    before.backward()
    theta = parameters_to_vector(twin.parameters()).detach()
    g = torch.cat([p.grad.flatten() for p in twin.parameters()])
    t = theta.abs() if adaptive else torch.ones_like(theta)
    vector_to_parameters(theta + rho * t**2 * g / (t * g).norm(), twin.parameters())
    return (mean() - before).item()


@LOSSES
@pytest.mark.parametrize("make", [mlp, convnet])
def test_sharpness_by_hand(make, loss):
    model = make()
    x, y = data(model)
    batches = [(x[:10], y[:10]), (x[10:], y[10:])]
    assert sharpness(model, loss, batches) == pytest.approx(by_hand(model, loss, batches, 0.05, False), rel=1e-9)
    assert sharpness(model, loss, batches, adaptive=True) == pytest.approx(
        by_hand(model, loss, batches, 0.5, True), rel=1e-9
    )
    assert sharpness(model, loss, batches, 0.2) > 1.5 * sharpness(model, loss, batches, 0.1) > 0


def test_adaptive_sharpness_does_not_see_a_rescaling():
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in scaled[0].parameters():
            parameter *= 8
        scaled[2].weight /= 8
    first, second = (sharpness(m, F.cross_entropy, data(model), adaptive=True) for m in (model, scaled))
    assert second == pytest.approx(first, rel=1e-10)
    first, second = (sharpness(m, F.cross_entropy, data(model)) for m in (model, scaled))
    assert second > 2 * first


def test_a_quadratic_is_known():
    model = nn.Linear(4, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    x = torch.diag(torch.tensor([2.0, 1, 0, 3]).double())

    def loss(prediction, target):  # the Hessian is XᵀX/4 = diag(1, 1/4, 0, 9/4)
        return 0.5 * F.mse_loss(prediction, target)

    batch = (x, torch.ones(4, 1).double())
    np.testing.assert_allclose(top_eigenpairs(model, loss, batch, 2).values, [2.25, 1], rtol=1e-8)
    assert trace(model, loss, batch, method="exact").value == pytest.approx(3.5)
    gradient = torch.tensor([-0.5, -0.25, 0, -0.75]).double()
    step = 0.1 * gradient / gradient.norm()
    rise = gradient @ step + 0.5 * step @ torch.diag(torch.tensor([1, 0.25, 0, 2.25])).double() @ step
    assert sharpness(model, loss, batch, 0.1) == pytest.approx(rise.item(), rel=1e-12)
    assert sharpness(model, loss, batch, adaptive=True) == 0  # nothing can move: the weights are zero


def test_single_precision_agrees_with_double():
    model = mlp()
    x, y = data(model)
    single = copy.deepcopy(model).float(), F.cross_entropy, (x.float(), y)
    double = model, F.cross_entropy, (x, y)
    pairs = top_eigenpairs(*single, 2)
    assert pairs.values.dtype == np.float64 and flat(pairs.vectors[0]).dtype == torch.float32
    np.testing.assert_allclose(pairs.values, top_eigenpairs(*double, 2).values, rtol=1e-5)
    for function in (sharpness, lambda *arguments: trace(*arguments, method="exact").value):
        assert function(*single) == pytest.approx(function(*double), rel=1e-3)
    assert spectral_density(*single, nodes=8).density.dtype == np.float64


def test_frozen_parameters_take_no_part():
    model = mlp()
    model[0].requires_grad_(False)
    a = dense(model, F.cross_entropy, [data(model)])
    assert a.shape == (21, 21)
    pairs = top_eigenpairs(model, F.cross_entropy, data(model))
    assert list(pairs.vectors[0]) == ["3.weight", "3.bias"]
    np.testing.assert_allclose(pairs.values, torch.linalg.eigvalsh(a)[-1:], rtol=1e-6)


def test_seeds_fix_the_randomness():
    model = mlp()
    for function in (trace, lambda *a, seed: spectral_density(*a, nodes=8, seed=seed).density[500]):
        first, again, other = (function(model, F.cross_entropy, data(model), seed=seed) for seed in (1, 1, 2))
        assert first == again != other


FUNCTIONS = {
    "top_eigenpairs": lambda model, batch: top_eigenpairs(model, F.cross_entropy, batch),
    "trace": lambda model, batch: trace(model, F.cross_entropy, batch, batchnorm="train"),
    "spectral_density": lambda model, batch: spectral_density(model, F.cross_entropy, batch, nodes=4),
    "sharpness": lambda model, batch: sharpness(model, F.cross_entropy, batch, batchnorm="train"),
    "adaptive_sharpness": lambda model, batch: sharpness(model, F.cross_entropy, batch, adaptive=True),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_model_is_left_as_it_was(name, unchanged):
    model = convnet()
    batch = data(model)
    model[5].eval()
    model[0].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    with unchanged(model), torch.no_grad():
        FUNCTIONS[name](model, batch)


def test_bad_input_is_named():
    model = mlp()
    x, y = data(model)
    given = model, F.cross_entropy, (x, y)
    for words, act in {
        "which must be one of largest, smallest, magnitude; got 'top'": lambda: top_eigenpairs(*given, which="top"),
        "'fisher'": lambda: top_eigenpairs(*given, matrix="fisher"),
        "batchnorm must be one of eval, train": lambda: sharpness(*given, batchnorm="recalibrate"),
        "count must be at least 1 and less than the 57 parameters, got 57": lambda: top_eigenpairs(*given, 57),
        "'girard'": lambda: trace(*given, method="girard"),
        "multiple of 3": lambda: trace(*given, products=10),
        "less than the 57": lambda: trace(*given, products=60),
        "repeats must be at least 1": lambda: trace(*given, repeats=0),
        "nodes must be between 2 and the 57": lambda: spectral_density(*given, nodes=58),
        "use fewer nodes": lambda: spectral_density(model, lambda p, t: p.mean() * 0, (x, y), nodes=5),
        "rho must be positive, got 0": lambda: sharpness(*given, 0),
        "finite scalar": lambda: sharpness(model, lambda p, t: p.sum(1), (x, y)),
        "batch 0: the loss must be a finite": lambda: trace(model, lambda p, t: p.sum() / 0, (x, y)),
        "NaN": lambda: trace(model, F.cross_entropy, (x * torch.nan, y)),
        "no data": lambda: trace(model, F.cross_entropy, []),
        "no trainable": lambda: trace(mlp().requires_grad_(False), F.cross_entropy, (x, y)),
    }.items():
        with pytest.raises(ValueError, match=words):
            act()


def test_a_tolerance_that_is_not_met(monkeypatch):
    def eigsh(*arguments, **options):
        raise ArpackNoConvergence("ARPACK error -1: %s", np.zeros(3), np.zeros((57, 3)))

    monkeypatch.setattr("analysis.curvature.eigsh", eigsh)
    with pytest.raises(RuntimeError, match="3 of 4 eigenvalues met the tolerance 0.0001; use a larger one"):
        model = mlp()
        top_eigenpairs(model, F.cross_entropy, data(model), 4)


def test_a_figure():
    figure, ax = plt.subplots()
    axis = np.linspace(-1, 4, 50)
    assert plot_spectral_density(SpectralDensity(axis, np.exp(-(axis**2))), ax, label="a") is ax
    assert ax.get_yscale() == "log"
    np.testing.assert_array_equal(ax.get_lines()[0].get_xdata(), axis)
    plt.close(figure)


class Pooled(nn.Module):
    """A sequence model, and a linear map of the mean of its outputs."""

    def __init__(self, sequence, width):
        super().__init__()
        self.sequence, self.out = sequence, nn.Linear(width, 2)

    def forward(self, x):
        states = self.sequence(x)
        return self.out((states[0] if isinstance(states, tuple) else states).mean(1))


@MATRIX
@pytest.mark.parametrize("kind", ["attention", "recurrence"])
def test_attention_and_recurrence_have_a_curvature(kind, matrix):
    torch.manual_seed(0)
    attention = partial(nn.TransformerEncoderLayer, 2, 1, 3, batch_first=True)
    model = Pooled(*((attention(), 2) if kind == "attention" else (nn.LSTM(2, 3, batch_first=True), 3)))
    batch = torch.randn(6, 3, 2), torch.randint(2, (6,))
    found = top_eigenpairs(model, F.cross_entropy, batch, 2, matrix=matrix, tolerance=1e-6)
    names = list(dict(model.named_parameters()))
    vectors = torch.stack([torch.cat([v[n].flatten() for n in names]) for v in found.vectors]).double()
    model.double().eval()
    flat, sizes = parameters_to_vector(model.parameters()), [p.shape for p in model.parameters()]

    def prediction(vector):
        parts = vector.split([size.numel() for size in sizes])
        parameters = {n: p.view(s) for n, p, s in zip(names, parts, sizes, strict=True)}
        return functional_call(model, parameters, batch[0].double())

    def gradient(vector):
        value = F.cross_entropy(prediction(vector), batch[1])
        return torch.autograd.grad(value, vector, create_graph=True)[0]

    def product(v, size=1e-5):  # by central differences
        if matrix == "hessian":
            return (gradient(flat + size * v) - gradient(flat - size * v)).detach() / (2 * size)
        change = ((prediction(flat + size * v) - prediction(flat - size * v)) / (2 * size)).detach()
        p = prediction(flat).softmax(1).detach()
        weighted = p * change - p * (p * change).sum(1, keepdim=True)
        return torch.autograd.grad((prediction(flat) * weighted).sum() / len(p), flat)[0]

    flat = flat.detach().requires_grad_()
    for value, vector in zip(found.values, vectors, strict=True):
        assert (product(vector) - value * vector).norm() < 1e-3 * abs(value) + 1e-4
    assert torch.backends.mkldnn.enabled and torch.backends.mha.get_fastpath_enabled()
