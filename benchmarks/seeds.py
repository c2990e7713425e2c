"""What ten seeds cost when they run as one program: python benchmarks/seeds.py

The task is digits with the MLP 64-64-10, batch 100, SGD with momentum .9, the loss adapted online. Times are CPU
seconds per step of one process on one thread: of ``fit_seeds`` with 1 to 20 seeds, and of ``fit``, interleaved; medians
over repetitions, and the quartiles of the ratio to ``fit`` for one seed. Writes results/seeds.json.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from adalfl_lite import LossNetwork, build_model, fit, fit_seeds, load_dataset
from adalfl_lite.experiments import provenance
from adalfl_lite.files import atomic_path

SEEDS = (1, 2, 5, 10, 20)


def make(seed: int) -> tuple[torch.nn.Module, LossNetwork]:
    """The base model and the loss network of one seed."""
    torch.manual_seed(seed)
    return build_model("mlp64", input_shape=(64,), outputs=10), LossNetwork.classification()


def run(count: int, steps: int, *, together: bool) -> float:
    """CPU seconds per step of ``count`` seeds; evaluation at the first and the last step is taken off."""
    data = load_dataset("digits")
    sgd = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
    models, losses = zip(*map(make, range(count)), strict=True)
    options = {"online": True, "progress": False}

    def train(steps: int) -> float:
        begin = time.process_time()
        settings = {"steps": steps, "evaluate_every": steps, **options}
        if together:
            fit_seeds(models, losses, data, make_optimizer=sgd, seeds=range(count), **settings)
        else:
            for i in range(count):
                fit(models[i], losses[i], data, optimizer=sgd(models[i].parameters()), seed=i, **settings)
        return time.process_time() - begin

    return (train(steps + 5) - train(5)) / steps


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "seeds.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    records = []
    for repeat in range(options.repeats + 1):
        alone = run(1, options.steps, together=False)
        for count in SEEDS:
            seconds = run(count, options.steps, together=True)
            records.append(
                {"repeat": repeat, "seeds": count, "seconds": seconds, "ratio": seconds / alone, "alone": alone}
            )
    groups = pd.DataFrame(records).query("repeat > 0").groupby("seeds")  # the first repetition warms up
    table = pd.DataFrame(
        {
            "seconds_per_step": groups.seconds.median(),
            "fit_seconds_per_step": groups.alone.median(),
            "ratio": groups.ratio.median(),
            "ratio_low": groups.ratio.quantile(0.25),
            "ratio_high": groups.ratio.quantile(0.75),
        }
    ).reset_index()
    print(table.to_string(index=False, float_format="%.3g"))
    result = {"command": "python benchmarks/seeds.py", "threads": 1, "repeats": options.repeats, "steps": options.steps}
    with atomic_path(options.output) as temporary:
        rows = json.loads(table.to_json(orient="records"))
        temporary.write_text(json.dumps({**result, **provenance(), "rows": rows}, indent=1) + "\n")
