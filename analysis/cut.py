"""A model cut in two at the output of one of its layers: the part below it, and the part above."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Output = Callable[..., Tensor]
"""A model as a function of its inputs, (N, ...) -> (N, C)."""


class Cut:
    """A model cut in two at the output of a layer, which it calls once."""

    def __init__(self, f: Output, module: nn.Module):
        """Cut f, a function that runs the model, at the output of ``module``, one of the model's own."""
        self.f, self.module = f, module

    def below(self, x: Tensor) -> Tensor:
        """The layer's output at x, as it is before anything after it may change it in place."""
        return self._run(x, None)[1].detach()

    def above(self, hidden: Tensor, x: Tensor) -> Tensor:
        """The model's output at x, with ``hidden`` for what the layer gives."""
        return self._run(x, hidden)[0]

    def _run(self, x: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []

        # What a forward hook returns takes the place of the output. Clones, because the layer after this one may work
        # in place, as ReLU(inplace=True) does, and would change what is kept here, or a leaf of the caller's.
        def hook(_: nn.Module, arguments: object, output: Tensor) -> Tensor | None:
            seen.append(output.clone())
            return None if hidden is None else hidden.clone()

        handle = self.module.register_forward_hook(hook)
        try:
            return self.f(x), seen[0]
        finally:
            handle.remove()


def find_layer(f: Output, model: nn.Module, name: str, example: Tensor) -> nn.Module:
    """The module of that name, which f must call once and which must return a floating tensor."""
    known = dict(model.named_modules(remove_duplicate=False))
    if name not in known:
        raise ValueError(f"the model has no layer {name!r}; it has {', '.join(filter(None, known))}")
    seen: list[object] = []

    def hook(module: nn.Module, arguments: object, output: object) -> None:
        seen.append(output)

    handle = known[name].register_forward_hook(hook)
    try:
        with torch.no_grad():
            f(example)
    finally:
        handle.remove()
    if len(seen) != 1 or not (isinstance(seen[0], Tensor) and seen[0].is_floating_point()):
        found = f"is called {len(seen)} times" if len(seen) != 1 else f"returns {type(seen[0]).__name__}"
        raise ValueError(f"a layer to explain must be called once and return one tensor, but {name!r} {found}")
    return known[name]
