"""Label noise and class imbalance: harder versions of a classification task, by a seed.

Both change the train and the valid split, for labels are wrong and classes rare wherever data is collected, and a
method that looks at validation data must bear the same. The test split is never touched: errors are on clean and
balanced data.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from adalfl_lite.data.dataset import Dataset, Split


def with_label_noise(data: Dataset, rate: float, seed: int) -> Dataset:
    """Replace the labels of a fraction of the rows by another class, drawn uniformly (symmetric noise).

    Args:
        data: for classification.
        rate: the fraction of the rows of the train split, and of the valid split, whose label becomes wrong; in [0, 1).
            At (C − 1)/C nothing can be learned.
        seed: which rows, and which labels.

    Raises:
        ValueError: not a classification data set, or a rate out of range.
    """
    _check(data, "label_noise")
    if not 0 <= rate < 1:
        raise ValueError(f"label_noise must lie in [0, 1), got {rate}")
    if rate and not round(rate * len(data.train)):
        raise ValueError(
            f"label_noise={rate} makes none of {len(data.train)} labels wrong; give at least {1 / len(data.train):.2g}"
        )
    generator = torch.Generator().manual_seed(seed)

    def noisy(split: Split) -> Split:
        count = round(rate * len(split))
        rows = torch.randperm(len(split), generator=generator)[:count]
        shift = torch.randint(1, data.outputs, (count,), generator=generator)
        return relabelled(split, rows, shift, data.outputs)

    return replace(data, train=noisy(data.train), valid=noisy(data.valid))


def relabelled(split: Split, rows: Tensor, shift: Tensor, classes: int) -> Split:
    """The split, the labels of some of its rows moved on by ``shift`` in 1 ... C − 1, so that each is wrong.

    Args:
        split: with classes (N,) for targets.
        rows: which ones, as (n,) indices or a mask (N,).
        shift: (n,), int64.
        classes: C.
    """
    targets = split.targets.clone()
    targets[rows] = (targets[rows] + shift) % classes
    return replace(split, targets=targets)


def with_imbalance(data: Dataset, ratio: float, seed: int) -> Dataset:
    """Remove rows so that class sizes fall geometrically: class c keeps the fraction ρ^{−c/(C−1)} of its rows.

    Class 0 stays whole and the last class keeps 1/ρ, each at least one row ("long-tailed": Cui et al. 2019).

    Args:
        data: for classification.
        ratio: ρ >= 1, how many times larger the first class is made than the last; 1 changes nothing.
        seed: which rows stay; they keep their order.

    Raises:
        ValueError: not a classification data set, or a ratio below 1.
    """
    _check(data, "imbalance")
    if not 1 <= ratio < float("inf"):
        raise ValueError(f"imbalance must be 1 or more, got {ratio}")
    generator = torch.Generator().manual_seed(seed)

    def thinned(split: Split) -> Split:
        kept: list[Tensor] = []
        for label in range(data.outputs):
            rows = (split.targets == label).nonzero().flatten()
            count = max(1, round(len(rows) * ratio ** (-label / (data.outputs - 1))))
            kept.append(rows[torch.randperm(len(rows), generator=generator)[:count]])
        return split.take(torch.cat(kept).sort().values)

    train = thinned(data.train)
    if ratio > 1 and len(train) == len(data.train):
        raise ValueError(f"imbalance={ratio} removes none of {len(train)} rows of {data.name}; give a larger one")
    return replace(data, train=train, valid=thinned(data.valid))


def _check(data: Dataset, option: str) -> None:
    if data.kind != "classification":
        raise ValueError(f"{option} is for classification; {data.name} is {data.kind}")
