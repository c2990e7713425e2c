"""Checkpoints: what tells one run from another, and how a run is saved and taken up again."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import Tensor

from adalfl_lite.data.dataset import Dataset, Split
from adalfl_lite.files import atomic_save, load_payload
from adalfl_lite.learn.base import Learner
from adalfl_lite.passes import process_random_state, restore_process_random_state
from adalfl_lite.provenance import hash_of

FORMAT = "adalfl-checkpoint-1"
KEPT_AS = {"loss_network": "loss", "learning_rate": "learned_rate"}
"""Parts of a learner's state that are kept under other names than they have in it."""
NOT_KEPT_BEFORE = (
    *("model", "loss", "held_out", "inputs", "loss_settings", "augment_settings", "scheduler"),
    *("on_divergence", "learn"),  # of several seeds
    *("loss_code", "task_loss", "task_loss_settings", "task_loss_code", "augment_code", "frozen", "members"),
    "initial_learning_rate",
)
"""What an older checkpoint of this format does not tell about its run, so that it cannot be compared."""


def describe_data(*datasets: Dataset) -> dict[str, Any]:
    """What tells data from others, or from other rows, labels or inputs of the same."""
    train, held_out = [d.train for d in datasets], [split for d in datasets for split in (d.valid, d.test)]
    return {
        "data": datasets[0].name,
        "rows": hash_of(*(_bytes(part) for split in train for part in (split.indices, split.targets))),
        "held_out": hash_of(*(_bytes(part) for split in held_out for part in (split.indices, split.targets))),
        "inputs": [f"{_fingerprint(split):.3g}" for split in (*train, *held_out)],
    }


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()


def _fingerprint(split: Split) -> float:
    """A number that other inputs do not give: a random projection of up to a hundred rows, as a model reads them."""
    rows = torch.linspace(0, len(split) - 1, min(100, len(split)), dtype=torch.float64).long()
    values = split.take(rows.to(split.inputs.device)).to("cpu")[:][0].double().flatten()
    return float(values @ torch.randn(len(values), generator=torch.Generator().manual_seed(0)).double())


def save_checkpoint(
    path: str | os.PathLike, run: dict[str, Any], learner: Learner, parts: dict[str, Any], history: list[dict]
) -> None:
    """Save the settings of a run, the state of the learner and of every part, the history and torch's random state.

    Args:
        path: the file, written atomically.
        run: what tells this run from others, plain values by name.
        learner: what is trained; its state is kept part by part, under the names of :data:`KEPT_AS`.
        parts: by name, what else has a state: samplers, a scheduler.
        history: rows so far.
    """
    random = process_random_state()
    states = {KEPT_AS.get(name, name): state for name, state in learner.state_dict().items()}
    states |= {name: part.state_dict() for name, part in parts.items()}
    run = {**run, "parts": sorted(states)}
    atomic_save({"format": FORMAT, "run": run, "history": history, "random": random, **states}, path)


def resume_checkpoint(
    path: str | os.PathLike, run: dict[str, Any], learner: Learner, parts: dict[str, Any]
) -> list[dict]:
    """Load the learner's, every part's and the random state, and return the history so far.

    Raises:
        ValueError: the file is damaged, or of a run with other settings or parts.
    """
    saved = load_payload(path, FORMAT)
    names = {name: KEPT_AS.get(name, name) for name in learner.state_dict()}
    run = {**run, "parts": sorted([*names.values(), *parts])}
    if missing := {"run", "history", "random"} - saved.keys():
        raise ValueError(f"{path} is not a whole checkpoint, it lacks {', '.join(sorted(missing))}; delete it")
    before = {**{name: run[name] for name in NOT_KEPT_BEFORE if name in run}, **saved["run"]}
    if "initial_learning_rate" in saved["run"]:  # whose rate of the moment says nothing more
        run.pop("learning_rate", None)
    different = [f"{name} {before.get(name)!r} -> {run[name]!r}" for name in run if before.get(name) != run[name]]
    if different:
        raise ValueError(
            f"{path} is a checkpoint of another run ({', '.join(different)}); use another file, or, to go on with this"
            " run, build everything anew as it was at its first step"
        )
    undo = copy.deepcopy({"learner": learner.state_dict(), **{name: part.state_dict() for name, part in parts.items()}})
    try:
        learner.load_state_dict({name: saved[kept] for name, kept in names.items()})
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    except (KeyError, RuntimeError, ValueError) as error:
        learner.load_state_dict(undo["learner"])
        for name, part in parts.items():
            part.load_state_dict(undo[name])
        raise ValueError(f"{path} does not fit this run's learner or data: {error}") from error
    restore_process_random_state(saved["random"])
    return saved["history"]
