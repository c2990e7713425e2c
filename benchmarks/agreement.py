"""What the checks of a step cost: python benchmarks/agreement.py

Every step of the exact engine verifies ⟨∇_θ M_φ, w⟩ = ⟨∂M_φ/∂f, u⟩, which tells a right derivative from a wrong one. In
each round, in random order, the same step is made with this check and without it; given are the median over the rounds
of the ratio of their CPU times, on one thread, and its quartiles. Writes results/agreement.json.
"""

import argparse
import json
import random
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import torch
from step import INPUTS, OUTPUTS, SGD

from adalfl_lite import LossNetwork, OnlineLoss, build_model
from adalfl_lite.engines import forward
from adalfl_lite.files import atomic_path
from adalfl_lite.provenance import provenance

ROUNDS = {"mlp64": 600, "lenet5": 100, "allcnn_c": 5}


def no_check(*_: object, **__: object) -> None:
    """In the place of :func:`adalfl_lite.engines.tangents.check_agreement`."""


def learner(name: str) -> OnlineLoss:
    """A model of the package with SGD, Nesterov's momentum and the exact engine."""
    torch.manual_seed(0)
    model = build_model(name, input_shape=INPUTS[name], outputs=OUTPUTS)
    return OnlineLoss(model, LossNetwork.classification(), torch.optim.SGD(model.parameters(), **SGD))


def ratios(name: str, rounds: int, batch_size: int) -> list[float]:
    """The CPU time of a step with the check in those of one without, round by round."""
    online = learner(name)
    batches = [(torch.randn(batch_size, *INPUTS[name]), torch.randint(OUTPUTS, (batch_size,))) for _ in range(2)]
    without = partial(patch.object, forward, "check_agreement", no_check)
    order, found = random.Random(0), []
    for _ in range(rounds + 1):
        seconds = {}
        for checked in order.sample([True, False], 2):
            begin = time.process_time()
            if checked:
                online.step(*batches)
            else:
                with without():
                    online.step(*batches)
            seconds[checked] = time.process_time() - begin
        found.append(seconds[True] / seconds[False])
    return found[1:]  # the first round allocates


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=ROUNDS, default=list(ROUNDS))
    parser.add_argument("--rounds", type=int, help="by default more for small models")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "agreement.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.models:
        rounds = options.rounds or ROUNDS[name]
        low, median, high = pd.Series(ratios(name, rounds, options.batch_size)).quantile([0.25, 0.5, 0.75])
        row = {"model": name, "batch_size": options.batch_size, "rounds": rounds}
        rows.append({**row, "ratio": median, "ratio_low": low, "ratio_high": high})
        print(f"{name}: {median:.3f} [{low:.3f}, {high:.3f}] over {rounds} rounds", flush=True)
    result = {"threads": 1, "command": "python benchmarks/agreement.py", **provenance(), "rows": rows}
    with atomic_path(options.output) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
