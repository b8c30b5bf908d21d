"""The Python blocks of docs/distributed.md run: the script on top, and what stands in its place."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd

from lcodec_ext import foci

PAGE = (Path(__file__).parent.parent / "docs" / "distributed.md").read_text(encoding="utf-8")
SCRIPT, *BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
FRAGMENTS = [block for block in BLOCKS if "group=group" in block]
WHOLE = [block for block in BLOCKS if "group=group" not in block]
YOURS = """
from torch import nn

torch.manual_seed(0)
loss_fn = nn.functional.cross_entropy
samples = [(torch.randn(4), k % 2) for k in range(60)]
forget, retained, validation, test = samples[:3], samples[3:40], samples[40:], samples[40:]

def train(seed):
    torch.manual_seed(seed)
    return nn.Linear(4, 2)

model = train(0)
"""


def test_the_script_and_its_fragments_run(rng, tmp_path):
    X = rng.normal(size=(60, 7))
    y = X[:, 5]
    np.save(tmp_path / "expression.npy", X)
    np.save(tmp_path / "y.npy", y)
    end = "dist.destroy_process_group()"
    begin, found, _ = SCRIPT.partition(end)
    assert found
    assert len(FRAGMENTS) == 4
    (tmp_path / "selection.py").write_text("".join([begin, YOURS, *FRAGMENTS, end]))
    run = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*run, "--nproc-per-node", "2", "selection.py"],
        env={"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", **os.environ},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{foci(X, y)}\n"
    assert (tmp_path / "selection.json").exists()


def test_blocks_for_one_process_run_by_themselves(rng, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    X = pd.DataFrame(rng.normal(size=(60, 4))).add_prefix("x")
    np.save("y.npy", X["x2"])
    np.save("X.npy", X.to_numpy().T)
    X.to_parquet("X.parquet")
    X.iloc[:, :2].to_parquet("chromosome1.parquet")
    X.iloc[:, 2:].to_parquet("chromosome2.parquet")
    assert len(WHOLE) == 1
    for block in WHOLE:
        exec(compile(textwrap.dedent(block), "distributed.md", "exec"), {})
