"""Losses: what is minimised, all called as (prediction, target) -> scalar.

Each imports those above it alone::

    task         the task losses L_T, and what predictions and targets must look like
    activations  of a loss network, with their derivatives
    stored       a loss that can be kept in a file
    network      the loss network M_φ
    fixed        label smoothing, focal, polynomial, noise-robust and robust-regression losses
    dynamical    cross-entropy with class weights that rise and fall in turn
    newton       a Newton step in output space in the place of the gradient
    taylor       TaylorGLO: a polynomial whose coefficients are found by CMA-ES
    symbolic     EvoMAL: expressions found by genetic programming, their weights by gradient

TaylorGLO and EvoMAL search with the packages ``cma`` and ``deap``: ``pip install 'adalfl-lite[methods]'``. Each module
states its source, its equation and its default budget.
"""

from adalfl_lite.losses.activations import SmoothLeakyReLU
from adalfl_lite.losses.dynamical import DynamicalLoss
from adalfl_lite.losses.fixed import FIXED, fixed_loss
from adalfl_lite.losses.network import LossNetwork
from adalfl_lite.losses.newton import NewtonLoss
from adalfl_lite.losses.stored import StoredLoss
from adalfl_lite.losses.symbolic import SymbolicLoss, points_downhill, search_symbolic
from adalfl_lite.losses.task import KINDS, Loss, task_error, task_loss
from adalfl_lite.losses.taylor import TaylorLoss, search_taylor

__all__ = [
    "FIXED",
    "KINDS",
    "DynamicalLoss",
    "Loss",
    "LossNetwork",
    "NewtonLoss",
    "SmoothLeakyReLU",
    "StoredLoss",
    "SymbolicLoss",
    "TaylorLoss",
    "fixed_loss",
    "points_downhill",
    "search_symbolic",
    "search_taylor",
    "task_error",
    "task_loss",
]
