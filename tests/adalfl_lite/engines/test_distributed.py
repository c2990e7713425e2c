"""Two processes with half batches learn what one learns with the whole batches."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from adalfl_lite.learn.online import OnlineLoss
from adalfl_lite.losses.network import LossNetwork

ENGINES = ("forward", "shared", "finite-difference")


def learn(engine, share=slice(None), process_group=None, poison=False, seed=0):
    """Five steps on a share of each batch; θ and φ."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))
    network = LossNetwork.classification()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)
    online = OnlineLoss(model, network, optimizer, meta_learning_rate=1e-3, engine=engine, process_group=process_group)
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(8, 5, generator=generator), torch.arange(8) % 3) for _ in range(6)]
    shares = [(x[share], y[share]) for x, y in batches]
    if poison:
        shares[2][0].fill_(torch.inf)
    for batch, meta_batch in zip(shares, shares[1:], strict=False):
        online.step(batch, meta_batch)
    return torch.cat([p.detach().flatten() for m in (model, network) for p in m.parameters()])


def work(folder, rank):
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    share = slice(rank, None, 2)
    found = {engine: learn(engine, share, dist.group.WORLD, seed=rank) for engine in ENGINES}  # rank 0's start counts
    alone = learn("forward", share)
    try:
        learn("forward", share, dist.group.WORLD, poison=rank == 1)
        raised = ""
    except (FloatingPointError, ValueError) as error:
        raised = str(error)
    torch.save({"found": found, "alone": alone, "raised": raised}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_with_half_batches_are_one_with_the_whole(tmp_path):
    command = [sys.executable, __file__, str(tmp_path)]
    processes = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    errors = [process.communicate(timeout=500)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for engine in ENGINES:
        whole = learn(engine)
        for result in results:
            torch.testing.assert_close(result["found"][engine], whole, rtol=1e-5, atol=1e-5)
            assert (result["alone"] - whole).abs().max() > 1e-3
    assert all("not finite" in result["raised"] for result in results), "one process must not wait for the other"


def test_the_reference_engine_runs_alone():
    with pytest.raises(ValueError, match="engine='unrolled' runs in one process"):
        learn("unrolled", process_group=object())


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]))
