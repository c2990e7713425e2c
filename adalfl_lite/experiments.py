"""Methods compared on tasks over seeds. A job is one (task, seed); every method's run in it is stored in its own file.

The four methods of the paper's comparison, and the controls that make it fair:

======================  ===========================================================================================
handcrafted             the task loss: cross-entropy, or squared error
ml3                     an ML³ loss network (ReLU, Softplus), meta-learned offline one step at a time, then frozen
offline                 AdaLFL's loss network, meta-learned offline (Algorithm 1 with our defaults), then frozen
online                  the same, adapted after every step on validation data (Algorithm 2)
online-train            the same with meta batches from the train split only, in both phases
handcrafted-tuned       the task loss with the learning rate that has the lowest validation error of five
handcrafted-all         the task loss, trained on the train and the valid split together
rate-offline            the task loss with a learning rate that is meta-learned offline (Algorithm 3), then frozen
rate-online             the same, adapted after every step on validation data (Algorithm 4)
rate-replay             the task loss under the learning-rate schedule that *online* implied with the same seed
label-smoothing, ...    the losses of :mod:`adalfl_lite.baselines.fixed`, by their names there
dynamical               cross-entropy with class weights that rise and fall in turn, ten times for each class
newton-hessian          the task loss with a Newton step in output space (Hessian)
newton-fisher           the same with the empirical Fisher matrix
taylorglo               a polynomial loss whose coefficients CMA-ES finds, by validation error after short trainings
evomal                  an expression found by genetic programming, its weights meta-learned by gradient
======================  ===========================================================================================

Jobs run through joblib, so ``joblib.parallel_config(backend="dask")`` or ``"ray"`` moves them to a cluster.
"""

from __future__ import annotations

import copy
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from adalfl_lite.baselines import (
    FIXED,
    DynamicalLoss,
    NewtonLoss,
    SymbolicLoss,
    fixed_loss,
    search_symbolic,
    search_taylor,
)
from adalfl_lite.baselines.evomal import LOCAL_STEPS
from adalfl_lite.data import Dataset, Split, dataset_kind
from adalfl_lite.files import atomic_path
from adalfl_lite.initialisation import MakeModel, Validate, initialise, meta_learn, rehearsal
from adalfl_lite.learning_rate import LearningRate, implied_multiplier, initialise_learning_rate, replay
from adalfl_lite.losses import KINDS, Loss, LossNetwork, task_loss
from adalfl_lite.metagradient import Batch
from adalfl_lite.online import OnlineLoss
from adalfl_lite.tasks import Task, get_task
from adalfl_lite.training import Callback, evaluate, fit

TUNING_FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""handcrafted-tuned tries the task's learning rate times each of these."""

INITIALISATION_STEPS = 2500
MAX_REHEARSAL_STEPS = 1000
ONLINE_META_LEARNING_RATE = {"classification": 1e-4, "regression": 1e-3}
SEARCH_STEPS = 200
"""taylorglo and evomal score a loss by a training of this many steps, or of the task's own where that is shorter."""
SEARCH_BUDGET: dict[str, dict[str, int]] = {"taylorglo": {}, "evomal": {}}
"""Generations and population, where they are not the defaults of the search."""
SCHEDULE_ROWS = 2000
"""rate-replay measures the implied schedule on so many training rows at most."""
DYNAMICAL_AMPLITUDE, DYNAMICAL_CYCLES = 10.0, 10


@dataclass(frozen=True)
class Method:
    """How a loss is had and used."""

    loss: str  # "task"; learned: "adalfl", "ml3", "taylorglo", "evomal"; or the name of a handcrafted one
    online: bool = False
    meta_batches: str = "valid"
    imitation_steps: int = 800
    rollout_steps: int = 20
    tuned: bool = False
    train_on_valid: bool = False
    learned_rate: bool = False
    replays: str | None = None
    kinds: tuple[str, ...] = KINDS


LEARNED_LOSSES = ("adalfl", "ml3", "taylorglo", "evomal")
CLASSIFICATION = ("classification",)

METHODS = {
    "handcrafted": Method("task"),
    "ml3": Method("ml3", imitation_steps=0, rollout_steps=1),
    "offline": Method("adalfl"),
    "online": Method("adalfl", online=True),
    "online-train": Method("adalfl", online=True, meta_batches="train"),
    "handcrafted-tuned": Method("task", tuned=True),
    "handcrafted-all": Method("task", train_on_valid=True),
    "rate-offline": Method("task", learned_rate=True),
    "rate-online": Method("task", learned_rate=True, online=True),
    "rate-replay": Method("task", replays="online"),
    **{name: Method(name, kinds=kinds) for name, (_, kinds) in FIXED.items()},
    "dynamical": Method("dynamical", kinds=CLASSIFICATION),
    "newton-hessian": Method("newton-hessian"),
    "newton-fisher": Method("newton-fisher"),
    "taylorglo": Method("taylorglo"),
    "evomal": Method("evomal"),
}
MAIN_METHODS = ("handcrafted", "ml3", "offline", "online")


def get_method(name: str) -> Method:
    """The method of that name; ``ValueError`` listing the known ones if there is none."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known methods: {', '.join(METHODS)}")
    return METHODS[name]


def check_applies(method: str, task: Task) -> None:
    """Raise ``ValueError`` unless ``method`` is known and made for the kind of ``task``."""
    kinds, kind = get_method(method).kinds, dataset_kind(task.dataset)
    if kind not in kinds:
        raise ValueError(f"method {method!r} is for {' and '.join(kinds)}, task {task.name!r} is {kind}")


def compare(
    tasks: Sequence[str | Task],
    methods: Sequence[str] = MAIN_METHODS,
    seeds: Sequence[int] = range(10),
    *,
    folder: str | os.PathLike | None = None,
    root: str | None = None,
    device: str = "cpu",
    jobs: int = 1,
    progress: bool = True,
) -> pd.DataFrame:
    """Run every method on every task with every seed; a tidy table of their histories.

    Args:
        tasks: names from :data:`~adalfl_lite.tasks.TASKS`, or tasks of your own.
        methods: names from :data:`METHODS`.
        seeds: each seeds the split, the base model, the loss network and the batches of its jobs.
        folder: where each finished job is stored; a rerun skips the jobs it finds there.
        root: data folder, see :func:`~adalfl_lite.data.load_dataset`.
        device: where to train.
        jobs: processes; more than one uses the active joblib backend.
        progress: show a bar over jobs.

    Returns:
        The rows of :func:`~adalfl_lite.training.fit` with columns task, method, seed, initialisation_steps,
        initialisation_chosen_step, initialisation_seconds and the provenance of :func:`provenance`. A run that diverged
        is one row at its last step with infinite errors.

    Raises:
        ValueError: an unknown task or method, a method that is not for a task's kind, or nothing to run, before any
            job starts; or ``folder`` holds a job of
            the same name with another number of steps.
    """
    chosen = [get_task(task) if isinstance(task, str) else task for task in tasks]
    for name, values in (("tasks", chosen), ("methods", methods), ("seeds", seeds)):
        if not len(values):
            raise ValueError(f"nothing to compare: {name} is empty")
    for task in chosen:
        for method in methods:
            check_applies(method, task)
    grid = [(task, seed) for task in chosen for seed in seeds]
    job = partial(_run_methods, methods=methods, folder=folder, root=root, device=device)
    with tqdm(grid, desc="jobs", disable=not progress) as points:  # as jobs are handed out: not all backends stream
        results = joblib.Parallel(n_jobs=jobs)(joblib.delayed(job)(*point) for point in points)
    return pd.concat([frame for frames in results for frame in frames], ignore_index=True)


def _run_methods(
    task: Task,
    seed: int,
    *,
    methods: Sequence[str],
    folder: str | os.PathLike | None,
    root: str | None,
    device: str,
) -> list[pd.DataFrame]:
    """One job. Methods that start from the same learned loss share its initialisation."""
    frames: list[pd.DataFrame] = []
    shared: dict = {}
    for method in methods:
        path = None if folder is None else Path(folder) / f"{task.name}--{method}--seed{seed}.parquet"
        if path is not None and path.exists():
            stored = read_results(path)
            if stored.step.max() != task.steps:
                raise ValueError(f"{path} has {stored.step.max()} steps, not {task.steps}; use another folder")
            frames.append(stored)
            continue
        try:
            result = run(task, method, seed, root=root, device=device, shared=shared)
        except FloatingPointError:
            labels = {"task": task.name, "method": method, "seed": seed, "step": task.steps}
            result = pd.DataFrame([{**labels, "test_error": math.inf, "valid_error": math.inf, **provenance(device)}])
        if path is not None:
            write_results(result, path)
        frames.append(result)
    return frames


def run(
    task: Task,
    method: str,
    seed: int,
    *,
    root: str | None = None,
    device: str = "cpu",
    callback: Callback | None = None,
    checkpoint: str | os.PathLike | None = None,
    shared: dict | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Meta-learn the loss if the method has one, train, and return the history with its labels.

    ``shared`` keeps initialised losses between calls for the same task and seed: pass one dictionary to all of them.
    The other arguments are those of :func:`compare` and :func:`~adalfl_lite.training.fit`.
    """
    how = get_method(method)
    data = task.load(root=root, seed=seed)
    started = time.perf_counter()
    shared = {} if shared is None else shared
    loss: Any = None
    initialisation_steps = chosen_step = 0
    schedule = None
    if how.tuned:
        task = tune_learning_rate(task, data, seed, device)
    if how.train_on_valid:
        data = replace(data, train=_joined(data.train, data.valid))
    if how.replays:
        schedule = implied_schedule(task, data, seed, method=how.replays, root=root, device=device, shared=shared)
    initialisation_seconds = time.perf_counter() - started
    if how.loss in LEARNED_LOSSES or how.learned_rate:
        key = (how.loss, how.learned_rate, how.meta_batches)
        if key not in shared:
            found = initialised(task, data, seed, method=how, device=device, progress=progress)
            shared[key] = *found, time.perf_counter() - started
        learned, initialisation_steps, chosen_step, initialisation_seconds = shared[key]
        if isinstance(learned, LearningRate):
            task = task.with_(learning_rate=learned.rates[0])
        else:
            loss = copy.deepcopy(learned)
    loss = loss or handcrafted_loss(how.loss, task, data)
    model, optimizer = fresh(task, data, seed, device)
    scheduler = task.make_scheduler(optimizer)
    if schedule:
        scheduler = replay(optimizer, *schedule, task.schedule)
    elif how.learned_rate and how.online:
        scheduler = None  # the learning rate is learned, its drops too
    history = fit(
        model,
        loss,
        data,
        optimizer=optimizer,
        steps=task.steps,
        batch_size=task.batch_size,
        online=how.online,
        learn="learning_rate" if how.learned_rate else "loss",
        meta_learning_rate=None if how.learned_rate else ONLINE_META_LEARNING_RATE[data.kind],
        meta_batches=how.meta_batches,
        scheduler=scheduler,
        seed=seed,
        callback=callback,
        checkpoint=checkpoint,
        progress=progress,
    )
    labels = {
        "task": task.name,
        "method": method,
        "seed": seed,
        "initialisation_steps": initialisation_steps,
        "initialisation_chosen_step": chosen_step,
        "initialisation_seconds": initialisation_seconds,
        **provenance(device),
    }
    return history.assign(**labels)


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
    return task_loss(data.kind) if name not in FIXED else fixed_loss(name)


def initialised(
    task: Task, data: Dataset, seed: int, *, method: Method, device: str = "cpu", progress: bool = False
) -> tuple[torch.nn.Module, int, int]:
    """What a method starts training with, by Algorithm 1 or 3 or a search, on ``data`` with the task's optimizer.

    Returns:
        The loss or the learning rate, the meta steps taken or losses tried, and the step that was chosen (0: a search).
    """
    torch.manual_seed(10_000 + seed)
    train, meta = data.train.to(device), getattr(data, method.meta_batches).to(device)

    def make_model() -> torch.nn.Module:
        return task.make_model(data).to(device)

    def validate(model: torch.nn.Module) -> tuple[float, float]:
        return evaluate(model, meta, data.kind)

    batches = train.batches(task.batch_size, seed=20_000 + seed)
    meta_batches = meta.batches(min(task.batch_size, len(meta)), seed=30_000 + seed)
    if method.loss in SEARCH_BUDGET:
        return _searched(method.loss, task, data.kind, seed, make_model, batches, meta_batches, validate, device)
    options: dict[str, Any] = {
        "make_optimizer": task.make_optimizer,
        "steps": INITIALISATION_STEPS,
        "rollout_steps": method.rollout_steps,
        "rehearsal_steps": min(task.steps, MAX_REHEARSAL_STEPS),
        "validate": validate,
        "progress": progress,
    }
    learned: torch.nn.Module
    if method.learned_rate:
        learned = LearningRate([task.learning_rate])
        outcome = initialise_learning_rate(learned, make_model, batches, meta_batches, kind=data.kind, **options)
    else:
        learned = (LossNetwork.ml3(data.kind) if method.loss == "ml3" else LossNetwork.default(data.kind)).to(device)
        options["imitation_steps"] = method.imitation_steps
        outcome = initialise(learned, make_model, batches, meta_batches, **options)
    return learned, outcome.steps, outcome.chosen_step


def _searched(
    name: str,
    task: Task,
    kind: str,
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
    return search_symbolic(kind, score, local_search, seed=seed, **budget), tried, 0


def implied_schedule(
    task: Task, data: Dataset, seed: int, *, method: str, root: str | None, device: str, shared: dict
) -> tuple[list[int], list[float]]:
    """Steps, and the multiplier c of the learning rate that a method's loss implied there on its training rows."""
    batch = data.train.to(device)[:SCHEDULE_ROWS]
    steps: list[int] = []
    multipliers: list[float] = []

    def record(step: int, model: torch.nn.Module, loss: Loss) -> None:
        steps.append(step)
        multipliers.append(implied_multiplier(model, loss, task_loss(data.kind), batch))

    run(task, method, seed, root=root, device=device, shared=shared, callback=record)
    return steps, multipliers


def tune_learning_rate(task: Task, data: Dataset, seed: int, device: str = "cpu") -> Task:
    """The task with the learning rate whose full run with the task loss ends with the lowest validation error."""
    scores = []
    for factor in TUNING_FACTORS:
        candidate = task.with_(learning_rate=task.learning_rate * factor)
        model, optimizer = fresh(candidate, data, seed, device)
        try:
            fit(
                model,
                task_loss(data.kind),
                data,
                optimizer=optimizer,
                steps=task.steps,
                batch_size=task.batch_size,
                scheduler=candidate.make_scheduler(optimizer),
                seed=seed,
                evaluate_every=task.steps,
                progress=False,
            )
        except FloatingPointError:
            continue
        error, loss = evaluate(model, data.valid.to(device), data.kind)
        if math.isfinite(error) and math.isfinite(loss):
            scores.append((error, loss, candidate))
    if not scores:
        raise FloatingPointError(f"{task.name} diverged with every learning rate; lower the task's own")
    return min(scores, key=lambda score: score[:2])[2]


def read_results(path: str | os.PathLike) -> pd.DataFrame:
    """A table that :func:`compare` or the command line stored.

    Raises:
        ValueError: the file is damaged or something else.
    """
    try:
        frame = pd.read_parquet(path, engine="pyarrow", page_checksum_verification=True)
    except Exception as error:  # pyarrow raises many types
        raise ValueError(
            f"{path} cannot be read as results, it is damaged or foreign; delete it, or give a file that train or"
            " compare wrote"
        ) from error
    if missing := {"task", "method", "seed", "step", "test_error"} - set(frame.columns):
        raise ValueError(
            f"{path} lacks the columns {', '.join(sorted(missing))}; delete it, or give a file that train or compare"
            " wrote"
        )
    return frame


def write_results(results: pd.DataFrame, path: str | os.PathLike) -> None:
    """Store a table of results, atomically and with checksums."""
    with atomic_path(path) as temporary:
        results.to_parquet(temporary, index=False, engine="pyarrow", write_page_checksum=True)


def final_errors(results: pd.DataFrame) -> pd.DataFrame:
    """The last row of every job: one row per (task, method, seed), with a column ``diverged``."""
    results = results.reset_index(drop=True)
    last = results.groupby(["task", "method", "seed"], sort=False)["step"].idxmax()
    return results.loc[last].assign(diverged=lambda rows: ~np.isfinite(rows.test_error)).reset_index(drop=True)


@cache
def provenance(device: str = "cpu") -> dict[str, str]:
    """What a result depends on: versions, device, and the commit (of a checkout) when this process first asked."""
    name = torch.cuda.get_device_name(device) if str(device).startswith("cuda") else platform.processor() or "cpu"
    here = Path(__file__).parent
    git = subprocess.run(["git", "-C", str(here), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    commit = git.stdout.strip() or "unknown"
    return {"device": name, "torch": torch.__version__, "python": platform.python_version(), "commit": commit}


def _joined(first: Split, second: Split) -> Split:
    joined = {
        name: torch.cat([getattr(first, name), getattr(second, name)]) for name in ("inputs", "targets", "indices")
    }
    return replace(first, **joined)
