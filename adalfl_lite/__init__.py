"""Online loss function learning: a small network is the loss, and it is learned while the model trains.

Every import goes up this list, from a folder or a file to those above it::

    checks      what is refused, and in which words
    files       either whole or absent
    provenance  what a result depends on
    passes      a model called with other tensors than its own, and put back; a step undone if it fails
    losses      what is minimised: the loss network M_φ, the task losses, and others, designed or searched for
    engines     one step of a model, and ∇_φ of what it led to: one engine a file
    data        data sets, and what spoils them
    models      what is trained on them
    learn       a loss or a learning rate, before training (Algorithms 1 and 3) and during it (2 and 4)
    train       fit: history, evaluation, checkpoints
    compare     methods over tasks and seeds
    predict     which examples will have a large loss
    cli         the command ``adalfl``
"""

from adalfl_lite.data.dataset import load_dataset
from adalfl_lite.engines.base import MetaStep
from adalfl_lite.learn.base import Learner, Plain
from adalfl_lite.learn.initialisation import initialise, initialise_seeds
from adalfl_lite.learn.learning_rate import OnlineLearningRate
from adalfl_lite.learn.meta_learning import Initialisation, Initialiser, endless
from adalfl_lite.learn.online import OnlineLoss
from adalfl_lite.learn.stacked import Stacked
from adalfl_lite.losses.network import LossNetwork
from adalfl_lite.models import build_model
from adalfl_lite.train.evaluation import evaluate
from adalfl_lite.train.loop import fit

__version__ = "0.1.0"

__all__ = [
    "Initialisation",
    "Initialiser",
    "Learner",
    "LossNetwork",
    "MetaStep",
    "OnlineLearningRate",
    "OnlineLoss",
    "Plain",
    "Stacked",
    "build_model",
    "endless",
    "evaluate",
    "fit",
    "initialise",
    "initialise_seeds",
    "load_dataset",
]
