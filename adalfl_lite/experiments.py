"""Methods compared on tasks over seeds. A job is one (task, seed), or all seeds of a task; each run has its own file.

What the methods are is told in :mod:`adalfl_lite.methods`. Jobs run through joblib, which can move them to a cluster
(``pip install 'adalfl-lite[cluster]'``); where a worker dies, its jobs are done again::

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
import platform
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from adalfl_lite.checkpoint import without_addresses
from adalfl_lite.files import atomic_path
from adalfl_lite.methods import (
    MAIN_METHODS,
    METHODS,
    Prepared,
    check_applies,
    fresh,
    prepare,
    train,
    training_steps,
)
from adalfl_lite.tasks import Task, get_task
from adalfl_lite.together import prepare_together, runs_together, train_together
from adalfl_lite.training import Callback

__all__ = [
    "MAIN_METHODS",
    "METHODS",
    "compare",
    "final_errors",
    "fresh",
    "provenance",
    "read_results",
    "run",
    "run_together",
    "write_results",
]


def compare(
    tasks: Sequence[str | Task],
    methods: Sequence[str] = MAIN_METHODS,
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
        tasks: names from :data:`~adalfl_lite.tasks.TASKS`, or tasks of your own.
        methods: names from :data:`~adalfl_lite.methods.METHODS`.
        seeds: each seeds the split, the base model, the loss network and the batches of its jobs.
        folder: where each finished job is stored; a rerun skips the jobs it finds there.
        root: data folder, see :func:`~adalfl_lite.data.load_dataset`.
        device: where to train.
        jobs: processes; more than one uses the active joblib backend.
        together: make all seeds of a task one job, and one program where a method allows
            (:mod:`adalfl_lite.together`): much faster for small models, the same to rounding. Seconds are then equal
            shares of the program's. If one seed diverges, the method's seeds are run one by one.
        progress: show a bar over jobs and, of one process, below it the steps of what runs.

    Returns:
        The rows of :func:`~adalfl_lite.training.fit` with columns task, method, seed, initialisation_steps,
        initialisation_chosen_step, initialisation_seconds, seeds_together (how many shared the program), settings (of
        the task, as JSON) and what :func:`provenance` gives. A run that diverged is one row at its last step with
        infinite errors.

    Raises:
        ValueError: an unknown task or method, a method that is not for a task's kind, something twice, or nothing to
            run, before any job starts; ``folder`` holds a job of the same name with other settings of the task; or
            ``together``, and the task's model cannot be stacked.
    """
    chosen = [get_task(task) if isinstance(task, str) else task for task in tasks]
    for name, values in (("tasks", [task.name for task in chosen]), ("methods", methods), ("seeds", seeds)):
        if not len(values):
            raise ValueError(f"nothing to compare: {name} is empty")
        if twice := [value for i, value in enumerate(values) if value in values[:i]]:
            remedy = "; name a changed task anew, task.with_(name=...)" if name == "tasks" else ""
            raise ValueError(f"{name} hold {twice[0]!r} twice{remedy}")
    for task in chosen:
        for method in methods:
            check_applies(method, task)
    groups = [list(seeds)] if together else [[seed] for seed in seeds]
    grid = [(task, group) for task in chosen for group in groups]
    job = partial(
        _run_methods, methods=methods, folder=folder, root=root, device=device, progress=progress and jobs == 1
    )
    with tqdm(grid, desc="jobs", disable=not progress) as points:  # as jobs are handed out: not all backends stream
        results = joblib.Parallel(n_jobs=jobs)(joblib.delayed(job)(*point) for point in points)
    return pd.concat([frame for frames in results for frame in frames], ignore_index=True)


def _run_methods(
    task: Task,
    seeds: Sequence[int],
    *,
    methods: Sequence[str],
    folder: str | os.PathLike | None,
    root: str | None,
    device: str,
    progress: bool,
) -> list[pd.DataFrame]:
    """One job. Methods that start from the same learned loss share its initialisation."""
    frames: list[pd.DataFrame] = []
    options: dict[str, Any] = {"root": root, "device": device, "progress": progress}
    shared: dict[int, dict] = {seed: {} for seed in seeds}
    for method in methods:
        paths = {} if folder is None else {seed: job_path(folder, task.name, method, seed) for seed in seeds}
        done = [seed for seed in paths if paths[seed].exists()]
        frames += [_stored(paths[seed], task, method) for seed in done]
        left = [seed for seed in seeds if seed not in done]
        found: list[pd.DataFrame] = []
        if len(left) > 1 and runs_together(method, task):
            with suppress(FloatingPointError):
                found = run_together(task, method, left, shared=shared, **options)
        for i, seed in enumerate(left):
            if found:
                result = found[i]
            else:
                result = _run_or_diverge(task, method, seed, shared=shared[seed], **options)
            if seed in paths:
                write_results(result, paths[seed])
            frames.append(result)
    return frames


def job_path(folder: str | os.PathLike, task: str, method: str, seed: int) -> Path:
    """Where :func:`compare` stores a finished job, and looks for one."""
    return Path(folder) / f"{task}--{method}--seed{seed}.parquet"


def _settings(task: Task) -> str:
    """As JSON, those of a subclass included."""
    found = {field.name: getattr(task, field.name) for field in fields(task) if field.name != "name"}
    return json.dumps(found, default=lambda value: without_addresses(repr(value)))


def _stored(path: Path, task: Task, method: str) -> pd.DataFrame:
    """A finished job, if it is of this very task."""
    stored, steps = read_results(path), training_steps(task, method)
    different = {} if stored.step.max() == steps else {"steps": (stored.step.max(), steps)}
    if "settings" in stored and isinstance(text := stored.settings.iloc[0], str):
        found, wanted = json.loads(text), json.loads(_settings(task))
        kept = [name for name in wanted if name in found or name in Task.__dataclass_fields__]
        different |= {name: (found.get(name), wanted[name]) for name in kept if found.get(name) != wanted[name]}
    if different:
        changes = ", ".join(f"{name} {before}, not {now}" for name, (before, now) in different.items())
        raise ValueError(f"{path} is of a task with {changes}; give another folder, or delete that file")
    return stored


def _run_or_diverge(task: Task, method: str, seed: int, *, device: str, **options: Any) -> pd.DataFrame:
    """The history; of a run that diverged one row, at its last step."""
    try:
        return run(task, method, seed, device=device, **options)
    except FloatingPointError:
        labels = {"task": task.name, "method": method, "seed": seed, "step": training_steps(task, method)}
        errors = {"test_error": math.inf, "valid_error": math.inf}
        return pd.DataFrame([{**labels, **errors, "settings": _settings(task), **provenance(device)}])


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
    data = task.load(root=root, seed=seed)
    prepared = prepare(task, data, method, seed, device=device, shared=shared, progress=progress)
    options: dict[str, Any] = {"callback": callback, "checkpoint": checkpoint, "progress": progress}
    history = train(prepared, method, seed, device=device, **options)
    return _labelled(history, task, prepared, method, seed, device, 1)


def run_together(
    task: Task,
    method: str,
    seeds: Sequence[int],
    *,
    root: str | None = None,
    device: str = "cpu",
    shared: dict[int, dict] | None = None,
    progress: bool = False,
) -> list[pd.DataFrame]:
    """:func:`run` for several seeds as one program; ``shared`` has a dictionary for every seed."""
    datasets = [task.load(root=root, seed=seed) for seed in seeds]
    shared = {seed: {} for seed in seeds} if shared is None else shared
    prepared = prepare_together(task, datasets, method, seeds, device=device, shared=shared, progress=progress)
    histories = train_together(prepared, method, seeds, device=device, progress=progress)
    return [
        _labelled(histories[histories.seed == seed].drop(columns="seed"), task, one, method, seed, device, len(seeds))
        for seed, one in zip(seeds, prepared, strict=True)
    ]


def _labelled(
    history: pd.DataFrame, task: Task, prepared: Prepared, method: str, seed: int, device: str, together: int
) -> pd.DataFrame:
    return history.assign(
        task=task.name,
        method=method,
        seed=seed,
        initialisation_steps=prepared.steps,
        initialisation_chosen_step=prepared.chosen_step,
        initialisation_seconds=prepared.seconds,
        seeds_together=together,
        settings=_settings(task),
        **provenance(device),
    )


def read_results(path: str | os.PathLike) -> pd.DataFrame:
    """A table that :func:`compare` or the command line stored.

    Raises:
        ValueError: the file is damaged or something else.
    """
    try:
        frame = pd.read_parquet(path, engine="pyarrow", page_checksum_verification=True)
    except Exception as error:  # pyarrow raises many types
        raise ValueError(
            f"{path} cannot be read as results, it is foreign or damaged; give a file that train or compare wrote, or"
            " delete a damaged one"
        ) from error
    if missing := {"task", "method", "seed", "step", "test_error"} - set(frame.columns):
        raise ValueError(
            f"{path} lacks the columns {', '.join(sorted(missing))}; give a file that train or compare wrote, or delete"
            " a damaged one"
        )
    return frame


def write_results(results: pd.DataFrame, path: str | os.PathLike) -> None:
    """Store a table of results, atomically and with checksums."""
    with atomic_path(path) as temporary:
        results.to_parquet(temporary, index=False, engine="pyarrow", write_page_checksum=True)


def final_errors(results: pd.DataFrame) -> pd.DataFrame:
    """The last row of every job: one row per (task, method, seed), with the columns ``diverged`` and ``cost``.

    ``cost`` is in seconds, everything before the training and the training itself, evaluation left out.
    """
    results = results.reset_index(drop=True)
    last = results.groupby(["task", "method", "seed"], sort=False)["step"].idxmax()
    found = results.loc[last].assign(diverged=lambda rows: ~np.isfinite(rows.test_error)).reset_index(drop=True)
    if {"initialisation_seconds", "seconds"} <= set(found):
        found["cost"] = found.initialisation_seconds + found.seconds
    return found


@cache
def provenance(device: str = "cpu") -> dict[str, str]:
    """What a result depends on: versions, the processor, and the commit of a checkout when this process first asked.

    The commit ends in "-dirty" where a tracked file of the checkout differed from it.
    """
    name = torch.cuda.get_device_name(device) if str(device).startswith("cuda") else _processor()
    versions = {"torch": torch.__version__, "python": platform.python_version(), "commit": _commit() or "unknown"}
    return {"device": name, **versions}


def _processor() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "cpu"


def _commit() -> str:
    """Of the checkout that holds this very file; nothing where there is none, or no git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()  # noqa: S603 -- no user's words

    try:
        return git("ls-files", Path(__file__).name) and git("describe", "--always", "--dirty", "--exclude", "*")
    except OSError:
        return ""
