"""What the scripts beside this file share: arguments, one thread, tables kept with their provenance and checksum."""

import argparse
import hashlib
from collections.abc import Collection
from pathlib import Path

import pandas as pd
import torch

from adalfl_lite.files import atomic_path
from adalfl_lite.provenance import provenance

HERE = Path(__file__).parent
CHECKSUMS = HERE / "checksums.txt"
"""SHA-256 of every stored table, as ``sha256sum`` writes them: what anything but its script changed is noticed."""


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """A parser that shows the script's own words; the data folder is an option of all."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="the data folder")
    return parser


def begin(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of this run, on one thread."""
    torch.set_num_threads(1)
    return parser.parse_args()


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
    if path.parent == HERE:
        note(path)


def checksum(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def checksums() -> dict[str, str]:
    """What is kept: name -> SHA-256."""
    lines = CHECKSUMS.read_text().splitlines() if CHECKSUMS.exists() else []
    return {name: digits for digits, name in (line.split("  ") for line in lines)}


def note(path: Path) -> None:
    """Put a file's checksum among those that are kept."""
    known = checksums() | {path.name: checksum(path)}
    with atomic_path(CHECKSUMS) as temporary:
        temporary.write_text("".join(f"{known[name]}  {name}\n" for name in sorted(known)))
