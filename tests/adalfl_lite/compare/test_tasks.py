"""Every row of the registry can be built: its data set exists, its model fits, its optimizer is as the row says."""

import dataclasses

import pytest
import torch

from adalfl_lite.compare.grid import compare
from adalfl_lite.compare.tasks import TASKS, Task, get_task
from adalfl_lite.data.dataset import BUNDLED, dataset_names, load_dataset
from adalfl_lite.models import build_model, model_names

SHAPES = {  # input shape, outputs; of the data sets that are read from files
    "california": ((8,), 1),
    "communities": ((100,), 1),
    "mnist": ((1, 28, 28), 10),
    "cifar10": ((3, 32, 32), 10),
    "cifar100": ((3, 32, 32), 100),
    "svhn": ((3, 32, 32), 10),
}


def test_the_registry_covers_the_data_sets_and_models_and_names_its_rows():
    assert {task.dataset for task in TASKS.values()} == set(dataset_names())
    assert {task.model for task in TASKS.values()} == set(model_names())
    for name, task in TASKS.items():
        assert task.name == name == get_task(name).name
        assert task.steps >= 1 and task.batch_size >= 1 and task.learning_rate > 0
        alone = [other.dataset for other in TASKS.values()].count(task.dataset) == 1 and task.model == "mlp64"
        assert name == (task.dataset if alone else f"{task.dataset}-{task.model}")


@pytest.mark.parametrize("name", [task.name for task in TASKS.values() if task.dataset in BUNDLED])
def test_bundled_tasks_load_and_take_a_training_batch(name):
    task = get_task(name)
    data = task.load(seed=1)
    assert task.batch_size <= len(data.train)
    assert torch.equal(data.train.indices, task.load(seed=1).train.indices)
    assert not torch.equal(data.train.indices, task.load(seed=2).train.indices)
    inputs, targets = data.train[: task.batch_size]
    outputs = task.make_model(data)(inputs)
    assert outputs.shape == (task.batch_size, data.outputs)
    assert targets.ndim == (1 if data.kind == "classification" else 2)


@pytest.mark.parametrize("name", [task.name for task in TASKS.values() if task.dataset not in BUNDLED])
def test_the_models_of_the_other_tasks_build_for_their_shapes(name):
    task = get_task(name)
    shape, outputs = SHAPES[task.dataset]
    with torch.device("meta"):
        model = build_model(task.model, input_shape=shape, outputs=outputs)
        assert model.eval()(torch.empty(2, *shape)).shape == (2, outputs)


@pytest.mark.parametrize("drop", [0.0, 1.0, 1000, -0.5])
def test_a_drop_that_would_never_come_is_refused(drop):
    with pytest.raises(ValueError, match=rf"between 0 and 1, got {drop}; divide a step by steps"):
        get_task("iris").with_(drops=(0.5, drop))


def test_a_task_that_needs_files_says_where_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="download=True"):
        get_task("mnist-mlp").load(root=str(tmp_path))


@pytest.mark.parametrize("name", TASKS)
def test_the_optimizer_is_sgd_with_the_settings_of_the_row(name):
    task = get_task(name)
    (group,) = task.make_optimizer([torch.zeros(1, requires_grad=True)]).param_groups
    assert group["lr"] == task.learning_rate
    assert (group["momentum"], group["nesterov"]) == (task.momentum, task.nesterov)
    assert group["weight_decay"] == task.weight_decay


def test_the_base_settings_of_the_authors_related_code():
    """SGD .01 throughout; Nesterov .9, weight decay 5e-4, batch 128 for colour images; plain for MNIST."""
    for task in TASKS.values():
        colour = task.dataset in ("cifar10", "cifar100", "svhn")
        assert task.learning_rate == 0.01
        assert (task.nesterov, task.weight_decay) == ((True, 5e-4) if colour else (False, 0.0))
        if colour:
            assert (task.momentum, task.batch_size, task.steps) == (0.9, 128, 150_000)
        if task.dataset == "mnist":
            assert (task.momentum, task.batch_size, task.steps) == (0.0, 100, 10_000)


def test_the_torch_seed_draws_the_model():
    task = get_task("iris")
    data, weights = task.load(), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        weights.append(next(task.make_model(data).parameters()))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_changed_settings_leave_the_registry_alone():
    changed = get_task("iris").with_(steps=7, learning_rate=0.5)
    assert (changed.steps, changed.learning_rate, changed.dataset) == (7, 0.5, "iris")
    assert get_task("iris").steps != 7
    with pytest.raises(dataclasses.FrozenInstanceError):
        changed.steps = 8
    with pytest.raises(TypeError, match="stride"):
        changed.with_(stride=2)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown task 'cifar'; known tasks: digits, .*svhn-wrn16_8"):
        get_task("cifar")


def test_the_learning_rate_drops_where_the_row_says_and_only_on_cifar():
    task = get_task("cifar10-resnet18")
    steps = (0, 99_999, 100_000, 134_999, 135_000, 150_000)
    assert [task.schedule(step) for step in steps] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert [bool(row.drops) for row in TASKS.values()] == [row.dataset.startswith("cifar") for row in TASKS.values()]
    short = task.with_(steps=30)
    optimizer = short.make_optimizer([torch.zeros(1, requires_grad=True)])
    scheduler, rates = short.make_scheduler(optimizer), []
    for _ in range(30):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.01] * 20 + [0.001] * 7 + [0.0001] * 3)
    assert get_task("digits").make_scheduler(optimizer) is None


def test_the_papers_pairs_are_there():
    pairs = {(task.dataset, task.model) for task in TASKS.values()}
    assert pairs >= {
        *(("california", "mlp64"), ("communities", "mlp64"), ("diabetes", "mlp64")),
        *(("mnist", model) for model in ("linear", "mlp", "lenet5")),
        *(("cifar10", model) for model in ("allcnn_c", "vgg16", "resnet18", "squeezenet")),
        *(("cifar100", "wrn28_10"), ("svhn", "wrn16_8")),
    }


def test_a_task_with_data_of_its_own_can_be_compared():
    class Own(Task):
        kind = "classification"

        def load(self, *, root=None, download=False, seed=0):
            return load_dataset("iris", seed=seed)

    own = Own("mine", "a file of mine", "mlp64", steps=2, batch_size=10)
    found = compare([own], ["handcrafted"], [0], progress=False)
    assert set(found.task) == {"mine"} and found.step.max() == 2
    with pytest.raises(ValueError, match="a file of mine"):
        compare([Task("mine", "a file of mine", "mlp64", steps=2)], ["handcrafted"], [0])
