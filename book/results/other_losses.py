"""Losses that are searched for or learned, on digits with wrong labels: python book/results/other_losses.py [--jobs 2]

For each method and seed: find the loss on the train and the validation split, in both of which 40 % of the labels are
wrong, then train with it for 250 steps. One row per run: the test error (test labels are right), the seconds of
processor time that finding the loss took, how many losses were tried or meta steps made, and the loss, as text. Writes
other_losses.parquet beside this file.
"""

import argparse
import json
import time
from pathlib import Path

import joblib
import pandas as pd
import torch

from adalfl_lite.compare import get_task, prepare, train
from adalfl_lite.files import atomic_path
from adalfl_lite.losses import SymbolicLoss, TaylorLoss
from adalfl_lite.provenance import provenance

STEPS, NOISE, SEEDS = 250, 0.4, 3
METHODS = ("evomal", "taylorglo", "online")
TASK = get_task("digits").with_(steps=STEPS).corrupted(label_noise=NOISE)


def measure(method: str, seed: int) -> dict:
    """Find the loss, then train with it."""
    torch.set_num_threads(1)
    started = time.process_time()
    prepared = prepare(TASK, TASK.load(seed=seed), method, seed)
    row = {"task": TASK.name, "method": method, "seed": seed, "cpu_seconds": time.process_time() - started}
    found = described(prepared.loss)  # before training, for an online loss moves on
    error = train(prepared, method, seed).test_error.iloc[-1]
    return {**row, "test_error": error, "tried": prepared.steps, "found": found}


def described(loss) -> str:
    """A searched loss as text, from which it can be made again."""
    if isinstance(loss, TaylorLoss):
        return json.dumps({"coefficients": loss.coefficients.tolist()})
    if isinstance(loss, SymbolicLoss):
        return json.dumps({"expression": loss.expression, "weights": loss.weights.tolist()})
    return ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    grid = [(method, seed) for method in METHODS for seed in range(SEEDS)]
    rows = joblib.Parallel(n_jobs=options.jobs)(joblib.delayed(measure)(*job) for job in grid)
    table = pd.DataFrame(rows).assign(**provenance())
    with atomic_path(Path(__file__).with_suffix(".parquet")) as temporary:
        table.to_parquet(temporary, index=False)
    print(table.groupby("method", sort=False)[["test_error", "cpu_seconds", "tried"]].mean())
