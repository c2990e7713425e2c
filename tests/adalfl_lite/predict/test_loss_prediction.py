"""Loss prediction: the two pair losses against their formulas and gradients, and what the scores are good for."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adalfl_lite.predict.loss_prediction import (
    PAIR_LOSSES,
    ConvLossModule,
    FeatureTap,
    LossModule,
    example_losses,
    margin_ranking,
    pair_divergence,
    predict_losses,
    select_batch,
    train_with_loss_module,
)


def scores_and_losses(seed=0, rows=10):
    generator = torch.Generator().manual_seed(seed)
    predicted = torch.randn(rows, generator=generator).double().requires_grad_(True)
    return predicted, torch.rand(rows, generator=generator).double()


# The pair losses ---------------------------------------------------------------------------------------------------


def test_the_margin_loss_is_its_formula_and_its_gradient_a_constant():
    """−s and s over the number of pairs where ξ − s(l̂_i − l̂_j) > 0, else 0."""
    predicted, true = scores_and_losses()
    (i, j), (a, b) = predicted.reshape(2, -1), true.reshape(2, -1)
    sign, violated = (a - b).sign(), 0.7 - (a - b).sign() * (i - j) > 0
    value = margin_ranking(predicted, true, margin=0.7)
    assert value.item() == pytest.approx((violated * (0.7 - sign * (i - j))).mean().item())
    (gradient,) = torch.autograd.grad(value, predicted)
    torch.testing.assert_close(gradient, torch.cat([-sign * violated, sign * violated]) / 5)
    assert 0 < violated.sum() < 5


def test_the_divergence_is_its_formula_and_its_gradient_is_q_minus_p():
    predicted, true = scores_and_losses()
    p = true.reshape(2, -1) / true.reshape(2, -1).sum(0)
    q = predicted.reshape(2, -1).softmax(0)
    value = pair_divergence(predicted, true)
    assert value.item() == pytest.approx((p * (p / q).log()).sum(0).mean().item())
    (gradient,) = torch.autograd.grad(value, predicted)
    torch.testing.assert_close(gradient, (q - p).flatten().detach() / 5)


def test_near_ties_push_as_hard_as_others_under_the_margin_loss_and_little_under_the_divergence():
    for true, steep in ((torch.tensor([1.0, 1.001]), 0.00025), (torch.tensor([1.0, 9.0]), 0.4)):
        predicted = torch.zeros(2, requires_grad=True)
        (margin,) = torch.autograd.grad(margin_ranking(predicted, true), predicted)
        (divergence,) = torch.autograd.grad(pair_divergence(predicted, true), predicted)
        assert margin.tolist() == [1, -1]
        assert divergence[0].item() == pytest.approx(steep, rel=0.01)


def test_the_divergence_vanishes_where_scores_are_log_losses_and_bears_zero_losses():
    _, true = scores_and_losses()
    assert pair_divergence(true.log() + 3, true).item() == pytest.approx(0, abs=1e-12)
    for losses in ([0.0, 0.0], [0.0, 2.0]):
        predicted = torch.tensor([0.3, -0.2], requires_grad=True)
        (gradient,) = torch.autograd.grad(pair_divergence(predicted, torch.tensor(losses)), predicted)
        p = torch.tensor([0.5, 0.5] if losses[1] == 0 else [0.0, 1.0])
        torch.testing.assert_close(gradient, (predicted.softmax(0) - p).detach())


@pytest.mark.parametrize("pair_loss", PAIR_LOSSES.values())
def test_the_true_losses_get_no_gradient_and_bad_pairs_are_refused(pair_loss):
    predicted, true = scores_and_losses()
    true = true.requires_grad_(True)
    assert torch.autograd.grad(pair_loss(predicted, true), true, allow_unused=True) == (None,)
    for bad in ((predicted[:5], true[:5]), (predicted, true[:8]), (predicted[:0], true[:0])):
        with pytest.raises(ValueError, match=r"one shape \(B,\), B even"):
            pair_loss(*bad)
    with pytest.raises(ValueError, match="must not be negative, got -"):
        pair_loss(predicted, -true)


def test_example_losses_average_to_the_mean_squared_error():
    prediction, target = torch.randn(6, 3), torch.randn(6, 3)
    losses = example_losses(prediction, target)
    assert losses.shape == (6,)
    assert losses.mean().item() == pytest.approx(F.mse_loss(prediction, target).item())
    with pytest.raises(ValueError, match=r"one shape"):
        example_losses(prediction, target[:, :2])


# The module --------------------------------------------------------------------------------------------------------


def test_the_module_averages_positions_and_reads_every_map():
    torch.manual_seed(0)
    module = LossModule([4, 6], width=8)
    images, units = torch.randn(5, 4, 7, 7), torch.randn(5, 6)
    scores = module([images, units])
    assert scores.shape == (5,)
    shuffled = images.flatten(2)[:, :, torch.randperm(49)].reshape(images.shape)
    torch.testing.assert_close(module([shuffled, units]), scores)
    assert not torch.allclose(module([images * 2, units]), scores)
    assert not torch.allclose(module([images, units * 2]), scores)
    with pytest.raises(ValueError, match="at least one feature map"):
        LossModule([])


def test_the_convolutional_module_sees_what_is_beside_what_at_every_scale():
    torch.manual_seed(0)
    module = ConvLossModule([4, 6], width=8)
    fine, coarse = torch.randn(5, 4, 8, 8), torch.randn(5, 6, 4, 4)
    scores = module([fine, coarse])
    assert scores.shape == (5,)
    shuffled = coarse.flatten(2)[:, :, torch.randperm(16)].reshape(coarse.shape)
    for maps in ([fine * 2, coarse], [fine, coarse * 2], [fine, shuffled]):
        assert not torch.allclose(module(maps), scores)
    other_order = ConvLossModule([6, 4], width=8)
    other_order.load_state_dict(module.state_dict() | swapped(module))
    torch.testing.assert_close(other_order([coarse, fine]), scores)
    torch.testing.assert_close(module([fine, coarse])[:2], module([fine[:2], coarse[:2]]))
    with pytest.raises(ValueError, match=r"\(B, F, H, W\), got \(5, 6\)"):
        module([fine, coarse[:, :, 0, 0]])
    with pytest.raises(ValueError, match="at least one feature map"):
        ConvLossModule([])


def swapped(module):
    """The parameters of a module of two maps, for the maps in the other order."""
    state = module.state_dict()
    branches = {
        f"branches.{1 - i}.{name}": state[f"branches.{i}.{name}"] for i in (0, 1) for name in ("weight", "bias")
    }
    return {**branches, "combine.weight": state["combine.weight"].roll(8, dims=1)}


def test_a_tap_keeps_the_outputs_of_layers_in_order_and_lets_go():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    with FeatureTap([model[2], model[1]]) as tap:
        output = model(x)
        assert torch.equal(tap.maps[0], output) and torch.equal(tap.maps[1], model[0](x).relu())
        model[0](x)
    assert not model[1]._forward_hooks


# Does it know? -----------------------------------------------------------------------------------------------------


def noisy_where_positive(rows=600, seed=0):
    """y = sin(3x_1) with noise of σ = 1 where x_2 > 0 and .05 elsewhere: where the loss will be large is known."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, 2, generator=generator) * 2 - 1
    sigma = torch.where(x[:, 1] > 0, 1.0, 0.05)
    y = (3 * x[:, 0]).sin() + sigma * torch.randn(rows, generator=generator)
    return x, y[:, None]


def trained(pair_loss):
    x, y = noisy_where_positive()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    module = LossModule([64, 64], width=32)
    layers = [model[1], model[3]]
    values = train_with_loss_module(model, module, layers, x, y, pair_loss=pair_loss, steps=400, learning_rate=3e-3)
    return model, module, layers, values


@pytest.mark.parametrize("pair_loss", PAIR_LOSSES.values())
def test_scores_rank_unseen_examples_by_where_the_loss_is_large(pair_loss):
    model, module, layers, values = trained(pair_loss)
    assert len(values) == 400 and sum(values[-50:]) < sum(values[:50])
    x, y = noisy_where_positive(seed=1)
    scores = predict_losses(model, module, layers, x)
    assert model.training and module.training and not scores.requires_grad
    chosen = select_batch(scores, torch.arange(600), 100)
    assert (x[chosen, 1] > 0).float().mean() > 0.95
    losses = example_losses(model(x), y)
    assert losses[chosen].mean() > 1.5 * losses.mean()


def test_the_module_does_not_shape_the_model():
    x, y = noisy_where_positive(rows=64)
    ends = []
    for weight in (0.0, 100.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
        train_with_loss_module(model, LossModule([8]), [model[1]], x, y, steps=20, weight=weight)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ends)
    with pytest.raises(ValueError, match="pairs need at least 2 rows, got 1 rows"):
        train_with_loss_module(model, LossModule([8]), [model[1]], x[:1], y[:1], steps=1)


def test_selection_takes_the_highest_of_the_pool_and_refuses_too_many():
    scores = torch.tensor([5.0, 1.0, 9.0, 7.0, 3.0])
    unlabelled = torch.tensor([0, 1, 3, 4])
    assert select_batch(scores, unlabelled, 2).tolist() == [3, 0]
    seen = {tuple(select_batch(scores, unlabelled, 1, pool=2, seed=seed).tolist()) for seed in range(20)}
    assert {(3,), (0,)} <= seen <= {(0,), (3,), (4,)}
    with pytest.raises(ValueError, match="count=5 must lie between 1 and the 4 rows"):
        select_batch(scores, unlabelled, 5)
    with pytest.raises(ValueError, match="not finite"):
        select_batch(scores * math.nan, unlabelled, 1)
