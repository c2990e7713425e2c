"""Engines: one step of a model with a learned loss, and the derivative of what it led to by the loss's weights.

Each imports those above it alone::

    updates            torch's optimizers as pure functions, and their derivatives
    closed_form        the derivatives of a loss network that learning it needs
    tangents           how the outputs move when the parameters move
    distributed        several processes that learn as one
    steps              what every step shares: what may be trained, batches in parts, gradients; the plain step
    base               what every engine is given and gives
    recorded           the forward passes of a step, kept to be repeated or to count later
    forward            forward mode: exact, without a second derivative of the model
    shared             the same where the meta batch is the next training batch: a forward pass less
    finite_difference  the same with one more forward pass for the tangent pass: approximate
    unrolled           double backward through one step or several: the reference
    compiled           forward mode as one compiled program
    stacked            forward mode for several models at once
"""

from adalfl_lite.engines.base import Engine, MetaStep, Problem
from adalfl_lite.engines.finite_difference import FiniteDifference
from adalfl_lite.engines.forward import Forward
from adalfl_lite.engines.shared import Shared
from adalfl_lite.engines.steps import plain_step
from adalfl_lite.engines.unrolled import Unrolled

ENGINES: dict[str, type[Engine]] = {
    "forward": Forward,
    "shared": Shared,
    "finite-difference": FiniteDifference,
    "unrolled": Unrolled,
}
"""By the names that :class:`~adalfl_lite.learn.OnlineLoss` takes; yours is one more line."""

EXACT = ("forward", "shared", "unrolled")
"""They give the same numbers, to rounding: a run may be taken up again with another of them."""

__all__ = ["ENGINES", "EXACT", "Engine", "MetaStep", "Problem", "plain_step"]
