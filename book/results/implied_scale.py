"""Measure how hard the learned loss pushes on California Housing: python book/results/implied_scale.py [--root DATA]

For every seed the model is trained with online AdaLFL, as in comparison.py, and twenty times along the way the gradient
of its loss is compared with that of the squared error on training rows, ∇M = c ∇L + r. One row for each moment, in
implied_scale.parquet beside this file.
"""

import argparse
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F

from adalfl_lite.compare import get_task, train
from adalfl_lite.compare.together import prepare_together
from adalfl_lite.files import atomic_path
from adalfl_lite.provenance import provenance
from analysis.effective_lr import effective_learning_rate

ROWS = 2000

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--root", help="the data folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    task, seeds = get_task("california"), range(options.seeds)
    data = [task.load(seed=seed, root=options.root) for seed in seeds]
    shared: dict[int, dict] = {seed: {} for seed in seeds}
    rows: list[dict] = []
    for seed, prepared in enumerate(prepare_together(task, data, "online", seeds, device="cpu", shared=shared)):
        batch = data[seed].train[:ROWS]

        def record(step, model, loss, seed=seed, batch=batch):
            """Compare the two gradients."""
            found = effective_learning_rate(model, loss, F.mse_loss, batch)
            rows.append({"task": task.name, "seed": seed, "step": step, **vars(found)})

        error = train(prepared, "online", seed, callback=record).test_error.iloc[-1]
        print(seed, f"{rows[-1]['scale']:.4f} {error:.4f}", flush=True)
    with atomic_path(Path(__file__).with_suffix(".parquet")) as temporary:
        pd.DataFrame(rows).assign(**provenance()).to_parquet(temporary, index=False)
