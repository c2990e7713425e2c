"""Counts what the tests of trust tried, and prints it at the end."""

from collections import Counter

import pytest

COUNTS = pytest.StashKey[Counter]()


def pytest_configure(config):
    config.stash[COUNTS] = Counter()


@pytest.fixture(scope="session")
def counts(pytestconfig):
    """A counter to add to; what it holds is printed after the tests."""
    return pytestconfig.stash[COUNTS]


def pytest_terminal_summary(terminalreporter, config):
    counts = config.stash[COUNTS]
    if counts:
        terminalreporter.section("trust")
        for label, number in counts.items():
            terminalreporter.write_line(f"{number:6d}  {label}")
