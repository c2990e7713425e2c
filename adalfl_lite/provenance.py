"""What a result depends on: versions, the processor and the commit; what tells one model or optimizer from another."""

from __future__ import annotations

import dis
import hashlib
import inspect
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import is_dataclass
from functools import cache, partial
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
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


LIBRARIES = ("torch", "adalfl_lite", "numpy", "builtins", "functools")
"""Packages whose functions and classes are known by their names; of any other the code counts."""


def identity(part: Any, *, weights: bool = True) -> str:
    """Text that tells a part from every other of the same name, the same in another process of the same Python.

    Of a function it has the code, the defaults, the variables that it closes over, and the numbers, words and functions
    of its module that it names; of an object, its class and attributes; of a module, its layers too, and its weights.

    Args:
        part: a recipe, a loss, a setting.
        weights: leave out the values of tensors if not, which a training changes.
    """
    return _identity(part, weights, ())


def _identity(part: Any, weights: bool, within: tuple[int, ...]) -> str:
    if part is None or isinstance(part, bool | int | float | complex | str | bytes | Path):
        return repr(part)
    if id(part) in within:  # a function that calls itself
        return "..."

    def of(inner: Any) -> str:
        return _identity(inner, weights, (*within, id(part)))

    def listed(found: dict[str, Any]) -> str:
        return ", ".join(f"{name}={of(value)}" for name, value in found.items())

    if isinstance(part, Tensor | np.ndarray):
        array = part.detach().cpu().contiguous() if isinstance(part, Tensor) else part
        kind = f"{type(part).__name__}{tuple(part.shape)}"
        # through bytes of any dtype, bfloat16 included
        values = array.view(torch.uint8).numpy() if isinstance(array, Tensor) and array.ndim else np.asarray(array)
        return f"{kind} {hash_of(values.tobytes())}" if weights else kind
    if isinstance(part, dict):
        return f"{{{', '.join(sorted(f'{of(name)}: {of(value)}' for name, value in part.items()))}}}"
    if isinstance(part, set | frozenset):
        return f"{{{', '.join(sorted(map(of, part)))}}}"
    if isinstance(part, list | tuple):
        return f"({', '.join(map(of, part))})"
    if isinstance(part, partial):
        return f"{of(part.func)}({', '.join([*map(of, part.args), *filter(None, [listed(part.keywords)])])})"
    if inspect.ismethod(part):
        return f"{of(part.__self__)}.{of(part.__func__)}"
    if inspect.isroutine(part) or isinstance(part, type):
        name = getattr(part, "__qualname__", repr(part))
        return name if _in_library(part) else f"{name} {hash_of(*_code_of(part, of))}"
    if isinstance(part, nn.Module):
        held = {name: value for name, value in vars(part).items() if name[0] != "_" and name != "training"}
        tensors = part.state_dict(keep_vars=True)
        return f"{of(type(part))}({' '.join(without_addresses(repr(part)).split())}, {listed(held | tensors)})"
    if is_dataclass(part) or type(part).__repr__ is object.__repr__:
        return f"{of(type(part))}({listed(getattr(part, '__dict__', {}))})"
    return f"{of(type(part))} {without_addresses(repr(part))}"


def _in_library(part: Any) -> bool:
    return (getattr(part, "__module__", None) or "builtins").partition(".")[0] in LIBRARIES


def _code_of(part: Any, of: Any) -> Iterator[bytes]:
    """The code of a function, or of the functions of a class, and what it depends on, each told by ``of``."""
    if isinstance(part, type):
        for base in (one for one in part.__mro__ if not _in_library(one)):
            for name, value in sorted(vars(base).items()):
                function = getattr(value, "__func__", getattr(value, "fget", value))
                if isinstance(function, FunctionType):
                    yield f"{name} {of(function)}".encode()
    elif isinstance(part, FunctionType):
        names: set[str] = set()
        yield from _bytes_of(part.__code__, names)
        yield of((part.__defaults__, part.__kwdefaults__)).encode()
        for cell in part.__closure__ or ():
            with suppress(ValueError):  # one that is empty yet
                yield of(cell.cell_contents).encode()
        for name in sorted(names & part.__globals__.keys()):
            value = part.__globals__[name]
            if isinstance(value, bool | int | float | str | FunctionType):
                yield f"{name} {of(value)}".encode()


def _bytes_of(code: CodeType, names: set[str]) -> Iterator[bytes]:
    """What a piece of code does; the global names that it uses are added to ``names``."""
    # not co_names, where attributes are among them
    names.update(step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL")
    yield code.co_code
    yield repr(code.co_names).encode()
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _bytes_of(constant, names)
        else:  # the order of a set is another in every process
            yield repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant).encode()


def describe_function(name: str, part: Any) -> dict[str, Any]:
    """What a loss, or None, is called, what it shows of its settings, and its code, but of a module's; by ``name``."""
    known = part is None or isinstance(part, nn.Module)
    code = None if known else hash_of(identity(part, weights=False).encode())
    return {name: None if part is None else name_of(part), f"{name}_settings": settings_of(part), f"{name}_code": code}


def describe_model(model: nn.Module) -> str:
    """What tells a model from one of other layers, in twelve letters."""
    return hash_of(without_addresses(repr(model)).encode())


def describe_optimizer(optimizer: Optimizer) -> dict[str, Any]:
    """What an optimizer is called, and the settings of its parameter groups."""
    groups = optimizer.param_groups
    return {
        "optimizer": name_of(optimizer),
        "learning_rate": [group["lr"] for group in groups],
        # where a scheduler has moved the rate since
        "initial_learning_rate": [group.get("initial_lr", group["lr"]) for group in groups],
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
        own = {name: v for name, v in vars(one).items() if inspect.isfunction(v) and not _in_library(v)}
        if own:
            found["functions"] = {name: identity(function, weights=False) for name, function in own.items()}
        nested = [settings(part) for part in getattr(one, "_schedulers", ())]
        return {"type": type(one).__name__, **found, "milestones": _milestones(one), "schedulers": nested}

    return without_addresses(repr(settings(scheduler)))


def _milestones(scheduler: Any) -> list:
    found = getattr(scheduler, "milestones", None) or getattr(scheduler, "_milestones", None) or ()
    return sorted(found.items() if isinstance(found, dict) else found)


def hash_of(*parts: bytes) -> str:
    """Twelve letters that other bytes do not give."""
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]
