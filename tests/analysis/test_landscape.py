"""Landscapes against plain evaluation that sets the parameters point by point, in float64."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from sklearn.decomposition import PCA
from torch import nn

from adalfl_lite.losses.network import LossNetwork
from analysis.landscape import (
    Line,
    Plane,
    Trajectory,
    barrier,
    interpolate,
    line,
    plane,
    plot_line,
    plot_plane,
    plot_trajectory,
    random_directions,
    trajectory,
)


def convnet(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(48, 4)).double()
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(16, 1, 6, 6).double() + 1)  # running statistics unlike those of the data below
    return model


def images(n=12, seed=1):
    torch.manual_seed(seed)
    return torch.randn(n, 1, 6, 6, dtype=torch.float64), torch.randint(4, (n,))


def learned_loss():
    return LossNetwork.classification(generator=torch.Generator().manual_seed(2)).double()


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


@torch.no_grad()
def plainly(model, loss, batches, directions, coefficients, batchnorm="eval"):
    """The loss at θ + Σ c_k d_k by setting parameters, and by torch's own running averages."""
    twin = copy.deepcopy(model).eval()
    for name, parameter in twin.named_parameters():
        for c, direction in zip(coefficients, directions, strict=True):
            if name in direction:
                parameter += float(c) * direction[name]
    for norm in norms(twin):
        norm.train(batchnorm != "eval")
    if batchnorm == "recalibrate":
        for norm in norms(twin):
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average
        for x, _ in batches:
            twin(x)
        twin.eval()
    values = [(len(x), loss(twin(x), y).item()) for x, y in batches]
    return sum(n * value for n, value in values) / sum(n for n, _ in values)


def agree(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [None, 1, 5])
@pytest.mark.parametrize("batchnorm", ["eval", "train", "recalibrate"])
@pytest.mark.parametrize("loss", [F.cross_entropy, learned_loss()], ids=["cross-entropy", "learned"])
def test_a_line_is_that_of_setting_parameters(loss, batchnorm, chunk_size):
    model, (x, y) = convnet(), images()
    batches, positions = [(x[:6], y[:6]), (x[6:], y[6:])], np.linspace(-1, 1, 7)
    (direction,) = random_directions(model, seed=3)
    found = line(model, loss, batches, direction, positions=positions, batchnorm=batchnorm, chunk_size=chunk_size)
    agree(found.losses, [plainly(model, loss, batches, [direction], [t], batchnorm) for t in positions])
    agree(found.positions, positions)
    assert np.ptp(found.losses) > 1e-3 * found.losses.max()


def test_what_to_do_about_batchnorm_matters():
    model, (x, y) = convnet(), images()
    batches = [(x[:6], y[:6]), (x[6:], y[6:])]
    values = [line(model, F.cross_entropy, batches, batchnorm=b).losses for b in ("eval", "train", "recalibrate")]
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert np.abs(values[a] - values[b]).max() > 1e-3


def test_a_batchnorm_layer_that_is_called_twice_is_recalibrated_to_the_mean_of_its_calls():
    class Twice(nn.Module):
        def __init__(self, calls):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.norm, self.last = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
            self.calls = calls

        def forward(self, x):
            return self.last(torch.stack([self.norm(self.first(x)) for _ in range(self.calls)]).mean(0))

    data = torch.randn(20, 5, dtype=torch.float64), torch.randint(3, (20,))
    once, twice = (
        line(Twice(n).double(), F.cross_entropy, data, batchnorm="recalibrate", positions=[0, 1]) for n in (1, 2)
    )
    agree(twice.losses, once.losses)


def test_a_plane_has_one_row_per_y():
    model, data, x, y = convnet(), images(), np.linspace(-1, 1, 4), np.linspace(0, 2, 3)
    directions = random_directions(model, 2)
    found = plane(model, F.cross_entropy, data, directions, x=x, y=y)
    agree(found.losses, [[plainly(model, F.cross_entropy, [data], directions, [a, b]) for a in x] for b in y])
    default = plane(model, F.cross_entropy, data, x=[0.5], y=[-0.5])
    agree(default.losses[0, 0], plainly(model, F.cross_entropy, [data], directions, [0.5, -0.5]))


def test_a_short_last_batch_counts_every_example_once():
    model, (x, y) = convnet(), images(11)
    whole, parts = ((x, y), [(x[:4], y[:4]), (x[4:8], y[4:8]), (x[8:], y[8:])])
    agree(line(model, F.cross_entropy, parts).losses, line(model, F.cross_entropy, whole).losses)
    agree(
        line(model, F.cross_entropy, iter(parts), batchnorm="train").losses[25],
        plainly(model, F.cross_entropy, parts, [], [], "train"),
    )


def test_single_precision_and_regression():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    data, loss = (torch.randn(20, 3), torch.randn(20, 2)), LossNetwork.regression()
    found = line(model, loss, data)
    (direction,) = random_directions(model)
    expected = [plainly(model, loss, [data], [direction], [t]) for t in found.positions]
    assert found.losses.dtype == np.float64
    np.testing.assert_allclose(found.losses, expected, rtol=1e-5, atol=1e-8)


def test_a_model_and_a_loss_that_cannot_be_vectorised_take_a_loop():
    def loss(prediction, target):
        return prediction.sum() * 0 + float(F.cross_entropy(prediction, target))

    model, data = convnet(), images()
    with pytest.warns(RuntimeWarning, match="point by point"):
        found = line(model, loss, data)
    agree(found.losses, line(model, F.cross_entropy, data).losses)


def test_random_directions_are_filter_normalised():
    model = convnet()
    first, second = random_directions(model, 2, seed=4)
    parameters = dict(model.named_parameters())
    assert first.keys() == second.keys() == parameters.keys()
    for name, weight in parameters.items():
        if weight.ndim == 1:
            assert not first[name].any()
        for filter, moved in zip(weight, first[name], strict=True):
            if weight.ndim > 1:
                assert moved.norm().item() == pytest.approx(filter.norm().item(), rel=1e-12)
    flat = [torch.cat([t.flatten() for t in d.values()]) for d in (first, second)]
    assert abs(F.cosine_similarity(*flat, dim=0)) < 0.3
    again = random_directions(model, 2, seed=4)[1]
    assert all(torch.equal(second[name], again[name]) for name in second)


def test_frozen_parameters_stay():
    model = convnet()
    model[0].requires_grad_(False)
    assert not any(name.startswith("0.") for name in random_directions(model)[0])


def test_interpolation_meets_both_checkpoints_with_their_running_statistics():
    start, end, data = convnet(0), convnet(7), images()
    end[1].running_var *= 3
    path = interpolate(start, F.cross_entropy, data, start.state_dict(), end.state_dict(), positions=[0, 0.3, 1])
    middle = copy.deepcopy(start)
    mixed = {k: v + 0.3 * (end.state_dict()[k] - v) for k, v in start.state_dict().items() if v.is_floating_point()}
    middle.load_state_dict(mixed, strict=False)
    agree(path.losses, [plainly(model, F.cross_entropy, [data], [], []) for model in (start, middle, end)])
    assert len(interpolate(start, F.cross_entropy, data, start.state_dict(), end.state_dict()).positions) == 25


def test_barriers():
    t = np.array([0, 0.25, 1])
    assert barrier(Line(t, np.array([1.0, 4.0, 3.0]))) == pytest.approx(2.5)
    assert barrier(Line(t, np.array([1.0, 0.0, 3.0]))) == 0
    assert barrier(Line(2 * t - 1, np.array([1.0, 4.0, 3.0]))) == pytest.approx(2.5)
    assert np.isnan(barrier(Line(t, np.array([1.0, np.nan, 3.0]))))
    with pytest.raises(ValueError, match="at least 2 positions"):
        barrier(Line(t[:1], t[:1]))


def walk(count, seed=0):
    """Checkpoints of a random walk."""
    model, generator = convnet(), torch.Generator().manual_seed(seed)
    checkpoints = [copy.deepcopy(model.state_dict())]
    for _ in range(count - 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).double()
        checkpoints.append(copy.deepcopy(model.state_dict()))
    return model, checkpoints


def test_a_trajectory_is_projected_as_by_scikit_learn():
    model, checkpoints = walk(8)
    path = trajectory(model, checkpoints)
    names = [name for name, _ in model.named_parameters()]
    matrix = np.stack([torch.cat([c[name].flatten() for name in names]).numpy() for c in checkpoints])
    reference = PCA(2).fit(matrix)
    agree(path.explained_variance, reference.explained_variance_ratio_)
    directions = np.stack([torch.cat([d[name].flatten() for name in names]).numpy() for d in path.directions])
    agree(directions @ directions.T, np.eye(2))
    agree(np.abs(directions @ reference.components_.T), np.eye(2))
    agree(path.coordinates, (matrix - matrix[-1]) @ directions.T)
    x, y = path.grid(5, margin=0.5)
    low, high = path.coordinates.min(0), path.coordinates.max(0)
    agree([x[0], y[0]], low - 0.5 * (high - low))
    agree([x[-1], y[-1]], high + 0.5 * (high - low))


def test_three_checkpoints_lie_in_their_plane():
    model, checkpoints = walk(3)
    path = trajectory(model, checkpoints)
    for checkpoint, (x, y) in zip(checkpoints, path.coordinates, strict=True):
        model.load_state_dict(checkpoint)
        at = plane(convnet(3), F.cross_entropy, images(), path.directions, x=[x], y=[y], origin=path.origin)
        running = copy.deepcopy(model)
        running.load_state_dict({k: v for k, v in path.origin.items() if "running" in k}, strict=False)
        agree(at.losses[0, 0], plainly(running, F.cross_entropy, [images()], [], []))


def test_progress_is_shown_on_demand(capsys):
    line(convnet(), F.cross_entropy, images())
    assert capsys.readouterr().err == ""
    line(convnet(), F.cross_entropy, images(), progress=True)
    assert "51/51" in capsys.readouterr().err


CHECKPOINTS = walk(4)[1]
FUNCTIONS = {
    "random_directions": lambda model, data: random_directions(model),
    "line": lambda model, data: line(model, F.cross_entropy, data, batchnorm="train"),
    "plane": lambda model, data: plane(model, F.cross_entropy, data, x=[0, 1], y=[0, 1], batchnorm="recalibrate"),
    "interpolate": lambda model, data: interpolate(model, F.cross_entropy, data, CHECKPOINTS[0], CHECKPOINTS[3]),
    "trajectory": lambda model, data: trajectory(model, CHECKPOINTS),
    "a loop": lambda model, data: line(model, F.cross_entropy, data, chunk_size=1, batchnorm="recalibrate"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_model_is_left_as_it_was(name, unchanged):
    model, data = convnet(), images()
    model[5].eval()
    model[0].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    with unchanged(model):
        FUNCTIONS[name](model, data)


def test_bad_input_is_named():
    model, (x, y) = convnet(), images()
    (d,) = random_directions(model)
    state = model.state_dict()
    for words, act in {
        "nothing": lambda: line(model, F.cross_entropy, (x, y), {"nothing": x}),
        r"shape \(2,\)": lambda: line(model, F.cross_entropy, (x, y), {"0.bias": torch.zeros(2)}),
        "NaN": lambda: line(model, F.cross_entropy, (x, y), {**d, "0.bias": d["0.bias"] * torch.nan}),
        "origin": lambda: line(model, F.cross_entropy, (x, y), d, origin={"0.bias": torch.zeros(2)}),
        "must be a scalar": lambda: line(model, lambda p, t: p.sum(1), (x, y)),
        "batch 0": lambda: line(model, F.cross_entropy, (x * torch.inf, y)),
        "no data": lambda: line(model, F.cross_entropy, []),
        "'freeze'": lambda: line(model, F.cross_entropy, (x, y), batchnorm="freeze"),
        "chunk_size must be at least 1, got 0": lambda: line(model, F.cross_entropy, (x, y), chunk_size=0),
        "positions must be": lambda: line(model, F.cross_entropy, (x, y), positions=[]),
        "needs 2 directions, got 1": lambda: plane(model, F.cross_entropy, (x, y), [d]),
        "end lacks the parameters": lambda: interpolate(model, F.cross_entropy, (x, y), state, {}),
        "at least 3 checkpoints, got 2": lambda: trajectory(model, [state, state]),
        "span no plane": lambda: trajectory(model, [state, state, state]),
        "checkpoint 1 lacks": lambda: trajectory(model, [state, {}, state]),
        "only biases": lambda: random_directions(nn.BatchNorm1d(3)),
        "no trainable parameters": lambda: random_directions(nn.ReLU()),
    }.items():
        with pytest.raises(ValueError, match=words):
            act()


def test_figures():
    figure, (first, second) = plt.subplots(1, 2)
    axis = np.linspace(-1, 1, 5)
    losses = axis**2 + axis[:, None] ** 2
    assert plot_line(Line(axis, axis**2), first, label="a") is first
    np.testing.assert_array_equal(first.get_lines()[0].get_ydata(), axis**2)
    assert plot_plane(Plane(axis, axis, losses + 1), second, log=True) is second
    path = Trajectory(np.array([[1, 1], [0.5, 0], [0, 0]]), np.array([0.9, 0.05]), ({}, {}), {})
    assert plot_trajectory(path, second) is second
    assert "5.0%" in second.get_ylabel()
    np.testing.assert_array_equal(second.get_lines()[0].get_xydata(), path.coordinates)
    with pytest.raises(ValueError, match="log=False"):
        plot_plane(Plane(axis, axis, losses - 1), second, log=True)
    with pytest.raises(ValueError, match="finite"):
        plot_plane(Plane(axis, axis, losses * np.nan), second)
    plt.close(figure)
