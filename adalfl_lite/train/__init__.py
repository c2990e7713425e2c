"""Training.

Each imports those above it alone.

    evaluation  how good a model is on a split
    streams     the batches of a run
    checkpoint  what tells one run from another, and how it is taken up again
    loop        fit: history, evaluation, checkpoints, resume
    seeds       several seeds, initialised as one program
"""

from adalfl_lite.train.evaluation import evaluate
from adalfl_lite.train.loop import fit
from adalfl_lite.train.seeds import initialise_seeds

__all__ = ["evaluate", "fit", "initialise_seeds"]
