"""A step of a stack against the steps of its members, each alone, in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adalfl_lite.engines.stacked import (
    Stack,
    StackedForward,
    StackedLoss,
    StackedStep,
    check_stackable,
    meta_step,
    task_losses,
)
from adalfl_lite.engines.steps import plain_step
from adalfl_lite.losses.network import LossNetwork
from tests.models import Once
from tests.shorthand import forward_mode_step

TASK_LOSS = {"classification": F.cross_entropy, "regression": F.mse_loss}


def model():
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)).double()


def make(kind="regression", **network):
    torch.manual_seed(3)
    models = [model() for _ in range(2)]
    losses = [LossNetwork(kind, hidden=(4, 4), **network).double() for _ in models]
    batches = []
    for size in (6, 8):
        targets = torch.randint(3, (2, size)) if kind == "classification" else torch.randn(2, size, 3).double()
        batches.append((torch.randn(2, size, 5).double(), targets))
    return models, losses, batches


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True)


def values(module):
    return list(module.state_dict().values())


@pytest.mark.parametrize("kind", TASK_LOSS)
@pytest.mark.parametrize("network", [{"anchored": True}, {"reduction": "sum", "bias": True}])
def test_two_steps_of_a_stack_are_those_of_its_members(kind, network):
    models, losses, (batch, meta_batch) = make(kind, **network)
    alone = copy.deepcopy(models)
    stack, loss = Stack(models), StackedLoss(losses)
    optimizer, optimizers = sgd(stack.parameters), [sgd(m.parameters()) for m in alone]
    for _ in range(2):
        found = StackedForward(stack, loss, optimizer, kind)(batch, meta_batch)
        assert found.finite().all()
        for i in range(2):
            own = [tuple(t[i] for t in b) for b in (batch, meta_batch)]
            expected = forward_mode_step(alone[i], losses[i], optimizers[i], *own, TASK_LOSS[kind])
            torch.testing.assert_close(found.training_loss[i], expected.training_loss)
            torch.testing.assert_close(found.meta_loss[i], expected.meta_loss)
            torch.testing.assert_close([g[i] for g in found.meta_gradient], expected.meta_gradient)
    stack.write_back()
    for ours, theirs in zip(models, alone, strict=True):
        torch.testing.assert_close(values(ours), values(theirs))


@pytest.mark.parametrize("kind", TASK_LOSS)
def test_without_a_meta_batch_or_a_learned_loss_it_is_a_plain_step(kind):
    models, losses, (batch, meta_batch) = make(kind)
    alone, stack = copy.deepcopy(models), Stack(models)
    optimizer, optimizers = sgd(stack.parameters), [sgd(m.parameters()) for m in alone]
    for loss, theirs in ((StackedLoss(losses), losses), (None, 2 * [TASK_LOSS[kind]])):
        found = StackedForward(stack, loss, optimizer, kind)(batch, meta_batch if loss is None else None)
        assert found.meta_gradient is None and found.finite().all()
        for i in range(2):
            expected = plain_step(alone[i], theirs[i], optimizers[i], (batch[0][i], batch[1][i]))
            torch.testing.assert_close(found.training_loss[i], expected)
            if loss is None:  # L_T of the model that the step left
                after = TASK_LOSS[kind](copy.deepcopy(alone[i])(meta_batch[0][i]), meta_batch[1][i])
                torch.testing.assert_close(found.meta_loss[i], after.detach())
    for i in range(2):
        torch.testing.assert_close([p[i] for p in stack.parameters], [p.detach() for p in alone[i].parameters()])


@pytest.mark.parametrize("kind", TASK_LOSS)
def test_task_losses_are_torchs(kind):
    *_, ((_, targets), _) = make(kind)
    prediction = torch.randn(2, 6, 3).double()
    expected = [TASK_LOSS[kind](p, t) for p, t in zip(prediction, targets, strict=True)]
    torch.testing.assert_close(task_losses(kind, prediction, targets), torch.stack(expected))


@pytest.mark.parametrize("where", ["training_loss", "meta_loss", "meta_gradient"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_seed_that_is_not_finite_keeps_its_loss_and_its_moments(where, bad):
    def gradients():
        return [torch.ones(2, 3, 2), torch.full((2, 1), 2.0)]

    parameters = [torch.zeros(2, 3, 2), torch.zeros(2, 1)]
    optimizer = torch.optim.Adam(parameters, lr=0.1)
    meta_step(optimizer, StackedStep(torch.ones(2), torch.ones(2), gradients()))
    before = copy.deepcopy((parameters, optimizer.state_dict()["state"]))
    result = StackedStep(torch.ones(2), torch.ones(2), gradients())
    broken = result.meta_gradient[0][1, 2] if where == "meta_gradient" else getattr(result, where)
    broken[1] = bad
    assert result.finite().tolist() == [True, False]
    meta_step(optimizer, result)
    for i, old in enumerate(before[0]):
        assert torch.equal(parameters[i][1], old[1])
        torch.testing.assert_close(parameters[i][0], 2 * old[0])  # Adam's two equal gradients: two equal steps
        moments, old_moments = optimizer.state_dict()["state"][i], before[1][i]
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(moments[name][1], old_moments[name][1])
            assert (moments[name][0] > old_moments[name][0]).all()


def test_a_member_is_replaced_and_a_state_comes_back():
    models, losses, _ = make()
    stack, loss = Stack(models), StackedLoss(losses)
    state, phi = copy.deepcopy(stack.state_dict()), copy.deepcopy(loss.state_dict())
    first, new = copy.deepcopy(values(models[0])), model()
    new[1].running_mean += 5
    stack.replace(1, new)
    with torch.no_grad():
        for parameter in loss.parameters:
            parameter.add_(1)
    original, old_losses = models[1], copy.deepcopy(losses)
    loss.write_back()
    for network, old in zip(losses, old_losses, strict=True):
        torch.testing.assert_close(values(network), [value + 1 for value in values(old)])
    assert torch.equal(stack.buffers["1.running_mean"][1], new[1].running_mean)
    stack.load_state_dict(state)
    loss.load_state_dict(phi)
    stack.write_back()
    loss.write_back()
    assert all(map(torch.equal, values(models[0]), first))
    assert stack.models[1] is new and all(map(torch.equal, values(new), values(original)))
    assert all(map(torch.equal, values(losses[1]), values(old_losses[1])))


def test_dropout_that_drops_nothing_is_stackable():
    models, losses, _ = make()
    check_stackable([nn.Sequential(m, nn.Dropout(0)) for m in models], losses)
    for p in (0.5, 1.0):
        with pytest.raises(ValueError, match="dropout draws other numbers"):
            check_stackable([nn.Sequential(m, nn.Dropout(p)) for m in models], losses)
    models[0][3].bias.requires_grad_(False)
    with pytest.raises(ValueError, match="some parameters are frozen"):
        check_stackable(models, losses)


class Guarded(nn.Module):
    """Scales a gradient by a hook, where it sees that there will be one."""

    def __init__(self, factor):
        super().__init__()
        self.first, self.last, self.factor = nn.Linear(5, 7), nn.Linear(7, 3), factor

    def forward(self, x):
        h = torch.tanh(self.first(x))
        if h.requires_grad:
            h.register_hook(lambda gradient: self.factor * gradient)
        return self.last(h)


class Own(Guarded):
    def forward(self, x):
        return self.last(Once.apply(torch.tanh(self.first(x))))


@pytest.mark.parametrize("build", [lambda: Guarded(10.0), lambda: Own(1.0)])
@pytest.mark.parametrize("learned", [True, False])
def test_models_that_are_something_else_in_a_stack_are_refused_before_they_moved(build, learned):
    _, losses, (batch, meta_batch) = make()
    models = [build().double() for _ in range(2)]
    stack, loss = Stack(models), StackedLoss(losses)
    optimizer = sgd(stack.parameters)
    before = copy.deepcopy(stack.state_dict())
    with pytest.raises(NotImplementedError, match="train them one by one"):
        StackedForward(stack, loss if learned else None, optimizer, "regression")(
            batch, meta_batch if learned else None
        )
    torch.testing.assert_close(stack.state_dict(), before, rtol=0, atol=0)
    assert not optimizer.state
