"""Gradients, their noise and influences, each against an independent computation in float64."""

import copy

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import DataLoader, TensorDataset

from adalfl_lite.losses.network import LossNetwork
from analysis.gradients import (
    gradient_cosine,
    gradient_noise,
    gradient_norms,
    influence,
    layers,
    mean_gradients,
    per_sample_gradients,
    plot_layers,
)
from tests.shorthand import forward_mode_step

matplotlib.use("Agg")


def convnet(seed=0):
    torch.manual_seed(seed)
    return (
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4))
        .double()
        .train()
    )


def images(n=12, seed=1):
    torch.manual_seed(seed)
    return torch.randn(n, 1, 6, 6, dtype=torch.float64), torch.randint(4, (n,))


def learned_loss(seed=2):
    return LossNetwork.classification(generator=torch.Generator().manual_seed(seed)).double()


def backward(model, loss, x, y):
    """The gradient by plain backward, as one vector."""
    model.zero_grad()
    loss(model(x), y).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]).clone()


def one_by_one(model, loss, x, y):
    twin = copy.deepcopy(model).eval()
    return torch.stack([backward(twin, loss, x[i : i + 1], y[i : i + 1]) for i in range(len(x))])


@pytest.mark.parametrize("training", [True, False])
def test_mean_gradients_are_those_of_backward(training):
    model, (x, y) = convnet().train(training), images()
    losses = [F.cross_entropy, learned_loss()]
    for gradient, loss in zip(mean_gradients(model, losses, (x, y)), losses, strict=True):
        expected = backward(copy.deepcopy(model), loss, x, y)
        torch.testing.assert_close(torch.cat([g.flatten() for g in gradient.values()]), expected, rtol=0, atol=1e-14)


def test_a_parameter_that_the_loss_does_not_reach_has_a_gradient_of_zero():
    model, (x, y) = convnet().eval(), images()
    model.register_parameter("unused", nn.Parameter(torch.ones(3).double()))
    (found,) = mean_gradients(model, [F.cross_entropy], (x, y))
    assert torch.equal(found["unused"], torch.zeros(3).double()) and found["0.weight"].norm() > 0


def test_a_loader_with_a_short_last_batch_counts_every_example_once():
    model, (x, y) = convnet().eval(), images(11)
    (whole,) = mean_gradients(model, [F.cross_entropy], (x, y))
    (parts,) = mean_gradients(model, [F.cross_entropy], [(x[:4], y[:4]), (x[4:8], y[4:8]), (x[8:], y[8:])])
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=0, atol=1e-14)


def test_another_state_is_used_in_place_of_the_models():
    model, other, data = convnet(0), convnet(5), images()
    (given,) = mean_gradients(model, [F.cross_entropy], data, other.state_dict())
    (own,) = mean_gradients(other, [F.cross_entropy], data)
    assert all(torch.equal(given[name], own[name]) for name in own)
    with pytest.raises(ValueError, match="nothing.weight"):
        mean_gradients(model, [F.cross_entropy], data, {"nothing.weight": torch.zeros(1)})


def test_norms_per_layer():
    model, data = convnet(), images()
    frame = gradient_norms(model, F.cross_entropy, data).set_index("layer")
    twin = copy.deepcopy(model)
    backward(twin, F.cross_entropy, *data)
    assert list(frame.index) == ["0", "1", "5"] == list(layers(model))
    for layer, row in frame.iterrows():
        module = twin[int(layer)]
        g, w = (torch.cat([t.flatten() for t in ts]).norm().item() for ts in
                ([p.grad for p in module.parameters()], list(module.parameters())))  # fmt: skip
        assert row.tolist() == pytest.approx([sum(p.numel() for p in module.parameters()), g, w, g / w], rel=1e-12)


def test_frozen_parameters_take_no_part():
    model = convnet()
    model[0].requires_grad_(False)
    assert list(gradient_norms(model, F.cross_entropy, images()).layer) == ["1", "5"]
    with pytest.raises(ValueError, match="no trainable parameters"):
        gradient_norms(model.requires_grad_(False), F.cross_entropy, images())


@pytest.mark.parametrize("chunk_size", [1, 5, 64])
@pytest.mark.parametrize("loss", [F.cross_entropy, learned_loss()], ids=["cross-entropy", "learned"])
def test_per_sample_gradients_are_those_of_a_loop(chunk_size, loss):
    model, (x, y) = convnet(), images()
    result = per_sample_gradients(model, loss, (x, y), chunk_size=chunk_size)
    torch.testing.assert_close(result, one_by_one(model, loss, x, y), rtol=0, atol=1e-14)


def test_an_anchored_loss_network_in_regression():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    loss = LossNetwork.regression().double()
    torch.testing.assert_close(
        per_sample_gradients(model, loss, (x, y)), one_by_one(model, loss, x, y), rtol=0, atol=1e-14
    )


def test_noise_is_that_of_the_two_batch_sizes_of_mccandlish():
    model, (x, y) = convnet(), images(20)
    data = [(x[:9], y[:9]), (x[9:], y[9:])]
    noise = gradient_noise(model, F.cross_entropy, data, chunk_size=4)
    g = one_by_one(model, F.cross_entropy, x, y)
    small, big, n = g.square().sum(1).mean().item(), g.mean(0).square().sum().item(), len(g)
    assert noise.squared_norm == pytest.approx((n * big - small) / (n - 1), rel=1e-10)
    assert noise.trace == pytest.approx((small - big) / (1 - 1 / n), rel=1e-10)
    assert noise.trace == pytest.approx(np.trace(np.cov(g.numpy().T)), rel=1e-10)
    assert noise.noise_scale == pytest.approx(noise.trace / noise.squared_norm)
    assert noise.signal_to_noise == pytest.approx((noise.squared_norm / noise.trace) ** 0.5)
    assert noise.examples == n
    by_layer = gradient_noise(model, F.cross_entropy, data, by_layer=True)
    assert by_layer[["squared_norm", "trace"]].sum().tolist() == pytest.approx([noise.squared_norm, noise.trace])


def test_noise_recovers_a_known_gaussian():
    # f(x) = x·θ summed, loss = f: the gradient of example i is x_i, so G and Σ are the mean and covariance of x
    model = nn.Linear(4, 1, bias=False).double()
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.tensor([1.0, 0, 0, 0]), 3.0
    estimates = []
    for _ in range(200):
        x = (mean + std * torch.randn(50, 4, generator=generator)).double()
        estimates.append(gradient_noise(model, lambda p, y: p.mean(), (x, torch.zeros(50)), chunk_size=50))
    # tr Σ = 36 and |G|² = 1, without bias: the naive ‖ḡ‖² would be 1 + 36/50 = 1.72
    assert np.mean([e.trace for e in estimates]) == pytest.approx(36, abs=0.6)
    assert np.mean([e.squared_norm for e in estimates]) == pytest.approx(1, abs=0.25)


def test_a_gradient_without_noise_and_one_without_signal():
    model = nn.Linear(2, 1, bias=False).double()
    same = torch.ones(4, 2).double(), torch.zeros(4)
    assert gradient_noise(model, lambda p, y: p.mean(), same).noise_scale == pytest.approx(0, abs=1e-15)
    opposed = torch.tensor([[1.0, 0], [-1, 0]]).double(), torch.zeros(2)
    noise = gradient_noise(model, lambda p, y: p.mean(), opposed)
    assert (noise.noise_scale, noise.signal_to_noise) == (float("inf"), 0)
    with pytest.raises(ValueError, match="at least 2"):
        gradient_noise(model, lambda p, y: p.mean(), (torch.ones(1, 2).double(), torch.zeros(1)))


def test_cosine_of_train_and_validation():
    model, train, valid = convnet(), images(seed=1), images(seed=2)
    a, b = (backward(copy.deepcopy(model), F.cross_entropy, *data) for data in (train, valid))
    assert gradient_cosine(model, F.cross_entropy, train, valid) == pytest.approx(F.cosine_similarity(a, b, 0).item())
    assert gradient_cosine(model, F.cross_entropy, train, train) == pytest.approx(1, abs=1e-15)
    opposite = gradient_cosine(model, F.cross_entropy, train, train, valid_loss=lambda p, y: -2 * F.cross_entropy(p, y))
    assert opposite == pytest.approx(-1, abs=1e-15)


@pytest.mark.parametrize("training", [True, False])
def test_the_output_tangent_is_a_finite_difference(training):
    model, train, valid = convnet().train(training), images(seed=1), images(seed=2)
    model[3] = nn.AvgPool2d(2)
    model[2] = nn.Tanh()
    alpha, h = 0.3, 1e-5
    u = influence(model, learned_loss(), F.cross_entropy, train, valid, alpha).output_tangent
    v = backward(copy.deepcopy(model), F.cross_entropy, *valid)
    theta = parameters_to_vector(model.parameters()).detach()

    def moved(amount):
        twin = copy.deepcopy(model)
        vector_to_parameters(theta - amount * alpha * v, twin.parameters())
        return twin(train[0]).detach()

    torch.testing.assert_close(u, (moved(h) - moved(-h)) / (2 * h), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_taken_after_the_step_the_tangent_is_the_one_of_the_meta_gradient(training):
    model, network, train, valid = convnet().train(training), learned_loss(), images(seed=1), images(seed=2)
    after = copy.deepcopy(model)
    optimizer = torch.optim.SGD(after.parameters(), lr=0.5)
    step = forward_mode_step(after, network, optimizer, train, valid, F.cross_entropy)
    result = influence(model, network, F.cross_entropy, train, valid, 0.5, meta_state=after.state_dict())
    torch.testing.assert_close(result.output_tangent, step.output_tangent, rtol=0, atol=1e-15)
    torch.testing.assert_close(result.prediction, step.prediction, rtol=0, atol=1e-15)
    assert step.output_tangent.abs().max() > 1e-3


def test_influences_sum_to_the_change_of_the_task_loss():
    model, network, train, valid = convnet(), learned_loss(), images(seed=1), images(seed=2)
    alpha = 1e-5
    result = influence(model, network, F.cross_entropy, train, valid, alpha)
    after = copy.deepcopy(model)
    (gradient,) = mean_gradients(model, [network], train)
    with torch.no_grad():
        for name, p in after.named_parameters():
            p -= alpha * gradient[name]
        change = F.cross_entropy(after(valid[0]), valid[1]) - F.cross_entropy(copy.deepcopy(model)(valid[0]), valid[1])
    assert result.influence.shape == (12,)
    assert result.influence.sum().item() == pytest.approx(change.item(), rel=1e-4)


def test_influence_of_one_example_is_that_of_its_part_of_the_step():
    model, train, valid = convnet().eval(), images(seed=1), images(seed=2)
    result = influence(model, F.cross_entropy, F.cross_entropy, train, valid, 0.1)
    parts = one_by_one(model, F.cross_entropy, *train) / len(train[0])
    v = backward(copy.deepcopy(model), F.cross_entropy, *valid)
    torch.testing.assert_close(result.influence, -0.1 * parts @ v, rtol=0, atol=1e-15)


FUNCTIONS = {
    "mean_gradients": lambda model, data: mean_gradients(model, [F.cross_entropy], data),
    "gradient_norms": lambda model, data: gradient_norms(model, F.cross_entropy, data),
    "gradient_cosine": lambda model, data: gradient_cosine(model, F.cross_entropy, data, data),
    "per_sample_gradients": lambda model, data: per_sample_gradients(model, F.cross_entropy, data),
    "gradient_noise": lambda model, data: gradient_noise(model, F.cross_entropy, data),
    "gradient_noise_by_layer": lambda model, data: gradient_noise(model, F.cross_entropy, data, by_layer=True),
    "influence": lambda model, data: influence(model, F.cross_entropy, F.cross_entropy, data, data, 0.1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_model_is_left_as_it_was(name, unchanged):
    model, data = convnet(), images()
    model.insert(5, nn.Dropout(0.3))
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    with unchanged(model), torch.no_grad():
        FUNCTIONS[name](model, data)
        if name != "influence":  # of one batch
            FUNCTIONS[name](model, DataLoader(TensorDataset(*data), batch_size=5, shuffle=True))


def test_a_parameter_without_dimensions_has_a_gradient_per_sample():
    class Tempered(nn.Module):
        def __init__(self):
            super().__init__()
            self.temperature, self.last = nn.Parameter(torch.tensor(2.0).double()), nn.Linear(3, 2).double()

        def forward(self, x):
            return self.last(x) / self.temperature

    torch.manual_seed(0)
    model, x, y = Tempered(), torch.randn(5, 3, dtype=torch.float64), torch.randint(2, (5,))
    found = per_sample_gradients(model, F.cross_entropy, (x, y), chunk_size=2)
    torch.testing.assert_close(found, one_by_one(model, F.cross_entropy, x, y))


def test_bad_input_is_named():
    model, (x, y) = convnet(), images()
    with pytest.raises(ValueError, match="finite scalar"):
        mean_gradients(model, [lambda p, y: p.sum(1)], (x, y))
    with pytest.raises(ValueError, match="finite scalar"):
        mean_gradients(model, [lambda p, y: p.sum() * float("nan")], (x, y))
    with pytest.raises(ValueError, match="NaN"):
        gradient_noise(model, F.cross_entropy, (x * float("nan"), y))
    with pytest.raises(ValueError, match="no data"):
        gradient_norms(model, F.cross_entropy, [])
    with pytest.raises(ValueError, match="learning_rate must be positive, got 0"):
        influence(model, F.cross_entropy, F.cross_entropy, (x, y), (x, y), 0)
    with pytest.raises(ValueError, match="chunk_size"):
        per_sample_gradients(model, F.cross_entropy, (x, y), chunk_size=0)


def darkest(figure, ax, layer: int) -> float:
    """The darkest pixel, 0 to 1, in the row of a layer, as it is rendered without grid and ticks."""
    ax.grid(False)
    ax.tick_params(length=0)
    figure.canvas.draw()
    row, height = ax.transData.transform((1, layer))[1], figure.bbox.height
    left, right = (int(edge) for edge in ax.bbox.intervalx)
    return np.asarray(figure.canvas.buffer_rgba())[int(height - row), left + 4 : right - 4, :3].min() / 255


@pytest.mark.parametrize("log", [True, False])
def test_every_layer_is_drawn_where_its_value_is(log):
    figure, ax = plt.subplots()
    frame = gradient_norms(convnet(), F.cross_entropy, images())
    assert plot_layers(frame, ax=ax, log=log) is ax
    drawn = ax.lines[0].get_xdata().tolist() if log else [bar.get_width() for bar in ax.patches]
    assert drawn == pytest.approx(frame.gradient_norm.tolist())
    assert [text.get_text() for text in ax.get_yticklabels()] == frame.layer.tolist()
    assert ax.get_xscale() == ("log" if log else "linear")
    assert all(darkest(figure, ax, layer) < 0.5 for layer in range(len(frame)))
    with pytest.raises(ValueError, match="norms"):
        plot_layers(frame, ax=ax, x="norms")
    plt.close(figure)


def test_on_a_logarithmic_axis_zero_leaves_a_gap():
    figure, ax = plt.subplots()
    frame = pd.DataFrame({"layer": list("abc"), "gradient_norm": [0.1, 0.0, 10.0]})
    plot_layers(frame, ax=ax)
    assert [darkest(figure, ax, layer) < 0.5 for layer in range(3)] == [True, False, True]
    with pytest.raises(ValueError, match="log=False"):
        plot_layers(frame.assign(gradient_norm=0.0), ax=ax)
    plt.close(figure)
