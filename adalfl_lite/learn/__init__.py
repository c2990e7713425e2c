"""Learning: a loss or a learning rate, before training and during it.

Each imports those above it alone.

    online          Algorithm 2: the drop-in step with a loss that is learned
    initialisation  Algorithm 1: a loss before training
    learning_rate   Algorithms 3 and 4: the control that learns a learning rate
"""

from adalfl_lite.learn.initialisation import Initialisation, endless, imitate, initialise
from adalfl_lite.learn.learning_rate import LearningRate, OnlineLearningRate, initialise_learning_rate
from adalfl_lite.learn.online import OnlineLoss

__all__ = [
    "Initialisation",
    "LearningRate",
    "OnlineLearningRate",
    "OnlineLoss",
    "endless",
    "imitate",
    "initialise",
    "initialise_learning_rate",
]
