# ruff: noqa: E501 -- a table, one case a line
"""What a message says to do is done, to the letter, in the very case that raised it; and it works.

A new message with a remedy in one of :data:`MODULES` needs a row here; :func:`test_every_remedy_has_a_row` names it.
"""

import ast
import math
import re
import runpy
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.optim.lr_scheduler import MultiStepLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import adalfl_lite
from adalfl_lite import Initialiser, LossNetwork, OnlineLearningRate, OnlineLoss, Plain, Stacked, evaluate, load_dataset
from adalfl_lite.cli import app
from adalfl_lite.compare.grid import compare
from adalfl_lite.compare.methods import MAIN_METHODS, METHODS, Method, check_applies
from adalfl_lite.compare.recipes import Given as GivenLoss
from adalfl_lite.compare.recipes import Job, Learned, LearnedRate, Replayed, TaskLoss, TaskRate, Tuned
from adalfl_lite.compare.tasks import TASKS, get_task
from adalfl_lite.data.corruption import with_imbalance, with_label_noise
from adalfl_lite.learn.learning_rate import LearningRate, scaled_schedule
from adalfl_lite.learn.meta_learning import rehearsal
from adalfl_lite.losses.symbolic import SymbolicLoss, points_downhill, search_symbolic
from adalfl_lite.losses.task import task_loss
from adalfl_lite.losses.taylor import search_taylor
from tests.models import Layers, Once, Reverse
from tests.shorthand import fit_seeds, initialise_seeds
from tests.trust.reference import Problem, judge, plain_step, prepare, reference, started, tokens, weights
from tests.trust.test_any_model import ALL, FOLLOWED, Words, between, embedded, hidden, mlp, stale

TABLE = runpy.run_path(str(Path(__file__).with_name("test_bad_input.py")))
Given, frozen, without_gradients = TABLE["Given"], TABLE["frozen"], TABLE["without_gradients"]
NAN = math.nan

LEFT_OUT = (
    "models",
    "data/sources",
    "data/augmentation",
    "predict/loss_prediction",
    "predict/active_learning",
    "predict/keypoints",
)
MODULES = [
    name
    for path in sorted(Path(adalfl_lite.__file__).parent.rglob("*.py"))
    if (name := path.relative_to(Path(adalfl_lite.__file__).parent).with_suffix("").as_posix()) not in LEFT_OUT
]
"""Those whose messages are all here."""

NO_REMEDY: dict[str, str] = {}
"""Parts of messages that look like a remedy and are none, with the reason."""

SEEDS = (1, 2)

QUICK = Learned(settings=Initialiser(steps=2, imitation_steps=0, rehearsals=0))
"""A learned loss that is hardly learned."""


class CommandError(Exception):
    """What the command line said as it ended."""


def command(given, *arguments):
    """Run ``adalfl``; what it printed, or :class:`CommandError`."""
    environment = {"COLUMNS": "300", "TERMINAL_WIDTH": "300", "NO_COLOR": "1"}
    found = CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)
    if found.exit_code:
        raise CommandError(found.stderr or repr(found.exception))
    return found.output


class Tools(Given):
    """A right use of more."""

    def labels(self, y):
        """A data set of these labels."""
        split = self.split(targets=y)
        return self.data(train=split, valid=split, test=split, outputs=int(y.max()) + 1)

    def fit_finite(self, **changes):
        """``fit``, and whether all it measured is finite."""
        history = self.fit(**changes)
        return bool(history[["valid_loss", "test_loss"]].map(math.isfinite).all(axis=None))

    def rate(self, **changes):
        """``fit`` with a learned rate: whether it moved."""
        given = {"loss": F.cross_entropy, "online": True, "learn": "learning_rate", **changes}
        return self.fit(**given).learning_rate.nunique() > 1

    def moved(self, **changes):
        """``fit`` online: whether the loss was learned."""
        before = [p.detach().clone() for p in self.network.parameters()]
        self.fit(online=True, **changes)
        return any(not torch.equal(p, old) for p, old in zip(self.network.parameters(), before, strict=True))

    def models(self, make=None):
        return [(make or (lambda: nn.Linear(4, 3)))() for _ in SEEDS]

    def fit_seeds(self, models=None, losses=(), make_optimizer=None, **changes):
        make_optimizer = make_optimizer or partial(torch.optim.SGD, lr=0.1)
        losses = [LossNetwork.classification() for _ in SEEDS] if losses == () else losses
        given = {"steps": 3, "batch_size": 8, "seeds": SEEDS, "progress": False, **changes}
        return fit_seeds(models or self.models(), losses, self.data(), make_optimizer=make_optimizer, **given)

    def stacked(self, begun=False, frozen=False, rates=(0.1, 0.1), **settings):
        """A stack of two learned losses."""
        members = []
        for rate in rates:
            model, network = nn.Linear(4, 3), LossNetwork.classification()
            network.network[0].requires_grad_(not frozen)
            members.append(
                OnlineLoss(model, network, torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9), **settings)
            )
        if begun:
            members[0].step(self.batch, self.meta_batch)
        return Stacked(members)

    def stacked_plain(self, *losses):
        """A stack of two plain learners with these losses."""
        models = [nn.Linear(4, 3) for _ in losses]
        members = zip(models, losses, strict=True)
        return Stacked([Plain(model, loss, torch.optim.SGD(model.parameters(), lr=0.1)) for model, loss in members])

    def rows_of_seeds(self, batch):
        """The same batch for both learners of a stack."""
        return tuple(torch.stack([part, part]) for part in batch)

    def pairs(self, one=False):
        """Batches of a linear map, and others of it; or one and the same."""
        if one:
            return ([(self.x[:8], self.x[:8, :3])],) * 2
        y = self.x @ torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
        batches = [(self.x[i : i + 8], y[i : i + 8]) for i in range(0, 40, 8)]
        return batches[:3], batches[3:]

    def initialise_alone(
        self, make_model=lambda: nn.Linear(4, 3), lr=0.1, optimizer=torch.optim.SGD, one=False, **changes
    ):
        """``initialise`` for regression, and whether a rehearsal, if there is one, did not diverge."""
        torch.manual_seed(not one)
        self.network = LossNetwork.regression()
        train, valid = self.pairs(one)
        given = {"make_optimizer": partial(optimizer, lr=lr), "train": train, "valid": valid, **changes}
        table = self.initialise(make_model=make_model, **given).rehearsals
        return not len(table) or bool(table.error.map(math.isfinite).any())

    def initialise_seeds(
        self,
        make_model=lambda: nn.Linear(4, 3),
        lr=0.1,
        optimizer=torch.optim.SGD,
        one=False,
        make_loss_network=LossNetwork.regression,
        **changes,
    ):
        """The same for two seeds as one program."""
        given = {"steps": 4, "imitation_steps": 0, "rehearsals": 0, "rollout_steps": 2, "seeds": SEEDS, **changes}
        train, valid = ([batches] * 2 for batches in self.pairs(one))
        make_optimizer = partial(optimizer, lr=lr)
        outcomes = initialise_seeds(
            make_loss_network, make_model, train, valid, make_optimizer=make_optimizer, **given
        )[1]
        return all(not len(o.rehearsals) or o.rehearsals.error.map(math.isfinite).any() for o in outcomes)

    @cached_property
    def body(self):
        """A part that models may share."""
        return nn.Linear(4, 5)

    def compare(self, method, **changes):
        """A comparison of one method of one's own, which is called "mine"."""
        found = compare(
            [get_task("iris").with_(steps=2)], {"mine": method}, **{"seeds": [0], "progress": False, **changes}
        )
        return bool(found.test_loss.map(math.isfinite).all())

    def optimizer(self, **changes):
        return torch.optim.SGD(self.model.parameters(), lr=0.1, **changes)

    def checkpoint(self, name="run", **changes):
        """A finished run."""
        self.fit(checkpoint=self.folder / name, **changes)
        return self.folder / name

    def jobs(self, steps=2, folder="jobs", **changes):
        """A stored comparison."""
        task = get_task("iris").with_(steps=steps)
        return compare([task], ["handcrafted"], [0], folder=self.folder / folder, progress=False, **changes)

    def results(self, *methods, name="a"):
        """A table as ``compare`` writes it."""
        path = self.folder / f"{name}.parquet"
        task = get_task("iris").with_(steps=2)
        compare([task], methods or ["handcrafted"], [0, 1], progress=False).to_parquet(path)
        return path

    def searched(self, lr):
        """A Taylor loss, found by trainings with this learning rate."""
        pair = self.pairs()[0][0]

        def validate(model):
            return (F.mse_loss(model(pair[0]), pair[1]).item(),) * 2

        def score(loss):
            make = partial(torch.optim.SGD, lr=lr)
            return rehearsal(loss, lambda: nn.Linear(4, 3), make, iter([pair] * 9), 9, validate)[0]

        return search_taylor("regression", score, generations=2, population=4)

    def evolved(self, **budget):
        """An expression that points downhill."""
        accept = partial(points_downhill, task_loss=task_loss("classification"), outputs=3)
        found = search_symbolic("classification", lambda loss: 0.5, lambda loss: None, accept=accept, seed=1, **budget)
        return accept(found)

    def tuned(self, lr):
        """iris, its learning rate tuned."""
        task = get_task("diabetes").with_(steps=20, learning_rate=lr)
        return Tuned().tune(Job(task, task.load(), 0), F.mse_loss).learning_rate < 10


class Tokens(nn.Module):
    """A model of token ids."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 8), nn.Linear(8, 3)

    def forward(self, ids):
        return self.head(self.embedding(ids).mean(1))


def token_loop(given):
    """A loop of one's own around OnlineLoss.step, of token ids: learns to tell them apart."""
    torch.manual_seed(0)
    ids = torch.randint(50, (40, 6))
    labels = ids[:, 0] % 3
    model = Tokens()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    network = LossNetwork.classification()
    adalfl_lite.learn.initialisation.imitate(network, F.cross_entropy, model(ids), steps=300)
    online = OnlineLoss(model, network, optimizer, meta_learning_rate=1e-4)
    losses = [online.step((ids[:20], labels[:20]), (ids[20:], labels[20:])) for _ in range(90)]
    return losses[0].meta_loss > 1 and (model(ids[:20]).argmax(1) == labels[:20]).all().item()


class Pair(nn.Module):
    """A module that gives two things, and the one that gives the first alone."""

    def __init__(self, alone=False):
        super().__init__()
        self.lstm, self.alone = nn.LSTM(4, 3), alone

    def forward(self, x):
        output = self.lstm(x)
        return output[0] if self.alone else output


def lazy(run=None):
    """A model with a lazy layer, after one batch or before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(5), nn.ReLU(), nn.Linear(5, 3))
    if run is not None:
        model(run)
    return model


def same(model):
    """A function that gives the one model."""
    return lambda: model


def without(library, call):
    """Call with a library hidden, as if it were not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, library, None)
        return call()


def in_inference(call):
    with torch.inference_mode():
        return call()


def two_rates(given):
    """A rate and its meta-optimizer, as the message has it."""
    optimizer = given.optimizer()
    rate = LearningRate.of(optimizer)
    meta_optimizer = torch.optim.Adam(rate.parameters())
    online = OnlineLearningRate(
        given.model, F.cross_entropy, optimizer, learning_rate=rate, meta_optimizer=meta_optimizer
    )
    online.step(given.batch, given.meta_batch)
    return optimizer.param_groups[0]["lr"] != 0.1


def rate_by(given, kind):
    """A step with a learned rate of this optimizer."""
    online = OnlineLearningRate(given.model, F.cross_entropy, kind(given.model.parameters(), lr=0.1))
    return online.step(given.batch, given.meta_batch).meta_loss.isfinite().item()


def scheduled(given, steps, scales):
    """The rates of a replayed schedule."""
    optimizer = given.optimizer()
    scheduler = scaled_schedule(optimizer, steps, scales)
    rates = []
    for _ in range(3):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates == pytest.approx([0.1, 0.15, 0.2])


def dropped(given, moment):
    """The learning rate at the end of a training with a drop at this moment."""
    task = get_task("iris").with_(steps=4, drops=(moment,))
    history = compare([task], ["handcrafted"], [0], progress=False)
    return history.learning_rate.tolist() == pytest.approx([0.01, 0.01, 0.001, 0.001, 0.001])


def sometimes_not_finite(prediction, target):
    """A loss that is not a number in its third call."""
    sometimes_not_finite.calls += 1
    return F.cross_entropy(prediction, target) * (NAN if sometimes_not_finite.calls == 3 else 1)


def with_accidents(given, **options):
    sometimes_not_finite.calls = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return given.fit_finite(loss=sometimes_not_finite, **options)


def deep():
    """A linear model of two layers, which diverges where one does not."""
    return nn.Sequential(nn.Linear(4, 20), nn.Linear(20, 3))


WILD: dict[str, Any] = {"lr": 1e20, "imitation_steps": 50, "rehearsals": 2, "rehearsal_steps": 60}
STEEP: dict[str, Any] = {"steps": 64, "meta_learning_rate": 5e5, "rehearsal_steps": 100, "one": True}
"""The loss becomes so steep that a rehearsal at the end diverges, and one at the beginning does not."""
LONG: dict[str, Any] = {
    "make_model": deep,
    "steps": 30,
    "imitation_steps": 10,
    "rollout_steps": 10,
    "optimizer": torch.optim.Adam,
}


# ---------------------------------------------------------------------------------------------------- of the engines


def the(problem):
    """A problem, or the one of that name in the table of models, or of optimizers."""
    return problem if isinstance(problem, Problem) else ALL.get(problem) or FOLLOWED[problem]


def learn(problem, engine="forward", **options):
    """A step of a problem with an engine."""
    problem = the(problem)
    with started(problem) as (model, optimizer, _), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        online = OnlineLoss(model, problem.phi(), optimizer, engine=engine, **options)
        online.step(problem.batches(0), problem.batches(1))


def right(problem, engine="forward", loop=None, **options):
    """Steps of a problem that are the plain loop's of ``loop``, and their meta-gradients the derivatives of that."""
    verdict = judge(the(problem), engine, reference(the(loop or problem)), **options)
    assert verdict.kind == "right", verdict


def bare(problem, **changes):
    """The problem without what a loop attaches to it."""
    return replace(the(problem), attach=None, **changes)


def ends_where(loop, problem, engine="forward", before=lambda model: None, after=lambda model: None):
    """θ after three steps, with ``before(model)`` and ``after(model)`` around each, is the plain loop's; φ stands still."""
    loop, problem = the(loop), the(problem)
    phi = loop.phi()
    with started(loop) as (model, optimizer, _):
        for i in range(3):
            prepare(loop, model, optimizer, i)
            plain_step(model, optimizer, phi, loop.batches(i))
        before(model)
        wanted = weights(model)
    with started(problem) as (model, optimizer, _):
        online = OnlineLoss(model, phi, optimizer, meta_learning_rate=0, engine=engine)
        for i in range(3):
            before(model)
            online.step(problem.batches(i), problem.batches(i + 1))
            after(model)
        before(model)
        torch.testing.assert_close(weights(model), wanted, rtol=1e-6, atol=1e-9)


def shorten(model):
    """To what ``max_norm=1`` makes of the rows of an embedding, as the message has it."""
    with torch.no_grad():
        model[0].weight.renorm_(2.0, 0, 1.0)


def normalise(model):
    with torch.no_grad():
        model.b.weight.div_(model.b.weight.norm())


def project_all(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.renorm_(2, 0, 0.5)


def accumulated(problem, parts, **options):
    """One step on a list of micro batches: θ is that of the loop that accumulates, ∇_φ that of the whole batch."""
    found = []
    whole, meta_batch = problem.batches(0), problem.batches(1)
    micro = list(zip(*(tensor.split(parts) for tensor in whole), strict=True))
    for given in (micro, whole):
        with started(problem) as (model, optimizer, _):
            step = OnlineLoss(model, problem.phi(), optimizer, **options).meta_gradient([given], meta_batch)
            found.append((weights(model), step.meta_gradient))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-13)
    with started(problem) as (model, optimizer, _):
        for inputs, targets in micro:
            (problem.phi()(model(inputs), targets) * len(targets) / len(whole[1])).backward()
        optimizer.step()
        torch.testing.assert_close(found[0][0], weights(model), rtol=1e-9, atol=1e-13)


def in_a_group(call):
    """Call with a process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return call(dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def data_parallel():
    return nn.parallel.DistributedDataParallel(mlp().double())


def cloned():
    """Two parameters that began as one."""
    model = ALL["tied weights"].make().double()
    model[4].weight = nn.Parameter(model[2].weight.data.clone())
    return model


class ReverseOnce(Reverse):
    """A backward pass that is not the forward's derivative and cannot be differentiated itself."""

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return -2 * g


NO_ENGINE = between(ReverseOnce.apply)
REVERSED = between(lambda h: 3 * h.detach() - 2 * h)
"""The same of what torch differentiates."""

BRANCHING = "within: conditional on the mean"
MAXIMA = "nn.EmbeddingBag, max"
LOOKING = "module hook that only looks at the gradient"
CHANGING = "weights changed in the forward pass"


def clamped(model, *_):
    return [p.register_hook(lambda g: g.clamp(-2e-3, 2e-3)) for p in model.parameters()]


PLAIN = Problem(mlp)
CLONED = Problem(cloned)
CLIPS = {"norm": "step hook that clips", "value": Problem(mlp, attach=clamped)}
ZEROED = Problem(mlp, attach=lambda m, o: (stale(0.01)(m, o), o.zero_grad())[1], steps=1)


class Scaled(nn.Module):
    """A loss of one's own with one parameter, and without a kind."""

    def __init__(self, scale=None):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(())) if scale is None else scale

    def forward(self, prediction, target):
        return self.scale * F.cross_entropy(prediction, target)


class ScaledClasses(Scaled):
    """The same with its kind."""

    kind = "classification"


class Sharing(nn.Module):
    """A model that holds the parameter of a loss."""

    def __init__(self, loss):
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 3), loss.scale

    def forward(self, x):
        return self.layer(x) * self.scale


def frozen_again(given):
    """A frozen loss kept as it is: unfrozen, with meta_learning_rate=0."""
    network = frozen(given.network)
    before = [p.clone() for p in network.requires_grad_(True).parameters()]
    given.step(loss_network=network, meta_learning_rate=0)
    return all(torch.equal(p, old) for p, old in zip(network.parameters(), before, strict=True))


def compiled_model(given, **options):
    """A step with a compiled model; the loss is as before to rounding."""
    model = torch.compile(given.model, backend="eager")
    return given.step(model=model, **options).meta_loss.isfinite().item()


def restored(given, whole):
    online = given.online()
    state = online.state_dict()
    if not whole:
        del state["optimizer"]
    online.load_state_dict(state)


def steep(given, lr=0.3, initialised=False):
    """A hundred steps with a steep loss for regression."""
    torch.manual_seed(0)
    network = LossNetwork.regression()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(7)
    batch = given.x, given.x @ torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    if initialised:
        make = partial(torch.optim.SGD, lr=lr)
        settings = Initialiser(steps=2, rehearsals=0)
        adalfl_lite.initialise(
            network, lambda: nn.Linear(4, 3), [batch], [batch], make_optimizer=make, settings=settings
        )
    model = nn.Sequential(nn.Linear(4, 20), nn.Linear(20, 3))
    online = OnlineLoss(model, network, torch.optim.SGD(model.parameters(), lr=lr))
    for _ in range(100):
        step = online.step(batch, batch)
    return step.meta_loss.isfinite().item()


class Row(NamedTuple):
    what: str
    wrong: Callable[[Tools], Any]
    message: str
    remedies: tuple[Callable[[Tools], Any], ...]
    """Each does what the message says, in the case of ``wrong``; none may raise, or give False."""
    needs: Callable[[], bool] = lambda: True
    """Without it the remedies cannot be tried here."""
    slow: bool = False


def row(what, wrong, message, *remedies, **options):
    return Row(what, wrong, message, remedies, **options)


class Steep(nn.Linear):
    """Scales a gradient by a hook, where it sees that there will be one."""

    def __init__(self):
        super().__init__(4, 3)

    def forward(self, x):
        output = super().forward(x)
        if output.requires_grad:
            output.register_hook(lambda gradient: 2 * gradient)
        return output


class OwnProduct(nn.Linear):
    def __init__(self):
        super().__init__(4, 3)

    def forward(self, x):
        return Once.apply(super().forward(x))


CUDA = {"needs": torch.cuda.is_available}

CHECKS = [
    row("unknown name", lambda g: get_task("digit"), "did you mean 'digits'[?]", lambda g: get_task("digits")),
    row("an option without effect", lambda g: g.fit(meta_batches="train"), "leave it out", lambda g: g.fit_finite()),
    row("a NumPy array", lambda g: g.split(inputs=g.x.numpy()), "use torch.as_tensor",
        lambda g: g.split(inputs=torch.as_tensor(g.x.numpy()))),
    row("two devices", lambda g: g.split(indices=g.rows.to("meta")), r"move them with \.to\(device\)",
        lambda g: g.split(inputs=g.x.to("meta"), targets=g.y.to("meta"), indices=g.rows.to("meta"))),
    row("whole numbers", lambda g: g.split(inputs=(10 * g.x).long()), r"of numbers use \.float\(\)",
        lambda g: g.fit_finite(data=g.data(train=g.split(inputs=(10 * g.x).long().float())))),
    row("token ids", lambda g: g.split(inputs=torch.randint(50, (40, 6))),
        r"with token ids write the loop yourself, around OnlineLoss\.step", token_loop),
    row("flat float targets", lambda g: g.split(targets=g.x[:, 0]), r"for one variable use targets\[:, None\]",
        lambda g: g.split(targets=g.x[:, 0][:, None])),
    row("float labels", lambda g: g.split(targets=g.y.float()), r"for class indices \.long\(\)",
        lambda g: g.fit_finite(data=g.labels(g.y.float().long()))),
    row("one-hot labels", lambda g: g.split(targets=F.one_hot(g.y)), r"\.argmax\(1\) turns one-hot",
        lambda g: torch.equal(g.split(targets=F.one_hot(g.y).argmax(1)).targets, g.y)),
    row("int32 labels", lambda g: g.split(targets=g.y.int()), r"use \.long\(\)", lambda g: g.split(targets=g.y.int().long())),
    row("a model for a function", lambda g: g.initialise(make_model=g.model), r"use lambda: \.\.\.",
        lambda g: g.initialise(make_model=lambda: nn.Linear(4, 3))),
    row("fewer targets", lambda g: g.step(batch=(g.x, g.y[:9])), "give as many, at least one", lambda g: g.step(batch=(g.x, g.y))),
    row("an empty batch", lambda g: g.step(batch=(g.x[:0], g.y[:0])), "at least one", lambda g: g.step(batch=(g.x[:1], g.y[:1]))),
    row("a batch elsewhere", lambda g: g.step(batch=(g.x.to("meta"), g.y.to("meta"))), r"use \.to\('cpu'\)",
        lambda g: g.step(batch=(g.x.cuda().to("cpu"), g.y.cuda().to("cpu"))), **CUDA),
    row("a lazy layer", lambda g: g.fit(model=lazy()), "run one batch through the model before building its optimizer",
        lambda g: g.fit_finite(model=lazy(g.x)), lambda g: g.moved(model=lazy(g.x))),
    row("a lazy layer, in a loop", lambda g: g.online(model=lazy()), "run one batch through the model before",
        lambda g: g.step(model=lazy(g.x)).meta_loss.isfinite().item()),
    row("lazy layers of seeds", lambda g: g.fit_seeds([lazy(), lazy()]), "run one batch through the model before",
        lambda g: g.fit_seeds([lazy(g.x), lazy(g.x)])),
    row("lazy models of an initialisation", lambda g: g.initialise(make_model=lazy), "run one batch through the model before",
        lambda g: g.initialise(make_model=lambda: lazy(g.x))),
    row("another model's optimizer", lambda g: g.fit(optimizer=g.sgd(nn.Linear(4, 3))), r"build it from model\.parameters\(\)",
        lambda g: g.fit_finite(optimizer=torch.optim.SGD(g.model.parameters(), lr=0.1))),
    row("a frozen model", lambda g: g.fit(model=frozen(g.model)), "unfreeze some of the model",
        lambda g: (frozen(g.model)[2].requires_grad_(True), g.fit_finite(model=g.model, optimizer=g.sgd(g.model)))[1]),
    row("without gradients", lambda g: without_gradients(g.fit), r"leave torch\.no_grad\(\)", lambda g: g.fit_finite()),
    row("in inference mode", lambda g: in_inference(g.fit), r"leave .* torch\.inference_mode\(\) first", lambda g: g.fit_finite()),
    row("a model that gives two things", lambda g: g.fit(model=Pair()), "wrap it in a module that does",
        lambda g: g.fit_finite(model=Pair(alone=True))),
    row("a loss per example", lambda g: g.fit(loss=nn.CrossEntropyLoss(reduction="none")), "use reduction='mean'",
        lambda g: g.fit_finite(loss=nn.CrossEntropyLoss(reduction="mean"))),
    row("a rate far too large", lambda g: g.fit(loss=F.cross_entropy, optimizer=torch.optim.SGD(g.model.parameters(), lr=1e38)),
        "lower the base learning rate", lambda g: g.fit_finite(loss=F.cross_entropy, model=nn.Linear(4, 3))),
    row("now and then not finite", with_accidents, "lower the base learning rate",
        lambda g: with_accidents(g, on_divergence="skip"), lambda g: with_accidents(g, on_divergence="restore")),
    row("a negative label", lambda g: g.split(targets=2 * (g.y > 0) - 1), "number the classes from 0",
        lambda g: g.fit_finite(data=g.labels((g.y > 0).long()))),
    row("one logit for two classes", lambda g: g.fit(model=nn.Linear(4, 1), data=g.labels((g.y > 0).long())),
        r"1 outputs \(one output is for regression\); a model of 2 classes ends in nn\.Linear\(\.\.\., 2\)",
        lambda g: g.fit_finite(model=nn.Linear(4, 2), data=g.labels((g.y > 0).long())),
        lambda g: g.moved(model=nn.Linear(4, 2), data=g.labels((g.y > 0).long()))),
    row("one logit for two classes, in a loop", lambda g: g.step(model=nn.Linear(4, 1), batch=(g.x, (g.y > 0).long())),
        r"a model of 2 classes ends in nn\.Linear\(\.\.\., 2\)",
        lambda g: g.step(model=nn.Linear(4, 2), batch=(g.x, (g.y > 0).long()), meta_batch=(g.x, (g.y > 0).long()))),
    row("a label too many", lambda g: g.fit(model=nn.Linear(4, 2)), r"ends in nn\.Linear\(\.\.\., 3\)",
        lambda g: g.fit_finite(model=nn.Linear(4, 3))),
    row("NaN inputs", lambda g: g.split(inputs=torch.where(g.x > 2, NAN, g.x)), "clean the data first",
        lambda g: g.split(inputs=torch.where(g.x > 2, NAN, g.x).nan_to_num())),
]  # fmt: skip

DATA = [
    row("images without statistics", lambda g: g.split(inputs=g.x.byte()), "need mean= and std=",
        lambda g: g.split(inputs=g.x.byte()[:, None, None, :], mean=torch.zeros(1, 1, 1), std=torch.ones(1, 1, 1))[:2]),
    row("statistics without images", lambda g: g.split(mean=torch.zeros(1), std=torch.ones(1)), "leave them out", lambda g: g.split()),
    row("an empty split", lambda g: g.data(valid=g.split().take(g.rows[:0])), "every split needs rows",
        lambda g: g.data(valid=g.split().take(g.rows[:1]))),
    row("a data set of float labels", lambda g: g.data(train=g.split(targets=g.x)), "classification takes int64 class indices",
        lambda g: g.data(train=g.split(targets=g.x.argmax(1)), outputs=4)),
    row("labels in regression", lambda g: g.data(kind="regression"), "regression floating-point targets",
        lambda g: g.regression()),
    row("valid_size of a table", lambda g: load_dataset("iris", valid_size=9), "split 60/20/20",
        lambda g: [len(getattr(load_dataset("iris"), part)) for part in ("train", "valid", "test")] == [90, 30, 30]),
    row("noise in regression", lambda g: with_label_noise(load_dataset("diabetes"), 0.1, 0), "is for classification",
        lambda g: with_label_noise(load_dataset("iris"), 0.1, 0)),
    row("noise of no label", lambda g: with_label_noise(load_dataset("iris"), 1e-3, 0), "give at least 0.011",
        lambda g: (with_label_noise(load_dataset("iris"), 0.011, 0).train.targets != load_dataset("iris").train.targets).sum() == 1),
    row("imbalance of no row", lambda g: with_imbalance(load_dataset("iris"), 1.001, 0), "give a larger one",
        lambda g: len(with_imbalance(load_dataset("iris"), 2.0, 0).train) < 90),
    row("corrupted twice", lambda g: get_task("iris").corrupted(label_noise=0.2).corrupted(imbalance=2), "in one call",
        lambda g: get_task("iris").corrupted(label_noise=0.2, imbalance=2)),
    row("a drop in steps", lambda g: dropped(g, 2), "divide a step by steps", lambda g: dropped(g, 2 / 4)),
]  # fmt: skip

FILES = [
    row("a folder", lambda g: g.fit(checkpoint=g.folder), "name a file", lambda g: g.fit_finite(checkpoint=g.folder / "c")),
    row("a place that cannot be", lambda g: g.fit(checkpoint=g.file / "c"), "name another place",
        lambda g: g.fit_finite(checkpoint=g.folder / "c")),
    row("a damaged loss", lambda g: LossNetwork.load(g.file), "give another, or delete a damaged one",
        lambda g: (g.network.save(g.folder / "n"), LossNetwork.load(g.folder / "n"))),
    row("a damaged checkpoint", lambda g: g.fit(checkpoint=g.file), "give another, or delete a damaged one",
        lambda g: g.fit_finite(checkpoint=g.folder / "c"), lambda g: (g.file.unlink(), g.fit_finite(checkpoint=g.file))[1]),
    row("a file of others", lambda g: (torch.save({"a": 1}, g.folder / "f"), LossNetwork.load(g.folder / "f")),
        "give one that this package wrote", lambda g: (g.network.save(g.folder / "f"), LossNetwork.load(g.folder / "f"))),
    row("an older format", lambda g: LossNetwork.load(g.saved(format="adalfl-loss-network-0")), "write it again with this version",
        lambda g: (g.network.save(g.folder / "n"), LossNetwork.load(g.folder / "n"))),
    row("a loss that is not finite", lambda g: LossNetwork.load(g.saved(
        state={name: value * NAN for name, value in g.network.state_dict().items()})), "use an earlier one",
        lambda g: LossNetwork.load(g.saved())),
    row("half a checkpoint", lambda g: g.fit(checkpoint=g.saved(format="adalfl-checkpoint-1")), "it lacks .*; delete it",
        lambda g: (g.saved().unlink(), g.fit_finite(checkpoint=g.folder / "network.pt"))[1]),
    row("a checkpoint of another run", lambda g: g.fit(checkpoint=g.checkpoint(), seed=9), "use another file",
        lambda g: (g.checkpoint(), g.fit_finite(checkpoint=g.folder / "other", seed=9))[1]),
    row("a stored job of another task", lambda g: (g.jobs(), g.jobs(steps=3)), "give another folder, or delete that file",
        lambda g: (g.jobs(), g.jobs(steps=3, folder="new").step.max() == 3)[1],
        lambda g: (g.jobs(), (g.folder / "jobs/iris--handcrafted--seed0.parquet").unlink(), g.jobs(steps=3).step.max() == 3)[2]),
    row("a damaged job", lambda g: (g.jobs(), (g.folder / "jobs/iris--handcrafted--seed0.parquet").write_text("cut"), g.jobs()),
        "delete a damaged one", lambda g: ((g.folder / "jobs").mkdir(), (g.folder / "jobs/iris--handcrafted--seed0.parquet").write_text("cut"),
                                          (g.folder / "jobs/iris--handcrafted--seed0.parquet").unlink(), len(g.jobs()))[3] == 3),
    row("a foreign table", lambda g: (pd.DataFrame({"a": [1]}).to_parquet(g.folder / "t.parquet"), command(g, "plot", g.folder / "t.parquet")),
        "give a file that train or compare wrote", lambda g: command(g, "plot", g.results())),
]  # fmt: skip

TRAINING = [
    row("half a step", lambda g: g.fit(steps=1.5), "got 1.5; give an int, such as 1", lambda g: g.fit_finite(steps=1)),
    row("half a seed", lambda g: g.fit(seed=1.5), "got 1.5; give an int, such as 0", lambda g: g.fit_finite(seed=0)),
    row("a number for a function", lambda g: g.fit(callback=3), "must be a function, got int; leave it out, or give a lambda",
        lambda g: g.fit_finite(), lambda g: g.fit_finite(callback=lambda step, model, loss: None)),
    row("a word for a scheduler", lambda g: g.fit(scheduler="cosine"), "such as MultiStepLR, got str",
        lambda g: g.fit_finite(optimizer=(o := g.optimizer()), scheduler=MultiStepLR(o, [2]))),
    row("a loader for data", lambda g: g.fit(data=[g.batch]), r"load_dataset and Dataset\(\.\.\.\) give one",
        lambda g: g.fit_finite(data=g.data()), lambda g: g.fit_finite(data=load_dataset("iris"))),
    row("engine='shared' alone", lambda g: g.fit(online=True, engine="shared"), "needs meta_batches='next'",
        lambda g: g.moved(engine="shared", meta_batches="next")),
    row("a rate learned and scheduled", lambda g: (o := g.optimizer(), g.rate(optimizer=o, scheduler=MultiStepLR(o, [2]))),
        "leave one out", lambda g: g.rate(),
        lambda g: (o := g.optimizer(), g.fit_finite(optimizer=o, scheduler=MultiStepLR(o, [2])))[1]),
    row("two meta learning rates", lambda g: g.fit(online=True, meta_learning_rate=0.1, meta_optimizer=partial(torch.optim.SGD, lr=0.1)),
        "leave one of the two out", lambda g: g.moved(meta_learning_rate=0.1),
        lambda g: g.moved(meta_optimizer=partial(torch.optim.SGD, lr=0.1))),
    row("autocast to float32", lambda g: g.fit(autocast=torch.float32), r"must be torch\.bfloat16 .*leave it out for neither",
        lambda g: g.fit_finite(autocast=torch.bfloat16), lambda g: g.fit_finite()),
    row("LBFGS", lambda g: g.fit(optimizer=torch.optim.LBFGS(g.model.parameters())), "use one such as SGD or Adam",
        lambda g: g.fit_finite(optimizer=torch.optim.SGD(g.model.parameters(), lr=0.1)),
        lambda g: g.fit_finite(optimizer=torch.optim.Adam(g.model.parameters()))),
    row("a plateau", lambda g: (o := g.optimizer(), g.fit(optimizer=o, scheduler=ReduceLROnPlateau(o))), "such as MultiStepLR",
        lambda g: (o := g.optimizer(), g.fit(optimizer=o, scheduler=MultiStepLR(o, [2])).learning_rate.nunique() == 2)[1]),
    row("another optimizer's scheduler", lambda g: g.fit(scheduler=MultiStepLR(g.optimizer(), [2])), "build it from the one",
        lambda g: (o := g.optimizer(), g.fit(optimizer=o, scheduler=MultiStepLR(o, [2])).learning_rate.nunique() == 2)[1]),
    row("evaluation of an empty split", lambda g: evaluate(g.model, g.split().take(g.rows[:0]), "classification"), "nothing to evaluate on",
        lambda g: evaluate(g.model, g.split().take(g.rows[:1]), "classification")),
    row("a loader for a split", lambda g: evaluate(g.model, [g.batch], "classification"), r"such as data\.test",
        lambda g: evaluate(g.model, g.data().test, "classification")),
    row("a meta-optimizer without the rate", lambda g: OnlineLearningRate(g.model, F.cross_entropy, g.optimizer(),
        meta_optimizer=torch.optim.Adam(g.network.parameters())), r"with rate = LearningRate\.of\(optimizer\), give", two_rates),
    row("Rprop with a learned rate", lambda g: rate_by(g, torch.optim.Rprop), "use one of SGD, Adam",
        lambda g: rate_by(g, torch.optim.SGD), lambda g: rate_by(g, torch.optim.Adam)),
    row("a schedule out of order", lambda g: scheduled(g, [0, 2, 1], [1, 2, 1.5]), "give the schedule of one run",
        lambda g: scheduled(g, [0, 1, 2], [1, 1.5, 2])),
]  # fmt: skip

INITIALISING = [
    row("always the same model", lambda g: g.initialise(make_model=same(g.model)), "it must build a fresh model at every call",
        lambda g: g.initialise(make_model=lambda: nn.Linear(4, 3))),
    row("a body for all models", lambda g: g.initialise(make_model=lambda: nn.Sequential(g.body, nn.Linear(5, 3))), r"share frozen: requires_grad_\(False\)",
        lambda g: g.initialise(make_model=lambda: nn.Sequential(frozen(g.body), nn.Linear(5, 3)))),
    row("a data set for batches", lambda g: g.initialise(train=g.data()), r"give a DataLoader, or of a Dataset data\.train\.batches\(20, seed=0\)",
        lambda g: g.initialise(train=g.data().train.batches(20, seed=0)),
        lambda g: g.initialise(train=DataLoader(TensorDataset(g.x, g.y), 8, shuffle=True))),
    row("one number of a validation", lambda g: g.initialise(rehearsals=1, rehearsal_steps=1, validate=lambda model: 0.5), r"\(error, task loss\), got 0\.5; give two floats",
        lambda g: g.initialise(rehearsals=1, rehearsal_steps=1, validate=lambda model: (0.5, 1.0))),
    row("seeds: one network for all", lambda g: g.initialise_seeds(make_loss_network=same(LossNetwork.regression())), "for two seeds; it must build fresh ones",
        lambda g: g.initialise_seeds(make_loss_network=LossNetwork.regression)),
    row("more rates than groups", lambda g: OnlineLearningRate(g.model, F.cross_entropy, g.optimizer(), learning_rate=LearningRate([0.1, 0.2])), r"LearningRate\.of\(optimizer\) has one for each",
        lambda g: OnlineLearningRate(g.model, F.cross_entropy, o := g.optimizer(), learning_rate=LearningRate.of(o)).step(g.batch, g.meta_batch)),
    row("rehearsals that diverge", lambda g: g.initialise_alone(**WILD), "lower the base learning rate",
        lambda g: g.initialise_alone(**{**WILD, "lr": 0.01})),
    row("late rehearsals that diverge", lambda g: g.initialise_alone(rehearsals=1, **STEEP), "or rehearse more often",
        lambda g: g.initialise_alone(rehearsals=13, **STEEP)),
    row("a loader used up", lambda g: g.initialise(steps=9, valid=iter([g.batch])), "pass a loader that can be iterated again",
        lambda g: g.initialise(steps=9, valid=[g.batch])),
    row("tensors for batches", lambda g: g.initialise(train=g.batch), r"DataLoader\(TensorDataset\(inputs, targets\), batch_size, shuffle=True\)",
        lambda g: g.initialise(train=DataLoader(TensorDataset(g.x, g.y), 8, shuffle=True))),
    row("seeds: always the same model", lambda g: g.initialise_seeds(same(g.model)), "it must build a fresh model at every call",
        lambda g: g.initialise_seeds()),
    row("seeds: rehearsals that diverge", lambda g: g.initialise_seeds(**WILD), "of seed 1 diverged; lower the base learning rate",
        lambda g: g.initialise_seeds(**{**WILD, "lr": 0.01})),
    row("seeds: late rehearsals that diverge", lambda g: g.initialise_seeds(rehearsals=1, **STEEP), "or rehearse more often",
        lambda g: g.initialise_seeds(rehearsals=13, **STEEP)),
    row("seeds: clipped", lambda g: g.initialise_seeds(clip_gradient_norm=1.0), "is not for a stack; leave it out, or use initialise",
        lambda g: g.initialise_seeds(), lambda g: g.initialise_alone(clip_gradient_norm=1.0)),
    row("a loss that cannot imitate", lambda g: adalfl_lite.initialise(SymbolicLoss("classification", ["absolute", "subtract", "y", "p"]),
            lambda: nn.Linear(4, 3), [g.batch], [g.meta_batch], make_optimizer=partial(torch.optim.SGD, lr=0.1)),
        r"use settings=Initialiser\(imitation_steps=0\)",
        lambda g: adalfl_lite.initialise(SymbolicLoss("classification", ["absolute", "subtract", "y", "p"]), lambda: nn.Linear(4, 3),
            [g.batch], [g.meta_batch], make_optimizer=partial(torch.optim.SGD, lr=0.1),
            settings=Initialiser(imitation_steps=0, steps=2, rehearsals=1, rehearsal_steps=2))),
    row("the compute of a method that learns nothing", lambda g: Method(TaskLoss(), "x", compute_of="focal").steps(get_task("iris")),
        "name one that does", lambda g: Method(TaskLoss(), "x", compute_of="online").steps(get_task("iris")) > 500),
    row("seeds: a rollout of Adam that diverges", lambda g: g.initialise_seeds(lr=30, **LONG), "lower the learning rate, or use initialise",
        lambda g: g.initialise_seeds(lr=0.01, **LONG), lambda g: g.initialise_alone(lr=30, **LONG)),
    row("seeds: a rate far too large", lambda g: g.fit_seeds(losses=None, make_optimizer=partial(torch.optim.SGD, lr=3e38)),
        "lower the learning rate", lambda g: g.fit_seeds(losses=None)),
    row("seeds: a setting", lambda g: g.fit_seeds(clip_gradient_norm=1.0), "is not for a stack; leave it out, or train one by one",
        lambda g: g.fit_seeds(), lambda g: g.fit_finite(clip_gradient_norm=1.0)),
    row("seeds: compiled", lambda g: g.stacked(compile="default"), "compile= are not for a stack; leave them out",
        lambda g: g.stacked(), lambda g: g.moved(compile="default")),
    row("seeds: under way", lambda g: g.stacked(begun=True), "stack fresh ones, and load a state into the stack",
        lambda g: (a := g.stacked(), b := g.stacked(), b.load_state_dict(a.state_dict()))),
    row("seeds: one of two kinds of loss", lambda g: g.stacked_plain(LossNetwork.classification(), F.cross_entropy),
        "stack them apart", lambda g: [g.stacked_plain(make(), make()) for make in (LossNetwork.classification, lambda: F.cross_entropy)]),
    row("seeds: half an optimizer", lambda g: g.fit_seeds(make_optimizer=lambda p: torch.optim.SGD(list(p)[:1], lr=0.1)),
        r"build it from \.parameters\(\)", lambda g: g.fit_seeds()),
    row("no learner", lambda g: adalfl_lite.fit(g.model, g.data(), steps=2),
        r"give Plain\(model, loss, optimizer\), or OnlineLoss\(model, loss_network, optimizer\)",
        lambda g: g.fit_finite(loss=F.cross_entropy), lambda g: g.moved()),
    row("a number for a loss", lambda g: g.fit(loss=3), r"use one such as F\.mse_loss", lambda g: g.fit_finite(loss=F.cross_entropy)),
    row("settings by name", lambda g: adalfl_lite.initialise(g.network, lambda: nn.Linear(4, 3), [g.batch], [g.meta_batch],
            make_optimizer=partial(torch.optim.SGD, lr=0.1), settings={"steps": 2}), r"use Initialiser\(steps=\.\.\.\)",
        lambda g: g.initialise(steps=2)),
    row("one method for a list", lambda g: compare(["iris"], "handcrafted", [0]), r"use \['handcrafted'\]",
        lambda g: compare([get_task("iris").with_(steps=2)], ["handcrafted"], [0], progress=False)),
    row("seeds: a stack of stacks", lambda g: Stacked([g.stacked(), g.stacked()]), "give Plain, OnlineLoss or OnlineLearningRate learners",
        lambda g: g.stacked(), lambda g: g.stacked_plain(F.cross_entropy, F.cross_entropy)),
    row("seeds: one loss twice", lambda g: g.stacked_plain(g.network, g.network), "give each its own",
        lambda g: g.stacked_plain(g.network, LossNetwork.classification())),
    row("seeds: a frozen loss network", lambda g: g.stacked(frozen=True), "train such learners one by one", lambda g: g.stacked(),
        lambda g: g.moved()),
    row("seeds: two task losses", lambda g: g.stacked_plain(F.cross_entropy, F.mse_loss), "; stack them apart",
        lambda g: [g.stacked_plain(loss, loss) for loss in (F.cross_entropy, F.mse_loss)]),
    row("methods without names", lambda g: compare(["iris"], [METHODS["handcrafted"]], [0]), r"such as \{.mine.: Method",
        lambda g: compare([get_task("iris").with_(steps=2)], {"mine": METHODS["handcrafted"]}, [0], progress=False)),
    row("nothing to adapt", lambda g: Method(TaskLoss(), "x", online=True), r"give a loss with weights, or rate=LearnedRate\(\)",
        lambda g: Method(Learned(), "x", online=True), lambda g: Method(TaskLoss(), "x", LearnedRate(), online=True)),
    row("seeds: two rates", lambda g: g.stacked(rates=(0.1, 0.2)), "all must be the same", lambda g: g.stacked(rates=(0.1, 0.1))),
    row("seeds: one in eval mode", lambda g: g.fit_seeds([nn.Linear(4, 3).train(bool(i)) for i in range(len(SEEDS))]),
        "all must be of one architecture, and in train mode", lambda g: g.fit_seeds([nn.Linear(4, 3) for _ in SEEDS])),
    row("seeds: augmented", lambda g: g.fit_seeds(augment=nn.Identity()), "train such models one by one",
        lambda g: g.fit_finite(augment=nn.Identity())),
    row("seeds: no meta batch", lambda g: g.stacked().step(g.rows_of_seeds(g.batch)), r"give step\(batch, meta_batch\)",
        lambda g: g.stacked().step(g.rows_of_seeds(g.batch), g.rows_of_seeds(g.meta_batch))),
    row("no meta batch", lambda g: g.online().step(g.batch), r"give step\(batch, meta_batch\), of validation data if any",
        lambda g: g.online().step(g.batch, g.meta_batch)),
    row("no meta batch for a rate", lambda g: OnlineLearningRate(g.model, F.cross_entropy, g.optimizer()).step(g.batch),
        r"rate needs a meta batch; give step\(batch, meta_batch\), of validation data if any",
        lambda g: OnlineLearningRate(g.model, F.cross_entropy, g.optimizer()).step(g.batch, g.meta_batch)),
    row("seeds: dropout", lambda g: g.fit_seeds([nn.Sequential(nn.Linear(4, 3), nn.Dropout()) for _ in SEEDS]), "train such models one by one",
        lambda g: g.fit_finite(model=nn.Sequential(nn.Linear(4, 3), nn.Dropout()))),
    row("seeds: a frozen layer", lambda g: g.fit_seeds([nn.Sequential(frozen(nn.Linear(4, 4)), nn.Linear(4, 3)) for _ in SEEDS]),
        "train such models one by one", lambda g: g.fit_finite(model=nn.Sequential(frozen(nn.Linear(4, 4)), nn.Linear(4, 3)))),
    row("seeds: another optimizer", lambda g: g.fit_seeds(make_optimizer=torch.optim.RMSprop), "use SGD, Adam or AdamW",
        *(lambda g, kind=kind: g.fit_seeds(make_optimizer=partial(kind, lr=0.01)) for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW))),
    row("Taylor losses that diverge", lambda g: g.searched(1e38), "lower the base learning rate", lambda g: g.searched(0.1)),
    row("an unknown name in an expression", lambda g: SymbolicLoss("regression", ["abs", "p"]), "known: add, .*absolute",
        lambda g: SymbolicLoss("regression", ["absolute", "p"])),
    row("no expression found", lambda g: g.evolved(generations=0, population=2), "search longer", lambda g: g.evolved(generations=5, population=20)),
    row("rates that all diverge", lambda g: g.tuned(1e30), "lower the task's own", lambda g: g.tuned(0.01)),
]  # fmt: skip

COMPARING = [
    row("unknown task", lambda g: compare(["irris"], ["handcrafted"], [0]), "did you mean 'iris'[?] known tasks: digits",
        lambda g: all(map(get_task, TASKS))),
    row("a task twice", lambda g: compare([get_task("iris"), get_task("iris").with_(steps=3)], ["handcrafted"], [0]), r"name a changed task anew, task\.with_\(name=\.\.\.\)",
        lambda g: compare([get_task("iris").with_(steps=2), get_task("iris").with_(steps=3, name="longer")], ["handcrafted"], [0], progress=False).task.nunique() == 2),
    row("a number for seeds", lambda g: g.compare(METHODS["handcrafted"], seeds=5), r"give range\(10\), or \[0\]",
        lambda g: g.compare(METHODS["handcrafted"], seeds=range(10)), lambda g: g.compare(METHODS["handcrafted"], seeds=[0])),
    row("a loss for a method", lambda g: g.compare(F.cross_entropy), r"give Method\(Given\(loss\), 'in words'\)",
        lambda g: g.compare(Method(GivenLoss(F.cross_entropy), "in words"))),
    row("a loss for a recipe", lambda g: Method(F.cross_entropy, "mine"), r"got function, give Given\(loss\)",
        lambda g: g.compare(Method(GivenLoss(F.cross_entropy), "mine"))),
    row("a word for a rate", lambda g: Method(TaskLoss(), "mine", "tuned"), r"got str, give TaskRate\(\)",
        lambda g: g.compare(Method(TaskLoss(), "mine", TaskRate()))),
    row("η of a loss that is frozen", lambda g: Method(QUICK, "mine", meta_learning_rate=1e-3), "give online=True, or leave it out",
        lambda g: g.compare(Method(QUICK, "mine", online=True, meta_learning_rate=1e-3)), lambda g: g.compare(Method(QUICK, "mine"))),
    row("a replay of itself", lambda g: g.compare(Method(TaskLoss(), "mine", Replayed("mine"))), "refers to itself; name another",
        lambda g: g.compare(Method(TaskLoss(), "mine", Replayed("handcrafted")))),
    row("the compute of no learning", lambda g: g.compare(Method(TaskLoss(), "mine", compute_of="handcrafted")), "name one that does",
        lambda g: g.compare(Method(TaskLoss(), "mine", compute_of=Method(QUICK, "quick")))),
    row("kinds in a list", lambda g: GivenLoss(F.cross_entropy, ["classification"]), r"give \('classification',\)",
        lambda g: g.compare(Method(GivenLoss(F.cross_entropy, ("classification",)), "mine"))),
    row("a word for a loss", lambda g: GivenLoss("mse"), r"got str; give F\.mse_loss", lambda g: GivenLoss(F.mse_loss)),
    row("a network for its function", lambda g: Learned(LossNetwork.classification()), "give lambda kind: LossNetwork",
        lambda g: g.compare(Method(replace(QUICK, network=lambda kind: LossNetwork(kind, hidden=(5,))), "mine"))),
    row("a function of nothing", lambda g: g.compare(Method(Learned(LossNetwork.classification), "mine")), "failed: .*; give lambda kind: LossNetwork",
        lambda g: g.compare(Method(replace(QUICK, network=lambda kind: LossNetwork(kind, hidden=(5,))), "mine"))),
    row("a network that cannot imitate", lambda g: g.compare(Method(Learned(lambda kind: ScaledClasses()), "mine")), r"use settings=Initialiser\(imitation_steps=0\)",
        lambda g: g.compare(Method(Learned(lambda kind: ScaledClasses(), Initialiser(steps=2, rehearsals=0, imitation_steps=0)), "mine"))),
    row("no factors", lambda g: Tuned(()), r"give \(0\.1, 1\.0\)", lambda g: g.compare(Method(TaskLoss(), "mine", Tuned((0.1, 1.0))))),
    row("a library that is not here", lambda g: without("cma", lambda: check_applies("taylorglo", get_task("iris"))), r"pip install 'adalfl-lite\[methods\]'",
        lambda g: check_applies("taylorglo", get_task("iris")),
        lambda g: {"cma", "deap"} <= {re.split(r"\W", text)[0] for text in extra("methods")}),
    row("no task", lambda g: command(g, "compare"), "add a name from `adalfl tasks`, as in: adalfl compare digits",
        lambda g: "iris" in command(g, "tasks"), lambda g: command(g, "compare", "iris", "--methods", "handcrafted", "--seeds", 1, "--steps", 2, "--out", g.folder)),
    row("two files and no name", lambda g: command(g, "plot", g.results(name="a"), g.results("absolute", name="b")), "add --out PICTURE.png",
        lambda g: (command(g, "plot", g.results(name="a"), g.results("absolute", name="b"), "--out", g.folder / "PICTURE.png"), (g.folder / "PICTURE.png").exists())[1]),
    row("no such reference", lambda g: command(g, "table", g.results("focal", "absolute")), "they have focal, absolute; add --reference focal",
        lambda g: "absolute" in command(g, "table", g.results("focal", "absolute"), "--reference", "focal")),
    row("a table without costs", lambda g: (pd.read_parquet(p := g.results()).drop(columns="seconds").to_parquet(p), command(g, "table", p, "--value", "cost")),
        "they were not written by compare", lambda g: "handcrafted" in command(g, "table", g.results(), "--value", "cost")),
    row("no such file", lambda g: command(g, "plot", g.folder / "no.parquet"), r"give the \.parquet file that train or compare wrote",
        lambda g: command(g, "plot", g.results())),
    row("a run twice", lambda g: command(g, "table", g.results(name="a"), g.results(name="b")), "leave one out",
        lambda g: command(g, "table", g.results(name="a"))),
    row("unknown method", lambda g: command(g, "train", "iris", "--method", "onlin"), "did you mean 'online'[?]",
        lambda g: "online" in MAIN_METHODS and "online" in command(g, "methods")),
]  # fmt: skip

LEARNING = [
    row("a loss without a kind", lambda g: g.step(loss_network=Scaled()), r"pass task_loss=\.\.\.",
        lambda g: g.step(loss_network=Scaled(), task_loss=F.cross_entropy)),
    row("a compiled model, unrolled", lambda g: compiled_model(g, engine="unrolled"), "use engine='forward', or do not compile it",
        lambda g: compiled_model(g, engine="forward"), lambda g: g.step(engine="unrolled")),
    row("autocast to integers", lambda g: g.step(autocast=torch.int8), r"must be torch\.bfloat16 or torch\.float16", lambda g: g.step(autocast=torch.bfloat16)),
    row("a function for a loss network", lambda g: g.step(loss_network=F.cross_entropy),
        r"LossNetwork\.classification\(\) and LossNetwork\.regression\(\) make one", lambda g: g.step(loss_network=LossNetwork.classification()),
        lambda g: g.step(batch=(g.x, g.x[:, :3]), meta_batch=(g.x, g.x[:, :3]), loss_network=LossNetwork.regression())),
    row("a frozen loss", lambda g: g.step(loss_network=frozen(g.network)), "train without OnlineLoss, or unfreeze it and use meta_learning_rate=0",
        lambda g: g.fit_finite(loss=frozen(g.network)), frozen_again),
    row("a loss on another device", lambda g: g.online(model=g.model.to("meta")), r"use loss_network\.to\('meta'\)",
        lambda g: g.online(model=g.model.to("meta"), loss_network=g.network.to("meta"))),
    row("a parameter of both", lambda g: g.step(model=Sharing(s := Scaled()), loss_network=s, task_loss=F.cross_entropy), "give each its own",
        lambda g: g.step(model=Sharing(Scaled()), loss_network=Scaled(), task_loss=F.cross_entropy)),
    row("another loss's meta-optimizer", lambda g: g.step(meta_optimizer=torch.optim.Adam(LossNetwork.classification().parameters())),
        r"build it from loss_network\.parameters\(\)", lambda g: g.step(meta_optimizer=torch.optim.Adam(g.network.parameters()))),
    row("two kinds of targets", lambda g: g.step(meta_batch=(g.x, g.x[:, :3])), "give the same", lambda g: g.step(meta_batch=(g.x, g.y))),
    row("half a state", lambda g: restored(g, False), r"give what state_dict\(\) returned", lambda g: restored(g, True)),
    row("unrolled by several processes", lambda g: g.online(engine="unrolled", process_group=object()), "leave process_group out",
        lambda g: g.step(engine="unrolled")),
    row("a compiled step of another engine", lambda g: g.step(engine="shared", compile="default"), "needs engine='forward' .*leave it out",
        lambda g: g.step(engine="shared")),
    row("a compiled step of one's own loss", lambda g: g.step(loss_network=Scaled(), task_loss=F.cross_entropy, compile="default"),
        "give a LossNetwork, or no compile mode", lambda g: g.step(compile="default"), lambda g: g.step(loss_network=Scaled(), task_loss=F.cross_entropy), slow=True),
    row("a compiled step with dropout", lambda g: learn("dropout, train", compile="default"), "leave compile out", lambda g: right("dropout, train")),
    row("a compiled step of what torch does not compile", lambda g: learn(BRANCHING, compile="default"),
        r"\(leave compile='default' out\)", lambda g: right(BRANCHING)),
    row("no such engine", lambda g: g.online(engine="forwards"), "one of forward, shared, finite-difference, unrolled",
        *(lambda g, engine=engine: g.step(engine=engine) for engine in adalfl_lite.learn.online.ENGINES)),
    row("a bound of zero", lambda g: g.step(clip_gradient_norm=0), "must be positive, or None not to clip",
        lambda g: g.step(clip_gradient_norm=1), lambda g: g.step(clip_gradient_norm=None)),
    row("a loss too steep for its optimizer", steep, "or initialise the loss network for this optimizer",
        lambda g: steep(g, lr=1e-4), lambda g: steep(g, initialised=True)),
    row("two ways of clipping", lambda g: learn(PLAIN, clip_gradient_norm=5e-3, clip_gradient_value=2e-3), "give one of them",
        lambda g: right(PLAIN, loop=CLIPS["norm"], clip_gradient_norm=5e-3),
        lambda g: right(PLAIN, loop=CLIPS["value"], clip_gradient_value=2e-3)),
]  # fmt: skip

SERVING = [
    row("a Function without a forward derivative", lambda g: learn("a Function with true derivatives"), "; engine='unrolled' can$",
        lambda g: right("a Function with true derivatives", "unrolled")),
    row("the same, shared", lambda g: learn("a Function with true derivatives", "shared"), "; engine='unrolled' can$",
        lambda g: right("a Function with true derivatives", "unrolled")),
    row("a Function that differentiates once", lambda g: learn("a Function that differentiates once"), "; engine='finite-difference' can, which is approximate$",
        lambda g: right(replace(ALL["a Function that differentiates once"], tolerance=1e-4), "finite-difference")),
    row("the same, unrolled", lambda g: learn("a Function that differentiates once", "unrolled"), "; engine='finite-difference' can, which is approximate$",
        lambda g: right(replace(ALL["a Function that differentiates once"], tolerance=1e-4), "finite-difference")),
    row("a straight-through Function", lambda g: learn("straight through"), "; engine='unrolled' can$", lambda g: right("straight through", "unrolled")),
    row("a Function with another tangent", lambda g: learn("gradient reversal with a tangent"), "backward pass and its derivative disagree .*; engine='unrolled' can$",
        lambda g: right("gradient reversal with a tangent", "unrolled")),
    row("a hook on an activation", lambda g: learn("activation hook that scales"), "; engine='unrolled' can$",
        lambda g: right("activation hook that scales", "unrolled")),
    row("a hook on an activation, guarded", lambda g: learn("activation hook that scales, guarded"), "a hook on an activation.*; engine='unrolled' can$",
        lambda g: right("activation hook that scales, guarded", "unrolled")),
    *(row(f"a bag of maxima, {engine}", lambda g, engine=engine: learn(MAXIMA, engine), "; engine='finite-difference' can, which is approximate$",
        lambda g: right(replace(ALL[MAXIMA], tolerance=1e-4), "finite-difference")) for engine in ("forward", "shared", "unrolled")),
    row("a module's backward hook, unrolled", lambda g: learn(LOOKING, "unrolled"), "a module has a backward hook, .*; engine='forward' can$", lambda g: right(LOOKING)),
    *(row(f"hooks where gradients are accumulated, {engine}", lambda g, engine=engine: learn("hooks before the accumulating nodes", engine), message,
        *(lambda g, other=other: right(bare("hooks before the accumulating nodes"), other) for other in ("forward", "shared", "unrolled")))
      for engine, message in (("forward", r"; no engine can; remove\(\) the hook, or"), ("unrolled", r"; remove\(\) it$"))),
    row("two parameters of one storage", lambda g: learn("two parameters of one storage"), r"use one Parameter in both places, or make one of them nn\.Parameter\(other\.detach\(\)\.clone\(\)\)",
        lambda g: right("tied weights"), lambda g: right(CLONED)),
    *(row(f"a reentrant checkpoint, {engine}", lambda g, engine=engine: learn("checkpoint, reentrant", engine), "; use use_reentrant=False$", lambda g: right("checkpoint"))
      for engine in ("forward", "shared", "finite-difference")),
    row("micro batches for an initialisation", lambda g: g.initialise(train=[[g.batch, g.meta_batch]]), "; use smaller batches$", lambda g: g.initialise(train=[g.batch, g.meta_batch])),
    row("a checkpoint, unrolled", lambda g: learn("checkpoint", "unrolled"), "a checkpoint, or .*; engine='forward' can$", lambda g: right("checkpoint")),
    *(row(f"served by none, {engine}", lambda g, engine=engine: learn(NO_ENGINE, engine), r"; no engine can; remove\(\) the hook, or replace that part of the model by one that torch can differentiate$",
        *(lambda g, other=other: right(REVERSED, other) for other in ("forward", "shared", "unrolled")))
      for engine in ("forward", "shared", "unrolled", "finite-difference")),
    row("micro batches, shared", lambda g: accumulated(PLAIN, (5, 3, 4), engine="shared"), "for micro batches use engine='forward'",
        lambda g: accumulated(PLAIN, (5, 3, 4), engine="forward")),
    row("torch's data parallelism", lambda g: in_a_group(lambda group: learn(Problem(data_parallel, warm=1))), "give the model itself, and process_group=",
        lambda g: in_a_group(lambda group: right(PLAIN, process_group=group))),
    row("a scripted model", lambda g: learn("compiled by torch.jit"), "give the one it was made from", lambda g: right(PLAIN)),
    row("weights changed in the forward pass", lambda g: learn(CHANGING), "do that between the steps",
        lambda g: ends_where(bare(CHANGING, warm=0), Problem(lambda: Layers(hidden(lambda self, h: h)), warm=0), before=normalise)),
    row("sparse embeddings", lambda g: learn("nn.Embedding with sparse gradients"), "use sparse=False",
        lambda g: right(Problem(embedded(sparse=False), batches=tokens))),
    row("sparse embeddings by function", lambda g: learn("F.embedding with sparse gradients"), "use sparse=False",
        lambda g: right(Problem(partial(Words, sparse=False), batches=tokens))),
    row("embeddings scaled by frequency", lambda g: learn("nn.Embedding with scale_grad_by_freq"), "use scale_grad_by_freq=False",
        lambda g: right(Problem(embedded(scale_grad_by_freq=False), batches=tokens))),
    row("embeddings of bounded length", lambda g: learn("nn.Embedding with max_norm"),
        r"use max_norm=None, and between the steps weight\.renorm_\(2\.0, 0, 1\.0\) under torch\.no_grad\(\)",
        *(lambda g, engine=engine: ends_where(Problem(embedded(max_norm=1.0), batches=tokens, warm=0), Problem(embedded(), batches=tokens, warm=0), engine, before=shorten)
          for engine in ("forward", "shared", "unrolled"))),
    *(row(f"{name}, which has no differentiable update", lambda g, kind=kind: g.step(optimizer=kind(g.model.parameters())),
        r"such as torch\.optim\.SGD, Adam, AdamW, RMSprop or Adagrad", *(lambda g, other=other: right(f"{other}, mlp") for other in ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad")))
      for name, kind in (("LBFGS", torch.optim.LBFGS), ("SparseAdam", torch.optim.SparseAdam))),
    row("an optimizer's own step that clips", lambda g: learn("a subclass that clips, Adam, mlp"), r"use an optimizer of torch\.optim as it is\. To clip, use clip_gradient_norm= or clip_gradient_value=",
        lambda g: right(bare("Adam, mlp", warm=0), loop=bare("a subclass that clips, Adam, mlp", warm=0), clip_gradient_norm=5e-3),
        lambda g: learn("Adam, mlp", clip_gradient_value=5e-3)),
    row("an optimizer's own step that projects", lambda g: learn("a subclass that projects, mlp"), "what changes weights, do between the steps",
        lambda g: ends_where(bare("a subclass that projects, mlp", warm=0), bare("RMSprop, mlp", warm=0), after=project_all)),
    row("an own optimizer", lambda g: learn("an own optimizer that claims a derivative, mlp"), r"use an optimizer of torch\.optim", lambda g: right("SGD, mlp")),
    row("a replaced step", lambda g: learn("a step that was replaced and clips"), "To clip, use clip_gradient_norm=",
        lambda g: right(bare("a step that was replaced and clips"), loop="a step that was replaced and clips", clip_gradient_norm=5e-3)),
    row("a gradient hook that clips", lambda g: learn(CLIPS["value"]), r"remove\(\) it\. To clip, use clip_gradient_norm= or clip_gradient_value= of OnlineLoss or fit",
        lambda g: right(bare(CLIPS["value"])), lambda g: right(bare(CLIPS["value"]), loop=CLIPS["value"], clip_gradient_value=2e-3),
        lambda g: right(bare(CLIPS["value"]), loop=CLIPS["norm"], clip_gradient_norm=5e-3)),
    row("a hook on gradients in a stack", lambda g: g.fit_seeds([clamped(m := nn.Linear(4, 3)) and m for _ in SEEDS]), "To clip, use clip_gradient_norm= or clip_gradient_value= of OnlineLoss or fit",
        lambda g: g.fit_seeds(), lambda g: g.fit_finite(clip_gradient_norm=5e-3), lambda g: g.fit_finite(clip_gradient_value=5e-3)),
    row("a step hook that clips", lambda g: learn("step hook that clips"), r"remove\(\) it\. To clip, use clip_gradient_norm=",
        lambda g: right(bare("step hook that clips")), lambda g: right(bare("step hook that clips"), loop="step hook that clips", clip_gradient_norm=5e-3),
        lambda g: right(bare("step hook that clips, Adam"), loop="step hook that clips, Adam", clip_gradient_norm=5e-3)),
    row("a step hook that projects", lambda g: learn("step hook that projects"), "what changes weights, do between the steps",
        lambda g: ends_where("step hook that projects", bare("step hook that projects"), after=project_all)),
    row("a gradient that is there", lambda g: learn("a stale gradient"), r"call optimizer\.zero_grad\(set_to_none=True\) before\. To accumulate over micro batches, give step\(\) a list of them",
        lambda g: right(ZEROED), lambda g: accumulated(PLAIN, (5, 3, 4))),
    row("seeds: a hook that a stack does not see", lambda g: g.fit_seeds([Steep() for _ in SEEDS], losses=None), "not what each is alone; train them one by one",
        lambda g: g.fit_finite(model=Steep(), loss=F.cross_entropy)),
    row("seeds: a function of one's own", lambda g: g.fit_seeds([OwnProduct() for _ in SEEDS]), "cannot pass as a stack: .*; train them one by one",
        lambda g: g.fit_finite(model=OwnProduct(), loss=F.cross_entropy)),
    row("seeds: two architectures", lambda g: g.fit_seeds([nn.Linear(4, 3), nn.Linear(4, 3, bias=False)]), "must be of one architecture", lambda g: g.fit_seeds()),
    row("seeds: losses of two kinds", lambda g: g.fit_seeds(losses=[LossNetwork.classification(), LossNetwork.classification(beta=2.0)]),
        "differ in kind, layers or anchor; all must be of one architecture", lambda g: g.fit_seeds(online=True)),
    row("seeds: a loss of one's own", lambda g: g.fit_seeds(losses=[Scaled(), Scaled()]), "give LossNetworks of known layers", lambda g: g.fit_seeds(online=True)),
]  # fmt: skip

ROWS = [*CHECKS, *DATA, *FILES, *TRAINING, *INITIALISING, *COMPARING, *LEARNING, *SERVING]


def extra(name):
    """The packages of an extra in ``pyproject.toml``."""
    import tomllib

    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    return tomllib.loads(text)["project"]["optional-dependencies"][name]


SAID: dict[str, str] = {}
"""What each row's case said."""


def said(case, folder):
    """The message of a case; kept, so that it is raised once."""
    if case.what not in SAID:
        folder.mkdir()
        with pytest.raises(Exception) as caught:  # noqa: PT011 -- the message is looked at
            case.wrong(Tools(folder))
        SAID[case.what] = str(caught.value)
    return SAID[case.what]


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.what, marks=[pytest.mark.slow] * case.slow) for case in ROWS]
)
def test_the_remedy_works(case, tmp_path, counts):
    assert re.search(case.message, said(case, tmp_path / "wrong"), re.DOTALL), SAID[case.what]
    if not case.needs():
        pytest.skip("the remedy cannot be tried here")
    for i, remedy in enumerate(case.remedies):
        folder = tmp_path / str(i)
        folder.mkdir()
        assert remedy(Tools(folder)) is not False
    counts["remedies tried"] += len(case.remedies)


def remedies(module):
    """(line, regular expression) of every message in a module that says what to do."""
    path = Path(adalfl_lite.__file__).parent / f"{module}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants = {
        n.targets[0].id: n.value for n in tree.body if isinstance(n, ast.Assign) and hasattr(n.targets[0], "id")
    }
    for node in ast.walk(tree):
        call = node.exc if isinstance(node, ast.Raise) else node
        fails = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "_fail"
        if not (isinstance(node, ast.Raise) or fails) or not isinstance(call, ast.Call) or not call.args:
            continue
        text = constants.get(getattr(call.args[0], "id", ""), call.args[0])
        if isinstance(text, ast.Constant):
            text = ast.JoinedStr([text])
        if not isinstance(text, ast.JoinedStr):
            continue
        parts = [part.value if isinstance(part, ast.Constant) else None for part in text.values]
        plain = "{}".join("".join(part or "\0" for part in parts).split("\0"))
        if re.search(r"; (?!got)|: use |such as", plain) and not any(part in plain for part in NO_REMEDY):
            yield (
                f"{module}:{node.lineno}: {plain}",
                "".join(".*" if part is None else re.escape(part) for part in parts),
            )


def test_every_remedy_has_a_row(tmp_path):
    found = [said(case, tmp_path / str(i)) for i, case in enumerate(ROWS)]
    missing = [
        place
        for module in MODULES
        for place, pattern in remedies(module)
        if not any(re.search(pattern, text, re.DOTALL) for text in found)
    ]
    assert not missing, "messages with a remedy that no row tries:\n" + "\n".join(missing)


def test_names_of_rows_differ():
    assert len({case.what for case in ROWS}) == len(ROWS) > 70
    assert sum(1 for module in MODULES for _ in remedies(module)) > 50


def test_a_remedy_without_a_row_would_be_found(monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules[__name__], "ROWS", CHECKS)
    with pytest.raises(AssertionError, match="train/loop:.*such as MultiStepLR"):
        test_every_remedy_has_a_row(tmp_path)


@pytest.mark.parametrize("clips", [*CLIPS.values(), "step hook that clips, Adam", "a step that was replaced and clips"])
def test_the_clipping_that_is_replaced_was_at_work(clips):
    with pytest.raises(AssertionError, match="is not the plain loop's|plain loop"):
        right(bare(clips), loop=clips)
