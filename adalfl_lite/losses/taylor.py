"""TaylorGLO: a loss that is a third-order polynomial, its eight coefficients found by CMA-ES.

Gonzalez and Miikkulainen (2021), "Optimizing loss functions through multivariate Taylor polynomial parameterization".
Gao et al. (2021) evolve such losses for robustness to label noise: here, the same search on a task with
``label_noise``, though its validation labels are noisy too. Robust in the sense of Ghosh et al. (2017) are the members
whose sum over all labels does not depend on the prediction, such as −1/(B·C) Σ_b p_{y_b}: θ_5 = 1, all others zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from adalfl_lite.losses.stored import StoredLoss
from adalfl_lite.losses.task import check_kind, output_pairs

GENERATIONS, POPULATION, SPREAD = 15, 8, 1.0
"""Our default budget: 120 short trainings. The paper's, for image tasks, is larger."""


class TaylorLoss(StoredLoss):
    """The polynomial loss, with y the target, p the prediction and coefficients θ_0 ... θ_7,

        M_θ = −1/(B·C) Σ_b Σ_c [ θ_2 d + ½ θ_3 d² + ⅙ θ_4 d³ + θ_5 e d + ½ θ_6 e d² + ½ θ_7 e² d ],    (1)
        d = p − θ_1,    e = y − θ_0.

    The expansion's terms in y alone are left out: they have no gradient.

    Args:
        kind: "classification" (p a softmax probability, y one-hot) or "regression".
        coefficients: θ, eight numbers; zeros by default.
    """

    format = "adalfl-taylor-loss-1"
    what = "Taylor loss"

    def __init__(self, kind: str, coefficients: Tensor | None = None):
        super().__init__()
        self.kind, self.config = check_kind(kind), {"kind": kind}
        values = torch.zeros(8) if coefficients is None else torch.as_tensor(coefficients, dtype=torch.float32)
        if values.shape != (8,):
            raise ValueError(f"a third-order Taylor loss has 8 coefficients, got shape {tuple(values.shape)}")
        self.coefficients = nn.Parameter(values.clone())

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """M_θ of a batch, a scalar."""
        p, y = output_pairs(self.kind, prediction, target, self.coefficients.dtype)
        t = self.coefficients
        # equation (1): the terms in d alone, then those in e and d
        d, e = p - t[1], y - t[0]
        in_p = t[2] * d + t[3] * d**2 / 2 + t[4] * d**3 / 6
        mixed = t[5] * e * d + t[6] * e * d**2 / 2 + t[7] * e**2 * d / 2
        return -(in_p + mixed).mean()


def search_taylor(
    kind: str,
    score: Callable[[nn.Module], float],
    *,
    generations: int = GENERATIONS,
    population: int = POPULATION,
    seed: int = 0,
) -> TaylorLoss:
    """The coefficients with the lowest score that CMA-ES (package ``cma``) finds, beginning at zero.

    Args:
        kind: of the task.
        score: what to minimise, such as the validation error after a training with the loss; infinite is allowed.
        generations, population: score is called so many times each.
        seed: of CMA-ES.

    Raises:
        ImportError: ``cma`` is not installed.
        FloatingPointError: every candidate scored infinite.
    """
    import cma

    worst = 1e12
    strategy = cma.CMAEvolutionStrategy([0.0] * 8, SPREAD, {"popsize": population, "seed": seed + 1, "verbose": -9})
    best, best_score = None, math.inf
    for _ in range(generations):
        candidates = strategy.ask()
        scores = [score(TaylorLoss(kind, torch.tensor(candidate)).requires_grad_(False)) for candidate in candidates]
        strategy.tell(candidates, [value if math.isfinite(value) else worst for value in scores])
        lowest = min(range(len(scores)), key=scores.__getitem__)
        if scores[lowest] < best_score:
            best, best_score = candidates[lowest], scores[lowest]
    if best is None:
        raise FloatingPointError("training diverged with every Taylor loss tried; lower the base learning rate")
    return TaylorLoss(kind, torch.tensor(best))
