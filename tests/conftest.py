import os
import random
import signal
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

import lcodec_ext
from devices import DEVICES, PARAMETERS
from lcodec_ext import _threads
from lcodec_ext.compat import scrub
from processes import Group, Processes

settings.register_profile("short", max_examples=40, deadline=None, derandomize=True)
# CI tries the same examples each time, so that a failure can be repeated. Elsewhere they are new.
settings.register_profile(
    "long",
    max_examples=600,
    derandomize="CI" in os.environ,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))

# Read when SciPy is first imported: scikit-learn's checks of estimators skip some without it.
os.environ.setdefault("SCIPY_ARRAY_API", "1")

# Small matrices: a second thread would only spin beside other work. `make check-paths` sets two.
torch.set_num_threads(int(os.environ.get("LCODEC_TEST_TORCH_THREADS", "1")))

CUDA = lcodec_ext.cuda_is_available() and torch.cuda.is_available()
BACKEND = os.environ.get("LCODEC_TEST_BACKEND", "gloo")  # of groups of processes
SIZES = [2, 3] if BACKEND == "gloo" or torch.cuda.device_count() > 2 else [2]
# Variables that others set once: pytest, scikit-learn when it is imported, torch.compile.
OF_OTHERS = ("PYTEST_", "KMP_", "TORCHINDUCTOR_", "_TORCHINDUCTOR_", "TRITON_", "CUBLAS_")
SIMD_LEVELS = lcodec_ext.build_info()["simd_supported"]


def pytest_report_header():
    info = lcodec_ext.build_info()
    untested = sorted(set(info["simd_compiled"]) - set(info["simd_supported"]))
    return [
        f"lcodec_ext {info['version']} from {os.path.dirname(lcodec_ext.__file__)}, "
        f"sanitizers: {', '.join(info['sanitizers']) or 'none'}",
        f"SIMD levels under test: {', '.join(SIMD_LEVELS)}"
        + (f"; compiled but not run, this CPU lacks them: {', '.join(untested)}" * bool(untested)),
        f"CUDA kernels under test: {', '.join(device.name for device in DEVICES)}",
        lcodec_ext.cuda_status(),
        f"tests marked cuda: {cuda_tests()}",
        f"groups of {' and '.join(map(str, SIZES))} processes, by {BACKEND}",
        f"torch on this CPU: {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads",
    ]


def cuda_tests():
    """What becomes of them on this machine."""
    if CUDA:
        return f"under test on {torch.cuda.get_device_name()}"
    if lcodec_ext.cuda_is_available():
        return f"deselected, this machine cannot run them: torch {torch.__version__} sees no GPU"
    return "deselected, this machine cannot run them"


def pytest_collection_modifyitems(config, items):
    def lacks(item):
        if item.get_closest_marker("cuda") and not CUDA:
            return True
        three = "processes" in item.fixturenames and "ranks" not in item.fixturenames
        return three and SIZES == [2]

    deselected = [item for item in items if lacks(item)]
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if not lacks(item)]


@pytest.fixture(params=SIMD_LEVELS)
def simd_level(request, monkeypatch):
    """Every SIMD level that this CPU can run."""
    monkeypatch.setenv("LCODEC_SIMD", request.param)
    return request.param


@pytest.fixture(params=[1, 2, 3])
def threads(request, monkeypatch):
    monkeypatch.setenv("LCODEC_NUM_THREADS", str(request.param))
    return request.param


@pytest.fixture(params=PARAMETERS)
def device(request):
    """Every way to run CUDA kernels here; see devices.py."""
    request.param.start()
    yield request.param
    request.param.finish()


def start_of_draws():
    """Whoever draws from a global generator draws the same, whatever ran before."""
    random.seed(20220619)
    np.random.seed(20220619)  # noqa: NPY002
    torch.manual_seed(20220619)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef):
    if fixturedef.scope != "function":  # the first test that asks for it may be any
        start_of_draws()


def state():
    """What a test could change for the later tests of its process."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    return {
        "threads of torch": torch.get_num_threads(),  # forked children would hang in OpenMP
        "threads of lcodec_ext": (_threads._threads, _threads._limit, _threads._here.threads),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "cuDNN": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        "errors of NumPy": np.geterr(),
        "open figures": pyplot.get_fignums() if pyplot else [],
        "handlers": [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)],
        "folder": os.getcwd(),
        "sys.argv": [*sys.argv],
        "sys.path": [*sys.path],
        **{f"${k}": each for k, each in os.environ.items() if not k.startswith(OF_OTHERS)},
    }


@pytest.fixture(autouse=True)
def _nothing_stays():
    """Which tests share a process, and in which order, differs from run to run."""
    start_of_draws()
    scrub._LAST.update(asked=None, times=0)  # as of removals, by tests whose weights are equal
    before = state()
    yield
    after = state()
    names = before.keys() | after.keys()
    changed = {k: (before.get(k), after.get(k)) for k in names if before.get(k) != after.get(k)}
    assert changed == {}, "left for later tests"  # of each: before, after


@pytest.fixture(scope="session")
def processes():
    most = Processes(SIZES[-1], backend=BACKEND)
    yield most
    most.stop()


@pytest.fixture(params=SIZES)
def ranks(request, processes):
    """`ranks.run(function, ...)` in groups of two and of three processes; see processes.py."""
    return Group(processes, request.param)


@pytest.fixture
def rng():
    return np.random.default_rng(20220619)
