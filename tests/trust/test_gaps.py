"""What mutants showed to be untested elsewhere."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adalfl_lite import LossNetwork, OnlineLoss
from adalfl_lite.engines import forward
from adalfl_lite.engines.steps import plain_step


class Scaled(nn.Module):
    """A loss with a parameter that it does not use."""

    def __init__(self):
        super().__init__()
        self.scale, self.unused = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.ones(2))

    def forward(self, prediction, target):
        return self.scale * F.cross_entropy(prediction, target)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(8, 4), torch.arange(8) % 3


@pytest.mark.parametrize("engine", ["forward", "unrolled"])
def test_a_parameter_that_the_loss_does_not_use_has_a_meta_gradient_of_zero(engine, batch):
    model, loss = nn.Linear(4, 3), Scaled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = OnlineLoss(model, loss, optimizer, task_loss=F.cross_entropy, engine=engine).step(batch, batch)
    assert result.meta_gradient[0] != 0 and torch.equal(result.meta_gradient[1], torch.zeros(2))


@pytest.mark.parametrize(("loss", "closed"), [(LossNetwork.classification(), True), (Scaled(), False)])
def test_derivatives_in_closed_form_are_used_where_they_are_known(loss, closed, batch, monkeypatch):
    calls, real = [], forward.derivatives
    monkeypatch.setattr(forward, "derivatives", lambda *given: calls.append(1) or real(*given))
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    OnlineLoss(model, loss, optimizer, task_loss=F.cross_entropy).step(batch, batch)
    assert len(calls) == closed, "once a step"


def test_plain_steps_are_torchs(batch):
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):  # the gradient of the first is not added to the second's
        expected = F.cross_entropy(model(batch[0]), batch[1])
        gradient = torch.autograd.grad(expected, model.weight)[0]
        before = model.weight.detach().clone()
        value = plain_step(model, F.cross_entropy, optimizer, batch)
        assert torch.equal(value, expected)
        torch.testing.assert_close(model.weight.detach(), before - 0.5 * gradient)


@pytest.mark.parametrize("engine", ["forward", "unrolled"])
def test_a_loss_per_example_is_refused(engine, batch):
    class PerExample(Scaled):
        def forward(self, prediction, target):
            return self.scale * F.cross_entropy(prediction, target, reduction="none")

    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    online = OnlineLoss(model, PerExample(), optimizer, task_loss=F.cross_entropy, engine=engine)
    with pytest.raises(ValueError, match=r"a loss must be a scalar, got shape \(8,\)"):
        online.step(batch, batch)


@pytest.mark.parametrize("engine", ["forward", "shared", "unrolled"])
def test_a_learned_loss_that_is_not_finite_leaves_the_model_as_it_was(engine, batch):
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    online = OnlineLoss(model, Scaled(), optimizer, task_loss=F.cross_entropy, engine=engine)
    huge = (torch.full((8, 4), 3e38), batch[1])  # finite, until they are summed
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(FloatingPointError, match="the learned loss is not finite"):
        online.step(huge, batch)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("module", ["adalfl_lite.train.loop", "analysis.curvature"])
def test_a_warning_of_ours_is_an_error(module):
    for category in (DeprecationWarning, FutureWarning, RuntimeWarning):
        with pytest.raises(category):
            warnings.warn_explicit("old", category, "file.py", 1, module=module)
