"""What ten seeds cost when they run as one program: python benchmarks/seeds.py

The task is digits with the MLP 64-64-10, batch 100, SGD with momentum .9. Times are CPU seconds per step of one process
on one thread: of ``fit`` with a stack of 1 to 20 learners, the loss adapted online, beside one learner; and of
``initialise_seeds`` (meta steps alone, without imitation and rehearsals) beside ``initialise``. They are interleaved:
given are medians over repetitions, and the quartiles of the ratio to one seed alone. Writes results/seeds.json.
"""

import json
import time
from collections.abc import Callable, Sequence
from functools import partial

import pandas as pd
import torch
from record import arguments, begin, labels, save

from adalfl_lite import (
    Initialiser,
    LossNetwork,
    OnlineLoss,
    Stacked,
    build_model,
    fit,
    initialise,
    initialise_seeds,
    load_dataset,
)

SEEDS = (1, 2, 5, 10, 20)

make_optimizer = partial(torch.optim.SGD, lr=0.01, momentum=0.9)


def make_model() -> torch.nn.Module:
    """A fresh base model for one seed."""
    return build_model("mlp64", input_shape=(64,), outputs=10)


def train(count: int, steps: int, *, together: bool) -> None:
    """Online training of ``count`` seeds, evaluated at the first and the last step."""
    data = load_dataset("digits")
    models, losses = [make_model() for _ in range(count)], [LossNetwork.classification() for _ in range(count)]
    parts = zip(models, losses, strict=True)
    learners = [OnlineLoss(model, loss, make_optimizer(model.parameters())) for model, loss in parts]
    if together:
        fit(Stacked(learners), data, seed=range(count), steps=steps, evaluate_every=steps, progress=False)
        return
    for i, learner in enumerate(learners):
        fit(learner, data, seed=i, steps=steps, evaluate_every=steps, progress=False)


def meta_learn(count: int, steps: int, *, together: bool) -> None:
    """The meta steps of Algorithm 1 for ``count`` seeds."""
    data = load_dataset("digits")
    streams = [[split.batches(100, seed=i) for i in range(count)] for split in (data.train, data.valid)]
    settings = Initialiser(steps=steps, imitation_steps=0, rehearsals=0)
    if together:
        initialise_seeds(
            LossNetwork.classification,
            make_model,
            *streams,
            make_optimizer=make_optimizer,
            seeds=range(count),
            settings=settings,
        )
        return
    for batches in zip(*streams, strict=True):
        initialise(LossNetwork.classification(), make_model, *batches, make_optimizer=make_optimizer, settings=settings)


def seconds_per_step(work: Callable[..., None], count: int, steps: int, *, together: bool) -> float:
    """CPU seconds that a step more takes."""
    torch.manual_seed(0)

    def seconds(steps: int) -> float:
        start = time.process_time()
        work(count, steps, together=together)
        return time.process_time() - start

    return (seconds(steps + 5) - seconds(5)) / steps


def compare(work: Callable[..., None], repeats: int, steps: int) -> pd.DataFrame:
    """A row for each number of seeds."""
    records = []
    for repeat in range(repeats + 1):
        alone = seconds_per_step(work, 1, steps, together=False)
        for count in SEEDS:
            seconds = seconds_per_step(work, count, steps, together=True)
            records.append(
                {"repeat": repeat, "seeds": count, "seconds": seconds, "ratio": seconds / alone, "alone": alone}
            )
    groups = pd.DataFrame(records).query("repeat > 0").groupby("seeds")  # the first repetition warms up
    return pd.DataFrame(
        {
            "seconds_per_step": groups.seconds.median(),
            "alone_seconds_per_step": groups.alone.median(),
            "ratio": groups.ratio.median(),
            "ratio_low": groups.ratio.quantile(0.25),
            "ratio_high": groups.ratio.quantile(0.75),
        }
    ).reset_index()


def main(given: Sequence[str] | None = None) -> None:
    """Measure training and meta-learning, and write what was found."""
    parser = arguments("seeds", __doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=60)
    options = begin(parser, given)
    result = {"threads": 1, "repeats": options.repeats, "steps": options.steps}
    for name, work in (("rows", train), ("initialise_rows", meta_learn)):
        table = compare(work, options.repeats, options.steps)
        print(table.to_string(index=False, float_format="%.3g"))
        result[name] = json.loads(table.to_json(orient="records"))
    save({**result, **labels(options)}, options.output)


if __name__ == "__main__":
    main()
