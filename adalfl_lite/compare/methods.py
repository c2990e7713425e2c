"""The methods that are compared: how each has its loss, or its learning rate, and trains with it.

:data:`METHODS` has them all, each with a word about it; ``adalfl methods`` prints it. The first four are the paper's
comparison, the next ones the controls that make it fair, the rest other losses. A loss of your own is one more line ::

    METHODS["mine"] = Method(Learned(MyLossNetwork), "my network, meta-learned offline")
    METHODS["theirs"] = Method(Given(their_loss), "a loss that somebody wrote")
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import pandas as pd
import torch
from torch import nn

from adalfl_lite.checks import unknown
from adalfl_lite.compare.recipes import (
    Dynamical,
    Given,
    Job,
    Learned,
    LearnedRate,
    Newton,
    Replayed,
    SymbolicSearch,
    TaskLoss,
    TaskRate,
    TaylorSearch,
    Tuned,
    fresh,
    is_installed,
)
from adalfl_lite.compare.tasks import Task
from adalfl_lite.data.dataset import Dataset, Split
from adalfl_lite.learn.base import Learner, Plain
from adalfl_lite.learn.learning_rate import OnlineLearningRate, implied_scale, scaled_schedule
from adalfl_lite.learn.meta_learning import Initialiser
from adalfl_lite.learn.online import META_LEARNING_RATE, OnlineLoss, check_meta_rate
from adalfl_lite.learn.stacked import Stacked
from adalfl_lite.losses.fixed import FIXED, fixed_loss, summary
from adalfl_lite.losses.network import LossNetwork
from adalfl_lite.losses.task import Loss, task_loss
from adalfl_lite.provenance import identity
from adalfl_lite.train.checkpoint import describe_data
from adalfl_lite.train.loop import Callback, fit

LOSSES, RATES = (Given, Learned, TaylorSearch, SymbolicSearch), (TaskRate, Tuned, LearnedRate, Replayed)
"""The recipes that a method is put together of."""

FULL_RATE_STEPS = 3000
"""Over longer trainings than this, online adapts its loss more slowly, see :meth:`Method.online_meta_learning_rate`."""


@dataclass(frozen=True)
class Method:
    """How a loss and a learning rate are had, and how they are used.

    Raises:
        ValueError: meta batches of another split, or ``online`` where there is nothing to adapt.
    """

    loss: Given | Learned | TaylorSearch | SymbolicSearch
    about: str
    """A word for people."""
    rate: TaskRate | Tuned | LearnedRate | Replayed = TaskRate()
    online: bool = False
    """Adapt what is learned, the loss or the rate, after every step of the training too."""
    meta_batches: str = "valid"
    """The split that is learned from beside the training batches: "valid" or "train"."""
    train_on_valid: bool = False
    """Train on the train and the valid split."""
    compute_of: Method | str | None = None
    """Train for as many steps as this method, or the one of this name, costs with its initialisation; None: as the
    task says."""
    meta_learning_rate: float | None = None
    """η of Algorithm 2; None: see :meth:`online_meta_learning_rate`."""

    def __post_init__(self) -> None:
        """Refuse what is no recipe, would look at the test split, or would do nothing."""
        for part, known, example in ((self.loss, LOSSES, "Given(loss)"), (self.rate, RATES, "TaskRate()")):
            if not isinstance(part, known):
                names = ", ".join(kind.__name__ for kind in known)
                raise TypeError(f"a method is put together of {names}; got {type(part).__name__}, give {example}")
        if self.meta_batches not in ("valid", "train"):
            raise ValueError(f"meta_batches must be 'valid' or 'train', got {self.meta_batches!r}")
        if self.online and isinstance(self.loss, Given) and not isinstance(self.rate, LearnedRate):
            loss = self.loss.loss
            if not isinstance(loss, nn.Module) or not any(p.requires_grad for p in loss.parameters()):
                raise ValueError("online=True has nothing to adapt; give a loss with weights, or rate=LearnedRate()")

        if self.meta_learning_rate is not None:
            if not (self.online and not isinstance(self.rate, LearnedRate)):
                raise ValueError("meta_learning_rate is of a loss that is online; give online=True, or leave it out")
            check_meta_rate(self.meta_learning_rate, None)

    @property
    def recipe(self) -> str:
        """All of it but the words, as :func:`~adalfl_lite.provenance.identity` has it, other methods written out.

        Those that are names still are taken from :data:`METHODS`.
        """
        whole = self.resolved(METHODS)
        found = {field.name: getattr(whole, field.name) for field in fields(self) if field.name != "about"}
        for name, other in (("rate", getattr(whole.rate, "of", None)), ("compute_of", whole.compute_of)):
            if isinstance(other, Method):
                found[f"{name} of"] = other.recipe
        found["compute_of"] = None
        if isinstance(whole.rate, Replayed):
            found["rate"] = replace(whole.rate, of=None)
        return identity(found)

    def resolved(self, table: Mapping[str, Method], within: tuple[str, ...] = ()) -> Method:
        """The same, with the methods that it names taken from ``table``, and theirs in turn.

        Raises:
            ValueError: there is no method of that name, it is this one itself, or it learns no loss though its compute
                is wanted.
        """

        def found(name: Method | str | None) -> Method | None:
            if not isinstance(name, str):
                return None if name is None else name.resolved(table, within)
            if name in within:
                raise ValueError(f"method {name!r} refers to itself; name another")
            if name not in table:
                raise unknown("method", name, table)
            return table[name].resolved(table, (*within, name))

        compute_of, rate = found(self.compute_of), self.rate
        if compute_of is not None and not isinstance(compute_of.loss, Learned):
            raise ValueError(f"compute_of={self.compute_of!r} is a method that learns no loss; name one that does")
        if isinstance(rate, Replayed):
            rate = replace(rate, of=found(rate.of))
        return replace(self, compute_of=compute_of, rate=rate)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of task it is for."""
        return self.loss.kinds

    def steps(self, task: Task) -> int:
        """How long it trains on a task.

        That is as long as the task says, but for a method that gets the compute of another, counted as in the chapter
        on cost: a meta step is three plain steps, a step of a rehearsal one.
        """
        if self.compute_of is None:
            return task.steps
        settings = self.resolved(METHODS).compute_of.loss.settings_for(task)  # type: ignore[union-attr]
        rehearsals = 1 + settings.rehearsals  # one of the imitation
        return 3 * (settings.steps + task.steps) + rehearsals * settings.rehearsal_steps

    def stacks(self, task: Task) -> bool:
        """Whether seeds can be one program: they share a learning rate, and a stack knows the loss."""
        plain = isinstance(self.rate, TaskRate) and not (task.augment or task.drops)
        return plain and self.loss.stacks(task.kind)

    def online_meta_learning_rate(self, task: Task) -> float:
        """η of Algorithm 2: the kind's, and in a long training less, by as much as the training is longer.

        Adam moves a weight of φ by about η a step, so η times the steps bounds how far online adaptation can take the
        loss from the one that was rehearsed. Each step of it looks one step ahead, and so prefers a loss that takes
        small steps.
        """
        if self.meta_learning_rate is not None:
            return self.meta_learning_rate
        return META_LEARNING_RATE[task.kind] * min(1.0, FULL_RATE_STEPS / task.steps)


CLASSIFICATION = ("classification",)
ML3 = Learned(LossNetwork.ml3, Initialiser(imitation_steps=0, rollout_steps=1, rehearsal_steps=1000))

METHODS = {
    "handcrafted": Method(TaskLoss(), "the task loss: cross-entropy, or squared error"),
    "ml3": Method(
        ML3, "an ML³ loss network (ReLU, Softplus), meta-learned offline one step at a time; the best of eight is kept"
    ),
    "offline": Method(Learned(), "AdaLFL's loss network, meta-learned offline (Algorithm 1), then frozen"),
    "online": Method(Learned(), "the same, adapted after every step on validation data (Algorithm 2)", online=True),
    "online-train": Method(
        Learned(), "the same, with meta batches from the train split only", online=True, meta_batches="train"
    ),
    "handcrafted-tuned": Method(
        TaskLoss(), "the task loss, its learning rate the one of seven with the lowest validation error", Tuned()
    ),
    "handcrafted-all": Method(
        TaskLoss(), "the task loss, trained on the train and the valid split", train_on_valid=True
    ),
    "handcrafted-long": Method(
        TaskLoss(), "the task loss, for as many steps as online costs with its initialisation", compute_of="online"
    ),
    "rate-offline": Method(
        TaskLoss(), "the task loss, its learning rate meta-learned offline (Algorithm 3), then frozen", LearnedRate()
    ),
    "rate-online": Method(
        TaskLoss(), "the same, adapted after every step on validation data (Algorithm 4)", LearnedRate(), online=True
    ),
    "rate-replay": Method(TaskLoss(), "the task loss under the schedule that online implied", Replayed("online")),
    "label-smoothing-tuned": Method(
        Given(fixed_loss("label-smoothing"), CLASSIFICATION),
        "label smoothing (.1), its learning rate tuned alike",
        Tuned(),
    ),
    **{name: Method(Given(fixed_loss(name), kinds), summary(loss)) for name, (loss, kinds) in FIXED.items()},
    "dynamical": Method(Dynamical(), "cross-entropy whose class weights rise and fall in turn, ten times each"),
    "newton-hessian": Method(Newton(), "the task loss with a Newton step in output space (Hessian)"),
    "newton-fisher": Method(Newton(matrix="fisher"), "the same with the empirical Fisher matrix"),
    "taylorglo": Method(TaylorSearch(), "a polynomial whose coefficients CMA-ES finds, by short trainings"),
    "evomal": Method(SymbolicSearch(), "an expression found by genetic programming, its weights by gradient"),
}
"""Every method by its name."""

MAIN_METHODS = ("handcrafted", "ml3", "offline", "online")


def get_method(name: str) -> Method:
    """The method of that name; ``ValueError`` listing the known ones if there is none."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]


def named_methods(methods: Sequence[str] | Mapping[str, Method]) -> dict[str, Method]:
    """Methods by name, with what they refer to: in a table of one's own, to that table first.

    Raises:
        TypeError: what is in the table is no method.
        ValueError: see :meth:`Method.resolved`, and :func:`get_method`.
    """
    own = methods if isinstance(methods, Mapping) else {}
    if wrong := [name for name, method in own.items() if not isinstance(method, Method)]:
        kind = type(own[wrong[0]]).__name__
        raise TypeError(f"{wrong[0]!r} must be a Method, got {kind}; give Method(Given(loss), 'in words')")
    found = {name: own[name] if name in own else get_method(name) for name in methods}
    return {name: method.resolved({**METHODS, **own}, (name,)) for name, method in found.items()}


def check_applies(name: str, task: Task, method: Method | None = None) -> None:
    """Raise ``ValueError`` unless the method of that name is known, installed, and made for the kind of ``task``."""
    method = method or get_method(name)
    if task.kind not in method.kinds:
        raise ValueError(f"method {name!r} is for {' and '.join(method.kinds)}, task {task.name!r} is {task.kind}")
    library = method.loss.library
    if not is_installed(library):
        raise ValueError(f"method {name!r} needs {library}, which is not here; pip install 'adalfl-lite[methods]'")
    method.loss.check(task.kind)


@dataclass(frozen=True)
class Prepared:
    """What a method trains with."""

    loss: Loss
    task: Task
    """With the learning rate that was tuned or learned."""
    data: Dataset
    schedule: tuple[list[int], list[float]] | None
    """Steps, and by which scale c to multiply the learning rate there."""
    steps: int
    """Meta steps taken, or losses tried."""
    chosen_step: int
    seconds: float
    """Of everything before the training."""


def prepare(
    task: Task,
    datasets: Sequence[Dataset],
    method: str | Method,
    seeds: Sequence[int],
    *,
    device: str = "cpu",
    shared: Mapping[int, dict] | None = None,
    progress: bool = False,
) -> list[Prepared]:
    """Everything a method does before it trains: tune, search or meta-learn, on the train and the valid split.

    Several seeds are one program where method and task allow it; each counts an equal share of the seconds.

    Args:
        task, method: what is compared; a method, or its name in :data:`METHODS`.
        datasets: of each seed.
        seeds: one or several.
        device: where to learn.
        shared: for each seed a dictionary, which keeps initialised losses between calls by all that they depend on.
        progress: show a progress bar.
    """
    how = get_method(method) if isinstance(method, str) else method
    if how.compute_of is not None:
        task = task.with_(steps=how.steps(task))
    shared = {seed: {} for seed in seeds} if shared is None else shared
    given = zip(datasets, seeds, strict=True)
    jobs = [Job(task, data, seed, how.meta_batches, device, progress) for data, seed in given]
    learned = isinstance(how.loss, Learned) and how.stacks(task)
    new = [job for job in jobs if (*_key(how.loss, job), None) not in shared[job.seed]] if learned else []
    if isinstance(how.loss, Learned) and len(new) > 1:
        started = time.perf_counter()
        found = how.loss.find_together(new)
        share = (time.perf_counter() - started) / len(new)
        for job, one in zip(new, found, strict=True):
            shared[job.seed][(*_key(how.loss, job), None)] = one, share
    return [_prepared(how, job, shared[job.seed]) for job in jobs]


def _prepared(how: Method, job: Job, shared: dict) -> Prepared:
    """The loss, then the rate, then the data of one job."""
    found, seconds = _found(how.loss, job, shared)
    started = time.perf_counter()
    loss, task, schedule = found.learned, job.task, None
    steps, chosen = found.steps, found.chosen_step
    if isinstance(how.rate, Tuned):
        task = how.rate.tune(job, loss)
        seconds += time.perf_counter() - started
    elif isinstance(how.rate, LearnedRate):
        (rate, steps, chosen), of_rate = _found(how.rate, job, shared, how.loss, loss)
        task, seconds = task.with_(learning_rate=rate.rates[0]), seconds + of_rate
    elif isinstance(how.rate, Replayed):
        (replayed,) = prepare(
            task,
            [job.data],
            how.rate.of,
            [job.seed],
            device=job.device,
            shared={job.seed: shared},
            progress=job.progress,
        )
        started = time.perf_counter()
        schedule = recorded_scale(replayed, how.rate.of, job.seed, device=job.device, rows=how.rate.rows)
        seconds += replayed.seconds + time.perf_counter() - started  # also where the initialisation was shared
    data = job.data
    if how.train_on_valid:
        data = replace(data, train=_joined(data.train, data.valid))
    return Prepared(loss, task, data, schedule, steps, chosen, seconds)


def _found(recipe: Any, job: Job, shared: dict, of: Any = None, *given: Any) -> tuple[Any, float]:
    """What a recipe comes to, and its seconds; what costs something only once for each key.

    A rate is found for a loss, ``given``, which another recipe, ``of``, came to.
    """
    if not getattr(recipe, "shares", True):
        started = time.perf_counter()
        return recipe.find(job), time.perf_counter() - started
    key = (*_key(recipe, job), of)
    if key not in shared:
        started = time.perf_counter()
        shared[key] = recipe.find(job, *given), time.perf_counter() - started
    found, seconds = shared[key]
    return found._replace(learned=copy.deepcopy(found.learned)), seconds


def _key(recipe: Any, job: Job) -> tuple:
    """All that what a recipe comes to depends on: equal recipes share it."""
    return recipe, job.meta_batches, repr(job.task), repr(describe_data(job.data)), job.seed, str(job.device)


def train(
    prepared: Sequence[Prepared],
    method: str | Method,
    seeds: Sequence[int],
    *,
    device: str = "cpu",
    callback: Callback | None = None,
    checkpoint: str | os.PathLike | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """The histories of a training of each seed with what :func:`prepare` gave, below each other, with a column seed.

    Several seeds are one program, of whose seconds each counts an equal share; hand over several only where
    :meth:`Method.stacks`. The loss that is trained with is a copy, so that another training begins with the same; a
    callback gets it. The other arguments are those of :func:`~adalfl_lite.train.fit`.
    """
    how = get_method(method) if isinstance(method, str) else method
    task = prepared[0].task
    learners = [_learner(how, one, seed, device) for one, seed in zip(prepared, seeds, strict=True)]
    together = len(learners) > 1
    learner = Stacked(learners) if together else learners[0]  # type: ignore[arg-type]
    scheduler = None
    if not together and not (how.online and isinstance(how.rate, LearnedRate)):  # whose drops are learned too
        scheduler = task.make_scheduler(learner.optimizer)
        if (schedule := prepared[0].schedule) is not None:
            scheduler = scaled_schedule(learner.optimizer, *schedule, task.schedule)
    history = fit(
        learner,
        [one.data for one in prepared],
        steps=task.steps,
        batch_size=task.batch_size,
        meta_batches=how.meta_batches if how.online else "valid",
        scheduler=scheduler,
        augment=task.augmentation,
        seed=list(seeds) if together else seeds[0],
        callback=callback,
        checkpoint=checkpoint,
        progress=progress,
    )
    if not together:
        return history.assign(seed=seeds[0])
    return history.drop(columns="seed").assign(seconds=history.seconds / len(seeds), seed=history.seed)


def _learner(how: Method, prepared: Prepared, seed: int, device: str) -> Learner:
    """The base model that the seed draws, with what it is trained with."""
    model, optimizer = fresh(prepared.task, prepared.data, seed, device)
    loss, measured = copy.deepcopy(prepared.loss), task_loss(prepared.data.kind)
    if isinstance(loss, nn.Module):
        loss.to(device)
    if how.online and isinstance(how.rate, LearnedRate):
        return OnlineLearningRate(model, loss, optimizer, task_loss=measured)
    if how.online and isinstance(loss, nn.Module):
        eta = how.online_meta_learning_rate(prepared.task)
        return OnlineLoss(model, loss, optimizer, meta_learning_rate=eta, task_loss=measured)
    return Plain(model, loss, optimizer)


def recorded_scale(
    prepared: Prepared, method: str | Method, seed: int, *, device: str = "cpu", rows: int = 2000
) -> tuple[list[int], list[float]]:
    """Train, and record along the way the scale c of the learning rate that the loss implies on training rows.

    Returns:
        The steps of the evaluations, and c there.
    """
    batch = prepared.data.train.to(device)[:rows]
    plain = task_loss(prepared.data.kind)
    steps: list[int] = []
    scales: list[float] = []

    def record(step: int, model: nn.Module, loss: Loss) -> None:
        scale = implied_scale(model, loss, plain, batch)
        if math.isfinite(scale):  # else the task loss has no gradient left to scale
            steps.append(step)
            scales.append(scale)

    train([prepared], method, [seed], device=device, callback=record)
    return steps, scales


def _joined(first: Split, second: Split) -> Split:
    joined = {
        name: torch.cat([getattr(first, name), getattr(second, name)]) for name in ("inputs", "targets", "indices")
    }
    return replace(first, **joined)
