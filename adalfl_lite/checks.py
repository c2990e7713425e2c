"""What data must be like, refused by name and with a remedy where it is not.

Whatever reads values runs once, where a data set is put together, or after a step has failed; a training step itself
looks at shapes, types and devices alone, which costs a GPU nothing, and waits for a GPU once, in :func:`check_finite`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def unknown(what: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a name that is not among the known ones, with the nearest of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    plural = f"{what}es" if what.endswith("s") else f"{what}s"
    return ValueError(f"unknown {what} {name!r}; {hint}known {plural}: {', '.join(known)}")


def is_whole(value: Any) -> bool:
    """Whether this is an int, of Python's or another kind, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_counts(**counts: int | tuple[int, int]) -> None:
    """Raise ``ValueError`` naming what is no whole number of at least 1, or of ``least`` for a pair (count, least)."""
    for name, count in counts.items():
        value, least = count if isinstance(count, tuple) else (count, 1)
        if not is_whole(value):
            raise ValueError(f"{name} must be a whole number, got {value!r}; give an int, such as {max(least, 1)}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def check_used(where: str, **options: tuple[Any, Any]) -> None:
    """Raise ``ValueError`` naming the first of ``options``, pairs (given, default), that would do nothing."""
    for name, (given, default) in options.items():
        if given is not default and given != default:
            shown = repr(given) if isinstance(given, bool | int | float | str) else type(given).__name__
            raise ValueError(f"{name}={shown} has no effect {where}; leave it out")


def check_rows(**tensors: Any) -> None:
    """Raise unless all are tensors, with as many rows, on one device: ``TypeError`` or ``ValueError``."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}: use torch.as_tensor")
    names = ", ".join(tensors)
    rows = [len(tensor) for tensor in tensors.values()]
    if len(set(rows)) != 1:
        raise ValueError(f"{names} must have the same number of rows, got {rows}")
    devices = [str(tensor.device) for tensor in tensors.values()]
    if len(set(devices)) != 1:
        raise ValueError(f"{names} must be on one device, got {', '.join(devices)}; move them with .to(device)")


def check_inputs(inputs: Tensor, name: str = "inputs") -> None:
    """Raise ``ValueError`` unless ``inputs`` are finite floating-point numbers, or uint8 images."""
    if inputs.dtype == torch.uint8:
        return
    if not inputs.is_floating_point():
        raise ValueError(
            f"{name} must be floating point, or uint8 images; got {inputs.dtype}: of numbers use .float(); with token"
            " ids write the loop yourself, around OnlineLoss.step, which takes them"
        )
    _check_finite(name, inputs)


def check_targets(targets: Tensor, name: str = "targets", classes: int | None = None) -> None:
    """Raise ``ValueError`` unless ``targets`` are int64 classes (N,) from 0 (below ``classes``), or finite (N, K)."""
    if targets.is_floating_point():
        if targets.ndim != 2:
            raise ValueError(
                f"{name} of floating point must have shape (N, K), got {tuple(targets.shape)}; for one variable use"
                " targets[:, None], and for class indices .long()"
            )
        _check_finite(name, targets)
        return
    if targets.ndim != 1:
        raise ValueError(
            f"{name} must be class indices (N,), got {targets.dtype} of shape {tuple(targets.shape)};"
            " .argmax(1) turns one-hot rows into them"
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"{name} must be int64 class indices, got {targets.dtype}: use .long()")
    _check_labels(name, targets, classes)


def check_functions(**functions: Any) -> None:
    """Raise ``TypeError`` unless each can be called, or is None."""
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function, got {type(function).__name__}; leave it out, or give a lambda")


def check_factories(**factories: Any) -> None:
    """Raise ``TypeError`` unless all are functions that build something, such as a class or a lambda."""
    for name, factory in factories.items():
        if isinstance(factory, nn.Module | Optimizer) or not callable(factory):
            raise TypeError(
                f"{name} must be a function that builds one, got {type(factory).__name__}; use lambda: ...,"
                " which builds a new one at each call"
            )


def check_pair(batch: Any, name: str, remedy: str = "") -> None:
    """Raise ``TypeError`` unless ``batch`` is a tuple or list of two."""
    if not (isinstance(batch, tuple | list) and len(batch) == 2):
        length = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise TypeError(f"{name} must be a pair (inputs, targets), got {type(batch).__name__}{length}{remedy}")


def check_batch(batch: Any, name: str, model: nn.Module) -> None:
    """Raise unless ``batch`` is a pair (inputs, targets) with as many rows, at least one, on the model's device."""
    check_pair(batch, name)
    inputs, targets = batch
    if not (isinstance(inputs, Tensor) and isinstance(targets, Tensor)):
        found = f"{type(inputs).__name__} and {type(targets).__name__}"
        raise TypeError(f"{name} must be two tensors (inputs, targets), got {found}")
    if len(inputs) != len(targets) or not len(inputs):
        raise ValueError(f"{name} has {len(inputs)} inputs and {len(targets)} targets; give as many, at least one")
    device = next(model.parameters()).device
    if inputs.device != device or targets.device != device:
        raise ValueError(
            f"{name} is on {inputs.device} and {targets.device}, the model is on {device}; use .to({str(device)!r})"
        )


def check_values(batch: tuple[Tensor, Tensor], name: str) -> None:
    """Raise ``ValueError`` if inputs or targets of ``batch`` are not finite, or labels negative."""
    for part, tensor in zip(("inputs", "targets"), batch, strict=True):
        if tensor.is_floating_point():
            _check_finite(f"{name}: {part}", tensor)
    if not batch[1].is_floating_point():
        _check_labels(f"{name}: targets", batch[1])


def check_initialised(model: nn.Module) -> None:
    """Raise ``ValueError`` naming a parameter of a lazy layer that has not seen an input yet."""
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise ValueError(
                f"the parameter {name!r} is of a lazy layer that has no shape yet; run one batch through the model"
                " before building its optimizer"
            )


def check_trainable(model: nn.Module, optimizer: Optimizer) -> None:
    """Raise unless ``optimizer`` holds parameters of ``model`` alone, one of which requires a gradient.

    Raises:
        TypeError: it is not an optimizer.
        ValueError: another model's parameter, one of a lazy layer without a shape, or nothing to train.
        RuntimeError: gradients are switched off.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    check_initialised(model)
    known = {id(parameter) for parameter in model.parameters()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in held:
        if id(parameter) not in known:
            raise ValueError(
                f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that is not in the model; "
                "build it from model.parameters()"
            )
    if not any(parameter.requires_grad for parameter in held):
        raise ValueError("no parameter of the optimizer requires a gradient; unfreeze some of the model")
    if not torch.is_grad_enabled():
        raise RuntimeError("a training step needs gradients; leave torch.no_grad() or torch.inference_mode() first")


def check_output(output: Any) -> Tensor:
    """Return what a model returned if that is a tensor, else raise ``TypeError``."""
    if not isinstance(output, Tensor):
        raise TypeError(f"the model must return a tensor, got {type(output).__name__}; wrap it in a module that does")
    return output


def check_scalar(loss: Tensor) -> None:
    """Raise ``ValueError`` unless ``loss`` is a scalar."""
    if loss.ndim:
        raise ValueError(f"a loss must be a scalar, got shape {tuple(loss.shape)}; use reduction='mean'")


def check_finite(values: dict[str, Tensor], model: nn.Module | None = None, remedy: str = "") -> None:
    """Raise ``FloatingPointError`` naming the first of ``values`` that is not finite; reads from the device once.

    Args:
        values: what a step computed, by name, in the order it was computed; the scalars among them are quoted.
        model: is searched for parameters that are not finite, to name where it began.
        remedy: beside a lower learning rate.
    """
    if math.isfinite(sum(tensor.detach().sum() for tensor in values.values())):
        return
    finite = torch.stack([torch.isfinite(tensor).all().cpu() for tensor in values.values()])  # from several devices
    if finite.all():  # a sum can overflow
        return
    name = list(values)[int(finite.long().argmin())]
    scale = ", ".join(f"{name} {value.item():.3g}" for name, value in values.items() if not value.ndim)
    wrecked = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()] if model else []
    where = f"; not finite in the model: {', '.join(wrecked[:3])}{' ...' * (len(wrecked) > 3)}" if wrecked else ""
    raise FloatingPointError(
        f"the {name} is not finite after this step ({scale}{where}); lower the base learning rate{remedy}"
    )


def _check_labels(name: str, targets: Tensor, classes: int | None = None) -> None:
    if not len(targets) or targets.is_meta:
        return
    least, most = (int(label) for label in torch.aminmax(targets))
    if least < 0:
        raise ValueError(f"{name} hold the label {least}; number the classes from 0")
    if classes is not None and most >= classes:
        one = " (one output is for regression)" if classes == 1 else ""
        raise ValueError(
            f"{name} hold the label {most}, but there are {classes} outputs{one}; a model of {most + 1} classes ends in"
            f" nn.Linear(..., {most + 1})"
        )


def _check_finite(name: str, tensor: Tensor) -> None:
    if not tensor.is_meta and not torch.isfinite(tensor).all():
        row = int((~torch.isfinite(tensor)).reshape(len(tensor), -1).any(1).nonzero()[0])
        raise ValueError(f"{name} are not finite (first in row {row}): they hold NaN or infinity; clean the data first")
