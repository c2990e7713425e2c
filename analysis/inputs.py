"""What every diagnostic shares: leave the model as it was found, and refuse data that cannot be meant."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Loss = Callable[[Tensor, Tensor], Tensor]
"""A loss: (prediction, target) -> scalar tensor."""

Batch = tuple[Tensor, Tensor]
"""(inputs, targets)."""


@contextmanager
def preserved(model: nn.Module, training: bool | None = None) -> Iterator[nn.Module]:
    """Run a block with ``model`` and put it back exactly: values, buffers, modes, requires_grad, grads, random state.

    In the block no parameter has a grad, so that a backward pass there adds to none.

    Args:
        model: any module.
        training: put the whole model in train (True) or eval (False) mode for the block; None leaves the modes.
    """
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(p, p.detach().clone(), p.requires_grad, p.grad) for p in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = sorted({p.device.index for p, *_ in parameters if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            for parameter, *_ in parameters:
                parameter.grad = None
            if training is not None:
                model.train(training)
            yield model
        finally:
            with torch.no_grad():
                for parameter, value, requires_grad, grad in parameters:
                    if not torch.equal(parameter, value):
                        parameter.copy_(value)
                    parameter.requires_grad_(requires_grad)
                    parameter.grad = grad
                for buffer, value in buffers:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)
            for module, mode in modes:
                module.training = mode


@contextmanager
def evaluation_copy(model: nn.Module, batch_statistics: bool = False) -> Iterator[nn.Module]:
    """Lend a copy of ``model`` in eval mode whose forward pass changes no buffer; restore torch's random state after.

    Args:
        model: any module; it is not touched.
        batch_statistics: let BatchNorm layers normalise by the statistics of the batch at hand, without recording
            them. Everything else, dropout for one, stays in eval mode.
    """
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        lent = copy.deepcopy(model).eval().requires_grad_(False)
        for norm in batch_norms(lent).values():
            norm.track_running_stats = False
            norm.training = batch_statistics
        yield lent


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers of ``model`` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def as_batches(data: Batch | Iterable[Batch]) -> Iterator[Batch]:
    """Iterate over one (inputs, targets) pair of tensors, or over a loader of such pairs, checking each.

    Raises:
        ValueError: there is no batch, a batch is not a pair of equally long tensors, or it holds NaN or infinity.
    """
    if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        data = [cast(Batch, data)]
    position = -1
    for position, batch in enumerate(data):
        if not (isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(p, Tensor) for p in batch)):
            raise ValueError(f"batch {position} must be two tensors (inputs, targets), got {type(batch).__name__}")
        inputs, targets = batch
        if len(inputs) != len(targets) or len(inputs) == 0:
            raise ValueError(f"batch {position} has {len(inputs)} inputs and {len(targets)} targets")
        for name, tensor in (("inputs", inputs), ("targets", targets)):
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(f"batch {position}: {name} hold NaN or infinity; clean the data first")
        yield inputs, targets
    if position < 0:
        raise ValueError("no data: the loader or list of batches is empty")


def require_columns(frame: pd.DataFrame, *columns: str) -> None:
    """Raise ``ValueError`` unless ``frame`` has the columns and at least one row."""
    if missing := [column for column in columns if column not in frame]:
        raise ValueError(f"the frame lacks the column {', '.join(missing)}; it has {', '.join(map(str, frame))}")
    if not len(frame):
        raise ValueError("the frame has no rows")
