"""Killed at any moment, or out of disk, and started again, a training ends bit for bit where it would have."""

import multiprocessing
import random
import runpy
import shutil
import signal
from pathlib import Path

import pandas as pd
import pytest
import torch

pytest.importorskip("resource", reason="processes are limited and killed as Unix does it")

VICTIM = Path(__file__).with_name("victim.py")
NO_SPACE = 28  # the victim's exit code


@pytest.fixture(scope="module")
def processes():
    """Forked from one that has imported everything already, and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["adalfl_lite.compare.grid", "sklearn.datasets", "torch._dynamo"])
    return context


def live(processes, job, folder, events=None, end="die"):
    """The exit code of a process that does ``job`` until the given event."""
    folder.mkdir(exist_ok=True)
    arguments = {"init_globals": {"ARGUMENTS": (job, str(folder), events, end)}, "run_name": "__main__"}
    process = processes.Process(target=runpy.run_path, args=(str(VICTIM),), kwargs=arguments)
    process.start()
    process.join(1000)  # where all is well it takes seconds
    return process.exitcode


def same(ours, theirs):
    """Equal to the last bit, through dictionaries, lists and tensors; but for the clock."""
    if isinstance(ours, dict):
        keys = ours.keys() - {"seconds"}
        return keys == theirs.keys() - {"seconds"} and all(same(ours[key], theirs[key]) for key in keys)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(ours, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    return ours == theirs or (ours != ours and theirs != theirs)


def result(job, folder):
    """Everything that is left: of a training θ, φ, buffers, optimizers, samplers, random state and history."""
    if job == "sweep":
        paths = [folder / "results.parquet", *sorted((folder / "jobs").glob("*.parquet"))]
        clocks = ["seconds", "initialisation_seconds"]
        return {path.name: pd.read_parquet(path).drop(columns=clocks).to_dict("list") for path in paths}
    return torch.load(folder / "run", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "times", "end"),
    [
        ("online", 12, "die"),
        ("online_adam_restoring", 6, "die"),
        ("learning_rate", 6, "die"),
        ("fixed_with_a_schedule", 6, "die"),
        ("seeds", 6, "die"),
        ("sweep", 8, "die"),
        ("online", 6, "fill_the_disk"),
        ("sweep", 3, "fill_the_disk"),
    ],
)
def test_ended_at_random_moments_and_resumed_it_is_bit_for_bit_the_same(job, times, end, processes, tmp_path, counts):
    assert live(processes, job, tmp_path / "whole") == 0
    events, whole = int((tmp_path / "whole" / "events").read_text()), result(job, tmp_path / "whole")
    moment, ended, resumed = random.Random(job), 0, 0
    while ended < times or not resumed:
        resumed += any((tmp_path / "ended").rglob("[!.]*"))  # from a checkpoint, or beside a finished job
        code = live(processes, job, tmp_path / "ended", moment.randrange(1, events // 3), end)
        if code == 0:  # it was done before its hour came: begin again
            assert same(whole, result(job, tmp_path / "ended"))
            shutil.rmtree(tmp_path / "ended")
            continue
        assert code == (-signal.SIGKILL if end == "die" else NO_SPACE)
        ended += 1
    assert live(processes, job, tmp_path / "ended") == 0
    assert same(whole, result(job, tmp_path / "ended"))
    if job != "sweep":
        models, batches = ("models", "batches 0") if job == "seeds" else ("model", "batches")
        assert {models, "optimizer", batches, batches.replace("batches", "metas"), "random", "history"} <= whole.keys()
        assert not same(whole, {**whole, batches: {**whole[batches], "position": -1}})  # the comparison can fail
    counts["kills survived" if end == "die" else "full disks survived"] += ended
