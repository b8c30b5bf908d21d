"""Threads, forks, the end of the interpreter, and what other libraries set for a thread."""

import io
import os
import subprocess
import sys
import textwrap
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import threadpoolctl
import torch

import lcodec_ext
from lcodec_ext import _threads
from lcodec_ext._progress import progress_line

rng0 = np.random.default_rng(1)
X = rng0.normal(size=(60, 4))
Y = X[:, 0] + X[:, 2] ** 2


def python(code, seconds=120, **options):
    """Run code in an interpreter of its own; a hang is an error."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=seconds,
        **options,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ------------------------------------------------------------------------------------------------
# Forks


def test_a_worker_that_was_killed_with_the_lock_of_tqdm_stops_nobody():
    """A disabled bar of tqdm would wait for a lock that the processes share."""
    output = python(
        """
        import multiprocessing, os, signal
        import numpy as np
        from tqdm import tqdm
        import lcodec_ext

        X = np.random.default_rng(0).normal(size=(60, 4))

        def hold():
            tqdm.get_lock().acquire()
            os.kill(os.getpid(), signal.SIGKILL)

        def work(queue):
            queue.put(lcodec_ext.foci(X, X[:, 2]).ordering.tolist())

        fork = multiprocessing.get_context("fork")
        tqdm.get_lock()
        killed = fork.Process(target=hold)
        killed.start()
        killed.join()
        print(lcodec_ext.foci(X, X[:, 2]).ordering)
        print(len(lcodec_ext.dependence_graph(X).results))
        queue = fork.Queue()
        child = fork.Process(target=work, args=[queue])
        child.start()
        print(queue.get(timeout=60))
        child.join()
        """
    )
    assert output.split("\n") == ["[2]", "4", "[2]"]


def test_without_a_bar_tqdm_is_not_loaded_and_no_thread_stays():
    output = python(
        """
        import sys, threading
        import numpy as np
        import lcodec_ext

        X = np.random.default_rng(0).normal(size=(60, 4))
        lcodec_ext.foci(X, X[:, 2])
        lcodec_ext.dependence_graph(X)
        print("tqdm" in sys.modules, threading.active_count())
        lcodec_ext.foci(X, X[:, 2], progress=True)
        print("tqdm" in sys.modules, threading.active_count())
        """
    )
    assert output.split("\n") == ["False 1", "True 1"]


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_bars_are_left_out_where_there_is_no_standard_error(monkeypatch, stream):
    if stream is not None:
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    x = np.random.default_rng(0).normal(size=(50, 3))
    found = lcodec_ext.foci(x, x[:, 0], progress=True)
    assert found.ordering[0] == 0
    progress_line(True, "nobody reads this")


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_get_the_results_of_the_parent(method, tmp_path):
    script = tmp_path / "workers.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import concurrent.futures, multiprocessing
            import numpy as np
            import lcodec_ext

            def work(seed):
                X = np.random.default_rng(seed).normal(size=(300, 5))
                return lcodec_ext.codec(X[:, 0] * X[:, 1], X)

            if __name__ == "__main__":
                lcodec_ext.set_num_threads(3)
                expected = [work(seed) for seed in range(4)]
                context = multiprocessing.get_context({method!r})
                with concurrent.futures.ProcessPoolExecutor(2, context) as pool:
                    assert list(pool.map(work, range(4))) == expected
            """
        )
    )
    subprocess.run([sys.executable, str(script)], check=True, timeout=240)


# ------------------------------------------------------------------------------------------------
# The pool of threads


def test_threads_of_the_pool_stay_sleep_and_leave_signals_to_others():
    output = python(
        """
        import os, signal, time
        import numpy as np
        from lcodec_ext import foci, set_num_threads

        def tasks():
            return set(os.listdir("/proc/self/task"))

        def blocked(task):
            with open(f"/proc/self/task/{task}/status") as file:
                mask = next(int(line.split()[1], 16) for line in file if line[:6] == "SigBlk")
            return {each.name for each in signal.Signals if mask >> (each - 1) & 1}

        X = np.random.default_rng(0).normal(size=(300, 40))
        set_num_threads(3)
        before = tasks()
        for _ in range(50):
            foci(X, X[:, 0])
        pool = tasks() - before
        print(len(pool))
        others = {"SIGINT", "SIGTERM", "SIGALRM", "SIGCHLD", "SIGUSR1"}
        print(all(others <= blocked(task) and "SIGSEGV" not in blocked(task) for task in pool))
        started = time.process_time()
        time.sleep(0.5)
        print(time.process_time() - started < 0.1)
        """
    )
    assert output.split("\n") == ["2", "True", "True"]


def test_python_threads_that_call_at_once_get_the_same_results(monkeypatch):
    monkeypatch.setattr(_threads, "_threads", 3)
    tables = [np.random.default_rng(k).normal(size=(400, 6)) for k in range(8)]

    def work(table):
        y = table[:, 0] * table[:, 1]
        return [lcodec_ext.codec(y, table), lcodec_ext.foci(table, y).cumulative.tolist()]

    expected = [work(table) for table in tables]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, tables * 10)) == expected * 10


def test_a_thread_that_wakes_for_one_call_is_not_counted_for_another():
    output = python("from lcodec_ext import _core; print(_core.dependence.helped_at_once(8))")
    assert output == "8"


def test_an_exception_in_a_thread_of_the_pool_reaches_the_caller():
    for _ in range(3):
        with pytest.raises(ValueError, match="thrown in a helper"):
            lcodec_ext._core.dependence.throw_in_a_helper("auto", 3)
    assert lcodec_ext.foci(X, Y).ordering.tolist() == [0, 2]


FORK = """
import os, signal, threading, time
import numpy as np
from lcodec_ext import foci, nearest_neighbors, set_num_threads

set_num_threads(3)
X = np.random.default_rng(0).normal(size=(3000, 30))
y = X[:, 0] * X[:, 1]

def select():
    return foci(X, y, max_features=3).ordering.tolist()

def child(work):
    "What a forked process does."
    process = os.fork()
    if process == 0:
        os._exit(work())
    return process

def exit_code(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
"""


def test_a_fork_has_a_pool_of_its_own_while_others_are_in_calls():
    output = python(
        FORK
        + textwrap.dedent(
            """
            expected, done = select(), []

            def call():
                while not done:
                    assert select() == expected

            threads = [threading.Thread(target=call) for _ in range(3)]
            for thread in threads:
                thread.start()
            print({exit_code(child(lambda: int(select() != expected))) for _ in range(8)})
            done.append(True)
            for thread in threads:
                thread.join()
            """
        )
    )
    assert output == "{0}"


def test_a_fork_within_a_call_ends_the_call_there():
    """A signal's handler forks: the threads that were helping are not in the new process."""
    output = python(
        FORK
        + textwrap.dedent(
            """
            X, forked = np.random.default_rng(0).normal(size=(20_000, 12)), []
            signal.signal(signal.SIGALRM, lambda *_: forked.append(os.fork()))
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            started = time.process_time()
            try:
                found = nearest_neighbors(X)
            except RuntimeError as error:
                os._exit(str(error) != "the process was forked during this call")
            whole = time.process_time() - started
            _, status, used = os.wait4(forked[0], 0)
            print(os.waitstatus_to_exitcode(status), used.ru_utime < whole / 4)
            print((found == nearest_neighbors(X)).all())
            """
        )
    )
    assert output.split() == ["0", "True", "True"]


# ------------------------------------------------------------------------------------------------
# The end of the interpreter


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "call",
    [
        "foci(X, X[:, 0], stop=False, max_features=3)",
        "nearest_neighbors(X)",
        "codec(X[:50, 0], X[:50, 1:3])",  # short: in the kernel's last steps rather than within
    ],
)
def test_daemon_threads_in_the_kernels_do_not_abort_the_process(call, threads):
    """Python ends such a thread by unwinding its stack, which C++ must not catch or cut short."""
    output = python(
        f"""
        import threading, time
        import numpy as np
        from lcodec_ext import codec, foci, nearest_neighbors, set_num_threads

        set_num_threads({threads})
        X = np.random.default_rng(0).normal(size=(20_000, 30))
        started = threading.Event()

        def work():
            started.set()
            while True:
                {call}

        for _ in range(3):
            threading.Thread(target=work, daemon=True).start()
        started.wait()
        time.sleep(0.3)
        print("done")
        """
    )
    assert output == "done"


def test_control_c_still_ends_a_call():
    output = python(
        """
        import signal, threading
        import numpy as np
        from lcodec_ext import foci, set_num_threads

        # Of what a shell starts in the background it is ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        set_num_threads(2)
        X = np.random.default_rng(0).normal(size=(100_000, 60))
        try:
            threading.Timer(1.0, signal.raise_signal, [signal.SIGINT]).start()
            while True:
                foci(X, X[:, 0], stop=False)
        except KeyboardInterrupt:
            print("interrupted")
        """
    )
    assert output == "interrupted"


# ------------------------------------------------------------------------------------------------
# What others set for the thread: NumPy's error state, and flushing to zero


def everything(table, y):
    """The functions, by name, as calls whose answers can be compared."""
    le = lcodec_ext
    return {
        "codec": lambda: le.codec(y, table),
        "codec of x": lambda: le.codec(y, table[:, :1], table[:, 1:]),
        "codec of decimals": lambda: le.codec(y, table, decimals=3),
        "reference": lambda: le.codec(y, table, backend="reference"),
        "lcodec": lambda: le.lcodec(y, table, noise_scale="relative"),
        "foci": lambda: le.foci(table, y, stop=False).cumulative.tolist(),
        "foci bounded": lambda: list(le.foci(table, y, standardize="bounded").ordering),
        "foci raw": lambda: list(le.foci(table, y, standardize=None).ordering),
        "lfoci": lambda: le.lfoci(table, y).cumulative.tolist(),
        "graph": lambda: le.dependence_graph(table).weights.tolist(),
        "neighbors": lambda: le.nearest_neighbors(table).tolist(),
        "xi": lambda: le.xi(table[:, 0], y, ties="random", seed=2**63 + 1),
        "xi_test": lambda: le.xi_test(table[:, 0], y),
        "selector": lambda: le.FOCISelector(stop=False).fit(table, y).cumulative_.tolist(),
    }


def answers(table, y):
    found = {}
    for name, call in everything(table, y).items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                found[name] = repr(call())
            except ValueError as error:
                found[name] = str(error)
    return found


TABLES = {
    "ordinary": X,
    "constant column": X * [1, 0, 1, 1],
    "squares underflow": X * 1e-200,
    "subnormal": X * 1e-310,
    "squares overflow": X * 1e200,
    "largest": np.where(X > 0, 1.7e308, -1.7e308),
    "float32, squares underflow": (X * 1e-30).astype(np.float32),
    "float32, squares overflow": (X * 1e30).astype(np.float32),
    "long double out of range": X * np.longdouble("1e4000"),
}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("y", [Y, Y * 1e-310, np.sign(Y) * 1.7e308, Y > 0])
def test_the_error_state_of_numpy_changes_nothing(kind, y):
    expected = answers(TABLES[kind], y)
    with np.errstate(all="raise"):
        assert answers(TABLES[kind], y) == expected


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_subnormal_numbers_are_right_or_refused_where_they_are_flushed_to_zero(dtype):
    tiny = float(np.finfo(dtype).tiny)
    small = (X * tiny / 8).astype(dtype)  # y is compared in NumPy, X in the kernels
    refusal = f"holds numbers below {tiny:.3g}, which this thread takes for zero: rescale the data"
    ordinary, y = X.astype(dtype), Y.astype(dtype)
    tables = {"X": (small, y), "y": (ordinary, small[:, 0]), "both": (small, small[:, 0])}
    expected = answers(ordinary, y)
    torch.set_flush_denormal(True)
    try:
        assert answers(ordinary, y) == expected
        for given, (table, response) in tables.items():
            for name, answer in answers(table, response).items():
                assert refusal in answer or (given == "y" and name in ("graph", "neighbors")), name
    finally:
        torch.set_flush_denormal(False)
    assert refusal not in "".join(answers(small, y).values())


# ------------------------------------------------------------------------------------------------
# How many threads


@pytest.fixture
def no_settings(monkeypatch):
    """Nothing that says how many threads to take; 6 CPUs."""
    for variable in ("LCODEC_NUM_THREADS", "OMP_NUM_THREADS", "LOKY_MAX_CPU_COUNT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(_threads, "_threads", None)
    monkeypatch.setattr(_threads, "_limit", None)
    monkeypatch.setattr(_threads, "_quota", lambda *_: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    return monkeypatch


def test_the_order_of_what_sets_the_threads(no_settings):
    assert lcodec_ext.get_num_threads() == 6
    no_settings.setenv("LOKY_MAX_CPU_COUNT", "5")
    assert lcodec_ext.get_num_threads() == 5
    no_settings.setattr(_threads, "_quota", lambda *_: 4)
    assert lcodec_ext.get_num_threads() == 4
    no_settings.setenv("OMP_NUM_THREADS", "3")
    assert lcodec_ext.get_num_threads() == 3
    no_settings.setenv("LCODEC_NUM_THREADS", "2")
    assert lcodec_ext.get_num_threads() == 2
    lcodec_ext.set_num_threads(7)
    assert lcodec_ext.get_num_threads() == 7
    with threadpoolctl.threadpool_limits(1):
        assert lcodec_ext.get_num_threads() == 1
    assert lcodec_ext.get_num_threads() == 7


@pytest.mark.parametrize(
    ("text", "threads"),
    [("3,2", 3), (" 4 ", 4), ("", 6), ("0", 6), ("-1", 6), ("all", 6), ("9999", 1024)],
)
def test_what_openmp_reads(no_settings, text, threads):
    no_settings.setenv("OMP_NUM_THREADS", text)
    assert lcodec_ext.get_num_threads() == threads


def test_threadpoolctl_limits_the_kernels_while_it_lasts(no_settings):
    with threadpoolctl.threadpool_limits(4):
        assert lcodec_ext.get_num_threads() == 4
        with threadpoolctl.threadpool_limits(2, user_api="openmp"):
            assert lcodec_ext.get_num_threads() == 2
            with threadpoolctl.threadpool_limits(1, user_api="blas"):
                assert lcodec_ext.get_num_threads() == 2
        assert lcodec_ext.get_num_threads() == 4
        lcodec_ext.set_num_threads(5)  # the last word
        assert lcodec_ext.get_num_threads() == 5
    assert lcodec_ext.get_num_threads() == 5
    ours = [
        info for info in threadpoolctl.threadpool_info() if info["internal_api"] == "lcodec_ext"
    ]
    assert [info["num_threads"] for info in ours] == [5]


def test_threadpoolctl_limits_the_first_call_of_a_process():
    output = python(
        """
        import lcodec_ext
        from threadpoolctl import threadpool_limits

        lcodec_ext.set_num_threads(3)
        with threadpool_limits(limits=1):
            print(lcodec_ext.get_num_threads())
        print(lcodec_ext.get_num_threads())
        """
    )
    assert output.split() == ["1", "3"]


@pytest.mark.parametrize("module", ["None", "types.ModuleType('threadpoolctl')"])
def test_threadpoolctl_may_be_missing_or_old(module):
    output = python(
        f"""
        import sys, types
        sys.modules["threadpoolctl"] = {module}
        import lcodec_ext

        lcodec_ext.set_num_threads(3)
        print(lcodec_ext.get_num_threads())
        """
    )
    assert output == "3"


def test_workers_of_joblib_share_the_cpus(no_settings, tmp_path):
    variables = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    output = python(
        """
        import joblib, lcodec_ext

        calls = (joblib.delayed(lcodec_ext.get_num_threads)() for _ in range(2))
        with joblib.parallel_config("loky", inner_max_num_threads=1):
            print(joblib.Parallel(2)(calls))
        """,
        env=variables,
    )
    assert output == "[1, 1]"


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "10000 100000\n"}, 1),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "200000 100000"}, 2),
        ("0::/not/seen/here\n", {"cpu.max": "400000 100000"}, 4),
        (
            "5:memory:/m\n4:cpu,cpuacct:/c\n0::/\n",
            {"cpu/c/cpu.cfs_quota_us": "250000", "cpu/c/cpu.cfs_period_us": "100000"},
            3,
        ),
        (
            "1:cpu:/\n",
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
            None,
        ),
        ("0::/\n", {"cpu.max": "what"}, None),
        ("what\n\n0::/\n", {"cpu.max": "200000 100000"}, 2),
        ("", {}, None),
    ],
)
def test_the_quota_of_a_container(tmp_path, groups, files, quota):
    (tmp_path / "proc").write_text(groups)
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    assert _threads._quota(tmp_path / "proc", tmp_path / "fs") == quota
    assert _threads._quota(tmp_path / "missing", tmp_path / "fs") is None
