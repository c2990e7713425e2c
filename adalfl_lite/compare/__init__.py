"""Comparing: which methods, on which tasks, over which seeds.

Each imports those above it alone.

    tasks     which model learns which data set, and how
    methods   how each loss is had: the table of what is compared
    together  several seeds of a method as one program
    results   tables of results, kept and read
    grid      methods over tasks and seeds
"""

from adalfl_lite.compare.grid import compare
from adalfl_lite.compare.methods import MAIN_METHODS, METHODS, fresh, prepare, train
from adalfl_lite.compare.results import final_errors, read_results, write_results
from adalfl_lite.compare.tasks import TASKS, Task, get_task

__all__ = [
    "MAIN_METHODS",
    "METHODS",
    "TASKS",
    "Task",
    "compare",
    "final_errors",
    "fresh",
    "get_task",
    "prepare",
    "read_results",
    "train",
    "write_results",
]
