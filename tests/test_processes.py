"""Threads, forks, the end of the interpreter, and what other libraries set for a thread."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest

import lcodec_ext

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


def test_threads_of_the_kernels_end_with_the_call(monkeypatch):
    monkeypatch.setattr("lcodec_ext._threads._threads", 4)
    before = _native_threads()
    lcodec_ext.foci(X, Y)
    assert _native_threads() <= before


def _native_threads():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Threads"))


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
        import signal, threading, time
        import numpy as np
        from lcodec_ext import foci, set_num_threads

        set_num_threads(2)
        X = np.random.default_rng(0).normal(size=(100_000, 60))
        threading.Timer(1.0, signal.raise_signal, [signal.SIGINT]).start()
        start = time.perf_counter()
        try:
            while True:
                foci(X, X[:, 0], stop=False)
        except KeyboardInterrupt:
            print("interrupted")
        """
    )
    assert output == "interrupted"
