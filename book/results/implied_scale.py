"""Measure how hard the learned loss pushes on California Housing: python book/results/implied_scale.py [--root DATA]

For every seed the model is trained with online AdaLFL, as in comparison.py, and its loss compared with the squared error
twenty times along the way: ∇M = c ∇L + r on training rows. Then the squared error is trained under the schedule c
(the method "rate-replay"). One row for each moment, in implied_scale.parquet beside this file.
"""

import argparse
from pathlib import Path

import pandas as pd
import torch

from adalfl_lite.experiments import provenance
from adalfl_lite.files import atomic_path
from adalfl_lite.methods import prepare, train
from adalfl_lite.tasks import get_task
from adalfl_lite.together import prepare_together

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--root", help="the data folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    task, seeds = get_task("california"), range(options.seeds)
    data = [task.load(seed=seed, root=options.root) for seed in seeds]
    shared: dict[int, dict] = {seed: {} for seed in seeds}
    prepare_together(task, data, "online", seeds, device="cpu", shared=shared)
    parts = []
    for seed in seeds:
        replayed = prepare(task, data[seed], "rate-replay", seed, shared=shared[seed])
        history = train(replayed, "rate-replay", seed)
        steps, scale = replayed.schedule or ([], [])
        rows = pd.DataFrame({"step": steps, "scale": scale}).merge(history[["step", "valid_error", "test_error"]])
        parts.append(rows.assign(task=task.name, seed=seed, **provenance()))
        print(parts[-1].tail(1).to_string(index=False, header=False), flush=True)
    with atomic_path(Path(__file__).with_suffix(".parquet")) as temporary:
        pd.concat(parts, ignore_index=True).to_parquet(temporary, index=False)
