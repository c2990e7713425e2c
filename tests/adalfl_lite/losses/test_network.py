"""The loss network against its equation written again in numpy, and everything a user can do to it.

Tolerances of 1e-8 where a softplus is involved: torch replaces it by its asymptote above 20, an error of e^-20 = 2e-9.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from adalfl_lite.files import atomic_save
from adalfl_lite.losses.activations import SmoothLeakyReLU
from adalfl_lite.losses.network import FORMAT, LossNetwork
from adalfl_lite.losses.task import task_error, task_loss

CHOICES = [
    {},
    {"beta": 3.0, "gamma": 0.25, "bias": True},
    {"hidden": (7,), "output_activation": "identity"},
    {"hidden": (50, 50), "activation": "relu", "output_activation": "softplus", "reduction": "sum", "bias": True},
    {"hidden": (5, 6, 7), "activation": "softplus", "output_activation": "relu"},
]


def network_of(kind, seed=0, **options):
    """A float64 loss network whose every parameter, biases included, is random."""
    network = LossNetwork(kind, **options, generator=torch.Generator().manual_seed(seed)).double()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in network.parameters():
            if p.ndim == 1:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return network


def batch_of(kind, seed=0, rows=9, outputs=4):
    generator = torch.Generator().manual_seed(seed)
    prediction = 2 * torch.randn(rows, outputs, generator=generator, dtype=torch.float64)
    if kind == "classification":
        return prediction, torch.randint(outputs, (rows,), generator=generator)
    return prediction, torch.randn(rows, outputs, generator=generator, dtype=torch.float64)


def numpy_activation(name, x, beta, gamma):
    softplus = lambda z: np.logaddexp(0, z)  # noqa: E731
    return {
        "smooth_leaky_relu": lambda: (1 - gamma) / beta * softplus(beta * x) + gamma * x,
        "relu": lambda: np.maximum(x, 0),
        "softplus": lambda: softplus(x),
        "identity": lambda: x,
    }[name]()


def numpy_pointwise(network, target, output, options):
    """ℓ_φ(y, p) from the weights alone."""
    state = {name: value.detach().numpy() for name, value in network.named_parameters()}
    positions = sorted({int(name.split(".")[1]) for name in state})
    x = np.stack([target, output], axis=-1)
    for position in positions:
        x = x @ state[f"network.{position}.weight"].T + state.get(f"network.{position}.bias", 0.0)
        last = position == positions[-1]
        name = options.get("output_activation" if last else "activation", "smooth_leaky_relu")
        x = numpy_activation(name, x, options.get("beta", 10.0), options.get("gamma", 0.01))
    return x[..., 0]


# Equation (1) ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", CHOICES)
@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_the_loss_is_equation_1(kind, options):
    network = network_of(kind, **options)
    prediction, target = batch_of(kind)
    if kind == "classification":
        exponentials = np.exp(prediction.numpy())
        p = exponentials / exponentials.sum(1, keepdims=True)
        y = np.eye(4)[target.numpy()]
    else:
        p, y = prediction.numpy(), target.numpy()
    losses = numpy_pointwise(network, y, p, options)
    expected = losses.sum() / 9 if options.get("reduction") == "sum" else losses.sum() / (9 * 4)
    assert network(prediction, target).item() == pytest.approx(expected, rel=1e-8)
    assert network(prediction, target).shape == ()
    np.testing.assert_allclose(network.elementwise(prediction, target).detach().numpy(), losses, rtol=1e-8, atol=1e-8)


def test_targets_and_outputs_are_not_interchangeable():
    """Were (y, p) stacked the other way round in both places above, this would still tell."""
    network = LossNetwork.classification(hidden=()).double()
    with torch.no_grad():
        network.network[0].weight.copy_(torch.tensor([[0.0, 1.0]]))
    grid = network.grid(torch.tensor([0.25, 0.75]), torch.tensor([0.0, 1.0]))
    activated = network.network[1](torch.tensor([0.25, 0.75], dtype=torch.float64))
    assert torch.equal(grid, torch.stack([activated, activated]))  # rows are targets, columns outputs; only p counts


def test_a_one_dimensional_regression_batch_reads_as_one_output():
    network = network_of("regression", anchored=True)
    prediction, target = batch_of("regression", outputs=1)
    assert torch.equal(network(prediction[:, 0], target[:, 0]), network(prediction, target))


def test_a_class_that_the_model_has_no_output_for_is_named():
    prediction, target = torch.zeros(3, 4), torch.tensor([0, 3, 4])
    for loss in (task_loss("classification"), LossNetwork.classification()):
        with pytest.raises(ValueError, match="label 4"):
            loss(prediction, target)
    assert torch.isfinite(task_loss("classification")(prediction[:2], target[:2]))


def test_constructors_and_their_parameter_counts():
    def count(network):
        return sum(p.numel() for p in network.parameters())

    assert count(LossNetwork.classification()) == 2 * 40 + 40 * 40 + 40
    assert count(LossNetwork.regression()) == 1720
    assert count(LossNetwork.ml3("regression")) == (2 + 1) * 50 + (50 + 1) * 50 + (50 + 1)
    assert LossNetwork.regression().anchored and not LossNetwork.classification().anchored
    assert not LossNetwork.regression(anchored=False).anchored
    for kind in ("classification", "regression"):
        assert repr(LossNetwork.default(kind)) == repr(getattr(LossNetwork, kind)())


def test_ml3_is_relu_inside_softplus_outside_summed_over_outputs():
    network = LossNetwork.ml3("classification")
    layers = [type(layer) for layer in network.network]
    assert layers == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear, nn.Softplus]
    assert [tuple(layer.weight.shape) for layer in network.network[::2]] == [(50, 2), (50, 50), (1, 50)]
    assert all(layer.bias is not None for layer in network.network[::2])
    assert not network.anchored and LossNetwork.ml3("regression").anchored is False
    prediction, target = batch_of("classification")
    losses = network.elementwise(prediction, target)
    assert network(prediction, target).item() == pytest.approx(losses.sum(1).mean().item())
    assert (losses > 0).all()


def test_the_generator_decides_the_weights():
    networks = [LossNetwork.classification(generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    weights = [torch.cat([p.flatten() for p in network.parameters()]) for network in networks]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    bound = math.sqrt(6 / (40 + 40))  # Xavier uniform
    middle = networks[0].network[2].weight
    assert 0.95 * bound < middle.abs().max() <= bound


def test_the_loss_maps_over_a_stack_of_batches():
    network = network_of("classification")
    predictions, targets = zip(*(batch_of("classification", seed) for seed in range(3)), strict=True)
    together = torch.func.vmap(network)(torch.stack(predictions), torch.stack(targets))
    apart = torch.stack([network(*batch) for batch in zip(predictions, targets, strict=True)])
    torch.testing.assert_close(together, apart)


def test_half_precision_predictions_are_read_in_the_dtype_of_the_network():
    network = LossNetwork.classification()
    prediction, target = batch_of("classification")
    half = prediction.bfloat16()
    assert network(half, target).dtype == torch.float32
    assert torch.equal(network(half, target), network(half.float(), target))


# Equation (2) ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", CHOICES)
def test_an_anchored_loss_is_the_bregman_form(options, seed):
    bare = network_of("regression", seed, **options)
    anchored = network_of("regression", seed, anchored=True, **options)
    prediction, target = batch_of("regression", seed)
    at_target = target.clone().requires_grad_(True)
    value = bare.pointwise(at_target, target)
    (slope,) = torch.autograd.grad(value.sum(), at_target)
    expected = bare.pointwise(prediction, target) - value - slope * (prediction - target)
    torch.testing.assert_close(anchored.pointwise(prediction, target), expected, rtol=1e-8, atol=1e-8)
    scale = anchored.pointwise(prediction, target).abs().max()
    assert scale > 1e-3 or options.get("output_activation") == "relu"  # a ReLU output may be dead


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", CHOICES)
def test_an_anchored_loss_has_no_value_and_no_slope_at_the_target(options, seed):
    network = network_of("regression", seed, anchored=True, **options)
    target = 3 * torch.randn(50, 2, dtype=torch.float64)
    prediction = target.clone().requires_grad_(True)
    losses = network.pointwise(prediction, target)
    (slope,) = torch.autograd.grad(losses.sum(), prediction)
    assert losses.abs().max() < 1e-12 and slope.abs().max() < 1e-8
    bare = network_of("regression", seed, **options)
    (bare_slope,) = torch.autograd.grad(bare.pointwise(prediction, target).sum(), prediction)
    assert bare_slope.abs().max() > 1e-3 or options.get("output_activation") == "relu"


def test_the_anchored_loss_is_differentiable_twice_in_phi_and_prediction():
    network = network_of("regression", anchored=True, hidden=(3,), beta=2.0)
    prediction, target = batch_of("regression", rows=2, outputs=1)
    names, parameters = zip(*network.named_parameters(), strict=True)

    def loss(prediction, *parameters):
        return torch.func.functional_call(network, dict(zip(names, parameters, strict=True)), (prediction, target))

    inputs = [t.detach().clone().requires_grad_(True) for t in (prediction, *parameters)]
    assert torch.autograd.gradcheck(loss, inputs) and torch.autograd.gradgradcheck(loss, inputs)


# The activation ----------------------------------------------------------------------------------------------------

positions = st.floats(-50, 50)
betas, gammas = st.floats(0.1, 50), st.floats(0, 0.99)


@given(positions, betas, gammas)
def test_smooth_leaky_relu_value_slope_and_distance_to_the_leaky_relu(x, beta, gamma):
    activation = SmoothLeakyReLU(beta, gamma)
    point = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    value = activation(point)
    assert value.item() == pytest.approx((1 - gamma) / beta * np.logaddexp(0, beta * x) + gamma * x, abs=1e-8)
    (slope,) = torch.autograd.grad(value, point)
    assert activation.slope(point).item() == pytest.approx(slope.item(), abs=1e-8)
    assert gamma - 1e-9 <= slope <= 1 + 1e-9
    gap = value.item() - max(x, gamma * x)  # largest at zero, from above
    assert -1e-8 <= gap <= (1 - gamma) * math.log(2) / beta + 1e-8


@given(betas, gammas)
def test_smooth_leaky_relu_asymptotes(beta, gamma):
    activation = SmoothLeakyReLU(beta, gamma)
    far = torch.tensor([-1000 / beta, 1000 / beta], dtype=torch.float64)
    torch.testing.assert_close(activation(far), far * torch.tensor([gamma, 1.0], dtype=torch.float64))
    torch.testing.assert_close(activation.slope(far), torch.tensor([gamma, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_a_bend_that_is_not_positive_is_refused(beta):
    with pytest.raises(ValueError, match=f"beta must be positive, got {beta}"):
        SmoothLeakyReLU(beta)


@pytest.mark.parametrize("gamma", [-0.1, 1.0, math.nan])
def test_a_left_slope_outside_its_range_is_refused(gamma):
    with pytest.raises(ValueError, match=rf"gamma must lie in \[0, 1\), got {gamma}"):
        LossNetwork.classification(gamma=gamma)


# Grid, copies and files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_the_grid_is_pointwise_at_every_pair(kind):
    network = network_of(kind, anchored=kind == "regression")
    outputs, targets = torch.linspace(0, 1, 5), torch.tensor([0.0, 0.3, 1.0])
    grid = network.grid(outputs, targets)
    assert grid.shape == (3, 5) and not grid.requires_grad and grid.dtype == torch.float64
    for i, target in enumerate(targets.double()):
        for j, output in enumerate(outputs.double()):
            assert grid[i, j].item() == pytest.approx(network.pointwise(output, target).item(), rel=1e-12)


def test_a_clone_is_equal_and_independent():
    network = network_of("regression", anchored=True)
    clone, batch = network.clone(), batch_of("regression")
    before = network(*batch).item()
    assert clone(*batch).item() == before
    with torch.no_grad():
        for p in clone.parameters():
            p.add_(1)
    assert network(*batch).item() == before != clone(*batch).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "network",
    [
        LossNetwork.classification(),
        LossNetwork.regression(beta=3.0, gamma=0.2, hidden=(4, 5, 6)),
        LossNetwork.ml3("regression"),
    ],
    ids=["classification", "regression", "ml3"],
)
def test_saved_and_loaded_bit_for_bit(tmp_path, network, dtype):
    network = network.clone().to(dtype)
    network.save(tmp_path / "folder" / "loss.pt")
    loaded = LossNetwork.load(tmp_path / "folder" / "loss.pt")
    assert repr(loaded) == repr(network)
    assert loaded.state_dict().keys() == network.state_dict().keys()
    for name, value in network.state_dict().items():
        assert loaded.state_dict()[name].dtype == dtype and torch.equal(loaded.state_dict()[name], value)
    prediction, target = batch_of(network.kind)
    assert torch.equal(loaded(prediction, target), network(prediction, target))


def test_files_that_are_not_a_whole_loss_network_are_refused(tmp_path):
    path = tmp_path / "loss.pt"
    with pytest.raises(FileNotFoundError, match=r"loss\.pt"):
        LossNetwork.load(path)
    network = LossNetwork.classification()
    network.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"loss\.pt cannot be read"):
        LossNetwork.load(path)
    torch.save(network.state_dict(), path)
    with pytest.raises(ValueError, match=r"loss\.pt is no adalfl-loss-network-1 file"):
        LossNetwork.load(path)
    torch.save(network, path)  # a pickled module: refused, not run
    with pytest.raises(ValueError, match=r"loss\.pt cannot be read"):
        LossNetwork.load(path)
    config, state = network.config, network.state_dict()
    for payload in (
        {"config": config},
        {"config": config, "state": {}},
        {"config": {**config, "hidden": [3]}, "state": state},
        {"config": {**config, "unknown": 1}, "state": state},
        {"config": config, "state": dict(list(state.items())[:-1])},
    ):
        atomic_save({"format": FORMAT, **payload}, path)
        with pytest.raises(ValueError, match=r"loss\.pt is not a whole loss network"):
            LossNetwork.load(path)


# Task losses and refusals ------------------------------------------------------------------------------------------


def test_task_losses_and_errors_on_numbers_done_by_hand():
    logits, classes = torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0], [2.0, 1.0]]), torch.tensor([1, 1, 0])
    third = -math.log(math.e / (math.e + 1))
    expected = (-math.log(3 / 4) - math.log(1 / 5) + third) / 3
    assert task_loss("classification")(logits, classes).item() == pytest.approx(expected)
    assert task_error("classification")(logits, classes).item() == pytest.approx(1 / 3)
    prediction, target = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 5.0]])
    assert task_loss("regression")(prediction, target).item() == task_error("regression")(prediction, target) == 5.0


@pytest.mark.parametrize("function", [task_loss, task_error, LossNetwork, LossNetwork.default, LossNetwork.ml3])
def test_an_unknown_kind_is_refused(function):
    with pytest.raises(ValueError, match="kind must be one of classification, regression; got 'ranking'"):
        function("ranking")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "none"}, "reduction must be 'mean' or 'sum', got 'none'"),
        ({"activation": "gelu"}, "activation must be .* got 'gelu'"),
        ({"output_activation": "tanh"}, "activation must be .* got 'tanh'"),
    ],
)
def test_an_unknown_choice_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LossNetwork.classification(**options)


LOGITS, CLASSES = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        (LOGITS[0], CLASSES, r"logits of shape \(B, C\), got \(2,\)"),
        (LOGITS.long(), CLASSES, "got .* of torch.int64"),
        (LOGITS, CLASSES[:2], r"class indices of shape \(3,\), got \(2,\)"),
        (LOGITS, CLASSES.int(), "int64 class indices .* torch.int32"),
        (LOGITS, F.one_hot(CLASSES, 2), r"got \(3, 2\)"),
    ],
)
def test_a_classification_batch_that_does_not_fit_is_refused(prediction, target, message):
    with pytest.raises(ValueError, match=message):
        LossNetwork.classification()(prediction, target)


@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        (LOGITS, LOGITS[:, 0], r"one shape \(B, K\), got \(3, 2\) and \(3,\)"),  # would broadcast to nonsense
        (LOGITS[:, :1], LOGITS[:, 0], r"got \(3, 1\) and \(3,\)"),
        (LOGITS[None], LOGITS[None], r"one shape \(B, K\)"),
        (LOGITS, LOGITS.long(), "floating-point tensors, got torch.float32 and torch.int64"),
    ],
)
def test_a_regression_batch_that_does_not_fit_is_refused(prediction, target, message):
    with pytest.raises(ValueError, match=message):
        LossNetwork.regression()(prediction, target)
