"""How the cost of a meta step grows: python benchmarks/scaling.py

The ratio of one meta step to one plain step, as in step.py, while one size changes: rows of a batch, classes, or units
of a layer. The models are the MLP 64-64-10 and a small convolutional network with BatchNorm; batch 64, unless it is
what changes. Growth with the number of seeds is in seeds.py. Writes results/scaling.json; five minutes of one core.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from step import OUTPUTS, Setting, time_ratios
from torch import nn

from adalfl_lite.files import atomic_path
from adalfl_lite.provenance import provenance

ENGINES = ["plain", "forward", "shared", "functional"]
SHAPES = {"mlp": (64,), "conv": (3, 16, 16)}
BASE = {"batch_size": 64, "classes": OUTPUTS, "width": {"mlp": 64, "conv": 16}}
SIZES = {
    "batch_size": {"mlp": (16, 64, 256, 1024), "conv": (16, 64, 256)},
    "classes": {"mlp": (2, 10, 100, 1000), "conv": (2, 10, 100, 1000)},
    "width": {"mlp": (16, 64, 256, 1024), "conv": (8, 16, 32, 64)},
}


def mlp(width: int, classes: int) -> nn.Module:
    """One hidden layer."""
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, classes))


def conv(width: int, classes: int) -> nn.Module:
    """Two convolutions with BatchNorm, and a linear head."""
    layers = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    layers += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def measure(model: str, changed: str, size: int, rounds: int) -> list[dict]:
    """A row per engine."""
    sizes = {**BASE, "width": BASE["width"][model], changed: size}
    make_model = partial({"mlp": mlp, "conv": conv}[model], sizes["width"], sizes["classes"])
    make = partial(Setting, make_model, SHAPES[model], sizes["batch_size"], sizes["classes"])
    table = time_ratios(make, ENGINES, rounds).rename_axis("engine").reset_index()
    table = table.assign(model=model, changed=changed, size=size, **sizes)
    return json.loads(table.to_json(orient="records"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--change", nargs="+", choices=SIZES, default=list(SIZES), help="the others are kept")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "scaling.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = json.loads(options.output.read_text())["rows"] if options.output.exists() else []
    rows = [row for row in kept if row["changed"] not in options.change]
    for changed in options.change:
        for model, sizes in SIZES[changed].items():
            for size in sizes:
                found = measure(model, changed, size, options.rounds)
                rows += [{**row, **provenance()} for row in found]
                print(changed, model, size, {row["engine"]: round(row["time_ratio"], 2) for row in found}, flush=True)
    with atomic_path(options.output) as temporary:
        result = {"command": "python benchmarks/scaling.py", "threads": 1, "rounds": options.rounds, "rows": rows}
        temporary.write_text(json.dumps(result, indent=1) + "\n")
