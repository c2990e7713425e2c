"""Online loss function learning: a small network is the loss, and it is learned while the model trains.

Read the modules in this order, which is also the direction of every import:

The method

    checks          what is refused, and in which words; files: either whole or absent
    passes          a model called with other tensors than its own, and put back; a step undone if it fails
    losses          the loss network M_φ, and the task losses
    closed_form     the derivatives of a loss network that learning it needs
    updates         torch's optimizers as pure functions, and their derivatives
    tangents        how the outputs move when the parameters move
    distributed     several processes that learn as one
    steps           what every step shares: what may be trained, batches in parts, gradients; the plain step
    metagradient    one step of the model and ∇_φ of what it led to, in forward mode
    unrolled        the same by double backward; compiled: the same as one compiled program
    online          Algorithm 2: the drop-in step
    initialisation  Algorithm 1
    learning_rate   Algorithms 3 and 4: the control that learns a learning rate

Training

    sources         where data comes from; data: as tensors, split; models: what is trained on it
    checkpoint      what tells one run from another, and how it is taken up again
    training        fit: history, evaluation
    stacking        several models, or loss networks, as one function; ensemble: several seeds, initialised and fitted

Comparing

    corruption      label noise and imbalance; augmentation: crops and flips; tasks: the registry
    baselines       other losses, designed or learned
    methods         how each loss is had: the table of what is compared; together: several seeds as one program
    experiments     methods over tasks and seeds
    cli             the command ``adalfl``

Predicting losses

    loss_prediction which examples will have a large loss; active_learning: and what to label next; keypoints: a task
"""

from adalfl_lite.data import load_dataset
from adalfl_lite.ensemble import fit_seeds, initialise_seeds
from adalfl_lite.initialisation import Initialisation, endless, initialise
from adalfl_lite.learning_rate import OnlineLearningRate
from adalfl_lite.losses import LossNetwork
from adalfl_lite.metagradient import MetaStep
from adalfl_lite.models import build_model
from adalfl_lite.online import OnlineLoss
from adalfl_lite.training import evaluate, fit

__version__ = "0.1.0"

__all__ = [
    "Initialisation",
    "LossNetwork",
    "MetaStep",
    "OnlineLearningRate",
    "OnlineLoss",
    "build_model",
    "endless",
    "evaluate",
    "fit",
    "fit_seeds",
    "initialise",
    "initialise_seeds",
    "load_dataset",
]
