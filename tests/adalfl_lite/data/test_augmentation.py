"""Every image of a batch is cropped and flipped by itself, and fit augments what it trains on and nothing else."""

import pytest
import torch
from torch import nn

from adalfl_lite import LossNetwork
from adalfl_lite.compare.tasks import get_task
from adalfl_lite.data.augmentation import crop_and_flip
from adalfl_lite.data.dataset import Dataset, Split
from tests.shorthand import fit


def possible(image, padding):
    """All crops of a padded image, and their mirror images."""
    channels, height, width = image.shape
    padded = torch.zeros(channels, height + 2 * padding, width + 2 * padding)
    padded[:, padding : padding + height, padding : padding + width] = image
    crops = [padded[:, i : i + height, j : j + width] for i in range(2 * padding + 1) for j in range(2 * padding + 1)]
    return torch.stack([*crops, *(crop.flip(-1) for crop in crops)])


def test_each_image_is_one_of_its_crops_and_all_crops_occur():
    torch.manual_seed(0)
    image = torch.rand(2, 5, 6)
    crops = possible(image, 1)
    found = (crop_and_flip(image.expand(600, -1, -1, -1), 1)[:, None] == crops).flatten(2).all(2)
    assert (found.sum(1) == 1).all(), "each result is one of the 18"
    counts = found.sum(0)
    assert counts.min() > 10 and counts.max() < 70, "with about equal chances, 33 each"


def test_images_stay_with_their_rows_and_channels():
    torch.manual_seed(0)
    images = torch.arange(4.0)[:, None, None, None] + torch.tensor([10.0, 20.0])[None, :, None, None]
    changed = crop_and_flip(images.expand(-1, -1, 8, 8), 3)
    assert changed.shape == (4, 2, 8, 8) and changed.is_contiguous()
    assert torch.equal(changed.amax((2, 3)), images[:, :, 0, 0])


def test_without_padding_half_are_mirrored():
    torch.manual_seed(0)
    images = torch.rand(400, 1, 3, 4)
    changed = crop_and_flip(images, 0)
    mirrored = (changed == images.flip(-1)).flatten(1).all(1)
    same = (changed == images).flatten(1).all(1)
    assert (mirrored ^ same).all() and 150 < mirrored.sum() < 250


def test_what_is_no_image_is_refused():
    with pytest.raises(ValueError, match=r"images must be \(N, C, H, W\), got shape \(3, 5\)"):
        crop_and_flip(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="padding must be 0 or more, got -1"):
        crop_and_flip(torch.zeros(1, 1, 2, 2), -1)


def make_data():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (48, 1, 6, 6), generator=generator, dtype=torch.uint8)
    targets = torch.randint(3, (48,), generator=generator)
    moments = {"mean": torch.full((1, 1, 1), 0.5), "std": torch.full((1, 1, 1), 0.25)}
    rows = [slice(0, 24), slice(24, 36), slice(36, 48)]
    parts = [Split(images[r], targets[r], torch.arange(48)[r], **moments) for r in rows]
    return Dataset("images", "classification", *parts, 3, (1, 6, 6))


@pytest.mark.parametrize("meta_batches", ["valid", "train", "next"])
def test_fit_augments_training_rows_alone(meta_batches):
    data, seen = make_data(), []
    train = data.train[:][0]

    def blank(images):
        seen.append((images[:, None] == train).flatten(2).all(2).any(1))
        return torch.zeros_like(images)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model[1].weight.detach().clone()
    loss = LossNetwork.classification()
    fit(
        model,
        loss,
        data,
        optimizer=optimizer,
        steps=5,
        batch_size=8,
        online=True,
        meta_batches=meta_batches,
        augment=blank,
        progress=False,
    )
    assert all(rows.all() for rows in seen)
    assert len(seen) == {"valid": 5, "train": 10, "next": 6}[meta_batches]
    assert torch.equal(model[1].weight, before), "blank images move no weight"


def test_a_resumed_run_draws_the_same_crops(tmp_path):
    def run(steps_at_first, checkpoint):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def stop(step, model, loss):
            if step == steps_at_first:
                raise KeyboardInterrupt

        options = {"optimizer": optimizer, "steps": 8, "batch_size": 8, "evaluate_every": 2, "progress": False}
        options |= {"augment": crop_and_flip, "checkpoint": checkpoint}
        try:
            fit(model, nn.functional.cross_entropy, make_data(), callback=stop, **options)
        except KeyboardInterrupt:
            torch.manual_seed(99)
            fit(model, nn.functional.cross_entropy, make_data(), **options)
        return model[1].weight

    assert torch.equal(run(6, tmp_path / "broken.pt"), run(None, tmp_path / "whole.pt"))


def test_cifar_tasks_are_augmented():
    assert get_task("cifar10-resnet18").augmentation is crop_and_flip
    assert get_task("mnist-lenet5").augmentation is None
