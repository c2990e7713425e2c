"""Training.

Each imports those above it alone::

    evaluation  how good a model is on a split
    streams     the batches of a run
    checkpoint  what tells one run from another, and how it is taken up again
    loop        fit: history, evaluation, checkpoints, resume
"""

from adalfl_lite.train.evaluation import evaluate
from adalfl_lite.train.loop import fit

__all__ = ["evaluate", "fit"]
