"""The effective learning rate against plain autograd, and against losses whose decomposition is known."""

import copy
import doctest

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from torch import nn

import analysis.effective_lr
from adalfl_lite.losses.network import LossNetwork
from analysis.effective_lr import (
    decompose,
    effective_learning_rate,
    implied_schedule,
    plot_layer_schedule,
    plot_schedule,
)


def convnet(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)).double()


def images(n=12, seed=1):
    torch.manual_seed(seed)
    return torch.randn(n, 1, 6, 6, dtype=torch.float64), torch.randint(4, (n,))


def learned_loss(seed=2):
    return LossNetwork.classification(generator=torch.Generator().manual_seed(seed)).double()


def backward(model, loss, data):
    """The gradient by plain backward, {layer: vector}."""
    twin = copy.deepcopy(model)
    loss(twin(data[0]), data[1]).backward()
    return {
        name: torch.cat([p.grad.flatten() for p in module.parameters()])
        for name, module in twin.named_children()
        if list(module.parameters())
    }


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


@pytest.mark.parametrize("k", [3.7, 1e-6, -2.0])
def test_a_multiple_of_the_task_loss_is_a_learning_rate(k):
    model, data = convnet(), images()
    found = effective_learning_rate(model, lambda p, y: k * F.cross_entropy(p, y), F.cross_entropy, data)
    assert found.scale == pytest.approx(k, rel=1e-12)
    assert found.cosine == pytest.approx(np.sign(k), abs=1e-12)
    assert found.residual_ratio < 1e-12
    layers = effective_learning_rate(
        model, lambda p, y: k * F.cross_entropy(p, y), F.cross_entropy, data, by_layer=True
    )
    np.testing.assert_allclose(layers.scale, k, rtol=1e-12)


def test_a_multiple_is_found_in_float32():
    model, (x, y) = convnet().float(), images()
    found = effective_learning_rate(model, lambda p, y: 3 * F.cross_entropy(p, y), F.cross_entropy, (x.float(), y))
    assert found.scale == pytest.approx(3, rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_a_learned_loss_against_plain_autograd(training):
    model, data, loss = convnet().train(training), images(), learned_loss()
    m, t = backward(model, loss, data), backward(model, F.cross_entropy, data)
    by_layer = effective_learning_rate(model, loss, F.cross_entropy, data, by_layer=True).set_index("layer")
    assert list(by_layer.index) == ["0", "1", "4"]
    pairs = [(by_layer.loc[name], m[name], t[name]) for name in m]
    pairs.append(
        (
            effective_learning_rate(model, loss, F.cross_entropy, data),
            torch.cat([*m.values()]),
            torch.cat([*t.values()]),
        )
    )
    for found, gradient, task_gradient in pairs:
        (c,) = np.linalg.lstsq(task_gradient[:, None].numpy(), gradient.numpy(), rcond=None)[0]
        residual = gradient - c * task_gradient
        cosine = F.cosine_similarity(gradient, task_gradient, 0).item()
        assert found.scale == pytest.approx(c, rel=1e-12)
        assert found.cosine == pytest.approx(cosine, abs=1e-12)
        assert found.residual_norm == pytest.approx(residual.norm().item(), rel=1e-10)
        assert found.residual_ratio == pytest.approx((1 - cosine**2) ** 0.5, rel=1e-10)
        assert found.gradient_norm == pytest.approx(gradient.norm().item(), rel=1e-12)
        assert found.task_gradient_norm == pytest.approx(task_gradient.norm().item(), rel=1e-12)
        assert 0.01 < found.residual_ratio < 1


def test_the_residual_is_orthogonal_and_the_parts_add_up():
    torch.manual_seed(0)
    m, t = torch.randn(2, 50, 3, dtype=torch.float64)
    c, r = decompose(m, t)
    assert abs((r * t).sum()) < 1e-12
    torch.testing.assert_close(c * t + r, m, rtol=0, atol=1e-14)
    # adding what is orthogonal to the task gradient leaves c alone and is all of r
    assert decompose(7 * t + r, t)[0] == pytest.approx(7, rel=1e-12)
    torch.testing.assert_close(decompose(7 * t + r, t)[1], r, rtol=0, atol=1e-12)


def test_a_loader_gives_what_one_batch_gives():
    model, (x, y), loss = convnet().eval(), images(), learned_loss()
    whole = effective_learning_rate(model, loss, F.cross_entropy, (x, y))
    parts = effective_learning_rate(model, loss, F.cross_entropy, [(x[:5], y[:5]), (x[5:], y[5:])])
    assert vars(parts) == pytest.approx(vars(whole), rel=1e-10)


def test_another_state_in_place_of_the_models():
    model, other, data, loss = convnet(0), convnet(5), images(), learned_loss()
    given = effective_learning_rate(model, loss, F.cross_entropy, data, other.state_dict())
    assert given == effective_learning_rate(other, loss, F.cross_entropy, data)


def test_gradients_that_vanish():
    model, data = nn.Linear(3, 2).double(), (torch.ones(4, 3).double(), torch.zeros(4, 2).double())
    flat = effective_learning_rate(model, lambda p, y: 0 * p.sum(), F.mse_loss, data)
    assert flat.scale == flat.gradient_norm == flat.residual_norm == 0
    assert np.isnan(flat.cosine) and np.isnan(flat.residual_ratio)
    none = effective_learning_rate(model, F.mse_loss, lambda p, y: 0 * p.sum(), data)
    assert np.isnan(none.scale) and np.isnan(none.cosine) and none.gradient_norm > 0


def test_the_implied_schedule_multiplies_the_learning_rate():
    frame = pd.DataFrame({"step": [0, 10, 20], "scale": [1.0, -3.0, 0.5]})
    assert implied_schedule(frame, 0.1).effective_lr.tolist() == pytest.approx([0.1, -0.3, 0.05])
    dropped = implied_schedule(frame, lambda step: 0.1 if step < 20 else 0.01)
    assert dropped.effective_lr.tolist() == pytest.approx([0.1, -0.3, 0.005])
    assert list(frame) == ["step", "scale"], "the frame given is left alone"


def test_training_under_the_schedule_imitates_a_loss_that_is_one():
    """The control of the docstring: a loss c(t)·L is imitated by L under the schedule that it implies."""
    scales = [2.0, 0.5, 1.5, 1.0]
    data, frames = images(), []
    model, twin = convnet(), convnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step, c in enumerate(scales):
        loss = lambda p, y, c=c: c * F.cross_entropy(p, y)  # noqa: E731
        frames.append({"step": step, **vars(effective_learning_rate(model, loss, F.cross_entropy, data))})
        optimizer.zero_grad()
        loss(model(data[0]), data[1]).backward()
        optimizer.step()
    frame = implied_schedule(pd.DataFrame(frames), 0.1)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: np.interp(t, frame.step, frame.scale))
    for _ in scales:
        optimizer.zero_grad()
        F.cross_entropy(twin(data[0]), data[1]).backward()
        optimizer.step()
        scheduler.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("function", [effective_learning_rate])
def test_the_model_and_the_loss_are_left_as_they_were(function, unchanged):
    model, data, loss = convnet(), images(), learned_loss()
    model.insert(4, nn.Dropout(0.3))
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    with unchanged(model, loss), torch.no_grad():
        function(model, loss, F.cross_entropy, data)


def test_bad_input_is_named():
    model, (x, y) = convnet(), images()
    with pytest.raises(ValueError, match="NaN"):
        effective_learning_rate(model, F.cross_entropy, F.cross_entropy, (x / 0, y))
    with pytest.raises(ValueError, match="no data"):
        effective_learning_rate(model, F.cross_entropy, F.cross_entropy, [], by_layer=True)
    with pytest.raises(ValueError, match="finite scalar"):
        effective_learning_rate(model, lambda p, y: p.sum() * float("nan"), F.cross_entropy, (x, y))
    with pytest.raises(ValueError, match="no trainable parameters"):
        effective_learning_rate(convnet().requires_grad_(False), F.cross_entropy, F.cross_entropy, (x, y))
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        decompose(torch.ones(2), torch.ones(3))
    frame = pd.DataFrame({"step": [0], "scale": [1.0]})
    with pytest.raises(ValueError, match="got -0.1"):
        implied_schedule(frame, -0.1)
    with pytest.raises(ValueError, match="scale"):
        implied_schedule(frame[["step"]], 0.1)
    with pytest.raises(ValueError, match="no rows"):
        implied_schedule(frame[:0], 0.1)


def test_the_schedule_is_drawn_beside_the_learning_rate(ax):
    frame = implied_schedule(pd.DataFrame({"step": [0, 10, 20], "scale": [1.0, -3.0, 0.5]}), 0.1)
    assert plot_schedule(frame, ax=ax) is ax
    implied, base, *_ = ax.lines
    assert implied.get_xdata().tolist() == [0, 10, 20] and implied.get_ydata() == pytest.approx(frame.effective_lr)
    assert base.get_ydata() == pytest.approx([0.1] * 3) and ax.get_ylabel() == "Effective learning rate"
    ax.clear()
    plot_schedule(frame, ax=ax, log=True)
    assert np.isnan(ax.lines[0].get_ydata()[1]) and ax.get_yscale() == "log"
    ax.clear()
    layers = pd.concat([frame.assign(layer=0, cosine=0.5), frame.assign(layer=1, cosine=-0.5)])
    plot_schedule(layers, ax=ax, y="cosine", hue="layer")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["0", "1"]
    assert ax.get_ylim()[0] <= -1 and ax.get_ylim()[1] >= 1
    with pytest.raises(ValueError, match="more than once"):
        plot_schedule(layers, ax=ax)
    with pytest.raises(ValueError, match="slope"):
        plot_schedule(frame, ax=ax, y="slope")


def test_a_heat_map_of_layers_keeps_the_order_of_the_model(ax):
    rows = [{"step": s, "layer": name, "scale": s + i} for s in (5, 10) for i, name in enumerate(["b", "a", "c"])]
    frame = pd.DataFrame(rows)
    assert plot_layer_schedule(frame, ax=ax, log=True) is ax
    assert [text.get_text() for text in ax.get_yticklabels()] == ["b", "a", "c"]
    assert ax.yaxis_inverted() and ax.collections[0].get_array().ravel().tolist() == [5, 10, 6, 11, 7, 12]
    ax.clear()
    plot_layer_schedule(frame.assign(scale=frame.scale - 8), ax=ax)
    assert ax.collections[0].get_clim() == (-4, 4)
    ax.clear()
    plot_layer_schedule(frame[frame.step == 5], ax=ax)
    assert ax.collections[0].get_clim() == (0, 7)
    for part in (frame[frame.layer == "a"], frame[frame.step == 5], frame):
        ax.clear()
        plot_layer_schedule(part, ax=ax)
        corners = ax.collections[0].get_coordinates()
        assert (np.diff(corners[..., 0], axis=1) > 0).all() and (np.diff(corners[..., 1], axis=0) > 0).all()
    with pytest.raises(ValueError, match="positive"):
        plot_layer_schedule(frame.assign(scale=-1.0), ax=ax, log=True)
    with pytest.raises(ValueError, match="more than once"):
        plot_layer_schedule(pd.concat([frame, frame]), ax=ax)


def test_docstring_examples(ax):
    assert doctest.testmod(analysis.effective_lr).failed == 0
