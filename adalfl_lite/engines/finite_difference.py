"""The engine "finite-difference": forward mode with one more forward pass in the place of the tangent pass.

u ≈ (f(θ + εw) − f(θ)) / ε is approximate, and cheaper where forward mode is slow. Everything else is
:mod:`~adalfl_lite.engines.forward`, the identity included, which is checked with a wider tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from adalfl_lite.engines.base import MetaStep, Problem
from adalfl_lite.engines.forward import forward_mode
from adalfl_lite.engines.recorded import ForwardPass, training_pass
from adalfl_lite.engines.steps import Batches, check_step, micro_batches, shares_of
from adalfl_lite.engines.tangents import Tangents
from adalfl_lite.passes import Attributes, Replacements, Undo, forward, replaced, unmarked


class FiniteDifference:
    """:class:`~adalfl_lite.engines.forward.Forward` with an approximate equation (2)."""

    def __init__(self, problem: Problem):
        self.problem = problem

    def __call__(self, batch: Batches, meta_batch: Batches, undo: Undo | None = None) -> MetaStep:
        """Take the step, and differentiate it: see :meth:`adalfl_lite.engines.base.Engine.__call__`."""
        problem, parts = self.problem, micro_batches(batch)
        with undo or Undo(problem.model, problem.optimizer) as undo:
            check_step(problem.model, problem.optimizer)
            training = (training_pass(problem.model, part, problem.autocast, math.inf) for part in parts)
            recorded = zip(shares_of(parts), training, strict=True)
            return forward_mode(
                problem, recorded, micro_batches(meta_batch), undo, tangent_of=_tangent, approximate=True
            )[0]


def _tangent(problem: Problem, training: ForwardPass, state: Mapping[int, Tensor], tangents: Tangents) -> Tensor:
    return finite_difference_tangent(
        problem.model, state, tangents, training.batch[0], problem.autocast, training.prediction, training.found
    )


def finite_difference_tangent(
    model: nn.Module,
    state: Replacements,
    tangents: Tangents,
    inputs: Tensor,
    autocast: torch.dtype | None,
    prediction: Tensor,
    attributes: Attributes | None = None,
) -> Tensor:
    """u ≈ (f(θ + εw) − f(θ)) / ε, (B, C), with f(θ) given as ``prediction``.

    Args:
        model: f, run in the mode it is in.
        state: buffers and parameters that stay, by the id of the model's own tensor.
        tangents: θ and w of each parameter that moves, by its id.
        inputs: x.
        autocast: dtype of the pass.
        prediction: f(θ), (B, C).
        attributes: of the modules, as they were before the pass that gave ``prediction``.

    The step ε = √δ (1 + ‖θ‖) / 10‖w‖ balances rounding, δ being the precision of the pass, against curvature and the
    kinks of ReLU and max pooling.
    """
    # lengths over all parameters that move, for one step size for all of them
    theta, w = (torch._foreach_norm([pair[i] for pair in tangents.values()]) for i in (0, 1))
    length = torch.stack(w).norm()
    # along nothing nothing moves, and ε would be infinite
    if length == 0:
        return torch.zeros_like(prediction)
    # rounding in f costs √δ/ε, curvature costs ε: the two meet near √δ
    precision = torch.finfo(autocast or prediction.dtype).eps
    epsilon = 0.1 * precision**0.5 * (1 + torch.stack(theta).norm()) / length
    moved = {key: theta + epsilon * w for key, (theta, w) in tangents.items()}
    # one forward pass at θ + εw, with the buffers and the dropout mask of the training pass
    with unmarked(model), replaced(model, {**state, **moved}):
        if attributes is not None:
            attributes.restore()
        return (forward(model, inputs, autocast) - prediction) / epsilon
