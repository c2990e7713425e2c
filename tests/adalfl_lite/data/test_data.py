"""Splits are disjoint and complete, statistics come from the train split, files are checked, batches are seeded."""

import functools
import hashlib
import http.server
import io
import os
import pickle
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import sklearn.datasets
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from adalfl_lite.data import dataset as data
from adalfl_lite.data import sources
from adalfl_lite.data.dataset import BatchSampler, Dataset, Split, dataset_names, load_dataset

BUNDLED = {  # rows, features, outputs
    "digits": (1797, 64, 10),
    "iris": (150, 4, 3),
    "wine": (178, 13, 3),
    "breast_cancer": (569, 30, 2),
    "diabetes": (442, 10, 1),
}
FROM_FILES = ["california", "communities", "mnist", "cifar10", "cifar100", "svhn"]


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def assert_partition(dataset: Dataset, rows: int) -> None:
    """Every source row 0..rows-1 is in exactly one split."""
    indices = torch.cat([dataset.train.indices, dataset.valid.indices, dataset.test.indices])
    assert indices.dtype == torch.int64
    assert torch.equal(indices.sort().values, torch.arange(rows))


def assert_standardised(values: torch.Tensor) -> None:
    torch.testing.assert_close(values.mean(0), torch.zeros(values.shape[1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(values.std(0, correction=0), torch.ones(values.shape[1]), atol=1e-5, rtol=0)


# Tables --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_sets(name: str) -> None:
    rows, features, outputs = BUNDLED[name]
    dataset = load_dataset(name)
    assert (dataset.name, dataset.input_shape, dataset.outputs) == (name, (features,), outputs)
    assert_partition(dataset, rows)
    fifth = round(rows / 5)
    assert (len(dataset.train), len(dataset.valid), len(dataset.test)) == (rows - 2 * fifth, fifth, fifth)
    for split in (dataset.train, dataset.valid, dataset.test):
        inputs, targets = split[:]
        assert inputs.shape == (len(split), features) and inputs.dtype == torch.float32 and inputs.isfinite().all()
        if dataset.kind == "classification":
            assert targets.dtype == torch.int64 and set(targets.tolist()) == set(range(outputs))
        else:
            assert targets.dtype == torch.float32 and targets.shape == (len(split), outputs)
    assert dataset.kind == ("regression" if name == "diabetes" else "classification")


def test_a_data_set_prints_as_shapes_and_not_as_numbers() -> None:
    text = repr(load_dataset("wine"))
    assert "name='wine'" in text and "train=Split(inputs=(106, 13) torch.float32, targets=(106,) torch.int64)" in text
    assert "tensor(" not in text


@pytest.mark.parametrize("name", ["iris", "wine", "breast_cancer", "diabetes"])
def test_features_are_standardised_with_the_train_split_alone(name: str) -> None:
    dataset = load_dataset(name, seed=3)
    assert_standardised(dataset.train.inputs)
    assert (dataset.test.inputs.mean(0).abs() > 1e-3).any(), "the test rows must not have entered the statistics"


def test_regression_targets_are_in_units_of_the_train_variance() -> None:
    dataset = load_dataset("diabetes")
    assert_standardised(dataset.train.targets)
    raw = torch.tensor(sklearn.datasets.load_diabetes().target)
    mean, std = raw[dataset.train.indices].mean(), raw[dataset.train.indices].std(correction=0)
    expected = ((raw[dataset.test.indices] - mean) / std).float().unsqueeze(1)
    torch.testing.assert_close(dataset.test.targets, expected)


def test_digits_are_grey_levels_over_16_and_rows_match_the_source() -> None:
    dataset, source = load_dataset("digits", seed=5), sklearn.datasets.load_digits()
    for split in (dataset.train, dataset.valid, dataset.test):
        np.testing.assert_array_equal(split.inputs.numpy() * 16, source.data[split.indices])
        np.testing.assert_array_equal(split.targets.numpy(), source.target[split.indices])


def test_classification_splits_keep_class_proportions() -> None:
    dataset = load_dataset("breast_cancer")
    shares = [split.targets.float().mean().item() for split in (dataset.train, dataset.valid, dataset.test)]
    assert max(shares) - min(shares) < 0.01


def test_the_seed_decides_the_split() -> None:
    first, again, other = (load_dataset("wine", seed=seed) for seed in (1, 1, 2))
    for part in ("train", "valid", "test"):
        for field in ("inputs", "targets", "indices"):
            assert torch.equal(getattr(getattr(first, part), field), getattr(getattr(again, part), field))
        assert set(getattr(first, part).indices.tolist()) != set(getattr(other, part).indices.tolist())


def test_standardise_leaves_constants_at_zero_and_imputes_the_train_mean() -> None:
    values = np.array([[1.0, 0.1, 3.0], [3.0, 0.1, np.nan], [5.0, 0.1, 7.0], [100.0, 0.7, np.nan]])
    scaled = data._standardise(values, train=np.array([0, 1, 2]))
    spread = np.sqrt(8 / 3)
    np.testing.assert_allclose(scaled[:, 0], (values[:, 0] - 3) / spread)
    np.testing.assert_array_equal(scaled[:, 1], 0)
    np.testing.assert_allclose(scaled[:, 2], [-np.sqrt(1.5), 0, np.sqrt(1.5), 0])


# Split ---------------------------------------------------------------------------------------------------------------


def test_split_indexing_normalises_images() -> None:
    images = torch.tensor([0, 51, 102, 255], dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 2, 3, 3)
    mean, std = torch.tensor([0.2, 0.4]).view(2, 1, 1), torch.tensor([0.5, 0.1]).view(2, 1, 1)
    split = Split(images, torch.arange(4), torch.arange(4), mean, std)
    inputs, targets = split[torch.tensor([3, 1])]
    assert inputs.dtype == torch.float32 and inputs.shape == (2, 2, 3, 3) and targets.tolist() == [3, 1]
    torch.testing.assert_close(inputs[:, :, 0, 0], torch.tensor([[1.6, 6.0], [0.0, -2.0]]))
    assert len(split) == 4


def test_split_moves_to_a_device() -> None:
    moved = load_dataset("iris").train.to("meta")
    assert moved.mean is None
    assert {moved.inputs.device.type, moved.targets.device.type, moved.indices.device.type} == {"meta"}


def test_split_refuses_tensors_that_do_not_belong_together() -> None:
    with pytest.raises(ValueError, match=r"same number of rows, got \[3, 2, 3\]"):
        Split(torch.zeros(3, 1), torch.zeros(2), torch.arange(3))
    with pytest.raises(ValueError, match="mean= and std="):
        Split(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.arange(3), torch.arange(3))


# Errors --------------------------------------------------------------------------------------------------------------


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'minst'.*digits.*mnist.*svhn"):
        load_dataset("minst")
    assert set(dataset_names()) == {*BUNDLED, *FROM_FILES}


def test_valid_size_is_for_images() -> None:
    with pytest.raises(ValueError, match="valid_size=10.*'wine' is a table"):
        load_dataset("wine", valid_size=10)


@pytest.mark.parametrize("name", FROM_FILES)
def test_missing_files_say_what_where_and_how(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load_dataset(name, root=tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message and "download=True" in message and "ADALFL_DATA" in message
    assert list(tmp_path.iterdir()) == [], "looking must not create anything"


def test_root_argument_environment_and_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADALFL_DATA", str(tmp_path / "env"))
    with pytest.raises(FileNotFoundError) as caught:
        load_dataset("communities")
    assert str(tmp_path / "env" / "communities") in str(caught.value)
    with pytest.raises(FileNotFoundError) as caught:
        load_dataset("communities", root=tmp_path / "argument")
    assert str(tmp_path / "argument") in str(caught.value)
    monkeypatch.delenv("ADALFL_DATA")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    with pytest.raises(FileNotFoundError) as caught:
        load_dataset("communities")
    assert str(tmp_path / "home" / ".cache" / "adalfl") in str(caught.value)


# Communities and Crime, on a small file of the same format -----------------------------------------------------------


def communities_text(rows: int = 40) -> str:
    """128 columns: 5 to ignore, OtherPerCap (column 30) missing once, 22 mostly missing, the target last."""
    rng = np.random.default_rng(0)
    lines = []
    for row in range(rows):
        values = [f"{value:.2f}" for value in rng.random(128)]
        values[:5] = [str(row), "?", "?", "Sometowncity", "1"]
        values[105:127] = ["?"] * 22 if row % 6 else values[105:127]
        if row == 7:
            values[30] = "?"
        lines.append(",".join(values))
    return "\n".join(lines) + "\n"


@pytest.fixture
def communities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "communities" / "communities.data"
    path.parent.mkdir()
    path.write_text(communities_text())
    monkeypatch.setattr(sources, "_COMMUNITIES_MD5", md5(path))
    return path


def test_communities_preprocessing(communities: Path) -> None:
    dataset = load_dataset("communities", root=communities.parent.parent)
    assert (dataset.kind, dataset.input_shape, dataset.outputs) == ("regression", (100,), 1)
    assert_partition(dataset, 40)
    assert_standardised(dataset.train.inputs)
    table = [line.split(",") for line in communities.read_text().splitlines()]
    column = torch.tensor([float(row[5]) for row in table])[dataset.train.indices]
    torch.testing.assert_close(dataset.train.inputs[:, 0], (column - column.mean()) / column.std(correction=0))
    for split in (dataset.train, dataset.valid, dataset.test):
        assert (split.inputs[split.indices == 7, 25].abs() < 1e-6).all(), "the missing value becomes the train mean"


def test_communities_damaged_file_is_refused(communities: Path) -> None:
    expected = md5(communities)
    communities.write_text(communities.read_text()[:-9])
    for download in (False, True):
        with pytest.raises(RuntimeError, match=f"communities.data is damaged.*{md5(communities)}.*{expected}.*Delete"):
            load_dataset("communities", root=communities.parent.parent, download=download)


@pytest.fixture
def server(tmp_path: Path):
    """A web server on this machine; yields its folder and its address."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_communities_download_on_request_and_offline_afterwards(server, tmp_path, monkeypatch) -> None:
    folder, address = server
    served = folder / "communities.data"
    served.write_text(communities_text())
    monkeypatch.setattr(sources, "_COMMUNITIES_URL", f"{address}/communities.data")
    monkeypatch.setattr(sources, "_COMMUNITIES_MD5", md5(served))
    downloaded = load_dataset("communities", root=tmp_path / "root", download=True)
    served.unlink()
    again = load_dataset("communities", root=tmp_path / "root")
    assert torch.equal(downloaded.train.inputs, again.train.inputs)
    assert [path.name for path in (tmp_path / "root" / "communities").iterdir()] == ["communities.data"]


def test_communities_wrong_download_leaves_nothing_behind(server, tmp_path, monkeypatch) -> None:
    folder, address = server
    (folder / "communities.data").write_text("<html>moved</html>")
    monkeypatch.setattr(sources, "_COMMUNITIES_URL", f"{address}/communities.data")
    with pytest.raises(RuntimeError, match="corrupted"):
        load_dataset("communities", root=tmp_path / "root", download=True)
    assert list((tmp_path / "root" / "communities").iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"\x78\x9c truncated"])
def test_california_unreadable_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "cal_housing_py3.pkz").write_bytes(content)
    with pytest.raises(RuntimeError, match="cal_housing_py3.pkz cannot be read. Delete it"):
        load_dataset("california", root=tmp_path)


# Images, on tiny files of the official formats -----------------------------------------------------------------------


def tiny_images(rows: int, seed: int, size: int = 32, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, channels, size, size), dtype=np.uint8)


def write_mnist(root: Path, monkeypatch: pytest.MonkeyPatch, train: np.ndarray, test: np.ndarray) -> Path:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, images in (("train", train), ("t10k", test)):
        labels = np.arange(len(images), dtype=np.uint8) % 10
        header = struct.pack(">IIII", 0x00000803, len(images), 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x00000801, len(labels)) + labels.tobytes())
    monkeypatch.setattr(sources, "_MNIST_MD5", {path.name: md5(path) for path in raw.iterdir()})
    return raw


def write_cifar100(root: Path, monkeypatch: pytest.MonkeyPatch, train: np.ndarray, test: np.ndarray) -> None:
    source = torchvision.datasets.CIFAR100
    folder = root / source.base_folder
    folder.mkdir()

    def dump(name: str, content: dict) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return md5(folder / name)

    for attribute, name, images in (("train_list", "train", train), ("test_list", "test", test)):
        labels = [(7 * row) % 100 for row in range(len(images))]
        checksum = dump(name, {"data": images.reshape(len(images), -1), "fine_labels": labels})
        monkeypatch.setattr(source, attribute, [[name, checksum]])
    names = [str(label) for label in range(100)]
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": dump("meta", {"fine_label_names": names})})


def write_svhn(root: Path, monkeypatch: pytest.MonkeyPatch, train: np.ndarray, test: np.ndarray) -> None:
    lists = {}
    for part, images in (("train", train), ("test", test)):
        labels = (np.arange(len(images)) % 10 + 1).astype(np.uint8)[:, None]  # 1 to 10, where 10 is the digit 0
        path = root / f"{part}_32x32.mat"
        scipy.io.savemat(path, {"X": images.transpose(2, 3, 1, 0), "y": labels})
        lists[part] = [f"http://127.0.0.1:9/{path.name}", path.name, md5(path)]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", lists)


def source_labels(name: str, rows: int) -> torch.Tensor:
    row = torch.arange(rows)
    return {"mnist": row % 10, "cifar100": (7 * row) % 100, "svhn": (row + 1) % 10}[name]


@pytest.mark.parametrize("name", ["mnist", "cifar100", "svhn"])
def test_image_sets(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size, channels = (28, 1) if name == "mnist" else (32, 3)
    train, test = tiny_images(50, 0, size, channels), tiny_images(12, 1, size, channels)
    write = {"mnist": write_mnist, "cifar100": write_cifar100, "svhn": write_svhn}[name]
    write(tmp_path, monkeypatch, train, test)
    dataset = load_dataset(name, root=tmp_path, valid_size=15)
    assert (dataset.kind, dataset.input_shape) == ("classification", (channels, size, size))
    assert dataset.outputs == (100 if name == "cifar100" else 10)
    assert (len(dataset.train), len(dataset.valid), len(dataset.test)) == (35, 15, 12)
    assert_partition(dataset, 62)
    assert dataset.test.indices.tolist() == list(range(50, 62))

    source = torch.from_numpy(np.concatenate([train, test]))
    labels = torch.cat([source_labels(name, 50), source_labels(name, 12)])
    pixels = source[dataset.train.indices].double() / 255
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3), correction=0)
    for split in (dataset.train, dataset.valid, dataset.test):
        assert split.inputs.dtype == torch.uint8 and torch.equal(split.inputs, source[split.indices])
        assert split.targets.dtype == torch.int64 and torch.equal(split.targets, labels[split.indices])
        torch.testing.assert_close(split.mean.flatten().double(), mean, atol=1e-6, rtol=0)
        torch.testing.assert_close(split.std.flatten().double(), std, atol=1e-6, rtol=0)
    inputs, _ = dataset.train[:]
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(channels), atol=1e-5, rtol=0)
    torch.testing.assert_close(inputs.std((0, 2, 3), correction=0), torch.ones(channels), atol=1e-5, rtol=0)

    again, other = (load_dataset(name, root=tmp_path, valid_size=15, seed=seed) for seed in (0, 1))
    assert torch.equal(dataset.valid.indices, again.valid.indices)
    assert set(dataset.valid.indices.tolist()) != set(other.valid.indices.tolist())


def test_valid_size_must_leave_training_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_svhn(tmp_path, monkeypatch, tiny_images(20, 0), tiny_images(5, 1))
    for valid_size in (None, 20, 0):
        with pytest.raises(ValueError, match=f"valid_size={valid_size or '(10000|0)'} .*svhn has 20 training images"):
            load_dataset("svhn", root=tmp_path, valid_size=valid_size)


@pytest.mark.parametrize("name", ["mnist", "cifar100", "svhn"])
def test_damaged_image_file_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size, channels = (28, 1) if name == "mnist" else (32, 3)
    write = {"mnist": write_mnist, "cifar100": write_cifar100, "svhn": write_svhn}[name]
    write(tmp_path, monkeypatch, tiny_images(50, 0, size, channels), tiny_images(12, 1, size, channels))
    victim = max((path for path in tmp_path.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(RuntimeError, match=f"{victim.name} is damaged.*md5.*Delete it"):
        load_dataset(name, root=tmp_path, valid_size=15)


def test_a_missing_file_among_present_ones_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = write_mnist(tmp_path, monkeypatch, tiny_images(50, 0, 28, 1), tiny_images(12, 1, 28, 1))
    (raw / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="t10k-labels") as caught:
        load_dataset("mnist", root=tmp_path)
    assert "train-images" not in str(caught.value)


def test_svhn_download_fetches_only_what_is_missing(server, tmp_path, monkeypatch) -> None:
    folder, address = server
    write_svhn(folder, monkeypatch, tiny_images(30, 0), tiny_images(6, 1))
    for entry in torchvision.datasets.SVHN.split_list.values():
        entry[0] = f"{address}/{entry[1]}"
    root = tmp_path / "root"
    first = load_dataset("svhn", root=root, download=True, valid_size=5)
    for path in folder.iterdir():
        path.unlink()
    for download in (False, True):
        again = load_dataset("svhn", root=root, download=download, valid_size=5)
        assert torch.equal(first.train.inputs, again.train.inputs)


# Real data, where it is at hand --------------------------------------------------------------------------------------


def load_real(name: str) -> Dataset:
    if not os.environ.get("ADALFL_DATA"):
        pytest.skip("set ADALFL_DATA to a folder that holds the data sets")
    return load_dataset(name)


@pytest.mark.data
@pytest.mark.parametrize(("name", "shape", "counts"), [
    ("mnist", (1, 28, 28), [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]),
    ("cifar10", (3, 32, 32), [5000] * 10),
])  # fmt: skip
def test_real_images(name: str, shape: tuple[int, ...], counts: list[int]) -> None:
    dataset = load_real(name)
    assert (dataset.outputs, dataset.input_shape) == (10, shape)
    assert_partition(dataset, sum(counts) + 10_000)
    assert (len(dataset.valid), len(dataset.test)) == (10_000, 10_000)
    labels = torch.cat([dataset.train.targets, dataset.valid.targets])
    assert torch.bincount(labels).tolist() == counts
    mean, std = {
        "mnist": ([0.1307], [0.3081]),
        "cifar10": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    }[name]  # of the whole training sets, as commonly quoted
    torch.testing.assert_close(dataset.train.mean.flatten(), torch.tensor(mean), atol=2e-3, rtol=0)
    torch.testing.assert_close(dataset.train.std.flatten(), torch.tensor(std), atol=2e-3, rtol=0)


@pytest.mark.data
@pytest.mark.parametrize(("name", "rows", "features"), [("california", 20640, 8), ("communities", 1994, 100)])
def test_real_tables(name: str, rows: int, features: int) -> None:
    dataset = load_real(name)
    assert (dataset.kind, dataset.outputs, dataset.input_shape) == ("regression", 1, (features,))
    assert_partition(dataset, rows)
    assert_standardised(dataset.train.inputs)
    assert_standardised(dataset.train.targets)
    assert dataset.test.inputs.isfinite().all()


# Batches -------------------------------------------------------------------------------------------------------------

sizes = st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@settings(max_examples=50, deadline=None)
@given(size=sizes, seed=st.integers(0, 2**31))
def test_each_epoch_visits_distinct_rows(size: tuple[int, int], seed: int) -> None:
    n, batch_size = size
    sampler = BatchSampler(n, batch_size, seed)
    for _ in range(3):
        batches = [next(sampler) for _ in range(n // batch_size)]
        assert all(batch.shape == (batch_size,) and batch.dtype == torch.int64 for batch in batches)
        epoch = torch.cat(batches).tolist()
        assert len(set(epoch)) == len(epoch) and set(epoch) <= set(range(n))


@settings(max_examples=50, deadline=None)
@given(size=sizes, seed=st.integers(0, 2**31), before=st.integers(0, 30), other_seed=st.integers(0, 5))
def test_a_resumed_sampler_continues_the_sequence(size, seed, before, other_seed) -> None:
    sampler, resumed = BatchSampler(*size, seed), BatchSampler(*size, other_seed)
    for _ in range(before):
        next(sampler)
    file = io.BytesIO()
    torch.save(sampler.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(20):
        assert torch.equal(next(sampler), next(resumed))


def test_a_saved_state_does_not_follow_the_sampler() -> None:
    sampler, resumed = BatchSampler(20, 6, 0), BatchSampler(20, 6, 1)
    state = sampler.state_dict()
    expected = [next(sampler) for _ in range(10)]
    resumed.load_state_dict(state)
    assert all(torch.equal(rows, next(resumed)) for rows in expected)


def test_the_seed_decides_the_batches_and_torch_does_not() -> None:
    torch.manual_seed(0)
    first = [next(BatchSampler(1000, 100, seed)).tolist() for seed in (0, 0, 1)]
    assert first[0] == first[1] != first[2]
    sampler = BatchSampler(10, 10, 0)
    assert next(sampler).tolist() != next(sampler).tolist(), "each epoch has its own order"
    torch.manual_seed(0)
    undisturbed = torch.rand(3)
    torch.manual_seed(0)
    next(BatchSampler(10, 5, 0))
    assert torch.equal(torch.rand(3), undisturbed)


def test_the_sampler_covers_all_rows_over_epochs() -> None:
    sampler = BatchSampler(7, 3, 0)
    seen = torch.cat([next(sampler) for _ in range(200)])
    assert set(seen.tolist()) == set(range(7)), "the dropped tail differs from epoch to epoch"


@pytest.mark.parametrize(("n", "batch_size"), [(10, 11), (10, 0), (0, 1)])
def test_impossible_batch_sizes_are_refused(n: int, batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size={batch_size} .*n={n}"):
        BatchSampler(n, batch_size, 0)


def test_a_state_of_another_sampler_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(20, 5\).*\(20, 4\)"):
        BatchSampler(20, 4, 0).load_state_dict(BatchSampler(20, 5, 0).state_dict())
