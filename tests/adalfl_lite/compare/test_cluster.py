"""A comparison on a Dask or a Ray cluster, one of whose workers is killed: its jobs are done again, none twice."""

import os
import signal
import time
from threading import Thread

import joblib
import pytest

from adalfl_lite.compare.grid import compare
from adalfl_lite.compare.tasks import get_task

SEEDS = range(6)


@pytest.fixture
def task():
    return get_task("iris").with_(steps=300)


def kill_one_worker(folder, worker_pids, killed):
    """SIGKILL to a worker once the first job is stored, while others are under way."""
    for _ in range(6000):
        if any(folder.glob("*.parquet")):
            break
        time.sleep(0.02)
    killed.append((pid := worker_pids()[0], len(list(folder.glob("*.parquet")))))
    os.kill(pid, signal.SIGKILL)


def assert_survives_a_kill(task, folder, worker_pids, backend, **options):
    killed = []
    killer = Thread(target=kill_one_worker, args=(folder, worker_pids, killed), daemon=True)
    killer.start()
    with joblib.parallel_config(backend=backend, **options):
        found = compare([task], ["handcrafted"], SEEDS, folder=folder, jobs=2, progress=False)
    killer.join()
    ((_, done),) = killed
    assert done < len(SEEDS), "the worker was killed mid-way"
    assert len(list(folder.glob("*.parquet"))) == len(SEEDS)
    expected = compare([task], ["handcrafted"], SEEDS, progress=False)
    clock = ["seconds", "initialisation_seconds"]
    assert found.drop(columns=clock).equals(expected.drop(columns=clock))


@pytest.mark.slow
def test_dask_does_the_jobs_of_a_killed_worker_again(task, tmp_path):
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, memory_limit=0, dashboard_address=None, local_directory=tmp_path / "dask"
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        folder = tmp_path / "jobs"
        assert_survives_a_kill(task, folder, lambda: list(client.run(os.getpid).values()), "dask")


@pytest.mark.slow
def test_ray_does_the_jobs_of_a_killed_worker_again(task, tmp_path):
    ray, psutil = pytest.importorskip("ray"), pytest.importorskip("psutil")
    from ray.util.joblib import register_ray

    def worker_pids():
        children = psutil.Process().children(recursive=True)
        return [child.pid for child in children if "PoolActor" in " ".join(child.cmdline())]

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        register_ray()
        again = {"max_restarts": -1, "max_task_retries": -1}
        assert_survives_a_kill(task, tmp_path / "jobs", worker_pids, "ray", ray_remote_args=again)
    finally:
        ray.shutdown()
