"""The closed form against autograd, for every kind of loss network and for several at once."""

import pytest
import torch
from torch import nn

from adalfl_lite.engines.closed_form import derivatives, layers_of, mixed_gradient, value_and_slope
from adalfl_lite.losses.network import LossNetwork
from adalfl_lite.losses.task import output_pairs

NETWORKS = {
    "paper": {},
    "biases and anchor": {"bias": True, "anchored": True},
    "paper, no anchor": {"anchored": False},
    "ReLU, Softplus, sum": {
        "activation": "relu",
        "output_activation": "softplus",
        "reduction": "sum",
        "bias": True,
        "anchored": False,
    },
    "one layer, identity": {"hidden": (7,), "output_activation": "identity", "bias": True},
    "only ReLU": {"activation": "relu", "output_activation": "relu", "anchored": False},
}


def make(kind, options, seed=0):
    torch.manual_seed(seed)
    network = LossNetwork.default(kind, **options).double()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.3 * torch.randn_like(p))
    f = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randint(4, (9,)) if kind == "classification" else torch.randn(9, 4, dtype=torch.float64)
    return network, f, y, torch.randn(9, 4, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
def test_the_derivatives_are_those_of_autograd(kind, options):
    network, f, y, u = make(kind, options)
    expected_loss = network(f, y)
    (gradient,) = torch.autograd.grad(expected_loss, f, create_graph=True)
    expected = torch.autograd.grad(gradient, list(network.parameters()), u, materialize_grads=True)
    loss, value, along = derivatives(network, None, *output_pairs(kind, f.detach(), y, f.dtype))
    torch.testing.assert_close((loss, value), (expected_loss, gradient), rtol=1e-6, atol=1e-10)
    found = along(u)
    assert max(g.abs().max() for g in expected) > 1e-4
    for a, b in zip(found, expected, strict=True):
        # torch calls a softplus linear beyond 20, and so leaves out e^-20
        assert (a - b).norm() <= 1e-7 * b.norm() + 1e-14


def test_several_networks_at_once_are_each_of_them():
    networks = [make("classification", {"bias": True}, seed)[0] for seed in range(3)]
    stacked = [torch.stack(ps) for ps in zip(*(n.parameters() for n in networks), strict=True)]
    y, p, q = torch.rand(3, 3, 20, dtype=torch.float64)
    values, slopes, tape = value_and_slope(layers_of(networks[0].network, stacked), y, p)
    gradients = mixed_gradient(tape, q)
    for i, network in enumerate(networks):
        output = p[i].clone().requires_grad_(True)
        value = network.pointwise(output, y[i])
        (slope,) = torch.autograd.grad(value.sum(), output, create_graph=True)
        torch.testing.assert_close(values[i], value)
        torch.testing.assert_close(slopes[i], slope)
        for ours, theirs in zip(
            gradients, torch.autograd.grad(slope @ q[i], network.parameters(), materialize_grads=True), strict=True
        ):
            torch.testing.assert_close(ours[i], theirs)


@pytest.mark.parametrize("x", [-1e4, -100.0, -1.0, 0.0, 1.0, 100.0, 1e4])
def test_activations_far_out_are_those_of_the_network(x):
    network = LossNetwork.classification(bias=True)
    layers = layers_of(network.network)
    p, y = torch.tensor([x]), torch.tensor([1.0])
    value, slope, tape = value_and_slope(layers, y, p)
    torch.testing.assert_close(value, network.pointwise(p, y))
    assert all(torch.isfinite(g).all() for g in [slope, *mixed_gradient(tape, torch.ones(1))])


def test_a_network_it_does_not_know_is_said_so():
    network = LossNetwork.classification()
    network.network[1] = nn.Tanh()
    assert layers_of(network.network) is None
    with pytest.raises(ValueError, match="not known in closed form"):
        derivatives(network, None, *torch.rand(2, 2, 3))
    network = LossNetwork.classification()
    network.network.append(nn.Linear(1, 1))
    assert layers_of(network.network) is None
