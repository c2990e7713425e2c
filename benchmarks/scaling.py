"""How the cost of a meta step grows: python benchmarks/scaling.py

The ratio of one meta step to one plain step, as in step.py, while one size changes: rows of a batch, classes, or units
of a layer. The models are the MLP 64-64-10 and a small convolutional network with BatchNorm; batch 64, unless it is
what changes. Growth with the number of seeds is in seeds.py. Writes results/scaling.json; five minutes of one core.
"""

import json
from collections.abc import Sequence
from functools import partial

from record import arguments, begin, labels, save, stored
from step import OUTPUTS, Setting, time_ratios
from torch import nn

ENGINES = ["plain", "forward", "shared", "functional"]
SHAPES = {"mlp": (64,), "conv": (3, 16, 16)}
BASE = {"batch_size": 64, "classes": OUTPUTS, "width": {"mlp": 64, "conv": 16}}
SIZES = {
    "batch_size": {"mlp": (16, 64, 256, 1024), "conv": (16, 64, 256)},
    "classes": {"mlp": (2, 10, 100, 1000), "conv": (2, 10, 100, 1000)},
    "width": {"mlp": (16, 64, 256, 1024), "conv": (8, 16, 32, 64)},
}


def mlp(width: int, classes: int) -> nn.Module:
    """A perceptron with one hidden layer of so many units."""
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, classes))


def conv(width: int, classes: int) -> nn.Module:
    """Two convolutions with BatchNorm, and a linear head."""
    layers = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    layers += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def measure(model: str, changed: str, size: int, rounds: int) -> list[dict]:
    """The costs of one setting, a row for each engine."""
    sizes = {**BASE, "width": BASE["width"][model], changed: size}
    make_model = partial({"mlp": mlp, "conv": conv}[model], sizes["width"], sizes["classes"])
    make = partial(Setting, make_model, SHAPES[model], sizes["batch_size"], sizes["classes"])
    table = time_ratios(make, ENGINES, rounds).rename_axis("engine").reset_index()
    table = table.assign(model=model, changed=changed, size=size, **sizes)
    return json.loads(table.to_json(orient="records"))


def main(given: Sequence[str] | None = None) -> None:
    """Measure what changes, size by size, and write it beside what is kept."""
    parser = arguments("scaling", __doc__)
    parser.add_argument("--change", nargs="+", choices=SIZES, default=list(SIZES), help="the others are kept")
    parser.add_argument("--rounds", type=int, default=15)
    options = begin(parser, given)
    rows = [row for row in stored(options.output).get("rows", []) if row["changed"] not in options.change]
    for changed in options.change:
        for model, sizes in SIZES[changed].items():
            for size in sizes:
                found = measure(model, changed, size, options.rounds)
                rows += [{**row, **labels(options)} for row in found]
                print(changed, model, size, {row["engine"]: round(row["time_ratio"], 2) for row in found}, flush=True)
    save({"threads": 1, "rows": rows}, options.output)


if __name__ == "__main__":
    main()
