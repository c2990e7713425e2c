"""Other tensors in the place of a model's own, and a step that fails as if it had not been tried."""

import copy
import functools
import itertools
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import adalfl_lite
from adalfl_lite import LossNetwork, OnlineLearningRate, OnlineLoss, evaluate
from adalfl_lite.data.dataset import Dataset, Split
from adalfl_lite.engines.steps import plain_step
from adalfl_lite.learn.online import ENGINES
from adalfl_lite.passes import Attributes, Undo, replaced, slots_of, unmarked
from tests.models import Reverse
from tests.shorthand import fit, fit_seeds, initialise, initialise_seeds


class Shared(nn.Module):
    """A layer with two names, a weight in two layers, a recurrence, buffers, and a feature map that is kept."""

    def __init__(self):
        super().__init__()
        self.first = self.alias = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6, bias=False)
        self.tied.weight = self.first.weight
        self.norm, self.recurrent, self.last = nn.BatchNorm1d(6), nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)
        self.dropout, self.calls, self.log = nn.Dropout(0.3), 0, []

    def forward(self, x):
        self.calls += 1
        self.log.append(self.calls)
        self.features = self.norm(self.tied(torch.tanh(self.alias(torch.tanh(self.first(x))))))
        return self.last(self.dropout(self.recurrent(self.features.view(-1, 2, 3))[0][:, -1]))


def batch(seed, rows=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, generator=generator).double(), torch.randint(3, (rows,), generator=generator)


def make(build=Shared, optimizer=torch.optim.Adam, **options):
    torch.manual_seed(0)
    model = build().double()
    optimizer = optimizer(model.parameters(), lr=0.01)
    for seed in (7, 8):
        plain_step(model, F.cross_entropy, optimizer, batch(seed))
    optimizer.zero_grad()
    network = LossNetwork.classification(generator=torch.Generator().manual_seed(1)).double()
    return OnlineLoss(model, network, optimizer, meta_learning_rate=1e-3, **options)


def everything(online):
    """All that a step may change, as copies, and all that it may not exchange, as it is."""
    model, optimizers = online.model, (online.optimizer, online.meta_optimizer)
    tensors = [*model.parameters(), *model.buffers(), *online.loss_network.parameters()]
    states = [{k: copy.deepcopy(v) for k, v in o.state_dict().items()} for o in optimizers]
    return {
        "values": [t.detach().clone() for t in tensors],
        "objects": [id(t) for t in tensors],
        "grads": [t.grad for t in tensors],
        "states": states,
        "slots": [(name, id(t)) for name, t in slots_of(model)],
        "random": torch.get_rng_state(),
        "attributes": Attributes(model),
    }


def seeded_step(online):
    torch.manual_seed(3)
    return online.step(batch(0), batch(1))


def assert_same(before, after):
    assert before["objects"] == after["objects"] and before["slots"] == after["slots"]
    for key in ("values", "grads", "states", "random"):
        torch.testing.assert_close(before[key], after[key], rtol=0, atol=0)
    assert before["attributes"] == after["attributes"]


def test_what_is_replaced_is_the_tensor_under_all_its_names_and_comes_back():
    online = make()
    model = online.model
    before, weight = everything(online), model.first.weight
    model.eval()
    del model.features  # a tensor with a graph cannot be copied
    before["attributes"] = Attributes(model.train())
    model.eval()
    with torch.no_grad():
        expected = copy.deepcopy(model.requires_grad_(False))
        for parameter in expected.parameters():
            parameter.mul_(1.5)
    model.requires_grad_(True)
    with unmarked(model), replaced(model, {id(p): 1.5 * p.detach() for p in model.parameters()}):
        assert model.tied.weight is model.first.weight is model.alias.weight is not weight
        torch.testing.assert_close(model(batch(0)[0]), expected(batch(0)[0]), rtol=1e-12, atol=1e-12)
    model.train()
    assert_same(before, everything(online))


def test_a_buffer_that_the_forward_pass_exchanges_is_back_too():
    class Average(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(2))

        def forward(self, x):
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
            return x - self.mean

    model = Average()
    own = model.mean
    with replaced(model, {id(own): torch.ones(2)}):
        model(torch.randn(3, 2))
    assert model.mean is own and not own.any()


class Breaks(nn.Module):
    """Fails at a moment of its choice."""

    def __init__(self, at):
        super().__init__()
        self.body, self.at, self.passes = Shared(), at, itertools.count(-1)  # which no step puts back

    def forward(self, x):
        if next(self.passes) == self.at:  # two passes warm the optimizer up
            raise KeyboardInterrupt
        return self.body(x)


@pytest.mark.parametrize(
    ("engine", "at"), [("forward", 1), ("forward", 2), ("forward", 3), ("shared", 2), ("unrolled", 2)]
)
def test_a_step_that_is_interrupted_was_never_tried(engine, at):
    """In the training pass, the meta pass or the tangent pass, even by Ctrl-C; the next step is the one it was."""
    online, twin = make(lambda: Breaks(at), engine=engine), make(lambda: Breaks(-9), engine=engine)
    before = everything(online)
    with pytest.raises(KeyboardInterrupt):
        online.step(batch(0), batch(1))
    assert_same(before, everything(online))
    found, expected = (seeded_step(learner) for learner in (online, twin))
    torch.testing.assert_close(found.meta_gradient, expected.meta_gradient, rtol=0, atol=0)
    assert all(torch.equal(p, q) for p, q in zip(online.model.parameters(), twin.model.parameters(), strict=True))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("what", ["learned loss", "task loss", "meta-optimizer"])
def test_whatever_fails_leaves_everything_as_it_was(engine, what):
    online = make(engine=engine)
    inputs, targets = batch(1)
    meta_batch = (inputs * float("inf"), targets) if what == "task loss" else (inputs, targets)
    first = (batch(0)[0] * float("nan"), batch(0)[1]) if what == "learned loss" else batch(0)
    error = ValueError
    if what == "meta-optimizer":
        online.meta_optimizer.register_step_post_hook(lambda *_: 1 / 0)
        error = ZeroDivisionError
    before = everything(online)
    with pytest.raises(error):
        online.step(first, meta_batch)
    assert_same(before, everything(online))


def test_another_engine_takes_the_step_that_one_refused():
    class Model(Shared):
        def forward(self, x):
            return super().forward(Reverse.apply(self.first(x)))

    online, twin = make(Model), make(Model, engine="unrolled")
    before = everything(online)
    with pytest.raises(NotImplementedError, match="engine='unrolled' can"):
        online.step(batch(0), batch(1))
    assert_same(before, everything(online))
    online.engine = "unrolled"
    found, expected = (seeded_step(learner) for learner in (online, twin))
    torch.testing.assert_close(found.meta_gradient, expected.meta_gradient, rtol=0, atol=0)


class Counts(nn.Module):
    """A loss of one's own that counts how often it is asked."""

    kind = "classification"

    def __init__(self):
        super().__init__()
        self.scale, self.asked = nn.Parameter(torch.ones((), dtype=torch.float64)), 0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, prediction, target):
        self.asked += 1
        self.count += 1
        return self.scale * F.cross_entropy(prediction, target)


def test_a_loss_is_as_it_was_after_a_step_that_failed():
    shared, loss = make().model, Counts()
    online = OnlineLoss(shared, loss, torch.optim.SGD(shared.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="NaN or infinity"):
        online.step(batch(0), (batch(1)[0] * float("inf"), batch(1)[1]))
    assert loss.asked == 0 and loss.count == 0
    online.step(batch(0), batch(1))
    assert loss.asked == loss.count == 1


def test_a_learned_rate_that_fails_leaves_everything_as_it_was():
    online = make()
    learner = OnlineLearningRate(online.model, F.cross_entropy, online.optimizer)
    rates, before = learner.learning_rate.rates, everything(online)
    with pytest.raises(FloatingPointError):
        learner.step(batch(0), (batch(1)[0] * float("inf"), batch(1)[1]))
    assert_same(before, everything(online))
    assert learner.learning_rate.rates == rates


def test_an_undo_within_an_undo_goes_back_to_the_first():
    online = make()
    before = everything(online)
    undo = Undo(online.model, online.optimizer)
    with pytest.raises(ZeroDivisionError), undo:
        plain_step(online.model, F.cross_entropy, online.optimizer, batch(0))
        with undo:
            plain_step(online.model, F.cross_entropy, online.optimizer, batch(1))
        raise ZeroDivisionError
    assert_same(before, everything(online))


@pytest.mark.parametrize("engine", ENGINES)
def test_attributes_end_as_after_one_pass(engine):
    """A model that counts its passes counts one a step, as in a plain loop."""
    online = make(engine=engine)
    for i in range(3):
        online.step(batch(i), batch(i + 1))
        assert online.model.calls == 2 + i + 1 and online.model.log == [*range(1, 4 + i)]


def test_learners_in_several_threads_are_as_good_as_alone():
    """Each in its thread; without dropout, whose numbers all threads draw from one source."""

    def learn(engine, found):
        online = learners[engine]
        for i in range(6):
            step = online.step(batch(i), batch(i + 1))
        found[engine] = [step.meta_gradient, [p.detach().clone() for p in online.model.parameters()]]

    results = []
    for together in (False, True):
        learners = {engine: make(engine=engine) for engine in ENGINES}
        for online in learners.values():
            online.model.dropout.p = 0.0
        found = {}
        threads = [threading.Thread(target=learn, args=(engine, found)) for engine in ENGINES]
        for thread in threads:
            thread.start()
            if not together:
                thread.join()
        for thread in threads:
            thread.join()
        assert found.keys() == set(ENGINES)
        results.append(found)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_a_learner_can_be_copied_between_two_steps_of_any_engine():
    for engine in ENGINES:
        online = make(engine=engine)
        online.model.dropout.p = 0.0
        batches = [batch(i) for i in range(4)]
        online.step(batches[0], batches[1])
        del online.model.features  # which carries a graph, as after any pass of this model
        twin = copy.deepcopy(online)
        for learner in (online, twin):
            learner.step(batches[1], batches[2])
        assert all(torch.equal(p, q) for p, q in zip(online.model.parameters(), twin.model.parameters(), strict=True))
        assert online.optimizer.param_groups[0]["params"][0] is not twin.optimizer.param_groups[0]["params"][0]


class Tied(nn.Module):
    """An activation used twice, a layer with two names, a weight in two layers, and a feature map that is kept."""

    def __init__(self):
        super().__init__()
        self.activation, self.first, self.tied = nn.PReLU(), nn.Linear(6, 6), nn.Linear(6, 6)
        self.alias, self.tied.weight, self.last = self.first, self.first.weight, nn.Linear(6, 3)

    def forward(self, x):
        self.features = self.activation(self.tied(self.activation(self.alias(x))))
        return self.last(self.features)


def tied(seed=0):
    torch.manual_seed(seed)
    model = Tied()
    model(torch.randn(2, 6))  # so that a feature map is there
    return model


def dataset():
    splits = [Split(x.float(), y, torch.arange(len(x))) for x, y in (batch(i, 30) for i in range(3))]
    return Dataset("clouds", "classification", *splits, 3, (6,))


def use_fit(models, **options):
    for i, model in enumerate(models):
        loss = options.get("losses", [F.cross_entropy] * 2)[i]
        given = {"steps": 3, "batch_size": 10, "seed": i, "progress": False}
        given |= {name: value for name, value in options.items() if name != "losses"}
        fit(model, loss, dataset(), optimizer=torch.optim.SGD(model.parameters(), lr=0.1), **given)


def use_initialise(models):
    drawn = iter([tied(9), *models])  # the first is only compared with the next
    batches = [(x.float(), y) for x, y in (batch(i) for i in range(3))]
    options = {"steps": 2, "imitation_steps": 0, "rollout_steps": 1, "rehearsals": 0}
    make_optimizer = functools.partial(torch.optim.SGD, lr=0.1)
    initialise(
        LossNetwork.classification(), lambda: next(drawn), batches, batches, make_optimizer=make_optimizer, **options
    )


def use_initialise_seeds(models):
    drawn = iter([*models, *(tied(i) for i in range(20))])
    batches = [[(x.float(), y) for x, y in (batch(i) for i in range(3))]] * 2
    options = {"steps": 2, "imitation_steps": 0, "rollout_steps": 2, "rehearsals": 0, "seeds": (0, 1)}
    make_optimizer = functools.partial(torch.optim.SGD, lr=0.1)
    initialise_seeds(
        LossNetwork.classification, lambda: next(drawn), batches, batches, make_optimizer=make_optimizer, **options
    )


def networks():
    return [LossNetwork.classification(generator=torch.Generator().manual_seed(i)) for i in range(2)]


def use_fit_seeds(models, **options):
    make_optimizer = functools.partial(torch.optim.SGD, lr=0.1)
    given = {"steps": 3, "batch_size": 10, "seeds": (0, 1), "progress": False, "losses": None, **options}
    fit_seeds(models, given.pop("losses"), dataset(), make_optimizer=make_optimizer, **given)


def step_with(make):
    def use(models):
        for model in models:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            x, y = batch(0)
            make(model, optimizer).step((x.float(), y), (x.float(), y))

    return use


USES = {
    "OnlineLoss": step_with(lambda model, optimizer: OnlineLoss(model, LossNetwork.classification(), optimizer)),
    "OnlineLearningRate": step_with(lambda model, optimizer: OnlineLearningRate(model, F.cross_entropy, optimizer)),
    "evaluate": lambda models: [evaluate(model, dataset().test, "classification") for model in models],
    "fit": use_fit,
    "Stacked": use_fit_seeds,
    "Plain": use_fit,
    "initialise": use_initialise,
    "initialise_seeds": use_initialise_seeds,
}
WITHOUT_MODEL = {
    "Initialisation",
    "Initialiser",
    "Learner",
    "LossNetwork",
    "MetaStep",
    "build_model",
    "endless",
    "load_dataset",
}


def test_every_public_name_is_used_on_shared_modules_or_takes_no_model():
    assert set(adalfl_lite.__all__) == USES.keys() | WITHOUT_MODEL


@pytest.mark.parametrize("name", USES)
def test_public_functions_leave_shared_modules_shared(name):
    models = [tied(i) for i in range(2)]
    before = [[(path, id(t)) for path, t in slots_of(model)] for model in models]
    values = [[p.detach().clone() for p in model.parameters()] for model in models]
    USES[name](models)
    assert before == [[(path, id(t)) for path, t in slots_of(model)] for model in models]
    for model, old in zip(models, values, strict=True):
        assert model.alias is model.first and model.tied.weight is model.first.weight
        moved = any(not torch.equal(p, v) for p, v in zip(model.parameters(), old, strict=True))
        assert moved == (name not in ("evaluate", "initialise_seeds"))  # the latter trains stacks of copies of weights


@pytest.mark.parametrize("online", [False, True])
def test_seeds_together_train_shared_modules_as_each_alone(online):
    together, alone = ([tied(i) for i in range(2)] for _ in range(2))
    options = {"online": True, "meta_learning_rate": 1e-3} if online else {}
    use_fit_seeds(together, losses=networks() if online else None, **options)
    use_fit(alone, losses=networks() if online else [F.cross_entropy] * 2, **options)
    for ours, theirs in zip(together, alone, strict=True):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
