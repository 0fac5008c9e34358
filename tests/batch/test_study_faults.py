"""Real engines on a tiny model, killed while they work: no row is lost, and none is done twice."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from batch_jobs.config.study import load_study
from batch_jobs.files.object_store import StorePath
from batch_jobs.pipeline import RunOptions, run_study
from batch_jobs.rows.store import read_rows
from batch_jobs.run.open_run import open_run
from batch_jobs.run.run_directory import RunDirectory
from tests.support.s3_server import S3Server
from tests.support.tiny_study import COMMAND, PROJECT_ROOT, environment, run_command, write_study

pytestmark = [pytest.mark.slow, pytest.mark.engine]
NUM_ROWS = 2 * 2 * 3 * 4
PATIENCE_SECONDS = 240


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Path:
    return write_study(tmp_path_factory.mktemp("tiny"), demo_model)


@pytest.fixture(scope="module")
def undisturbed_run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The study, run in one engine without faults."""
    run = RunDirectory(tmp_path_factory.mktemp("local") / "run")
    result = run_study(load_study(config), run, RunOptions(), console=Console(quiet=True))
    assert (result.generated, result.failed) == (NUM_ROWS, 0)
    return run


@pytest.fixture(scope="module")
def undisturbed(undisturbed_run: RunDirectory) -> list[dict[str, Any]]:
    """Its rows."""
    return read_rows(undisturbed_run.generations).to_pylist()


def results(rows: list[dict[str, Any]]) -> dict[str, tuple[str, int]]:
    """Row id -> completion and its tokens. A row that is there twice is an error."""
    assert len({row["row_id"] for row in rows}) == len(rows)
    return {row["row_id"]: (row["completion"], row["completion_tokens"]) for row in rows}


def parts(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / "generations").rglob("part-*.parquet")}


def wait_for(what: Callable[[], Any], process: subprocess.Popen[str], log: Path) -> Any:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (found := what()):
        assert process.poll() is None, f"the command ended early:\n{log.read_text(encoding='utf-8')[-4000:]}"
        assert time.monotonic() < deadline, log.read_text(encoding="utf-8")[-4000:]
        time.sleep(0.05)
    return found


@contextmanager
def running(config: Path, out: Path | str, log: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Run the command in the background; all its processes are gone afterwards."""
    started: list[psutil.Process] = []
    with log.open("w", encoding="utf-8") as sink:
        process = subprocess.Popen(
            [*COMMAND, str(config), "--out", str(out), *options],
            cwd=PROJECT_ROOT,
            env=environment(),
            stdout=sink,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield process
            started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        finally:
            for one in started:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            process.kill()
            process.wait()


def actors(parent: psutil.Process | subprocess.Popen[str]) -> list[psutil.Process]:
    """The Ray workers below a driver or a node that run an engine."""
    found = []
    for child in psutil.Process(parent.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if "ray::MapWorker" in " ".join(child.cmdline()):
                found.append(child)
    return found


@pytest.mark.ray
def test_kill_9_of_an_actor_the_driver_and_the_whole_session_loses_and_doubles_nothing(
    config: Path, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    out, log = tmp_path / "run", tmp_path / "log.txt"
    pool = ("--executor", "ray", "--workers", "2")

    with running(config, out, log, *pool) as driver:
        wait_for(lambda: parts(out), driver, log)
        victim = wait_for(lambda: actors(driver), driver, log)[0]
        victim.kill()
        after_actor = parts(out)
        # another actor takes the victim's place, under the same driver
        wait_for(
            lambda: len(alive := actors(driver)) == 2 and victim.pid not in {one.pid for one in alive}, driver, log
        )
        wait_for(lambda: len(parts(out)) > len(after_actor), driver, log)
        family, engines = psutil.Process(driver.pid).children(recursive=True), actors(driver)
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        # the engines must not outlive it; some of Ray's own agents take their time
        _, alive = psutil.wait_procs(engines, timeout=60)
        assert not alive
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    first = parts(out)
    assert 0 < len(first) < NUM_ROWS // 4

    with running(config, out, log, *pool) as driver:
        wait_for(lambda: len(parts(out)) > len(first), driver, log)
        for one in [*psutil.Process(driver.pid).children(recursive=True), psutil.Process(driver.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        driver.wait()
    second = parts(out)
    assert first.items() <= second.items(), "parts that were there must stay as they are"
    assert len(second) < NUM_ROWS // 4

    last = run_command(config, out)  # in one engine of its own process: who generates a row makes no difference
    assert last.returncode == 0, last.stderr[-4000:]
    assert second.items() <= parts(out).items()
    assert results(read_rows(out / "generations").to_pylist()) == results(undisturbed)
    assert f"{NUM_ROWS - 4 * len(second)} rows generated, {4 * len(second)} there before, 0 failed" in last.stdout
    assert not list((out / "attempts").iterdir())


@contextmanager
def two_nodes(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """A Ray cluster of two nodes with a CPU each, on this machine: its address, and the process of the second node.

    Their workers run in `folder`/head and in `folder`/second, so that /proc/self/cwd is another place for each node.
    """
    from ray.cluster_utils import Cluster

    for name in ("head", "second"):
        (folder / name).mkdir()
    options = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster()
    try:
        with contextlib.chdir(folder / "head"):
            # a node that a busy machine keeps waiting is not dead; one that was killed refuses the connection at once
            cluster.add_node(**options, include_dashboard=False, _system_config={"health_check_timeout_ms": 120_000})
        with contextlib.chdir(folder / "second"):
            node = cluster.add_node(**options)
        (raylet,) = node.all_processes["raylet"]
        yield cluster.address, psutil.Process(raylet.process.pid)
    finally:
        cluster.shutdown()


@pytest.mark.ray
def test_nodes_without_a_shared_disk_work_in_an_object_store_and_one_of_them_may_die(
    config: Path,
    undisturbed_run: RunDirectory,
    undisturbed: list[dict[str, Any]],
    tmp_path: Path,
    s3: S3Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log, out = tmp_path / "log.txt", s3.address("runs/tiny")
    place = StorePath.parse(out)
    # another machine has extracted the directions and stored some of the rows
    with open_run(out) as run:
        shutil.copytree(undisturbed_run.path, run.path, dirs_exist_ok=True)
        for part in sorted(run.generations.rglob("part-*.parquet"))[2:]:
            part.unlink()
        run.publish()

    def stored() -> set[str]:
        return {name for name in place.files() if name.endswith(".parquet")}

    first = stored()
    assert len(first) == 2
    monkeypatch.setenv("PYTHONPATH", str(PROJECT_ROOT))
    with two_nodes(tmp_path) as (address, second_node):
        pool = ("--executor", "ray", "--workers", "2", "--address", address)
        blind = Path("/proc/self/cwd/run")
        refused = run_command(config, blind, *pool, cwd=tmp_path / "head")
        assert refused.returncode == 2, refused.stderr[-4000:]
        # Ray's core may say before it at which level it logs
        line = refused.stderr.splitlines()[-1]
        assert line.startswith("vllm-steer: The Ray node ")
        assert f"does not see the run directory {blind}; give --out a folder that all nodes share" in line
        with running(config, out, log, *pool) as driver:
            wait_for(lambda: actors(second_node), driver, log)
            wait_for(lambda: len(stored()) >= len(first) + 2, driver, log)
            victims = actors(second_node)
            second_node.kill()  # its workers end with it
            _, alive = psutil.wait_procs(victims, timeout=60)
            assert not alive
            assert driver.wait(PATIENCE_SECONDS) == 0, log.read_text(encoding="utf-8")[-4000:]
    assert "0 failed" in log.read_text(encoding="utf-8")
    with open_run(out) as run:
        assert results(read_rows(run.generations).to_pylist()) == results(undisturbed)
    assert first < stored()
    assert len(stored()) == NUM_ROWS // 4
    assert not [name for name in place.files() if name.startswith(("attempts/", "drivers/"))]


def test_a_row_that_breaks_a_step_of_the_engine_is_recorded_and_can_be_run_again(
    config: Path, undisturbed: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    study = load_study(config)
    bad = max(undisturbed, key=lambda row: row["row_id"])
    # Greedy rows of a condition differ only in their seed, and a scenario's layers and α share seeds: all rows with
    # this seed are poisoned.
    poisoned = {row["row_id"] for row in undisturbed if row["seed"] == bad["seed"]}
    execute = CPUModelRunner.execute_model

    def fail_on_the_seed(self: Any, scheduled: Any, *arguments: Any, **options: Any) -> Any:
        for request in scheduled.scheduled_new_reqs:
            if request.sampling_params.seed == bad["seed"]:
                raise RuntimeError("injected: this row breaks the step")
        return execute(self, scheduled, *arguments, **options)

    run = RunDirectory(tmp_path / "run")
    console = Console(quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(CPUModelRunner, "execute_model", fail_on_the_seed)
        result = run_study(study, run, RunOptions(), console=console)
    assert (result.generated, result.failed) == (NUM_ROWS, len(poisoned))
    rows = read_rows(run.generations).to_pylist()
    errors = {row["row_id"]: row["error"] for row in rows if row["error"]}
    assert set(errors) == poisoned
    assert all("injected" in error for error in errors.values())
    healthy = results([row for row in undisturbed if row["row_id"] not in poisoned])
    assert results([row for row in rows if not row["error"]]) == healthy

    unchanged = run_study(study, run, RunOptions(), console=console)
    assert (unchanged.generated, unchanged.failed) == (0, len(poisoned))
    mended = run_study(study, run, RunOptions(retry_failed=True), console=console)
    assert (mended.generated, mended.failed) == (len(poisoned), 0)
    assert results(read_rows(run.generations).to_pylist()) == results(undisturbed)
