"""A loss, gradient or meta-gradient that is not finite: named at the step it appears, and what was good is kept."""

import copy
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adalfl_lite import LossNetwork, OnlineLoss
from adalfl_lite.data.dataset import BatchSampler, Dataset, Split
from adalfl_lite.train.loop import MAX_UNDONE
from tests.shorthand import fit

OPTIONS = {"steps": 30, "batch_size": 10, "evaluate_every": 6, "seed": 1, "progress": False}
NAN = float("nan")


def make_data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=generator)
    y = (x @ torch.randn(4, 3, generator=generator)).argmax(1)
    train, valid, test = (Split(x[a : a + 20], y[a : a + 20], torch.arange(a, a + 20)) for a in (0, 20, 40))
    return Dataset("clouds", "classification", train, valid, test, 3, (4,))


class Poisoned(nn.Module):
    """A model whose output, or the gradient of it, is NaN in its n-th training passes."""

    def __init__(self, passes=(), gradient_passes=()):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
        self.passes, self.gradient_passes = passes, gradient_passes
        self.counted = SimpleNamespace(number=0)  # of all passes; a number or a list would be put back after most

    @property
    def count(self):
        return self.counted.number

    @count.setter
    def count(self, number):
        self.counted.number = number

    def forward(self, x):
        if not self.training:
            return self.net(x)
        self.count += 1
        output = self.net(x)
        if self.count in self.gradient_passes and output.requires_grad:
            output.register_hook(lambda gradient: gradient * NAN)
        return output * NAN if self.count in self.passes else output


def trained(model, loss=None, **options):
    loss = loss or F.cross_entropy
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return fit(model, loss, make_data(), optimizer=optimizer, **{**OPTIONS, **options}), optimizer


def state(module):
    return torch.cat([value.detach().flatten().double() for value in module.state_dict().values()])


# raise ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"passes": [9]}, r"step 9: the loss is not finite .*loss nan"),
        # the loss of step 9 is fine, its gradient is not, and step 10 meets the weights it leaves
        ({"gradient_passes": [9]}, r"step 10: the loss is not finite .*in the model: net.0.weight"),
        ({"gradient_passes": [30]}, r"step 30: the gradient of net.0.weight is not finite"),
    ],
)
def test_with_a_fixed_loss_the_step_is_named_and_the_last_checkpoint_kept(where, message, tmp_path):
    with pytest.raises(FloatingPointError, match=message):
        trained(Poisoned(**where), checkpoint=tmp_path / "c")
    history = torch.load(tmp_path / "c", weights_only=True)["history"]
    assert history[-1]["step"] == (24 if where == {"gradient_passes": [30]} else 6)
    resumed, _ = trained(Poisoned(), checkpoint=tmp_path / "c")  # the fault is gone
    whole, _ = trained(Poisoned())
    assert resumed.drop(columns="seconds").equals(whole.drop(columns="seconds"))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"passes": [25]}, "step 9: the learned loss is not finite .*learned loss nan"),  # three passes a step
        ({"passes": [26]}, "step 9: the task loss is not finite .*learned loss -?[0-9.e-]+, task loss nan"),
        ({"passes": [27]}, "step 9: the meta-gradient of network.0.weight is not finite"),
        ({"gradient_passes": [25]}, "step 9: the task loss is not finite .*not finite in the model: net.0.weight"),
    ],
)
def test_with_a_learned_loss_tensor_and_step_are_named_and_phi_is_unharmed(where, message):
    network = LossNetwork.classification()
    with pytest.raises(FloatingPointError, match=message):
        trained(Poisoned(**where), network, online=True)
    assert torch.isfinite(state(network)).all()


@pytest.mark.parametrize("engine", ["forward", "unrolled"])
def test_a_training_batch_that_is_not_finite_changes_nothing_at_all(engine):
    model, network = Poisoned(passes=[3 if engine == "unrolled" else 4]), LossNetwork.classification()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    online = OnlineLoss(model, network, optimizer, engine=engine)
    data = make_data()
    online.step(data.train[:10], data.valid[:10])
    before = copy.deepcopy(online.state_dict())
    with pytest.raises(FloatingPointError, match="learned loss"):
        online.step(data.train[:10], data.valid[:10])
    assert torch.equal(torch.cat([v.flatten() for v in before["model"].values()]).double(), state(model))
    for name in ("optimizer", "meta_optimizer"):
        for key, entries in online.state_dict()[name]["state"].items():
            assert all(torch.equal(value, before[name]["state"][key][entry]) for entry, value in entries.items())
    online.step(data.train[:10], data.valid[:10])  # and it goes on


# skip and restore ----------------------------------------------------------------------------------------------------


def by_hand(left_out, back_to=None):
    """A plain loop of 30 steps that leaves out some steps, going back to where an earlier one began."""
    model = Poisoned()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data, batches = make_data(), BatchSampler(20, 10, 1)
    model.train()
    kept = None
    for step in range(1, 31):
        x, y = data.train[next(batches)]
        if step == back_to:
            kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        if step in left_out:
            if kept:
                model.load_state_dict(kept[0])
                optimizer.load_state_dict(copy.deepcopy(kept[1]))
            continue
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(
    "where", [{"passes": [9, 12]}, {"gradient_passes": [9, 12]}, {"passes": [9], "gradient_passes": [12]}]
)
def test_skip_is_a_run_without_those_batches(where):
    model = Poisoned(**where)
    with pytest.warns(RuntimeWarning, match=r"step (9|12): the (loss|gradient of .*) is not finite") as caught:
        history, _ = trained(model, on_divergence="skip")
    assert len([w for w in caught if w.category is RuntimeWarning]) == 2
    assert torch.equal(state(model), state(by_hand([9, 12])))
    assert history.drop(columns="meta_loss").iloc[1:].notna().all().all() and history.step.iloc[-1] == 30


def test_restore_goes_back_to_the_last_evaluation():
    model = Poisoned(passes=[9])
    with pytest.warns(RuntimeWarning, match="step 9: .*restore"):
        trained(model, on_divergence="restore")
    assert torch.equal(state(model), state(by_hand([9], back_to=7)))  # evaluated at step 6
    assert not torch.equal(state(model), state(by_hand([9])))


@pytest.mark.parametrize("policy", ["skip", "restore"])
@pytest.mark.parametrize("passes", [[25], [26], [27]])
def test_the_learned_loss_and_its_optimizer_go_back_too(policy, passes):
    model, network = Poisoned(passes=passes), LossNetwork.classification()
    with pytest.warns(RuntimeWarning, match="step 9"):
        history, _ = trained(model, network, online=True, on_divergence=policy, meta_learning_rate=1e-3)
    assert torch.isfinite(state(network)).all() and torch.isfinite(state(model)).all()
    assert history.iloc[1:].notna().all().all()


@pytest.mark.parametrize("policy", ["skip", "restore"])
def test_interrupted_and_resumed_such_a_run_ends_bit_for_bit_the_same(policy, tmp_path):
    """Within one process; the passes of the rest are counted on."""

    def stop(step, model, loss):
        if step == 18:
            raise KeyboardInterrupt

    models = [Poisoned(passes=[9, 20]) for _ in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        whole, _ = trained(models[0], on_divergence=policy)
        with pytest.raises(KeyboardInterrupt):
            trained(models[1], on_divergence=policy, checkpoint=tmp_path / "c", callback=stop)
        models[2].count = 12  # steps 13 to 18 are done again
        resumed, _ = trained(models[2], on_divergence=policy, checkpoint=tmp_path / "c")
    assert torch.equal(state(models[2]), state(models[0]))
    assert resumed.drop(columns="seconds").equals(whole.drop(columns="seconds"))


@pytest.mark.parametrize("policy", ["skip", "restore"])
def test_what_does_not_recover_stops_the_run(policy, tmp_path):
    model = Poisoned(passes=range(10, 1000))
    with pytest.warns(RuntimeWarning) as caught, pytest.raises(FloatingPointError, match=f"step {10 + MAX_UNDONE}: "):
        trained(model, on_divergence=policy, steps=300, evaluate_every=60, checkpoint=tmp_path / "c")
    assert len(caught) == MAX_UNDONE


def test_without_trouble_the_policies_agree_bit_for_bit():
    finals = []
    for policy in ("raise", "skip", "restore"):
        model, network = Poisoned(), LossNetwork.classification(generator=torch.Generator().manual_seed(0))
        history, _ = trained(model, network, online=True, on_divergence=policy)
        finals.append((state(model), state(network), history.drop(columns="seconds")))
    for theta, phi, history in finals[1:]:
        assert torch.equal(theta, finals[0][0]) and torch.equal(phi, finals[0][1]) and history.equals(finals[0][2])


# Clipping ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_the_meta_gradient_is_clipped_by_its_norm(factor):
    data, steps = make_data(), []
    for clip in (None, factor):
        model, network = Poisoned(), LossNetwork.classification(generator=torch.Generator().manual_seed(0)).double()
        meta_optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        norm = clip and clip * torch.linalg.vector_norm(steps[0]).item()
        online = OnlineLoss(model, network, optimizer, meta_optimizer=meta_optimizer, clip_meta_gradient=norm)
        before = state(network)
        online.step(data.train[:10], data.valid[:10])
        steps.append(state(network) - before)
    torch.testing.assert_close(
        steps[1], steps[0] * min(factor, 1.0), rtol=2e-3, atol=1e-9
    )  # torch adds 1e-6 to the norm
    assert not math.isclose(torch.linalg.vector_norm(steps[0]).item(), 0.0, abs_tol=1e-12)
