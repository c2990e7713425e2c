"""What the scripts beside this file share: arguments, one thread, tables kept with their provenance and checksum."""

import argparse
import hashlib
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import joblib
import pandas as pd
import torch

from adalfl_lite.files import atomic_path
from adalfl_lite.provenance import provenance

HERE = Path(__file__).parent
CHECKSUMS = HERE / "checksums.txt"
"""SHA-256 of every stored file, as ``sha256sum`` writes them: what anything but its script changed is noticed."""


def arguments(doc: str | None, *, root: bool = False, jobs: bool = False) -> argparse.ArgumentParser:
    """A parser that shows the script's own words.

    Args:
        doc: the script's docstring.
        root: the script reads data that scikit-learn does not bring along, and takes ``--root``.
        jobs: it can use several processes, and takes ``--jobs``.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if root:
        parser.add_argument("--root", help="the data folder, by default the one that ADALFL_DATA names")
    if jobs:
        parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    return parser


def begin(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of this run, which from here on has one thread."""
    torch.set_num_threads(1)
    return parser.parse_args()


def spread(function: Callable[..., Any], points: Iterable[tuple], jobs: int) -> list[Any]:
    """``function(*point)`` of every point, in their order, by so many processes of one thread each."""
    return joblib.Parallel(n_jobs=jobs)(joblib.delayed(_on_one_thread)(function, point) for point in points)


def _on_one_thread(function: Callable[..., Any], point: tuple) -> Any:
    torch.set_num_threads(1)  # a new process has as many as there are cores
    return function(*point)


def save(table: pd.DataFrame, path: Path, *, tasks: Collection[str] | None = None, labelled: bool = False) -> None:
    """Keep a table, whole or not at all, with its provenance; a stored one gets a new checksum.

    Args:
        table: what was measured.
        path: a .parquet file.
        tasks: those that were measured; the rows of others stay as they are stored. None replaces all.
        labelled: the rows have their provenance already.
    """
    table = table if labelled else table.assign(**provenance())
    if tasks is not None and path.exists():
        before = pd.read_parquet(path)
        table = pd.concat([before[~before.task.isin(tasks)], table], ignore_index=True)
    with atomic_path(path) as temporary:
        table.to_parquet(temporary, index=False)
    note(path)


def stored() -> list[Path]:
    """Every file here that a script has written: tables, the numbers of the chapters, learned losses."""
    return sorted(path for pattern in ("*.parquet", "*.json", "*/*.pt") for path in HERE.glob(pattern))


def checksum(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def checksums() -> dict[str, str]:
    """The checksums that are kept: name of a stored file -> SHA-256."""
    lines = CHECKSUMS.read_text().splitlines() if CHECKSUMS.exists() else []
    return {name: digits for digits, name in (line.split("  ") for line in lines)}


def note(path: Path) -> None:
    """Put the checksum of a file that lies here among those that are kept; others are nobody's concern."""
    if not path.is_relative_to(HERE):
        return
    known = checksums() | {path.relative_to(HERE).as_posix(): checksum(path)}
    with atomic_path(CHECKSUMS) as temporary:
        temporary.write_text("".join(f"{known[name]}  {name}\n" for name in sorted(known)))
