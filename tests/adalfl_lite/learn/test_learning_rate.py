"""Algorithms 3 and 4: the hypergradient against finite differences and autograd, and what the learned rate does."""

import copy
import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from adalfl_lite.data.dataset import Dataset, Split
from adalfl_lite.engines.steps import plain_step
from adalfl_lite.engines.updates import functional_update
from adalfl_lite.learn.learning_rate import (
    PROPORTIONAL,
    LearningRate,
    OnlineLearningRate,
    implied_scale,
    scaled_schedule,
)
from tests.shorthand import fit, initialise_learning_rate

SGD = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}


def problem(seed=0):
    """A float64 model with BatchNorm and eight batches of a learnable problem."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double().train()
    teacher = torch.randn(5, 3).double()
    inputs = [torch.randn(20, 5).double() for _ in range(8)]
    return model, [(x, (x @ teacher).argmax(1)) for x in inputs]


def two_groups(model, kind=torch.optim.SGD, **options):
    return kind([{"params": model[:2].parameters()}, {"params": model[2:].parameters(), "lr": 0.03}], **options)


def flat(module):
    return torch.cat([value.detach().flatten().double() for value in module.state_dict().values()])


def online_of(model, optimizer, **options):
    return OnlineLearningRate(model, F.cross_entropy, optimizer, **options)


# The hypergradient -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PROPORTIONAL)
def test_the_hypergradient_is_the_finite_difference_of_the_loss_after_the_step(kind):
    """Central differences in log α of the whole step, of both groups, from an optimizer whose state is warm."""
    model, batches = problem()
    options = SGD if kind is torch.optim.SGD else {"lr": 0.02, "weight_decay": 1e-2}
    optimizer = two_groups(model, kind, **options)
    for batch in batches[:3]:
        plain_step(model, F.cross_entropy, optimizer, batch)

    def loss_after(changes):
        twin = copy.deepcopy(model)
        other = two_groups(twin, kind, **options)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for group, change in zip(other.param_groups, changes, strict=True):
            group["lr"] *= math.exp(change)
        plain_step(twin, F.cross_entropy, other, batches[3])
        return F.cross_entropy(twin(batches[4][0]), batches[4][1]).item()

    step, unchanged = 1e-4, loss_after([0, 0])
    expected = [
        (loss_after(np.eye(2)[group] * step) - loss_after(-np.eye(2)[group] * step)) / (2 * step) for group in (0, 1)
    ]
    optimizer.zero_grad()
    found = online_of(model, optimizer).meta_gradient(batches[3], batches[4])
    assert found.meta_loss.item() == pytest.approx(unchanged, rel=1e-9)
    assert min(map(abs, expected)) > 1e-5
    torch.testing.assert_close(found.meta_gradient[0], torch.tensor(expected).double(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_the_hypergradient_is_autograd_through_the_update(kind):
    model, batches = problem()
    options = SGD if kind is torch.optim.SGD else {"lr": 0.02, "weight_decay": 1e-2}
    optimizer = kind(model.parameters(), **options)
    plain_step(model, F.cross_entropy, optimizer, batches[0])
    optimizer.zero_grad()
    names, parameters = zip(*model.named_parameters(), strict=True)
    twin, (x, y), (x_meta, y_meta) = copy.deepcopy(model), *batches[1:3]
    gradients = torch.autograd.grad(F.cross_entropy(twin(x), y), list(twin.parameters()))
    log_rate = torch.tensor(math.log(options["lr"]), dtype=torch.float64, requires_grad=True)
    symbolic = copy.copy(optimizer)
    symbolic.param_groups = [{**optimizer.param_groups[0], "lr": log_rate.exp()}]
    updated, _ = functional_update(symbolic, [p.detach() for p in parameters], gradients)
    buffers = {name: buffer.clone() for name, buffer in twin.named_buffers()}
    after = functional_call(twin, {**dict(zip(names, updated, strict=True)), **buffers}, (x_meta,))
    (expected,) = torch.autograd.grad(F.cross_entropy(after, y_meta), log_rate)

    found = online_of(model, optimizer).meta_gradient(batches[1], batches[2]).meta_gradient[0]
    assert found.shape == (1,) and abs(expected) > 1e-4
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


def test_a_step_too_far_lowers_the_rate_and_one_too_short_raises_it():
    """On x²/2 from x = 1 a step α ends at 1 − α: the best α is 1, and ∂L/∂ log α = −α(1 − α)."""
    batch = (torch.ones(1, 1).double(), torch.zeros(1, 1).double())
    for rate, sign in ((0.5, 1), (1.5, -1)):
        model = nn.Linear(1, 1, bias=False).double()
        nn.init.ones_(model.weight)
        half = lambda p, y: 0.5 * F.mse_loss(p, y)  # noqa: E731
        online = OnlineLearningRate(model, half, torch.optim.SGD(model.parameters(), lr=rate), meta_learning_rate=0.1)
        result = online.step(batch, batch)
        assert result.meta_gradient[0].item() == pytest.approx(-rate * (1 - rate))
        assert math.log(online.optimizer.param_groups[0]["lr"] / rate) == pytest.approx(0.1 * sign, rel=1e-6)


# The step ----------------------------------------------------------------------------------------------------------


def test_theta_goes_where_torch_takes_it_and_the_meta_batch_leaves_buffers_and_random_state_alone():
    model, batches = problem()
    model.insert(3, nn.Dropout(0.3))
    twin = copy.deepcopy(model)
    optimizer, plain = (torch.optim.SGD(m.parameters(), **SGD) for m in (model, twin))
    online = online_of(model, optimizer, meta_learning_rate=0.0)
    torch.manual_seed(1)
    for batch, meta_batch in zip(batches[::2], batches[1::2], strict=True):
        online.step(batch, meta_batch)
    torch.manual_seed(1)
    plain.param_groups[0]["lr"] = online.learning_rate.rates[0]  # exp(log .1), not .1 to the last bit
    for batch in batches[::2]:
        plain_step(twin, F.cross_entropy, plain, batch)
    assert torch.equal(flat(model), flat(twin))
    assert plain.param_groups[0]["lr"] == pytest.approx(0.1, rel=1e-12)


def test_learners_may_share_a_rate():
    """Each takes up what the others have learned, as the rollouts of the initialisation do."""
    (first, batches), (second, _) = problem(), problem(seed=1)
    rate = LearningRate([0.1])
    learners = [
        OnlineLearningRate(m, F.cross_entropy, torch.optim.SGD(m.parameters(), lr=1.0), learning_rate=rate)
        for m in (first, second)
    ]
    with torch.no_grad():
        rate.log_rates += 1
    twin = copy.deepcopy(second)
    learners[0].step(batches[0], batches[1])
    learners[1].meta_gradient(batches[2], batches[3])
    plain_step(twin, F.cross_entropy, torch.optim.SGD(twin.parameters(), lr=rate.rates[0]), batches[2])
    assert torch.equal(flat(second), flat(twin)) and rate.rates[0] > 0.2


@pytest.mark.parametrize("training", [True, False])
def test_the_implied_scale_is_the_projection_of_the_gradients(training):
    """The least-squares coefficient of numpy, over all parameters of the model in eval mode, used or not."""
    model, ((x, y), *_) = problem()
    model = nn.Sequential(nn.ModuleDict({"unused": nn.Linear(2, 2), "used": model})).train(training)
    model.forward = lambda inputs: model[0]["used"](inputs)

    def other(p, y):
        return p.square().mean() + 2 * F.cross_entropy(p, y)

    twin = copy.deepcopy(model[0]["used"]).eval()
    gradients = []
    for loss in (other, F.cross_entropy):
        twin.zero_grad()
        loss(twin(x), y).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in twin.parameters()]).numpy())
    (expected,), *_ = np.linalg.lstsq(gradients[1][:, None], gradients[0], rcond=None)
    assert implied_scale(model, other, F.cross_entropy, (x, y)) == pytest.approx(expected, rel=1e-12)
    assert all(module.training == training for module in model.modules())
    assert expected != pytest.approx(2, rel=1e-2)


def test_a_state_dict_continues_bit_for_bit_and_loads_with_weights_only():
    model, batches = problem()
    online = online_of(model, two_groups(model, **SGD), meta_learning_rate=0.05)
    for i in range(3):
        online.step(batches[i], batches[i + 1])
    file = io.BytesIO()
    torch.save(online.state_dict(), file)
    other_model, _ = problem(seed=1)
    other = online_of(other_model, two_groups(other_model, lr=0.7, momentum=0.9))
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for i in range(3, 7):
        results = [learner.step(batches[i], batches[i + 1]) for learner in (online, other)]
        assert torch.equal(results[0].meta_gradient[0], results[1].meta_gradient[0])
    assert torch.equal(flat(model), flat(other_model))
    assert online.learning_rate.rates == other.learning_rate.rates != pytest.approx([0.1, 0.03], rel=0.01)


@pytest.mark.parametrize(("which", "name"), [(0, "loss"), (1, "task loss")])
def test_a_step_that_is_not_finite_is_named_and_leaves_the_rate_alone(which, name):
    model, batches = problem()
    online = online_of(model, torch.optim.SGD(model.parameters(), **SGD))
    pair = [batches[0], batches[1]]
    pair[which] = (pair[which][0] * math.inf, pair[which][1])
    with pytest.raises(FloatingPointError, match=f"the {name} is not finite"):
        online.step(*pair)
    assert online.learning_rate.rates == pytest.approx([0.1], rel=1e-12)


def test_what_cannot_work_is_refused():
    model, _ = problem()
    with pytest.raises(
        TypeError, match="the step of Rprop is not proportional to a learning rate; use one of SGD, Adam"
    ):
        online_of(model, torch.optim.Rprop(model.parameters()))
    with pytest.raises(ValueError, match="learning rates must be positive and finite, got 0"):
        online_of(model, torch.optim.SGD(model.parameters(), lr=0.0))
    with pytest.raises(ValueError, match="meta_learning_rate must be 0 or more and finite, got -1"):
        online_of(model, torch.optim.SGD(model.parameters(), lr=0.1), meta_learning_rate=-1)
    with pytest.raises(ValueError, match="not in the model"):
        online_of(model, torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1))


def test_a_meta_optimizer_that_would_not_move_the_rate_is_refused_and_one_that_does_moves_it():
    model, batches = problem()
    network = nn.Linear(2, 1)
    for given in (
        {"meta_optimizer": torch.optim.Adam(network.parameters())},
        {"meta_optimizer": torch.optim.Adam(LearningRate([0.1]).parameters())},  # another rate
        {"learning_rate": LearningRate([0.1]), "meta_optimizer": torch.optim.Adam(LearningRate([0.1]).parameters())},
    ):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with pytest.raises(ValueError, match=r"meta_optimizer does not hold .*torch\.optim\.Adam\(rate\.parameters"):
            online_of(model, optimizer, **given)
        assert optimizer.param_groups[0]["lr"] == 0.05
    rate = LearningRate.of(optimizer)  # what the message says
    meta_optimizer = torch.optim.Adam(rate.parameters(), lr=0.1)
    online = online_of(model, optimizer, learning_rate=rate, meta_optimizer=meta_optimizer)
    online.step(batches[0], batches[1])
    assert abs(math.log(optimizer.param_groups[0]["lr"] / 0.05)) == pytest.approx(0.1, rel=1e-4)


# Algorithm 3 -------------------------------------------------------------------------------------------------------


def quadratic(curvature):
    """½ h (w − 1)²: the rate that is best for one step is 1/h."""
    batch = (torch.full((4, 1), math.sqrt(curvature)), torch.full((4, 1), math.sqrt(curvature)))
    return [batch], lambda: nn.Linear(1, 1, bias=False)


def test_the_papers_algorithm_finds_the_rate_that_is_best_for_one_step():
    """mean squared error has curvature 2h here, so 1/(2h)."""
    batches, make_model = quadratic(4.0)
    torch.manual_seed(0)
    rate = LearningRate([0.001])
    outcome = initialise_learning_rate(
        rate,
        make_model,
        batches,
        batches,
        make_optimizer=lambda p: torch.optim.SGD(p, lr=123.0),
        kind="regression",
        steps=800,
        rollout_steps=1,
        rehearsals=0,
    )
    assert outcome.steps == 800 and rate.rates[0] == pytest.approx(1 / 8, rel=0.05)


def test_a_model_where_a_function_belongs_is_refused():
    batches, make_model = quadratic(4.0)
    options = {"make_optimizer": lambda p: torch.optim.SGD(p, lr=0.1), "kind": "regression"}
    with pytest.raises(TypeError, match="make_model must be a function that builds one, got Linear"):
        initialise_learning_rate(LearningRate([0.1]), make_model(), batches, batches, **options)


def test_a_score_without_a_rehearsal_is_refused():
    batches, make_model = quadratic(4.0)
    options = {"make_optimizer": lambda p: torch.optim.SGD(p, lr=0.1), "kind": "regression", "rehearsals": 0}
    with pytest.raises(ValueError, match="validate=function has no effect without rehearsals; leave it out"):
        initialise_learning_rate(
            LearningRate([0.1]), make_model, batches, batches, validate=lambda m: (0, 0), **options
        )


def test_a_rate_that_is_worse_in_rehearsal_is_not_kept():
    batches, make_model = quadratic(4.0)
    torch.manual_seed(0)
    rate = LearningRate([0.1])
    outcome = initialise_learning_rate(
        rate,
        make_model,
        batches,
        batches,
        make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        kind="regression",
        steps=64,
        meta_learning_rate=0.5,
        rehearsals=3,
        rehearsal_steps=5,
        validate=lambda model: (float(rate.rates[0] != pytest.approx(0.1)), 0.0),
    )
    assert outcome.chosen_step == 0 and rate.rates == pytest.approx([0.1])
    assert outcome.rehearsals.step.tolist() == [0, 32, 45, 64]
    assert outcome.rehearsals.error.tolist() == [0, 1, 1, 1]


# In fit ------------------------------------------------------------------------------------------------------------


def clouds():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(120, 5, generator=generator)
    targets = (inputs @ torch.randn(5, 3, generator=generator)).argmax(1)
    splits = [Split(inputs[a : a + 40], targets[a : a + 40], torch.arange(a, a + 40)) for a in (0, 40, 80)]
    return Dataset("clouds", "classification", *splits, 3, (5,))


OPTIONS = {"steps": 24, "batch_size": 10, "evaluate_every": 4, "seed": 3, "progress": False}


def trained(lr=0.1, scheduler=None, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    scheduler = scheduler(optimizer) if scheduler else None
    history = fit(model, F.cross_entropy, clouds(), optimizer=optimizer, scheduler=scheduler, **{**OPTIONS, **options})
    return history, flat(model)


def test_fit_learns_the_learning_rate_online_and_resumes_it_bit_for_bit(tmp_path, monkeypatch):
    options = {"online": True, "learn": "learning_rate", "meta_learning_rate": 0.05}
    history, theta = trained(**options)
    assert history.learning_rate.nunique() == 7 and history.learning_rate.iloc[-1] > 0.15
    assert history.meta_loss.iloc[1:].notna().all()

    class StopError(Exception):
        pass

    def stop(step, model, loss):
        if step == 16:
            raise StopError

    with pytest.raises(StopError):
        trained(**options, checkpoint=tmp_path / "run", callback=stop)
    resumed, resumed_theta = trained(**options, checkpoint=tmp_path / "run")
    assert torch.equal(theta, resumed_theta)
    assert resumed.learning_rate.tolist() == history.learning_rate.tolist()


def test_a_recorded_schedule_is_replayed(tmp_path):
    """c = 2 gives the run with twice the rate; a changing c is interpolated, and checkpointed."""
    history, theta = trained(lr=0.1, scheduler=lambda optimizer: scaled_schedule(optimizer, [0, 24], [2.0, 2.0]))
    assert torch.equal(theta, trained(lr=0.2)[1]) and set(history.learning_rate) == {0.2}

    def scheduler(optimizer):
        return scaled_schedule(optimizer, [0, 8, 16], [1.0, 3.0, -1.0])

    history, theta = trained(scheduler=scheduler, checkpoint=tmp_path / "run")
    assert history.learning_rate.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.15, 0, 0, 0])
    (tmp_path / "half").mkdir()
    stopped = iter([False] * 3 + [True])

    def stop(step, model, loss):
        if next(stopped):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(scheduler=scheduler, checkpoint=tmp_path / "half/run", callback=stop)
    resumed, resumed_theta = trained(scheduler=scheduler, checkpoint=tmp_path / "half/run")
    assert torch.equal(theta, resumed_theta) and resumed.learning_rate.tolist() == history.learning_rate.tolist()


def test_a_replayed_schedule_multiplies_the_one_that_was_there():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler = scaled_schedule(optimizer, [0, 4], [2.0, 2.0], schedule=lambda step: 0.1 if step >= 2 else 1.0)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.2, 0.2, 0.02, 0.02])


def test_a_schedule_that_cannot_be_replayed_is_refused():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    for steps, values, message in (
        ([0, 1], [1.0], "one scale for each step"),
        ([0, 5, 5], [1.0, 2.0, 3.0], "ascending order; give the schedule of one run"),
        ([0, 5], [1.0, math.nan], "the scale at step 5 is not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            scaled_schedule(optimizer, steps, values)
    with pytest.raises(ValueError, match="exclude each other"):
        trained(scheduler=lambda o: scaled_schedule(o, [0], [1.0]), online=True, learn="learning_rate")


def test_more_rates_than_parameter_groups_are_refused_and_none_is_set():
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="2 learning rates for an optimizer of 1 parameter groups"):
        OnlineLearningRate(model, F.cross_entropy, optimizer, learning_rate=LearningRate([0.5, 0.2]))
    assert optimizer.param_groups[0]["lr"] == 0.1
