"""What every test may rely on: vLLM's environment, the demo model, and where the paper's data may lie.

It also hands a run's claims to the conformance matrix.

The environment is set at import, before anything can import vLLM, which reads some of it only once.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

PROJECT_ROOT = Path(__file__).resolve().parent.parent
PAPER_DATA = PROJECT_ROOT.parent / "shared" / "paper" / "data"

IS_XDIST_WORKER = "PYTEST_XDIST_WORKER" in os.environ
# All processes of a run share one new cache. No test runs a graph that an earlier state of the code has compiled, and
# vLLM inspects each model class only once.
_CACHE_ROOT = os.environ["VLLM_CACHE_ROOT"] if IS_XDIST_WORKER else tempfile.mkdtemp(prefix="vllm-steer-tests-")

os.environ.update(
    {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: a third of the start-up time
        "VLLM_CACHE_ROOT": _CACHE_ROOT,
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",  # every checkpoint is local, so a look-up at the hub could only time out
        "TOKENIZERS_PARALLELISM": "false",
        # Such small matrices gain nothing from a second thread. On a busy machine, two threads that spin while they
        # wait for each other take several times as long.
        "OMP_NUM_THREADS": "1",
        # Numba, which finds n-grams, also sets OpenMP's number of threads, for torch too and permanently. Everything
        # that ran later in the process took up to thirty times as long.
        "NUMBA_NUM_THREADS": "1",
    }
)
# Plugins are found the way a user's process finds them, whatever the caller's shell filters.
os.environ.pop("VLLM_PLUGINS", None)

from tests.conformance import ConformanceMatrix, put_claims_on  # noqa: E402  # what it imports may read the environment


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--conformance", type=Path, metavar="FILE", help="write what the run has shown to a Markdown file")
    parser.addoption("--coverage-floor", type=float, metavar="PERCENT", help="measure coverage and fail below that")


def pytest_configure(config: pytest.Config) -> None:
    if find_spec("hypothesis"):  # a machine for the kernels' tests alone has none
        _draw_the_same_examples()
    floor = config.getoption("--coverage-floor")
    if floor is not None:
        from tests.coverage_floor import CoverageFloor

        config.pluginmanager.register(CoverageFloor(floor, config))
    target = config.getoption("--conformance")
    if target is not None and not hasattr(config, "workerinput"):  # the process that all reports come to
        config.pluginmanager.register(ConformanceMatrix(target))


def _draw_the_same_examples() -> None:
    """Each run draws the same examples, so that a test's name repeats a failure; slowness fails nothing."""
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "repeatable", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    put_claims_on(items)
    # They are one piece and the longest, which would keep one process at work alone at the end.
    items.sort(key=lambda item: item.path.parent.name != "server")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from tests.shared_server import SharedServerScheduling  # a machine for the kernels' tests alone has no xdist

    return SharedServerScheduling(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_unconfigure() -> None:
    if not IS_XDIST_WORKER:
        shutil.rmtree(_CACHE_ROOT, ignore_errors=True)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The SmolLM2-135M-Instruct checkpoint the demo uses, converted on first use."""
    from batch_jobs.demo_model import demo_model_path

    return demo_model_path()


@pytest.fixture(scope="session")
def paper_data() -> Path:
    """The authors' public data files, which lie beside the project in some checkouts and are never part of it."""
    if not PAPER_DATA.is_dir():
        pytest.skip(f"the paper's data files are not at {PAPER_DATA}")
    return PAPER_DATA
