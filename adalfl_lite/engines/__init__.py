"""Engines: one step of a model with a learned loss, and the derivative of what it led to by the loss's weights.

Each imports those above it alone.

    updates      torch's optimizers as pure functions, and their derivatives
    closed_form  the derivatives of a loss network that learning it needs
    tangents     how the outputs move when the parameters move
    distributed  several processes that learn as one
    steps        what every step shares: what may be trained, batches in parts, gradients; the plain step
    forward      forward mode: exact, without a second derivative of the model
    unrolled     double backward, the reference
    compiled     forward mode as one compiled program
    stacked      forward mode for several models at once
"""

from adalfl_lite.engines.forward import MetaStep
from adalfl_lite.engines.steps import plain_step

__all__ = ["MetaStep", "plain_step"]
