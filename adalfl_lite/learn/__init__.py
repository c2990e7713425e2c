"""Learning: a loss or a learning rate, before training and during it.

Each imports those above it alone::

    base            what trains a model: one that learns nothing beside it, and what all have in common
    online          Algorithm 2: the drop-in step with a loss that is learned
    learning_rate   Algorithm 4: the control that learns a learning rate
    stacked         several learners as one program
    imitation       a loss network fitted to a task loss
    meta_learning   the loop of Algorithms 1 and 3: its settings, rollouts and rehearsals
    initialisation  Algorithm 1: a loss before training, of one seed or of several; and Algorithm 3, a rate
"""

from adalfl_lite.learn.base import Learner, Plain
from adalfl_lite.learn.imitation import imitate
from adalfl_lite.learn.initialisation import initialise, initialise_learning_rate, initialise_seeds
from adalfl_lite.learn.learning_rate import LearningRate, OnlineLearningRate
from adalfl_lite.learn.meta_learning import Initialisation, Initialiser, endless
from adalfl_lite.learn.online import OnlineLoss
from adalfl_lite.learn.stacked import Stacked

__all__ = [
    "Initialisation",
    "Initialiser",
    "Learner",
    "LearningRate",
    "OnlineLearningRate",
    "OnlineLoss",
    "Plain",
    "Stacked",
    "endless",
    "imitate",
    "initialise",
    "initialise_learning_rate",
    "initialise_seeds",
]
