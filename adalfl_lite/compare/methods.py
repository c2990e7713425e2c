"""The methods that are compared: how each has its loss, or its learning rate, and trains with it.

:data:`METHODS` has them all, each with a word about it; ``adalfl methods`` prints it. The first four are the paper's
comparison, the next ones the controls that make it fair, the rest other losses (:mod:`adalfl_lite.losses`).
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch

from adalfl_lite.checks import unknown
from adalfl_lite.compare.tasks import Task
from adalfl_lite.data.dataset import Dataset, Split
from adalfl_lite.engines.steps import Batch
from adalfl_lite.learn.base import Learner, Plain
from adalfl_lite.learn.initialisation import MakeModel, Validate, initialise, meta_learn, rehearsal
from adalfl_lite.learn.learning_rate import (
    LearningRate,
    OnlineLearningRate,
    implied_scale,
    initialise_learning_rate,
    replay,
)
from adalfl_lite.learn.online import OnlineLoss
from adalfl_lite.losses.dynamical import DynamicalLoss
from adalfl_lite.losses.fixed import FIXED, fixed_loss, summary
from adalfl_lite.losses.network import LossNetwork
from adalfl_lite.losses.newton import NewtonLoss
from adalfl_lite.losses.symbolic import LOCAL_STEPS, SymbolicLoss, points_downhill, search_symbolic
from adalfl_lite.losses.task import KINDS, Loss, task_loss
from adalfl_lite.losses.taylor import search_taylor
from adalfl_lite.train.checkpoint import describe_data
from adalfl_lite.train.evaluation import evaluate
from adalfl_lite.train.loop import Callback, fit

TUNING_FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""A tuned method tries the task's learning rate times each of these."""

INITIALISATION_SEED = 10_000
INITIALISATION_STEPS = 2500
MAX_REHEARSAL_STEPS = 1000
ONLINE_META_LEARNING_RATE = {"classification": 1e-4, "regression": 1e-3}
FULL_RATE_STEPS = 3000
"""Over longer trainings than this, online adapts its loss more slowly, see :func:`online_meta_learning_rate`."""
SEARCH_STEPS = 200
"""taylorglo and evomal score a loss by a training of this many steps, or of the task's own where that is shorter."""
SEARCH_BUDGET: dict[str, dict[str, int]] = {"taylorglo": {}, "evomal": {}}
"""Generations and population, where they are not the defaults of the search."""
SEARCH_LIBRARY = {"taylorglo": "cma", "evomal": "deap"}
"""What searches; comes with ``pip install 'adalfl-lite[methods]'``."""
SCHEDULE_ROWS = 2000
"""rate-replay measures the implied schedule on so many training rows at most."""
DYNAMICAL_AMPLITUDE, DYNAMICAL_CYCLES = 10.0, 10


@dataclass(frozen=True)
class Method:
    """How a loss is had and used."""

    loss: str  # "task"; learned: "adalfl", "ml3", "taylorglo", "evomal"; or the name of a handcrafted one
    about: str
    online: bool = False
    meta_batches: str = "valid"
    imitation_steps: int = 800
    rollout_steps: int = 20
    tuned: bool = False
    train_on_valid: bool = False
    long: bool = False
    learned_rate: bool = False
    replays: str | None = None
    kinds: tuple[str, ...] = KINDS


LEARNED_LOSSES = ("adalfl", "ml3", "taylorglo", "evomal")
CLASSIFICATION = ("classification",)

METHODS = {
    "handcrafted": Method("task", "the task loss: cross-entropy, or squared error"),
    "ml3": Method(
        "ml3",
        "an ML³ loss network (ReLU, Softplus), meta-learned offline one step at a time; the best of eight is kept",
        imitation_steps=0,
        rollout_steps=1,
    ),
    "offline": Method("adalfl", "AdaLFL's loss network, meta-learned offline (Algorithm 1), then frozen"),
    "online": Method("adalfl", "the same, adapted after every step on validation data (Algorithm 2)", online=True),
    "online-train": Method(
        "adalfl", "the same, with meta batches from the train split only", online=True, meta_batches="train"
    ),
    "handcrafted-tuned": Method(
        "task", "the task loss, its learning rate the one of seven with the lowest validation error", tuned=True
    ),
    "handcrafted-all": Method("task", "the task loss, trained on the train and the valid split", train_on_valid=True),
    "handcrafted-long": Method(
        "task", "the task loss, for as many steps as online costs with its initialisation", long=True
    ),
    "rate-offline": Method(
        "task", "the task loss, its learning rate meta-learned offline (Algorithm 3), then frozen", learned_rate=True
    ),
    "rate-online": Method(
        "task", "the same, adapted after every step on validation data (Algorithm 4)", learned_rate=True, online=True
    ),
    "rate-replay": Method("task", "the task loss under the schedule that online implied", replays="online"),
    "label-smoothing-tuned": Method(
        "label-smoothing", "label smoothing (.1), its learning rate tuned alike", tuned=True, kinds=CLASSIFICATION
    ),
    **{name: Method(name, summary(loss), kinds=kinds) for name, (loss, kinds) in FIXED.items()},
    "dynamical": Method(
        "dynamical", "cross-entropy whose class weights rise and fall in turn, ten times each", kinds=CLASSIFICATION
    ),
    "newton-hessian": Method("newton-hessian", "the task loss with a Newton step in output space (Hessian)"),
    "newton-fisher": Method("newton-fisher", "the same with the empirical Fisher matrix"),
    "taylorglo": Method("taylorglo", "a polynomial whose coefficients CMA-ES finds, by short trainings"),
    "evomal": Method("evomal", "an expression found by genetic programming, its weights by gradient"),
}
"""Every method by its name."""

MAIN_METHODS = ("handcrafted", "ml3", "offline", "online")


def get_method(name: str) -> Method:
    """The method of that name; ``ValueError`` listing the known ones if there is none."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]


def check_applies(method: str, task: Task) -> None:
    """Raise ``ValueError`` unless ``method`` is known, installed, and made for the kind of ``task``."""
    kinds = get_method(method).kinds
    if task.kind not in kinds:
        raise ValueError(f"method {method!r} is for {' and '.join(kinds)}, task {task.name!r} is {task.kind}")
    if (library := SEARCH_LIBRARY.get(method)) and importlib.util.find_spec(library) is None:
        raise ValueError(f"method {method!r} needs {library}, which is not here; pip install 'adalfl-lite[methods]'")


def training_steps(task: Task, method: str) -> int:
    """How long a method trains on a task.

    That is as long as the task says, but for a method that gets the compute of *online*, counted as in the chapter on
    cost: a meta step is three plain steps, a step of a rehearsal one.
    """
    if not get_method(method).long:
        return task.steps
    options = initialisation_options(task, get_method("online"))
    rehearsals = 1 + inspect.signature(initialise).parameters["rehearsals"].default  # one of the imitation
    return 3 * (options["steps"] + task.steps) + rehearsals * options["rehearsal_steps"]


@dataclass(frozen=True)
class Prepared:
    """What a method trains with."""

    loss: Loss
    task: Task
    """With the learning rate that was tuned or learned."""
    data: Dataset
    schedule: tuple[list[int], list[float]] | None
    """Steps, and by what to multiply the learning rate there."""
    steps: int
    """Meta steps taken, or losses tried."""
    chosen_step: int
    seconds: float
    """Of everything before the training."""


def prepare(
    task: Task,
    data: Dataset,
    method: str,
    seed: int,
    *,
    device: str = "cpu",
    shared: dict | None = None,
    progress: bool = False,
) -> Prepared:
    """Everything a method does before it trains: tune, search or meta-learn, on the train and the valid split.

    ``shared`` keeps initialised losses between calls, by all that they depend on, :func:`initialisation_key`.
    """
    how, shared, started = get_method(method), {} if shared is None else shared, time.perf_counter()
    if how.long:
        task = task.with_(steps=training_steps(task, method))
    if how.tuned:
        task = tune_learning_rate(task, data, seed, handcrafted_loss(how.loss, task, data), device)
    if how.train_on_valid:
        data = replace(data, train=_joined(data.train, data.valid))
    if how.replays:
        replayed = prepare(task, data, how.replays, seed, device=device, shared=shared, progress=progress)
        started = time.perf_counter()
        schedule = implied_schedule(replayed, how.replays, seed, device)
        seconds = replayed.seconds + time.perf_counter() - started  # also where the initialisation was shared
        return Prepared(handcrafted_loss(how.loss, task, data), task, data, schedule, 0, 0, seconds)
    if how.loss not in LEARNED_LOSSES and not how.learned_rate:
        loss = handcrafted_loss(how.loss, task, data)
        return Prepared(loss, task, data, None, 0, 0, time.perf_counter() - started)
    key = initialisation_key(task, data, how, seed, device)
    if key not in shared:
        found = initialised(task, data, seed, method=how, device=device, progress=progress)
        shared[key] = *found, time.perf_counter() - started
    learned, *numbers = shared[key]
    if isinstance(learned, LearningRate):
        task = task.with_(learning_rate=learned.rates[0])
        return Prepared(handcrafted_loss(how.loss, task, data), task, data, None, *numbers)
    return Prepared(copy.deepcopy(learned), task, data, None, *numbers)


def initialisation_key(task: Task, data: Dataset, method: Method, seed: int, device: str) -> tuple:
    """All that :func:`initialised` depends on: methods of which it is the same share what they start training with."""
    how = (method.loss, method.learned_rate, method.meta_batches, method.imitation_steps, method.rollout_steps)
    return *how, repr(task), repr(describe_data(data)), seed, str(device)


def train(
    prepared: Prepared,
    method: str,
    seed: int,
    *,
    device: str = "cpu",
    callback: Callback | None = None,
    checkpoint: str | os.PathLike | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """The history of one training with what :func:`prepare` gave; see :func:`~adalfl_lite.train.loop.fit`.

    The loss that is trained with is a copy, so that another training begins with the same; a callback gets it.
    """
    how, task, data = get_method(method), prepared.task, prepared.data
    model, optimizer = fresh(task, data, seed, device)
    scheduler = task.make_scheduler(optimizer)
    if prepared.schedule:
        scheduler = replay(optimizer, *prepared.schedule, task.schedule)
    elif how.learned_rate and how.online:
        scheduler = None  # the learning rate is learned, its drops too
    loss, measured = copy.deepcopy(prepared.loss), task_loss(data.kind)
    learner: Learner
    if how.online and how.learned_rate:
        learner = OnlineLearningRate(model, loss, optimizer, task_loss=measured)
    elif how.online and isinstance(loss, torch.nn.Module):
        eta = online_meta_learning_rate(task)
        learner = OnlineLoss(model, loss, optimizer, meta_learning_rate=eta, task_loss=measured)
    else:
        learner = Plain(model, loss, optimizer)
    return fit(
        learner,
        data,
        steps=task.steps,
        batch_size=task.batch_size,
        scheduler=scheduler,
        augment=task.augmentation,
        seed=seed,
        callback=callback,
        checkpoint=checkpoint,
        progress=progress,
        meta_batches=how.meta_batches if how.online else "valid",
    )


def online_meta_learning_rate(task: Task) -> float:
    """η of Algorithm 2: the kind's, and in a long training less, by as much as the training is longer.

    Adam moves a weight of φ by about η a step, so η times the steps bounds how far online adaptation can take the loss
    from the one that was rehearsed. Each step of it looks one step ahead, and so prefers a loss that takes small steps.
    """
    return ONLINE_META_LEARNING_RATE[task.kind] * min(1.0, FULL_RATE_STEPS / task.steps)


def fresh(task: Task, data: Dataset, seed: int, device: str = "cpu") -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The base model that ``seed`` draws, the same for every method, and its optimizer."""
    torch.manual_seed(seed)
    model = task.make_model(data).to(device)
    return model, task.make_optimizer(model.parameters())


def handcrafted_loss(name: str, task: Task, data: Dataset) -> Loss:
    """The loss of a method that learns none: the task loss ("task"), or another by its name."""
    if name == "dynamical":
        period = max(2, task.steps // (DYNAMICAL_CYCLES * data.outputs))
        return DynamicalLoss(data.outputs, amplitude=DYNAMICAL_AMPLITUDE, period=period)
    if name.startswith("newton-"):
        return NewtonLoss(data.kind, name.removeprefix("newton-"))
    return task_loss(data.kind) if name == "task" else fixed_loss(name)


def initialised(
    task: Task, data: Dataset, seed: int, *, method: Method, device: str = "cpu", progress: bool = False
) -> tuple[torch.nn.Module, int, int]:
    """What a method starts training with, by Algorithm 1 or 3 or a search, on ``data`` with the task's optimizer.

    Returns:
        The loss or the learning rate, the meta steps taken or losses tried, and the step that was chosen (0: a search).
    """
    torch.manual_seed(INITIALISATION_SEED + seed)
    batches, meta_batches, validate = streams(task, data, seed, method, device)

    def make_model() -> torch.nn.Module:
        return task.make_model(data).to(device)

    if method.loss in SEARCH_BUDGET:
        arguments = (make_model, batches, meta_batches, validate, device)
        return _searched(method.loss, task, data.kind, data.outputs, seed, *arguments)
    options = initialisation_options(task, method) | {"validate": validate, "progress": progress}
    learned: torch.nn.Module
    if method.learned_rate:
        learned = LearningRate([task.learning_rate])
        outcome = initialise_learning_rate(learned, make_model, batches, meta_batches, kind=data.kind, **options)
    else:
        learned = loss_network(method, data.kind).to(device)
        options["imitation_steps"] = method.imitation_steps
        outcome = initialise(learned, make_model, batches, meta_batches, **options)
    return learned, outcome.steps, outcome.chosen_step


def streams(
    task: Task, data: Dataset, seed: int, method: Method, device: str
) -> tuple[Iterator[Batch], Iterator[Batch], Validate]:
    """What Algorithms 1 and 3 learn from: training batches, meta batches, and how to score a model."""
    train, meta = data.train.to(device), getattr(data, method.meta_batches).to(device)
    batches = train.batches(task.batch_size, seed=20_000 + seed)
    meta_batches = meta.batches(min(task.batch_size, len(meta)), seed=30_000 + seed)
    if augment := task.augmentation:
        batches = ((augment(inputs), targets) for inputs, targets in batches)
        if method.meta_batches == "train":  # as fit does
            meta_batches = ((augment(inputs), targets) for inputs, targets in meta_batches)
    return batches, meta_batches, lambda model: evaluate(model, meta, data.kind)


def initialisation_options(task: Task, method: Method) -> dict[str, Any]:
    """What they are called with."""
    return {
        "make_optimizer": task.make_optimizer,
        "steps": INITIALISATION_STEPS,
        "rollout_steps": method.rollout_steps,
        "rehearsal_steps": min(task.steps, MAX_REHEARSAL_STEPS),
    }


def loss_network(method: Method, kind: str) -> LossNetwork:
    """A fresh M_φ."""
    return LossNetwork.ml3(kind) if method.loss == "ml3" else LossNetwork.default(kind)


def _searched(
    name: str,
    task: Task,
    kind: str,
    outputs: int,
    seed: int,
    make_model: MakeModel,
    batches: Iterator[Batch],
    meta_batches: Iterator[Batch],
    validate: Validate,
    device: str,
) -> tuple[torch.nn.Module, int, int]:
    """taylorglo and evomal: the loss found, and how many were tried."""
    tried = 0

    def score(loss: torch.nn.Module) -> float:
        nonlocal tried
        tried += 1
        steps = min(task.steps, SEARCH_STEPS)
        return rehearsal(loss.to(device), make_model, task.make_optimizer, batches, steps, validate)[0]

    def local_search(loss: SymbolicLoss) -> None:
        meta_optimizer = torch.optim.Adam(loss.to(device).parameters(), lr=1e-3)

        def draw() -> OnlineLoss:
            model = make_model().train()
            optimizer = task.make_optimizer(model.parameters())
            return OnlineLoss(model, loss, optimizer, meta_optimizer=meta_optimizer, task_loss=task_loss(kind))

        options: dict[str, Any] = {"steps": LOCAL_STEPS, "rollout_steps": 1, "rehearsals": 0, "rehearse_first": False}
        meta_learn(loss, draw, lambda: (math.inf, math.inf), batches, meta_batches, **options)

    budget = SEARCH_BUDGET[name]
    if name == "taylorglo":
        return search_taylor(kind, score, seed=seed, **budget), tried, 0

    def accept(loss: SymbolicLoss) -> bool:
        return points_downhill(loss, task_loss(kind), outputs)

    return search_symbolic(kind, score, local_search, accept=accept, seed=seed, **budget), tried, 0


def implied_schedule(prepared: Prepared, method: str, seed: int, device: str) -> tuple[list[int], list[float]]:
    """Steps, and the multiplier c of the learning rate that a method's loss implied there on its training rows."""
    batch = prepared.data.train.to(device)[:SCHEDULE_ROWS]
    plain = task_loss(prepared.data.kind)
    steps: list[int] = []
    multipliers: list[float] = []

    def record(step: int, model: torch.nn.Module, loss: Loss) -> None:
        multiplier = implied_scale(model, loss, plain, batch)
        if math.isfinite(multiplier):  # else the task loss has no gradient left to multiply
            steps.append(step)
            multipliers.append(multiplier)

    train(prepared, method, seed, device=device, callback=record)
    return steps, multipliers


def tune_learning_rate(task: Task, data: Dataset, seed: int, loss: Loss, device: str = "cpu") -> Task:
    """The task with the learning rate whose full run with ``loss`` ends with the lowest validation error."""
    scores = []
    for factor in TUNING_FACTORS:
        candidate = task.with_(learning_rate=task.learning_rate * factor)
        model, optimizer = fresh(candidate, data, seed, device)
        try:
            fit(
                Plain(model, copy.deepcopy(loss), optimizer),  # each run begins with the same
                data,
                steps=task.steps,
                batch_size=task.batch_size,
                scheduler=candidate.make_scheduler(optimizer),
                augment=task.augmentation,
                seed=seed,
                evaluate_every=task.steps,
                progress=False,
            )
        except FloatingPointError:
            continue
        error, level = evaluate(model, data.valid.to(device), data.kind)
        if math.isfinite(error) and math.isfinite(level):
            scores.append((error, level, candidate))
    if not scores:
        raise FloatingPointError(f"{task.name} diverged with every learning rate; lower the task's own")
    return min(scores, key=lambda score: score[:2])[2]


def _joined(first: Split, second: Split) -> Split:
    joined = {
        name: torch.cat([getattr(first, name), getattr(second, name)]) for name in ("inputs", "targets", "indices")
    }
    return replace(first, **joined)
