"""Several seeds in one program end where each of them alone would."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from adalfl_lite import OnlineLearningRate, OnlineLoss, Plain, Stacked
from adalfl_lite.data.dataset import BatchSampler, Dataset, Split
from adalfl_lite.losses.network import LossNetwork
from adalfl_lite.losses.task import task_loss
from adalfl_lite.train.checkpoint import NOT_KEPT_BEFORE
from tests.shorthand import fit, fit_seeds, initialise, initialise_seeds

SEEDS = (3, 5, 8)
OPTIONS = {"steps": 6, "batch_size": 8, "evaluate_every": 3, "progress": False}
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-2),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def mlp():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def batch_norm():
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))


def convnet():
    norm = nn.BatchNorm2d(4)
    return nn.Sequential(nn.Unflatten(1, (1, 1, 5)), nn.Conv2d(1, 4, (1, 3)), norm, nn.Flatten(), nn.Linear(12, 3))


def make_data(kind, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 5, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(5, 3, generator=generator, dtype=torch.float64)
    y = y.argmax(1) if kind == "classification" else y
    parts = [Split(x[a:b], y[a:b], torch.arange(a, b)) for a, b in ((0, 30), (30, 45), (45, 60))]
    return Dataset(f"made-{kind}", kind, *parts, 3, (5,))


def make(build=mlp, kind="classification", **options):
    models, losses = [], []
    for seed in SEEDS:
        torch.manual_seed(seed)
        models.append(build().double())
        losses.append(LossNetwork.default(kind, **options).double())
    return models, losses, [make_data(kind, seed) for seed in SEEDS]


def flat(modules):
    return torch.cat([t.detach().flatten().double() for m in modules for t in m.state_dict().values()])


def assert_as_alone(build, kind, make_optimizer, network=None, learned=True, **options):
    models, losses, data = make(build, kind, **(network or {}))
    together = fit_seeds(
        models, losses if learned else None, data, make_optimizer=make_optimizer, seeds=SEEDS, **options, **OPTIONS
    )
    others, other_losses, _ = make(build, kind, **(network or {}))
    start = flat(others)
    for i, seed in enumerate(SEEDS):
        loss = other_losses[i] if learned else task_loss(kind)
        optimizer = make_optimizer(others[i].parameters())
        history = fit(others[i], loss, data[i], optimizer=optimizer, seed=seed, **options, **OPTIONS)
        rows = together[together.seed == seed].reset_index(drop=True)
        for column in set(rows) - {"seed", "seconds"}:
            assert rows[column].to_numpy() == pytest.approx(history[column].to_numpy(), rel=1e-6, nan_ok=True), column
    torch.testing.assert_close(flat(models), flat(others), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(flat(losses), flat(other_losses), rtol=1e-9, atol=1e-10)
    assert (flat(others) - start).abs().max() > 1e-3


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_online_seeds_are_separate_runs_of_fit(make_optimizer):
    assert_as_alone(mlp, "classification", make_optimizer, online=True, meta_learning_rate=1e-2)


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_every_seed_learns_a_rate_of_its_own(make_optimizer):
    options = {"online": True, "learn": "learning_rate", "meta_learning_rate": 0.1, "learned": False}
    assert_as_alone(mlp, "classification", make_optimizer, **options)


def test_a_stack_learns_on_the_next_training_batch_too():
    options = {"online": True, "meta_learning_rate": 1e-2, "meta_batches": "next"}
    assert_as_alone(mlp, "classification", OPTIMIZERS["momentum"], **options)


def test_a_stack_leaves_out_a_step_that_is_not_finite_for_one_of_it():
    models, losses, data = make()
    with torch.no_grad():
        models[1][0].weight.fill_(math.nan)
    before = flat([models[0]])
    with pytest.warns(RuntimeWarning, match="a loss of learner 1 was not finite.*skip"):
        options = {**OPTIONS, "steps": 2, "evaluate_every": 2, "on_divergence": "skip"}
        fit_seeds(models, losses, data, make_optimizer=OPTIMIZERS["SGD"], seeds=SEEDS, **options)
    assert torch.equal(flat([models[0]]), before)


def test_learners_of_two_kinds_or_with_two_settings_are_refused():
    models, losses, _ = make()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    plain = [Plain(*parts) for parts in zip(models, losses, optimizers, strict=True)]
    with pytest.raises(ValueError, match="nothing to stack"):
        Stacked([])
    with pytest.raises(TypeError, match="a stack is of one kind, got Plain and OnlineLoss"):
        Stacked([plain[0], OnlineLoss(models[1], losses[1], optimizers[1])])
    with pytest.raises(ValueError, match="some are trained with a loss network and some are not"):
        Stacked([plain[0], Plain(models[1], task_loss("classification"), optimizers[1])])
    optimizers[1].param_groups[0]["lr"] = 0.2
    with pytest.raises(ValueError, match="the optimizers differ in kind, groups or settings"):
        Stacked(plain)
    plain[1].optimizer.param_groups[0]["lr"] = 0.1
    x = torch.randn(4, 5, dtype=torch.float64)
    plain[2] = Plain(models[2], losses[2], torch.optim.SGD(models[2].parameters(), lr=0.1, momentum=0.9))
    plain[2].step((x, torch.tensor([0, 1, 2, 0])))
    with pytest.raises(ValueError, match="has taken steps already; stack fresh ones"):
        Stacked(plain)


def smoothed(prediction, target):
    return nn.functional.cross_entropy(prediction, target, label_smoothing=0.1)


def test_what_a_stack_would_train_with_something_else_is_refused():
    """Each of these would have been trained with the task loss, or learned by it, without a word."""
    models, losses, _ = make()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    parts = list(zip(models, losses, optimizers, strict=True))
    with pytest.raises(TypeError, match="smoothed cannot be stacked"):
        Stacked([Plain(model, smoothed, optimizer) for model, _, optimizer in parts])
    with pytest.raises(TypeError, match="smoothed cannot be stacked"):
        Stacked([OnlineLearningRate(m, smoothed, o, task_loss=nn.functional.cross_entropy) for m, _, o in parts])
    for measured in (smoothed, LossNetwork.classification().double()):
        with pytest.raises(TypeError, match="cannot be stacked; give LossNetworks"):
            Stacked([OnlineLoss(*of_one, task_loss=measured) for of_one in parts])
    with pytest.raises(ValueError, match="one task loss, got those of classification and regression"):
        Stacked([OnlineLoss(*of_one, task_loss=nn.functional.mse_loss) for of_one in parts])

    class Own(OnlineLoss):
        pass

    with pytest.raises(TypeError, match="Own cannot be stacked; give Plain, OnlineLoss or"):
        Stacked([Own(*of_one) for of_one in parts])
    losses[1].network[0].requires_grad_(False)
    with pytest.raises(ValueError, match="some weights of a loss network are frozen; train such learners one by one"):
        Stacked([OnlineLoss(*of_one) for of_one in parts])


@pytest.mark.parametrize("build", [batch_norm, convnet])
def test_batch_norm_keeps_its_statistics_per_model(build):
    assert_as_alone(build, "classification", OPTIMIZERS["momentum"], online=True, meta_learning_rate=1e-2)


@pytest.mark.parametrize("network", [{}, {"anchored": False, "bias": True, "reduction": "sum", "activation": "relu"}])
def test_regression_anchored_or_not(network):
    options = {"online": True, "meta_learning_rate": 1e-2, "meta_batches": "train"}
    assert_as_alone(mlp, "regression", OPTIMIZERS["SGD"], network, **options)


@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("learned", [True, False])
def test_a_frozen_loss_network_or_the_task_loss(kind, learned):
    assert_as_alone(mlp, kind, OPTIMIZERS["momentum"], learned=learned)


def test_one_data_set_may_serve_all():
    models, losses, data = make()
    fit_seeds(models, losses, data[0], make_optimizer=OPTIMIZERS["SGD"], seeds=SEEDS, **OPTIONS)
    others, other_losses, _ = make()
    fit_seeds(others, other_losses, [data[0]] * 3, make_optimizer=OPTIMIZERS["SGD"], seeds=SEEDS, **OPTIONS)
    assert torch.equal(flat(models), flat(others))


def test_a_resumed_program_ends_as_a_whole_one(tmp_path):
    def train(checkpoint, interrupt=False):
        models, losses, data = make(batch_norm)
        calls = 0

        def sgd(parameters):
            return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

        class Interrupted(BatchSampler):
            def __next__(self):
                nonlocal calls
                calls += 1
                if interrupt and calls > 4 * 2 * len(SEEDS):  # in the fifth of six steps
                    raise KeyboardInterrupt
                return super().__next__()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("adalfl_lite.train.streams.BatchSampler", Interrupted)
            options = {"make_optimizer": sgd, "seeds": SEEDS, "online": True, "checkpoint": checkpoint}
            history = fit_seeds(models, losses, data, **options, **OPTIONS)
        return flat(models), flat(losses), history.drop(columns="seconds")

    whole = train(None)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", interrupt=True)
    for _ in range(2):  # resumed; and finished, read back
        for ours, theirs in zip(train(tmp_path / "run"), whole, strict=True):
            assert ours.equals(theirs) if hasattr(ours, "columns") else torch.equal(ours, theirs)
    models, losses, data = make(batch_norm)
    options = {"make_optimizer": OPTIMIZERS["SGD"], "online": True, "checkpoint": tmp_path / "run", "seeds": SEEDS}
    losses = [LossNetwork.classification(gamma=0.5) for _ in SEEDS]
    with pytest.raises(ValueError, match=r"loss .*gamma=0.01.* -> .*gamma=0.5"):
        fit_seeds(models, losses, data, **{**options, "make_optimizer": OPTIMIZERS["momentum"]}, **OPTIONS)
    models, losses, data = make(batch_norm)
    differences = r"weight_decay \[0\] -> \[0.01\], seeds \[3, 5, 8\] -> \[1, 2, 3\]"
    with pytest.raises(ValueError, match=rf"checkpoint of another run \({differences}\)"):
        options = {"make_optimizer": OPTIMIZERS["momentum"], "online": True, "checkpoint": tmp_path / "run"}
        fit_seeds(models, losses, data, seeds=(1, 2, 3), **options, **OPTIONS)


def test_an_older_checkpoint_of_seeds_resumes(tmp_path):
    """One that describes its run without the model, the loss and the inputs, but with meta options everywhere."""
    for online in (True, False):
        ends = []
        for run in range(2):
            models, losses, data = make()
            options = {
                "make_optimizer": OPTIMIZERS["SGD"],
                "seeds": SEEDS,
                "online": online,
                "checkpoint": tmp_path / "c",
            }
            ends.append(fit_seeds(models, losses, data, **options, **OPTIONS))
            saved = torch.load(tmp_path / "c", weights_only=True)
            kept = {name: value for name, value in saved["run"].items() if name not in NOT_KEPT_BEFORE}
            kept = {"meta_batches": "valid", "meta_learning_rate": 1e-5, **kept}
            torch.save({**saved, "run": kept}, tmp_path / "c")
            assert run or {"model", "loss", "held_out", "inputs"} <= set(saved["run"]) - set(kept)
        assert ends[0].equals(ends[1])  # seconds included: it was read
        (tmp_path / "c").unlink()


def test_the_seed_that_diverges_is_named():
    models, losses, data = make()
    with torch.no_grad():
        models[1][0].weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="step 1: a loss of learner 1 was not finite"):
        fit_seeds(models, losses, data, make_optimizer=OPTIMIZERS["SGD"], seeds=SEEDS, **OPTIONS)


def test_what_cannot_be_stacked_is_refused():
    def refused(error, message, models=None, losses=None, seeds=SEEDS, optimizer=OPTIMIZERS["SGD"], **options):
        ours = make()
        with pytest.raises(error, match=message):
            fit_seeds(
                models or ours[0],
                losses or ours[1],
                ours[2],
                make_optimizer=optimizer,
                seeds=seeds,
                **{**OPTIONS, **options},
            )

    refused(ValueError, "give as many of each, at least one: got 3 models, 3 data sets, 2 seeds", seeds=(1, 2))
    refused(ValueError, "the models differ", models=[mlp().double(), mlp().double(), mlp()])
    refused(ValueError, "the losses differ", losses=[LossNetwork("classification", beta=b) for b in (1, 2, 3)])
    dropout = [nn.Sequential(nn.Linear(5, 3), nn.Dropout()) for _ in SEEDS]
    refused(ValueError, "dropout draws other numbers", models=dropout)
    refused(ValueError, "some parameters are frozen", models=[half_frozen() for _ in SEEDS])
    refused(TypeError, "Linear cannot be stacked", losses=[nn.Linear(2, 1) for _ in SEEDS])
    refused(TypeError, "RMSprop is not known to treat every entry alike", optimizer=torch.optim.RMSprop)
    refused(ValueError, "meta_batches must be 'valid', 'train' or 'next', got 'test'", meta_batches="test")
    refused(ValueError, "steps must be at least 1, got 0", steps=0)
    refused(ValueError, "evaluate_every must be at least 1, got 0", evaluate_every=0)
    refused(ValueError, "meta_batches='train' has no effect where nothing is learned", meta_batches="train")
    refused(ValueError, "clip_gradient_norm=1.0 is not for a stack; leave it out", clip_gradient_norm=1.0)
    lazy = [nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 3)) for _ in SEEDS]
    refused(ValueError, "the parameter '0.weight' is of a lazy layer .*run one batch through", models=lazy)


def half_frozen():
    model = mlp().double()
    model[0].requires_grad_(False)
    return model


MANY = {"steps": 30, "imitation_steps": 10, "rollout_steps": 4, "rehearsals": 3, "rehearsal_steps": 5}


def streams(kind):
    datasets = [make_data(kind, seed) for seed in SEEDS]
    return [[getattr(d, split).batches(8, seed=1) for d in datasets] for split in ("train", "valid")]


def assert_initialised_as_alone(build, kind, make_optimizer, network=None, **options):
    options = {**MANY, **options, "make_optimizer": make_optimizer}

    def make_loss_network():
        return LossNetwork.default(kind, **(network or {})).double()

    def make_model():
        return build().double()

    torch.manual_seed(77)
    before = torch.get_rng_state()
    losses, outcomes = initialise_seeds(make_loss_network, make_model, *streams(kind), seeds=SEEDS, **options)
    assert torch.equal(torch.get_rng_state(), before)
    train, valid = streams(kind)
    for i, seed in enumerate(SEEDS):
        torch.manual_seed(seed)
        loss = make_loss_network()
        start = flat([loss])
        alone = initialise(loss, make_model, train[i], valid[i], **options)
        torch.testing.assert_close(flat([losses[i]]), flat([loss]), rtol=1e-6, atol=1e-7)
        assert (flat([loss]) - start).abs().max() > 1e-3
        assert (outcomes[i].steps, outcomes[i].chosen_step) == (alone.steps, alone.chosen_step)
        assert outcomes[i].abandoned_rollouts == alone.abandoned_rollouts
        assert outcomes[i].rehearsals.to_numpy() == pytest.approx(alone.rehearsals.to_numpy(), rel=1e-6)
    return outcomes


@pytest.mark.parametrize("build", [mlp, batch_norm])
@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_seeds_initialised_together_are_separate_runs(build, kind):
    assert_initialised_as_alone(build, kind, OPTIMIZERS["momentum"])


PAPERS = {"imitation_steps": 0, "rollout_steps": 1}


@pytest.mark.parametrize(("optimizer", "changes"), [("SGD", {}), ("Nesterov", PAPERS), ("Adam", {"rehearsals": 0})])
def test_initialised_with_any_optimizer_with_or_without_the_additions(optimizer, changes):
    assert_initialised_as_alone(mlp, "classification", OPTIMIZERS[optimizer], **changes)


@pytest.mark.parametrize("network", [{"anchored": False, "reduction": "sum", "activation": "relu"}, {"bias": True}])
def test_initialised_anchored_or_not(network):
    assert_initialised_as_alone(mlp, "regression", OPTIMIZERS["SGD"], network)


def linear():
    return nn.Sequential(nn.Linear(5, 20), nn.Linear(20, 3))


def test_a_rollout_that_explodes_starts_over_alone():
    steep = partial(torch.optim.SGD, lr=3, momentum=0.5)
    outcomes = assert_initialised_as_alone(linear, "regression", steep, rehearsals=0)
    assert len({outcome.abandoned_rollouts for outcome in outcomes}) > 1, "they start over at different steps"


def test_adam_cannot_start_over_for_one_seed():
    with pytest.raises(FloatingPointError, match="Adam cannot start over for one seed of a stack"):
        assert_initialised_as_alone(linear, "regression", partial(torch.optim.Adam, lr=30), rehearsals=0)


def test_seeds_whose_rehearsals_all_diverge_are_named():
    options = {"rehearsal_steps": 40, "make_optimizer": partial(torch.optim.SGD, lr=1e12)}
    with pytest.raises(FloatingPointError, match="all 4 rehearsals of seed 3 diverged"):
        assert_initialised_as_alone(linear, "regression", **options)


def test_what_cannot_be_initialised_together_is_refused():
    train, valid = streams("classification")
    options = {**MANY, "make_optimizer": OPTIMIZERS["SGD"], "seeds": SEEDS}
    with pytest.raises(ValueError, match="got 3 seeds, 2 train, 3 valid"):
        initialise_seeds(LossNetwork.classification, mlp, train[:2], valid, **options)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        initialise_seeds(LossNetwork.classification, mlp, train, valid, **{**options, "steps": 0})
    with pytest.raises(TypeError, match="make_model must be a function that builds one, got Sequential"):
        initialise_seeds(LossNetwork.classification, mlp(), train, valid, **options)
    same = mlp().double()
    with pytest.raises(ValueError, match="make_model returned weights of an earlier model again"):
        initialise_seeds(LossNetwork.classification, lambda: same, train, valid, **{**options, "imitation_steps": 0})
    alone = {**options, "seeds": SEEDS[:1], "imitation_steps": 0}
    before = same[0].weight.detach().clone()
    with pytest.raises(ValueError, match="make_model returned weights of an earlier model again"):
        initialise_seeds(LossNetwork.classification, lambda: same, train[:1], valid[:1], **alone)
    assert torch.equal(same[0].weight, before)
    for setting, shown in (({"clip_gradient_norm": 1.0}, "1.0"), ({"engine": "unrolled"}, "'unrolled'")):
        with pytest.raises(ValueError, match=f"{next(iter(setting))}={shown} is not for a stack; leave it out, or use"):
            initialise_seeds(LossNetwork.classification, mlp, train, valid, **options, **setting)
    with pytest.raises(ValueError, match="dropout draws other numbers"):
        initialise_seeds(
            LossNetwork.classification,
            lambda: nn.Sequential(nn.Linear(5, 3), nn.Dropout()).double(),
            train,
            valid,
            **{**options, "imitation_steps": 0},
        )


def test_learners_that_are_refused_as_a_stack_keep_their_rates():
    """And are trained one by one as if nobody had tried."""

    def learner(momentum):
        model = mlp()
        return OnlineLearningRate(
            model, nn.functional.cross_entropy, torch.optim.SGD(model.parameters(), 0.05, momentum)
        )

    learners = [learner(0.0), learner(0.9)]
    with pytest.raises(ValueError, match="the optimizers differ in kind, groups or settings"):
        Stacked(learners)
    assert [one.learning_rates() for one in learners] == [[pytest.approx(0.05)]] * 2
