"""Properties over shapes, dtypes, class counts, batch sizes, losses and optimizers that hypothesis chooses."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adalfl_lite import LossNetwork, OnlineLoss, load_dataset
from adalfl_lite.data.dataset import BUNDLED, Split
from adalfl_lite.losses.task import task_loss

NAN, INF = float("nan"), float("inf")

# With Adam's usual eps a first step is all but the sign of the gradient, whose derivative is all cancellation.
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.01),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "maximize": lambda p: torch.optim.SGD(p, lr=0.01, maximize=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-3),
    "AMSGrad": lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-3, amsgrad=True, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-3),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


class ByAutograd(LossNetwork):
    """A loss network whose derivatives are not taken in closed form."""


class Tied(nn.Module):
    """One weight used twice."""

    def __init__(self, features, outputs):
        super().__init__()
        self.first, self.second = nn.Linear(features, features), nn.Linear(features, features)
        self.second.weight = self.first.weight
        self.head = nn.Linear(features, outputs)

    def forward(self, x):
        return self.head(self.second(torch.tanh(self.first(x))))


def make_model(which, features, outputs):
    if which == "tied":
        return Tied(features, outputs)
    if which == "linear":
        return nn.Linear(features, outputs)
    norm = nn.BatchNorm1d(4) if which == "batch norm" else nn.LayerNorm(4)
    return nn.Sequential(nn.Linear(features, 4), norm, nn.Tanh(), nn.Linear(4, outputs))


@st.composite
def problems(draw):
    """(model, loss network, batches) of one kind, in float64."""
    kind = draw(st.sampled_from(["classification", "regression"]))
    features, outputs = draw(st.integers(1, 5)), draw(st.integers(2 if kind == "classification" else 1, 6))
    which = draw(st.sampled_from(["linear", "layer norm", "batch norm", "tied"]))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    make = draw(st.sampled_from([LossNetwork.default, LossNetwork.ml3]))
    # torch's softplus is cut off at β x = 20, where it is wrong by 2e-9; with this β no x comes near
    network = make(kind, beta=2.0, hidden=tuple(draw(st.lists(st.integers(1, 6), max_size=3)))).double()
    sizes = draw(st.lists(st.integers(2 if which == "batch norm" else 1, 8), min_size=4, max_size=4))

    def batch(size):
        y = torch.randint(outputs, (size,)) if kind == "classification" else torch.randn(size, outputs).double()
        return torch.randn(size, features).double(), y

    return make_model(which, features, outputs).double(), network, [batch(size) for size in sizes]


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


@settings(max_examples=80, deadline=None, database=None)
@given(problem=problems(), name=st.sampled_from(sorted(OPTIMIZERS)))
def test_forward_mode_is_double_backward(problem, name, counts):
    """Over three steps, so that moments are met empty and filled; θ is equal all the time."""
    model, network, batches = problem
    if name in ("RMSprop", "Adagrad"):  # they make a step of the rounding of a zero gradient, a bias's before BatchNorm
        network.__class__ = ByAutograd
    twin, twin_network = copy.deepcopy(model), copy.deepcopy(network)
    onlines = [
        OnlineLoss(m, n, OPTIMIZERS[name](m.parameters()), engine=engine, meta_learning_rate=1e-3)
        for m, n, engine in ((model, network, "forward"), (twin, twin_network, "unrolled"))
    ]
    tolerance = 1e-5 if name in ("RMSprop", "Adagrad") else 1e-7  # torch counts their steps in float32
    for i in range(3):
        ours, reference = (online.meta_gradient([batches[i]], batches[i + 1]) for online in onlines)
        expected = flat(reference.meta_gradient)
        allowed = tolerance * max(1e-4, expected.abs().max().item())  # small entries are differences of large terms
        torch.testing.assert_close(flat(ours.meta_gradient), expected, rtol=0, atol=allowed)
        torch.testing.assert_close(ours.meta_loss, reference.meta_loss, rtol=1e-8, atol=1e-10)
        for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    counts["properties tried"] += 1


@settings(max_examples=40, deadline=None, database=None)
@given(problem=problems(), name=st.sampled_from(sorted(OPTIMIZERS)), single=st.booleans())
def test_with_the_loss_frozen_it_is_torchs_own_training(problem, name, single, counts):
    """Bit for bit, in float32 and float64, where torch differentiates the loss; in closed form it is up to rounding."""
    model, network, batches = problem
    network.__class__ = ByAutograd
    dtype = torch.float32 if single else torch.float64
    model, network = model.to(dtype), network.to(dtype)
    batches = [(x.to(dtype), y.to(dtype) if y.is_floating_point() else y) for x, y in batches]
    twin = copy.deepcopy(model)
    online = OnlineLoss(model, network, OPTIMIZERS[name](model.parameters()), meta_learning_rate=0.0)
    optimizer = OPTIMIZERS[name](twin.parameters())
    for i in range(3):
        online.step(batches[i], batches[i + 1])
        optimizer.zero_grad()
        network(twin(batches[i][0]), batches[i][1]).backward()
        optimizer.step()
    assert all(map(torch.equal, model.state_dict().values(), twin.state_dict().values()))
    counts["properties tried"] += 1


@settings(max_examples=40, deadline=None, database=None)
@given(problem=problems(), dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]))
def test_a_loss_is_a_mean_over_examples_in_any_order(problem, dtype, counts):
    _, network, batches = problem
    x, y = batches[0]
    outputs = int(y.max()) + 2 if y.ndim == 1 else y.shape[1]
    prediction = torch.randn(len(y), outputs, dtype=dtype)
    order = torch.randperm(len(y))
    whole = network(prediction, y)
    assert whole.dtype == torch.float64 and whole.ndim == 0
    torch.testing.assert_close(network(prediction[order], y[order]), whole)
    each = torch.stack([network(prediction[i : i + 1], y[i : i + 1]) for i in range(len(y))])
    torch.testing.assert_close(each.mean(), whole)
    error = task_loss(network.kind)
    torch.testing.assert_close(error(prediction[order].double(), y[order]), error(prediction.double(), y))
    counts["properties tried"] += 1


@settings(max_examples=40, deadline=None, database=None)
@given(
    rows=st.integers(1, 9), columns=st.integers(1, 5), where=st.integers(0, 44), data=st.data(),
    bad=st.sampled_from([NAN, INF, -INF]), dtype=st.sampled_from([torch.float32, torch.float64])
)  # fmt: skip
def test_one_bad_number_anywhere_is_found_with_its_row(rows, columns, where, data, bad, dtype, counts):
    good = torch.zeros(rows, columns, dtype=dtype)
    Split(good, good, torch.arange(rows))
    spoilt = good.clone()
    spoilt.view(-1)[where % spoilt.numel()] = bad
    row = where % spoilt.numel() // columns
    name, pair = data.draw(st.sampled_from([("inputs", (spoilt, good)), ("targets", (good, spoilt))]))
    with pytest.raises(ValueError, match=rf"{name} are not finite \(first in row {row}\)"):
        Split(*pair, torch.arange(rows))
    counts["properties tried"] += 1


@settings(max_examples=25, deadline=None, database=None)
@given(name=st.sampled_from(BUNDLED), seed=st.integers(0, 2**32 - 1))
def test_any_seed_splits_every_row_once(name, seed, counts):
    data, again = load_dataset(name, seed=seed), load_dataset(name, seed=seed)
    rows = torch.cat([data.train.indices, data.valid.indices, data.test.indices])
    assert sorted(rows.tolist()) == list(range(len(rows)))
    assert torch.equal(data.train.inputs, again.train.inputs) and torch.equal(data.test.targets, again.test.targets)
    if name != "digits":
        torch.testing.assert_close(data.train.inputs.mean(0), torch.zeros(data.input_shape), atol=1e-4, rtol=0)
    counts["properties tried"] += 1


@settings(max_examples=30, deadline=None, database=None)
@given(targets=st.lists(st.floats(-5, 5), min_size=1, max_size=6), seed=st.integers(0, 10**6))
def test_an_anchored_loss_has_neither_value_nor_slope_at_its_target(targets, seed, counts):
    network = LossNetwork.regression(generator=torch.Generator().manual_seed(seed)).double()
    y = torch.tensor(targets, dtype=torch.float64)[:, None]
    prediction = y.clone().requires_grad_(True)
    loss = network(prediction, y)
    (slope,) = torch.autograd.grad(loss, prediction)
    # the slope is torch's, whose softplus is cut off where its own derivative still differs from one by 2e-9
    assert abs(loss.item()) < 1e-10 and slope.abs().max() < 1e-7
    assert F.mse_loss(prediction, y) == 0
    counts["properties tried"] += 1
