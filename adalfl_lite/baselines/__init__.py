"""Other losses, designed or learned, behind the interface of the loss network: (prediction, target) -> scalar.

    fixed       label smoothing, focal, polynomial, noise-robust and robust-regression losses
    dynamical   cross-entropy with class weights that rise and fall in turn
    newton      a Newton step in output space in the place of the gradient
    taylor      TaylorGLO: a polynomial whose coefficients are found by CMA-ES
    evomal      EvoMAL: expressions found by genetic programming, their weights by gradient

TaylorGLO and EvoMAL search with the packages ``cma`` and ``deap``: ``pip install 'adalfl-lite[methods]'``. Each module
states its source, its equation and its default budget. Every loss here is a method of :mod:`adalfl_lite.methods`.
"""

from adalfl_lite.baselines.dynamical import DynamicalLoss
from adalfl_lite.baselines.evomal import SymbolicLoss, points_downhill, search_symbolic
from adalfl_lite.baselines.fixed import FIXED, fixed_loss
from adalfl_lite.baselines.newton import NewtonLoss
from adalfl_lite.baselines.taylor import TaylorLoss, search_taylor

__all__ = [
    "FIXED",
    "DynamicalLoss",
    "NewtonLoss",
    "SymbolicLoss",
    "TaylorLoss",
    "fixed_loss",
    "points_downhill",
    "search_symbolic",
    "search_taylor",
]
