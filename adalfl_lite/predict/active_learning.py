"""Pool-based active learning for regression: which rows to label next, by four strategies that share all else.

The strategies are ::

    random              the control
    learning-loss       the highest predicted loss, from a loss module trained by margin ranking (Yoo and Kweon 2019)
    learning-loss++     the same, trained by the divergence of pairs (Shukla and Ahmed 2021)
    ensemble            the highest variance of the predictions of several models, which cost as many trainings

Start with a few labelled rows; train a fresh model; report its test error; label the rows the strategy asks for;
repeat. The strategies start from the same rows, model and batches, so the first round is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd
import torch
from torch import Tensor, nn

from adalfl_lite.checks import check_counts
from adalfl_lite.data.dataset import Dataset
from adalfl_lite.models import build_model
from adalfl_lite.predict.loss_prediction import (
    PAIR_LOSSES,
    FeatureTap,
    LossModule,
    pair_divergence,
    predict_losses,
    select_batch,
    train_with_loss_module,
)
from adalfl_lite.train.evaluation import evaluate

STRATEGIES = ("random", *PAIR_LOSSES, "ensemble")


def active_learning(
    data: Dataset,
    strategy: str,
    *,
    model: str | Callable[[], nn.Module] = "mlp64",
    module: Callable[[Sequence[int]], nn.Module] = LossModule,
    rounds: int = 5,
    first: int = 100,
    added: int = 100,
    steps: int = 500,
    members: int = 5,
    pool: int | None = None,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    record: Callable[[nn.Module, Tensor], dict[str, float]] = lambda model, labelled: {},
    seed: int = 0,
) -> pd.DataFrame:
    """The test error after each round of labelling.

    Args:
        data: for regression. The train split is the pool of rows, at first unlabelled; the test split is reported on.
        strategy: one of :data:`STRATEGIES`.
        model: a name for :func:`~adalfl_lite.models.build_model`, or a function that makes one; its hidden ReLU layers
            are what the module sees.
        module: makes a loss module for the numbers of channels of those layers:
            :class:`~adalfl_lite.predict.loss_prediction.LossModule`, or ``ConvLossModule`` for images.
        rounds: how many models are trained, one after another, each from scratch.
        first: rows labelled at the start, drawn at random.
        added: rows labelled after each round.
        steps: of training, per round.
        members: of the ensemble.
        pool: choose within a random subset of so many unlabelled rows; all of them by default.
        batch_size: of training.
        learning_rate: of Adam.
        record: called after each round with the model and the labelled rows; what it returns are further columns.
        seed: of everything.

    Returns:
        One row per round: strategy, seed, round, labelled, test_error (mean squared error), and what ``record`` gave.

    Raises:
        ValueError: an unknown strategy, data for classification, fewer rows than are to be labelled, or an ensemble
            of one.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}; got {strategy!r}")
    if data.kind != "regression":
        raise ValueError(f"active learning here is for regression; {data.name} is {data.kind}")
    if rounds < 1 or first < 2 or added < 1 or first + (rounds - 1) * added > len(data.train):
        raise ValueError(
            f"cannot label {first} + {rounds - 1} x {added} rows of {len(data.train)}; rounds and added must be 1 or "
            "more, first 2 or more"
        )
    check_counts(members=(members, 2 if strategy == "ensemble" else 1))
    inputs, targets = data.train[:]
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    labelled, unlabelled = order[:first], order[first:]
    records = []

    def make_model() -> nn.Module:
        return model() if callable(model) else build_model(model, input_shape=data.input_shape, outputs=data.outputs)

    for number in range(rounds):
        trained, score = _round(
            strategy,
            make_model,
            module,
            inputs,
            targets,
            labelled,
            members,
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
        )
        error, _ = evaluate(trained, data.test, data.kind)
        row = {"strategy": strategy, "seed": seed, "round": number, "labelled": len(labelled), "test_error": error}
        records.append({**row, **record(trained, labelled)})
        if number < rounds - 1:
            chosen = select_batch(score(), unlabelled, added, pool=pool, seed=seed + number)
            labelled = torch.cat([labelled, chosen])
            unlabelled = unlabelled[~torch.isin(unlabelled, chosen)]
    return pd.DataFrame(records)


def _round(
    strategy: str,
    make_model: Callable[[], nn.Module],
    make_module: Callable[[Sequence[int]], nn.Module],
    inputs: Tensor,
    targets: Tensor,
    labelled: Tensor,
    members: int,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A model trained on the labelled rows, and what gives the strategy's score of every row."""
    pair_loss = PAIR_LOSSES.get(strategy, pair_divergence)

    def trained(member: int) -> tuple[nn.Module, nn.Module, list[nn.Module]]:
        torch.manual_seed(1000 * seed + member)
        model = make_model()
        layers: list[nn.Module] = [layer for layer in model.modules() if isinstance(layer, nn.ReLU)]
        with torch.no_grad(), FeatureTap(layers) as tap:
            model(inputs[:2])
        module = make_module([features.shape[1] for features in tap.maps])
        train_with_loss_module(
            model,
            module,
            layers,
            inputs[labelled],
            targets[labelled],
            pair_loss=pair_loss,
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
        )
        return model, module, layers

    model, module, layers = trained(0)

    def score() -> Tensor:
        if strategy == "random":
            return torch.rand(len(inputs), generator=torch.Generator().manual_seed(seed + len(labelled)))
        if strategy == "ensemble":
            models = [model, *(trained(member)[0] for member in range(1, members))]
            with torch.no_grad():
                predictions = torch.stack([each.eval()(inputs) for each in models])
            return predictions.var(0).mean(1)
        return predict_losses(model, module, layers, inputs)

    return model, score
