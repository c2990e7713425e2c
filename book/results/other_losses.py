"""Losses that are searched for or learned, on digits with wrong labels: python book/results/other_losses.py [--jobs 2]

For each method and seed: find the loss on the train and the validation split, in both of which 40 % of the labels are
wrong, then train with it for 250 steps. One row per run: the test error (test labels are right), the seconds of
processor time that finding the loss took, how many losses were tried or meta steps made, and the loss, as text. Writes
other_losses.parquet beside this file.
"""

import json
import time

import pandas as pd
from script import HERE, arguments, begin, save, spread

from adalfl_lite.compare import METHODS, Method, Task, get_task, prepare, train
from adalfl_lite.losses import SymbolicLoss, TaylorLoss

STEPS, NOISE, SEEDS = 250, 0.4, 3
COMPARED = ("evomal", "taylorglo", "online")
TASK = get_task("digits").with_(steps=STEPS).corrupted(label_noise=NOISE)


def measure(name: str, seed: int, task: Task = TASK, method: Method | None = None) -> dict:
    """Find the loss, then train with it; ``method`` in the place of the one of that name."""
    how, started = method or METHODS[name], time.process_time()
    prepared = prepare(task, [task.load(seed=seed)], how, [seed])
    row = {"task": task.name, "method": name, "seed": seed, "cpu_seconds": time.process_time() - started}
    found = described(prepared[0].loss)  # before training, for an online loss moves on
    error = train(prepared, how, [seed]).test_error.iloc[-1]
    return {**row, "test_error": error, "tried": prepared[0].steps, "found": found}


def described(loss) -> str:
    """A searched loss as text, from which it can be made again."""
    if isinstance(loss, TaylorLoss):
        return json.dumps({"coefficients": loss.coefficients.tolist()})
    if isinstance(loss, SymbolicLoss):
        return json.dumps({"expression": loss.expression, "weights": loss.weights.tolist()})
    return ""


if __name__ == "__main__":
    options = begin(arguments(__doc__, jobs=True))
    grid = [(name, seed) for name in COMPARED for seed in range(SEEDS)]
    table = pd.DataFrame(spread(measure, grid, options.jobs))
    save(table, HERE / "other_losses.parquet")
    print(table.groupby("method", sort=False)[["test_error", "cpu_seconds", "tried"]].mean())
