"""The compiled step against the one that is not, and what it refuses. Most tests trace it, but generate no code."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from adalfl_lite import LossNetwork, OnlineLoss, load_dataset
from adalfl_lite.learn.online import ENGINES
from tests.shorthand import fit

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, while it traces
COMPILE = torch.compile
NESTEROV = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without a code generator; records how it was called."""
    calls = []

    def compile(function, *, mode, **options):
        calls.append(mode)
        return COMPILE(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", compile)
    return calls


class Net(nn.Module):
    """BatchNorm, a frozen layer, and a parameter that the output does not depend on."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(5, 6).requires_grad_(False)
        self.norm, self.last = nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.frozen(x))))


def make(kind="classification", make_optimizer=NESTEROV, dtype=torch.float64, **network):
    """A compiled learner and its twin."""
    torch.manual_seed(0)
    model = Net().to(dtype)
    loss = LossNetwork.default(kind, **network).to(dtype)
    learners = []
    for compile in ("default", None):
        m, n = copy.deepcopy(model), copy.deepcopy(loss)
        learners.append(OnlineLoss(m, n, make_optimizer(m.parameters()), meta_learning_rate=1e-2, compile=compile))
    return learners


def batch(rows=8, kind="classification", dtype=torch.float64):
    x = torch.randn(rows, 5, dtype=dtype)
    return x, torch.randint(3, (rows,)) if kind == "classification" else torch.randn(rows, 3, dtype=dtype)


def relative(ours, theirs):
    a, b = (torch.cat([t.detach().double().flatten() for t in ts]) for ts in (ours, theirs))
    return ((a - b).norm() / b.norm()).item()


def check_equal(learners, batches, tolerance):
    for given, meta in batches:
        ours, theirs = (learner.step(given, meta) for learner in learners)
        assert relative(ours.meta_gradient, theirs.meta_gradient) < tolerance
        for name in ("training_loss", "meta_loss", "prediction", "output_tangent"):
            assert relative([getattr(ours, name)], [getattr(theirs, name)]) < tolerance, name
    models = [learner.model for learner in learners]
    assert relative(*(m.state_dict().values() for m in models)) < tolerance
    assert relative(*(learner.loss_network.parameters() for learner in learners)) < tolerance
    assert all(torch.equal(m.unused, torch.ones(2, dtype=m.unused.dtype)) for m in models)
    assert all(parameter.grad is None for parameter in models[0].parameters())


@pytest.mark.parametrize(
    ("kind", "make_optimizer", "network"),
    [("classification", NESTEROV, {}), ("regression", partial(torch.optim.Adam, lr=0.01), {"bias": True})],
)
def test_it_is_the_step_that_is_not_compiled(kind, make_optimizer, network, traced):
    learners = make(kind, make_optimizer, **network)
    assert traced == ["default"] * 3
    pairs = [(batch(kind=kind), batch(9, kind)) for _ in range(3)]
    pairs += [(batch(5, kind), batch(9, kind)), (batch(kind=kind), batch(9, kind))]  # a smaller batch between
    check_equal(learners, pairs, 1e-10)
    for learner in learners:
        learner.model.eval()
    check_equal(learners, [(batch(kind=kind), batch(9, kind))], 1e-10)


@pytest.mark.parametrize("step", [0, 1])
def test_what_is_frozen_or_unfrozen_later_stays_or_moves_as_without_compiling(step, traced):
    learners = make(make_optimizer=partial(torch.optim.SGD, lr=0.1))
    same = batch()
    check_equal(learners, [(same, same)] * step, 1e-10)
    for learner in learners:
        learner.model.frozen.requires_grad_(True)
        learner.model.last.requires_grad_(False)
    before = copy.deepcopy(learners[0].model)
    check_equal(learners, [(same, same)], 1e-10)
    after = learners[0].model
    assert not torch.equal(before.frozen.weight, after.frozen.weight)
    assert torch.equal(before.last.weight, after.last.weight)


@pytest.mark.slow
def test_generated_code_computes_the_same_in_float32():
    check_equal(make(dtype=torch.float32, hidden=(4,)), [(batch(dtype=torch.float32),) * 2 for _ in range(3)], 1e-5)


def test_results_of_earlier_steps_stay_and_momentum_is_torchs(traced):
    learner, twin = make()
    first = learner.step(batch(), batch())
    kept = [t.clone() for t in (*first.meta_gradient, first.prediction)]
    learner.step(batch(), batch())
    assert all(torch.equal(a, b) for a, b in zip(kept, (*first.meta_gradient, first.prediction), strict=True))
    states = learner.optimizer.state_dict()["state"]
    twin.step(batch(), batch())
    assert states.keys() == twin.optimizer.state_dict()["state"].keys()  # none for what is frozen or unused


@pytest.mark.parametrize(("label", "steps"), [(3, 0), (3, 1), (-1, 1)])
@pytest.mark.parametrize("place", [0, 1])
def test_a_label_out_of_range_is_refused_before_theta_moves(label, steps, place, traced):
    learner = make()[0]
    for _ in range(steps):
        learner.step(batch(), batch())
    pair = [batch(), batch()]
    pair[place][1][2] = label
    before = [p.clone() for p in learner.model.state_dict().values()]
    with pytest.raises(
        ValueError, match=f"{'meta_' if place else ''}batch: targets.* the label {label}" if steps else "the label"
    ):
        learner.step(*pair)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.model.state_dict().values(), strict=True))


def test_targets_that_do_not_fit_are_refused_before_anything_is_traced(traced, monkeypatch):
    ours, _ = make("regression")
    monkeypatch.setattr(ours.compiled, "training_pass", lambda *_: pytest.fail("it was traced"))
    before = copy.deepcopy(ours.model.state_dict())
    inputs, targets = batch(kind="regression")
    with pytest.raises(ValueError, match="prediction and target of one shape"):
        ours.step((inputs, targets[:, :2]), (inputs, targets))
    assert all(torch.equal(value, before[name]) for name, value in ours.model.state_dict().items())


def test_a_model_that_draws_random_numbers_is_refused(traced):
    model = nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5)).double()
    online = OnlineLoss(model, LossNetwork.classification().double(), NESTEROV(model.parameters()), compile="default")
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="random numbers.* leave compile out"):
        online.step(*[(torch.ones(2, 5, dtype=torch.float64), torch.tensor([0, 1]))] * 2)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_torch_cannot_trace_is_said(traced):
    class Branching(nn.Linear):
        def forward(self, x):
            x = super().forward(x)
            return x if x.sum().item() > 0 else -x

    model = Branching(5, 3).double()
    online = OnlineLoss(model, LossNetwork.classification().double(), NESTEROV(model.parameters()), compile="default")
    with pytest.raises(RuntimeError, match="torch.compile cannot serve this model"):
        online.step(batch(), batch())


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "forward"])
def test_other_engines_are_refused(engine):
    model = nn.Linear(5, 3)
    with pytest.raises(ValueError, match="needs engine='forward'"):
        OnlineLoss(model, LossNetwork.classification(), NESTEROV(model.parameters()), engine=engine, compile="default")


def test_other_arguments_that_cannot_be_compiled_are_refused():
    model, network = nn.Linear(5, 3), LossNetwork.classification()
    with pytest.raises(ValueError, match="unknown compile mode 'fast'.*reduce-overhead"):
        OnlineLoss(model, network, NESTEROV(model.parameters()), compile="fast")
    network.network[1] = nn.Tanh()
    with pytest.raises(TypeError, match="cannot be compiled"):
        OnlineLoss(model, network, NESTEROV(model.parameters()), compile="default")


def test_fit_runs_it(traced):
    data = load_dataset("iris")
    model, network = nn.Linear(4, 3), LossNetwork.classification()
    options = {"optimizer": NESTEROV(model.parameters()), "steps": 2, "progress": False}
    history = fit(model, network, data, online=True, compile="reduce-overhead", batch_size=30, **options)
    assert traced == ["reduce-overhead"] * 3 and history.train_loss.iloc[1:].notna().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_records_graphs():
    torch.manual_seed(0)
    model, network = nn.Linear(5, 3).cuda(), LossNetwork.classification().cuda()
    twin, twin_network = copy.deepcopy(model), copy.deepcopy(network)
    learners = [
        OnlineLoss(model, network, NESTEROV(model.parameters()), compile="reduce-overhead"),
        OnlineLoss(twin, twin_network, NESTEROV(twin.parameters())),
    ]
    for _ in range(6):  # the first ones warm up
        given = tuple(t.cuda() for t in batch(dtype=torch.float32))
        ours, theirs = (learner.step(given, given) for learner in learners)
        assert relative(ours.meta_gradient, theirs.meta_gradient) < 1e-4
