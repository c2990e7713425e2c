"""What all tests share: the order, fast ones first, and the count of what the tests of trust tried."""

from collections import Counter

import hypothesis
import matplotlib
import pytest

matplotlib.use("Agg")
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")
COUNTS = pytest.StashKey[Counter]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slow tests last, and the order within both groups as collected."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


def pytest_configure(config: pytest.Config) -> None:
    """Start to count."""
    config.stash[COUNTS] = Counter()


@pytest.fixture(scope="session")
def counts(pytestconfig: pytest.Config) -> Counter:
    """A counter to add to; what it holds is printed after the tests."""
    return pytestconfig.stash[COUNTS]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand over what this process counted, if it is one of several."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["counts"] = dict(session.config.stash[COUNTS])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    """Add what another process counted."""
    node.config.stash[COUNTS].update(getattr(node, "workeroutput", {}).get("counts", {}))


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """Print the counts."""
    if config.stash[COUNTS]:
        terminalreporter.section("trust")
        for label, number in config.stash[COUNTS].items():
            terminalreporter.write_line(f"{number:6d}  {label}")
