"""Data sets, as tensors.

Each imports those above it alone::

    sources       where data comes from, and how its files are read
    dataset       split, scaled, in batches
    corruption    label noise and imbalance
    augmentation  crops and flips
"""

from adalfl_lite.data.augmentation import crop_and_flip
from adalfl_lite.data.corruption import with_imbalance, with_label_noise
from adalfl_lite.data.dataset import BatchSampler, Dataset, Split, load_dataset

__all__ = ["BatchSampler", "Dataset", "Split", "crop_and_flip", "load_dataset", "with_imbalance", "with_label_noise"]
