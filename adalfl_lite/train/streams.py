"""The batches of a run: which rows each step trains on, and on which the task loss is taken after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adalfl_lite.data.dataset import BatchSampler, Dataset, Split
from adalfl_lite.engines.steps import Batch

META_BATCHES = ("valid", "train", "next")


class NextBatch:
    """The next step's training batch, where it has been drawn already, as a part of a checkpoint."""

    def __init__(self, device: torch.device) -> None:
        self.batch: Batch | None = None
        self.device = device

    def state_dict(self) -> dict[str, Batch | None]:
        """The batch; None before the first step."""
        return {"batch": self.batch}

    def load_state_dict(self, state: dict[str, Batch | None]) -> None:
        """Restore what :meth:`state_dict` gave, on this run's device."""
        batch = state["batch"]
        self.batch = None if batch is None else (batch[0].to(self.device), batch[1].to(self.device))


class Streams:
    """Batches and meta batches of one run, or of S runs in step, without end.

    Args:
        datasets: one for each run, of one size.
        seeds: one for each run; the same seed gives the same rows.
        batch_size: rows per training batch, and per meta batch where its split has as many.
        meta_batches: "valid", "train", or "next": the meta batch of a step is the training batch of the next one.
        augment: changes the inputs of a training batch at random.
        device: where the batches are.
        collate: joins the batches of all runs into one, see :meth:`~adalfl_lite.learn.Learner.collate`.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        seeds: Sequence[int],
        batch_size: int,
        meta_batches: str,
        augment: Callable[[Tensor], Tensor] | None,
        device: torch.device,
        collate: Callable[[Sequence[Batch]], Batch],
    ):
        self.train = [data.train.to(device) for data in datasets]
        self.meta = [data.valid.to(device) for data in datasets] if meta_batches == "valid" else self.train
        self.meta_batches, self.augment, self.collate = meta_batches, augment, collate
        self.batches = [BatchSampler(len(t), batch_size, seed) for t, seed in zip(self.train, seeds, strict=True)]
        if meta_batches == "next":
            self.metas = [BatchSampler(len(t), batch_size, seed) for t, seed in zip(self.train, seeds, strict=True)]
            for sampler in self.metas:
                next(sampler)  # one batch ahead
        else:
            sizes = [min(batch_size, len(meta)) for meta in self.meta]
            given = zip(self.meta, sizes, seeds, strict=True)
            self.metas = [BatchSampler(len(meta), size, seed + 1) for meta, size, seed in given]
        self.drawn = NextBatch(device)

    def draw(self, adapts: bool) -> tuple[Batch, Batch | None]:
        """The next batch, and the meta batch if there shall be one."""
        rows = [next(sampler) for sampler in self.batches]
        batch = self.drawn.batch or self._read(self.train, rows)
        if not adapts:
            return batch, None
        meta_batch = self._read(self.meta, [next(sampler) for sampler in self.metas])
        if self.meta_batches == "next":
            self.drawn.batch = meta_batch
        return batch, meta_batch

    def _read(self, splits: Sequence[Split], rows: Sequence[Tensor]) -> Batch:
        batches = [split[chosen] for split, chosen in zip(splits, rows, strict=True)]
        if self.augment and splits is self.train:
            batches = [(self.augment(inputs), targets) for inputs, targets in batches]
        return self.collate(batches)

    def parts(self, numbered: bool) -> dict[str, Any]:
        """What a checkpoint keeps, by name; of several runs the names are numbered."""
        found: dict[str, Any] = {}
        for i, (sampler, meta_sampler) in enumerate(zip(self.batches, self.metas, strict=True)):
            number = f" {i}" if numbered else ""
            found |= {f"batches{number}": sampler, f"metas{number}": meta_sampler}
        if self.meta_batches == "next":
            found["next_batch"] = self.drawn
        return found
