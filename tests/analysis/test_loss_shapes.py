"""Curves of losses against their formulas, and measures against shapes known by heart."""

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt

from adalfl_lite.losses.network import LossNetwork
from analysis.loss_shapes import loss_curves, plot_loss_curves, shape_measures

matplotlib.use("Agg")


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


@pytest.mark.parametrize("loss", [F.cross_entropy, torch.nn.CrossEntropyLoss()])
def test_cross_entropy_is_minus_log_of_the_probability_of_the_target(loss):
    frame = loss_curves(loss)
    p = frame.prediction.to_numpy()
    right = np.where(frame.target == 1, p, 1 - p)
    np.testing.assert_allclose(frame.value, -np.log(right), rtol=1e-12)
    np.testing.assert_allclose(frame.derivative, np.where(frame.target == 1, -1, 1) / right, rtol=1e-12)


def test_squared_error_and_its_derivative():
    frame = loss_curves(lambda p, y: ((p - y) ** 2).mean(), "regression", targets=[-0.5, 2.0])
    error = frame.prediction - frame.target
    np.testing.assert_allclose(frame.value, error**2, atol=1e-14)
    np.testing.assert_allclose(frame.derivative, 2 * error, atol=1e-14)


@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_network_is_drawn_as_its_bare_function(kind, reduction):
    network = LossNetwork(kind, anchored=kind == "regression", reduction=reduction)
    frame = loss_curves(network, kind)
    exact = network.clone().double()
    p, y = torch.tensor(frame.prediction.to_numpy()), torch.tensor(frame.target.to_numpy())
    np.testing.assert_allclose(frame.value, exact.pointwise(p, y).detach(), rtol=1e-12)
    h = 1e-6
    slope = (exact.pointwise(p + h, y) - exact.pointwise(p - h, y)).detach() / (2 * h)
    np.testing.assert_allclose(frame.derivative, slope, atol=1e-7)


def test_pointwise_false_draws_a_loss_network_in_the_two_class_problem():
    network = LossNetwork.classification().double()
    frame = loss_curves(network, targets=[1], pointwise=False)
    p = torch.tensor(frame.prediction.to_numpy())
    by_hand = (network.pointwise(p, torch.ones_like(p)) + network.pointwise(1 - p, torch.zeros_like(p))) / 2
    np.testing.assert_allclose(frame.value, by_hand.detach(), rtol=1e-12)


def test_many_steps_carry_their_step():
    frame = loss_curves({0: F.mse_loss, 50: F.l1_loss}, "regression", targets=[0.0], predictions=[-2.0, 2.0])
    assert frame.step.tolist() == [0, 0, 50, 50]
    assert frame.value.tolist() == [4, 4, 2, 2]


@pytest.mark.parametrize(
    ("kind", "targets", "ends"), [("classification", [0, 1], [0.005, 0.995]), ("regression", [-1, 0, 1], [-3, 3])]
)
def test_what_is_drawn_if_nothing_is_asked_for(kind, targets, ends):
    frame = loss_curves(F.mse_loss if kind == "regression" else F.cross_entropy, kind)
    assert frame.target.unique().tolist() == targets
    assert frame.index.tolist() == list(range(len(frame)))
    for _, curve in frame.groupby("target"):
        np.testing.assert_allclose(curve.prediction.iloc[[0, -1]], ends)


@pytest.mark.parametrize("tol", [-0.1, 0, 1, 1.5])
def test_a_tolerance_of_flatness_outside_its_range_is_refused(tol):
    with pytest.raises(ValueError, match=f"must lie in .0, 1., got {tol}"):
        shape_measures(loss_curves(F.mse_loss, "regression"), tol)


def test_a_loss_that_ignores_the_prediction_has_derivative_zero():
    frame = loss_curves(lambda p, y: y.float().sum(), "regression")
    assert (frame.derivative == 0).all()
    assert (shape_measures(frame).flatness == 1).all()


def test_the_loss_and_the_random_state_are_left_alone():
    network = LossNetwork.classification()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    random = torch.get_rng_state()
    with torch.no_grad():
        frame = loss_curves(lambda p, y: network(p, y) + 0 * torch.rand(()), targets=[1])
    assert (frame.derivative != 0).any()
    loss_curves(network)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(p.grad is None and p.requires_grad and p.dtype == torch.float32 for p in network.parameters())


def test_measures_of_a_hinge():
    frame = loss_curves(
        lambda p, y: F.relu(1 - p).sum(), "regression", targets=[1.0], predictions=np.linspace(-1, 3, 401)
    )
    measures = shape_measures(frame).iloc[0]
    assert measures.flatness == pytest.approx(0.5, abs=0.01)
    assert (measures.convexity, measures.left_slope, measures.right_slope) == (1, -1, 0)
    assert measures.minimum == pytest.approx(1)


def test_measures_of_a_concave_loss_and_a_double_well():
    concave = loss_curves(lambda p, y: -(p**2).sum(), "regression", targets=[0.0])
    assert shape_measures(concave).convexity.item() == 0
    well = loss_curves(lambda p, y: ((p**2 - 1) ** 2).sum() + 0.1 * p.sum(), "regression", targets=[0.0])
    measures = shape_measures(well).iloc[0]
    # concave where 12 p² < 4, that is on |p| < .577 of [-3, 3]; the lower well is the left one
    assert measures.convexity == pytest.approx(1 - 2 * 3**-0.5 / 6, abs=0.01)
    assert measures.minimum == pytest.approx(-1, abs=0.03)


def test_a_softplus_output_flattens_and_a_smooth_leaky_relu_does_not():
    predictions = np.linspace(-20, 20, 801)
    flat = loss_curves(lambda p, y: F.softplus(p).sum(), "regression", [0.0], predictions)
    leaky = loss_curves(lambda p, y: (0.99 * F.softplus(p) + 0.01 * p).sum(), "regression", [0.0], predictions)
    assert shape_measures(flat, tol=0.005).flatness.item() > 0.3
    assert shape_measures(leaky, tol=0.005).flatness.item() == 0
    assert shape_measures(leaky).left_slope.item() == pytest.approx(0.01, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": F.cross_entropy, "kind": "ranking"}, "ranking"),
        ({"loss": F.cross_entropy, "targets": [0, 2]}, "targets 0 and 1"),
        ({"loss": F.cross_entropy, "predictions": [0.0, 0.5]}, "inside"),
        ({"loss": F.cross_entropy, "predictions": [0.5, 0.2]}, "increasing"),
        ({"loss": lambda p, y: p.log().sum(), "kind": "regression"}, "not finite at target -1, prediction -3"),
        ({"loss": {}}, "empty"),
        ({"loss": LossNetwork.classification(), "kind": "regression"}, "kind='classification'"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        loss_curves(**arguments)


def test_a_plot_by_target_and_one_by_step(ax):
    frame = loss_curves({0: F.mse_loss, 10: F.l1_loss}, "regression", targets=[0.0, 1.0])
    assert plot_loss_curves(frame[frame.step == 0], ax=ax) is ax
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["0", "1"]
    ax.clear()
    assert plot_loss_curves(frame, ax=ax, y="derivative", hue="step") is ax
    assert len([line for line in ax.lines if len(line.get_xdata())]) == 4
    assert len(ax.figure.axes) == 2, "the colour bar"
    with pytest.raises(ValueError, match="hue"):
        plot_loss_curves(frame.drop(columns="step"), ax=ax, hue="step")
    with pytest.raises(ValueError, match="'slope'"):
        plot_loss_curves(frame, ax=ax, y="slope")
