"""Fixtures shared by all tests; without a CUDA device the Triton kernels run in the interpreter."""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from sefi_fast import keep_freed_memory

if not torch.cuda.is_available():
    # Triton reads this when it is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # The processes share the cores; threads that wait for a core spin, and all get slow.
    _threads = max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    torch.set_num_threads(_threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(_threads))
if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    # Inductor's cache gives vector code of another run to a compiler without vectors.
    cache = Path(tempfile.gettempdir(), f"torchinductor-{capability}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
_tests = Path(__file__).parent
sys.path[:0] = [str(_tests), str(_tests.parent), str(_tests.parent / "benchmarks")]
keep_freed_memory()
if name := os.environ.get("SEFI_TEST_INSTRUCTION_SET"):
    from sefi_fast import _C

    _C.set_instruction_set(name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Among several processes, files with slow tests first: the last file is waited for alone."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _threads_as_before():
    """Recipes and benchmarks set the process's threads, which tests after them would have too."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def sd15_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved diffusers folder of the random-weight SD 1.5-architecture pipeline."""
    from models import make_sd15

    folder = tmp_path_factory.mktemp("sd15")
    make_sd15(folder / "vocabulary").save_pretrained(folder / "pipeline")
    return folder / "pipeline"


@pytest.fixture(scope="session")
def _sd15_session(tmp_path_factory: pytest.TempPathFactory):
    from models import make_sd15

    return make_sd15(tmp_path_factory.mktemp("sd15_vocabulary"))


@pytest.fixture
def sd15_pipeline(_sd15_session):
    """A fresh copy of the random-weight SD 1.5-architecture pipeline (float32, CPU)."""
    return _fresh(_sd15_session)


@pytest.fixture(scope="session")
def _sd21_session(tmp_path_factory: pytest.TempPathFactory):
    from models import make_sd21

    return make_sd21(tmp_path_factory.mktemp("sd21_vocabulary"))


@pytest.fixture
def sd21_pipeline(_sd21_session):
    """A fresh copy of the random-weight SD 2.1-architecture pipeline (float32, CPU)."""
    return _fresh(_sd21_session)


@pytest.fixture(scope="session")
def _sdxl_session(tmp_path_factory: pytest.TempPathFactory):
    from models import make_sdxl

    return make_sdxl(tmp_path_factory.mktemp("sdxl_vocabulary"))


@pytest.fixture
def sdxl_pipeline(_sdxl_session):
    """A fresh copy of the random-weight SDXL-architecture pipeline (float32, CPU)."""
    return _fresh(_sdxl_session)


def _fresh(pipe):
    copied = copy.deepcopy(pipe)
    copied.set_progress_bar_config(disable=True)
    return copied
