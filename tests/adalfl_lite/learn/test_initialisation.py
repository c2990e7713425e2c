"""Algorithm 1 against itself written again, and the three additions: imitation, rollouts and rehearsals."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adalfl_lite import Initialiser, learn, load_dataset
from adalfl_lite.learn.imitation import imitate
from adalfl_lite.learn.learning_rate import LearningRate
from adalfl_lite.learn.meta_learning import endless
from adalfl_lite.losses.network import LossNetwork
from tests.shorthand import initialise, initialise_learning_rate


def batches_of(kind, count, rows=16, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.linspace(-1, 1, 12, dtype=dtype).view(4, 3)
    found = []
    for _ in range(count):
        x = torch.randn(rows, 4, generator=generator, dtype=dtype)
        y = x @ teacher
        found.append((x, y.argmax(1) if kind == "classification" else y))
    return found


def sgd(lr=0.1, momentum=0.0):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=momentum)


def make_model():
    return nn.Linear(4, 3)


def weights(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def by_the_paper(network, train, valid, steps, lr, eta):
    """Algorithm 1, from the paper alone: a fresh model, one step of SGD, double backward, Adam written out."""
    phi = list(network.parameters())
    first, second = [[torch.zeros_like(p) for p in phi] for _ in range(2)]
    for t, (x, y), (x_val, y_val) in zip(
        range(1, steps + 1), itertools.cycle(train), itertools.cycle(valid), strict=False
    ):
        model = make_model().double()
        gradients = torch.autograd.grad(network(model(x), y), [model.weight, model.bias], create_graph=True)
        weight, bias = (p - lr * g for p, g in zip((model.weight, model.bias), gradients, strict=True))
        loss = F.cross_entropy if y.dtype == torch.int64 else F.mse_loss
        meta_gradient = torch.autograd.grad(loss(x_val @ weight.T + bias, y_val), phi)
        with torch.no_grad():
            for p, g, m, s in zip(phi, meta_gradient, first, second, strict=True):
                m.mul_(0.9).add_(0.1 * g)
                s.mul_(0.999).add_(0.001 * g * g)
                p -= eta * (m / (1 - 0.9**t)) / ((s / (1 - 0.999**t)).sqrt() + 1e-8)


@pytest.mark.parametrize("engine", ["forward", "unrolled"])
@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_without_the_additions_it_is_algorithm_1(kind, engine):
    train, valid = (batches_of(kind, n, seed=n, dtype=torch.float64) for n in (7, 3))
    network = LossNetwork.default(kind, hidden=(8, 8), generator=torch.Generator().manual_seed(0)).double()
    expected, start = network.clone(), weights(network)
    torch.manual_seed(4)
    by_the_paper(expected, train, valid, steps=30, lr=0.1, eta=1e-2)
    torch.manual_seed(4)
    result = initialise(
        network,
        lambda: make_model().double(),
        train,
        valid,
        make_optimizer=sgd(),
        steps=30,
        meta_learning_rate=1e-2,
        rollout_steps=1,
        rehearsals=0,
        imitation_steps=0,
        engine=engine,
    )
    torch.testing.assert_close(weights(network), weights(expected), rtol=1e-8, atol=1e-9)
    assert (weights(network) - start).abs().max() > 0.05
    assert (result.steps, result.chosen_step, result.abandoned_rollouts, len(result.rehearsals)) == (30, 30, 0, 0)


def test_a_rollout_keeps_model_and_optimizer_for_its_steps():
    drawn, optimizers = [], []

    def draw():
        drawn.append(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval())
        return drawn[-1]

    def make_optimizer(parameters):
        optimizers.append(torch.optim.SGD(parameters, lr=0.01, momentum=0.9))
        return optimizers[-1]

    batches = batches_of("classification", 5)
    options = {"make_optimizer": make_optimizer, "steps": 10, "rollout_steps": 4, "rehearsals": 0, "imitation_steps": 0}
    initialise(LossNetwork.classification(), draw, batches, batches, **options)
    # the first is drawn on trial and left alone; the others were set to train mode
    assert [int(model[1].num_batches_tracked) for model in drawn] == [0, 4, 4, 2]
    assert len(optimizers) == 4 and not optimizers[0].state
    assert all("momentum_buffer" in optimizer.state[next(iter(optimizer.state))] for optimizer in optimizers[1:])


def test_momentum_is_seen_only_by_longer_rollouts():
    """From its second step on, momentum changes θ', so the learned φ must differ; after one step it must not."""
    found = {}
    for rollout_steps, momentum in itertools.product((1, 5), (0.0, 0.9)):
        torch.manual_seed(0)
        network = LossNetwork.classification(generator=torch.Generator().manual_seed(0))
        batches = batches_of("classification", 5)
        options = {"steps": 10, "rollout_steps": rollout_steps, "rehearsals": 0, "imitation_steps": 0}
        initialise(network, make_model, batches, batches, make_optimizer=sgd(momentum=momentum), **options)
        found[rollout_steps, momentum] = weights(network)
    assert torch.equal(found[1, 0.0], found[1, 0.9])
    assert not torch.equal(found[5, 0.0], found[5, 0.9])


# Imitation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "bound"), [("classification", 0.5), ("regression", 0.02)])
def test_an_imitation_pushes_outputs_as_the_task_loss_does(kind, bound):
    """Against the task loss's gradient written by hand, on outputs that were not fitted."""
    torch.manual_seed(0)
    network = LossNetwork.default(kind)
    reported = imitate(network, F.cross_entropy if kind == "classification" else F.mse_loss, torch.empty(50, 3))
    output = (2 * torch.randn(400, 3)).requires_grad_(True)
    target = torch.randint(3, (400,)) if kind == "classification" else torch.randn(400, 3)
    (given,) = torch.autograd.grad(network(output, target), output)
    if kind == "classification":
        wanted = (output.softmax(1) - F.one_hot(target, 3)) / 400
    else:
        wanted = 2 * (output - target) / output.numel()
    error = ((given - wanted).square().sum() / wanted.square().sum()).item()
    assert error < bound and reported < bound
    assert F.cosine_similarity(given.flatten(), wanted.flatten(), dim=0) > 0.8


def test_the_imitation_is_rehearsed_first_and_kept_if_nothing_beats_it():
    scores = [(0.2, 1.0), (0.3, 1.0), (0.2, 1.0), (0.5, 1.0), (0.5, 1.0), (0.5, 1.0), (0.5, 1.0)]
    network, result, seen, _ = rehearsed(scores, imitation_steps=5)
    assert result.rehearsals.step.tolist() == [0, 11, 16, 23, 32, 45, 64]
    assert result.chosen_step == 0 and torch.equal(weights(network), seen[0])
    alone = LossNetwork.classification(generator=torch.Generator().manual_seed(0))
    assert not torch.equal(weights(alone), seen[0])


# Rehearsals --------------------------------------------------------------------------------------------------------


def rehearsed(scores, **options):
    """Run with ``validate`` answering from a list; also return φ as it was at each rehearsal, and what was tried."""
    network = LossNetwork.classification(generator=torch.Generator().manual_seed(0))
    answers, seen, models = iter(scores), [], []

    def validate(model):
        seen.append(weights(network))
        models.append(model)
        return next(answers)

    torch.manual_seed(1)
    batches = batches_of("classification", 5)
    options = {"steps": 64, "rehearsals": 6, "rehearsal_steps": 3, "imitation_steps": 0, **options}
    result = initialise(
        network,
        make_model,
        batches,
        batches,
        make_optimizer=sgd(),
        meta_learning_rate=1e-2,
        validate=validate,
        **options,
    )
    return network, result, seen, models


def test_the_phi_with_the_lowest_validation_error_is_kept():
    scores = [(0.5, 1.0), (0.3, 2.0), (0.2, 5.0), (0.2, 4.0), (0.2, 4.0), (0.4, 0.1)]
    network, result, seen, models = rehearsed(scores)
    table = result.rehearsals
    assert list(table.columns) == ["step", "error", "task_loss"]
    assert table.step.tolist() == [11, 16, 23, 32, 45, 64]  # growing by √2 up to the last step
    assert list(zip(table.error, table.task_loss, strict=True)) == scores
    assert result.chosen_step == 32  # of equal errors the lower task loss, of equal pairs the first
    assert torch.equal(weights(network), seen[3])
    assert len({tuple(phi.tolist()) for phi in seen}) == 6 and len({id(model) for model in models}) == 6


def test_a_rehearsal_trains_a_fresh_model_with_phi_frozen_on_training_batches():
    """The score in the table is had again by a plain loop with the φ of that step."""
    train, valid = batches_of("classification", 4, seed=1), batches_of("classification", 25, seed=2)
    torch.manual_seed(1)
    kept = {}

    def watched():
        kept["random"], kept["phi"] = torch.get_rng_state(), network.clone()
        return make_model()

    network = LossNetwork.classification(generator=torch.Generator().manual_seed(0))
    # one rehearsal after the only step: its model is the last one drawn
    result = initialise(
        network,
        watched,
        train,
        valid,
        make_optimizer=sgd(),
        steps=1,
        imitation_steps=0,
        rollout_steps=1,
        rehearsals=1,
        rehearsal_steps=6,
    )
    torch.set_rng_state(kept["random"])
    model = make_model()
    optimizer = sgd()(model.parameters())
    for x, y in itertools.islice(itertools.cycle(train), 1, 7):  # the first batch went into the step
        optimizer.zero_grad()
        kept["phi"](model(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        losses = [F.cross_entropy(model(x), y).item() for x, y in valid[:20]]
        errors = [(model(x).argmax(1) != y).float().mean().item() for x, y in valid[:20]]
    row = result.rehearsals.iloc[0]
    assert row.task_loss == pytest.approx(sum(losses) / 20, rel=1e-6)
    assert row.error == pytest.approx(sum(errors) / 20, rel=1e-6)


def test_a_rehearsal_leaves_the_learned_loss_as_it_was():
    """With as many model draws and batches, φ after all steps does not depend on what validation answers."""
    last = [rehearsed([(score, 1.0)] * 6)[2][-1] for score in (0.1, 0.9)]
    assert torch.equal(*last)


# Divergence --------------------------------------------------------------------------------------------------------


def test_a_diverging_rollout_is_abandoned_and_another_model_drawn():
    draws = 0

    def draw():
        nonlocal draws
        draws += 1
        return make_model()

    batches = batches_of("regression", 3)
    options = {
        "make_optimizer": sgd(),
        "steps": 30,
        "rollout_steps": 1000,
        "rehearsals": 0,
        "imitation_steps": 0,
        "meta_learning_rate": 0.0,
    }
    network = LossNetwork.regression(generator=torch.Generator().manual_seed(0))
    phi = weights(network)
    calm = initialise(network, draw, batches, batches, **options)
    assert (calm.abandoned_rollouts, draws, calm.steps) == (0, 1 + 1, 30)  # one of them on trial
    draws, wild_batches = 0, [*batches[:2], tuple(1e7 * t for t in batches[2])]  # every third step throws θ far away
    wild = initialise(network, draw, wild_batches, batches, **options)
    assert (wild.abandoned_rollouts, draws, wild.steps) == (10, 10 + 1, 30)
    assert torch.equal(weights(network), phi)


def test_numbers_that_are_not_finite_abandon_a_rollout_and_leave_phi():
    batches = batches_of("classification", 4)
    batches[2] = (torch.full_like(batches[2][0], 3e38), batches[2][1])  # finite, until they are summed
    network = LossNetwork.classification()
    options = {"steps": 8, "rollout_steps": 100, "rehearsals": 0, "imitation_steps": 0}
    result = initialise(network, make_model, batches, batches, make_optimizer=sgd(), **options)
    assert result.abandoned_rollouts == 2 and torch.isfinite(weights(network)).all()


def test_a_rehearsal_that_diverged_is_infinite_and_never_chosen():
    scores = [(0.0, math.nan), (0.9, 9.0), (0.1, math.inf), (math.nan, 1.0), (0.95, 9.0), (0.95, 9.0)]
    _, result, _, _ = rehearsed(scores)
    assert result.chosen_step == 16
    assert result.rehearsals.error.tolist() == [math.inf, 0.9, math.inf, math.inf, 0.95, 0.95]
    assert result.rehearsals.task_loss.tolist() == [math.inf, 9.0, math.inf, math.inf, 9.0, 9.0]


def test_all_rehearsals_diverged():
    with pytest.raises(FloatingPointError, match="all 6 rehearsals diverged; lower the base learning rate"):
        rehearsed([(0.1, math.nan)] * 6)


# What one-step rewards do ------------------------------------------------------------------------------------------


def test_one_step_rewards_make_the_loss_ever_steeper():
    """The short-horizon bias: rehearsals and rollouts are there because of this."""
    torch.manual_seed(0)
    network = LossNetwork.classification(generator=torch.Generator().manual_seed(0))
    batches = batches_of("classification", 20)
    logits = (torch.randn(200, 3), torch.arange(200) % 3)

    def slope():
        prediction = logits[0].clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(network(prediction, logits[1]), prediction)
        return gradient.norm().item()

    slopes = []
    for _ in range(4):
        options = {"steps": 100, "rollout_steps": 1, "rehearsals": 0, "imitation_steps": 0}
        initialise(network, make_model, batches, batches, make_optimizer=sgd(0.01), **options)
        slopes.append(slope())
    assert slopes == sorted(slopes), slopes
    assert slopes[-1] > 3 * slopes[0], slopes


# Refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"rollout_steps": 0}, "rollout_steps must be at least 1, got 0"),
        ({"rehearsals": -1}, "rehearsals must be at least 0, got -1"),
        ({"rehearsals": 0, "validate": lambda model: (0.0, 0.0)}, "validate=function has no effect without rehearsals"),
        ({"rehearsal_steps": 0}, "rehearsal_steps must be at least 1, got 0"),
        ({"imitation_steps": -1}, "imitation_steps must be at least 0, got -1"),
        ({"engine": "fast"}, "engine must be one of"),
        ({"meta_learning_rate": -1.0}, "meta_learning_rate must be 0 or more and finite, got -1"),
    ],
)
def test_arguments_out_of_range_are_refused_and_phi_is_untouched(options, message):
    network = LossNetwork.classification()
    before, batches = copy.deepcopy(weights(network)), batches_of("classification", 2)
    with pytest.raises(ValueError, match=message):
        initialise(network, make_model, batches, batches, make_optimizer=sgd(), **options)
    assert torch.equal(weights(network), before)


@pytest.mark.parametrize("settings", [{}, {"imitation_steps": 0}, {"imitation_steps": 0, "rehearsals": 0}])
@pytest.mark.parametrize("what", ["loss", "learning rate"])
def test_the_same_model_again_is_refused_before_anything_is_learned(what, settings):
    """Even where one rollout is all, and so no second model would be drawn."""
    model, batches = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval(), batches_of("classification", 2)
    learned = LossNetwork.classification() if what == "loss" else LearningRate([0.1])
    before = copy.deepcopy((model.state_dict(), learned.state_dict()))
    few = {"steps": 5, "rollout_steps": 20, "rehearsal_steps": 2, "make_optimizer": sgd(), **settings}
    with pytest.raises(ValueError, match="make_model returned weights of an earlier model again; it must build"):
        if what == "loss":
            initialise(learned, lambda: model, batches, batches, **few)
        else:
            initialise_learning_rate(learned, lambda: model, batches, batches, kind="classification", **few)
    assert not model.training and model[0].weight.grad is None
    for now, then in zip((model, learned), before, strict=True):
        assert all(torch.equal(tensor, then[name]) for name, tensor in now.state_dict().items())


BODY = nn.Linear(4, 4)
PAIR = itertools.cycle([nn.Linear(4, 3), nn.Linear(4, 3)])


@pytest.mark.parametrize(
    "draw",
    [lambda: nn.Sequential(BODY, nn.Linear(4, 3)), lambda: nn.Sequential(BODY), lambda: next(PAIR)],
    ids=["a shared body", "another wrapper", "two in turn"],
)
@pytest.mark.parametrize("what", ["loss", "learning rate", "seeds"])
def test_models_that_share_weights_are_refused_and_nothing_is_learned(what, draw):
    """By the time a third of two in turn is asked for, what was learned is put back."""
    batches, learned = batches_of("classification", 2), LossNetwork.classification()
    rate = LearningRate([0.1])
    before = [copy.deepcopy(one.state_dict()) for one in (learned, rate)]
    few = {"make_optimizer": sgd(), "settings": Initialiser.published(steps=5)}
    with pytest.raises(ValueError, match=r"make_model returned weights of an earlier model .* requires_grad_\(False\)"):
        if what == "loss":
            learn.initialise(learned, draw, batches, batches, **few)
        elif what == "seeds":
            learn.initialise_seeds(LossNetwork.classification, draw, [batches] * 2, [batches] * 2, seeds=[0, 1], **few)
        else:
            learn.initialise_learning_rate(rate, draw, batches, batches, kind="classification", **few)
    for one, state in zip((learned, rate), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


def test_models_may_share_what_is_frozen():
    """The remedy, tried."""
    body, batches = nn.Linear(4, 4).requires_grad_(False), batches_of("classification", 2)
    few = {"make_optimizer": sgd(), "settings": Initialiser.published(steps=5)}
    learned = LossNetwork.classification()
    before = weights(learned).clone()
    learn.initialise(learned, lambda: nn.Sequential(body, nn.Linear(4, 3)), batches, batches, **few)
    assert not torch.equal(weights(learned), before)


def test_seeds_that_would_share_one_network_are_refused():
    kept, batches = LossNetwork.classification(), batches_of("classification", 2)
    given = {"make_optimizer": sgd(), "seeds": [0, 1], "settings": Initialiser.published(steps=2)}
    with pytest.raises(ValueError, match="make_loss_network returned the same weights for two seeds"):
        learn.initialise_seeds(lambda: kept, make_model, [batches] * 2, [batches] * 2, **given)


OTHER = nn.Linear(4, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"make_optimizer": lambda p: torch.optim.SGD(OTHER.parameters(), lr=0.1)}, "model"),
        ({"make_optimizer": lambda p: torch.optim.LBFGS(p)}, "LBFGS needs a closure, which no learner has"),
        ({"validate": lambda model: 0.5}, r"validate must return \(error, task loss\), got 0.5"),
        ({"validate": lambda model: (0.5,)}, r"validate must return \(error, task loss\), got \(0.5,\)"),
        ({"train": iter(batches_of("classification", 3))}, "the train batches are empty or used up"),
    ],
)
def test_what_fails_on_the_way_leaves_the_loss_as_it_was(options, message):
    learned, batches = LossNetwork.classification(), batches_of("classification", 2)
    before = weights(learned).clone()
    given = {"train": batches, "valid": batches, "make_optimizer": sgd(), **options}
    with pytest.raises((ValueError, TypeError), match=message):
        learn.initialise(learned, make_model, settings=Initialiser(steps=20, rehearsal_steps=2), **given)
    assert torch.equal(weights(learned), before)


def test_validate_may_return_tensors():
    learned, batches = LossNetwork.classification(), batches_of("classification", 2)
    given = {"make_optimizer": sgd(), "validate": lambda model: (torch.tensor(0.5), torch.tensor(1.0))}
    done = learn.initialise(
        learned, make_model, batches, batches, settings=Initialiser(steps=2, rehearsal_steps=2), **given
    )
    assert done.rehearsals.error.dtype == float and (done.rehearsals.error == 0.5).all()


def test_the_model_that_is_drawn_on_trial_takes_no_random_numbers_from_the_others():
    drawn = []

    def draw():
        drawn.append(make_model())
        return drawn[-1]

    torch.manual_seed(3)
    expected = make_model().weight
    options = {"steps": 1, "rehearsals": 0, "imitation_steps": 0, "make_optimizer": sgd(lr=0.0)}
    network, batches = LossNetwork.classification(), batches_of("classification", 2)
    torch.manual_seed(3)
    initialise(network, draw, batches, batches, **options)
    assert len(drawn) == 2 and all(torch.equal(model.weight, expected) for model in drawn)


def test_a_learning_rate_has_one_engine():
    batches = batches_of("classification", 2)
    with pytest.raises(ValueError, match="engine='unrolled' has no effect on a learning rate; leave it out"):
        options = {"make_optimizer": sgd(), "kind": "classification", "engine": "unrolled"}
        initialise_learning_rate(LearningRate([0.1]), make_model, batches, batches, **options)


@pytest.mark.parametrize("empty", ["train", "valid"])
def test_an_empty_loader_is_named(empty):
    loaders = {name: [] if name == empty else batches_of("classification", 2) for name in ("train", "valid")}
    with pytest.raises(ValueError, match=f"the {empty} batches are empty or used up"):
        initialise(LossNetwork.classification(), make_model, **loaders, make_optimizer=sgd(), steps=2)


def test_an_iterator_that_cannot_start_again_is_named():
    assert list(itertools.islice(endless([1, 2], "train"), 5)) == [1, 2, 1, 2, 1]
    once = endless(iter([1, 2]), "train")
    assert [next(once), next(once)] == [1, 2]
    with pytest.raises(
        ValueError, match="train batches are empty or used up; pass a loader that can be iterated again"
    ):
        next(once)


def test_the_settings_are_the_recommended_ones_or_the_papers():
    """2,500 meta steps; ours with imitation, rollouts and eight rehearsals, at 2,500/√2ᵏ; the paper's with none."""
    ours, paper = Initialiser(), Initialiser.published(steps=10)
    assert (ours.steps, ours.imitation_steps, ours.rollout_steps, ours.rehearsals) == (2500, 800, 20, 8)
    assert ours.moments == [221, 312, 442, 625, 884, 1250, 1768, 2500]
    assert (paper.steps, paper.imitation_steps, paper.rollout_steps, paper.moments) == (10, 0, 1, [])
    assert ours.with_(steps=10) != ours == Initialiser() and hash(ours) == hash(Initialiser())


@pytest.mark.parametrize("part", [lambda data: data, lambda data: data.train], ids=["a data set", "a split"])
def test_data_in_the_place_of_batches_are_refused_with_what_to_give(part):
    data, learned = load_dataset("iris"), LossNetwork.classification()
    before, few = weights(learned).clone(), {"make_optimizer": sgd(), "settings": Initialiser(steps=2, rehearsals=0)}
    for train, valid in ((part(data), [data.valid[:20]]), ([data.train[:20]], part(data))):
        with pytest.raises(TypeError, match=r"(train|valid) must be batches .* data.train.batches\(20, seed=0\)"):
            learn.initialise(learned, make_model, train, valid, **few)
    assert torch.equal(weights(learned), before)
    learn.initialise(learned, make_model, data.train.batches(20, seed=0), data.valid.batches(20, seed=0), **few)
