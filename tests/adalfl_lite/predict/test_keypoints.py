"""Drawn figures: joints where the skeleton allows, ink and heat maps where the joints are, a net that finds them."""

import pytest
import torch

from adalfl_lite.predict.keypoints import BONES, JOINTS, HeatmapNet, draw_figures, figures_dataset, missed_joints, peaks

FIGURES = draw_figures(300, noise=0.0, seed=3)


def test_figures_have_the_shapes_promised_and_repeat_by_seed():
    images, heatmaps, joints, acrobat = vars(FIGURES).values()
    assert images.shape == (300, 1, 32, 32) and heatmaps.shape == (300, 11, 16, 16) and joints.shape == (300, 11, 2)
    assert images.dtype == heatmaps.dtype == joints.dtype == torch.float32 and acrobat.dtype == torch.bool
    assert 0 <= images.min() and images.max() <= 1 and 0 <= heatmaps.min() and heatmaps.max() <= 1
    assert torch.equal(draw_figures(300, noise=0.0, seed=3).joints, joints)
    assert not torch.equal(draw_figures(300, noise=0.0, seed=4).joints, joints)


def test_every_joint_is_in_the_image_and_bones_keep_their_lengths():
    joints = FIGURES.joints
    assert 1 < joints.min() and joints.max() < 30
    for start, end in BONES:
        lengths = (joints[:, start] - joints[:, end]).norm(dim=1)
        torch.testing.assert_close(lengths, lengths[:1].expand(300))


def test_there_is_ink_at_the_joints_and_along_the_bones_and_none_far_away():
    rows = torch.arange(300)[:, None]
    for place in (
        FIGURES.joints,
        (FIGURES.joints[:, [a for a, _ in BONES]] + FIGURES.joints[:, [b for _, b in BONES]]) / 2,
    ):
        x, y = place.round().long().unbind(2)
        assert FIGURES.images[rows, 0, y, x].min() > 0.3
    assert FIGURES.images[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]].max() < 0.2
    noisy = draw_figures(300, noise=0.1, seed=3).images - FIGURES.images
    assert noisy.std().item() == pytest.approx(0.1, rel=0.02)


def test_left_limbs_are_dimmer_than_right_ones():
    x, y = FIGURES.joints.round().long().unbind(2)
    left, right = (JOINTS.index(f"{side} hand") for side in ("left", "right"))
    ink = FIGURES.images[torch.arange(300)[:, None], 0, y, x]
    assert ink[:, left].median() < 0.6 < ink[:, right].median()


def test_heat_maps_peak_in_the_cell_of_their_joint():
    assert torch.equal(peaks(FIGURES.heatmaps), peaks(FIGURES.heatmaps.flatten(1)))
    cells = ((FIGURES.joints + 0.5) / 2).floor()
    torch.testing.assert_close(peaks(FIGURES.heatmaps).float(), cells)


def test_acrobats_are_as_many_as_asked_for_and_bend_more():
    assert not draw_figures(50, acrobats=0).acrobat.any() and draw_figures(50, acrobats=1).acrobat.all()
    assert FIGURES.acrobat.float().mean().item() == pytest.approx(0.2, abs=0.08)
    neck, hip = JOINTS.index("neck"), JOINTS.index("hip")
    lean = (FIGURES.joints[:, neck, 0] - FIGURES.joints[:, hip, 0]).abs()
    assert lean[FIGURES.acrobat].mean() > 2 * lean[~FIGURES.acrobat].mean()


def test_joints_are_missed_beyond_a_distance():
    maps = torch.zeros(1, 4, 16, 16)
    moved = maps.clone()
    for joint, shift in enumerate((0, 1, 2, 5)):
        maps[0, joint, 8, 8], moved[0, joint, 8, 8 + shift] = 1, 1
    assert missed_joints(maps, moved).item() == 0.5
    assert missed_joints(maps.flatten(1), moved.flatten(1), within=2).item() == 0.25


def test_the_data_set_is_for_regression_and_its_splits_are_the_figures_in_order():
    data = figures_dataset(6, 3, 4, seed=3)
    assert data.kind == "regression" and data.outputs == 11 * 256
    figures = draw_figures(13, seed=3)
    assert torch.equal(torch.cat([part.inputs for part in (data.train, data.valid, data.test)]), figures.images)
    assert torch.equal(data.test.targets, figures.heatmaps[9:].flatten(1))


def test_a_small_net_learns_to_find_most_joints():
    data = figures_dataset(200, 1, 100, acrobats=0.0)
    (inputs, targets), (unseen, wanted) = data.train[:], data.test[:]
    torch.manual_seed(0)
    model = HeatmapNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    assert missed_joints(model(unseen), wanted) > 0.8
    for _ in range(150):
        rows = torch.randperm(200)[:16]
        optimizer.zero_grad()
        (model(inputs[rows]) - targets[rows]).square().mean().backward()
        optimizer.step()
    assert missed_joints(model(unseen), wanted) < 0.3


@pytest.mark.parametrize("options", [{"acrobats": 1.2}, {"noise": -1.0}, {"acrobats": float("nan")}])
def test_impossible_figures_are_refused(options):
    with pytest.raises(ValueError, match=r"acrobats must lie in \[0, 1\] and noise be 0 or more"):
        draw_figures(3, **options)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        draw_figures(0)
