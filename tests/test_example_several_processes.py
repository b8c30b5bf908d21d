"""The example over several processes prints what it prints in one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import several_processes

SCRIPT = Path(__file__).parent.parent / "examples" / "several_processes.py"
PARTS = list(several_processes.PARTS)


def without_times(text):
    """What is equal: of the evaluation's table the numbers behind the seconds."""
    lines = [line for line in text.splitlines() if " took " not in line]
    start = next(k for k, line in enumerate(lines) if line.startswith("Evaluation: "))
    name = len("fine-tune SGD") + 2
    return lines[:start] + [line[:name] + line[name + 9 :] for line in lines[start:]]


def in_processes(*arguments, number=2):
    """What torchrun prints of the example; its time is that of importing torch twice."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*run, "--nproc-per-node", str(number), str(SCRIPT), *arguments],
        env={"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", **os.environ},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_two_processes_print_what_one_prints(monkeypatch, capsys):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *PARTS])
    several_processes.main()
    alone = capsys.readouterr().out
    done = in_processes(*PARTS)
    assert done.returncode == 0, done.stderr
    assert without_times(done.stdout) == without_times(alone)
    assert "24 of 132 dependences between 12 columns" in alone  # three columns in each of four sums
    for name in PARTS:
        assert f"{name} took " in alone
        assert f"{name} took " in done.stdout
    assert alone.count("with processes=1") == done.stdout.count("with processes=2") == len(PARTS)


def test_it_says_which_parts_there_are(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [str(SCRIPT), "another"])
    with pytest.raises(SystemExit):
        several_processes.main()
    assert "choose from" in capsys.readouterr().err
