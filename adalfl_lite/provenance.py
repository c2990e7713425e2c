"""What a result depends on: versions, the processor and the commit; what tells one model or optimizer from another."""

from __future__ import annotations

import hashlib
import platform
import re
import subprocess
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


@cache
def provenance(device: str = "cpu") -> dict[str, str]:
    """What a result depends on: versions, the processor, and the commit of a checkout when this process first asked.

    The commit ends in "-dirty" where a tracked file of the checkout differed from it.
    """
    name = torch.cuda.get_device_name(device) if str(device).startswith("cuda") else _processor()
    versions = {"torch": torch.__version__, "python": platform.python_version(), "commit": _commit() or "unknown"}
    return {"device": name, **versions}


def without_addresses(text: str) -> str:
    """``text`` without where in the memory something lies, which differs from process to process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


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


def describe_model(model: nn.Module) -> str:
    """What tells a model from one of other layers, in twelve letters."""
    return hash_of(without_addresses(repr(model)).encode())


def describe_optimizer(optimizer: Optimizer) -> dict[str, Any]:
    """What an optimizer is called, and the settings of its parameter groups."""
    groups = optimizer.param_groups
    return {
        "optimizer": name_of(optimizer),
        "learning_rate": [group["lr"] for group in groups],
        **{name: [group[name] for group in groups] for name in optimizer.defaults if name != "lr"},
    }


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


def hash_of(*parts: bytes) -> str:
    """Twelve letters that other bytes do not give."""
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]
