"""What every diagnostic shares: leave the model as it was found, and refuse data that cannot be meant.

A model is never copied. It is run with other tensors in its slots, and what a pass changes is undone::

    preserved    a block around everything: all is put back after it, whatever happened
    evaluation   the same, in eval mode, with a choice of statistics for BatchNorm
    replaced     a block in which the model holds other tensors
    call         one forward pass within such a block
    still        a loss that does not notice that it is evaluated

The random generators, the levels of forward-mode differentiation and the choice of kernels belong to the whole
process, so one lock is held in ``preserved`` and ``replaced``: of two threads that run diagnostics one waits for the
other. A diagnostic must not wait for a thread of its own that runs another one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from analysis.derivatives import real
from analysis.snapshots import Snapshot, modules_behind

Loss = Callable[[Tensor, Tensor], Tensor]
"""A loss is any callable (prediction, target) -> scalar tensor."""

Batch = tuple[Tensor, Tensor]
"""(inputs, targets)."""

Data = Batch | Iterable[Batch]
"""One (inputs, targets) pair, or a loader of them."""

State = Mapping[str, Tensor]
"""Parameters and buffers by name, as ``model.state_dict()`` gives them."""

LOCK = threading.RLock()
"""Held while a diagnostic runs a model."""


def check_model(model: object) -> None:
    """Raise ``TypeError`` unless this is a module, as where the loss comes before it."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"the model must be a torch.nn.Module, got {type(model).__name__}; the order is model, losses, data"
        )


@contextmanager
def preserved(*owners: Callable, training: bool | None = None) -> Iterator[None]:
    """Run a block and put a model and losses back exactly, also after an error.

    That is: the very same parameters, buffers, submodules, hooks and plain attributes, values, modes, requires_grad,
    grads; and torch's random state. In the block no parameter has a grad, so that a backward pass there adds to none.

    Args:
        owners: what the block calls; the modules among them, or behind them, are put back.
        training: put the first one, a model, in train (True) or eval (False) mode for the block; None leaves the modes.

    Raises:
        TypeError: one of them cannot be called, as where data come before the loss.
    """
    if wrong := [type(owner).__name__ for owner in owners if not callable(owner)]:
        raise TypeError(f"a model and a loss must be callable, got {wrong[0]}; the order is model, losses, data")
    if training is not None:
        check_model(owners[0])
    with LOCK:
        found = [Snapshot(module, values=True) for owner in owners for module in modules_behind(owner)]
        devices = _gpus(tensor for one in found for tensor in one.tensors)
        with torch.random.fork_rng(devices=devices):
            try:
                for one in found:
                    one.forget_gradients()
                if training is not None:
                    cast(nn.Module, owners[0]).train(training)
                yield
            finally:
                for one in found:
                    one.restore()


@contextmanager
def evaluation(model: nn.Module, *losses: Callable, batch_statistics: bool = False) -> Iterator[None]:
    """:func:`preserved`, with ``model`` in eval mode.

    Args:
        model: any module.
        losses: see :func:`preserved`.
        batch_statistics: let BatchNorm layers normalise by the statistics of the batch at hand, without recording
            them. Everything else, dropout for one, stays in eval mode.
    """
    with preserved(model, *losses, training=False):
        for norm in batch_norms(model).values():
            norm.track_running_stats = False
            norm.training = batch_statistics
        yield


@contextmanager
def replaced(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Run a block in which ``model`` holds other tensors; what a forward pass changes in the model is undone after it.

    A tensor goes wherever the one that it replaces is held: in every slot of a tied parameter, and in lists, as
    recurrent layers keep them. Buffers are copies in the block. Differentiate within the block:
    checkpointed parts of a model run again in the backward pass.

    Args:
        model: any module that is not scripted.
        tensors: by the name of a parameter or buffer; any of its names, if it has several.

    Raises:
        ValueError: a scripted module, or an unknown name.
    """
    with LOCK:
        found = Snapshot(model)
        if tensors and any(isinstance(module, torch.jit.ScriptModule) for module in found.modules):
            raise ValueError(
                f"{type(model).__name__} is or has a scripted module, whose tensors cannot be replaced; pass the "
                "module that it was scripted from"
            )
        known = named_tensors(model)
        if unknown := [name for name in tensors if name not in known]:
            raise ValueError(f"the model has no parameter or buffer named {', '.join(sorted(unknown))}")
        # By identity, not by name: a tied parameter is one tensor in several slots. Buffers become copies, since
        # BatchNorm writes into them in place.
        others = {id(known[name]): tensor for name, tensor in tensors.items()}
        others |= {id(buffer): others.get(id(buffer), buffer).clone() for buffer in found.buffers}
        try:
            found.exchange(others)
            yield
        finally:
            found.restore()


def call(model: nn.Module, tensors: Mapping[str, Tensor], *inputs: Any) -> Any:
    """``model(*inputs)`` with other tensors, see :func:`replaced`; in-place changes to the inputs are not seen outside.

    Use it for a pass that is not differentiated, or within :mod:`torch.func`.
    """
    with replaced(model, tensors):
        return model(*(part.clone() if isinstance(part, Tensor) else part for part in inputs))


def repeatable(model: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """``with again():`` runs a block from torch's random state of now, and leaves that of then alone."""
    devices = _gpus([*model.parameters(), *model.buffers()])
    state, gpus = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]

    @contextmanager
    def again() -> Iterator[None]:
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(state)
            for device, of_gpu in zip(devices, gpus, strict=True):
                torch.cuda.set_rng_state(of_gpu, device)
            yield

    return again


def _gpus(tensors: Iterable[Tensor]) -> list[int]:
    return sorted({tensor.device.index for tensor in tensors if tensor.device.type == "cuda"})


def still(loss: Loss) -> Loss:
    """The loss, of which each evaluation begins in the state in which it is now, and changes nothing."""
    modules = list(modules_behind(loss))

    def evaluated(prediction: Tensor, target: Tensor) -> Tensor:
        with ExitStack() as stack:
            for module in modules:
                stack.enter_context(replaced(module, {}))
            return loss(prediction.clone() if isinstance(prediction, Tensor) else prediction, target)

    return evaluated


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by every name they have."""
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return named | dict(model.named_buffers(remove_duplicate=False))


def by_first_name(model: nn.Module, state: Mapping[str, Tensor], what: str = "the state") -> dict[str, Tensor]:
    """The parameters and buffers in ``state`` by the names that ``model.named_parameters()`` has for them.

    Args:
        model: knows the names; a tied parameter has several, and ``state_dict()`` all of them.
        state: by any of the names. What else a state dict may hold is left out.
        what: names the state in an error.

    Raises:
        ValueError: a name that the model does not know, or different values for one tensor.
    """
    known = named_tensors(model)
    if unknown := set(state) - set(known) - set(model.state_dict(keep_vars=True)):
        raise ValueError(f"the model has no parameter or buffer named {', '.join(sorted(unknown))}")
    first = {id(tensor): name for name, tensor in reversed(known.items())}  # the first name of each tensor overwrites
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in known:
            own = first[id(known[name])]
            if own in renamed and not torch.equal(renamed[own], tensor.to(renamed[own])):
                raise ValueError(
                    f"{what} has different values for {own!r} and {name!r}, which the model ties; give one"
                )
            renamed.setdefault(own, tensor)
    return renamed


def checked_tensors(
    what: str, tensors: Mapping[str, Tensor], model: nn.Module, needed: Iterable[str] = ()
) -> dict[str, Tensor]:
    """:func:`by_first_name`, of tensors that fit the model.

    Raises:
        ValueError: a tensor has not the name and shape of one in the model, a parameter is not finite, or a needed
            name is missing.
    """
    known = named_tensors(model)
    if not tensors and not needed:
        raise ValueError(f"{what} is empty; it should hold tensors named {', '.join(known)}")
    for name in tensors.keys() - known.keys() - model.state_dict(keep_vars=True).keys():
        raise ValueError(f"{what} has a tensor {name!r} that the model lacks; it has {', '.join(known)}")
    named = by_first_name(model, tensors, what)
    if missing := sorted(set(needed) - named.keys()):
        raise ValueError(f"{what} lacks the parameters {', '.join(missing)}")
    for name, tensor in named.items():
        if tensor.shape != known[name].shape:
            raise ValueError(f"{what}: {name!r} has shape {tuple(tensor.shape)}, not {tuple(known[name].shape)}")
        if isinstance(known[name], nn.Parameter) and not torch.isfinite(tensor).all():
            raise ValueError(f"{what}: {name!r} holds NaN or infinity")
    return named


class _PlainWeightNorm(TorchFunctionMode):
    """w = g v/‖v‖ in simple steps: the second derivative of torch's fused kernel is wrong (2.15), for it holds ‖v‖."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch._weight_norm:
            return self._plain(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _plain(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
        others = [d for d in range(v.ndim) if d != dim]  # a dim of -1 means the norm of the whole
        return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=dim != -1))


def _weight_normed(module: nn.Module) -> bool:
    parts = [module, *module._forward_pre_hooks.values()]
    return any(isinstance(part, WeightNorm | _WeightNorm) for part in parts)


@contextmanager
def plain_kernels(model: nn.Module, order: int = 2) -> Iterator[None]:
    """Without the fused kernels for attention, recurrence and weight normalisation.

    Those lack second derivatives or forward mode, or have wrong ones.

    Args:
        model: only recurrent layers in it make a difference to cuDNN and oneDNN.
        order: 1 where there is one backward pass: only cuDNN's recurrence lacks that, in eval mode.
    """
    recurrent = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
    if order == 1:
        recurrent = [module for module in recurrent if not module.training]
    libraries: list[Any] = [torch.backends.mkldnn, torch.backends.cudnn] if recurrent else []
    enabled, fast = [library.enabled for library in libraries], torch.backends.mha.get_fastpath_enabled()
    with LOCK, ExitStack() as stack:
        try:
            for library in libraries:
                library.enabled = False
            torch.backends.mha.set_fastpath_enabled(False)
            if order > 1:  # flash and memory-efficient attention can be differentiated once
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
                if any(map(_weight_normed, model.modules())):
                    stack.enter_context(_PlainWeightNorm())
            yield
        finally:
            for library, value in zip(libraries, enabled, strict=True):
                library.enabled = value
            torch.backends.mha.set_fastpath_enabled(fast)


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers of ``model`` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def as_batches(data: Data) -> Iterator[Batch]:
    """Iterate over one (inputs, targets) pair of tensors, or over a loader of such pairs, checking each.

    Raises:
        TypeError: data that cannot be iterated, as where a loss stands in their place.
        ValueError: there is no batch, a batch is not a pair of equally long tensors, or it holds NaN or infinity.
    """
    if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        data = [cast(Batch, data)]
    try:
        numbered = enumerate(data)
    except TypeError as error:
        raise TypeError(f"data must be batches, got {type(data).__name__}; the order is model, losses, data") from error
    position = -1
    for position, batch in numbered:
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


def device_of(model: nn.Module) -> torch.device | None:
    """The device of the first parameter, or else of the first buffer; None for a model that has neither."""
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), None)


def on_device(data: Data, model: nn.Module) -> Iterator[Batch]:
    """The checked batches of ``data`` on the device of the model, if it has anything that is on one."""
    device = device_of(model)
    for inputs, targets in as_batches(data):
        yield inputs.to(device), targets.to(device)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the model that require a gradient, by name.

    Raises:
        ValueError: there are none.
    """
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not found:
        raise ValueError("the model has no trainable parameters; set requires_grad=True on those of interest")
    return found


def split_state(model: nn.Module, state: State | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Detached parameters that require a gradient, and copies of all else, from ``state`` or else from the model.

    Raises:
        ValueError: a name in ``state`` that the model does not know, different values for a tied tensor, or no
            parameter that requires a gradient.
    """
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    given = {} if state is None else by_first_name(model, state)
    values = {name: given.get(name, tensor).detach().to(tensor.device) for name, tensor in own.items()}
    trained = {name: values[name] for name in trainable(model)}
    return trained, {name: value.clone() for name, value in values.items() if name not in trained}


def layers(model: nn.Module) -> dict[str, list[str]]:
    """{layer: names of its parameters that require a gradient}; a layer is the module that owns the parameters."""
    owned: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            owned.setdefault(name.rpartition(".")[0] or name, []).append(name)
    return owned


def flat(gradient: State, names: Iterable[str] | None = None) -> Tensor:
    """The named entries of a gradient (all of them if None) as one float64 vector, of complex ones both parts."""
    return torch.cat([real(gradient[name].detach()).double().flatten() for name in (names or gradient)])


def one_tensor(prediction: Tensor) -> Tensor:
    """What a model returns, if it is one floating tensor.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(prediction, Tensor) or not (prediction.is_floating_point() or prediction.is_complex()):
        found = prediction.dtype if isinstance(prediction, Tensor) else type(prediction).__name__
        raise ValueError(f"the model must return one floating tensor, got {found}; wrap it in a module that does")
    return prediction


def finite_scalar(value: Tensor, what: str = "the loss") -> Tensor:
    """The value of a loss, if it is one finite number; ``what`` names the loss in the error.

    Raises:
        ValueError: it is not.
    """
    if value.ndim or not torch.isfinite(value):
        raise ValueError(f"{what} must be a finite scalar, got {value.detach().cpu()}")
    return value


def check_value(value: Tensor) -> Tensor:
    """The value of a loss, if it is a finite scalar that depends on something, so that it can be differentiated.

    Raises:
        ValueError: it is not.
    """
    finite_scalar(value)
    if not value.requires_grad:
        raise ValueError(
            "the loss does not depend on what it is differentiated by: is the forward pass or the loss under "
            "torch.no_grad() or inference_mode()? Run it with gradients enabled"
        )
    return value
