"""Methods compared on tasks over seeds. A job is one (task, seed), or all seeds of a task; each run has its own file.

What the methods are is told in :mod:`adalfl_lite.compare.methods`. Jobs run through joblib, which can move them to a
cluster (``pip install 'adalfl-lite[cluster]'``); where a worker dies, its jobs are done again::

    client = distributed.Client(address)
    with joblib.parallel_config(backend="dask"):
        compare(tasks, folder=folder, jobs=-1)

    ray.util.joblib.register_ray()  # by itself Ray does not restart a worker
    with joblib.parallel_config(backend="ray", ray_remote_args={"max_restarts": -1, "max_task_retries": -1}):
        compare(tasks, folder=folder, jobs=-1)
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path

import joblib
import pandas as pd
from tqdm import tqdm

from adalfl_lite.checks import is_whole
from adalfl_lite.compare.methods import MAIN_METHODS, Method, check_applies, get_method, named_methods, prepare, train
from adalfl_lite.compare.results import read_results, write_results
from adalfl_lite.compare.tasks import Task, get_task
from adalfl_lite.provenance import identity, provenance, without_addresses
from adalfl_lite.train.loop import Callback


def compare(
    tasks: Sequence[str | Task],
    methods: Sequence[str] | Mapping[str, Method] = MAIN_METHODS,
    seeds: Sequence[int] = range(10),
    *,
    folder: str | os.PathLike | None = None,
    root: str | None = None,
    device: str = "cpu",
    jobs: int = 1,
    together: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Run every method on every task with every seed; a tidy table of their histories.

    Args:
        tasks: names from :data:`~adalfl_lite.compare.tasks.TASKS`, or tasks of your own.
        methods: names from :data:`~adalfl_lite.compare.methods.METHODS`, or methods of your own by name.
        seeds: each seeds the split, the base model, the loss network and the batches of its jobs.
        folder: where each finished job is stored; a rerun skips the jobs it finds there.
        root: data folder, see :func:`~adalfl_lite.data.dataset.load_dataset`.
        device: where to train.
        jobs: processes; more than one uses the active joblib backend.
        together: make all seeds of a task one job, and one program where a method allows
            (:class:`~adalfl_lite.learn.Stacked`): much faster for small models. Every step is the same to rounding,
            which thousands of meta steps make larger: a learned loss may end elsewhere, so compare means over seeds.
            Seconds are then equal shares of the program's. If one seed diverges, the method's seeds are run one by one.
        progress: show a bar over jobs and, of one process, below it the steps of what runs.

    Returns:
        The rows of :func:`~adalfl_lite.train.loop.fit` with columns task, method, seed, initialisation_steps,
        initialisation_chosen_step, initialisation_seconds, seeds_together (how many shared the program), settings (of
        the task, as JSON), recipe (of the method, as text) and what :func:`provenance` gives. A run that diverged is
        one row at its last step with infinite errors.

    Raises:
        ValueError: an unknown task or method, a method that is not for a task's kind, something twice, or nothing to
            run, before any job starts; ``folder`` holds a job of the same name with other settings of the task; or
            ``together``, and the task's model cannot be stacked.
    """
    chosen = [get_task(task) if isinstance(task, str) else task for task in tasks]
    if isinstance(methods, str):
        raise TypeError(f"methods must be a list of names, got {methods!r}; use [{methods!r}]")
    names = list(methods)
    if any(not isinstance(name, str) for name in names):
        raise TypeError('methods must be names, or methods of your own by name, such as {"mine": Method(...)}')
    if not isinstance(seeds, Iterable) or not all(map(is_whole, seeds := list(seeds))):
        raise TypeError(f"seeds must be a list of whole numbers, got {seeds!r}; give range(10), or [0]")
    for name, values in (("tasks", [task.name for task in chosen]), ("methods", names), ("seeds", seeds)):
        if not len(values):
            raise ValueError(f"nothing to compare: {name} is empty")
        if twice := [value for i, value in enumerate(values) if value in values[:i]]:
            remedy = "; name a changed task anew, task.with_(name=...)" if name == "tasks" else ""
            raise ValueError(f"{name} hold {twice[0]!r} twice{remedy}")
    hows = named_methods(methods)
    for task in chosen:
        for name, method in hows.items():
            check_applies(name, task, method)
    groups = [list(seeds)] if together else [[seed] for seed in seeds]
    grid = [(task, group) for task in chosen for group in groups]
    job = partial(_run_methods, methods=hows, folder=folder, root=root, device=device, progress=progress and jobs == 1)
    with tqdm(grid, desc="jobs", disable=not progress) as points:  # as jobs are handed out: not all backends stream
        results = joblib.Parallel(n_jobs=jobs)(joblib.delayed(job)(*point) for point in points)
    return pd.concat([frame for frames in results for frame in frames], ignore_index=True)


def _run_methods(
    task: Task,
    seeds: Sequence[int],
    *,
    methods: Mapping[str, Method],
    folder: str | os.PathLike | None,
    root: str | None,
    device: str,
    progress: bool,
) -> list[pd.DataFrame]:
    """One job. Methods that start from the same learned loss share its initialisation."""
    frames: list[pd.DataFrame] = []
    ran = partial(run, root=root, device=device, progress=progress)
    shared: dict[int, dict] = {seed: {} for seed in seeds}
    for name, method in methods.items():
        paths = {} if folder is None else {seed: job_path(folder, task.name, name, seed) for seed in seeds}
        done = [seed for seed in paths if paths[seed].exists()]
        frames += [_stored(paths[seed], task, method) for seed in done]
        left = [seed for seed in seeds if seed not in done]
        results: dict[int, pd.DataFrame] = {}
        if len(left) > 1 and method.stacks(task):
            with suppress(FloatingPointError):  # then one by one, so that only the seed that diverges is lost
                found = ran(task, method, left, name=name, shared=shared)
                results = {seed: rows for seed, rows in found.groupby("seed")}
        for seed in left:
            if seed not in results:
                try:
                    results[seed] = ran(task, method, seed, name=name, shared=shared)
                except FloatingPointError:
                    results[seed] = _diverged(task, method, seed, name, device)
            if seed in paths:
                write_results(results[seed], paths[seed])
            frames.append(results[seed])
    return frames


def job_path(folder: str | os.PathLike, task: str, method: str, seed: int) -> Path:
    """Where :func:`compare` stores a finished job, and looks for one."""
    return Path(folder) / f"{task}--{method}--seed{seed}.parquet"


def _settings(task: Task) -> str:
    """As JSON, with the class, whose methods may be other ones, and the attributes of a subclass."""
    found = {field.name: getattr(task, field.name) for field in fields(task)} | vars(task)
    found.pop("name")
    return json.dumps({**found, "class": identity(type(task))}, default=identity)


def _former_settings(task: Task) -> str:
    """As jobs were stored that tell nothing of the class."""
    found = {field.name: getattr(task, field.name) for field in fields(task) if field.name != "name"}
    return json.dumps(found, default=lambda value: without_addresses(repr(value)))


def _stored(path: Path, task: Task, method: Method) -> pd.DataFrame:
    """A finished job, if it is of this very task and method."""
    stored, steps = read_results(path), method.steps(task)
    different: dict[str, tuple] = {} if stored.step.max() == steps else {"steps": (stored.step.max(), steps)}
    if "settings" in stored and isinstance(text := stored.settings.iloc[0], str):
        found = json.loads(text)
        wanted = json.loads(_settings(task) if "class" in found else _former_settings(task))
        kept = [name for name in wanted if name in found or name in Task.__dataclass_fields__ or "class" in found]
        different |= {name: (found.get(name), wanted[name]) for name in kept if found.get(name) != wanted[name]}
    if "recipe" in stored and isinstance(text := stored.recipe.iloc[0], str) and text != method.recipe:
        different["recipe of the method"] = (text, method.recipe)
    if different:
        changes = ", ".join(f"{name} {before}, not {now}" for name, (before, now) in different.items())
        raise ValueError(f"{path} is of a task with {changes}; give another folder, or delete that file")
    return stored


def _diverged(task: Task, method: Method, seed: int, name: str, device: str) -> pd.DataFrame:
    """The one row of a run that diverged, at the step where it would have ended."""
    labels = {"task": task.name, "method": name, "seed": seed, "step": method.steps(task)}
    errors = {"test_error": math.inf, "valid_error": math.inf}
    settings = {"settings": _settings(task), "recipe": method.recipe}
    return pd.DataFrame([{**labels, **errors, **settings, **provenance(device)}])


def run(
    task: Task,
    method: str | Method,
    seeds: int | Sequence[int],
    *,
    name: str | None = None,
    root: str | None = None,
    device: str = "cpu",
    callback: Callback | None = None,
    checkpoint: str | os.PathLike | None = None,
    shared: Mapping[int, dict] | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Meta-learn the loss if the method has one, train, and return the history with its labels.

    Args:
        task, method: what is compared; a method, or its name in :data:`~adalfl_lite.compare.methods.METHODS`.
        seeds: one seed, or several that are one program; only where :meth:`~adalfl_lite.compare.Method.stacks`.
        name: of the method, in the table; by default the name that was given.
        root, device, progress: those of :func:`compare`.
        callback, checkpoint: those of :func:`~adalfl_lite.train.fit`.
        shared: for each seed a dictionary, which keeps initialised losses between calls for the same task.
    """
    several = [seeds] if not isinstance(seeds, Sequence) else list(seeds)
    how = get_method(method) if isinstance(method, str) else method
    datasets = [task.load(root=root, seed=seed) for seed in several]
    prepared = prepare(task, datasets, how, several, device=device, shared=shared, progress=progress)
    history = train(prepared, how, several, device=device, callback=callback, checkpoint=checkpoint, progress=progress)
    before = pd.DataFrame(
        {
            "seed": several,
            "initialisation_steps": [one.steps for one in prepared],
            "initialisation_chosen_step": [one.chosen_step for one in prepared],
            "initialisation_seconds": [one.seconds for one in prepared],
        }
    )
    return history.merge(before, on="seed", how="left").assign(
        task=task.name,
        method=name or (method if isinstance(method, str) else how.about),
        seeds_together=len(several),
        settings=_settings(task),
        recipe=how.recipe,
        **provenance(device),
    )
