"""Short trainings that kill their own process, or fill its disk, at a given event; ``test_kill`` starts them.

An event is a call or a return, of a Python or a C function, so the moment can fall anywhere: within a step, or between
the bytes of a checkpoint and the move to its place. ``os.kill(SIGKILL)`` leaves no time to tidy up.
"""

import os
import resource
import signal
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from adalfl_lite import LossNetwork
from adalfl_lite.compare import grid as experiments
from adalfl_lite.compare.methods import METHODS
from adalfl_lite.compare.results import write_results
from adalfl_lite.compare.tasks import get_task
from adalfl_lite.data.dataset import Dataset, Split
from tests.shorthand import fit, fit_seeds, short

NO_SPACE = 28


def clouds():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 4, generator=generator)
    y = (x @ torch.randn(4, 3, generator=generator)).argmax(1)
    train, valid, test = (Split(x[a : a + 30], y[a : a + 30], torch.arange(a, a + 30)) for a in (0, 30, 60))
    return Dataset("clouds", "classification", train, valid, test, 3, (4,))


def train(folder, loss, make_optimizer, make_scheduler=None, **options):
    """A model with all that has a state: BatchNorm, dropout, an optimizer with moments."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
    optimizer = make_optimizer(model.parameters())
    scheduler = make_scheduler(optimizer) if make_scheduler else None
    options = {"steps": 40, "batch_size": 10, "evaluate_every": 4, "seed": 3, "progress": False, **options}
    fit(model, loss(), clouds(), optimizer=optimizer, scheduler=scheduler, checkpoint=folder / "run", **options)


def online(folder):
    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)

    train(folder, LossNetwork.classification, sgd, online=True, meta_learning_rate=1e-3)


def online_adam_restoring(folder):
    def adam(parameters):
        return torch.optim.Adam(parameters, lr=0.01)

    options = {"meta_batches": "train", "on_divergence": "restore", "engine": "unrolled"}
    train(folder, LossNetwork.classification, adam, online=True, meta_learning_rate=1e-3, **options)


def learning_rate(folder):
    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    train(folder, lambda: F.cross_entropy, sgd, online=True, learn="learning_rate")


def fixed_with_a_schedule(folder):
    def adamw(parameters):
        return torch.optim.AdamW(parameters, lr=0.01)

    def cosine(optimizer):
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)

    train(folder, lambda: F.cross_entropy, adamw, cosine)


def seeds(folder):
    """Three seeds as one program."""
    models, losses = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)))
        losses.append(LossNetwork.classification())

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    options = {"steps": 40, "batch_size": 10, "evaluate_every": 2, "online": True, "progress": False}
    fit_seeds(models, losses, clouds(), make_optimizer=sgd, seeds=range(3), checkpoint=folder / "run", **options)


def sweep(folder):
    """Two tasks, two methods, two seeds, stored job by job."""
    few = {"steps": 8, "rehearsal_steps": 4, "imitation_steps": 5}
    chosen = {name: short(METHODS[name], **few) for name in ("handcrafted", "online")}
    tasks = [get_task(name).with_(steps=12) for name in ("iris", "diabetes")]
    results = experiments.compare(tasks, chosen, range(2), folder=folder / "jobs", progress=False)
    write_results(results, folder / "results.parquet")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fill_the_disk():
    """No file of this process can grow beyond 100 bytes from now on."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))


def live(job, folder, events=None, end=die):
    """Do ``job`` in ``folder`` until the given event comes; write down how many there were if none is given."""
    torch.set_num_threads(1)
    folder, count = Path(folder), 0

    def tick(frame, event, argument):
        nonlocal count
        count += 1
        if count == events:
            end()

    sys.setprofile(tick)
    try:
        globals()[job](folder)
    except OSError:
        sys.exit(NO_SPACE)
    finally:
        sys.setprofile(None)
    if events is None:
        (folder / "events").write_text(str(count))


if __name__ == "__main__":
    job, folder, events, end = ARGUMENTS  # noqa: F821 -- given by test_kill
    live(job, folder, events, globals()[end])
