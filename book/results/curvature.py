"""Measure how near to divergence a learned loss walks: python book/results/curvature.py

On digits, for every seed, the model is trained with the task loss, with the task loss at ten times the learning rate
and with online AdaLFL, from the same weights. Twenty times along the way the largest eigenvalues of the Hessians of the
loss it is trained with and of the task loss are measured on training rows. One row for each moment, in
curvature.parquet beside this file; ``limit`` is the curvature from which the optimizer diverges on a quadratic.
"""

import argparse
from pathlib import Path

import pandas as pd
import torch

from adalfl_lite.compare import get_task, prepare, train
from adalfl_lite.compare.together import prepare_together
from adalfl_lite.files import atomic_path
from adalfl_lite.losses.network import task_loss
from adalfl_lite.provenance import provenance
from analysis.curvature import top_eigenpairs

STEPS, ROWS = 400, 300

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    task, seeds = get_task("digits").with_(steps=STEPS), range(options.seeds)
    fast = task.with_(learning_rate=10 * task.learning_rate)
    data = [task.load(seed=seed) for seed in seeds]
    learned = prepare_together(task, data, "online", seeds, device="cpu", shared={seed: {} for seed in seeds})
    rows: list[dict] = []
    for seed in seeds:
        for name, method, prepared in (
            ("cross-entropy", "handcrafted", prepare(task, data[seed], "handcrafted", seed)),
            ("cross-entropy, rate x 10", "handcrafted", prepare(fast, data[seed], "handcrafted", seed)),
            ("learned", "online", learned[seed]),
        ):
            batch, plain = data[seed].train[:ROWS], task_loss(task.kind)
            limit = 2 * (1 + prepared.task.momentum) / prepared.task.learning_rate

            def record(step, model, loss, seed=seed, name=name, batch=batch, plain=plain, limit=limit):
                """Measure both."""
                own, of_task = (top_eigenpairs(model, each, batch).values[0] for each in (loss, plain))
                rows.append(
                    {"seed": seed, "method": name, "step": step, "own": own, "task_loss": of_task, "limit": limit}
                )

            train(prepared, method, seed, callback=record)
            print(seed, name, f"{rows[-1]['own']:.2f} {rows[-1]['own'] / limit:.3f}", flush=True)
    with atomic_path(Path(__file__).with_suffix(".parquet")) as temporary:
        pd.DataFrame(rows).assign(**provenance()).to_parquet(temporary, index=False)
