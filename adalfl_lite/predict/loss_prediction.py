"""Predicting the loss: which unlabelled examples will the model get wrong, so that those are labelled next?

A *loss module* sees the feature maps of the base model and predicts each example's loss l as a score l̂. It is trained
on pairs (i, j) of a batch, for only the order matters, beside the model::

    Learning Loss (Yoo and Kweon 2019)       max(0, ξ − s (l̂_i − l̂_j)),   s = sign(l_i − l_j)    (1)
    LearningLoss++ (Shukla and Ahmed 2021)   KL(p ‖ q),   p = (l_i, l_j)/(l_i + l_j),   q = softmax(l̂_i, l̂_j)  (2)

The gradient of (1) along (l̂_i, l̂_j) is (−s, s) wherever the margin ξ is violated and 0 elsewhere: a pair that is nearly
a tie pushes as hard as one that is far apart. That of (2) is q − p: it vanishes where the scores say by how much the
losses differ, and is smooth in the true difference. It has no margin to choose.

Two modules: :class:`LossModule` averages every feature map over its positions at once, :class:`ConvLossModule` puts the
maps together where they are, so that it can see *what is beside what*.

Everything here is for regression; the true loss of an example is its squared error, averaged over the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adalfl_lite.losses.task import check_regression
from adalfl_lite.passes import eval_mode

PairLoss = Callable[[Tensor, Tensor], Tensor]
"""Called as (predicted, true), both (B,) with B even: example i is paired with i + B/2. Returns a scalar, a mean."""


def example_losses(prediction: Tensor, target: Tensor) -> Tensor:
    """The squared error of each example, the mean over its outputs: (B,) from two tensors (B, K), or two (B,)."""
    check_regression(prediction, target)
    return (prediction - target).square().reshape(len(target), -1).mean(1)


def margin_ranking(predicted: Tensor, true: Tensor, *, margin: float = 1.0) -> Tensor:
    """Learning Loss, equation (1), averaged over the pairs; ``true`` is held fixed."""
    (first, second), (one, other) = _pairs(predicted, true)
    return F.margin_ranking_loss(first, second, (one - other).sign(), margin=margin)


def pair_divergence(predicted: Tensor, true: Tensor) -> Tensor:
    """LearningLoss++, equation (2), averaged over the pairs; ``true`` (>= 0) is held fixed.

    A pair of which both losses are zero is a tie, p = (½, ½).
    """
    scores, losses = _pairs(predicted, true)
    # p of equation (2), the shares of the two true losses; q is the softmax of the two scores
    total = losses.sum(0)
    p = torch.where(total > 0, losses / total.where(total > 0, 1), 0.5)
    return F.kl_div(scores.log_softmax(0), p, reduction="sum") / scores.shape[1]


def _pairs(predicted: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Both as (2, B/2), the true losses without a graph."""
    if predicted.ndim != 1 or predicted.shape != true.shape or not len(true) or len(true) % 2:
        raise ValueError(
            f"predicted and true losses must be of one shape (B,), B even; got {tuple(predicted.shape)} and "
            f"{tuple(true.shape)}"
        )
    if (true < 0).any():
        raise ValueError(f"true losses must not be negative, got {true.min().item()}")
    return predicted.reshape(2, -1), true.detach().reshape(2, -1)


PAIR_LOSSES: dict[str, PairLoss] = {"learning-loss": margin_ranking, "learning-loss++": pair_divergence}


class LossModule(nn.Module):
    """Predicts a score per example from feature maps of several depths, as Learning Loss does.

    Each map is averaged over its positions, put through a fully connected layer of ``width`` units and a ReLU; the
    results are concatenated, and one linear layer gives the score.

    Args:
        features: the number of channels (or units) of each map.
        width: of each fully connected layer.
    """

    def __init__(self, features: Sequence[int], *, width: int = 128):
        super().__init__()
        if not features:
            raise ValueError("a loss module needs at least one feature map, got none")
        self.branches = nn.ModuleList(nn.Linear(count, width) for count in features)
        self.score = nn.Linear(width * len(features), 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Scores (B,) of maps (B, F) or (B, F, H, W), in the order of ``features``."""
        pooled = [values.flatten(2).mean(2) if values.ndim > 2 else values for values in maps]
        hidden = [branch(values).relu() for branch, values in zip(self.branches, pooled, strict=True)]
        return self.score(torch.cat(hidden, 1)).squeeze(1)


class ConvLossModule(nn.Module):
    """Predicts a score per example from image-like feature maps of several scales, as LearningLoss++ does.

    Each map goes through a 3 x 3 convolution of ``width`` channels and a ReLU, and is averaged down to the size of the
    smallest map; the results are concatenated, a second convolution and a ReLU combine them; its maps are averaged over
    their positions, and one linear layer gives the score. (How wide and deep the module is, is our choice.)

    Args:
        features: the number of channels of each map.
        width: channels of each convolution.
    """

    def __init__(self, features: Sequence[int], *, width: int = 16):
        super().__init__()
        if not features:
            raise ValueError("a loss module needs at least one feature map, got none")
        self.branches = nn.ModuleList(nn.Conv2d(count, width, 3, padding=1) for count in features)
        self.combine = nn.Conv2d(width * len(features), width, 3, padding=1)
        self.score = nn.Linear(width, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Scores (B,) of maps (B, F, H, W), in the order of ``features``, their sizes in any order.

        Raises:
            ValueError: a map has no positions.
        """
        for values in maps:
            if values.ndim != 4:
                raise ValueError(
                    f"ConvLossModule needs maps of shape (B, F, H, W), got {tuple(values.shape)}; LossModule takes both"
                )
        height, width = min((values.shape[2:] for values in maps), key=lambda sides: sides[0] * sides[1])
        scales = [
            F.adaptive_avg_pool2d(branch(values).relu(), (height, width))
            for branch, values in zip(self.branches, maps, strict=True)
        ]
        combined = self.combine(torch.cat(scales, 1)).relu()
        return self.score(combined.mean((2, 3))).squeeze(1)


class FeatureTap:
    """Records the outputs of some layers whenever a model runs: ``with FeatureTap(layers) as tap: model(x); tap.maps``.

    Args:
        layers: submodules of the model, in the order in which their outputs are wanted.
    """

    def __init__(self, layers: Sequence[nn.Module]):
        self.layers = list(layers)
        self._outputs: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    @property
    def maps(self) -> list[Tensor]:
        """The outputs of the last forward pass."""
        return [self._outputs[position] for position in range(len(self.layers))]

    def __enter__(self) -> FeatureTap:
        """Begin to listen to the outputs of the layers."""
        for position, layer in enumerate(self.layers):

            def keep(module: nn.Module, inputs: Any, output: Tensor, position: int = position) -> None:
                self._outputs[position] = output

            self._handles.append(layer.register_forward_hook(keep))
        return self

    def __exit__(self, *error: object) -> None:
        """Stop listening to the layers, also after an error."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def predict_losses(model: nn.Module, module: nn.Module, layers: Sequence[nn.Module], inputs: Tensor) -> Tensor:
    """The scores (B,) of ``inputs``, both networks in eval mode (put back afterwards), without a graph."""
    with torch.no_grad(), eval_mode(model, module), FeatureTap(layers) as tap:
        model(inputs)
        return module(tap.maps)


def train_with_loss_module(
    model: nn.Module,
    module: nn.Module,
    layers: Sequence[nn.Module],
    inputs: Tensor,
    targets: Tensor,
    *,
    pair_loss: PairLoss = pair_divergence,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    weight: float = 1.0,
    seed: int = 0,
) -> list[float]:
    """Train a regression model and its loss module together, by Adam on squared error + ``weight`` · pair loss.

    The module sees the features without a graph, so that it reads the model but does not shape it.

    Args:
        model: trained in place, in train mode.
        module: a :class:`LossModule` or :class:`ConvLossModule`, trained likewise.
        layers: submodules of the model whose outputs the module sees.
        inputs: (N, ...).
        targets: (N, K), float.
        pair_loss: of :data:`PAIR_LOSSES`.
        steps: of Adam.
        batch_size: rows per step; an even number, and N at most counts.
        learning_rate: of both.
        weight: of the pair loss.
        seed: of the batches.

    Returns:
        The pair loss at every step.
    """
    size = min(batch_size, len(inputs)) // 2 * 2
    if size < 2:
        raise ValueError(f"pairs need at least 2 rows, got {len(inputs)} rows and batch_size={batch_size}")
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([*model.parameters(), *module.parameters()], lr=learning_rate, fused=True)
    values = []
    model.train(), module.train()
    with FeatureTap(layers) as tap:
        for _ in range(steps):
            rows = torch.randperm(len(inputs), generator=generator)[:size].to(inputs.device)
            losses = example_losses(model(inputs[rows]), targets[rows])
            ranking = pair_loss(module([features.detach() for features in tap.maps]), losses)
            optimizer.zero_grad()
            (losses.mean() + weight * ranking).backward()
            optimizer.step()
            values.append(ranking.item())
    return values


def select_batch(scores: Tensor, unlabelled: Tensor, count: int, *, pool: int | None = None, seed: int = 0) -> Tensor:
    """Active learning: the rows to label next, those with the highest scores.

    Args:
        scores: (N,) of every row, such as :func:`predict_losses`, or random numbers for the control.
        unlabelled: (U,) int64, the rows to choose from.
        count: how many to choose.
        pool: choose within a random subset of so many (Yoo and Kweon do, so that near-duplicates are not all chosen).
        seed: of that subset.

    Returns:
        (count,) int64 rows, highest score first.

    Raises:
        ValueError: there are fewer rows than wanted, or the scores are not finite.
    """
    if pool is not None:
        generator = torch.Generator().manual_seed(seed)
        unlabelled = unlabelled[torch.randperm(len(unlabelled), generator=generator)[:pool]]
    if not 1 <= count <= len(unlabelled):
        raise ValueError(f"count={count} must lie between 1 and the {len(unlabelled)} rows there are to choose from")
    candidates = scores[unlabelled]
    if not torch.isfinite(candidates).all():
        raise ValueError("the scores of some rows are not finite; did the training diverge?")
    return unlabelled[candidates.argsort(descending=True, stable=True)[:count]]
