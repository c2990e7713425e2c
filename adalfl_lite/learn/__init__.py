"""Learning: a loss or a learning rate, before training and during it.

Each imports those above it alone.

    base            what trains a model: one that learns nothing beside it, and what all have in common
    online          Algorithm 2: the drop-in step with a loss that is learned
    initialisation  Algorithm 1: a loss before training
    learning_rate   Algorithms 3 and 4: the control that learns a learning rate
    stacked         several learners as one program
"""

from adalfl_lite.learn.base import Learner, Plain
from adalfl_lite.learn.initialisation import Initialisation, endless, imitate, initialise
from adalfl_lite.learn.learning_rate import LearningRate, OnlineLearningRate, initialise_learning_rate
from adalfl_lite.learn.online import OnlineLoss
from adalfl_lite.learn.stacked import Stacked

__all__ = [
    "Initialisation",
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
]
