"""Measure a loss plane by vmap against a loop that sets the parameters: python benchmarks/landscape.py

The model is an MLP 64-64-10 on digits, the grid 51 x 51. One call of either costs the same arithmetic; vmap saves the
calls. So it wins where batches are small, and draws level where arithmetic dominates. Times are CPU seconds of one
process, medians over interleaved repetitions. Writes results/landscape.csv beside this file.
"""

import argparse
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from adalfl_lite.experiments import provenance
from adalfl_lite.files import atomic_path
from analysis.landscape import plane, random_directions

AXIS = np.linspace(-1, 1, 51)
EXAMPLES = (32, 128, 360, 1797)


@torch.no_grad()
def loop(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, directions: list) -> np.ndarray:
    """The plane by setting parameters point by point."""
    parameters = list(model.parameters())
    start = [parameter.clone() for parameter in parameters]
    first, second = (list(direction.values()) for direction in directions)
    losses = np.empty((len(AXIS), len(AXIS)))
    for row, y in enumerate(AXIS):
        for column, x in enumerate(AXIS):
            for parameter, origin, a, b in zip(parameters, start, first, second, strict=True):
                parameter.copy_(origin + x * a + y * b)
            losses[row, column] = F.cross_entropy(model(inputs), targets).item()
    for parameter, origin in zip(parameters, start, strict=True):
        parameter.copy_(origin)
    return losses


def timed(function, *arguments, **options) -> tuple[float, np.ndarray]:
    """CPU seconds and the result."""
    begin = time.process_time()
    result = function(*arguments, **options)
    return time.process_time() - begin, result


def measure(examples: int, repeats: int) -> dict:
    """Median seconds of both, and how much they differ."""
    digits = load_digits()
    inputs = torch.tensor(digits.data[:examples] / 16, dtype=torch.float32)
    targets = torch.tensor(digits.target[:examples])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    directions = random_directions(model, 2)
    plane(model, F.cross_entropy, (inputs, targets), directions, x=AXIS[:9], y=AXIS[:9])  # warm up
    times = []
    for _ in range(repeats):
        plain, expected = timed(loop, model, inputs, targets, directions)
        ours, found = timed(plane, model, F.cross_entropy, (inputs, targets), directions, x=AXIS, y=AXIS)
        times.append((plain, ours))
    loop_seconds, vmap_seconds = np.median(times, axis=0)
    return {
        "examples": examples,
        "points": len(AXIS) ** 2,
        "loop_seconds": loop_seconds,
        "vmap_seconds": vmap_seconds,
        "ratio": np.median([plain / ours for plain, ours in times]),
        "largest_difference": np.abs(found.losses - expected).max(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = pd.DataFrame([measure(examples, options.repeats) for examples in EXAMPLES])
    table = table.assign(**vars(options), numpy=version("numpy"), **provenance())
    path = Path(__file__).parent / "results" / "landscape.csv"
    path.parent.mkdir(exist_ok=True)
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.4g")
    print(table.to_string(index=False))
