"""Clipped gradients and micro batches: the meta-gradient of exactly the step that was taken, in every engine."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from adalfl_lite import LossNetwork, OnlineLearningRate, OnlineLoss
from adalfl_lite.data.dataset import Dataset, Split
from adalfl_lite.engines.steps import plain_step
from adalfl_lite.engines.updates import Clipping
from adalfl_lite.learn.online import ENGINES
from tests.shorthand import fit, initialise

EXACT = ("forward", "shared", "unrolled")
CLIPPINGS = {
    "norm": {"clip_gradient_norm": 1e-4},
    "norm, longer than the gradient": {"clip_gradient_norm": 10.0},
    "value": {"clip_gradient_value": 2e-5},
}


def batch(seed, rows=12):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(4, (rows,), generator=generator)


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.0), nn.Linear(8, 4)).double()


def make_network():
    return LossNetwork.classification(generator=torch.Generator().manual_seed(5)).double()


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01, eps=1e-3)  # smooth on the scale of the differences


def online_of(engine="forward", optimizer=sgd, **options):
    model = make_model()
    return OnlineLoss(model, make_network(), optimizer(model.parameters()), engine=engine, **options)


def in_the_loop(optimizer, options, phi, batches, meta_batch):
    """θ' by backward, torch's own clipping and torch.optim; and the model."""
    model = make_model()
    theirs = optimizer(model.parameters())
    phi(model(batches[0]), batches[1]).backward()
    if norm := options.get("clip_gradient_norm"):
        nn.utils.clip_grad_norm_(model.parameters(), norm)
    if value := options.get("clip_gradient_value"):
        nn.utils.clip_grad_value_(model.parameters(), value)
    theirs.step()
    return model


def central_difference(optimizer, options, direction, h=1e-5):
    """d/dh ⟨v, θ'(φ + h d)⟩ of the loop, with v the gradient of the cross-entropy at its θ'."""
    model = in_the_loop(optimizer, options, make_network(), batch(0), batch(1))
    v = torch.autograd.grad(F.cross_entropy(model(batch(1)[0]), batch(1)[1]), list(model.parameters()))
    sides = []
    for sign in (1, -1):
        phi = make_network()
        with torch.no_grad():
            for parameter, d in zip(phi.parameters(), direction, strict=True):
                parameter.add_(d, alpha=sign * h)
        moved = in_the_loop(optimizer, options, phi, batch(0), batch(1))
        sides.append(sum((a * p.detach()).sum() for a, p in zip(v, moved.parameters(), strict=True)))
    return (sides[0] - sides[1]).item() / (2 * h), model


@pytest.mark.parametrize("optimizer", [sgd, adam])
@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_meta_gradient_goes_through_the_clipping(engine, clipping, optimizer):
    options = CLIPPINGS[clipping]
    torch.manual_seed(1)
    direction = [torch.randn_like(p) for p in make_network().parameters()]
    expected, loop = central_difference(optimizer, options, direction)
    online = online_of(engine, optimizer, **options)
    step = online.meta_gradient([batch(0)], batch(1))
    found = sum((g * d).sum() for g, d in zip(step.meta_gradient, direction, strict=True)).item()
    assert found == pytest.approx(expected, rel=1e-5 if engine in EXACT else 1e-3, abs=1e-14)
    for ours, theirs in zip(online.model.parameters(), loop.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-15)


def test_clipping_makes_another_meta_gradient_than_none():
    """Both bounds are at work in the test above, and the long one is not."""
    plain = online_of().meta_gradient([batch(0)], batch(1)).meta_gradient
    found = {name: online_of(**CLIPPINGS[name]).meta_gradient([batch(0)], batch(1)).meta_gradient for name in CLIPPINGS}
    assert all(torch.equal(a, b) for a, b in zip(plain, found["norm, longer than the gradient"], strict=True))
    for name in ("norm", "value"):
        assert max((a - b).abs().max() / a.abs().max() for a, b in zip(plain, found[name], strict=True)) > 0.1


def test_the_pullback_of_complex_gradients_is_that_of_pairs():
    torch.manual_seed(0)
    g, w = torch.randn(5, dtype=torch.complex128), torch.randn(5, dtype=torch.complex128)
    (found,) = Clipping(norm=0.5).pullback([g])([w])
    real = torch.view_as_real(g).clone().requires_grad_()
    (clipped,) = Clipping(norm=0.5)([torch.view_as_complex(real)])
    (expected,) = torch.autograd.grad(torch.view_as_real(clipped), real, torch.view_as_real(w))
    torch.testing.assert_close(torch.view_as_real(found), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["clip_gradient_norm", "clip_gradient_value"])
def test_a_bound_that_is_not_positive_is_refused(name):
    for bound in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"{name} must be positive, or None"):
            online_of(**{name: bound})
    with pytest.raises(ValueError, match="exclude each other; give one"):
        online_of(clip_gradient_norm=1.0, clip_gradient_value=1.0)


@pytest.mark.parametrize("clipping", ["norm", "value"])
def test_a_plain_step_clips_as_torch_does(clipping):
    model, options = make_model(), CLIPPINGS[clipping]
    loss = make_network()
    arguments = Clipping(options.get("clip_gradient_norm"), options.get("clip_gradient_value"))
    plain_step(model, loss, sgd(model.parameters()), batch(0), clipping=arguments)
    loop = in_the_loop(sgd, options, loss, batch(0), batch(1))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loop.parameters(), strict=True))


# Micro batches ------------------------------------------------------------------------------------------------------


def parts(whole, *lengths):
    return list(zip(*(tensor.split(lengths) for tensor in whole), strict=True))


@pytest.mark.parametrize("options", [{}, *(CLIPPINGS[name] for name in ("norm", "value"))])
@pytest.mark.parametrize("engine", ["forward", "unrolled", "finite-difference"])
def test_micro_batches_are_one_step_on_their_union(engine, options):
    """Of any lengths, in either batch; over two steps, so that momentum counts."""
    whole, split = (online_of(engine, adam, meta_learning_rate=1e-3, **options) for _ in range(2))
    for i in range(2):
        one = whole.step(batch(i), batch(i + 1))
        many = split.step(parts(batch(i), 5, 3, 4), parts(batch(i + 1), 11, 1))
        tolerance = {"rtol": 1e-10, "atol": 1e-13} if engine != "finite-difference" else {"rtol": 1e-4, "atol": 1e-9}
        torch.testing.assert_close(one.meta_gradient, many.meta_gradient, **tolerance)
        torch.testing.assert_close(one.training_loss, many.training_loss)
        torch.testing.assert_close(one.meta_loss, many.meta_loss)
        torch.testing.assert_close(one.prediction, many.prediction)
    for a, b in zip(whole.model.parameters(), split.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_micro_batches_with_batchnorm_and_dropout_are_the_accumulating_loop():
    """Each normalised by itself, with its own mask, running statistics moved by each, as where backward() adds up."""

    def build():
        torch.manual_seed(0)
        layers = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 4)
        return nn.Sequential(*layers).double()

    micro = parts(batch(0), 5, 7)
    torch.manual_seed(1)
    direction = [torch.randn_like(p) for p in make_network().parameters()]

    def loop(phi):
        model = build()
        optimizer = sgd(model.parameters())
        torch.manual_seed(4)
        for inputs, targets in micro:
            (phi(model(inputs), targets) * len(targets) / 12).backward()
        optimizer.step()
        return model

    model = loop(make_network())
    buffers = copy.deepcopy(dict(model.named_buffers()))
    v = torch.autograd.grad(
        F.cross_entropy(functional_call(model, {k: b.clone() for k, b in buffers.items()}, batch(1)[0]), batch(1)[1]),
        list(model.parameters()),
    )
    sides = []
    for sign in (1, -1):
        phi = make_network()
        with torch.no_grad():
            for parameter, d in zip(phi.parameters(), direction, strict=True):
                parameter.add_(d, alpha=sign * 1e-4)
        sides.append(sum((a * p.detach()).sum() for a, p in zip(v, loop(phi).parameters(), strict=True)))
    expected = (sides[0] - sides[1]).item() / 2e-4
    for engine in ("forward", "unrolled"):
        ours = build()
        online = OnlineLoss(ours, make_network(), sgd(ours.parameters()), engine=engine)
        torch.manual_seed(4)
        step = online.meta_gradient([micro], batch(1))
        found = sum((g * d).sum() for g, d in zip(step.meta_gradient, direction, strict=True)).item()
        assert found == pytest.approx(expected, rel=1e-5)
        for a, b in zip(ours.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        for name, buffer in ours.named_buffers():
            torch.testing.assert_close(buffer, buffers[name])


class Saved:
    """A tensor that a graph keeps for its backward pass; counts how many numbers are kept at a time."""

    now = most = 0

    def __init__(self, tensor):
        self.tensor = tensor
        Saved.now += tensor.numel()
        Saved.most = max(Saved.most, Saved.now)

    def __del__(self):
        Saved.now -= self.tensor.numel()


def most_saved(first, second):
    """The most numbers that the graphs of a step keep at a time."""
    Saved.now = Saved.most = 0
    online = online_of()
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        online.step(first, second)
    return Saved.most


def test_micro_batches_take_the_memory_of_one():
    alone = most_saved(batch(0, 4), batch(1, 4))
    assert most_saved(parts(batch(0), 4, 4, 4), parts(batch(1), 4, 4, 4)) == alone < most_saved(batch(0), batch(1))


def test_a_plain_step_and_a_learned_rate_take_micro_batches():
    models = [make_model() for _ in range(4)]
    plain_step(models[0], F.cross_entropy, sgd(models[0].parameters()), batch(0))
    plain_step(models[1], F.cross_entropy, sgd(models[1].parameters()), parts(batch(0), 5, 7))
    rates = []
    for model, first, second in (
        (models[2], batch(0), batch(1)),
        (models[3], parts(batch(0), 2, 10), parts(batch(1), 9, 3)),
    ):
        learner = OnlineLearningRate(model, F.cross_entropy, sgd(model.parameters()), clip_gradient_norm=0.1)
        for _ in range(2):
            learner.step(first, second)
        rates.append(torch.tensor(learner.learning_rate.rates))
    torch.testing.assert_close(*rates)
    for a, b in (models[:2], models[2:]):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def data(rows=40):
    splits = [
        Split(*(tensor.float() if i == 0 else tensor for i, tensor in enumerate(batch(seed, rows))), torch.arange(rows))
        for seed in range(3)
    ]
    return Dataset("clouds", "classification", *splits, 4, (6,))


@pytest.mark.parametrize("options", [{}, {"online": True}, {"online": True, "learn": "learning_rate"}])
def test_fit_clips_in_all_its_ways(options, tmp_path):
    """And a checkpoint belongs to its bound."""
    found = {}
    for name, bound in (("none", {}), ("norm", {"clip_gradient_norm": 1e-5}), ("value", {"clip_gradient_value": 1e-6})):
        model = make_model().float()
        loss = F.cross_entropy if "learn" in options else make_network().float()
        arguments = {"steps": 6, "batch_size": 10, "progress": False, "checkpoint": tmp_path / name, **options}
        fit(model, loss, data(), optimizer=torch.optim.SGD(model.parameters(), lr=1.0), **arguments, **bound)
        found[name] = torch.cat([p.detach().flatten() for p in model.parameters()])
        if bound:
            with pytest.raises(ValueError, match="clip_gradient_.* 0.5"):
                other = {name: 0.5 for name in bound}
                fit(model, loss, data(), optimizer=torch.optim.SGD(model.parameters(), lr=1.0), **arguments, **other)
    start = torch.cat([p.detach().flatten() for p in make_model().float().parameters()])
    way = {name: (end - start).norm().item() for name, end in found.items()}
    assert way["norm"] <= 6.1e-5 * (3 if "learn" in options else 1) < way["none"] and way["value"] < way["none"]


def test_initialise_clips_its_rollouts_and_rehearsals():
    ends = []
    for bound in ({}, {"clip_gradient_norm": 1e-5}):
        network = make_network()
        batches = [batch(i) for i in range(3)]
        make_optimizer = functools.partial(torch.optim.SGD, lr=1.0)
        short = {"steps": 4, "imitation_steps": 100, "rollout_steps": 2, "rehearsals": 1, "rehearsal_steps": 60}
        torch.manual_seed(0)
        found = initialise(network, make_model, batches, batches, make_optimizer=make_optimizer, **short, **bound)
        ends.append(found.rehearsals.task_loss.iloc[0])
    assert ends[0] < 0.95 * ends[1]  # so short a step hardly trains


def test_shared_takes_one_batch_and_says_which_engine_takes_several():
    several = parts(batch(0), 6, 6)
    with pytest.raises(ValueError, match="for micro batches use engine='forward'"):
        online_of("shared").step(several, batch(1))
    online_of("forward").step(several, batch(1))


def test_an_empty_list_is_no_batch():
    with pytest.raises(TypeError, match="batch must be a pair"):
        online_of().step([], batch(1))
