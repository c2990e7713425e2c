"""Compare meta learning rates of online AdaLFL on the regressions: python book/results/meta_rate.py [--tasks diabetes]

All seeds of a task are one program, from the same initialised losses for every rate; nothing else changes. One row for
each run, at its end, in meta_rate.parquet beside this file. It takes an hour on one core.
"""

import argparse
from pathlib import Path

import pandas as pd
import torch

from adalfl_lite.compare import get_task
from adalfl_lite.compare.together import prepare_together, train_together
from adalfl_lite.files import atomic_path
from adalfl_lite.provenance import provenance

TASKS = ("diabetes", "communities", "california")
RATES = (3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="the rows of others stay")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--root", help="the data folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds, parts = range(options.seeds), []
    for task in map(get_task, options.tasks):
        data = [task.load(seed=seed, root=options.root) for seed in seeds]
        shared: dict[int, dict] = {seed: {} for seed in seeds}
        for rate in RATES:
            prepared = prepare_together(task, data, "online", seeds, device="cpu", shared=shared)
            runs = train_together(prepared, "online", seeds, device="cpu", meta_learning_rate=rate)
            ends = runs[runs.step == task.steps][["seed", "valid_error", "test_error"]]
            parts.append(ends.assign(task=task.name, meta_learning_rate=rate, **provenance()))
            print(task.name, rate, f"{ends.valid_error.mean():.4f}", flush=True)
    path = Path(__file__).with_suffix(".parquet")
    if path.exists():
        before = pd.read_parquet(path)
        parts.insert(0, before[~before.task.isin(options.tasks)])
    with atomic_path(path) as temporary:
        pd.concat(parts, ignore_index=True).to_parquet(temporary, index=False)
