"""The format of a result file. Reading one needs the standard library only.

schema, created, commit, dirty
machine, versions, settings, load_before
    machine has a `device` if a GPU was used
rates: of the GPU, from which floors are computed (accelerator.Rates)
checks: by stage of gpu.py, if that made the file
    status: "passed", "failed", "timed out", "not found" or "not run"
    why: in words
    seconds, limit
    build: installed; kernels: name, architecture, registers, stack, spills and shared memory
    tests: passed, failed, errors, skipped, not_passed: some names
    each sanitizer: findings, calls that were made, places, trouble: its own
left_out: cases that need a module that is not installed, and why
broken: errors by case, if there were any
cases: by name
    sweep: the size that varies from point to point, or null
    points: a list
        title, size
        results: by implementation, this package first
            samples: seconds of each run
            seconds: their median, times `factor` if there is one
            ratio: seconds over this package's seconds
            factor, measured_columns: present if only some columns were measured
            answers: "identical", "asserted", "compared" or "other"; see cases.Peer
            agrees, off_by, answer: how the answer compares with this package's
        left_out: reasons by implementation
        metrics: further numbers by name
        claims: quantity, at_least or at_most, value, met
inference: in the file of inference.py, whose `cases` are empty; by part, each with its commit
    cost: permutations; floor_ns_an_element: what drawing and adding one was expected to take
        points: kind of data, n; samples and seconds of codec_test, the bare loop and one codec;
            ns_an_element; over_bare_loop; codec_calls_over_test; claims
deletion: in the file of deletion.py, whose `cases` are empty
    size, training_accuracy
    requests: sample, units, steps of the search, parameters, matrix_gb: of one dense matrix
        lcodec_ext, published: seconds by phase, "rest" and "total"
        ratio: of the totals
    mean: of the requests' seconds, by name and phase; ratio and selection_share: of these
    measured: what the published procedure's seconds were scaled from
    from_retained: the first request with the retained samples instead of statistics, or why it
        was refused
    claims
"""

import json
from pathlib import Path
from typing import Any

SCHEMA = 1
OURS = "lcodec_ext"


def load(path: Path) -> dict[str, Any]:
    result = json.loads(path.read_text())
    if result.get("schema") != SCHEMA:
        raise SystemExit(f"{path} has schema {result.get('schema')}, not {SCHEMA}")
    return result
