"""Label smoothing recovered from smoothed cross-entropy itself, and the fit against numpy's least squares."""

import doctest
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from torch import nn

import analysis.label_smoothing
from adalfl_lite.losses.network import LossNetwork
from analysis.label_smoothing import (
    fit_label_smoothing,
    implied_label_smoothing,
    logit_gradient,
    logit_statistics,
    penultimate_statistics,
    plot_label_smoothing,
    plot_target_gradients,
    resting_point,
    target_gradients,
)


def classifier(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 4)).to(dtype)


def examples(n=30, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(n, 5, dtype=dtype), torch.randint(4, (n,))


def logits(n=200, classes=4, spread=1.0, dtype=torch.float64):
    torch.manual_seed(2)
    return spread * torch.randn(n, classes, dtype=dtype), torch.randint(classes, (n,))


def smoothed(epsilon, scale=1.0):
    return lambda f, y: scale * F.cross_entropy(f, y, label_smoothing=epsilon)


def learned_loss():
    return LossNetwork.classification(generator=torch.Generator().manual_seed(3)).double()


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epsilon", [0.0, 0.05, 0.1, 0.2])
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0], ids=["nearly uniform", "mixed", "confident"])
@pytest.mark.parametrize("classes", [2, 10])
def test_smoothed_cross_entropy_gives_its_epsilon(dtype, epsilon, spread, classes):
    f, y = logits(classes=classes, spread=spread, dtype=dtype)
    if spread > 1:  # trained: confident and nearly always right, so that p − y is all but zero
        y = f.argmax(1)
    fit = fit_label_smoothing(f, y, logit_gradient(smoothed(epsilon, scale=0.03), f, y))
    assert fit.epsilon == pytest.approx(epsilon, abs=0.005 if dtype == torch.float32 else 1e-9)
    assert fit.scale == pytest.approx(0.03, rel=5e-3 if dtype == torch.float32 else 1e-9)
    assert fit.r2 == pytest.approx(1, abs=1e-4 if dtype == torch.float32 else 1e-12)
    assert fit.examples == 200


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
def test_a_model_and_a_loader(dtype, training):
    model, (x, y) = classifier(dtype).train(training), examples(dtype=dtype)
    for epsilon in (0.0, 0.05, 0.1, 0.2):
        fit = implied_label_smoothing(model, smoothed(epsilon), [(x[:7], y[:7]), (x[7:], y[7:])])
        assert (fit.epsilon, fit.scale, fit.examples) == (
            pytest.approx(epsilon, abs=0.005),
            pytest.approx(1, abs=1e-3),
            30,
        )


def test_a_short_batch_counts_by_its_examples():
    model, (x, y), loss = classifier().eval(), examples(), learned_loss()
    whole = implied_label_smoothing(model, loss, (x, y))
    parts = implied_label_smoothing(model, loss, [(x[:4], y[:4]), (x[4:], y[4:])])
    assert vars(parts) == pytest.approx(vars(whole), rel=1e-10)


def test_stored_logits_need_no_model_but_the_identity():
    stored = logits(spread=1.0)
    fit = implied_label_smoothing(nn.Identity(), smoothed(0.1), stored)
    assert fit.epsilon == pytest.approx(0.1, abs=0.005)


def test_a_learned_loss_against_numpys_least_squares():
    (f, y), loss = logits(), learned_loss()
    leaf = f.clone().requires_grad_()
    loss(leaf, y).backward()
    gradient = (leaf.grad * len(f)).numpy()
    torch.testing.assert_close(logit_gradient(loss, f, y).numpy(), gradient)
    p, one_hot = f.softmax(1).numpy(), np.eye(4)[y]
    design = np.stack([(p - one_hot).ravel(), (one_hot - 0.25).ravel()], axis=1)
    (s, s_epsilon), residual, *_ = np.linalg.lstsq(design, gradient.ravel(), rcond=None)
    fit = fit_label_smoothing(f, y, torch.as_tensor(gradient))
    assert fit.scale == pytest.approx(s, rel=1e-10) and fit.epsilon == pytest.approx(s_epsilon / s, rel=1e-10)
    assert fit.r2 == pytest.approx(1 - residual.item() / (gradient**2).sum(), rel=1e-10)
    cosine = np.prod([design[:, 0] @ design[:, 1], *(1 / np.linalg.norm(design, axis=0))])
    assert fit.identifiability == pytest.approx(math.sqrt(1 - cosine**2), rel=1e-8)


def test_no_other_epsilon_fits_better():
    (f, y), loss = logits(), learned_loss()
    g = logit_gradient(loss, f, y)
    fit = fit_label_smoothing(f, y, g)

    def r2(epsilon):
        shape = logit_gradient(smoothed(epsilon), f, y)  # from torch, with its scale fitted
        scale = (g * shape).sum() / shape.square().sum()
        return 1 - ((g - scale * shape).square().sum() / g.square().sum()).item()

    assert r2(fit.epsilon) == pytest.approx(fit.r2, abs=1e-12) and 0 < fit.r2 < 1
    assert all(r2(fit.epsilon + shift) < fit.r2 for shift in (-0.5, -0.01, 0.01, 0.5))


def test_a_loss_that_is_no_label_smoothing_has_a_low_r2():
    f, y = logits()
    assert fit_label_smoothing(f, y, logit_gradient(lambda f, y: (f * f.roll(1, 0)).mean(), f, y)).r2 < 0.1
    pushed_away = fit_label_smoothing(f, y, logit_gradient(smoothed(0.1, scale=-2), f, y))
    assert pushed_away.scale == pytest.approx(-2) and pushed_away.epsilon == pytest.approx(0.1)


def test_what_is_not_determined_is_nan():
    f, y = torch.zeros(6, 3).double(), torch.tensor([0, 1, 2, 0, 1, 2])
    uniform = fit_label_smoothing(f, y, logit_gradient(smoothed(0.1), f, y))
    assert math.isnan(uniform.epsilon) and uniform.identifiability < 1e-6
    assert uniform.r2 == pytest.approx(1) and uniform.scale == pytest.approx(0.9)  # s (1 − ε) is all there is to see
    f, y = logits()
    still = fit_label_smoothing(f, y, torch.zeros_like(f))
    assert still.scale == 0 and math.isnan(still.epsilon) and math.isnan(still.r2)
    f = 1e4 * F.one_hot(y, 4).double()  # softmax is exactly the labels
    certain = fit_label_smoothing(f, y, logit_gradient(smoothed(0.1), f, y))
    assert math.isnan(certain.epsilon) and math.isnan(certain.scale)


@pytest.mark.parametrize("epsilon", [0.05, 0.1, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_smoothed_cross_entropy_rests_where_its_epsilon_says(epsilon, dtype):
    identity = nn.Linear(4, 4, bias=False).to(dtype)
    nn.init.eye_(identity.weight)
    f, y = logits(n=3000, spread=4, dtype=dtype)
    frame = target_gradients(identity, smoothed(epsilon, scale=7), (f, y))
    p = f.softmax(1).gather(1, y[:, None])[:, 0]
    np.testing.assert_allclose(frame.probability, p, rtol=1e-5)
    np.testing.assert_allclose(frame.gradient, 7 * (p - 1 + epsilon * 0.75), atol=1e-5)
    rest = resting_point(frame, classes=4)
    assert rest.epsilon == pytest.approx(epsilon, abs=0.005) and rest.agreement == 1
    assert rest.probability == pytest.approx(1 - epsilon * 0.75, abs=0.005)


def test_resting_points_of_losses_that_have_none():
    p = np.linspace(0.1, 0.9, 9)
    assert vars(resting_point(pd.DataFrame({"probability": p, "gradient": p - 1}), 3)) == {
        "probability": 1,
        "epsilon": 0,
        "agreement": 1,
    }
    assert resting_point(pd.DataFrame({"probability": p, "gradient": p}), 2).probability == 0
    alternating = pd.DataFrame({"probability": p, "gradient": [-1, 1, -1, 1, -1, 1, -1, 1, 0]})
    assert resting_point(alternating, 2).agreement == 5 / 8
    shuffled = pd.DataFrame({"probability": p, "gradient": p - 0.55}).sample(frac=1, random_state=0)
    assert resting_point(shuffled, 2).probability == pytest.approx(0.55)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        resting_point(shuffled, 1)
    with pytest.raises(ValueError, match="no example"):
        resting_point(shuffled.assign(gradient=0), 2)
    with pytest.raises(ValueError, match="lacks the column gradient"):
        resting_point(shuffled[["probability"]], 2)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_resting_points_by_trying_every_cut(count):
    """All patterns of signs: the cut that most examples agree with, the lowest of equals."""
    p = np.sort(np.random.default_rng(count).uniform(size=count))
    between = [0.0, *((p[1:] + p[:-1]) / 2), 1.0]
    for signs in itertools.product([-1, 1], repeat=count):
        agreeing = [sum(sign == (-1 if i < cut else 1) for i, sign in enumerate(signs)) for cut in range(count + 1)]
        best = max(agreeing)
        found = resting_point(pd.DataFrame({"probability": p, "gradient": signs}), 3)
        assert found.agreement == best / count
        assert found.probability == pytest.approx(between[agreeing.index(best)])
        assert found.epsilon == pytest.approx(1.5 * (1 - found.probability))


def test_logit_statistics_by_hand():
    f = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0]], dtype=torch.float64)
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Dropout(0.9)).double().train()
    nn.init.eye_(model[0].weight)
    found = logit_statistics(model, [(f[:1], torch.tensor([0])), (f[1:], torch.tensor([0]))])
    confidence = (math.exp(2) / (math.exp(2) + 1 + math.e) + math.exp(3) / (math.exp(3) + 2)) / 2
    assert found.confidence == pytest.approx(confidence)
    assert found.margin == pytest.approx((1 - 3) / 2)
    assert found.norm == pytest.approx((math.sqrt(2) + math.sqrt(6)) / 2)


def test_smoothed_cross_entropy_rests_at_the_margin_of_the_docstring():
    f, y = torch.zeros(1, 4).double(), torch.tensor([2])
    f[0, 2] = math.log((1 - 0.1 + 0.1 / 4) / (0.1 / 4))
    assert logit_gradient(smoothed(0.1), f, y).abs().max() < 1e-15


def test_penultimate_statistics_by_hand():
    x = torch.tensor([[0.0, 1], [0, 3], [4, 0], [6, 0]]).double()
    y = torch.tensor([0, 0, 1, 1])
    model = nn.Sequential(nn.Identity(), nn.Linear(2, 2), nn.Flatten()).double()
    found = penultimate_statistics(model, [(x[:3], y[:3]), (x[3:], y[3:])])
    assert found.norm == pytest.approx((1 + 3 + 4 + 6) / 4)
    assert found.within_class == pytest.approx(4 / ((x - x.mean(0)) ** 2).sum().item())
    assert penultimate_statistics(model, (x, y), layer="0") == found
    tight = penultimate_statistics(model, (x[[0, 0, 2]], y[[0, 0, 2]]))
    assert tight.within_class == 0
    with pytest.raises(ValueError, match="'head'"):
        penultimate_statistics(model, (x, y), layer="head")
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        penultimate_statistics(nn.Sequential(nn.Identity()), (x, y))


FUNCTIONS = {
    "target_gradients": lambda model, loss, data: target_gradients(model, loss, data),
    "implied_label_smoothing": lambda model, loss, data: implied_label_smoothing(model, loss, data),
    "logit_gradient": lambda model, loss, data: logit_gradient(loss, data[0][:, :4], data[1]),
    "logit_statistics": lambda model, loss, data: logit_statistics(model, data),
    "penultimate_statistics": lambda model, loss, data: penultimate_statistics(model, data),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_model_and_the_loss_are_left_as_they_were(name, unchanged):
    model, data, loss = classifier().train(), examples(), learned_loss()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    with unchanged(model, loss), torch.no_grad():
        FUNCTIONS[name](model, loss, data)
    assert not any(module._forward_pre_hooks for module in model.modules())
    x, y = data
    with unchanged(model, loss), pytest.raises(ValueError, match="4"):
        FUNCTIONS[name](model, loss, (x, y + 4))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_bad_input_is_named():
    model, (x, y) = classifier(), examples()
    diverged = classifier()
    nn.init.constant_(diverged[4].bias, math.inf)
    with pytest.raises(ValueError, match="NaN"):
        implied_label_smoothing(model, F.cross_entropy, (x / 0, y))
    with pytest.raises(ValueError, match="no data"):
        implied_label_smoothing(model, F.cross_entropy, [])
    with pytest.raises(ValueError, match="no data"):
        logit_statistics(model, [])
    with pytest.raises(ValueError, match="int64"):
        implied_label_smoothing(model, F.mse_loss, (x, x))
    with pytest.raises(ValueError, match="classes 4 to 7 do not fit 4"):
        implied_label_smoothing(model, F.cross_entropy, (x, y + 4))
    with pytest.raises(ValueError, match="finite scalar"):
        implied_label_smoothing(model, lambda f, y: f.sum(1), (x, y))
    with pytest.raises(ValueError, match="diverged"):
        logit_statistics(diverged, (x, y))
    with pytest.raises(ValueError, match="C > 1"):
        fit_label_smoothing(torch.zeros(3, 1), torch.zeros(3).long(), torch.zeros(3, 1))
    f, y = logits()
    with pytest.raises(ValueError, match=r"\(200,\) do not have the shape \(200, 4\)"):
        fit_label_smoothing(f, y, f[:, 0])
    with pytest.raises(ValueError, match="check the loss"):
        fit_label_smoothing(f, y, f / 0)


def test_epsilon_is_drawn_over_steps_and_coloured_by_r2(ax):
    frame = pd.DataFrame({"step": [0, 3, 5, 10], "epsilon": [math.nan, 9.0, 0.2, 0.1], "r2": [1.0, 1.0, 0.5, 0.9]})
    frame["identifiability"] = [0.0, 0.1, 0.5, 0.9]
    assert plot_label_smoothing(frame, ax=ax) is ax
    (points,) = ax.collections
    assert points.get_offsets().tolist() == [[5, 0.2], [10, 0.1]] and points.get_array().tolist() == [0.5, 0.9]
    assert points.get_clim() == (0, 1) and len(ax.figure.axes) == 2
    with pytest.raises(ValueError, match="r2"):
        plot_label_smoothing(frame[["step", "epsilon"]], ax=ax)
    with pytest.raises(ValueError, match=r"0\.2 or more"):
        plot_label_smoothing(frame[:1], ax=ax)


def test_gradients_are_drawn_against_the_probability(ax):
    frame = pd.DataFrame({"probability": [0.2, 0.8, 1.0], "gradient": [-0.7, -0.1, 0.1]})
    assert plot_target_gradients(frame, ax=ax) is ax
    np.testing.assert_allclose(ax.collections[0].get_offsets(), [[0.2, -0.7], [0.8, -0.1], [1 - 1e-5, 0.1]])
    assert list(ax.lines[-1].get_xdata()) == [0.9, 0.9]
    ax.figure.canvas.draw()


def test_docstring_examples():
    assert doctest.testmod(analysis.label_smoothing).failed == 0
    plt.close("all")
