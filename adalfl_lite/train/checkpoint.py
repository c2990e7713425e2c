"""Checkpoints: what tells one run from another, and how a run is saved and taken up again."""

from __future__ import annotations

import hashlib
import os
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from adalfl_lite.data.dataset import Dataset, Split
from adalfl_lite.engines.steps import Batch
from adalfl_lite.files import atomic_save, load_payload
from adalfl_lite.provenance import without_addresses

FORMAT = "adalfl-checkpoint-1"
NOT_KEPT_BEFORE = ("model", "loss", "held_out", "inputs", "loss_settings", "augment_settings", "scheduler")
"""What an older checkpoint of this format does not tell about its run, so that it cannot be compared."""


def name_of(part: Any) -> str:
    """What a function, a module or an optimizer is called, with its settings where they can be seen."""
    if isinstance(part, partial):
        settings = [*map(repr, part.args), *(f"{name}={value!r}" for name, value in sorted(part.keywords.items()))]
        return f"{name_of(part.func)}({', '.join(settings)})"
    if isinstance(part, nn.Module):
        plain = {name: value for name, value in vars(part).items() if isinstance(value, bool | int | float | str)}
        settings = [f"{name}={value!r}" for name, value in plain.items() if name[0] != "_" and name != "training"]
        return " ".join([*repr(part).split(), *settings])  # not every module shows its settings
    return getattr(part, "__name__", type(part).__name__)


def settings_of(part: Any) -> str | None:
    """What an object that is no function, class or module shows of its settings; None of those, or of nothing."""
    if part is None or isinstance(part, nn.Module | partial) or hasattr(part, "__name__"):
        return None
    own = type(part).__repr__ is not object.__repr__
    return without_addresses(repr(part) if own else repr(sorted(getattr(part, "__dict__", {}).items())))


def describe_schedule(scheduler: LRScheduler | None, steps: int) -> str | None:
    """The settings of a scheduler, not where it is; of a function of the step, its values at up to 21 steps."""
    if scheduler is None:
        return None
    moments = sorted({round(steps * i / 20) for i in range(21)})

    def settings(one: Any) -> dict[str, Any]:
        found = {name: value for name, value in one.state_dict().items() if name[0] != "_"}
        found = {name: value for name, value in found.items() if name not in ("last_epoch", "T_cur", "T_i", "verbose")}
        if functions := getattr(one, "lr_lambdas", None):
            found["lr_lambdas"] = [[f"{function(step):.6g}" for step in moments] for function in functions]
        nested = [settings(part) for part in getattr(one, "_schedulers", ())]
        return {"type": type(one).__name__, **found, "milestones": _milestones(one), "schedulers": nested}

    return without_addresses(repr(settings(scheduler)))


def _milestones(scheduler: Any) -> list:
    found = getattr(scheduler, "milestones", None) or getattr(scheduler, "_milestones", None) or ()
    return sorted(found.items() if isinstance(found, dict) else found)


def describe(optimizer: Optimizer, *datasets: Dataset) -> dict[str, Any]:
    """What tells a run from one with other data or another optimizer."""
    return {**describe_data(*datasets), **describe_optimizer(optimizer)}


def describe_data(*datasets: Dataset) -> dict[str, Any]:
    """What tells data from others, or from other rows, labels or inputs of the same."""
    train, held_out = [d.train for d in datasets], [split for d in datasets for split in (d.valid, d.test)]
    return {
        "data": datasets[0].name,
        "rows": _hash(*(_bytes(part) for split in train for part in (split.indices, split.targets))),
        "held_out": _hash(*(_bytes(part) for split in held_out for part in (split.indices, split.targets))),
        "inputs": [f"{_fingerprint(split):.3g}" for split in (*train, *held_out)],
    }


def describe_model(model: nn.Module) -> str:
    """What tells a model from one of other layers, in twelve letters."""
    return _hash(without_addresses(repr(model)).encode())


def describe_optimizer(optimizer: Optimizer) -> dict[str, Any]:
    """What an optimizer is called, and the settings of its parameter groups."""
    groups = optimizer.param_groups
    return {
        "optimizer": name_of(optimizer),
        "learning_rate": [group["lr"] for group in groups],
        **{name: [group[name] for group in groups] for name in optimizer.defaults if name != "lr"},
    }


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()


def _hash(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]


def _fingerprint(split: Split) -> float:
    """A number that other inputs do not give: a random projection of up to a hundred rows, as a model reads them."""
    rows = torch.linspace(0, len(split) - 1, min(100, len(split)), dtype=torch.float64).long()
    values = split.take(rows.to(split.inputs.device)).to("cpu")[:][0].double().flatten()
    return float(values @ torch.randn(len(values), generator=torch.Generator().manual_seed(0)).double())


class NextBatch:
    """The next step's training batch, where it has been drawn already, as a part of a checkpoint."""

    def __init__(self, device: torch.device) -> None:
        """Begin with none."""
        self.batch: Batch | None = None
        self.device = device

    def state_dict(self) -> dict[str, Batch | None]:
        """The batch."""
        return {"batch": self.batch}

    def load_state_dict(self, state: dict[str, Batch | None]) -> None:
        """Take it up."""
        batch = state["batch"]
        self.batch = None if batch is None else (batch[0].to(self.device), batch[1].to(self.device))


def save_checkpoint(path: str | os.PathLike, run: dict, parts: dict[str, Any], history: list[dict]) -> None:
    """Save the settings of a run, the state of every part, the history and torch's random state, atomically."""
    random: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state_all()
    states = {name: part.state_dict() for name, part in parts.items()}
    run = {**run, "parts": sorted(parts)}
    atomic_save({"format": FORMAT, "run": run, "history": history, "random": random, **states}, path)


def resume_checkpoint(path: str | os.PathLike, run: dict, parts: dict[str, Any]) -> list[dict]:
    """Load every part's state and the random state, and return the history so far.

    Raises:
        ValueError: the file is damaged, or of a run with other settings or parts.
    """
    saved = load_payload(path, FORMAT)
    run = {**run, "parts": sorted(parts)}
    if missing := {"run", "history", "random"} - saved.keys():
        raise ValueError(f"{path} is not a whole checkpoint, it lacks {', '.join(sorted(missing))}; delete it")
    before = {**{name: run[name] for name in NOT_KEPT_BEFORE if name in run}, **saved["run"]}
    different = [f"{name} {before.get(name)!r} -> {run[name]!r}" for name in run if before.get(name) != run[name]]
    if different:
        raise ValueError(f"{path} is a checkpoint of another run ({', '.join(different)}); use another file")
    for name, part in parts.items():
        try:
            part.load_state_dict(saved[name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path} does not fit this run's {name}: {error}") from error
    torch.set_rng_state(saved["random"]["cpu"])
    if "cuda" in saved["random"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(saved["random"]["cuda"])
    return saved["history"]
