"""Measure a loss plane by vmap against a loop that sets the parameters: python benchmarks/landscape.py

The model is an MLP 64-64-10 on digits, the grid 51 x 51, the number of examples goes up. Both do the same arithmetic;
vmap saves what a call costs besides. So the time of a grid point is fitted as fixed + slope · examples: the fixed part
is what vmap removes, the slope what it cannot, and a profile of the grid by vmap says what the slope is made of.

Times are CPU seconds of one process, the least of interleaved repetitions: what else the machine does only adds to
them. They are printed and written to results/landscape.json beside this file.
"""

import json
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from record import arguments, begin, labels, save
from sklearn.datasets import load_digits
from torch import nn
from torch.profiler import ProfilerActivity, profile

from analysis.landscape import plane, random_directions

AXIS = np.linspace(-1, 1, 51)
EXAMPLES = (32, 64, 128, 360, 1797)  # 1797 are all digits
PROFILED = 360


@torch.no_grad()
def loop(model: nn.Module, batch: tuple, directions: list) -> np.ndarray:
    """The plane by setting parameters point by point."""
    inputs, targets = batch
    parameters = list(model.parameters())
    start = [parameter.clone() for parameter in parameters]
    first, second = (list(direction.values()) for direction in directions)
    losses = np.empty((len(AXIS), len(AXIS)))
    for row, y in enumerate(AXIS.tolist()):
        for column, x in enumerate(AXIS.tolist()):
            for parameter, origin, a, b in zip(parameters, start, first, second, strict=True):
                parameter.copy_(origin + x * a + y * b)
            losses[row, column] = F.cross_entropy(model(inputs), targets).item()
    for parameter, origin in zip(parameters, start, strict=True):
        parameter.copy_(origin)
    return losses


def batched(model: nn.Module, batch: tuple, directions: list) -> np.ndarray:
    """The plane of the package."""
    return plane(model, F.cross_entropy, batch, directions, x=AXIS, y=AXIS).losses


def timed(measured: Callable[..., np.ndarray], problem: tuple) -> tuple[float, np.ndarray]:
    """The CPU seconds that one of the two takes for a problem, and its losses."""
    start = time.process_time()
    losses = measured(*problem)
    return time.process_time() - start, losses


def problem(examples: int) -> tuple:
    """A model, a batch and two directions."""
    digits = load_digits()
    inputs = torch.tensor(digits.data[:examples] / 16, dtype=torch.float32)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return model, (inputs, torch.tensor(digits.target[:examples])), random_directions(model, 2)


def measure(examples: int, repeats: int) -> dict:
    """Seconds of both, and how much their losses differ."""
    given = problem(examples)
    timed(batched, given)  # warm up
    runs = [(timed(loop, given), timed(batched, given)) for _ in range(repeats)]
    loop_seconds, vmap_seconds = np.min([[seconds for seconds, _ in run] for run in runs], axis=0)
    (_, expected), (_, found) = runs[0]
    return {
        "examples": examples,
        "points": expected.size,
        "loop_seconds": loop_seconds,
        "vmap_seconds": vmap_seconds,
        "ratio": loop_seconds / vmap_seconds,
        "largest_difference": np.abs(found - expected).max(),
    }


def scaling(table: pd.DataFrame) -> dict:
    """Microseconds of a grid point: the part that every call costs, and the part per example."""
    found = {}
    for name in ("loop", "vmap"):
        microseconds = table[f"{name}_seconds"] / table["points"] * 1e6
        slope, fixed = np.polyfit(table["examples"], microseconds, 1, w=1 / microseconds)
        found |= {f"{name}_fixed_microseconds": fixed, f"{name}_microseconds_per_example": slope}
    return found


def operations(examples: int, most: int = 6) -> dict[str, float]:
    """The operations that take most of the plane's CPU time, and the share of each."""
    given = problem(examples)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        batched(*given)
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    largest = sorted(times, key=lambda name: -times[name])[:most]
    return {name: times[name] / sum(times.values()) for name in largest}


def rounded(value: object) -> object:
    """Four digits of every number."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main(given: Sequence[str] | None = None) -> None:
    """Measure grids of all sizes, fit and profile them, and write what was found."""
    parser = arguments("landscape", __doc__)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    options = begin(parser, given)
    torch.set_num_threads(options.threads)
    table = pd.DataFrame([measure(examples, options.repeats) for examples in EXAMPLES])
    found = {
        "grids": [rounded(row) for row in table.to_dict("records")],
        "scaling": rounded(scaling(table)),
        "operations": {"examples": PROFILED, "shares": rounded(operations(PROFILED))},
        "repeats": options.repeats,
        "threads": options.threads,
        **labels(options),
        "numpy": version("numpy"),
    }
    save(found, options.output)
    print(table.to_string(index=False, float_format="%.4g"))
    print(json.dumps({key: found[key] for key in ("scaling", "operations")}, indent=1))


if __name__ == "__main__":
    main()
