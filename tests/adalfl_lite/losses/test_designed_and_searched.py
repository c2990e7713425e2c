"""Other losses: known values, the properties their papers claim, and searches that find what is planted."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adalfl_lite.data.dataset import BatchSampler, load_dataset
from adalfl_lite.files import atomic_save
from adalfl_lite.losses.dynamical import DynamicalLoss
from adalfl_lite.losses.fixed import FIXED, fixed_loss
from adalfl_lite.losses.newton import NewtonLoss
from adalfl_lite.losses.symbolic import LEAVES, OPERATIONS, SymbolicLoss, points_downhill, search_symbolic
from adalfl_lite.losses.taylor import TaylorLoss, search_taylor
from tests.shorthand import fit


def batch(kind="classification", seed=0, rows=6, outputs=4):
    generator = torch.Generator().manual_seed(seed)
    prediction = 2 * torch.randn(rows, outputs, generator=generator).double()
    if kind == "classification":
        return prediction, torch.randint(outputs, (rows,), generator=generator)
    return prediction, torch.randn(rows, outputs, generator=generator).double()


def gradient(loss, prediction, target):
    leaf = prediction.clone().requires_grad_(True)
    return torch.autograd.grad(loss(leaf, target), leaf)[0]


# Fixed losses ------------------------------------------------------------------------------------------------------

HALF = (torch.tensor([[0.0, 0.0]]), torch.tensor([1]))  # p = ½
ONE = (torch.tensor([[1.0]]), torch.tensor([[-2.0]]))  # e = 3


@pytest.mark.parametrize(
    ("name", "example", "value"),
    [
        ("label-smoothing", (torch.tensor([[math.log(3), 0.0]]), torch.tensor([0])), math.log(4) - 0.95 * math.log(3)),
        ("focal", HALF, math.log(2) / 4),
        ("poly1", HALF, math.log(2) + 1),
        ("generalised-ce", HALF, (1 - 0.5**0.7) / 0.7),
        ("symmetric-ce", HALF, 0.1 * math.log(2) + 2),
        ("absolute", HALF, 1.0),
        ("absolute", ONE, 3.0),
        ("huber", ONE, 2.5),
        ("log-cosh", ONE, math.log(math.cosh(3))),
    ],
)
def test_known_values(name, example, value):
    assert fixed_loss(name)(*example).item() == pytest.approx(value, rel=1e-6)


def test_members_of_a_family_meet_cross_entropy_and_the_absolute_error():
    example = batch()
    expected = F.cross_entropy(*example).item()
    for name, options in (
        ("label-smoothing", {"epsilon": 0.0}),
        ("focal", {"gamma": 0.0}),
        ("poly1", {"epsilon": 0.0}),
        ("symmetric-ce", {"alpha": 1.0, "beta": 0.0}),
    ):
        assert fixed_loss(name, **options)(*example).item() == pytest.approx(expected, rel=1e-12)
    assert fixed_loss("generalised-ce", q=1e-7)(*example).item() == pytest.approx(expected, rel=1e-5)
    absolute = fixed_loss("absolute")(*example).item()
    assert fixed_loss("generalised-ce", q=1.0)(*example).item() == pytest.approx(absolute / 2, rel=1e-12)


def test_the_absolute_error_of_all_labels_is_a_constant():
    """Σ_c loss(f, c) = 2(C − 1), which makes a loss robust to uniform label noise. Cross-entropy lacks it."""
    prediction, _ = batch()
    for loss, symmetric in ((fixed_loss("absolute"), True), (F.cross_entropy, False)):
        sums = torch.stack([sum(loss(row[None], torch.tensor([c])) for c in range(4)) for row in prediction])
        assert (sums.std() < 1e-12) == symmetric
    assert fixed_loss("absolute")(prediction, torch.zeros(6, dtype=torch.int64)) <= 2


@pytest.mark.parametrize("name", ["huber", "log-cosh"])
def test_robust_losses_are_half_the_square_near_zero_and_have_slope_one_far_away(name):
    target = torch.zeros(2, 1).double()
    prediction = torch.tensor([[1e-3], [50.0]]).double()
    value = fixed_loss(name)(prediction[:1], target[:1])
    assert value.item() == pytest.approx(0.5e-6, rel=1e-3)
    assert 2 * gradient(fixed_loss(name), prediction, target)[1].item() == pytest.approx(1)


@pytest.mark.parametrize("name", FIXED)
def test_a_fixed_loss_refuses_targets_of_another_kind_and_shape(name):
    """Torch would read a column of numbers as probabilities of one class, and broadcast (B, 1) against (B,)."""
    kinds = FIXED[name][1]
    column = torch.randn(5, 1)
    if "regression" in kinds:
        with pytest.raises(ValueError, match=r"one shape \(B, K\), got \(5, 1\) and \(5,\)"):
            fixed_loss(name)(column, column.squeeze(1))
    if kinds == ("classification",):
        with pytest.raises(ValueError, match="classification needs int64 class indices"):
            fixed_loss(name)(column, column)
    if kinds == ("regression",):
        with pytest.raises(ValueError, match="regression needs"):
            fixed_loss(name)(*HALF)


def test_an_unknown_fixed_loss_is_named_and_trains_nothing():
    with pytest.raises(ValueError, match="did you mean 'symmetric-ce'[?] known losses: label-smoothing"):
        fixed_loss("symmetric_ce")


def test_a_certain_and_wrong_prediction_keeps_every_loss_and_gradient_finite():
    prediction, target = torch.tensor([[200.0, -200.0]]), torch.tensor([1])
    for name, (_, kinds) in FIXED.items():
        example = (prediction, target) if "classification" in kinds else (prediction, -prediction)
        assert torch.isfinite(fixed_loss(name)(*example)), name
        assert torch.isfinite(gradient(fixed_loss(name), *example)).all(), name


# Dynamical losses --------------------------------------------------------------------------------------------------


def test_the_emphasis_rises_and_falls_and_goes_to_the_next_class():
    loss = DynamicalLoss(3, amplitude=7.0, period=4)
    assert loss.weights(0).tolist() == [1, 1, 1]
    assert loss.weights(2).tolist() == pytest.approx([3 * 7 / 9, 3 / 9, 3 / 9])
    assert loss.weights(1).tolist() == loss.weights(3).tolist() == pytest.approx([2, 0.5, 0.5])
    assert loss.weights(6).argmax() == 1 and loss.weights(10).argmax() == 2
    for step in range(30):
        assert loss.weights(step).sum().item() == pytest.approx(3)
        assert torch.equal(loss.weights(step), loss.weights(step + 12))


@pytest.mark.parametrize("training", [True, False])
def test_a_dynamical_loss_goes_on_where_it_is_told_to_alone_and_keeps_its_step_in_its_state(training):
    prediction, target = batch(outputs=3)
    prediction.requires_grad_(True)
    loss = DynamicalLoss(3, amplitude=7.0, period=4).train(training)
    for _ in range(3):  # looked at, with or without gradients
        value = loss(prediction, target)
        assert value.item() == pytest.approx(F.cross_entropy(prediction, target).item())
        torch.autograd.grad(value, prediction)
        with torch.no_grad():
            loss(prediction, target)
    assert loss.step == 0
    loss.advance()
    assert loss.step == 1
    expected = loss.weights(1).double()[target] * F.cross_entropy(prediction, target, reduction="none")
    other = DynamicalLoss(3, amplitude=7.0, period=4)
    other.load_state_dict(loss.state_dict())
    torch.testing.assert_close(other(prediction, target), expected.mean())
    plain = DynamicalLoss(3, amplitude=1.0, period=4)
    for _ in range(5):
        assert plain(prediction, target).item() == pytest.approx(F.cross_entropy(prediction, target).item())
        plain.advance()


def test_a_dynamical_loss_is_trained_with_as_its_weights_say():
    """Against a plain loop with the weights of step t in step t."""
    data = load_dataset("iris")
    models, loss = [torch.nn.Linear(4, 3) for _ in range(2)], DynamicalLoss(3, amplitude=7.0, period=4)
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    looked = []

    def look(step, model, loss):
        looked.append([loss(model(data.test.inputs), data.test.targets).item() for _ in range(2)])

    options = {"steps": 9, "batch_size": 20, "seed": 1, "callback": look, "progress": False}
    fit(models[0], loss, data, optimizer=optimizers[0], **options)
    sampler = BatchSampler(len(data.train), 20, seed=1)
    for step in range(9):
        x, y = data.train[next(sampler)]
        optimizers[1].zero_grad()
        (loss.weights(step)[y] * F.cross_entropy(models[1](x), y, reduction="none")).mean().backward()
        optimizers[1].step()
    assert torch.equal(models[0].weight, models[1].weight) and loss.step == 9
    assert len(looked) == 10 and all(first == second for first, second in looked)


def test_bad_settings_of_a_dynamical_loss_are_refused():
    with pytest.raises(ValueError, match="got 3, 0.5, 4"):
        DynamicalLoss(3, amplitude=0.5, period=4)


# Newton losses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("curvature", ["hessian", "fisher"])
def test_the_gradient_of_a_newton_loss_leads_to_its_target(kind, curvature):
    """Equation (1) written out, with the Hessian of cross-entropy as diag(p) − ppᵀ."""
    prediction, target = batch(kind)
    loss, plain = NewtonLoss(kind, curvature, damping=0.3), F.cross_entropy if kind == "classification" else F.mse_loss
    assert loss(prediction, target).item() == pytest.approx(plain(prediction, target).item())
    rows, columns = prediction.shape
    p = prediction.softmax(-1)
    each = rows * gradient(plain, prediction, target)
    if curvature == "fisher":
        matrix = sum(torch.outer(g, g) for g in each) / rows
    elif kind == "classification":
        matrix = sum(torch.diag(row) - torch.outer(row, row) for row in p) / rows
    else:
        matrix = 2 / columns * torch.eye(columns).double()
    goal = prediction - torch.stack([torch.linalg.inv(matrix + 0.3 * torch.eye(columns).double()) @ g for g in each])
    torch.testing.assert_close(gradient(loss, prediction, target), (prediction - goal) / rows)


def test_one_newton_step_in_output_space_minimises_a_quadratic():
    prediction, target = batch("regression")
    step = gradient(NewtonLoss("regression", damping=1e-9), prediction, target)
    torch.testing.assert_close(prediction - len(prediction) * step, target)


def test_bad_settings_of_a_newton_loss_are_refused():
    with pytest.raises(ValueError, match="curvature must be 'hessian' or 'fisher', got 'kfac'"):
        NewtonLoss("regression", "kfac")
    with pytest.raises(ValueError, match="damping must be positive, got 0"):
        NewtonLoss("regression", damping=0.0)


# TaylorGLO ---------------------------------------------------------------------------------------------------------


def test_coefficients_give_the_loss_they_should():
    """θ_2 alone is linear in p; θ_0 = θ_1 = 0, θ_3 = −2, θ_5 = 2 is (p − y)² less its part in y."""
    prediction, target = batch("regression")
    linear = TaylorLoss("regression", torch.tensor([0, 0.5, 3.0, 0, 0, 0, 0, 0])).double()
    assert linear(prediction, target).item() == pytest.approx(-3 * (prediction.mean().item() - 0.5))
    square = TaylorLoss("regression", torch.tensor([0, 0, 0, -2.0, 0, 2.0, 0, 0])).double()
    torch.testing.assert_close(gradient(square, prediction, target), gradient(F.mse_loss, prediction, target))


def test_the_polynomial_is_the_expansion_of_a_cubic_around_its_centre():
    """The coefficients are the derivatives of any cubic in (y, p) at the centre, and give back its gradient in p."""
    generator = torch.Generator().manual_seed(0)
    powers = [(i, j) for i in range(4) for j in range(4 - i)]
    factors = torch.randn(len(powers), generator=generator).double()

    def cubic(p, y):
        return sum(factor * y**i * p**j for factor, (i, j) in zip(factors, powers, strict=True))

    y, p = torch.tensor(0.3).double().requires_grad_(), torch.tensor(-0.7).double().requires_grad_()

    def slope(value, *arguments):
        for argument in arguments:
            (value,) = torch.autograd.grad(value, argument, create_graph=True)
        return value

    orders = ((p,), (p, p), (p, p, p), (p, y), (p, p, y), (p, y, y))
    derivatives = [slope(cubic(p, y), *order) for order in orders]
    loss = TaylorLoss("regression", torch.stack([y, p, *(-each for each in derivatives)]).detach()).double()
    prediction, target = batch("regression")
    expected = gradient(lambda p, y: cubic(p, y).mean(), prediction, target)
    torch.testing.assert_close(gradient(loss, prediction, target), expected, rtol=1e-5, atol=1e-6)  # θ is float32


def test_the_symmetric_member_of_the_family_is_robust_to_uniform_label_noise():
    """Averaged over all wrong labels its gradient is that of the right one, scaled; cross-entropy's is not."""
    prediction, target = batch(outputs=4)
    rate = 0.3
    symmetric = TaylorLoss("classification", torch.tensor([0, 0, 0, 0, 0, 1.0, 0, 0])).double()
    for loss, robust in ((symmetric, True), (F.cross_entropy, False)):
        clean = gradient(loss, prediction, target)
        wrong = [gradient(loss, prediction, (target + shift) % 4) for shift in (1, 2, 3)]
        noisy = (1 - rate) * clean + rate * sum(wrong) / 3
        assert torch.allclose(noisy, (1 - rate * 4 / 3) * clean, atol=1e-12) == robust


def test_cma_es_finds_planted_coefficients_and_survives_divergence():
    planted = torch.linspace(-1, 1, 8)
    calls = []

    def score(loss):
        calls.append(loss)
        return math.inf if len(calls) % 7 == 0 else (loss.coefficients - planted).square().sum().item()

    found = search_taylor("regression", score, generations=60, population=10, seed=3)
    assert len(calls) == 600 and (found.coefficients - planted).abs().max() < 0.05
    calls.clear()
    again = search_taylor("regression", score, generations=60, population=10, seed=3)
    assert torch.equal(found.coefficients, again.coefficients)
    with pytest.raises(FloatingPointError, match="diverged with every Taylor loss"):
        search_taylor("regression", lambda loss: math.inf, generations=1, population=4)


@pytest.mark.parametrize(
    "loss",
    [
        TaylorLoss("classification", torch.linspace(-1, 1, 8)),
        SymbolicLoss("regression", ["square", "subtract", "y", "p"]).double(),
    ],
)
def test_a_searched_loss_comes_back_from_its_file(loss, tmp_path):
    with torch.no_grad():
        next(loss.parameters()).mul_(1.5)
    loss.save(tmp_path / "a.loss.pt")
    again = type(loss).load(tmp_path / "a.loss.pt")
    example = batch(loss.kind)
    assert again(*example) == loss(*example) and repr(again) == repr(loss)
    other = SymbolicLoss if isinstance(loss, TaylorLoss) else TaylorLoss
    with pytest.raises(ValueError, match=r"a\.loss\.pt"):
        other.load(tmp_path / "a.loss.pt")
    atomic_save({"format": loss.format, "config": loss.config, "state": {}}, tmp_path / "b.loss.pt")
    with pytest.raises(ValueError, match="is not a whole"):
        type(loss).load(tmp_path / "b.loss.pt")


# EvoMAL ------------------------------------------------------------------------------------------------------------


def test_an_expression_is_what_it_says():
    prediction, target = batch("regression")
    square = SymbolicLoss("regression", ["square", "subtract", "y", "p"]).double()
    assert str(square) == "square(subtract(y, p))"
    assert square(prediction, target).item() == pytest.approx(F.mse_loss(prediction, target).item())
    with torch.no_grad():
        square.weights.copy_(torch.tensor([2.0, 3.0, 0.5, -1.0]))
    expected = 2 * (3 * (0.5 * target + prediction)) ** 2
    assert square(prediction, target).item() == pytest.approx(expected.mean().item())
    logits, classes = batch()
    # −1/C Σ y log p is cross-entropy over C
    entropy = SymbolicLoss("classification", ["multiply", "minus_one", "multiply", "y", "log", "p"]).double()
    assert 4 * entropy(logits, classes).item() == pytest.approx(F.cross_entropy(logits, classes).item(), rel=1e-4)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_finite_everywhere_and_so_is_its_gradient(name):
    arity, function = OPERATIONS[name]
    operands = [torch.tensor([-3.0, 0.0, 1e-3, 7.0], requires_grad=True) for _ in range(arity)]
    value = function(*operands)
    assert torch.isfinite(value).all()
    for slope in torch.autograd.grad(value.sum(), operands, allow_unused=True):
        assert torch.isfinite(slope).all()


@pytest.mark.parametrize("expression", [["add", "y"], ["y", "p"], ["plus", "y", "p"], []])
def test_a_broken_expression_is_refused(expression):
    with pytest.raises(ValueError, match="not one whole expression|unknown name 'plus'"):
        SymbolicLoss("regression", expression)


def test_genetic_programming_finds_a_planted_loss_and_is_repeatable():
    prediction, target = batch("regression", rows=40)

    def score(loss):
        assert {"y", "p"} <= set(loss.expression) <= {*OPERATIONS, *LEAVES} and len(loss.expression) <= 25
        found, wanted = (gradient(f, prediction, target).flatten() for f in (loss.double(), F.mse_loss))
        value = 1 - F.cosine_similarity(found, wanted, dim=0).item()
        scores.append(value if math.isfinite(value) else math.inf)
        return scores[-1]

    searched, scores = [], []
    state = random.getstate()
    options = {"generations": 20, "population": 40, "seed": 0}
    found = search_symbolic("regression", score, searched.append, **options)
    assert random.getstate() == state
    assert min(scores) < 1e-6 < 0.1 < min(scores[:40])  # not in the population it began with
    assert score(found) == pytest.approx(min(scores), abs=1e-9)
    assert len({loss.expression for loss in searched}) == len(searched) > 60
    assert search_symbolic("regression", score, lambda loss: None, **options).expression == found.expression
    with pytest.raises(FloatingPointError, match="diverged with every expression"):
        search_symbolic("regression", lambda loss: math.nan, lambda loss: None, generations=1, population=4)


@pytest.mark.parametrize(
    ("expression", "downhill"),
    [
        ("square subtract y p", True),
        ("absolute subtract p y", True),
        ("multiply minus_one multiply y log p", True),
        ("multiply minus_one square subtract y p", False),
        ("subtract root y sign p", False),
        ("multiply y p", False),
    ],
)
def test_hopeless_expressions_are_told_from_others(expression, downhill):
    for kind, plain in (("classification", F.cross_entropy), ("regression", F.mse_loss)):
        if "log" in expression and kind == "regression":
            continue
        assert points_downhill(SymbolicLoss(kind, expression.split()), plain, 3) == downhill


def test_what_is_not_accepted_is_neither_searched_nor_scored():
    scored, searched = [], []
    found = search_symbolic(
        "regression",
        lambda loss: scored.append(loss) or 1.0,
        searched.append,
        accept=lambda loss: "tanh" in loss.expression,
        generations=3,
        population=20,
    )
    assert scored == searched and 0 < len(scored) < 60
    assert "tanh" in found.expression and all("tanh" in loss.expression for loss in scored)


def test_losses_fit_the_loop():
    """Each lowers its own value in a few steps of gradient descent on a linear model."""
    inputs = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    for kind, losses in (
        ("classification", [NewtonLoss("classification"), DynamicalLoss(4, amplitude=1.5, period=4)]),
        ("regression", [NewtonLoss("regression", "fisher")]),
    ):
        _, target = batch(kind, rows=40)
        losses += [fixed_loss(name) for name, (_, kinds) in FIXED.items() if kind in kinds]
        for loss in losses:
            torch.manual_seed(0)
            model = nn.Linear(5, 4)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            plain = F.cross_entropy if kind == "classification" else F.mse_loss
            goal = target if kind == "classification" else target.float()
            before = plain(model(inputs), goal).item()
            for _ in range(30):
                optimizer.zero_grad()
                loss(model(inputs), goal).backward()
                optimizer.step()
            assert plain(model(inputs), goal).item() < before, loss
