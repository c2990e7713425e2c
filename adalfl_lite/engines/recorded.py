"""The forward passes of a step, recorded: with their graph, and with what it takes to repeat or to count them later."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from adalfl_lite.engines.steps import CHANGED, Batch
from adalfl_lite.engines.tangents import LayerOutputs
from adalfl_lite.losses.task import Loss
from adalfl_lite.passes import (
    Attributes,
    Buffers,
    RandomState,
    buffers_of,
    clones,
    forward,
    parameters_of,
    replaced,
    same_values,
    unmarked,
    write,
)


@dataclass(frozen=True)
class ForwardPass:
    """A forward pass with its graph, and what it takes to repeat it, or to let it count later."""

    batch: Batch
    prediction: Tensor
    buffers: Buffers
    """The model's buffers before the pass."""
    random: RandomState
    """The random state before the pass."""
    new_random: RandomState
    """And after it."""
    found: Attributes
    """The modules' attributes before the pass."""
    outputs: LayerOutputs = field(repr=False)
    """What its layers gave, as far as it was kept."""
    new_buffers: dict[int, Tensor] = field(default_factory=dict)
    """What the pass made of the buffers; empty if it changed the model's own."""
    attributes: Attributes | None = None
    """What it made of the modules' attributes; None if it changed the model's own."""
    circumstances: list[Any] = field(default_factory=list)
    """All that the pass depended on, and copies of its tensors."""

    def fits(self, model: nn.Module, batch: Batch) -> bool:
        """Whether a training pass over ``batch`` would repeat this pass."""
        # the very tensors: equal values could come from another batch that will be changed
        if any(ours is not theirs for ours, theirs in zip(self.batch, batch, strict=True)):
            return False
        # version counters see in-place changes, copies those by way of .data or numpy
        tensors, copies, *rest = self.circumstances
        now, _, *rest_now = _circumstances(model, batch, copy=False)
        if rest != rest_now or len(now) != len(tensors) or any(a is not b for a, b in zip(now, tensors, strict=True)):
            return False
        # a pass that drew numbers counts only if the next pass would draw the same
        if self.random != self.new_random and self.random != RandomState(model):  # it would draw other numbers now
            return False
        return same_values(now, copies)  # also what was changed by way of .data or numpy


def training_pass(model: nn.Module, batch: Batch, autocast: torch.dtype | None, fan_in: float) -> ForwardPass:
    """f(x) as in plain training: buffers, attributes and random state move on."""
    # what the pass starts from, noted before it changes any of it
    random, buffers, found, parameters = RandomState(model), Buffers(model), Attributes(model), parameters_of(model)
    versions = [parameter._version for parameter in parameters]
    with LayerOutputs(fan_in) as outputs:
        prediction = forward(model, batch[0], autocast)
    # a model that writes to its own parameters has no well-defined gradient step
    if [parameter._version for parameter in parameters] != versions:
        raise ValueError(CHANGED)
    return ForwardPass(batch, own(prediction), buffers, random, RandomState(model), found, outputs)


def own(prediction: Tensor) -> Tensor:
    """The prediction, cloned where it may be a view of a parameter, which will move."""
    return prediction.clone() if prediction._is_view() or prediction.is_leaf else prediction


def meta_pass(
    model: nn.Module,
    buffers: Buffers,
    batch: Batch,
    task_loss: Loss,
    parameters: list[Tensor],
    autocast: torch.dtype | None,
    keep: bool = False,
) -> tuple[ForwardPass, Tensor, list[Tensor]]:
    """f(x) on copies of the buffers, L_T and its gradient; the caller restores the random state.

    The backward pass is taken before the model has its own buffers back, since a checkpoint passes through it again.
    """
    random, found, new_buffers = RandomState(model), Attributes(model), buffers.fresh()
    # on copies: the meta batch must leave BatchNorm and counters as the training batch left them
    with unmarked(model), replaced(model, new_buffers):
        with LayerOutputs(0 if keep else math.inf) as outputs:
            prediction = own(forward(model, batch[0], autocast))
        attributes = Attributes(model) if keep else None
        loss = task_loss(prediction, batch[1])
        v: list[Tensor] = []
        if parameters:
            v += torch.autograd.grad(loss, parameters, retain_graph=keep, allow_unused=True, materialize_grads=True)
    states = (buffers, random, RandomState(model), found, outputs, new_buffers, attributes)
    circumstances = _circumstances(model, batch) if keep else []
    return ForwardPass(batch, prediction, *states, circumstances), loss.detach(), v


def taken_up(model: nn.Module, kept: ForwardPass) -> ForwardPass:
    """Let a meta pass count as the training pass: buffers, attributes and the random state move on as it left them."""
    with torch.no_grad():
        for buffer in buffers_of(model):
            write(buffer, kept.new_buffers[id(buffer)])
    if kept.attributes is not None:
        kept.attributes.restore()
    # nothing to replay
    if kept.random == kept.new_random:  # the pass draws no numbers; whoever has drawn some since may keep them
        now = RandomState(model)
        return replace(kept, random=now, new_random=now)
    kept.new_random.restore()
    return kept


def _circumstances(model: nn.Module, batch: Batch, copy: bool = True) -> list[Any]:
    """The tensors that a pass depends on, copies of them, how often they changed in place, and modules' attributes."""
    tensors = [batch[0], *parameters_of(model), *buffers_of(model)]
    return [
        tensors,
        clones(tensors) if copy else [],
        [(t._version, t.requires_grad) for t in tensors],
        Attributes(model),
    ]
