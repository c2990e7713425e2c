"""How good a model is on a split."""

from __future__ import annotations

import torch
from torch import nn

from adalfl_lite.checks import check_counts, check_output
from adalfl_lite.data.dataset import Split
from adalfl_lite.losses.task import task_error, task_loss
from adalfl_lite.passes import eval_mode


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, kind: str, batch_size: int = 1000) -> tuple[float, float]:
    """(error, task loss) of ``model`` in eval mode over a whole split; the mode of every layer is put back.

    The error rate is the number of wrong examples, a whole one, over the number of examples: equal counts are equal
    errors, whatever the batches. The squared error and the task loss are means of batches, in
    float32, put together in double precision.

    Args:
        model: maps inputs (B, ...) to logits (B, C) or predictions (B, K).
        split: of a data set, with at least one row.
        kind: "classification" or "regression".
        batch_size: rows that go through the model at once.

    Raises:
        ValueError: the split is empty, or the model's outputs do not fit its targets.
        TypeError: it is no split.
    """
    check_counts(batch_size=batch_size)
    if not isinstance(split, Split):
        raise TypeError(f"split must be a Split, such as data.test, got {type(split).__name__}")
    if not len(split):
        raise ValueError("the split is empty; there is nothing to evaluate on")
    error = loss = 0.0
    with eval_mode(model):
        for start in range(0, len(split), batch_size):
            inputs, targets = split[start : start + batch_size]
            prediction = check_output(model(inputs)).float()
            wrong = task_error(kind)(prediction, targets).item() * len(targets)
            # a whole number of examples, so that equal counts give equal errors
            error += round(wrong) if kind == "classification" else wrong
            loss += task_loss(kind)(prediction, targets).item() * len(targets)
    return error / len(split), loss / len(split)
