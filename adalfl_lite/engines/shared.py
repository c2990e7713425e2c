"""The engine "shared": the meta batch of a step is the training batch of the next one.

The forward pass that gives v = ∇_θ' L_T is then the next step's training pass, kept until φ is known, with the outputs
of all its layers: the numbers of :mod:`~adalfl_lite.engines.forward`, one forward pass less.
"""

from __future__ import annotations

from adalfl_lite.engines.base import MetaStep, Problem
from adalfl_lite.engines.forward import forward_mode
from adalfl_lite.engines.recorded import ForwardPass, taken_up, training_pass
from adalfl_lite.engines.steps import Batches, check_step, micro_batches
from adalfl_lite.passes import Undo


class Shared:
    """:class:`~adalfl_lite.engines.forward.Forward` that keeps its last meta pass for the next step.

    The pass is used if the next call's ``batch`` is this call's ``meta_batch``, the same two tensors, and neither they
    nor the model have changed; otherwise it is dropped and the batch passes through the model again. So the result is
    the same in every case; only the time differs.
    """

    def __init__(self, problem: Problem):
        self.problem = problem
        self.kept: ForwardPass | None = None

    def __getstate__(self) -> dict:
        """All but the kept pass, whose graph cannot be copied."""
        return {**vars(self), "kept": None}

    def __call__(self, batch: Batches, meta_batch: Batches, undo: Undo | None = None) -> MetaStep:
        """The step, see :class:`~adalfl_lite.engines.base.Engine`; refuses micro batches."""
        model, optimizer = self.problem.model, self.problem.optimizer
        kept, self.kept = self.kept, None  # not to be used twice, should this step fail
        if len(micro_batches(batch)) + len(micro_batches(meta_batch)) != 2:
            raise ValueError("engine='shared' takes one batch at a time; for micro batches use engine='forward'")
        (first,), (second,) = micro_batches(batch), micro_batches(meta_batch)
        with undo or Undo(model, optimizer) as undo:
            check_step(model, optimizer)
            if kept is not None and kept.fits(model, first):
                training = taken_up(model, kept)
            else:
                training = training_pass(model, first, self.problem.autocast, fan_in=0)  # keeps all layers' outputs
            # the pass over the meta batch is kept with its graph, for the next step's backward pass
            result, self.kept = forward_mode(self.problem, iter([(1.0, training)]), [second], undo, keep=True)
            return result
