"""What the checks of a step cost: python benchmarks/agreement.py

Every step of the exact engine verifies ⟨∇_θ M_φ, w⟩ = ⟨∂M_φ/∂f, u⟩, which tells a right derivative from a wrong one. In
each round, in random order, the same step is made with this check and without it; given are the median over the rounds
of the ratio of their CPU times, on one thread, and its quartiles. Writes results/agreement.json.
"""

import random
import time
from collections.abc import Sequence
from contextlib import nullcontext
from unittest.mock import patch

import pandas as pd
from record import arguments, begin, labels, save
from step import ENGINES, setting

from adalfl_lite.engines import forward

ROUNDS = {"mlp64": 600, "lenet5": 100, "allcnn_c": 5}


def no_check(*_: object, **__: object) -> None:
    """In the place of :func:`adalfl_lite.engines.tangents.check_agreement`."""


def ratios(name: str, rounds: int, batch_size: int) -> list[float]:
    """The CPU time of a step with the check in those of one without, round by round."""
    step = ENGINES["forward"](setting(name, batch_size))
    order, found = random.Random(0), []
    for _ in range(rounds + 1):
        seconds = {}
        for checked in order.sample([True, False], 2):
            with nullcontext() if checked else patch.object(forward, "check_agreement", no_check):
                start = time.process_time()
                step()
                seconds[checked] = time.process_time() - start
        found.append(seconds[True] / seconds[False])
    return found[1:]  # the first round allocates


def main(given: Sequence[str] | None = None) -> None:
    """Measure the models, one after another, and write what was found."""
    parser = arguments("agreement", __doc__)
    parser.add_argument("--models", nargs="+", choices=ROUNDS, default=list(ROUNDS))
    parser.add_argument("--rounds", type=int, help="by default more for small models")
    parser.add_argument("--batch-size", type=int, default=64)
    options = begin(parser, given)
    rows = []
    for name in options.models:
        rounds = options.rounds or ROUNDS[name]
        low, median, high = pd.Series(ratios(name, rounds, options.batch_size)).quantile([0.25, 0.5, 0.75])
        row = {"model": name, "batch_size": options.batch_size, "rounds": rounds}
        rows.append({**row, "ratio": median, "ratio_low": low, "ratio_high": high})
        print(f"{name}: {median:.3f} [{low:.3f}, {high:.3f}] over {rounds} rounds", flush=True)
    save({"threads": 1, **labels(options), "rows": rows}, options.output)


if __name__ == "__main__":
    main()
