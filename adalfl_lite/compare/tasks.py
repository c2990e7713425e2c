"""The task registry: which model learns which data set, and how. One row each; read it as the protocol.

Base settings follow the authors' related code where we know it (SGD, Nesterov .9 and weight decay 5e-4 for colour
images, no momentum for MNIST, and for CIFAR a learning rate that drops to a tenth twice); for the small tables they are
ours. Steps are chosen so that the handcrafted loss has converged, or has begun to overfit. How rows are split and
inputs scaled belongs to the data set, see :mod:`adalfl_lite.data.dataset`.

The paper's pairs of data set and model are those with california, communities, diabetes, mnist, cifar10, cifar100 and
svhn; digits, iris, wine and breast_cancer are small ones that need no file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from adalfl_lite.checks import unknown
from adalfl_lite.data.augmentation import crop_and_flip
from adalfl_lite.data.corruption import with_imbalance, with_label_noise
from adalfl_lite.data.dataset import Dataset, Kind, dataset_kind, load_dataset
from adalfl_lite.models import build_model


@dataclass(frozen=True)
class Task:
    """A data set, a base model and the settings of its base optimizer, SGD.

    ``drops`` are the moments, as fractions of the training, at which the learning rate falls to a tenth;
    ``augment`` crops and flips training images, see :mod:`adalfl_lite.data.augmentation`; ``label_noise`` and
    ``imbalance`` make a classification task harder, see :mod:`adalfl_lite.data.corruption`.
    """

    name: str
    dataset: str
    model: str
    steps: int
    batch_size: int = 100
    learning_rate: float = 0.01
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    drops: tuple[float, ...] = ()
    augment: bool = False
    label_noise: float = 0.0
    imbalance: float = 1.0

    def __post_init__(self) -> None:
        """Refuse drops that would never come."""
        if wrong := [drop for drop in self.drops if not 0 < drop < 1]:
            raise ValueError(
                f"drops are fractions of the training, between 0 and 1, got {wrong[0]}; divide a step by steps"
            )

    @property
    def kind(self) -> Kind:
        """What is learned; known before the data are loaded. A subclass with data of its own says so itself."""
        return dataset_kind(self.dataset)

    def load(self, *, root: str | None = None, download: bool = False, seed: int = 0) -> Dataset:
        """The data set, split (and corrupted) with ``seed``; see :func:`adalfl_lite.data.dataset.load_dataset`."""
        data = load_dataset(self.dataset, root=root, download=download, seed=seed)
        if self.imbalance != 1:
            data = with_imbalance(data, self.imbalance, seed)
        return with_label_noise(data, self.label_noise, seed) if self.label_noise else data

    def make_model(self, data: Dataset) -> nn.Module:
        """A fresh base model for ``data``, drawn from torch's global random state."""
        return build_model(self.model, input_shape=data.input_shape, outputs=data.outputs)

    def make_optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.SGD:
        """The base optimizer of the task, over the parameters of a model."""
        return torch.optim.SGD(
            parameters,
            lr=self.learning_rate,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
        )

    @property
    def augmentation(self) -> Callable[[Tensor], Tensor] | None:
        """What changes the images of a training batch, for ``fit``; None if nothing does."""
        return crop_and_flip if self.augment else None

    def schedule(self, step: int) -> float:
        """The factor of the learning rate at a step."""
        return 0.1 ** sum(step >= round(drop * self.steps) for drop in self.drops)

    def make_scheduler(self, optimizer: torch.optim.Optimizer) -> LambdaLR | None:
        """The drops, to be advanced after every step; None if there are none."""
        return LambdaLR(optimizer, self.schedule) if self.drops else None

    def with_(self, **changes: Any) -> Task:
        """The same task with some settings changed."""
        return replace(self, **changes)

    def corrupted(self, *, label_noise: float = 0.0, imbalance: float = 1.0) -> Task:
        """The same task, harder, and named so: ``digits`` becomes ``digits-noise0.4`` or ``digits-imbalance10``.

        Raises:
            ValueError: the task is corrupted already.
        """
        if self.label_noise or self.imbalance != 1:
            raise ValueError(f"task {self.name!r} is corrupted already; give label_noise and imbalance in one call")
        noise = f"-noise{label_noise:g}" if label_noise else ""
        rarity = f"-imbalance{imbalance:g}" if imbalance != 1 else ""
        return self.with_(name=self.name + rarity + noise, label_noise=label_noise, imbalance=imbalance)


IMAGES: dict[str, Any] = {"batch_size": 128, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
CIFAR: dict[str, Any] = {**IMAGES, "augment": True, "steps": 150_000, "drops": (2 / 3, 0.9)}

TASKS = {
    task.name: task
    for task in (
        Task("digits", "digits", "mlp64", steps=1500, momentum=0.9),
        Task("iris", "iris", "mlp64", steps=500, batch_size=30, momentum=0.9),
        Task("wine", "wine", "mlp64", steps=500, batch_size=32, momentum=0.9),
        Task("breast_cancer", "breast_cancer", "mlp64", steps=1000, momentum=0.9),
        Task("diabetes", "diabetes", "mlp64", steps=1000, batch_size=32),
        Task("communities", "communities", "mlp64", steps=3000, batch_size=64),
        Task("california", "california", "mlp64", steps=10_000),
        Task("mnist-linear", "mnist", "linear", steps=10_000),
        Task("mnist-mlp", "mnist", "mlp", steps=10_000),
        Task("mnist-lenet5", "mnist", "lenet5", steps=10_000),
        Task("cifar10-allcnn_c", "cifar10", "allcnn_c", **CIFAR),
        Task("cifar10-vgg16", "cifar10", "vgg16", **CIFAR),
        Task("cifar10-resnet18", "cifar10", "resnet18", **CIFAR),
        Task("cifar10-squeezenet", "cifar10", "squeezenet", **CIFAR),
        Task("cifar100-wrn28_10", "cifar100", "wrn28_10", **CIFAR),
        Task("svhn-wrn16_8", "svhn", "wrn16_8", steps=150_000, **IMAGES),
    )
}


def get_task(name: str) -> Task:
    """The task of that name; ``ValueError`` listing the known ones if there is none."""
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]
