"""Comparing: which methods, on which tasks, over which seeds.

Each imports those above it alone::

    tasks    which model learns which data set, and how
    recipes  how a loss or a learning rate is had: given, learned, searched for, tuned, replayed
    methods  recipes put together: the table of what is compared; prepare and train
    results  tables of results, kept and read
    grid     methods over tasks and seeds
"""

from adalfl_lite.compare.grid import compare, run
from adalfl_lite.compare.methods import MAIN_METHODS, METHODS, Method, get_method, prepare, train
from adalfl_lite.compare.recipes import Given, Learned, LearnedRate, Replayed, TaskLoss, TaskRate, Tuned, fresh
from adalfl_lite.compare.results import final_errors, read_results, tied, write_results
from adalfl_lite.compare.tasks import TASKS, Task, get_task

__all__ = [
    "MAIN_METHODS",
    "METHODS",
    "TASKS",
    "Given",
    "Learned",
    "LearnedRate",
    "Method",
    "Replayed",
    "Task",
    "TaskLoss",
    "TaskRate",
    "Tuned",
    "compare",
    "final_errors",
    "fresh",
    "get_method",
    "get_task",
    "prepare",
    "read_results",
    "run",
    "tied",
    "train",
    "write_results",
]
