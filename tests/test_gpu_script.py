"""What benchmarks/gpu.py does around the GPU: plan, time limits, parsing, the result file."""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import lcodec_ext
from cuda_on_cpu import DeviceOnCpu, cuda_on_cpu
from lcodec_ext import _emulated
from lcodec_ext.curvature import kernels

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import accelerator  # noqa: E402
import environment  # noqa: E402
import gpu  # noqa: E402
import gpu_cases  # noqa: E402
import results  # noqa: E402

ALL = ["build", "first", "memcheck", "tests", *gpu.SANITIZERS[1:], "timings"]

# As nvcc 13.0 and pip print it. The probe is compiled for two architectures.
PTXAS = """\
  ptxas info    : 39 bytes gmem
  ptxas info    : Compiling entry function '_ZN6lcodec4cuda18multiply_add_probeIfEEvPKT_S4_S4_PS2_l' for 'sm_90'
  ptxas info    : Function properties for _ZN6lcodec4cuda18multiply_add_probeIfEEvPKT_S4_S4_PS2_l
      0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
  ptxas info    : Used 14 registers, used 0 barriers
  ptxas info    : Compile time = 1.535 ms
  ptxas info    : Compiling entry function '_ZN6lcodec4cuda18multiply_add_probeIfEEvPKT_S4_S4_PS2_l' for 'sm_75'
  ptxas info    : Function properties for _ZN6lcodec4cuda18multiply_add_probeIfEEvPKT_S4_S4_PS2_l
      0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
  ptxas info    : Used 16 registers, used 0 barriers, 392 bytes cmem[0]
  ptxas info    : Compiling entry function '_ZN3cub6detail4scan16DeviceScanKernelIlEEvT_i' for 'sm_90'
  ptxas info    : Function properties for _ZN3cub6detail4scan16DeviceScanKernelIlEEvT_i
      8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
  ptxas info    : Used 56 registers, used 1 barriers, 8 bytes cumulative stack size, 21520 bytes smem
"""  # noqa: E501
SCAN = """\
ptxas info    : Compiling entry function '_ZN6lcodec4cuda36_GLOBAL__N__89b8bf71_4_t_cu_0e220a0d9scan_stepIfLi3EEEvPKT_PS3_' for 'sm_90'
ptxas info    : Function properties for _ZN6lcodec4cuda36_GLOBAL__N__89b8bf71_4_t_cu_0e220a0d9scan_stepIfLi3EEEvPKT_PS3_
    16 bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Function properties for _ZN6lcodec4cuda6helperEi
    24 bytes stack frame, 24 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 16 bytes cumulative stack size
"""  # noqa: E501

CLEAN = f"""\
========= COMPUTE-SANITIZER
foci, continuous, ties='average': same
codec: same
14 {gpu.DONE}
========= ERROR SUMMARY: 0 errors
"""
OUT_OF_BOUNDS = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at void lcodec::cuda::scan_step<float, (int)3>(const T1 *, T1 *)+0x70 in t.cu:6
=========     by thread (31,0,0) in block (0,0,0)
=========     Address 0x7f2ab6000400 is out of bounds
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: cudaLaunchKernel [0x1234] in _core.so
=========
========= Target application returned an error
========= ERROR SUMMARY: 2 errors
"""
RACE = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at lcodec::cuda::merge(int *)+0x90 in a.cu:62
=========     and Read access at lcodec::cuda::merge(int *)+0x100 in a.cu:64 [16 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


def finished(text, status=0):
    return gpu.Finished(status, text)


# Reading what the tools print


def test_registers_and_spills_are_read():
    kernels = gpu.parse_ptxas(PTXAS + SCAN.format(stores=8, loads=12))
    assert [(k["name"], k["architecture"], k["registers"]) for k in kernels] == [
        ("cub::detail::scan::DeviceScanKernel", "sm_90", 56),
        ("lcodec::cuda::multiply_add_probe<float>", "sm_75", 16),
        ("lcodec::cuda::multiply_add_probe<float>", "sm_90", 14),
        ("lcodec::cuda::scan_step<float, 3>", "sm_90", 40),
    ]
    cub, scan = kernels[0], kernels[3]
    assert (cub["spill_store_bytes"], cub["spill_load_bytes"], cub["shared_bytes"]) == (4, 4, 21520)
    # its own, not those of the function that it calls
    assert [scan[f"{k}_bytes"] for k in ("stack", "spill_store", "spill_load")] == [16, 8, 12]
    assert gpu.parse_ptxas("no kernel at all") == []


@pytest.mark.parametrize(
    ("text", "status", "verdict", "why"),
    [
        (PTXAS + SCAN.format(stores=0, loads=0), 0, "passed", "4 kernels; scans use up to 40 regi"),
        (PTXAS + SCAN.format(stores=8, loads=12), 0, "failed", "scan_step<float, 3> spills 20 byt"),
        (PTXAS, 0, "failed", "no kernel of this package's scans"),  # CUB's do not count
        (PTXAS + SCAN.format(stores=0, loads=0), 1, "failed", ""),
    ],
)
def test_scans_must_not_spill(text, status, verdict, why):
    got = gpu.judge_build(finished(text, status))
    assert got.status == verdict
    assert why in got.why
    assert got.found["installed"] == (status == 0)  # a spill does not keep the rest from running
    assert len(got.found["kernels"]) >= 3


def test_names_without_a_demangler(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    scan = gpu.parse_ptxas(SCAN.format(stores=4, loads=0))[0]
    assert scan["name"].startswith("_ZN6lcodec4cuda36")
    assert gpu.is_scan(scan["name"])
    assert not gpu.is_scan("_ZN3cub6detail4scan16DeviceScanKernelIlEEvT_i")
    assert not gpu.is_scan("lcodec::cuda::merge<lcodec::cuda::scan_tag>")


@pytest.mark.parametrize(
    ("text", "status", "verdict", "findings", "places"),
    [
        (CLEAN, 0, "passed", 0, []),
        (OUT_OF_BOUNDS, 9, "failed", 2, ["lcodec::cuda::scan_step<float, (int)3>"]),
        (RACE, 9, "failed", 1, ["lcodec::cuda::merge"]),
        (CLEAN.replace(gpu.DONE, ""), 0, "failed", 0, []),  # no finding, but not all was run
        ("", 0, "failed", None, []),
        ("========= COMPUTE-SANITIZER\n========= Error: Device not supported\n", 1,
         "not available", None, []),
    ],
)  # fmt: skip
def test_sanitizer_summaries_are_read(text, status, verdict, findings, places):
    got = gpu.judge_sanitizer(finished(text, status))
    assert (got.status, got.found["findings"], got.found["places"]) == (verdict, findings, places)
    assert got.why or verdict == "passed"


def test_what_a_sanitizer_says_of_itself_is_told():
    text = "========= COMPUTE-SANITIZER\n========= Error: Device not supported\n"
    assert "Device not supported" in gpu.judge_sanitizer(finished(text, 1)).why
    assert gpu.parse_sanitizer(CLEAN)["calls"] == 2


JUNIT = """<?xml version="1.0" encoding="utf-8"?><testsuites name="pytest tests"><testsuite
 name="pytest" errors="1" failures="1" skipped="1" tests="4" time="0.1">
<testcase classname="tests.test_a" name="test_1" time="0.1"/>
<testcase classname="tests.test_a" name="test_2"><failure message="assert">no</failure></testcase>
<testcase classname="tests.test_a" name="test_3"><skipped message="x"/></testcase>
<testcase classname="tests.test_a" name="test_4"><error message="x"/></testcase>
</testsuite></testsuites>"""


def test_tests_are_counted(tmp_path):
    report = tmp_path / "tests.xml"
    report.write_text(JUNIT)
    verdict = gpu.judge_tests(finished(""), [report])
    assert verdict.status == "failed"
    assert [verdict.found[k] for k in ("passed", "failed", "errors", "skipped")] == [1, 1, 1, 1]
    assert verdict.found["not_passed"][0] == "tests.test_a::test_2: failed"
    gone = gpu.judge_tests(finished(""), [report])  # not the old one
    assert gone.why == "pytest wrote no report: tests"
    for testcases, status in (("", "failed"), ('<testcase classname="a" name="b"/>', "passed")):
        report.write_text(f"<testsuites><testsuite>{testcases}</testsuite></testsuites>")
        assert gpu.judge_tests(finished(""), [report]).status == status
    report.write_text("<testsui")
    assert gpu.judge_tests(finished(""), [report]).status == "failed"
    other = tmp_path / "others.xml"
    for each in (report, other):
        each.write_text('<testsuites><testsuite><testcase name="b"/></testsuite></testsuites>')
    assert gpu.judge_tests(finished(""), [report, other]).why == "2 tests"


@pytest.fixture(autouse=True)
def _handler():
    """The script takes Ctrl-C also where the shell that started it has it ignored."""
    outside = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, outside)


BROKEN = "import os\nimport pytest\npytestmark = pytest.mark.cuda\n"


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Runs files of tests as the stage does; gives the exit status, the verdict and the output."""
    monkeypatch.setattr(gpu, "WORK", tmp_path)
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nmarkers = cuda: needs a GPU\nfilterwarnings = error\n"
    )

    def run(**texts):
        found = []
        for name, text in texts.items():
            found.append(tmp_path / f"test_{name}.py")
            found[-1].write_text(BROKEN + text)
        monkeypatch.setattr(gpu, "cuda_test_files", lambda: found)
        status = gpu.run_test_files(found)
        return status, gpu.judge_tests(finished(""))

    return run


def test_a_broken_process_ends_one_file_of_tests(files):
    status, verdict = files(
        dies="def test_a(): os._exit(9)\n",
        works="import warnings\ndef test_b(): warnings.warn('of another version')\n",
        fails="def test_c(): assert False\n",
        missing="import no_such_module\n",
    )
    assert status == 9
    assert verdict.status == "failed"
    assert verdict.found["passed"] == 1
    assert (verdict.found["failed"], verdict.found["errors"]) == (1, 1)
    assert verdict.found["without_report"] == ["tests-test_dies"]


def test_no_file_is_begun_after_many_failures(files, monkeypatch, capfd):
    monkeypatch.setattr(gpu, "MOST_FAILURES", 3)
    monkeypatch.setattr(gpu, "SIDE_BY_SIDE", 1)
    many = "@pytest.mark.parametrize('k', range(9))\ndef test_a(k): assert False\n"
    status, verdict = files(many=many, other="def test_b(): pass\n")
    assert (status, verdict.found["failed"]) == (1, 3)
    assert verdict.found["without_report"] == ["tests-test_other"]
    assert "not begun after 3 failures" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("text", "status", "why"),
    [
        (f"status: CUDA 13.0\nfoci: same\n1 {gpu.FIRST}\n", "passed", "1 calls"),
        ("status: CUDA 13.0\nfoci: same\nRuntimeError", "failed", "that was right: foci"),
        ("status: CUDA is not used", "failed", "no call was right"),
    ],
)
def test_first_calls_are_read(text, status, why):
    verdict = gpu.judge_first(finished(text))
    assert verdict.status == status
    assert why in verdict.why
    assert verdict.found["cuda"].startswith("CUDA")


def test_timings_are_taken_over(tmp_path):
    path = tmp_path / "timings.json"
    entry = {"answers": "identical", "agrees": False, "answer": "other bits"}
    claim = {"quantity": "milliseconds", "at_most": 20, "value": 31.5, "met": False}
    point = {"title": "FOCI", "results": {"the CPU": entry}, "claims": [claim]}
    content = {"schema": results.SCHEMA, "cases": {"case": {"points": [point]}}}
    path.write_text(json.dumps(content))
    verdict = gpu.judge_timings(finished(""), path)
    assert (verdict.status, verdict.found) == ("failed", {"timed": content})
    assert verdict.why == "FOCI: the CPU: other bits; milliseconds 31.5: MISSED"
    assert gpu.judge_timings(finished(""), path).why == "no case was finished"
    path.write_text(json.dumps({"schema": results.SCHEMA, "cases": {}, "broken": {"a": "b"}}))
    assert gpu.judge_timings(finished(""), path).why == "a: b"
    entry["agrees"] = True
    path.write_text(json.dumps(content))
    assert gpu.judge_timings(finished(""), path).status == "passed"  # a missed claim is allowed


def test_nvidia_smi_is_read(monkeypatch):
    def run(command, **options):
        assert command == [
            "nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader,nounits", "--id=3"
        ]  # fmt: skip
        return subprocess.CompletedProcess(command, 0, "NVIDIA H200, 9.0\nNVIDIA T4, 7.5\n", "")

    monkeypatch.setattr(subprocess, "run", run)
    found = environment.nvidia("name", "compute_cap", which="3")
    assert found == [["NVIDIA H200", "9.0"], ["NVIDIA T4", "7.5"]]
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "")
    assert environment.nvidia("name") == []


# The plan


def test_a_dry_run_needs_no_gpu():
    command = [sys.executable, ROOT / "benchmarks/gpu.py", "--dry-run", "--budget", "99"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    starts = [line.split(":")[0] for line in done.stdout.splitlines()]
    assert [start for start in starts if start in ALL] == ALL
    assert "99 s in all" in done.stdout
    assert "tests/test_cuda_device.py" in done.stdout
    assert "LCODEC_CUDA=ON" in done.stdout
    assert str(ROOT) not in done.stdout.partition("build:")[2]
    done = subprocess.run(
        [*command, "--stages", "racecheck"], check=True, capture_output=True, text=True
    )
    assert "memcheck" not in done.stdout
    done = subprocess.run([*command, "--stages", "prayer"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no stage prayer; there are build," in done.stderr


def on_emulator(function):
    """With kernels that are emulated where tensors are given."""

    def call(*data, **options):
        if isinstance(data[0], torch.Tensor):
            options["backend"] = cuda_on_cpu(_emulated.cuda)
        return function(*data, **options)

    return call


def test_the_first_calls_are_rehearsed(monkeypatch, capsys):
    """What the first minute on a GPU runs, by emulated kernels."""
    monkeypatch.setattr(
        accelerator, "place", lambda data, device: {k: torch.as_tensor(v) for k, v in data.items()}
    )
    monkeypatch.setattr(kernels, "device_of", lambda tensor: DeviceOnCpu(_emulated.cuda))
    monkeypatch.setattr(lcodec_ext, "foci", on_emulator(lcodec_ext.foci))
    assert gpu_cases.check_first_calls("emulated") == 8
    assert gpu.judge_first(finished(capsys.readouterr().out + f"8 {gpu.FIRST}")).why == "8 calls"


def test_no_gpu_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(environment, "nvidia", lambda *fields, **which: [])
    assert gpu.main([]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_the_plan_is_for_the_devices_that_are_there():
    devices = [["A", "580", "9.0"], ["B", "580", "8.6"], ["A", "580", "9.0"]]
    build, first, memcheck, tests, *checks, nccl, timings = gpu.plan(devices, quick=True)
    assert "cmake.define.CMAKE_CUDA_ARCHITECTURES=86-real;90-real" in build.command
    assert "--quick" in timings.command
    assert str(gpu.SITE) in tests.variables["PYTHONPATH"]
    assert "" not in tests.variables["PYTHONPATH"].split(":")  # which would be this folder
    assert first.needed
    checks = [memcheck, *checks]
    assert [stage.name for stage in checks] == list(gpu.SANITIZERS)
    assert all(("--kernel-regex" in s.command) == (s.name != "initcheck") for s in checks)
    assert nccl.variables["LCODEC_TEST_BACKEND"] == "nccl"
    files = {file.name for file in nccl.command if isinstance(file, Path)}
    assert {"test_group.py", "test_group_inference.py", "test_foci_group.py"} <= files
    assert "test_cuda_device.py" not in files
    assert "nccl" not in [stage.name for stage in gpu.plan(devices[:1], quick=False)]
    assert sum(stage.least for stage in gpu.plan(devices, quick=False)) < 240
    assert {"-m", "cuda"} < set(gpu.test_command(Path("test_a.py"), 7))


def test_a_package_that_is_built_is_taken(tmp_path, capsys):
    stages = gpu.plan([["A", "580", "9.0"]], quick=False, site=tmp_path)
    assert [stage.name for stage in stages] == [name for name in ALL if name != "build"]
    assert all(stage.variables["PYTHONPATH"].startswith(f"{tmp_path}") for stage in stages)
    with pytest.raises(SystemExit):
        gpu.main(["--dry-run", "--site", str(tmp_path)])
    assert "has no built package" in capsys.readouterr().err
    (tmp_path / "lcodec_ext").mkdir()
    (tmp_path / "lcodec_ext" / "_core.so").touch()
    assert gpu.main(["--dry-run", "--site", str(tmp_path)]) == 0
    assert "build:" not in capsys.readouterr().out


def test_one_gpu_is_too_few_for_nccl(monkeypatch, capsys):
    monkeypatch.setattr(environment, "nvidia", lambda *fields, **which: [["A", "580", "9.0"]])
    assert gpu.main(["--dry-run"]) == 0
    assert "one GPU: the tests of process groups by NCCL" in capsys.readouterr().out


# Running stages


def judge(text):
    return gpu.Verdict("passed", "", {"printed": text.text.strip()})


def stage(name, code, limit=20.0, least=1.0, judge=judge, **options):
    return gpu.Stage(name, [sys.executable, "-c", code], limit, least, judge, **options)


@pytest.fixture
def go(tmp_path, monkeypatch):
    """Run stages in a folder of their own; gives the exit status and the result."""
    monkeypatch.setattr(gpu, "WORK", tmp_path / "work")

    def run(*stages, budget=60.0, commit=None):
        output = tmp_path / "results" / "gpu.json"
        options = argparse.Namespace(budget=budget, output=output, commit=commit, quick=False)
        status = gpu.run_all(list(stages), options)
        return status, results.load(output)

    return run


def test_stages_run_in_order_and_are_recorded(go):
    status, result = go(
        stage("one", "print('eins')"),
        stage("two", "import os; print(os.environ['ZWEI'])", variables={"ZWEI": "zwei"}),
    )
    assert status == 0
    assert [check["printed"] for check in result["checks"].values()] == ["eins", "zwei"]
    assert {check["status"] for check in result["checks"].values()} == {"passed"}
    assert result["cases"] == {}


def test_a_failure_is_recorded_and_the_rest_goes_on(go, capsys):
    status, result = go(stage("one", "print('oh'); raise SystemExit(3)"), stage("two", ""))
    assert status == 1
    assert result["checks"]["one"]["status"] == "failed"
    assert result["checks"]["one"]["why"] == "exit status 3"
    assert result["checks"]["two"]["status"] == "passed"
    assert "oh" in capsys.readouterr().err


def test_a_stage_is_stopped_with_all_that_it_started(go, tmp_path):
    mark = tmp_path / "mark"
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(7)"
    child = f"{deaf}; open({str(mark)!r}, 'w')"
    code = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print('started', flush=True)\n"
        "try: time.sleep(60)\n"
        "except KeyboardInterrupt: print('asked')\n"
    )
    started = time.monotonic()
    status, result = go(stage("long", code, limit=4), stage("next", "print('here')"))
    assert time.monotonic() - started < 20
    long = result["checks"]["long"]
    assert (status, long["status"]) == (1, "timed out")
    assert long["why"] == "stopped after 4 s"
    assert long["printed"].split() == ["started", "asked"]  # what it had is kept
    assert result["checks"]["next"]["status"] == "passed"
    time.sleep(max(0, 8 - (time.monotonic() - started)))
    assert not mark.exists()


def test_a_process_that_does_not_listen_is_killed(go, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    started = time.monotonic()
    _, result = go(stage("deaf", code, limit=2))
    assert result["checks"]["deaf"]["status"] == "timed out"
    assert time.monotonic() - started < 20


def test_later_stages_keep_their_time():
    first, second = stage("one", "", limit=100, least=10), stage("two", "", limit=50, least=30)
    assert gpu.limit_of(first, [second], left=200) == 100
    assert gpu.limit_of(first, [second], left=90) == 60
    assert gpu.limit_of(second, [], left=90) == 50
    assert gpu.limit_of(first, [second], left=-5) == 0


def test_without_time_or_package_or_tool_nothing_is_run(go):
    failed_build = gpu.Verdict("failed", "", {"installed": False})
    status, result = go(
        stage("build", "", judge=lambda finished: failed_build),
        stage("tests", "print('ran')"),
        stage("memcheck", "print('ran')", missing="compute-sanitizer"),
    )
    checks = result["checks"]
    assert status == 1
    assert [check["status"] for check in checks.values()] == ["failed", "not run", "not found"]
    assert checks["tests"]["why"] == "the package is missing, because the build failed"
    assert checks["memcheck"]["why"] == "compute-sanitizer is not on this machine"
    assert not any("printed" in check for check in checks.values())
    status, result = go(stage("one", "print('ran')", least=5), budget=3)
    assert (status, result["checks"]["one"]["status"]) == (1, "not run")
    assert "it needs 5 s" in result["checks"]["one"]["why"]


def test_nothing_runs_after_first_calls_that_failed(go):
    status, result = go(
        stage("first", "raise SystemExit(1)", needed=True), stage("timings", "print('ran')")
    )
    assert status == 1
    assert result["checks"]["timings"]["status"] == "not run"
    assert "'first' did not pass" in result["checks"]["timings"]["why"]


def test_a_checker_that_does_not_support_the_device_is_no_failure(go):
    none = gpu.Verdict("not available", "Device not supported")
    status, result = go(stage("memcheck", "raise SystemExit(1)", judge=lambda finished: none))
    assert (status, result["checks"]["memcheck"]["status"]) == (0, "not available")


def test_what_ran_is_kept_when_the_script_is_stopped(go, tmp_path):
    def interrupt(finished):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(stage("one", "print('eins')"), stage("two", "", judge=interrupt))
    result = results.load(tmp_path / "results" / "gpu.json")
    assert list(result["checks"]) == ["one"]


def test_a_result_has_machine_and_cases_of_the_timings(go):
    timed = {"machine": {"cpu": "abacus"}, "cases": {"x": {}}, "rates": {"copy": 1}, "load": 9}
    verdict = gpu.Verdict("passed", "", {"timed": timed})
    _, result = go(stage("timings", "", judge=lambda finished: verdict), commit="abc123")
    assert result["machine"] == {"cpu": "abacus"}
    assert result["cases"] == {"x": {}}
    assert result["rates"] == {"copy": 1}
    assert "timed" not in result["checks"]["timings"]
    assert (result["commit"], result["dirty"]) == ("abc123", None)
    assert "load" not in result


# The device


def test_data_go_to_a_device_and_back():
    import numpy as np
    import torch

    data = {"X": np.eye(3), "steps": 2, "continuous": {"y": np.arange(3)}}
    assert accelerator.place(data, "cpu") is data
    placed = accelerator.place(data, "meta")
    assert isinstance(placed["continuous"]["y"], torch.Tensor)
    assert placed["X"].device.type == "meta"
    assert placed["steps"] == 2
    np.testing.assert_array_equal(accelerator.fetch(torch.arange(3)), data["continuous"]["y"])
    assert accelerator.fetch(data["X"]) is data["X"]
