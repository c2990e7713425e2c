"""Measure the short-horizon bias on digits and MNIST: python book/results/short_horizon.py [--jobs 2] [--root DATA]

For each kind of offline learning, seed and length of it: how the learned loss does at what it was trained for (the task
loss one step after), how large it is, and how it does at what it is used for (the test error of a whole training run).
Writes short_horizon.parquet beside this file.
"""

import argparse
from pathlib import Path

import joblib
import pandas as pd
import torch

from adalfl_lite import LossNetwork, OnlineLoss, evaluate
from adalfl_lite.compare import fresh, get_task
from adalfl_lite.engines import plain_step
from adalfl_lite.files import atomic_path
from adalfl_lite.losses.network import task_loss
from adalfl_lite.provenance import provenance
from analysis.effective_lr import effective_learning_rate

TASKS = {  # name: (the task, when to look, seeds)
    "digits": (get_task("digits"), (25, 50, 100, 200, 400, 800, 1600, 2500), 4),
    "mnist-lenet5": (get_task("mnist-lenet5").with_(learning_rate=0.1), (25, 100, 400, 800, 1600), 3),
}
VARIANTS = {  # name: (loss network, base steps before the model is drawn afresh)
    "ML³": (LossNetwork.ml3, 1),
    "AdaLFL's network": (LossNetwork.default, 1),
    "AdaLFL's network, 20-step rollouts": (LossNetwork.default, 20),
}
HORIZON = 600
ONE_STEP_REPEATS = 50


def measure(name: str, variant: str, seed: int, root: str | None = None) -> list[dict]:
    """Algorithm 1 without rehearsals, stopped now and then to see what the loss is good for."""
    torch.set_num_threads(1)
    make_network, rollout_steps = VARIANTS[variant]
    task, lengths, _ = TASKS[name]
    data = task.load(seed=seed, root=root)
    train = data.train.batches(task.batch_size, seed=20_000 + seed)
    valid = data.valid.batches(task.batch_size, seed=30_000 + seed)
    torch.manual_seed(10_000 + seed)
    network = make_network("classification")
    meta_optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    rows = []
    for step in range(1, max(lengths) + 1):
        if (step - 1) % rollout_steps == 0:
            model = task.make_model(data)
            online = OnlineLoss(model, network, task.make_optimizer(model.parameters()), meta_optimizer=meta_optimizer)
        online.step(next(train), next(valid))
        if step in lengths:
            frozen = network.clone().requires_grad_(False)
            row = {"task": name, "variant": variant, "seed": seed, "meta_steps": step}
            rows.append({**row, **one_step(frozen, task, data, train, valid), **whole_run(frozen, task, data, seed)})
    return rows


def one_step(loss, task, data, train, valid) -> dict:
    """The task loss on validation batches after one step from a fresh model, which is what Algorithm 1 minimises."""
    values, measured = [], task_loss(data.kind)
    for _ in range(ONE_STEP_REPEATS):
        model = task.make_model(data)
        plain_step(model, loss, task.make_optimizer(model.parameters()), next(train))
        inputs, targets = next(valid)
        with torch.no_grad():
            values.append(measured(model(inputs), targets).item())
    return {"one_step_loss": sum(values) / len(values)}


def whole_run(loss, task, data, seed) -> dict:
    """How large the loss is for a fresh model, and the test error of training with it."""
    model, optimizer = fresh(task, data, seed)
    batches = data.train.batches(task.batch_size, seed=seed)
    scale = effective_learning_rate(model, loss, task_loss(data.kind), next(batches)).scale
    for _ in range(HORIZON):
        plain_step(model, loss, optimizer, next(batches))
    return {"scale": scale, "test_error": evaluate(model, data.test, data.kind)[0]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="the rows of others stay")
    parser.add_argument("--root", help="the data folder")
    options = parser.parse_args()
    grid = [(name, v, seed, options.root) for name in options.tasks for seed in range(TASKS[name][2]) for v in VARIANTS]
    measured = joblib.Parallel(n_jobs=options.jobs)(joblib.delayed(measure)(*point) for point in grid)
    table = pd.DataFrame([row for rows in measured for row in rows]).assign(**provenance())
    path = Path(__file__).with_suffix(".parquet")
    if path.exists():
        before = pd.read_parquet(path)
        table = pd.concat([before[~before.task.isin(options.tasks)], table], ignore_index=True)
    with atomic_path(path) as temporary:
        table.to_parquet(temporary, index=False)
    columns = ["one_step_loss", "scale", "test_error"]
    print(table.groupby(["task", "variant", "meta_steps"], sort=False)[columns].mean().to_string())
