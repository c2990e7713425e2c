"""Where data comes from: the files of every source, found or fetched, checked, and read into arrays.

A source is fetched only on request, and read only if it is there and, where a checksum is known, intact. Two are
pickles, which could run code: CIFAR's, whose checksums are compared before they are read, and California Housing's,
which scikit-learn writes itself in a form of its own version; use no copy of that one but yours. Scikit-learn and
torchvision take seconds to import, so that is done where a source of theirs is read.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Kind = Literal["classification", "regression"]
Table = tuple[np.ndarray, np.ndarray]
"""Features (N, D), where NaN is a missing value, and targets (N,)."""
Images = tuple[Tensor, Tensor]
"""uint8 (N, C, H, W) and int64 (N,)."""


@dataclass(frozen=True)
class TableSource:
    """How a table is read: from the root folder, fetching missing files or not."""

    kind: Kind
    read: Callable[[Path, bool], Table]
    standardise: bool = True


@dataclass(frozen=True)
class ImageSource:
    """How an image set is read, by its name, into its official training and test sets."""

    classes: int
    read: Callable[[str, Path, bool], tuple[Images, Images]]


def _require(name: str, files: dict[Path, str | None], fetch: Callable[[], object], download: bool) -> None:
    """Check that all files exist and have their md5 (None: not known), after fetching missing ones if allowed."""
    if download and not all(path.is_file() for path in files):
        fetch()
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{name}: {', '.join(missing)} not found. Call load_dataset({name!r}, download=True) to fetch the data"
            " (adalfl ... --download), or point root= (--root) or the environment variable ADALFL_DATA to the folder"
            " that holds it."
        )
    for path, md5 in files.items():
        if md5 is None:
            continue
        with path.open("rb") as file:
            found = hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest()
        if found != md5:
            raise RuntimeError(
                f"{name}: {path} is damaged or not the official file (md5 {found}, expected {md5})."
                f" Delete it and call load_dataset({name!r}, download=True)."
            )


# Tables ------------------------------------------------------------------------------------------------------------


def _read_digits(root: Path, download: bool) -> Table:
    from sklearn.datasets import load_digits

    inputs, targets = load_digits(return_X_y=True)
    return inputs / 16, targets


def _read_california(root: Path, download: bool) -> Table:
    from sklearn.datasets import fetch_california_housing

    path = root / "cal_housing_py3.pkz"  # scikit-learn writes this file itself, so its checksum is not fixed
    fetch = partial(fetch_california_housing, data_home=root, return_X_y=True)
    _require("california", {path: None}, fetch, download)
    try:
        return fetch(download_if_missing=False)
    except Exception as error:
        raise RuntimeError(f"california: {path} cannot be read. Delete it and load with download=True.") from error


_COMMUNITIES_URL = "https://archive.ics.uci.edu/ml/machine-learning-databases/communities/communities.data"
_COMMUNITIES_MD5 = "4b2433c94afe43119fae78309a22778e"


def _read_communities(root: Path, download: bool) -> Table:
    """Return (1994, 100) features with one NaN, and the (1994,) target ViolentCrimesPerPop.

    Of the 127 columns before the target, the first five (state, county, community, communityname, fold) are not
    predictive by the data set's own description. Of the other 122, the 22 from the LEMAS police survey that have no
    value for 1675 of the 1994 communities are dropped. One missing value remains, one community's OtherPerCap;
    standardisation sets it to the mean of the train split.
    """
    path = root / "communities" / "communities.data"

    def fetch() -> None:
        from torchvision.datasets.utils import download_url

        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
            download_url(_COMMUNITIES_URL, temporary, path.name, md5=_COMMUNITIES_MD5)
            os.replace(Path(temporary) / path.name, path)

    _require("communities", {path: _COMMUNITIES_MD5}, fetch, download)
    table = np.genfromtxt(path, delimiter=",", missing_values="?", usecols=range(5, 128))
    inputs, targets = table[:, :-1], table[:, -1]
    return inputs[:, np.isnan(inputs).mean(axis=0) < 0.5], targets


def _read_diabetes(root: Path, download: bool) -> Table:
    from sklearn.datasets import load_diabetes

    return load_diabetes(return_X_y=True, scaled=False)  # as measured; the statistics are those of the train split


def _bundled(name: str) -> Callable[[Path, bool], Table]:
    """Read what a function of that name in ``sklearn.datasets`` returns, as it is."""

    def read(root: Path, download: bool) -> Table:
        from sklearn import datasets

        return getattr(datasets, name)(return_X_y=True)

    return read


TABLES = {
    "digits": TableSource("classification", _read_digits, standardise=False),
    "iris": TableSource("classification", _bundled("load_iris")),
    "wine": TableSource("classification", _bundled("load_wine")),
    "breast_cancer": TableSource("classification", _bundled("load_breast_cancer")),
    "diabetes": TableSource("regression", _read_diabetes),
    "california": TableSource("regression", _read_california),
    "communities": TableSource("regression", _read_communities),
}
"""Every table by its name."""


# Images ------------------------------------------------------------------------------------------------------------

# The unpacked files; torchvision records the md5 of the archives they come in, and does not check them once unpacked.
_MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def _read_mnist(name: str, root: Path, download: bool) -> tuple[Images, Images]:
    from torchvision.datasets import MNIST
    from torchvision.datasets.mnist import read_image_file, read_label_file

    raw = root / "MNIST" / "raw"
    files: dict[Path, str | None] = {raw / file: md5 for file, md5 in _MNIST_MD5.items()}
    _require(name, files, lambda: MNIST(root, download=True), download)

    def read(part: str) -> Images:
        images = read_image_file(str(raw / f"{part}-images-idx3-ubyte"))
        return images.unsqueeze(1), read_label_file(str(raw / f"{part}-labels-idx1-ubyte"))

    return read("train"), read("t10k")


def _read_cifar(name: str, root: Path, download: bool) -> tuple[Images, Images]:
    from torchvision.datasets import CIFAR10, CIFAR100

    source = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    checksums = [*source.train_list, *source.test_list, [source.meta["filename"], source.meta["md5"]]]
    files: dict[Path, str | None] = {root / source.base_folder / file: md5 for file, md5 in checksums}
    _require(name, files, lambda: source(root, download=True), download)

    def read(train: bool) -> Images:
        part = source(root, train=train)
        return torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)

    return read(True), read(False)


def _read_svhn(name: str, root: Path, download: bool) -> tuple[Images, Images]:
    from torchvision.datasets import SVHN

    parts = ("train", "test")
    files: dict[Path, str | None] = {root / SVHN.split_list[p][1]: SVHN.split_list[p][2] for p in parts}
    _require(name, files, lambda: [SVHN(root, split=part, download=True) for part in parts], download)

    def read(part: str) -> Images:
        data = SVHN(root, split=part)
        return torch.from_numpy(data.data).contiguous(), torch.from_numpy(data.labels)

    return read("train"), read("test")


IMAGES = {
    "mnist": ImageSource(10, _read_mnist),
    "cifar10": ImageSource(10, _read_cifar),
    "cifar100": ImageSource(100, _read_cifar),
    "svhn": ImageSource(10, _read_svhn),
}
"""Every image set by its name."""
