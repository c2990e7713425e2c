"""How a method has its loss, and its learning rate: frozen recipes, which are put together in ``methods``.

A loss is *given*, *learned* or *searched for*; a rate is the task's, *tuned*, *learned* or *replayed*. A recipe is
hashable: what two methods prepare by equal recipes, on the same data with the same seed, is prepared once.
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from adalfl_lite.compare.tasks import Task
from adalfl_lite.data.dataset import Dataset
from adalfl_lite.engines.closed_form import in_closed_form
from adalfl_lite.engines.steps import Batch
from adalfl_lite.learn.base import Plain
from adalfl_lite.learn.initialisation import initialise, initialise_learning_rate, initialise_seeds
from adalfl_lite.learn.learning_rate import LearningRate
from adalfl_lite.learn.meta_learning import Initialisation, Initialiser, Validate, rehearsal
from adalfl_lite.losses.dynamical import DynamicalLoss
from adalfl_lite.losses.network import LossNetwork
from adalfl_lite.losses.newton import NewtonLoss
from adalfl_lite.losses.symbolic import LOCAL_STEPS, SymbolicLoss, points_downhill, search_symbolic
from adalfl_lite.losses.task import KINDS, Loss, task_loss
from adalfl_lite.losses.taylor import search_taylor
from adalfl_lite.train.evaluation import evaluate
from adalfl_lite.train.loop import fit

INITIALISATION_SEED, TRAIN_SEED, META_SEED = 10_000, 20_000, 30_000
"""Added to a seed: of what is drawn before training, of the training batches then, and of the meta batches."""


class Found(NamedTuple):
    """What a recipe came to."""

    learned: Any
    """A loss, or a :class:`~adalfl_lite.learn.LearningRate`."""
    steps: int = 0
    """Meta steps taken, or losses tried."""
    chosen_step: int = 0


@dataclass(frozen=True)
class Job:
    """One method on one task with one seed, before its training."""

    task: Task
    data: Dataset
    seed: int
    meta_batches: str = "valid"
    device: str = "cpu"
    progress: bool = False

    def make_model(self) -> nn.Module:
        """A fresh base model on the device."""
        return self.task.make_model(self.data).to(self.device)


class Streams(NamedTuple):
    """What Algorithms 1 and 3 learn from."""

    train: Iterator[Batch]
    meta: Iterator[Batch]
    validate: Validate
    """Scores a model on the split of the meta batches."""


def streams(job: Job) -> Streams:
    """Training batches and meta batches that the seed of a job draws before its training."""
    train, meta = job.data.train.to(job.device), getattr(job.data, job.meta_batches).to(job.device)
    batches = train.batches(job.task.batch_size, seed=TRAIN_SEED + job.seed)
    meta_batches = meta.batches(min(job.task.batch_size, len(meta)), seed=META_SEED + job.seed)
    if augment := job.task.augmentation:
        batches = ((augment(inputs), targets) for inputs, targets in batches)
        if job.meta_batches == "train":  # as fit does
            meta_batches = ((augment(inputs), targets) for inputs, targets in meta_batches)
    return Streams(batches, meta_batches, lambda model: evaluate(model, meta, job.data.kind))


# Losses ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """A loss that somebody wrote: (prediction, target) -> scalar; and the kinds of task it is for."""

    loss: Loss
    kinds: tuple[str, ...] = KINDS
    shares = False
    library = None

    def __post_init__(self) -> None:
        """Refuse what is no loss, and kinds that there are not."""
        if not callable(self.loss):
            raise TypeError(f"loss must be a function or a module, got {type(self.loss).__name__}; give F.mse_loss")
        _check_kinds(self.kinds)

    def check(self, kind: str) -> None:
        """A given loss is taken as it is."""

    def make(self, task: Task, data: Dataset) -> Loss:
        """The loss for this task; a copy, where it has a state."""
        return copy.deepcopy(self.loss)

    def find(self, job: Job) -> Found:
        """The loss, at no cost."""
        return Found(self.make(job.task, job.data))

    def stacks(self, kind: str) -> bool:
        """Whether several seeds can be trained with it as one program."""
        return False


@dataclass(frozen=True)
class TaskLoss(Given):
    """L_T: cross-entropy, or squared error."""

    loss: Loss = task_loss("classification")

    def make(self, task: Task, data: Dataset) -> Loss:
        """The task loss of the data's kind."""
        return task_loss(data.kind)

    def stacks(self, kind: str) -> bool:
        """A stack has it of its own."""
        return True


@dataclass(frozen=True)
class Dynamical(Given):
    """Cross-entropy whose class weights rise to ``amplitude`` and fall in turn, each class ``cycles`` times."""

    loss: Loss = task_loss("classification")
    kinds: tuple[str, ...] = ("classification",)
    amplitude: float = 10.0
    cycles: int = 10

    def make(self, task: Task, data: Dataset) -> Loss:
        """With a period that fits the length of the training."""
        period = max(2, task.steps // (self.cycles * data.outputs))
        return DynamicalLoss(data.outputs, amplitude=self.amplitude, period=period)


@dataclass(frozen=True)
class Newton(Given):
    """The task loss with a Newton step in output space, by the "hessian" or the "fisher" matrix."""

    loss: Loss = task_loss("classification")
    matrix: str = "hessian"

    def make(self, task: Task, data: Dataset) -> Loss:
        """The loss for the kind of the data."""
        return NewtonLoss(data.kind, self.matrix)


@dataclass(frozen=True)
class Learned:
    """A loss meta-learned before training, by Algorithm 1.

    ``network`` is called with the kind of the task, "classification" or "regression", and gives a fresh M_φ, a module
    with that ``kind``. A rehearsal is as long as the training, but at most ``settings.rehearsal_steps``.
    """

    network: Callable[[str], nn.Module] = LossNetwork.default
    settings: Initialiser = Initialiser(rehearsal_steps=1000)
    kinds: tuple[str, ...] = KINDS
    shares = True
    library = None

    def __post_init__(self) -> None:
        """Refuse what cannot be called, and kinds that there are not."""
        if not callable(self.network) or isinstance(self.network, nn.Module):
            raise TypeError(
                f"network must be a function of the kind, got {type(self.network).__name__}; give"
                " lambda kind: LossNetwork(kind, ...)"
            )
        _check_kinds(self.kinds)

    def check(self, kind: str) -> None:
        """Raise unless ``network`` gives a loss network of this kind, and one that can begin as the settings say."""
        with torch.random.fork_rng(devices=[]):
            try:
                made = self.network(kind)
            except TypeError as error:
                raise TypeError(
                    f"network({kind!r}) failed: {error}; give lambda kind: LossNetwork(kind, ...)"
                ) from error
        if not isinstance(made, nn.Module) or getattr(made, "kind", None) != kind:
            what = getattr(made, "kind", None) if isinstance(made, nn.Module) else type(made).__name__
            raise ValueError(f"network({kind!r}) must give a module whose kind is {kind!r}, got {what!r}")
        if self.settings.imitation_steps and not isinstance(made, LossNetwork):
            raise TypeError(
                f"{type(made).__name__} cannot imitate the task loss; use settings=Initialiser(imitation_steps=0)"
            )

    def settings_for(self, task: Task) -> Initialiser:
        """The settings, with rehearsals no longer than the training."""
        return self.settings.with_(rehearsal_steps=min(task.steps, self.settings.rehearsal_steps))

    def find(self, job: Job, callback: Callable[[int, nn.Module], None] | None = None) -> Found:
        """Algorithm 1 on the job's data with its optimizer; ``callback`` gets (meta steps taken, the loss)."""
        torch.manual_seed(INITIALISATION_SEED + job.seed)
        train, meta, validate = streams(job)
        # a copy, where the network is one that somebody keeps
        loss = copy.deepcopy(self.network(job.data.kind)).to(job.device)
        settings = self.settings_for(job.task)
        outcome = initialise(
            loss,
            job.make_model,
            train,
            meta,
            make_optimizer=job.task.make_optimizer,
            settings=settings,
            validate=validate if settings.rehearsals else None,
            callback=callback,
            progress=job.progress,
        )
        return Found(loss, outcome.steps, outcome.chosen_step)

    def find_together(self, jobs: Sequence[Job]) -> list[Found]:
        """The same for several seeds of a task as one program."""
        first = jobs[0]
        settings = self.settings_for(first.task)
        train, meta, validate = zip(*map(streams, jobs), strict=True)
        found: tuple[list[LossNetwork], list[Initialisation]] = initialise_seeds(
            lambda: copy.deepcopy(self.network(first.data.kind)).to(first.device),  # type: ignore[arg-type, return-value]
            first.make_model,
            train,
            meta,
            make_optimizer=first.task.make_optimizer,
            seeds=[INITIALISATION_SEED + job.seed for job in jobs],
            settings=settings,
            validate=validate if settings.rehearsals else None,
            progress=first.progress,
        )
        return [Found(loss, done.steps, done.chosen_step) for loss, done in zip(*found, strict=True)]

    def stacks(self, kind: str) -> bool:
        """Whether its derivatives are known in closed form, which a stack needs, and a stack has all its settings."""
        if self.settings.not_for_a_stack:
            return False
        with torch.random.fork_rng(devices=[]):
            return in_closed_form(self.network(kind))


@dataclass(frozen=True)
class TaylorSearch:
    """TaylorGLO: the coefficients of a polynomial, by CMA-ES, each scored by a short training."""

    generations: int | None = None
    """None: as many as :func:`~adalfl_lite.losses.taylor.search_taylor` has by default."""
    population: int | None = None
    scored_steps: int = 200
    """Of the training that scores a candidate; the task's own where those are fewer."""
    kinds: tuple[str, ...] = KINDS
    shares = True
    library = "cma"

    def find(self, job: Job) -> Found:
        """Search, on the job's data with its optimizer."""
        torch.manual_seed(INITIALISATION_SEED + job.seed)
        score = _Score(job, streams(job), self.scored_steps)
        loss = search_taylor(job.data.kind, score, seed=job.seed, **_budget(self.generations, self.population))
        return Found(loss, score.tried)

    def check(self, kind: str) -> None:
        """A search begins from nothing."""

    def stacks(self, kind: str) -> bool:
        """A search is of one seed."""
        return False


@dataclass(frozen=True)
class SymbolicSearch:
    """EvoMAL: an expression by genetic programming, its weights by gradient, each scored by a short training."""

    generations: int | None = None
    """None: as many as :func:`~adalfl_lite.losses.symbolic.search_symbolic` has by default."""
    population: int | None = None
    scored_steps: int = 200
    local: Initialiser = Initialiser.published(steps=LOCAL_STEPS, meta_learning_rate=1e-3)
    """How the weights of a candidate are learned."""
    kinds: tuple[str, ...] = KINDS
    shares = True
    library = "deap"

    def find(self, job: Job) -> Found:
        """Search, on the job's data with its optimizer."""
        torch.manual_seed(INITIALISATION_SEED + job.seed)
        given = streams(job)
        score, kind = _Score(job, given, self.scored_steps), job.data.kind

        def learn_weights(loss: SymbolicLoss) -> None:
            loss.to(job.device)
            make_optimizer = job.task.make_optimizer
            initialise(
                loss, job.make_model, given.train, given.meta, make_optimizer=make_optimizer, settings=self.local
            )

        def accept(loss: SymbolicLoss) -> bool:
            return points_downhill(loss, task_loss(kind), job.data.outputs)

        budget = _budget(self.generations, self.population)
        loss = search_symbolic(kind, score, learn_weights, accept=accept, seed=job.seed, **budget)
        return Found(loss, score.tried)

    def check(self, kind: str) -> None:
        """A search begins from nothing."""

    def stacks(self, kind: str) -> bool:
        """A search is of one seed."""
        return False


class _Score:
    """The validation error after a short training with a loss; counts how many were tried."""

    def __init__(self, job: Job, given: Streams, steps: int):
        self.job, self.given, self.steps, self.tried = job, given, min(job.task.steps, steps), 0

    def __call__(self, loss: nn.Module) -> float:
        self.tried += 1
        job, given = self.job, self.given
        make_optimizer = job.task.make_optimizer
        return rehearsal(loss.to(job.device), job.make_model, make_optimizer, given.train, self.steps, given.validate)[
            0
        ]


def _check_kinds(kinds: tuple[str, ...]) -> None:
    if not isinstance(kinds, tuple) or not kinds or set(kinds) - set(KINDS):
        raise ValueError(f"kinds must be a tuple of {' and '.join(KINDS)}, got {kinds!r}; give ('classification',)")


def _budget(generations: int | None, population: int | None) -> dict[str, int]:
    """What is not the search's default."""
    given = {"generations": generations, "population": population}
    return {name: value for name, value in given.items() if value is not None}


# Learning rates -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskRate:
    """The task's own learning rate and drops."""


@dataclass(frozen=True)
class Tuned:
    """The task's rate times that factor whose full run has the lowest validation error at its end."""

    factors: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)

    def __post_init__(self) -> None:
        """Refuse factors that no rate can have."""
        if not self.factors or not all(0 < factor < math.inf for factor in self.factors):
            raise ValueError(f"factors must be positive and finite, one or more, got {self.factors}; give (0.1, 1.0)")

    def tune(self, job: Job, loss: Loss) -> Task:
        """The task with that rate; each run begins with the same loss.

        Raises:
            FloatingPointError: every run diverged.
        """
        scores = []
        for factor in self.factors:
            candidate = job.task.with_(learning_rate=job.task.learning_rate * factor)
            model, optimizer = fresh(candidate, job.data, job.seed, job.device)
            try:
                fit(
                    Plain(model, copy.deepcopy(loss), optimizer),
                    job.data,
                    steps=candidate.steps,
                    batch_size=candidate.batch_size,
                    scheduler=candidate.make_scheduler(optimizer),
                    augment=candidate.augmentation,
                    seed=job.seed,
                    evaluate_every=candidate.steps,
                    progress=False,
                )
            except FloatingPointError:
                continue
            error, level = evaluate(model, job.data.valid.to(job.device), job.data.kind)
            if math.isfinite(error) and math.isfinite(level):
                scores.append((error, level, candidate))
        if not scores:
            raise FloatingPointError(f"{job.task.name} diverged with every learning rate; lower the task's own")
        return min(scores, key=lambda score: score[:2])[2]


@dataclass(frozen=True)
class LearnedRate:
    """A rate meta-learned before training, by Algorithm 3; and after every step, where the method is online."""

    settings: Initialiser = Initialiser(rehearsal_steps=1000)

    def find(self, job: Job, loss: Loss) -> Found:
        """Algorithm 3 on the job's data with its optimizer, for a model that is trained with ``loss``."""
        torch.manual_seed(INITIALISATION_SEED + job.seed)
        train, meta, validate = streams(job)
        rate = LearningRate([job.task.learning_rate])
        settings = replace(self.settings, rehearsal_steps=min(job.task.steps, self.settings.rehearsal_steps))
        outcome = initialise_learning_rate(
            rate,
            job.make_model,
            train,
            meta,
            make_optimizer=job.task.make_optimizer,
            kind=job.data.kind,
            loss=loss,
            settings=settings,
            validate=validate if settings.rehearsals else None,
            progress=job.progress,
        )
        return Found(rate, outcome.steps, outcome.chosen_step)


@dataclass(frozen=True)
class Replayed:
    """The task's rate times the scale c(t) that another method's loss implied, recorded along its own training."""

    of: Any = "online"
    """The other :class:`~adalfl_lite.compare.methods.Method`, or its name."""
    rows: int = 2000
    """c is measured on so many training rows at most."""


def fresh(task: Task, data: Dataset, seed: int, device: str = "cpu") -> tuple[nn.Module, torch.optim.Optimizer]:
    """The base model that ``seed`` draws, the same for every method, and its optimizer."""
    torch.manual_seed(seed)
    model = task.make_model(data).to(device)
    return model, task.make_optimizer(model.parameters())


def is_installed(library: str | None) -> bool:
    """Whether what a recipe searches with is there; None needs nothing."""
    return library is None or importlib.util.find_spec(library) is not None
