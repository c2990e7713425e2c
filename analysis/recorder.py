"""Diagnostics recorded while training, or afterwards from checkpoints, as one tidy table that knows its own cost.

For example, with any diagnostics of this package or your own functions of (model, loss)::

    recorder = Recorder(
        effective_lr=lambda model, loss: effective_learning_rate(model, loss, F.cross_entropy, batch),
        layers=lambda model, loss: effective_learning_rate(model, loss, F.cross_entropy, batch, by_layer=True),
        every=100,
    )
    for step, batch in enumerate(loader):
        recorder(step, model, loss)
        ...                                     # train as ever
    recorder.frame("effective_lr")              # one row per step

or from the files of a run that is over::

    states = [(step, torch.load(path, weights_only=True)) for step, path in files]
    recorder.replay(model, loss, states).frame("effective_lr")
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, is_dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from analysis.inputs import Loss, State, preserved, replaced

Diagnostic = Callable[[nn.Module, Loss], Any]
"""(model, loss) -> a mapping, Series or dataclass of numbers (one row), or a DataFrame (any number of rows)."""


class Recorder:
    """Calls diagnostics at an interval and keeps what they find; itself a callback(step, model, loss).

    The model, the loss if it is a module, and torch's random state are put back after each call, whatever a diagnostic
    did to them, so that a run is the same with and without a recorder.

    Args:
        every: least number of steps between two records. The first call always records; calls that come too early do
            nothing.
        **diagnostics: the diagnostics by name.

    Attributes:
        seconds: wall-clock time spent in diagnostics so far.

    Raises:
        ValueError: no diagnostic, or ``every`` below 1.

    Examples:
        >>> model = nn.Linear(1, 1)
        >>> recorder = Recorder(bias=lambda model, loss: {"value": model.bias}, every=10)
        >>> for step in range(25):
        ...     recorder(step, model, nn.functional.mse_loss)
        ...     _ = nn.init.constant_(model.bias, step)
        >>> recorder.frame("bias").iloc[1:]
           step  value
        1    10    9.0
        2    20   19.0
    """

    def __init__(self, *, every: int = 1, **diagnostics: Diagnostic):
        if not diagnostics:
            raise ValueError("nothing to record; pass diagnostics by name, as in Recorder(norms=function)")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.diagnostics, self.every, self.seconds = diagnostics, every, 0.0
        self._rows: dict[str, list[pd.DataFrame]] = {name: [] for name in diagnostics}
        self._last: int | None = None
        self._began = self._ended = 0.0

    def __call__(self, step: int, model: nn.Module, loss: Loss) -> None:
        """Record if it is time to.

        Raises:
            ValueError: ``step`` is not later than the last one recorded, or a diagnostic's result is of no use.
        """
        if self._last is not None:
            if step <= self._last:
                raise ValueError(f"step {step} after step {self._last}; use a new Recorder for each run")
            if step < self._last + self.every:
                return
        began = _clock()
        rows: dict[str, pd.DataFrame] = {}
        for name, diagnostic in self.diagnostics.items():
            with preserved(model, loss):
                rows[name] = _table(name, diagnostic(model, loss))
        for name, table in rows.items():
            table.insert(0, "step", step)
            self._rows[name].append(table)
        self._began = began if self._last is None else self._began
        self._last, self._ended = step, _clock()
        self.seconds += self._ended - began

    def replay(
        self, model: nn.Module, loss: Loss, checkpoints: Iterable[tuple[int, State] | tuple[int, State, State]]
    ) -> Recorder:
        """Record from checkpoints; each counts as one call. Model and loss hold each in turn, then their own again.

        Args:
            model: gives the architecture and the modes.
            loss: the loss.
            checkpoints: (step, ``model.state_dict()``), or with ``loss.state_dict()`` as a third part, in order of
                steps; copied while training, since a state dict is a view of the parameters.

        Returns:
            The recorder itself.

        Raises:
            ValueError: no checkpoint, or a state that does not fit the model or the loss.
        """
        count = 0
        with ExitStack() as stack:
            stack.enter_context(preserved(model, loss))
            for module in (model, loss):
                if isinstance(module, nn.Module):
                    stack.enter_context(replaced(module, _stand_ins(module)))
            for step, state, *loss_state in checkpoints:
                try:
                    model.load_state_dict(state)
                    if loss_state:
                        loss.load_state_dict(*loss_state)  # type: ignore[attr-defined]
                except (AttributeError, RuntimeError) as error:
                    raise ValueError(f"the checkpoint of step {step} does not fit: {error}") from error
                self(step, model, loss)
                count += 1
        if not count:
            raise ValueError("no checkpoints to record from")
        return self

    def frame(self, name: str | None = None) -> pd.DataFrame:
        """What one diagnostic found, or all of them.

        Returns:
            Of one: its own columns behind ``step``. Of all (None): those tables below each other, with a column
            ``diagnostic``, and NaN in the columns that another diagnostic has.

        Raises:
            ValueError: nothing is recorded yet, or no diagnostic has that name.
        """
        if name is not None and name not in self._rows:
            raise ValueError(f"no diagnostic {name!r}; there are {', '.join(self._rows)}")
        if self._last is None:
            raise ValueError("nothing is recorded yet; call the recorder, as callback(step, model, loss)")
        if name is not None:
            return pd.concat(self._rows[name], ignore_index=True)
        tables = [self.frame(name).assign(diagnostic=name) for name in self._rows]
        together = pd.concat(tables, ignore_index=True)
        return together[["step", "diagnostic", *together.columns.drop(["step", "diagnostic"])]]

    @property
    def share(self) -> float:
        """The diagnostics' part, in [0, 1], of the time from the first record's begin to the last one's end."""
        elapsed = self._ended - self._began
        return self.seconds / elapsed if elapsed else 0.0


def _stand_ins(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters, to be written over."""
    return {name: nn.Parameter(p.detach().clone(), p.requires_grad) for name, p in module.named_parameters()}


def _table(name: str, result: Any) -> pd.DataFrame:
    """A diagnostic's result as a table of its own."""
    if isinstance(result, pd.DataFrame):
        table = result.reset_index(drop=True).copy()
    else:
        if is_dataclass(result) and not isinstance(result, type):
            result = asdict(result)
        if not isinstance(result, Mapping | pd.Series):
            raise ValueError(
                f"the diagnostic {name!r} gave a {type(result).__name__}; it should give a mapping, a Series, "
                "a dataclass or a DataFrame"
            )
        row = {}
        for key, value in result.items():
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(
                    f"the diagnostic {name!r}: {key!r} is a tensor of {value.numel()} values, not a number"
                )
            row[key] = value.item() if isinstance(value, Tensor) else value
        table = pd.DataFrame([row])
    if taken := {"step", "diagnostic"} & set(table):
        raise ValueError(f"the diagnostic {name!r} has a column {taken.pop()!r}, which the recorder adds itself")
    return table


def _clock() -> float:
    """Seconds, after the GPU's pending work, which is the training's and not the diagnostics'."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
