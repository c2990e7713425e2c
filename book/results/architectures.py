"""Learn losses with several architectures, and measure their shapes: python book/results/architectures.py

Algorithm 1 on digits from a random loss network, in rollouts of 20 steps, without imitation and rehearsals. At some
lengths the loss is drawn, and a model trained with it, frozen. The table is architectures.parquet beside this file: one
row per point of a curve, in which what belongs to the whole curve is repeated.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from adalfl_lite import LossNetwork, evaluate
from adalfl_lite.compare import fresh, get_task
from adalfl_lite.engines import plain_step
from adalfl_lite.files import atomic_path
from adalfl_lite.learn import OnlineLoss
from adalfl_lite.losses.network import Loss
from adalfl_lite.provenance import provenance
from analysis.loss_shapes import loss_curves

HERE = Path(__file__).parent
SEEDS = range(4)
LENGTHS = (0, 100, 200, 400, 800)
ROLLOUT = 20
TRAINING_STEPS = 400
TASK = get_task("digits")
PROBABILITIES = np.linspace(0.005, 0.995, 199)

ARCHITECTURES = {
    "softplus (ML³)": lambda: LossNetwork.ml3("classification"),
    "smooth leaky, γ = 0.01": LossNetwork.classification,
    "smooth leaky, γ = 0.25": lambda: LossNetwork.classification(gamma=0.25),
}


def curves(network: LossNetwork, classes: int = 10) -> pd.DataFrame:
    """ℓ(1, p), its derivative, and B(p) = ℓ'(1, p) − ℓ'(0, (1 − p)/(C − 1)), at PROBABILITIES."""
    right = loss_curves(network, targets=[1.0], predictions=PROBABILITIES)
    wrong = loss_curves(network, targets=[0.0], predictions=np.sort((1 - PROBABILITIES) / (classes - 1)))
    right["bracket"] = right.derivative.to_numpy() - wrong.derivative.to_numpy()[::-1]
    return right.drop(columns="target")


def error_with(loss: Loss, seed: int) -> float:
    """Test error of a model trained with a fixed loss."""
    data = TASK.load(seed=seed)
    model, optimizer = fresh(TASK, data, seed)
    batches = data.train.batches(TASK.batch_size, seed=seed)
    for _ in range(TRAINING_STEPS):
        plain_step(model, loss, optimizer, next(batches))
    return evaluate(model, data.test, data.kind)[0]


def main() -> None:
    """Learn, measure, write."""
    torch.set_num_threads(1)
    tables = []
    for name, make in ARCHITECTURES.items():
        for seed in SEEDS:
            data = TASK.load(seed=seed)
            batches = data.train.batches(TASK.batch_size, seed=20_000 + seed)
            metas = data.valid.batches(TASK.batch_size, seed=30_000 + seed)
            torch.manual_seed(10_000 + seed)
            network = make()
            meta_optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
            for step in range(LENGTHS[-1] + 1):
                if step in LENGTHS:
                    frozen = network.clone().requires_grad_(False)
                    with torch.random.fork_rng():
                        error = error_with(frozen, seed)
                    keys = {"network": name, "seed": seed, "meta_steps": step, "test_error": error}
                    tables.append(curves(frozen).assign(**keys, **provenance()))
                    print(*keys.values(), flush=True)
                if step % ROLLOUT == 0:
                    model = TASK.make_model(data)
                    optimizer = TASK.make_optimizer(model.parameters())
                    learner = OnlineLoss(model, network, optimizer, meta_optimizer=meta_optimizer)
                learner.step(next(batches), next(metas))
    with atomic_path(HERE / "architectures.parquet") as temporary:
        pd.concat(tables, ignore_index=True).to_parquet(temporary, index=False)


if __name__ == "__main__":
    main()
