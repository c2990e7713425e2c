"""Active learning on drawn figures and on California Housing: python book/results/active_learning.py [--jobs 2]

What each strategy's labels are worth, over seeds: the mean squared error after every round of labelling; on figures
also the joints that are missed and the share of acrobats among the labelled ones; on California Housing the mean
absolute error, and the share of the squared error that comes from the one worst district. California Housing is read
from the data folder (``--root``). Writes active_learning.parquet beside this file.
"""

from functools import partial

import pandas as pd
import torch
from script import HERE, arguments, begin, save, spread

from adalfl_lite.data import load_dataset
from adalfl_lite.predict.active_learning import STRATEGIES, active_learning
from adalfl_lite.predict.keypoints import HeatmapNet, draw_figures, figures_dataset, missed_joints
from adalfl_lite.predict.loss_prediction import ConvLossModule

POOL, VALID, TEST = 1000, 1, 500
SEEDS = {"figures": 6, "california": 10}
FIGURES = {"rounds": 3, "first": 50, "added": 75, "steps": 400, "batch_size": 16, "learning_rate": 5e-3, "members": 3}
CALIFORNIA = {"rounds": 5, "first": 100, "added": 100, "steps": 300, "learning_rate": 3e-3, "members": 3}


def on_figures(strategy: str, seed: int) -> pd.DataFrame:
    """Label 50 of 1,000 figures, and 75 more twice; Learning Loss has its own module, the pooling one."""
    data = figures_dataset(POOL, VALID, TEST, seed=seed)
    acrobat = draw_figures(POOL + VALID + TEST, seed=seed).acrobat
    images, heatmaps = data.test[:]
    hard = acrobat[POOL + VALID :]

    def record(model: torch.nn.Module, labelled: torch.Tensor) -> dict[str, float]:
        with torch.no_grad():
            prediction = model.eval()(images)
        groups = {"missed": hard | ~hard, "missed_acrobats": hard, "missed_standing": ~hard}
        missed = {name: missed_joints(prediction[rows], heatmaps[rows]).item() for name, rows in groups.items()}
        return {**missed, "acrobats": acrobat[labelled].float().mean().item()}

    options = FIGURES if strategy == "learning-loss" else {**FIGURES, "module": ConvLossModule}
    return active_learning(data, strategy, model=HeatmapNet, record=record, seed=seed, **options).assign(task="figures")


def on_california(strategy: str, seed: int, root: str | None = None) -> pd.DataFrame:
    """Label 100 of 12,384 districts, and 100 more four times."""
    data = load_dataset("california", seed=seed, root=root)
    inputs, targets = data.test[:]

    def record(model: torch.nn.Module, labelled: torch.Tensor) -> dict[str, float]:
        with torch.no_grad():
            error = (model.eval()(inputs) - targets).abs()
        return {"absolute_error": error.mean().item(), "worst": (error.max() ** 2 / error.square().sum()).item()}

    return active_learning(data, strategy, record=record, seed=seed, **CALIFORNIA).assign(task="california")


if __name__ == "__main__":
    options = begin(arguments(__doc__, root=True, jobs=True))
    figures, california = ([(s, seed) for seed in range(SEEDS[name]) for s in STRATEGIES] for name in SEEDS)
    found = spread(on_figures, figures, options.jobs)
    found += spread(partial(on_california, root=options.root), california, options.jobs)
    table = pd.concat(found, ignore_index=True)
    save(table, HERE / "active_learning.parquet")
    measures = ["test_error", "missed", "absolute_error"]
    print(table.groupby(["task", "strategy", "labelled"], sort=False)[measures].mean())
