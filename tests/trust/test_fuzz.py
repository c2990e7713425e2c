"""Every file that is read, damaged at random: a clear refusal or the right content, never anything else."""

import hashlib

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from adalfl_lite import LossNetwork, load_dataset
from adalfl_lite.compare.results import read_results, write_results
from adalfl_lite.data import sources
from adalfl_lite.data.dataset import Dataset, Split
from tests.shorthand import fit

FRACTION = st.floats(0, 1, exclude_max=True)
quick = settings(
    max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def damages(draw):
    """A function bytes -> bytes that cuts, flips, overwrites, inserts or replaces."""
    kind = draw(st.sampled_from(["cut", "flip", "overwrite", "insert", "replace"]))
    where = draw(st.lists(FRACTION, min_size=1, max_size=1 if kind == "cut" else 4))
    noise = draw(st.binary(min_size=1, max_size=40))
    bit = draw(st.integers(0, 7))

    def damage(content):
        content = bytearray(content)
        for fraction in where:
            i = int(fraction * len(content))
            if kind == "cut":
                del content[i:]
            elif kind == "flip":
                content[i] ^= 1 << bit
            elif kind == "overwrite":
                content[i : i + len(noise)] = noise
            elif kind == "insert":
                content[i:i] = noise
            else:
                content[:] = noise
        return bytes(content)

    return damage


def survives(path, content, damage, read, whole, refusals, same):
    """Read the damaged file; it is put back after."""
    path.write_bytes(damage(content))
    try:
        found = read()
    except refusals as error:
        assert path.name in str(error), f"the message does not name the file: {error}"
    else:
        assert same(found, whole), "read without complaint, and wrong"
    finally:
        path.write_bytes(content)


def same_network(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    return str(a) == str(b) and ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    path = tmp_path_factory.mktemp("network") / "network.pt"
    network = LossNetwork.classification()
    network.save(path)
    return path, path.read_bytes(), network


@quick
@given(damage=damages())
def test_a_loss_network(damage, network, counts):
    path, content, whole = network
    survives(path, content, damage, lambda: LossNetwork.load(path), whole, ValueError, same_network)
    counts["damaged files read"] += 1


def train(path):
    torch.manual_seed(0)
    x, y = torch.randn(12, 2), torch.arange(12) % 2
    split = Split(x, y, torch.arange(12))
    model = nn.Sequential(
        nn.Linear(2, 400), nn.BatchNorm1d(400), nn.Linear(400, 2)
    )  # weights, not names, fill the file
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = Dataset("few", "classification", split, split, split, 2, (2,))
    options = {"steps": 3, "batch_size": 6, "evaluate_every": 3, "progress": False, "checkpoint": path}
    history = fit(model, F.cross_entropy, data, optimizer=optimizer, **options)
    momentum = [entries["momentum_buffer"] for entries in optimizer.state.values()]
    return (
        history.drop(columns="seconds"),
        torch.cat([value.double().flatten() for value in model.state_dict().values()]),
        momentum,
    )


def same_run(a, b):
    same_momentum = len(a[2]) == len(b[2]) and all(map(torch.equal, a[2], b[2]))
    return a[0].equals(b[0]) and torch.equal(a[1], b[1]) and same_momentum


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "run.checkpoint"
    whole = train(path)
    return path, path.read_bytes(), whole


@quick
@given(damage=damages())
def test_a_checkpoint(damage, checkpoint, counts):
    path, content, whole = checkpoint
    survives(path, content, damage, lambda: train(path), whole, ValueError, same_run)
    counts["damaged files read"] += 1


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "results.parquet"
    columns = {
        "task": "iris",
        "method": "online",
        "seed": range(500),
        "step": 7,
        "test_error": torch.rand(500).tolist(),
    }
    whole = pd.DataFrame(columns)
    write_results(whole, path)
    return path, path.read_bytes(), whole


@quick
@given(damage=damages())
def test_results(damage, results, counts):
    path, content, whole = results
    survives(path, content, damage, lambda: read_results(path), whole, ValueError, lambda a, b: a.equals(b))
    counts["damaged files read"] += 1


@pytest.fixture(scope="module")
def communities(tmp_path_factory):
    """A file of the official form with its checksum in place of the official one."""
    root = tmp_path_factory.mktemp("communities")
    path = root / "communities" / "communities.data"
    path.parent.mkdir()
    rows = torch.rand(40, 128, generator=torch.Generator().manual_seed(0)).tolist()
    path.write_text("\n".join(",".join(f"{value:.2f}" for value in row) for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_COMMUNITIES_MD5", hashlib.md5(path.read_bytes()).hexdigest())
        yield path, path.read_bytes(), load_dataset("communities", root=root), root


def same_data(a, b):
    return torch.equal(a.train.inputs, b.train.inputs) and torch.equal(a.test.targets, b.test.targets)


@quick
@given(damage=damages())
def test_a_data_set_with_a_checksum(damage, communities, counts):
    path, content, whole, root = communities
    read = lambda: load_dataset("communities", root=root)  # noqa: E731
    survives(path, content, damage, read, whole, RuntimeError, same_data)
    counts["damaged files read"] += 1


@settings(quick, max_examples=20)
@given(content=st.binary(max_size=200))
def test_a_data_set_without_one(content, tmp_path, counts):
    """scikit-learn writes its copy of California Housing itself, differently in each version."""
    (tmp_path / "cal_housing_py3.pkz").write_bytes(content)
    with pytest.raises(RuntimeError, match="cal_housing_py3.pkz cannot be read. Delete it"):
        load_dataset("california", root=tmp_path)
    counts["damaged files read"] += 1
