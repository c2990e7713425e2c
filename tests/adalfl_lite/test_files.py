"""A file is whole or absent: what was there before survives a failure, and what cannot be read is refused."""

import os
import stat

import numpy as np
import pytest
import torch

from adalfl_lite.files import atomic_path, atomic_save, load_payload

FORMAT = "some-format-1"


class Unsafe:
    """Unpickling this makes a file: what ``weights_only=True`` must prevent."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_written_at_once_in_a_new_folder_with_nothing_beside_it(tmp_path):
    path = tmp_path / "new" / "folder" / "file.txt"
    with atomic_path(path) as temporary:
        assert temporary.parent == path.parent  # os.replace is atomic within one file system only
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert os.listdir(path.parent) == ["file.txt"]


def test_numpys_numbers_are_saved_as_pythons(tmp_path):
    numbers = {"float": np.float64(0.5), "nested": [np.int64(3), (np.bool_(True), {np.int32(2): np.float32(0.25)})]}
    atomic_save({"format": FORMAT, **numbers, "tensor": torch.ones(2)}, tmp_path / "file")
    found = load_payload(tmp_path / "file", FORMAT)
    assert {name: found[name] for name in numbers} == {"float": 0.5, "nested": [3, (True, {2: 0.25})]}
    assert torch.equal(found["tensor"], torch.ones(2))


def test_an_exception_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_a_payload_that_cannot_be_saved_leaves_the_old_one(tmp_path):
    path = tmp_path / "file.pt"
    atomic_save({"format": FORMAT, "value": 1}, path)
    with pytest.raises(AttributeError, match="local object"):  # pickle, in the words of 3.11 and of 3.13
        atomic_save({"format": FORMAT, "value": lambda: None}, path)
    assert load_payload(path, FORMAT)["value"] == 1
    assert os.listdir(tmp_path) == ["file.pt"]


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    with atomic_path(tmp_path / "atomic") as temporary:
        temporary.write_text("")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "atomic")]
    assert modes[0] == modes[1]


def test_a_payload_comes_back_bit_for_bit(tmp_path):
    payload = {"format": FORMAT, "tensor": torch.randn(3, 4, dtype=torch.float64), "list": [1, 2.5, "x", None]}
    atomic_save(payload, tmp_path / "file.pt")
    loaded = load_payload(tmp_path / "file.pt", FORMAT)
    assert torch.equal(loaded.pop("tensor"), payload.pop("tensor"))
    assert loaded == payload


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        load_payload(tmp_path / "nowhere.pt", FORMAT)
    with pytest.raises(FileNotFoundError):
        load_payload(tmp_path, FORMAT)


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign"])
def test_a_damaged_or_foreign_file_is_refused(tmp_path, damage):
    path = tmp_path / "file.pt"
    atomic_save({"format": FORMAT, "tensor": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "foreign": b"PNG, say"}[damage])
    with pytest.raises(ValueError, match=r"file\.pt cannot be read as a some-format-1 file"):
        load_payload(path, FORMAT)


def test_an_older_format_is_refused(tmp_path):
    atomic_save({"format": "some-format-0"}, tmp_path / "file.pt")
    with pytest.raises(ValueError, match="holds format 'some-format-0', expected 'some-format-1'"):
        load_payload(tmp_path / "file.pt", FORMAT)


@pytest.mark.parametrize("payload", [{"value": 1}, [FORMAT], torch.zeros(2)])
def test_a_file_of_no_format_is_refused(tmp_path, payload):
    atomic_save(payload, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=r"file\.pt is no some-format-1 file; give one"):
        load_payload(tmp_path / "file.pt", FORMAT)


def test_reading_runs_no_code(tmp_path):
    bait = tmp_path / "made by unpickling"
    torch.save({"format": FORMAT, "value": Unsafe(bait)}, tmp_path / "file.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        load_payload(tmp_path / "file.pt", FORMAT)
    assert not bait.exists()
