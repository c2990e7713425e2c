"""Passes over a model: with other tensors in the place of its own, in another mode, and back to where it was.

Every other module calls a model through :func:`replaced` and :func:`forward`, so that no pass leaves a trace in the
model that was not asked for, and every step of training runs inside an :class:`Undo`, so that it is taken as a whole or
not at all.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from adalfl_lite.checks import check_output

LOCK = threading.RLock()
"""Held by each step: forward mode, the random state and the choice of kernels belong to the whole process, so that
learners in several threads take turns."""

Replacements = Mapping[int, Tensor]
"""id of a parameter or buffer of a model -> the tensor to use in its place."""


_FOUND: dict[int, list[nn.Module]] = {}
"""id of a model that a step is being taken of -> its modules, which would else be looked for a dozen times a step."""


def modules_of(model: nn.Module) -> list[nn.Module]:
    """All modules of a model, each once; within an :class:`Undo` those that there were as it began."""
    return _FOUND.get(id(model)) or list(model.modules())


def parameters_of(model: nn.Module) -> list[Tensor]:
    """All parameters of a model, each once, in the order of ``model.parameters()``."""
    return list({id(p): p for m in modules_of(model) for p in m._parameters.values() if p is not None}.values())


def buffers_of(model: nn.Module) -> list[Tensor]:
    """All buffers of a model, each once."""
    return list({id(b): b for m in modules_of(model) for b in m._buffers.values() if b is not None}.values())


@contextmanager
def replaced(model: nn.Module, tensors: Replacements) -> Iterator[None]:
    """Run a block with other tensors in the place of the model's own parameters and buffers.

    What is replaced is the tensor, not a name: a parameter that has several names, or a module that is used several
    times, gets the same replacement everywhere. Afterwards each of these slots holds the very object that it held
    before, also if the model's forward pass has put another one there.
    """
    stores: list[dict[str, Any]] = [store for m in modules_of(model) for store in (m._parameters, m._buffers) if store]
    slots = [(store, name, tensor) for store in stores for name, tensor in store.items() if id(tensor) in tensors]
    recurrent = [m for m in modules_of(model) if isinstance(m, nn.RNNBase)]
    lists = [(m, m._flat_weights, m._flat_weight_refs) for m in recurrent]
    try:
        for store, name, tensor in slots:
            store[name] = tensors[id(tensor)]
        yield
    finally:
        for store, name, tensor in slots:
            store[name] = tensor
        for m, weights, references in lists:  # a recurrent layer remembers the tensors of its last pass
            m._flat_weights, m._flat_weight_refs = weights, references


@contextmanager
def unmarked(model: nn.Module) -> Iterator[None]:
    """Run a block of passes and put back what they leave in the attributes of modules: feature maps kept, counters."""
    saved = Attributes(model)
    try:
        yield
    finally:
        saved.restore()


class Attributes:
    """The attributes of every module, each as the object it is; not its parameters, buffers and submodules.

    Of a list, a dictionary or a set also what is in it, and of a ``torch.Generator`` its state.
    """

    def __init__(self, model: nn.Module):
        self.values = [(vars(module), vars(module).copy()) for module in modules_of(model)]
        self.containers: list[tuple[Any, Any]] = []
        self.generators: list[tuple[torch.Generator, Tensor]] = []
        for _, saved in self.values:
            for name, value in saved.items():
                if type(value) in CONTAINERS and name not in OF_MODULES:
                    self.containers.append((value, value.copy()))
                elif isinstance(value, torch.Generator):
                    self.generators.append((value, value.get_state()))

    def __eq__(self, other: object) -> bool:
        """Whether they are the same objects."""
        if not isinstance(other, Attributes) or len(self.values) != len(other.values):
            return False
        if len(self.containers) != len(other.containers) or len(self.generators) != len(other.generators):
            return False
        pairs = zip(self.values, other.values, strict=True)
        kept = zip(self.containers, other.containers, strict=True)
        return (
            all(_same_objects(ours, theirs) for (_, ours), (_, theirs) in pairs)
            and all(_same_contents(ours, theirs) for (_, ours), (_, theirs) in kept)
            and all(torch.equal(a, b) for (_, a), (_, b) in zip(self.generators, other.generators, strict=True))
        )

    def restore(self) -> None:
        """Put back the attributes that were noted."""
        for current, saved in self.values:
            if not _same_objects(current, saved):
                current.clear()
                current.update(saved)
        for container, saved in self.containers:
            if not _same_contents(container, saved):
                container.clear()
                container.extend(saved) if isinstance(container, list) else container.update(saved)
        for generator, state in self.generators:
            generator.set_state(state)


CONTAINERS = (list, dict, set)
OF_MODULES = frozenset(vars(nn.Module()))  # what every module has: parameters, buffers, submodules and hooks


def _same_contents(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return _same_objects(a, b)
    return [*map(id, a)] == [*map(id, b)] if isinstance(a, list) else a == b


def _same_objects(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and [*map(id, a.values())] == [*map(id, b.values())]


class RandomState:
    """The random state of the CPU and of the model's GPU, to come back to."""

    def __init__(self, model: nn.Module):
        parameters = model.parameters() if torch.cuda.is_initialized() else ()  # else none is on a GPU
        devices = {parameter.device for parameter in parameters if parameter.device.type == "cuda"}
        self.cpu = torch.get_rng_state()
        self.cuda = {device: torch.cuda.get_rng_state(device) for device in devices}

    def restore(self) -> None:
        """Put back the random state that was noted."""
        torch.set_rng_state(self.cpu)
        for device, state in self.cuda.items():
            torch.cuda.set_rng_state(state, device)

    def __eq__(self, other: object) -> bool:
        """Whether the next random numbers would be the same."""
        if not isinstance(other, RandomState) or self.cuda.keys() != other.cuda.keys():
            return False
        pairs = [(self.cpu, other.cpu), *((self.cuda[device], other.cuda[device]) for device in self.cuda)]
        return all(torch.equal(ours, theirs) for ours, theirs in pairs)


def process_random_state() -> dict[str, Any]:
    """torch's random state on the CPU and on every GPU, as tensors: what a checkpoint keeps."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_available() else {})


def restore_process_random_state(state: dict[str, Any]) -> None:
    """Put back what :func:`process_random_state` gave, as far as there are such devices here."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


class Buffers:
    """Copies of a model's buffers."""

    def __init__(self, model: nn.Module):
        self.copies = [(buffer, buffer.clone()) for buffer in buffers_of(model)]

    def fresh(self) -> dict[int, Tensor]:
        """Copies of the copies, to be used in the place of the buffers."""
        return {id(buffer): copy.clone() for buffer, copy in self.copies}

    @torch.no_grad()
    def restore(self) -> None:
        """Give the buffers these values."""
        for buffer, copy in self.copies:
            write(buffer, copy)


def write(tensor: Tensor, value: Tensor) -> None:
    """Give a tensor these values; an expanded one cannot change, and stays."""
    strided = tensor.layout is torch.strided
    if not (strided and any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True))):
        tensor.copy_(value)


class Undo:
    """Around a step of training: an exception inside leaves everything as it was before, and goes on.

    Everything is the model's parameters that the optimizer holds and their ``.grad``, the model's buffers and the
    attributes of its modules, the optimizers' states and settings, the parameters of the second optimizer, and the
    random state. A step that fails can be taken again, by the same engine or another, with the same result as at first.

    Args:
        model: what is trained.
        optimizers: of its parameters, and of what is meta-learned beside it.
        loss: the loss that is trained with, if it is a module; its buffers and attributes come back, too.
        frozen: copy the parameters that no optimizer holds too, for a model that might change them in its passes.
    """

    def __init__(self, model: nn.Module, *optimizers: Optimizer, frozen: bool = False, loss: nn.Module | None = None):
        self.model, self.optimizers, self.with_frozen = model, optimizers, frozen
        self.loss = nn.Identity() if loss is None else loss
        self.before: list[Tensor] = []
        """θ before the step: copies of the first optimizer's parameters, in its order."""
        self._depth = 0

    def __enter__(self) -> Undo:
        """Hold the lock and note where everything is; inside another use of the same object, do nothing."""
        LOCK.acquire()
        self._depth += 1
        if self._depth > 1:
            return self
        self._outer = _FOUND.get(id(self.model))
        try:
            _FOUND[id(self.model)] = list(self.model.modules())
            self.parameters = [optimizer_parameters(optimizer) for optimizer in self.optimizers]
            self.copies = [clones(parameters) for parameters in self.parameters]
            self.before = self.copies[0]
            self.gradients = [[p.grad for p in parameters] for parameters in self.parameters]
            self.settings = [[dict(group) for group in optimizer.param_groups] for optimizer in self.optimizers]
            self.states = [_copied_state(optimizer) for optimizer in self.optimizers]
            self.buffers, self.attributes = Buffers(self.model), Attributes(self.model)
            self.of_loss = Attributes(self.loss), Buffers(self.loss)
            modules = modules_of(self.model)
            stores: list[dict[str, Any]] = [s for m in modules for s in (m._parameters, m._buffers) if s]
            self.stores = [(store, dict(store)) for store in stores]
            self.random = RandomState(self.model)
            held = {id(parameter) for parameters in self.parameters for parameter in parameters}
            others = [p for p in parameters_of(self.model) if self.with_frozen and id(p) not in held]
            self.frozen = list(zip(others, clones(others), strict=True))
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Go back if the block has failed."""
        try:
            if kind is not None:
                self._restore()
        finally:
            self._leave()

    def unmoved(self) -> bool:
        """Whether θ, and what else has been copied of the model's parameters, is as it was."""
        pairs = [*zip(self.parameters[0], self.copies[0], strict=True), *self.frozen]
        return same_values([parameter for parameter, _ in pairs], [copy for _, copy in pairs])

    def _leave(self) -> None:
        self._depth -= 1
        if not self._depth:
            _FOUND.pop(id(self.model), None)
            if self._outer is not None:
                _FOUND[id(self.model)] = self._outer
        LOCK.release()

    @torch.no_grad()
    def _restore(self) -> None:
        for parameters, copies, gradients in zip(self.parameters, self.copies, self.gradients, strict=True):
            for parameter, copy, gradient in zip(parameters, copies, gradients, strict=True):
                parameter.copy_(copy)
                parameter.grad = gradient
        for parameter, copy in self.frozen:
            parameter.copy_(copy)
        for optimizer, settings, state in zip(self.optimizers, self.settings, self.states, strict=True):
            for group, of_group in zip(optimizer.param_groups, settings, strict=True):
                group.update(of_group)
            optimizer.state.clear()
            optimizer.state.update({parameter: _copied(entries) for parameter, entries in state})
        self.attributes.restore()
        for store, saved in self.stores:
            store.update(saved)
        self.buffers.restore()
        for part in self.of_loss:
            part.restore()
        self.random.restore()


def optimizer_parameters(optimizer: Optimizer) -> list[Tensor]:
    """All parameters of ``optimizer``, in the order of its groups. Gradients here are always given in this order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the values of tensors, without their graph."""
    return [tensor.detach().clone() for tensor in tensors]


def same_values(tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> bool:
    """Whether all tensors equal their copies, NaN where NaN was. A GPU is waited for once."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return all(torch.equal(a, b) or _same_with_nan(a, b).item() for a, b in zip(tensors, copies, strict=True))
    return bool(torch.stack([_same_with_nan(a, b) for a, b in zip(tensors, copies, strict=True)]).all())


def _same_with_nan(a: Tensor, b: Tensor) -> Tensor:
    return (torch.eq(a, b) | (a.isnan() & b.isnan())).all()


def _copied_state(optimizer: Optimizer) -> list[tuple[Tensor, dict]]:
    return [(parameter, _copied(entries)) for parameter, entries in optimizer.state.items()]


def _copied(entries: dict) -> dict:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in entries.items()}


def forward(
    model: nn.Module, inputs: Tensor, autocast: torch.dtype | None, named: dict[str, Tensor] | None = None
) -> Tensor:
    """f(x), in float32 where ``autocast`` is given; ``TypeError`` unless it is a tensor.

    Args:
        model: f, with what :func:`replaced` has put into it.
        inputs: x.
        autocast: dtype for the pass.
        named: tensors to put in by the names of :func:`slots_of`, in code that torch.compile traces.
    """
    if autocast is not None:
        with torch.autocast(next(model.parameters()).device.type, dtype=autocast, cache_enabled=False):
            return forward(model, inputs, None, named).float()
    return check_output(functional_call(model, named, (inputs,), tie_weights=False) if named else model(inputs))


def slots_of(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every slot of the model that holds a parameter or a buffer, by one name, with what it holds.

    A tensor in two slots is there twice, and a module with two names once.
    """
    return [
        (f"{path}.{name}" if path else name, tensor)
        for path, module in model.named_modules()
        for store in (module._parameters, module._buffers)
        for name, tensor in store.items()
        if tensor is not None
    ]


@contextmanager
def differentiable_kernels(model: nn.Module) -> Iterator[None]:
    """Without the fused kernels for attention and recurrence, which lack forward mode and second derivatives."""
    cudnn, mkldnn, attention = torch.backends.cudnn, torch.backends.mkldnn, torch.backends.mha
    kept = {name: getattr(cudnn, name) for name in ("benchmark", "deterministic", "allow_tf32")}
    fast = attention.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.callback(attention.set_fastpath_enabled, fast)
        attention.set_fastpath_enabled(False)
        if any(isinstance(module, nn.RNNBase) for module in modules_of(model)):
            switched = mkldnn.flags(enabled=False)
            _quietly(switched.__enter__)
            stack.callback(_quietly, switched.__exit__, None, None, None)
            stack.enter_context(cudnn.flags(enabled=False, **kept))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def _quietly(function: Callable, *arguments: Any) -> None:
    """Without torch's word on TF32 at each switch of oneDNN."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TF32 acceleration")
        function(*arguments)


@contextmanager
def eval_mode(*modules: nn.Module) -> Iterator[None]:
    """Run a block with the modules in eval mode; every layer's own mode is put back."""
    with kept_modes(*modules):
        for module in modules:
            module.eval()
        yield


@contextmanager
def kept_modes(*modules: nn.Module) -> Iterator[None]:
    """Run a block that may switch the modules to train or eval mode; every layer's own mode is put back."""
    modes = [(layer, layer.training) for module in modules for layer in module.modules()]
    try:
        yield
    finally:
        for layer, training in modes:
            layer.training = training
