"""Training.

Each imports those above it alone.

    evaluation  how good a model is on a split
    checkpoint  what tells one run from another, and how it is taken up again
    loop        fit: history, evaluation, checkpoints, resume
    seeds       several seeds, initialised and fitted as one program
"""

from adalfl_lite.train.evaluation import evaluate
from adalfl_lite.train.loop import fit
from adalfl_lite.train.seeds import fit_seeds, initialise_seeds

__all__ = ["evaluate", "fit", "fit_seeds", "initialise_seeds"]
