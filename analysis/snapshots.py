"""What a module is made of, noted so that it can be put back, or exchanged for a while.

A model belongs to whoever built it, and may hold what cannot be copied: a feature map with its graph, a lock, an open
file. So nothing is copied here but the references that a module holds, and on request the values of its tensors.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

CONTAINERS = (dict, list, set, deque)


class Snapshot:
    """The attributes of a module and of all modules in it, with the contents of their dictionaries, lists and sets.

    These hold everything that a module consists of: slots of parameters and buffers, submodules, hooks, modes, plain
    attributes. Modules in a plain list, which torch does not list as submodules, are found too. What other objects
    hold inside, a queue or a logger for example, is not seen.

    Args:
        root: a module; of a scripted one only the tensors are seen.
        values: note the values, ``requires_grad`` and ``grad`` of all tensors too.

    Attributes:
        modules: every module once.
        tensors: every tensor once that a module holds, in a slot or as a plain attribute.
        buffers: those that are in the slot of a buffer.
    """

    def __init__(self, root: nn.Module, values: bool = False):
        self.modules: list[nn.Module] = []
        self.tensors: list[Tensor] = []
        self.buffers: list[Tensor] = []
        self._contents: list[tuple[Any, Any]] = []
        self._modes: list[tuple[nn.Module, bool]] = []
        self._seen: set[int] = set()
        self._look_at(root)
        self._values = [_value(tensor) for tensor in self.tensors] if values else []

    def _look_at(self, root: object) -> None:
        waiting = [root]
        while waiting:
            found = waiting.pop()
            if not isinstance(found, (nn.Module, Tensor, *CONTAINERS, tuple)) or id(found) in self._seen:
                continue
            self._seen.add(id(found))
            if isinstance(found, Tensor):
                self.tensors.append(found)
            elif isinstance(found, torch.jit.ScriptModule):
                self.modules.append(found)
                self._modes += [(module, module.training) for module in found.modules()]
                waiting += [*found.parameters(), *found.buffers()]
            elif isinstance(found, nn.Module):
                self.modules.append(found)
                self.buffers += [buffer for buffer in found._buffers.values() if buffer is not None]
                waiting.append(vars(found))
            else:
                if not isinstance(found, tuple):
                    self._contents.append((found, found.copy()))
                waiting += list(found.values() if isinstance(found, dict) else found)

    def exchange(self, tensors: Mapping[int, Tensor]) -> None:
        """Put other tensors wherever those of the given ``id`` are held; :meth:`restore` undoes it."""
        for container, content in self._contents:
            if isinstance(container, dict | list | deque):
                pairs = content.items() if isinstance(content, dict) else enumerate(content)
                for key, value in pairs:
                    if id(value) in tensors:
                        container[key] = tensors[id(value)]

    def restore(self) -> None:
        """Put back every reference, and the values if they were noted. What has not changed is not touched."""
        for container, content in self._contents:
            # compared by identity, for == of tensors is a tensor; dictionaries in order, which is that of the layers
            if _identities(container) != _identities(content):
                container.clear()
                container.extend(content) if isinstance(container, list | deque) else container.update(content)
        for module, mode in self._modes:
            module.training = mode
        for tensor, value, data, requires_grad, grad in self._values:
            # model.double() or .to(device) swaps what a tensor holds and keeps the tensor: put back the old storage
            if (tensor.dtype, tensor.shape, tensor.device) != (value.dtype, value.shape, value.device):
                tensor.data = data
            # only where needed: a copy raises the tensor's version, and graphs that wait for a backward pass would fail
            if not _same_values(tensor, value):
                with torch.no_grad():
                    tensor.copy_(value)
            if tensor.is_leaf:
                if tensor.requires_grad != requires_grad:
                    tensor.requires_grad_(requires_grad)
                tensor.grad = grad

    def forget_gradients(self) -> None:
        """Leave no tensor a ``grad`` to be added to; :meth:`restore` puts it back if values were noted."""
        for tensor in self.tensors:
            if tensor.is_leaf:
                tensor.grad = None


def _value(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor, bool, Tensor | None]:
    grad = tensor.grad if tensor.is_leaf else None
    return tensor, tensor.detach().clone(), tensor.detach(), tensor.requires_grad, grad


def _identities(container: Any) -> list[int] | list[tuple[int, int]]:
    """What a container holds, in order."""
    if isinstance(container, dict):
        return [(id(key), id(value)) for key, value in container.items()]
    return [id(value) for value in container]


def modules_behind(function: Callable) -> Iterator[nn.Module]:
    """A module itself; or those that a function is a method of, is a ``partial`` of, or has in its closure."""
    if isinstance(function, nn.Module):
        yield function
        return
    inner = inspect.unwrap(function)
    parts = [getattr(inner, "__self__", None), getattr(inner, "func", None), *(getattr(inner, "args", None) or ())]
    for cell in getattr(inner, "__closure__", None) or ():
        try:
            parts.append(cell.cell_contents)
        except ValueError:  # a name that has not been given a value yet
            continue
    for part in parts:
        if isinstance(part, nn.Module):
            yield part


def _same_values(tensor: Tensor, value: Tensor) -> bool:
    """Whether both hold the same numbers, NaN where NaN is; False where torch cannot compare them."""
    if tensor.is_meta:
        return True
    if tensor.layout is not torch.strided:
        return False
    return torch.equal(tensor, value) or bool((torch.eq(tensor, value) | (tensor.isnan() & value.isnan())).all())
