"""What every step of training shares: what may be trained, batches in parts, gradients; and the plain step.

A batch may come as a list of micro batches: a step is then that on their union (where no layer mixes the examples of a
batch), weighted by their lengths, and takes the memory of one of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adalfl_lite.checks import check_finite, check_scalar, check_trainable
from adalfl_lite.engines.tangents import check_embedding
from adalfl_lite.engines.updates import (
    Clipping,
    Pullback,
    changes_gradients,
    check_differentiable,
    check_no_gradient,
    check_no_hooks,
    update_pullback,
)
from adalfl_lite.losses.task import Loss
from adalfl_lite.passes import forward, optimizer_parameters

Batch = tuple[Tensor, Tensor]

Batches = Batch | Sequence[Batch]  # a batch, or a list of micro batches

NO_CLIPPING = Clipping()


def plain_step(
    model: nn.Module,
    loss: Loss,
    optimizer: Optimizer,
    batch: Batches,
    *,
    clipping: Clipping = NO_CLIPPING,
    autocast: torch.dtype | None = None,
) -> Tensor:
    """An ordinary training step with a fixed loss, handcrafted or learned; returns that loss before the step.

    Nothing but the optimizer's parameters gets a gradient: a learned loss is not differentiated by φ. A loss that
    changes while it is trained with has a method ``advance``, which is called after the step.
    """
    value = plain_gradients(model, loss, optimizer, batch, clipping=clipping, autocast=autocast)
    optimizer.step()
    advance(loss)
    return value


def advance(loss: object) -> None:
    """Tell a loss that changes while it is trained with that a step has been taken: call its ``advance``, if any."""
    if method := getattr(loss, "advance", None):
        method()


def plain_gradients(
    model: nn.Module,
    loss: Loss,
    optimizer: Optimizer,
    batch: Batches,
    *,
    clipping: Clipping = NO_CLIPPING,
    autocast: torch.dtype | None = None,
) -> Tensor:
    """The first half of :func:`plain_step`, up to the ``.grad`` of the optimizer's parameters; returns the loss."""
    # gradients add up over the micro batches below, from nothing
    optimizer.zero_grad()
    parameters = optimizer_parameters(optimizer)
    parts = micro_batches(batch)
    losses = []
    for share, (inputs, targets) in zip(shares_of(parts), parts, strict=True):
        value = loss(forward(model, inputs, autocast), targets)
        check_scalar(value)
        # each part counts by its share of the examples, so the sum is the mean over all of them
        backward(weighted(share, [value])[0], parameters)
        losses.append((share, value.detach()))
    if clipping != NO_CLIPPING:
        for parameter, gradient in zip(parameters, clipping([p.grad for p in parameters]), strict=True):
            parameter.grad = gradient
    return total(losses)


WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}
"""Classes of torch.distributed, by name, for to import them all takes long."""


def check_model(model: nn.Module) -> None:
    """Raise ``ValueError`` for a model that no engine serves, as far as its modules show it."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            check_embedding(name, vars(module))
        if WRAPPERS & {base.__name__ for base in type(module).__mro__}:
            raise ValueError(
                f"{type(module).__name__} averages gradients by hooks, which the meta-gradient would not see; give the"
                " model itself, and process_group="
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError("a scripted model does not let its parameters be replaced; give the one it was made from")


def check_apart(model: nn.Module, optimizer: Optimizer) -> None:
    """Raise ``ValueError`` if two parameters share memory: each step of one would be a step of the other, too."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    spans = []
    for parameter in optimizer_parameters(optimizer):
        if parameter.numel() and parameter.device.type != "meta":
            extent = sum((n - 1) * abs(s) for n, s in zip(parameter.shape, parameter.stride(), strict=True)) + 1
            start = parameter.storage_offset()
            storage = parameter.untyped_storage().data_ptr()
            spans.append((storage, start, start + extent, names.get(id(parameter), "a parameter")))
    # two parameters overlap if one begins before the one before it in the same storage has ended
    spans.sort()
    for (storage, _, end, first), (other, start, _, second) in itertools.pairwise(spans):
        if storage == other and start < end:
            raise ValueError(
                f"{first!r} and {second!r} share memory; use one Parameter in both places, or make one of them"
                " nn.Parameter(other.detach().clone()), before building the optimizer"
            )


def check_step(model: nn.Module, optimizer: Optimizer, gradients: bool = True) -> None:
    """Raise unless this optimizer can take a differentiable step of this model now.

    Args:
        model, optimizer: see :class:`~adalfl_lite.engines.base.Problem`.
        gradients: look for a ``.grad`` that is there already, too.

    Raises:
        TypeError: the optimizer's update is not differentiable.
        ValueError: the optimizer holds a parameter that is not the model's, or none that requires a gradient; a hook or
            a ``.grad`` would change the gradient unseen.
        RuntimeError: gradients are switched off.
    """
    check_differentiable(optimizer)
    check_trainable(model, optimizer)
    if gradients:
        check_no_gradient(optimizer)
    check_no_hooks(optimizer)


def micro_batches(batch: Batches) -> list[Batch]:
    """The parts of a batch: the pairs of a list of pairs, or the batch alone."""
    several = isinstance(batch, tuple | list) and len(batch) and all(isinstance(part, tuple | list) for part in batch)
    return list(batch) if several else [batch]  # type: ignore[arg-type, list-item]


def shares_of(parts: Sequence[Batch]) -> list[float]:
    """What part of all examples is in each micro batch."""
    counts = [len(targets) for _, targets in parts]
    return [count / sum(counts) for count in counts]


def weighted(share: float, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor times a share; the tensors themselves where it is 1."""
    return list(tensors) if share == 1 else [share * tensor for tensor in tensors]


def add(sums: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """The sums with another term; the term itself where there are none yet."""
    return [a + b for a, b in zip(sums, tensors, strict=True)] if sums else tensors


def total(losses: Sequence[tuple[float, Tensor]]) -> Tensor:
    """The mean loss of a batch from the shares and the losses of its parts."""
    first, *rest = [weighted(share, [loss])[0] for share, loss in losses]
    return sum(rest, first)


def joined(rows: Sequence[Tensor]) -> Tensor:
    """The rows of all parts."""
    return rows[0] if len(rows) == 1 else torch.cat(list(rows))


def gradients_of(output: Tensor, parameters: Sequence[Tensor], **options: Any) -> list[Tensor | None]:
    """Gradients of ``output``; None where it does not depend on a parameter or the parameter is frozen."""
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    found = iter(torch.autograd.grad(output, wanted, allow_unused=True, **options))
    return [next(found) if parameter.requires_grad else None for parameter in parameters]


def backward(output: Tensor, parameters: Sequence[Tensor], slope: Tensor | None = None) -> None:
    """Add to the ``.grad`` of the parameters that require one, and of nothing else."""
    try:
        output.backward(slope, inputs=[parameter for parameter in parameters if parameter.requires_grad])
    except RuntimeError as error:
        # torch says so only here, in the middle of the pass
        if "use_reentrant=True" not in str(error):
            raise
        raise ValueError(REENTRANT) from error


def apply_gradients(optimizer: Optimizer, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """One step of the optimizer with these gradients, which do not stay."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    for parameter in parameters:
        parameter.grad = None


def take_step(
    optimizer: Optimizer,
    parameters: Sequence[Tensor],
    reached: Sequence[int],
    gradients: Sequence[Tensor],
    clipping: Clipping,
) -> Pullback:
    """θ' = U(θ, clipped g), and the pullback v ↦ (∂θ'/∂g)ᵀ v, taken while the optimizer's state is the old one.

    Args:
        optimizer: takes the step.
        parameters: all that it holds.
        reached: which of them have a gradient.
        gradients: g of those, in their order; left as they are.
        clipping: of g, before the optimizer has it.
    """
    # None where the loss does not reach a parameter: optimizers skip it, and so do its momenta
    clipped: list[Tensor | None] = [None] * len(parameters)
    for i, gradient in zip(reached, clipping(gradients), strict=True):
        clipped[i] = gradient
    # the chain θ' = U(θ, clip(g)): both derivatives at the point where they are taken
    pullback, unclip = update_pullback(optimizer, clipped), clipping.pullback(gradients)
    if changes_gradients(optimizer):
        # foreach SGD writes into the gradients it is given; g itself is needed for the identity later
        clipped = [None if g is None else g.clone() for g in clipped]
    apply_gradients(optimizer, parameters, clipped)
    # and pulled back in the other order
    return lambda vectors: unclip(pullback(vectors))


def check_autocast(autocast: torch.dtype | None) -> None:
    """Raise ``ValueError`` unless this is None or a dtype of 16 bits that torch can autocast to."""
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"autocast must be torch.bfloat16 or torch.float16, got {autocast}; leave it out for neither")


def check_early(training_loss: Tensor, model: nn.Module) -> None:
    """Before θ moves: raise if the loss is not finite.

    A GPU would have to be waited for; there a loss that is not finite is seen after the step, by ``OnlineLoss``.
    """
    if training_loss.device.type == "cpu" and not torch.isfinite(training_loss):
        check_finite({"learned loss": training_loss}, model)


REENTRANT = (
    "a checkpoint with use_reentrant=True cannot be differentiated for some weights alone; use use_reentrant=False"
)

CHANGED = "the model changes its parameters in place in its forward pass; do that between the steps"
