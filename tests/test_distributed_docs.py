"""The Python blocks of docs/distributed.md run, and its tables are those of the record."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd

from lcodec_ext import foci

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
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


def test_the_tables_are_those_of_the_record():
    record = json.loads((ROOT / "benchmarks/results/distributed.json").read_text())
    assert record["dirty"] is False
    assert all(claim["met"] for claim in record["claims"])
    for each in record["points"]:
        columns = f"{each['p']:,}" if each["p"] >= 10_000 else str(each["p"])
        one, two = (f"{each['seconds'][name]:#.2g} s" for name in ("one", "two"))
        assert f"| {each['n']} | {columns} | {one} | {two} | {each['ratio']:.1f} |" in PAGE
    for each in record["model"]:
        a, e = each["milliseconds_of_a_step"], each["milliseconds_of_the_exchange"]
        b, columns = each["microseconds_of_a_column"], round(each["columns_that_take_as_long"], -1)
        assert f"| {each['n']} | {a:.1f} ms | {b:.2g} µs | {columns} | {e:.1f} ms |" in PAGE
    large = record["model"][0]
    ranks = large["microseconds_of_a_column"] * 20 / large["milliseconds_of_a_step"]
    assert f"at about {5 * round(ranks / 5)} ranks" in PAGE
