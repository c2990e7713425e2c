"""Data sets as tensors in memory, split into train, valid and test, and a seeded, resumable batch sampler.

For example::

    data = load_dataset("digits", seed=0)
    batches = BatchSampler(len(data.train), batch_size=100, seed=0)
    inputs, targets = data.train[next(batches)]

Three promises hold for every data set: the three splits share no row and together use every row once; whatever is
estimated (means, standard deviations) is estimated on the train split alone; and a file is read only if it is there
and, where a checksum is known, intact. Nothing is downloaded unless asked for (:mod:`adalfl_lite.data.sources`).

=============  ==============  ==================================  ================================
name           kind            source                              read from, below ``root``
=============  ==============  ==================================  ================================
digits         classification  scikit-learn                        (bundled)
iris           classification  scikit-learn                        (bundled)
wine           classification  scikit-learn                        (bundled)
breast_cancer  classification  scikit-learn                        (bundled)
diabetes       regression      scikit-learn                        (bundled)
california     regression      ``sklearn.datasets``                ``cal_housing_py3.pkz``
communities    regression      UCI, Communities and Crime          ``communities/communities.data``
mnist          classification  ``torchvision.datasets.MNIST``      ``MNIST/raw/``
cifar10        classification  ``torchvision.datasets.CIFAR10``    ``cifar-10-batches-py/``
cifar100       classification  ``torchvision.datasets.CIFAR100``   ``cifar-100-python/``
svhn           classification  ``torchvision.datasets.SVHN``       ``{train,test}_32x32.mat``
=============  ==============  ==================================  ================================
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adalfl_lite.checks import check_inputs, check_rows, check_targets, unknown
from adalfl_lite.data.sources import IMAGES, TABLES, Kind
from adalfl_lite.losses.task import check_kind


@dataclass(frozen=True)
class Split:
    """One of the three parts of a data set, held in memory.

    Attributes:
        inputs: (N, ...) float32, ready for a model; or uint8 images (N, C, H, W), normalised when they are read.
        targets: (N,) int64 class indices, or (N, K) float32.
        indices: (N,) int64, the rows of the source that this split holds. An official test set that comes as a source
            of its own is numbered after the rows of the training source, so one numbering covers all three splits.
        mean: (C, 1, 1) float32, with uint8 inputs only: the mean per channel of pixels scaled to [0, 1].
        std: (C, 1, 1) float32, the same for the standard deviation.

    Raises:
        ValueError: the numbers of rows or the devices differ; inputs or targets are of another type or shape, not
            finite, or labels negative; or uint8 inputs come without mean and std, or others with them.
        TypeError: something is not a tensor.
    """

    inputs: Tensor
    targets: Tensor
    indices: Tensor
    mean: Tensor | None = None
    std: Tensor | None = None

    def __post_init__(self) -> None:
        """Check that the tensors belong together."""
        check_rows(inputs=self.inputs, targets=self.targets, indices=self.indices)
        check_inputs(self.inputs)
        check_targets(self.targets)
        if self.inputs.dtype == torch.uint8 and (self.mean is None or self.std is None):
            raise ValueError("uint8 inputs need mean= and std= to be normalised with")
        if self.inputs.dtype != torch.uint8 and not (self.mean is None and self.std is None):
            raise ValueError(f"mean= and std= are for uint8 images, the inputs are {self.inputs.dtype}; leave them out")

    def __repr__(self) -> str:
        """Say how many rows of what, without the numbers in them."""
        kept = {"inputs": self.inputs, "targets": self.targets}
        parts = [f"{name}={tuple(tensor.shape)} {tensor.dtype}" for name, tensor in kept.items()]
        return f"Split({', '.join(parts)})"

    def __len__(self) -> int:
        """Return the number of rows N."""
        return len(self.inputs)

    def __getitem__(self, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Return float32 inputs (images normalised per channel) and targets of the given rows of this split.

        ``rows`` counts within the split, 0 to N - 1: an int64 tensor (B,), or a slice; ``split[:]`` is everything.
        """
        inputs = self.inputs[rows]
        if self.mean is not None and self.std is not None:
            inputs = (inputs.float() / 255 - self.mean) / self.std
        return inputs, self.targets[rows]

    def take(self, rows: Tensor | slice) -> Split:
        """Return the split of these rows alone, ``rows`` as in :meth:`__getitem__`."""
        return replace(self, inputs=self.inputs[rows], targets=self.targets[rows], indices=self.indices[rows])

    def batches(self, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Draw endless (inputs, targets) batches in the order of :class:`BatchSampler`."""
        return (self[rows] for rows in BatchSampler(len(self), batch_size, seed))

    def to(self, device: torch.device | str) -> Split:
        """Return the split with its tensors on ``device``."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return replace(self, **tensors)


@dataclass(frozen=True)
class Dataset:
    """A named data set in three disjoint splits.

    Attributes:
        name: the name it is loaded by.
        kind: "classification" or "regression".
        train: the rows to train on.
        valid: the rows for meta batches and for choosing settings.
        test: the rows to report on.
        outputs: the number of classes C, or of target variables K.
        input_shape: the shape of one input, without the batch dimension.

    Raises:
        ValueError: a split is empty or does not fit the kind, the outputs or the input shape.
    """

    name: str
    kind: Kind
    train: Split
    valid: Split
    test: Split
    outputs: int
    input_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check that the splits are what the other attributes say."""
        check_kind(self.kind)
        for name in ("train", "valid", "test"):
            split = getattr(self, name)
            if not len(split):
                raise ValueError(f"the {name} split of {self.name} is empty; every split needs rows")
            shape = tuple(split.inputs.shape[1:])
            if shape != tuple(self.input_shape):
                raise ValueError(f"the {name} inputs have shape {shape}, not input_shape={tuple(self.input_shape)}")
            if (self.kind == "regression") != split.targets.is_floating_point():
                raise ValueError(
                    f"{self.kind} does not go with {name} targets of {split.targets.dtype}; classification takes int64"
                    " class indices, regression floating-point targets"
                )
            if self.kind == "classification":
                check_targets(split.targets, f"{name} targets", self.outputs)
            elif split.targets.shape[1] != self.outputs:
                raise ValueError(
                    f"the {name} targets have shape {tuple(split.targets.shape)}, not outputs={self.outputs}"
                )


BUNDLED = ("digits", "iris", "wine", "breast_cancer", "diabetes")
"""The data sets that scikit-learn brings along."""


def dataset_names() -> list[str]:
    """Return the names that :func:`load_dataset` knows."""
    return [*TABLES, *IMAGES]


def dataset_kind(name: str) -> Kind:
    """Return "classification" or "regression" without reading any file; ``ValueError`` for an unknown name."""
    if name not in dataset_names():
        raise unknown("data set", name, dataset_names())
    return TABLES[name].kind if name in TABLES else "classification"


def load_dataset(
    name: str,
    *,
    root: str | os.PathLike[str] | None = None,
    download: bool = False,
    seed: int = 0,
    valid_size: int | None = None,
) -> Dataset:
    """Load a data set and split it; the same seed gives the same split.

    *Tables* are split 60/20/20 at random, keeping the class proportions in classification. Features are standardised
    with the mean and standard deviation of the train split (a constant column becomes 0), except for digits, whose
    16 grey levels are scaled to [0, 1]. Regression targets are standardised the same way, so a mean squared error is
    in units of the target's variance in the train split, and predicting its mean scores 1 there.

    *Images* stay uint8 and are normalised per channel, with statistics of the train split, when a batch is read. The
    official test set is the test split; ``valid_size`` rows of the official training set, drawn at random, are the
    valid split.

    Args:
        name: one of :func:`dataset_names`.
        root: the folder that holds the files; without it the environment variable ``ADALFL_DATA``, and without that
            ``~/.cache/adalfl``. The bundled sets need no files.
        download: fetch missing files from their official source. Files that are there are never fetched again.
        seed: seeds the split; 0 to 2**32 - 1.
        valid_size: for image sets, the size of the valid split; 10,000 if not given.

    Raises:
        ValueError: unknown name, a ``seed`` out of range, or a ``valid_size`` that cannot be met.
        FileNotFoundError: a file is missing and ``download`` is False.
        RuntimeError: a file is damaged.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must lie in [0, 2**32), got {seed}")
    folder = Path(root or os.environ.get("ADALFL_DATA") or Path.home() / ".cache" / "adalfl").expanduser()
    if name in IMAGES:
        return _load_images(name, folder, download, seed, 10_000 if valid_size is None else valid_size)
    if name not in TABLES:
        raise unknown("data set", name, dataset_names())
    if valid_size is not None:
        raise ValueError(f"valid_size={valid_size} is for image sets; {name!r} is a table, which is split 60/20/20")
    return _load_table(name, folder, download, seed)


class BatchSampler(Iterator[Tensor]):
    """Endless mini-batches of row numbers: a fresh random permutation each epoch, its ragged tail dropped.

    The sequence depends on ``n``, ``batch_size`` and ``seed`` alone, not on torch's global generator.

    Args:
        n: the number of rows to draw from.
        batch_size: rows per batch, at most ``n``.
        seed: seeds the permutations.

    Raises:
        ValueError: ``batch_size`` is not between 1 and ``n``.
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        """Start at the first batch of the first epoch."""
        if not 1 <= batch_size <= n:
            raise ValueError(f"batch_size={batch_size} must be between 1 and the number of rows, n={n}")
        self.n = n
        self.batch_size = batch_size
        self._generator = torch.Generator().manual_seed(operator.index(seed))
        self._start_epoch()

    def _start_epoch(self) -> None:
        self._epoch_state = self._generator.get_state()
        self._order = torch.randperm(self.n, generator=self._generator)
        self._position = 0

    def __next__(self) -> Tensor:
        """Return the next (batch_size,) int64 tensor of distinct rows, on the CPU."""
        if self._position + self.batch_size > self.n:
            self._start_epoch()
        rows = self._order[self._position : self._position + self.batch_size]
        self._position += self.batch_size
        return rows

    def state_dict(self) -> dict[str, int | Tensor]:
        """Return where the sampler is, as integers and one tensor (safe for ``torch.load(weights_only=True)``)."""
        return {
            "n": self.n,
            "batch_size": self.batch_size,
            "position": self._position,
            "epoch_state": self._epoch_state.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the sampler that gave ``state`` was.

        Raises:
            ValueError: ``state`` belongs to another ``n`` or ``batch_size``.
        """
        theirs, ours = (state["n"], state["batch_size"]), (self.n, self.batch_size)
        if theirs != ours:
            raise ValueError(f"the state is of a sampler with (n, batch_size) = {theirs}, this one has {ours}")
        self._generator.set_state(state["epoch_state"])
        self._start_epoch()
        self._position = int(state["position"])


# Files: there, intact, or a clear refusal --------------------------------------------------------------------------


def _standardise(values: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Fill NaN with the mean, scale to mean 0 and std 1, all by the ``train`` rows; constant columns become 0."""
    values = np.where(np.isnan(values), np.nanmean(values[train], axis=0), values)
    constant = np.ptp(values[train], axis=0) == 0
    mean, std = values[train].mean(axis=0), np.where(constant, 1.0, values[train].std(axis=0))
    return np.where(constant, 0.0, (values - mean) / std)


def _load_table(name: str, root: Path, download: bool, seed: int) -> Dataset:
    from sklearn.model_selection import train_test_split  # takes seconds

    table = TABLES[name]
    inputs, targets = table.read(root, download)
    n = len(inputs)
    fifth = round(n / 5)
    classes = targets if table.kind == "classification" else None
    rest, test = train_test_split(np.arange(n), test_size=fifth, random_state=seed, stratify=classes)
    classes = classes if classes is None else classes[rest]
    train, valid = train_test_split(rest, test_size=fifth, random_state=seed, stratify=classes)

    if table.standardise:
        inputs = _standardise(inputs, train)
    x = torch.tensor(inputs, dtype=torch.float32)
    if table.kind == "classification":
        y = torch.tensor(targets, dtype=torch.int64)
        outputs = int(y.max()) + 1
    else:
        y = torch.tensor(_standardise(targets[:, None], train), dtype=torch.float32)
        outputs = y.shape[1]

    def split(rows: np.ndarray) -> Split:
        indices = torch.from_numpy(rows)
        return Split(x[indices], y[indices], indices)

    return Dataset(name, table.kind, split(train), split(valid), split(test), outputs, tuple(x.shape[1:]))


def _channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (C, 1, 1) mean and std of pixels in [0, 1], one channel at a time to keep memory small."""
    statistics = [torch.std_mean(images[:, c].float() / 255, correction=0) for c in range(images.shape[1])]
    std, mean = (torch.stack(values).view(-1, 1, 1) for values in zip(*statistics, strict=True))
    return mean, torch.where(std > 0, std, 1.0)


def _load_images(name: str, root: Path, download: bool, seed: int, valid_size: int) -> Dataset:
    from sklearn.model_selection import train_test_split  # takes seconds

    source = IMAGES[name]
    (images, labels), (test_images, test_labels) = source.read(name, root, download)
    n = len(images)
    if not 1 <= valid_size < n:
        raise ValueError(f"valid_size={valid_size} must be between 1 and {n - 1}: {name} has {n} training images")
    train, valid = map(torch.from_numpy, train_test_split(np.arange(n), test_size=valid_size, random_state=seed))

    train_images = images[train]
    mean, std = _channel_statistics(train_images)
    test_indices = torch.arange(n, n + len(test_images))
    return Dataset(
        name,
        "classification",
        Split(train_images, labels[train], train, mean, std),
        Split(images[valid], labels[valid], valid, mean, std),
        Split(test_images, test_labels, test_indices, mean, std),
        source.classes,
        tuple(images.shape[1:]),
    )
