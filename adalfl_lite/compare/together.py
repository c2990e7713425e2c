"""A method with several seeds as one program (:mod:`adalfl_lite.train.seeds`), where method and task allow."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import pandas as pd

from adalfl_lite.compare.methods import (
    INITIALISATION_SEED,
    Prepared,
    fresh,
    get_method,
    initialisation_key,
    initialisation_options,
    loss_network,
    online_meta_learning_rate,
    prepare,
    streams,
)
from adalfl_lite.compare.tasks import Task
from adalfl_lite.data.dataset import Dataset
from adalfl_lite.learn.base import Plain
from adalfl_lite.learn.online import OnlineLoss
from adalfl_lite.learn.stacked import Stacked
from adalfl_lite.train.loop import fit
from adalfl_lite.train.seeds import initialise_seeds

STACKED_LOSSES = ("adalfl", "ml3")


def runs_together(method: str, task: Task) -> bool:
    """Whether seeds of the method can be one program: they share a learning rate, and the loss is M_φ or the task's."""
    how = get_method(method)
    plain = how.loss == "task" and not (how.tuned or how.learned_rate or how.replays)
    learned = how.loss in STACKED_LOSSES and not (how.tuned or how.train_on_valid or how.long or how.replays)
    return (plain or learned) and not (task.augment or task.drops)


def prepare_together(
    task: Task,
    datasets: Sequence[Dataset],
    method: str,
    seeds: Sequence[int],
    *,
    device: str,
    shared: dict[int, dict],
    progress: bool = False,
) -> list[Prepared]:
    """What :func:`~adalfl_lite.compare.methods.prepare` does, for every seed; each counts a share of the seconds.

    ``shared`` keeps initialised losses between calls, by seed.
    """
    how = get_method(method)
    keys = [initialisation_key(task, data, how, seed, device) for data, seed in zip(datasets, seeds, strict=True)]
    given = zip(datasets, seeds, keys, strict=True)
    new = [(data, seed, key) for data, seed, key in given if key not in shared[seed]]
    if how.loss in STACKED_LOSSES and new:
        started, first = time.perf_counter(), datasets[0]
        train, meta, validate = zip(*(streams(task, data, seed, how, device) for data, seed, _ in new), strict=True)
        networks, outcomes = initialise_seeds(
            lambda: loss_network(how, first.kind).to(device),
            lambda: task.make_model(first).to(device),
            train,
            meta,
            seeds=[INITIALISATION_SEED + seed for _, seed, _ in new],
            imitation_steps=how.imitation_steps,
            validate=validate,
            progress=progress,
            **initialisation_options(task, how),
        )
        share = (time.perf_counter() - started) / len(new)
        for (_, seed, key), network, outcome in zip(new, networks, outcomes, strict=True):
            shared[seed][key] = network, outcome.steps, outcome.chosen_step, share
    return [
        prepare(task, data, method, seed, device=device, shared=shared[seed])
        for data, seed in zip(datasets, seeds, strict=True)
    ]


def train_together(
    prepared: Sequence[Prepared],
    method: str,
    seeds: Sequence[int],
    *,
    device: str,
    meta_learning_rate: float | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """What :func:`~adalfl_lite.compare.methods.train` does, for every seed; the histories below each other.

    ``meta_learning_rate`` is that of online adaptation, if not the default.
    """
    how, task = get_method(method), prepared[0].task
    if how.online and meta_learning_rate is None:
        meta_learning_rate = online_meta_learning_rate(task)
    losses = copy.deepcopy([one.loss for one in prepared])
    learners: list[Any] = []
    for one, seed, loss in zip(prepared, seeds, losses, strict=True):
        model, optimizer = fresh(task, one.data, seed, device)
        if how.online:
            learners.append(OnlineLoss(model, loss, optimizer, meta_learning_rate=meta_learning_rate))  # type: ignore[arg-type]
        else:
            learners.append(Plain(model, loss, optimizer))
    history = fit(
        Stacked(learners),
        [one.data for one in prepared],
        seed=list(seeds),
        steps=task.steps,
        batch_size=task.batch_size,
        progress=progress,
        meta_batches=how.meta_batches if how.online else "valid",
    )
    return history.assign(seconds=history.seconds / len(seeds))
