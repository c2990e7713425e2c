"""Tables of results: kept whole, read with care, and their last rows."""

from __future__ import annotations

import os

import numpy as np
import pandas as pd

from adalfl_lite.files import atomic_path


def read_results(path: str | os.PathLike) -> pd.DataFrame:
    """A table that :func:`compare` or the command line stored.

    Raises:
        ValueError: the file is damaged or something else.
    """
    try:
        frame = pd.read_parquet(path, engine="pyarrow", page_checksum_verification=True)
    except Exception as error:  # pyarrow raises many types
        raise ValueError(
            f"{path} cannot be read as results, it is foreign or damaged; give a file that train or compare wrote, or"
            " delete a damaged one"
        ) from error
    if missing := {"task", "method", "seed", "step", "test_error"} - set(frame.columns):
        raise ValueError(
            f"{path} lacks the columns {', '.join(sorted(missing))}; give a file that train or compare wrote, or delete"
            " a damaged one"
        )
    return frame


def write_results(results: pd.DataFrame, path: str | os.PathLike) -> None:
    """Store a table of results, atomically and with checksums."""
    with atomic_path(path) as temporary:
        results.to_parquet(temporary, index=False, engine="pyarrow", write_page_checksum=True)


def tied(results: pd.DataFrame) -> pd.DataFrame:
    """Test errors to six digits: those of older files are sums in float32, whose ties would not be ties."""
    return results.assign(test_error=results.test_error.round(6))


def final_errors(results: pd.DataFrame) -> pd.DataFrame:
    """The last row of every job: one row per (task, method, seed), with the columns ``diverged`` and ``cost``.

    ``cost`` is in seconds, everything before the training and the training itself, evaluation left out.
    """
    results = results.reset_index(drop=True)
    last = results.groupby(["task", "method", "seed"], sort=False)["step"].idxmax()
    found = results.loc[last].assign(diverged=lambda rows: ~np.isfinite(rows.test_error)).reset_index(drop=True)
    if {"initialisation_seconds", "seconds"} <= set(found):
        found["cost"] = found.initialisation_seconds + found.seconds
    return found
