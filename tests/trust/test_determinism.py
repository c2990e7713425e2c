"""The same seed on the same machine gives the same bits, whoever loads the data."""

import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from adalfl_lite import LossNetwork, OnlineLoss, endless


class Augmented(TensorDataset):
    """Rows that a worker changes at random."""

    def __getitem__(self, row):
        x, y = super().__getitem__(row)
        return x + 0.1 * torch.randn(x.shape), y


def trained(workers, seed, data=TensorDataset):
    """All numbers that a short online training ends with."""
    torch.manual_seed(seed)
    x = torch.randn(60, 5)
    rows = data(x, x[:, :3].argmax(1))
    model = torch.nn.Sequential(
        torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 3)
    )
    loss = LossNetwork.classification()
    online = OnlineLoss(model, loss, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), meta_learning_rate=1e-3)
    loader = DataLoader(rows, 10, shuffle=True, num_workers=workers, generator=torch.Generator().manual_seed(seed))
    batches = endless(loader)
    for _ in range(9):
        online.step(next(batches), next(batches))
    return torch.cat([t.flatten().double() for m in (model, loss) for t in m.state_dict().values()])


def test_the_number_of_workers_does_not_matter():
    assert torch.equal(trained(0, seed=1), trained(2, seed=1))
    assert not torch.equal(trained(0, seed=1), trained(0, seed=2))


def test_workers_that_draw_random_numbers_repeat_them():
    assert torch.equal(trained(2, seed=1, data=Augmented), trained(2, seed=1, data=Augmented))


@pytest.mark.slow
def test_another_process_finds_the_same_bits():
    code = (
        "from adalfl_lite.compare.grid import run; from adalfl_lite.compare.tasks import get_task;"
        "from adalfl_lite.compare.methods import METHODS; from tests.shorthand import short;"
        "import torch; torch.set_num_threads(1);"
        "result = run(get_task('iris').with_(steps=40), short(METHODS['online']), 3);"
        "print(*(float(v).hex() for v in result.drop(columns=['seconds', 'initialisation_seconds'])"
        ".select_dtypes('number').to_numpy().ravel()))"
    )
    first, second = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    )
    assert first == second and len(first.split()) > 100
