"""What all tests share: the order, fast ones first."""

import matplotlib
import pytest

matplotlib.use("Agg")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slow tests last, and the order within both groups as collected."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
