"""The benchmarks run, their peers are right, and what is recorded is what is shown."""

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lcodec_ext
from lcodec_ext import _threads
from lcodec_ext._torch.samples import as_samples
from lcodec_ext.unlearning.record import perturbed, record
from lcodec_ext.unlearning.select import find_candidates
from lcodec_ext.unlearning.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import accelerator  # noqa: E402
import calibration  # noqa: E402
import cases  # noqa: E402
import compare  # noqa: E402
import deletion  # noqa: E402
import ekfac  # noqa: E402
import ekfac_against_cg  # noqa: E402
import flops  # noqa: E402
import gpu_cases  # noqa: E402
import inference  # noqa: E402
import inference_levels  # noqa: E402
import influence  # noqa: E402
import masks  # noqa: E402
import minilm  # noqa: E402
import networks  # noqa: E402
import ordinary  # noqa: E402
import ordinary_models  # noqa: E402
import over_ranks  # noqa: E402
import peers  # noqa: E402
import plots  # noqa: E402
import population  # noqa: E402
import results  # noqa: E402
import run  # noqa: E402
import stream  # noqa: E402
import table  # noqa: E402
import unlearning  # noqa: E402
import unlearning_baselines  # noqa: E402
import unlearning_models  # noqa: E402
import users  # noqa: E402
import versions  # noqa: E402
import wheels  # noqa: E402
from cases import CASES  # noqa: E402

# torch's own, when forward mode is first used
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

RECORDED = [ROOT / f"benchmarks/results/{name}.json" for name in ("cpu", "curvature")]
DELETION = ROOT / "benchmarks/results/deletion.json"
OPTIONS = argparse.Namespace(quick=True, threads=2, repeats=1, budget=20, device="cpu")


def points(result, name):
    return result["cases"][name]["points"]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A result file of two quick cases, made as a user makes it."""
    path = tmp_path_factory.mktemp("result") / "new" / "result.json"
    command = [sys.executable, ROOT / "benchmarks/run.py", "--quick", "--threads", "1"]
    command += ["--cases", "codec,xi", "--repeats", "2", "--output", path]
    subprocess.run(command, check=True, capture_output=True)
    return path


# Peers


def table_of(kind, rng, n=70):
    X = rng.normal(size=(n, 6))
    if kind != "continuous":
        X[:, ::2] = np.floor(2 * X[:, ::2])
    if kind == "discrete":
        X[:, 1::2] = X[:, 1::2] > 0
    y = X[:, 0] + np.round(X[:, 3]) + (rng.random(n) if kind == "continuous" else 0)
    return X, y


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("kind", ["continuous", "mixed", "discrete"])
def test_kdtree_with_averaged_ties_is_exact(kind, scale, rng):
    X, y = table_of(kind, rng)
    standardize = "scale" if scale else None
    expected = lcodec_ext.foci(X, y, stop=False, max_features=4, standardize=standardize)
    got = peers.kdtree_foci(X, y, 4, threads=2, averaged=True, scale=scale)
    assert list(got.ordering) == expected.ordering.tolist()
    np.testing.assert_allclose(got.cumulative, expected.cumulative, rtol=0, atol=1e-12)


@pytest.mark.parametrize("averaged", [True, False])
def test_kdtree_continues_from_given_columns(averaged, rng):
    X, y = table_of("continuous", rng)
    expected = lcodec_ext.foci(X, y, stop=False, max_features=2, preselected=[4, 1])
    got = peers.kdtree_foci(X, y, 2, threads=1, averaged=averaged, given=(4, 1))
    assert list(got.ordering) == expected.ordering.tolist()
    np.testing.assert_allclose(got.cumulative, expected.cumulative, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["continuous", "mixed", "discrete"])
def test_drawn_ties_are_among_the_nearest(kind, rng):
    X, y = table_of(kind, rng)
    X = np.round(X[:, :2], 1)
    R = np.argsort(np.argsort(y)) + 1
    indptr, indices = lcodec_ext.nearest_neighbors(X, ties="all")
    drawn = [peers.minima_drawn(X, R, (seed,)) for seed in range(20)]
    for i in range(len(X)):
        allowed = np.minimum(R[i], R[indices[indptr[i] : indptr[i + 1]]])
        assert {minima[i] for minima in drawn} <= set(allowed)
    if kind == "discrete":
        assert len({tuple(minima) for minima in drawn}) == len(drawn)


def test_the_published_algorithm_is_right_where_its_distances_are(rng):
    X, y = table_of("continuous", rng)
    X = X.astype(np.float32)
    expected = lcodec_ext.foci(X, y, stop=False, max_features=4, standardize=None)
    got = peers.published_foci(X, y, 4, threads=2, exact=True)
    assert list(got.ordering) == expected.ordering.tolist()
    np.testing.assert_allclose(got.cumulative, expected.cumulative, atol=1e-6)


def test_the_published_algorithm_takes_tensors(rng):
    X, y = table_of("continuous", rng)
    X = X.astype(np.float32)
    data = {"X": X, "y": y, "z": X[:, :1], "x": X[:, 1:3]}
    tensors = {name: torch.from_numpy(array) for name, array in data.items()}
    for call in (
        lambda d: peers.published_foci(d["X"], d["y"], 3, threads=1),
        lambda d: peers.published_codec(d["y"], d["z"], d["x"], threads=1),
        lambda d: peers.published_neighbors(d["X"], threads=1),
    ):
        assert cases.same_bits(call(data), call(tensors))


@pytest.mark.parametrize("kind", ["Hessian", "Gauss-Newton"])
@pytest.mark.parametrize("layer", ["conv1", "layer4.1.conv2", "fc"])
@pytest.mark.parametrize("peer", [cases.BY_TORCH_FUNC, cases.BY_CURVLINOPS], ids=lambda p: p.name)
def test_full_products_are_right(peer, kind, layer):
    size = CASES["hessian_resnet"].tiny | {"kind": kind, "layer": layer}
    data = CASES["hessian_resnet"].data(size)
    expected = cases.curvature_product(data, "reference")
    assert cases.same_vector(expected, peer.run(data, threads=1), data)["agrees"]


def test_the_dense_fisher_matrix_is_of_single_samples():
    data = CASES["solve_fisher"].data(CASES["solve_fisher"].tiny)
    model, selection = data["model"].double(), data["selection"]
    rows = []
    for x, label in zip(data["X"].double(), data["y"], strict=True):
        model.zero_grad()
        data["loss_fn"](model(x[None]), label[None]).backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        rows.append(selection.gather(gradients, model=model))
    G = torch.stack(rows)
    expected = G.T @ G / len(G) + data["damping"] * torch.eye(G.shape[1])
    torch.testing.assert_close(cases.dense_curvature(data), expected)


def test_the_networks_have_their_sizes():
    model, X, y = networks.make("ResNet-18", 2, tiny=False, seed=0)
    assert sum(p.numel() for p in model.parameters()) == 11_173_962
    assert model(X).shape == (2, 10)
    assert (X.shape, y.shape, model.training) == ((2, 3, 32, 32), (2,), False)
    again, X_again, _ = networks.make("ResNet-18", 2, tiny=False, seed=0)
    assert torch.equal(X, X_again)
    assert torch.equal(model.fc.weight, again.fc.weight)


def test_operations_are_counted():
    a, b, v = torch.ones(3, 4), torch.ones(4, 5), torch.ones(4)
    assert flops.count(lambda: (a @ b, a @ v, v @ v)) == 2 * 3 * 4 * 5 + 2 * 3 * 4 + 2 * 4
    images, weight = torch.ones(2, 3, 6, 6), torch.ones(5, 3, 3, 3, requires_grad=True)
    forward = 2 * (2 * 5 * 4 * 4) * (3 * 3 * 3)
    assert flops.count(lambda: torch.conv2d(images, weight).sum().backward()) == 2 * forward
    kernels = flops.lcodec_ext.curvature.kernels
    two = torch.ones(2, 4)
    assert flops.count(lambda: kernels.masked_gram_product(a, v[:2], [(1, 2)])) == 4 * 3 * 2
    assert flops.count(lambda: kernels.softmax_rows_product(a, a[:, :2].clone(), two)) == 4 * 3 * 8
    assert flops.count(lambda: kernels.factored_gram(a, a)) == 6 * (2 * 4 + 2 * 4)


# Comparing answers


def test_wrong_neighbours_are_told():
    data = {"X": np.array([[0.0], [1.0], [3.0], [4.5]])}
    right = np.array([1, 0, 3, 2])
    assert cases.same_neighbors(right, right, data)["agrees"]
    for wrong in ([2, 0, 3, 2], [1, 1, 3, 2]):  # farther away; the row itself
        verdict = cases.same_neighbors(right, np.array(wrong), data)
        assert (verdict["agrees"], verdict["off_by"]) == (False, 0.25)
    ours_is_wrong = cases.same_neighbors(np.array([2, 0, 3, 2]), right, data)
    assert (ours_is_wrong["agrees"], ours_is_wrong["off_by"]) == (False, 0)


def test_other_selections_and_values_are_told():
    a, b = peers.Selection((1, 2), (0.5, 0.75)), peers.Selection((2, 1), (0.5, 0.5))
    assert cases.same_selection(a, a, {}) == {"agrees": True, "off_by": 0, "answer": "same"}
    assert cases.same_selection(a, b, {})["off_by"] == 0.25
    assert not cases.same_selection(a, b, {})["agrees"]
    assert cases.same_value(0.5, 0.25, {})["answer"] == "off by 0.2"


# Cases and runner


ALL_CASES = CASES | gpu_cases.CASES


@pytest.fixture
def rates(monkeypatch):
    """What a GPU is asked for; the cases themselves also run on the CPU."""
    known = accelerator.Rates(copy_bytes_per_second=4e12, warp_instructions_per_second=1e12)
    monkeypatch.setattr(accelerator, "rates", lambda: known)
    return known


@pytest.mark.parametrize("name", [n for n, case in ALL_CASES.items() if not run.missing(case)])
def test_every_case_runs(name, rates):
    case = dataclasses.replace(ALL_CASES[name], quick=(ALL_CASES[name].tiny,))
    (point,) = run.run_case(case, OPTIONS)["points"]
    assert point["results"].keys() | point["left_out"].keys() == {
        results.OURS,
        *(peer.name for peer in case.peers),
    }
    assert run.disagreements({"cases": {name: {"points": [point]}}}) == []
    for claim in case.claims:
        assert (run.judge(claim, point)["met"] is None) == (claim.quantity in point["left_out"])
    json.dumps(point, allow_nan=False)


def test_a_part_is_scaled(rng):
    peer = cases.by_kdtree(scale=False, part=10)
    case = dataclasses.replace(CASES["cost_columns"], peers=(peer,))
    point = run.run_point(case, case.tiny, OPTIONS)
    entry = point["results"][peer.name]
    assert (entry["measured_columns"], entry["factor"]) == (10, 1.2)
    assert entry["seconds"] == entry["samples"][0] * 1.2
    assert entry["ratio"] == entry["seconds"] / point["results"][results.OURS]["seconds"]


def test_a_case_that_differs_from_the_reference_is_refused():
    case = dataclasses.replace(CASES["xi"], ours=lambda data, backend: float(backend == "cpu"))
    with pytest.raises(AssertionError, match="xi"):
        run.run_case(case, OPTIONS)


def test_a_case_that_need_only_agree_with_the_reference():
    for off, refused in ((1e-13, False), (1e-3, True)):
        case = dataclasses.replace(
            CASES["xi"],
            ours=lambda data, backend, off=off: 0.5 + off * (backend == "cpu"),
            exact=False,
        )
        if refused:
            with pytest.raises(AssertionError, match="xi"):
                case.verify()
        else:
            case.verify()


def test_a_case_without_its_module_is_left_out(tmp_path, monkeypatch):
    needy = dataclasses.replace(CASES["xi"], needs="there_is_no_such_module")
    monkeypatch.setitem(cases.CASES, "xi", needy)
    monkeypatch.setattr(run.environment, "limit_threads", lambda threads: None)
    path = tmp_path / "result.json"
    assert run.main(["--quick", "--cases", "codec,xi", "--output", str(path)]) == 0
    result = results.load(path)
    assert list(result["cases"]) == ["codec"]
    assert result["left_out"] == {"xi": "no usable there_is_no_such_module"}


def test_a_case_that_cannot_be_run_does_not_keep_the_others(tmp_path, monkeypatch, capsys):
    def ours(data, backend):
        raise RuntimeError("the device is on fire")

    monkeypatch.setitem(cases.CASES, "xi", dataclasses.replace(CASES["xi"], ours=ours))
    monkeypatch.setattr(run.environment, "limit_threads", lambda threads: None)
    path = tmp_path / "result.json"
    assert run.main(["--quick", "--cases", "xi,codec", "--output", str(path)]) == 1
    result = results.load(path)
    assert list(result["cases"]) == ["codec"]
    assert result["broken"] == {"xi": "RuntimeError: the device is on fire"}
    assert "WRONG: xi: RuntimeError" in capsys.readouterr().err


def test_a_peer_that_must_agree_and_does_not_is_named():
    peer = cases.Peer("liar", lambda data, threads: 2.0, "asserted")
    case = dataclasses.replace(CASES["xi"], peers=(peer,))
    point = run.run_point(case, case.tiny, OPTIONS)
    (line,) = run.disagreements({"cases": {"xi": {"points": [point]}}})
    assert "liar" in line


def test_a_build_without_instruments_is_timed_all_the_same(monkeypatch):
    monkeypatch.delattr(lcodec_ext._core.dependence, "saturate")
    case = cases.CASES["foci_independent"]
    point = run.run_point(case, case.tiny, OPTIONS)
    assert point["metrics"] == {}
    assert "LCODEC_INSTRUMENTS=ON" in point["left_out"]["metrics"]
    assert point["results"][run.OURS]["seconds"] > 0


def test_a_missing_library_is_left_out():
    def absent(data, threads):
        import there_is_no_such_library  # noqa: F401

    case = dataclasses.replace(CASES["xi"], peers=(cases.Peer("absent", absent),))
    point = run.run_point(case, case.tiny, OPTIONS)
    assert point["left_out"] == {"absent": "no usable there_is_no_such_library"}
    claim = cases.Claim("absent", at_least=1)
    assert run.judge(claim, point)["met"] is None


def test_a_peer_that_must_give_the_same_bits_and_does_not_is_named():
    def run_peer(data, threads):
        return np.nextafter(cases.xi(data, "cpu"), 1)

    for answers, count in (("asserted", 0), ("identical", 1)):
        case = dataclasses.replace(CASES["xi"], peers=(cases.Peer("near", run_peer, answers),))
        point = run.run_point(case, case.tiny, OPTIONS)
        assert len(run.disagreements({"cases": {"xi": {"points": [point]}}})) == count


def test_on_a_device_the_package_gets_tensors_and_a_peer_what_it_asks_for(monkeypatch):
    """A device that is the CPU's memory, and tensors in it."""
    monkeypatch.setattr(accelerator, "place", lambda data, device: {"on": device})
    seen = []
    peer_list = tuple(
        cases.Peer(f"{k}", lambda data, threads: seen.append("on" in data) or 0.0, on_device=k)
        for k in (True, False)
    )
    case = dataclasses.replace(
        CASES["xi"], ours=lambda data, backend: float(data["on"] != "gpu"), peers=peer_list
    )
    options = argparse.Namespace(**vars(OPTIONS) | {"device": "gpu"})
    monkeypatch.setattr(accelerator, "wake", lambda device: None)
    monkeypatch.setattr(accelerator, "wait", lambda device: None)
    point = run.run_point(case, case.tiny, options)
    assert seen == [True, False] * 2  # the answer, then a sample
    assert all(entry.get("agrees", True) for entry in point["results"].values())


def test_a_floor_is_the_larger_of_bytes_and_instructions(rates, monkeypatch):
    assert gpu_cases.floor_of(8e9, 1e9, 0.004) == {
        "milliseconds": 4,
        "floor_bytes": 8e9,
        "floor_warp_instructions": 1e9,
        "floor_milliseconds": 2,
        "time_over_floor": 2,
    }
    assert gpu_cases.floor_of(4e9, 8e9, 0.016)["floor_milliseconds"] == 8
    unknown = rates._replace(warp_instructions_per_second=None)
    monkeypatch.setattr(accelerator, "rates", lambda: unknown)
    assert gpu_cases.floor_of(4e9, 8e9, 0.016)["time_over_floor"] == 16


def test_the_work_of_a_foci_run_is_counted(monkeypatch):
    size = {"n": 200, "p": 96, "steps": 3}
    data = gpu_cases.CASES["gpu_foci_wide"].data(size)
    moved, instructions = gpu_cases.foci_work(data)
    assert moved == 3 * 200 * 96 * 4
    neighbours = instructions / gpu_cases.SCAN_INSTRUCTIONS * gpu_cases.WARP / 200 / (95 + 94)
    assert 8 < neighbours < 100
    monkeypatch.setattr(gpu_cases, "COUNTED_COLUMNS", 48)  # the other half is like these
    assert gpu_cases.foci_work(data)[1] == pytest.approx(instructions, rel=0.2)


def test_the_work_of_a_search_is_counted():
    # 64 rows: 64 pairs and 2 warps each, 3 * 5 + 2 instructions
    assert gpu_cases.search_work(64, 5, 4) == (64 * 5 * 4, 64 * 2 * 17)


def test_small_calls_are_compared(capsys):
    assert gpu_cases.check_small_calls("cpu") == capsys.readouterr().out.count(": same\n") > 10


def test_threads_of_a_peer_are_its_own(monkeypatch):
    monkeypatch.setenv("LCODEC_NUM_THREADS", "3")
    monkeypatch.setattr(_threads, "_threads", None)
    peer = gpu_cases.by_cpu(lambda data, backend: lcodec_ext.get_num_threads())
    assert peer.run({}, 7) == 7
    assert lcodec_ext.get_num_threads() == 3


def test_turns_keep_to_the_budget():
    order = []
    runs = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    samples = run.take_turns(runs, repeats=3, budget=10)
    assert order == ["a", "b"] * 3
    assert [len(s) for s in samples.values()] == [3, 3]
    assert [len(s) for s in run.take_turns(runs, repeats=3, budget=1e-12).values()] == [1, 1]


def test_a_result_says_where_it_comes_from(recorded):
    result = results.load(recorded)
    assert result["settings"] == {
        "quick": True, "threads": 1, "repeats": 2, "budget_seconds": 20
    }  # fmt: skip
    assert list(result["cases"]) == ["codec", "xi"]
    assert len(points(result, "codec")[0]["results"][results.OURS]["samples"]) == 2
    assert result["machine"]["simd"] in lcodec_ext.build_info()["simd_compiled"]
    assert result["versions"]["numpy"] == np.__version__
    assert str(ROOT) not in recorded.read_text()


# A deletion


def test_the_published_perturbations_are_ours():
    model = networks.make("ResNet-18", 2, tiny=True, seed=0)[0]
    request = as_samples(
        (torch.randn(1, 3, 16, 16), torch.tensor([3])), "forget", torch.device("cpu"), torch.float32
    )
    units = find_candidates(model, Settings.preset("paper")).selection
    ours = record(model, request, F.cross_entropy, n_perturbations=5, units=units)
    batch = request.fetch(slice(None))
    inputs = [perturbed(batch, 0, k).args[0] for k in range(5)]
    rows, losses = peers.published_perturbations(model, F.cross_entropy, inputs, batch.targets)
    # theirs by order of calls, too
    np.testing.assert_allclose(ours.activations, rows, rtol=0, atol=1e-4 * rows.abs().max().item())
    np.testing.assert_allclose(ours.losses, losses, rtol=1e-4)
    assert not rows.requires_grad


def test_the_published_step_is_dense():
    step, change, gradient = torch.randn(3, 6, dtype=torch.float64)
    still = torch.zeros(6, dtype=torch.float64)
    matrix = peers.published_matrix((step, change), (step, still), n=10)
    expected = torch.outer(change, change) / step.abs().sum() * 10 / 9
    torch.testing.assert_close(matrix, expected)
    solved = peers.published_solve(matrix, gradient, 0.5, n=10)
    torch.testing.assert_close((matrix @ solved + 0.5 * solved) * 9, gradient)


@pytest.fixture(scope="module")
def deleted(tmp_path_factory):
    """A result file of a quick run, made as a user makes it."""
    path = tmp_path_factory.mktemp("deletion") / "deletion.json"
    command = [sys.executable, ROOT / "benchmarks/deletion.py", "--quick", "--threads", "1"]
    subprocess.run([*command, "--output", path], check=True, capture_output=True)
    return results.load(path)


def test_a_deletion_is_split_into_phases(deleted):
    found = deleted["deletion"]
    layers = networks.make("ResNet-18", 1, tiny=True, seed=0)[0].modules()
    weights = [m.weight for m in layers if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert found["size"]["candidates"] == sum(map(len, weights))
    assert len(found["requests"]) == deletion.QUICK.requests
    assert found["claims"] == []
    for name in deletion.NAMES:
        for seconds in (found["mean"][name], *(r[name] for r in found["requests"])):
            assert list(seconds) == [*deletion.PHASES, "rest", "total"]
            parts = [seconds[phase] for phase in seconds if phase != "total"]
            assert sum(parts) == pytest.approx(seconds["total"])
            assert min(parts) >= 0
    first = found["requests"][0]
    measured = found["measured"]
    assert first["steps"] >= first["units"] >= 1
    assert len(measured["search"]) == 1 + max(r["steps"] for r in found["requests"])
    factor = first["parameters"] / measured["parameters"]
    assert first["published"]["solve"] == pytest.approx(measured["solve"] * factor**3)
    searched = sum(
        each * (found["size"]["candidates"] - k)
        for k, each in enumerate(measured["search"][: first["steps"] + 1])
    )
    assert first["published"]["selection"] == pytest.approx(searched)
    retained = found["from_retained"]
    assert "refused" in retained or retained["n_monitored"] == deletion.QUICK.n - 1


def test_a_network_is_trained_once(tmp_path):
    state = tmp_path / "state.pt"
    first, again = (deletion.trained(deletion.QUICK, state) for _ in range(2))
    assert first.accuracy == again.accuracy
    for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    (_, before), (_, after) = again.snapshots
    assert torch.equal(first.snapshots[1][1]["fc.weight"], after["fc.weight"])
    assert not torch.equal(before["fc.weight"], after["fc.weight"])


def test_the_table_of_a_deletion(deleted):
    with pytest.raises(ValueError, match="a quick run's times mean nothing"):
        table.deletion_table(deleted)
    full = deleted | {"settings": deleted["settings"] | {"quick": False}}
    lines = table.deletion_table(full).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:10]] == [
        f"| {phase}" for phase in (*deletion.PHASES, "rest", "total")
    ]
    assert {line.count("|") for line in lines[:10]} == {6}
    assert {line.count("|") for line in lines[11:-2]} == {7}
    refused = full["deletion"] | {"from_retained": {"refused": "why"}}
    assert " is refused, " in table.deletion_table(full | {"deletion": refused})
    assert table.tables([full]) == table.curvature_tables([full]) == ""
    assert table.deletion_tables([full, {"cases": {}}]).splitlines() == lines


# Comparing files


def altered(path, tmp_path, change):
    result = json.loads(path.read_text())
    change(result)
    other = tmp_path / "other.json"
    other.write_text(json.dumps(result))
    return other


def slower(name, factor):
    def change(result):
        points(result, "xi")[0]["results"][name]["seconds"] *= factor

    return change


@pytest.mark.parametrize(
    ("name", "factor", "status"),
    [
        (results.OURS, 1.0, 0),
        (results.OURS, 1.5, 1),
        (results.OURS, 0.5, 0),
        ("scipy chatterjeexi", 3.0, 0),
    ],
)
def test_compare_flags_what_became_slower(recorded, tmp_path, capsys, name, factor, status):
    other = altered(recorded, tmp_path, slower(name, factor))
    assert compare.main([str(recorded), str(other)]) == status
    out = capsys.readouterr().out
    assert out.count("REGRESSION") == status
    assert f"{factor:6.2f}" in out
    assert compare.main([str(recorded), str(other), "--threshold", "2"]) == 0


def test_compare_refuses_other_machines_unless_told(recorded, tmp_path, capsys):
    other = altered(recorded, tmp_path, lambda result: result["machine"].update(cpu="abacus"))
    assert compare.main([str(recorded), str(other)]) == 2
    assert "abacus" in capsys.readouterr().err
    assert compare.main([str(recorded), str(other), "--across-machines"]) == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda result: result["settings"].update(threads=64),
        lambda result: result["settings"].update(quick=False),
        lambda result: result["cases"].clear(),
    ],
)
def test_compare_refuses_what_does_not_compare(recorded, tmp_path, change):
    other = altered(recorded, tmp_path, change)
    assert compare.main([str(recorded), str(other), "--across-machines"]) == 2


def test_another_schema_is_refused(recorded, tmp_path):
    other = altered(recorded, tmp_path, lambda result: result.update(schema=0))
    with pytest.raises(SystemExit, match="schema 0"):
        results.load(other)


# Table and figure


def test_the_table_is_put_between_the_comments(recorded, tmp_path):
    readme = tmp_path / "README.md"
    docs = tmp_path / "docs.md"
    for path in (readme, docs):
        marks = "\n".join((*table.DELETION, *table.TIMES))
        path.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n{marks}\n")
    paths = ["--readme", str(readme), "--docs", str(docs)]
    with pytest.raises(ValueError, match="a quick run's times mean nothing"):
        table.main([str(recorded), *paths])
    result = json.loads(recorded.read_text())
    result["settings"]["quick"] = False
    full = tmp_path / "full.json"
    full.write_text(json.dumps(result))
    for _ in range(2):
        table.main([str(full), *paths])
    text = docs.read_text()
    assert text.startswith(f"before\n{table.BEGIN}\n{table.END}\nafter\n")
    assert "<!-- times:begin -->\n| task |" in text
    short = readme.read_text()
    assert short.startswith("before\n<!-- benchmarks:begin -->\n| task |")
    assert short.endswith(f"<!-- benchmarks:end -->\nafter\n{marks}\n")
    assert "old" not in short
    for written in (text, short):
        assert written.count("| task |") == 1
        rows = [line for line in written.splitlines() if line.startswith("|")]
        assert {line.replace("\\|", "").count("|") for line in rows} == {7}
    with pytest.raises(ValueError, match="must have the lines"):
        table.replaced("no comments", "")


def test_the_tables_of_curvature():
    product = {
        "title": "H v",
        "results": {
            results.OURS: {"seconds": 0.01},
            "torch.func, all parameters": {"seconds": 2.0, "ratio": 200.0},
        },
        "metrics": {
            "coordinates": 46080,
            "setup_seconds": 0.25,
            "gflop": 0.5,
            "full_gflop": 640.0,
            "flop_ratio": 1280.0,
        },
    }
    solve = {
        "title": "H x = v",
        "results": {results.OURS: {"seconds": 1.5}},
        "metrics": {
            "coordinates": 46080,
            "peak_memory_gb": 0.7,
            "torch_memory_gb": 0.24,
            "dense_matrix_gb": 8.493,
        },
    }
    made = table.curvature_table({"cases": {"a": {"points": [product, solve]}}}).splitlines()
    assert made[2] == ("| H v | 46,080 | 250 ms | 10 ms | 2.0 s | 200x | 0.50 of 640 | 1280x |")
    assert made[6] == "| H x = v | 46,080 | 1.5 s | 0.70 GB | 0.24 GB | 8.49 GB |"
    assert {line.count("|") for line in made} == {9, 0, 7}


def test_numbers_in_the_table():
    assert [table.duration(s) for s in (93.2, 1.26, 0.0123, 2e-6)] == [
        "93 s", "1.3 s", "12 ms", "2.0 µs"
    ]  # fmt: skip
    assert [table.multiple(r) for r in (0.456, 3.14, 412.3)] == ["0.46x", "3.1x", "412x"]


def test_exponents_are_fitted_to_large_sizes():
    sizes = np.array([1e2, 1e3, 1e4, 1e5, 1e6])
    assert plots.exponent(sizes, 1e-9 * sizes**1.5) == pytest.approx(1.5)
    assert plots.exponent(sizes, np.maximum(1e-9 * sizes**1.25, 1e-5)) == pytest.approx(1.25)
    assert plots.exponent(sizes[:2], sizes[:2] ** 2) == pytest.approx(2)


def test_the_figure_is_drawn(tmp_path):
    def sweep(name, values, power):
        case = CASES[name]
        taken = [
            {
                "title": "task",
                "size": case.full[0] | {case.sweep: value},
                "results": {results.OURS: {"seconds": 1e-6 * value**power}},
                "metrics": {"scan_bound_seconds": 1e-7 * value**power},
            }
            for value in values
        ]
        return {"sweep": case.sweep, "points": taken}

    swept = {f"cost_rows_{k}": sweep(f"cost_rows_{k}", (10, 100, 1000), 1.5) for k in (1, 2, 3)}
    swept["cost_columns"] = sweep("cost_columns", (10, 100, 1000), 1)
    plots.draw({"cases": swept}, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


# Deletions from networks, and populations


@pytest.fixture
def little_tuned(tmp_path):
    """Options of all baselines that take no time."""
    chosen = {name: {"epochs": 1} for name in unlearning.NAMES}
    chosen |= {"L-BFGS": {"iterations": 2}, "SSD": {"n_samples": 20}}
    path = tmp_path / "tuned.json"
    trials = [{"name": name, "distance": 0.1 + k} for k, name in enumerate(unlearning.NAMES)]
    sets = {which: {"chosen": chosen, "trials": trials} for which in ("mislabelled", "random")}
    path.write_text(json.dumps({"schema": "tuned-1", "searches": {"mlp": sets}}))
    return path


def test_populations_are_compared_and_shown(tmp_path, little_tuned):
    output = tmp_path / "population.json"
    command = [sys.executable, ROOT / "benchmarks/population.py", "--models", "4", "--epochs", "2"]
    options = ["--sets", "mislabelled", "--folder", tmp_path / "seeds", "--output", output]
    options += ["--tuned", little_tuned]
    done = subprocess.run([*command, *options], check=True, capture_output=True, text=True)
    assert "Population of 4 models: 40 samples removed" in done.stdout
    result = json.loads(output.read_text())
    assert result["settings"]["epochs"] == 2
    assert result["settings"]["models"] == 4
    ours = ["recommended", "recommended, no validation", "constant damping"]
    names = ["no-op", "retrained", *ours, *unlearning.NAMES[: population.BEST]]
    assert [method["name"] for method in result["runs"][0]["methods"]] == names
    assert [method["error"] for method in result["runs"][0]["methods"]] == [None] * len(names)
    lines = population.tables(result).splitlines()
    assert "40 mislabelled samples deleted, populations of 4 models" in lines[0]
    assert [line.split(" | ")[0] for line in lines[4:]] == [f"| {name}" for name in names]
    assert len({line.count("|") for line in lines[2:]}) == 1
    folders = {path.name: path for path in (tmp_path / "seeds").iterdir()}
    assert len(list(folders.pop("trained").glob("*.pt"))) == 8
    (folder,) = folders.values()
    assert len(list(folder.glob("seed-*.npz"))) == 4


@pytest.fixture
def quick_mlp(monkeypatch):
    recipes = unlearning_models.RECIPES
    quick = dataclasses.replace(recipes["mlp"], epochs=20, random=20, mislabelled=10)
    monkeypatch.setitem(recipes, "mlp", quick)


def test_deletions_are_compared_with_kept_baselines(tmp_path, quick_mlp, little_tuned):
    baselines = unlearning_baselines.tuned("mlp", "random", little_tuned)
    assert list(baselines) == list(unlearning.NAMES)
    assert baselines["SCRUB"].options == {"epochs": 1}
    few = {name: baselines[name] for name in ("L-BFGS", "SCRUB")}
    ours = {"recommended": unlearning.OURS["recommended"]}
    runs = [unlearning.measure("mlp", "random", 0, 1, tmp_path, few, ours) for _ in range(2)]
    rows = [run["methods"] for run in runs]
    assert list(rows[0]) == list(rows[1]) == ["no-op", "retrained", "recommended", *few]
    for name in few:
        assert rows[0][name] == rows[1][name]  # and its time: it was not run again
        assert rows[0][name]["commit"] == rows[1][name]["commit"]
    assert rows[0]["recommended"]["calibration"]["n_validation"] == 200
    assert rows[0]["no-op"]["closed"]["loss_forget"] == pytest.approx(0)
    assert rows[0]["retrained"]["closed"]["loss_forget"] == pytest.approx(1)
    assert 0 < rows[0]["recommended"]["time"]
    recipes = {"mlp": unlearning.recipe_of(unlearning_models.RECIPES["mlp"])}
    lines = unlearning.tables({"runs": runs, "settings": {"recipes": recipes}}).splitlines()
    assert lines[0].startswith("**digits, MLP 64-128-10: 20 random samples of 1,197**, 20 epochs")
    assert [line.split(" | ")[0] for line in lines[4:-2]] == [f"| {name}" for name in rows[0]]
    assert lines[-1].startswith('Targets of "recommended", 2 starts. Reached: ')


def test_baselines_are_tuned_on_the_development_draw(tmp_path, quick_mlp, monkeypatch):
    monkeypatch.setattr(unlearning_baselines, "NAMES", ("L-BFGS", "SSD"))
    found = unlearning_baselines.search("mlp", "mislabelled", tmp_path, n_settings=2)
    assert found["chosen"].keys() == {"L-BFGS", "SSD"}
    assert found["settings"]["n_control"] == 10
    assert found["settings"]["n_validation"] == 200
    assert found["settings"]["epochs"] == 1
    assert sorted(path.name.rsplit("-", 1)[0] for path in tmp_path.glob("*.pt")) == [
        f"mlp-mislabelled-0-{which}" for which in ("0", "1", "2", "all")
    ]


def compared(**methods):
    """A run in which methods have (JS, share of the loss gap); 1 start, before .5, floor .1."""
    rows = {"no-op": (0.5, 0.0), "retrained": (0.1, 1.0), **methods}
    return {
        "model": "mlp",
        "forget": "random",
        "methods": {
            name: {
                "js_forget": js,
                "loss_forget": 2 * loss,
                "closed": {"js_forget": 1 - (js - 0.1) / 0.4, "loss_forget": loss},
                "mia_auc": 0.5,
                "accuracy_retain": 1.0,
                "accuracy_test": 0.9,
                "time": 0.03,
            }
            for name, (js, loss) in rows.items()
        },
    }


def test_a_baseline_is_ahead_if_it_is_in_both():
    ours = {"recommended": (0.2, 0.8)}
    for theirs, better in (
        ((0.18, 0.9), True),
        ((0.195, 0.9), False),  # 1.25 points of JS
        ((0.18, 0.81), False),
        ((0.25, 0.9), False),
        ((0.05, 1.0), True),
    ):
        run = compared(**ours, SCRUB=theirs)
        assert unlearning.ahead([run]) == ["SCRUB"] * better
        *others, last = unlearning.claims([run])
        assert (last["value"], last["met"]) == (int(better), not better)
        assert [claim["met"] for claim in others] == [True] * 5
    near = {"recommended": (0.1, 1.0)}
    assert unlearning.ahead([compared(**near, SCRUB=(0.02, 1.2))]) == []  # beyond the floor
    small = compared(**{"no-op": (0.101, 0.0), "recommended": (0.11, 0.5)}, SCRUB=(0.109, 1.0))
    assert unlearning.ahead([small]) == ["SCRUB"]  # .001 of .025


def test_the_outcome_of_the_targets_is_told():
    told = unlearning.summary([compared(recommended=(0.2, 0.6), SCRUB=(0.1, 1.0))])
    reached, missed = told.split(" Missed: ")
    assert reached.startswith(
        'Targets of "recommended", one start. Reached: time 0.030 (at most 0.05);'
    )
    assert "loss reached, share of the gap 0.600 (at least 0.7 and at most 1.3)" in missed
    assert missed.endswith("baselines ahead in JS and loss: SCRUB.")


def test_a_loss_may_overshoot_a_little():
    for loss, good in ((0.65, False), (0.75, True), (1.2, True), (1.35, False)):
        claim = unlearning.claims([compared(recommended=(0.2, loss))])[2]
        assert claim["value"] == pytest.approx(loss)
        assert (claim["at_least"], claim["at_most"], claim["met"]) == (0.7, 1.3, good)


# What is recorded in the repository


class TestRecorded:
    @pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
    def test_it_is_a_full_run_of_a_clean_commit(self, path):
        result = results.load(path)
        assert result["cases"].keys() <= CASES.keys()
        assert not result["settings"]["quick"]
        assert result["dirty"] is False
        assert run.disagreements(result) == []

    def test_the_readme_shows_it(self):
        text = (ROOT / "README.md").read_text()
        recorded = [results.load(path) for path in RECORDED]
        assert text == table.replaced(text, table.readme_table(recorded))
        assert table.readme_table(recorded).count("\n|") == 1 + len(table.README)

    def test_the_documentation_shows_it(self):
        text = (ROOT / "docs/benchmarks.md").read_text()
        assert text == table.replaced(text, table.curvature_tables(map(results.load, RECORDED)))
        recorded = [results.load(path) for path in RECORDED]
        assert text == table.replaced(text, table.tables(recorded), *table.TIMES)

    def test_the_documentation_shows_the_deletions_from_networks(self):
        page = (ROOT / "docs/unlearning.md").read_text()
        recorded = json.loads((ROOT / "benchmarks/results/unlearning.json").read_text())
        assert page == table.replaced(page, unlearning.tables(recorded))
        assert recorded["claims"] == unlearning.claims(recorded["runs"])
        assert recorded["settings"]["split"] != unlearning_baselines.DEVELOPMENT

    def test_every_baseline_was_tuned(self):
        searches = json.loads(unlearning_baselines.RESULTS.read_text())["searches"]
        assert searches.keys() == set(unlearning_baselines.TUNED_ON.values())
        for sets in searches.values():
            assert sets.keys() == {"mislabelled", "random"}
            for found in sets.values():
                assert found["dirty"] is False
                assert found["chosen"].keys() == set(unlearning.NAMES)

    def test_the_documentation_shows_the_populations(self):
        """Once they are recorded; until then it says that they are not."""
        page = (ROOT / "docs/evaluation.md").read_text()
        path = ROOT / "benchmarks/results/population.json"
        recorded = json.loads(path.read_text()) if path.exists() else {"runs": []}
        assert page == table.replaced(page, population.tables(recorded))
        assert ("run is recorded yet" in page) == (not recorded["runs"])
        if recorded["runs"]:
            assert recorded["dirty"] is False
            assert [run["forget"] for run in recorded["runs"]] == ["mislabelled", "random"]
            assert {run["n_models"] for run in recorded["runs"]} == {64}

    def test_the_documentation_shows_a_deletion(self):
        """Once it is recorded."""
        text = (ROOT / "docs/benchmarks.md").read_text()
        recorded = [results.load(path) for path in (DELETION,) if path.exists()]
        assert all(result["dirty"] is False for result in recorded)
        assert text == table.replaced(text, table.deletion_tables(recorded), *table.DELETION)


class TestStreams:
    """Streams of requests whose processes are killed."""

    WORKER = """
import pathlib, sys, time
path = pathlib.Path(sys.argv[1])
time.sleep(float(sys.argv[2]))  # for the model
lines = path.read_text().count("\\n") if path.exists() else 0
with open(path, "a", buffering=1) as file:
    for number in range(lines, 41):
        file.write(f"{number}\\n")
        time.sleep(0.1)
"""

    @pytest.mark.parametrize("start", [0.0, 1.0])
    def test_a_stream_is_killed_at_work_however_long_it_takes_to_start(self, tmp_path, start):
        path = tmp_path / "ledger.jsonl"
        worker = [sys.executable, "-c", self.WORKER, str(path), str(start)]
        killed = stream.interrupted(worker, str(tmp_path), 40, 3, 0.1)
        assert len(killed) == 3
        assert killed == sorted(set(killed))
        assert all(1 <= lines <= 40 for lines in killed)  # the 41st is the last
        assert path.read_text().split() == [str(number) for number in range(41)]

    def test_a_worker_that_fails_is_no_kill(self, tmp_path):
        command = [sys.executable, "-c", "raise SystemExit(3)"]
        with pytest.raises(RuntimeError, match="a worker ended with status 3"):
            stream.interrupted(command, str(tmp_path), 40, 3, 0.1)

    @pytest.mark.parametrize("killed", [[], [3, 5], [0, 3, 5], [3, 5, 13]])
    def test_bits_that_were_hardly_at_risk_are_no_claim(self, killed):
        found = {"model": "a", "requests": 12, "growth_mib": 0.0, "verified": True}
        found |= {"same_bits": True, "killed_after_lines": killed}
        kills, bits, *others = stream.claims([found])
        assert (kills["met"], bits["value"], bits["met"]) == (False, True, False)
        assert all(claim["met"] for claim in others)
        found["killed_after_lines"] = [3, 5, 12]
        assert all(claim["met"] for claim in stream.claims([found]))
        found["same_bits"] = False
        assert [claim["met"] for claim in stream.claims([found])] == [True, False, True, True]

    def test_too_few_kills_are_refused(self, capsys):
        for given in (["--kills", "2"], ["--kills", "10", "--requests", "19"]):
            with pytest.raises(SystemExit):
                stream.main(given)
            assert "--kills must be from 3 to half of the" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# Calibrated deletions


def test_the_guide_has_the_recorded_masks():
    found = results.load(ROOT / "benchmarks/results/masks.json")["masks"]
    assert found["summary"] == masks.summary(found["points"])
    text = (ROOT / "docs/unlearning.md").read_text(encoding="utf-8")
    assert masks.table(found["summary"]) in text
    assert masks.classes(found["classes"]) in " ".join(text.split())
    for rows in found["summary"].values():
        for share in ("5%", "10%"):
            closed = {name: rows[f"{name}, {share}"]["closed_js"] for name in masks.RULES}
            units = {name: value for name, value in closed.items() if name != "step"}
            assert closed["step"] > 1.5 * max(units.values())
            assert closed["step"] > rows[f"truncated, {share}"]["closed_js"] + 0.05
            assert max(units, key=units.get) == "step units"
            assert closed["L-FOCI units"] < closed["random units"] + 0.02
            shortened = rows[f"shortened, {share}"]
            assert shortened["disturbed"] < rows[f"step, {share}"]["disturbed"]
            assert rows[f"step, {share}"]["parameters"] <= 9610 * float(share[:-1]) / 100


def test_the_guide_has_the_recorded_comparison_of_ekfac():
    runs = ekfac_against_cg.load(ROOT / "benchmarks/results/ekfac_against_cg.json")
    text = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    assert ekfac_against_cg.table(runs, ekfac_against_cg.SHOWN) in text
    assert {each["model"] for each in runs} == set(ekfac_against_cg.TITLES)
    for each in runs:
        assert set(each["methods"]) == {"no-op", "retrained", *ekfac_against_cg.ways()}
        assert not any(row["error"] for row in each["methods"].values())


def test_the_guide_has_the_recorded_calibrations():
    path = ROOT / "benchmarks/results/calibration.json"
    found = results.load(path)["calibration"]
    assert set(found) == set(calibration.CASES)
    text = (ROOT / "docs/unlearning.md").read_text(encoding="utf-8")
    assert calibration.table(found) in text
    for case in found.values():
        assert case["summary"] == calibration.summary(case["points"])
        calibrated = case["summary"]["calibrated"]
        assert calibrated["loss_ratio"] < 2.5
        assert calibrated["accuracy_test_worst"] >= -0.0101  # a point, of 497 samples
    calibrated = [case["summary"]["calibrated"] for case in found.values()]
    near, of = (sum(each[name] for each in calibrated) for name in ("within_2.5", "of"))
    assert f"{near} of {of} losses are within a factor of 2.5" in text
    worst = min(each["accuracy_test_worst"] for each in calibrated)
    assert f"cost more than {-100 * worst:.1f} points of test accuracy" in text


def test_the_guide_has_the_recorded_deletions_from_minilm():
    found = json.loads((ROOT / "benchmarks/results/minilm.json").read_text())
    text = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    for case, ways in found["cases"].items():
        assert f"**{case[0].upper() + case[1:]}**\n\n{minilm.table(ways)}" in text
        assert not any(way["dirty"] for way in ways.values())
    assert minilm.claims(found["cases"]) == found["claims"]
    met = sum(claim["met"] for claim in found["claims"])
    words = " ".join(text.split())
    assert f"{met} of {len(found['claims'])} gates are met" in words
    missed = [claim for claim in found["claims"] if not claim["met"]]
    shares = sorted(c["value"] for c in missed if c["quantity"] == "share of fine-tuning's time")
    (loss,) = [c["value"] for c in missed if c["quantity"] == "deleted loss over retraining's"]
    assert len(missed) == 5 == len(shares) + 1
    assert f"at {shares[0]:.0%} to {shares[-1]:.0%} where 5% was allowed" in words
    assert f"{loss:.2f} of retraining's where a half was" in words


def test_the_guide_has_the_recorded_ordinary_networks():
    found = json.loads((ROOT / "benchmarks/results/ordinary.json").read_text())
    text = (ROOT / "docs/unlearning.md").read_text(encoding="utf-8")
    assert ordinary.table(found["summary"]) in text
    assert ordinary.readme_table(found["summary"]) in (ROOT / "README.md").read_text("utf-8")
    for name, summary in found["summary"].items():
        trainings = [each for each in found["trainings"] if each["network"] == name]
        assert ordinary.summary(trainings) == summary
    total = {
        name: sum(each[name] for each in found["summary"].values())
        for name in ("requests", "within_factor", "under", "over", "silent")
    }
    said = (
        "{within_factor} of {requests} deletions are within a factor of 2 of retraining; "
        "{under} forget less and {over} more"
    )
    assert said.format(**total) in " ".join(text.split())
    assert total["silent"] == 0
    assert "**None of these was silent**" in text
    harmed = {
        kind: sum(each["harmed"][kind] for each in found["summary"].values())
        for kind in ordinary.HARMS
    }
    assert list(harmed.values()) == [0, 5, 1, 0]
    assert "(5 of 100, 1.2 points at worst, 1 beyond half a point" in " ".join(text.split())


def test_the_recorded_wheels_are_small_and_work():
    found = json.loads((ROOT / "benchmarks/results/wheels.json").read_text())
    assert wheels.table(found["wheels"]) in (ROOT / "docs/benchmarks.md").read_text("utf-8")
    assert found["dirty"] is False
    for wheel in found["wheels"].values():
        assert wheel["bytes"] < wheels.LIMIT
        assert wheel["core_only_passed"]
    assert any(wheel["free_threaded"] for wheel in found["wheels"].values())


def test_two_versions_take_turns(tmp_path, capsys):
    old, output = tmp_path / "old", tmp_path / "record.json"
    old.mkdir()
    (old / "lcodec_ext").symlink_to(Path(lcodec_ext.__file__).parent)
    arguments = [str(old), "--cases", "small_codec", "--rounds", "2", "--output", str(output)]
    assert versions.main(arguments) == 0
    case = results.load(output)["cases"]["small_codec"]
    assert [len(case["samples"][version]) for version in versions.VERSIONS] == [2, 2]
    assert 0.2 < case["ratio"] < 5  # of a version and itself
    assert "| codec, n = 50, 1,000 calls |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="has no lcodec_ext"):
        versions.main([str(tmp_path), *arguments[1:]])


def test_the_page_has_the_recorded_versions():
    found = results.load(ROOT / "benchmarks/results/versions.json")
    assert versions.table(found["cases"]) in (ROOT / "docs/benchmarks.md").read_text("utf-8")
    assert found["dirty"] is False
    assert set(found["cases"]) == set(versions.CASES)
    assert {(*case["versions"].values(),) for case in found["cases"].values()} == {
        ("0.1.0", "0.2.0")
    }


def test_the_guide_has_the_recorded_users():
    found = results.load(ROOT / "benchmarks/results/users.json")["calibration"]
    assert set(found) == set(users.CASES)
    text = (ROOT / "docs/unlearning.md").read_text(encoding="utf-8")
    assert users.table(found) in text
    for case in found.values():
        assert case["summary"] == users.summary(case["points"])
        for point in case["points"]:
            for way, (of, _) in users.ways(("known", "unseen")).items():
                if way in point:
                    assert point[way]["calibration"]["groups_of"] == of


def test_permutations_cost_no_more_than_they_must():
    """On record; and a small run goes through, and keeps the parts that it does not measure."""
    found = results.load(ROOT / "benchmarks/results/inference.json")["inference"]["cost"]
    claimed = [point for point in found["points"] if "claims" in point]
    assert [point["n"] for point in claimed] == [1000, 100_000]
    for point in claimed:
        assert all(claim["met"] for claim in point["claims"])
        assert point["over_bare_loop"] <= inference.MOST
        assert point["codec_calls_over_test"] >= inference.LEAST
        assert point["ns_an_element"]["codec_test"] <= 1.5 * inference.FLOOR_NS
    text = " ".join((ROOT / "docs/inference.md").read_text(encoding="utf-8").split())
    seconds = claimed[1]["seconds"]["codec_test"]
    assert f"999 permutations of 100 000 rows take about {seconds:.1f} s on one thread" in text


def test_the_guide_has_the_recorded_levels():
    """Exact tests keep their level within four standard errors; the tables are the record's."""
    found = results.load(ROOT / "benchmarks/results/inference.json")["inference"]
    points = [point for part in ("simulation", "given") for point in found[part]["points"]]
    text = (ROOT / "docs/inference.md").read_text(encoding="utf-8")
    for each in inference_levels.table(points).split("\n\n"):
        assert each in text
    claimed = [claim for point in points for claim in point.get("claims", ())]
    assert len(claimed) == 12
    assert all(claim["met"] for claim in claimed)
    slow = [point["ms"] for point in points if point.get("test") == "CMIknn"]
    ours = [point["ms"] for point in points if point.get("test") == "local permutation, k_perm=3"]
    assert 60 < np.mean(slow) / np.mean(ours) < 80


def test_a_quick_run_of_inference(tmp_path):
    path = tmp_path / "inference.json"
    kept = {"schema": results.SCHEMA, "inference": {"simulation": {"points": []}}}
    path.write_text(json.dumps(kept))
    inference.main(["--parts", "cost", "--quick", "--output", str(path)])
    found = results.load(path)["inference"]
    assert found["simulation"] == {"points": []}
    assert [point["kind"] for point in found["cost"]["points"]] == list(inference.samples(3))
    with pytest.raises(SystemExit):
        inference.main(["--parts", "power"])


def test_users_with_habits():
    task = users.habits(3)
    assert task.users.max() < users.TRAINED
    gone = task.users[task.forget].unique()
    assert len(gone) == 2
    assert not torch.isin(task.users[~task.forget], gone).any()
    sizes = [len(data[1]) for data in task.validation.values()]
    assert sizes[1] == users.HELD * users.SIZE
    assert len(task.data[1]) + sizes[0] < users.TRAINED * users.SIZE  # without the deleted users'


# ---------------------------------------------------------------------------------------------
# Ordinary networks


def deletion_point(**changed):
    """A deletion that did no harm, but for what is changed of it."""
    before = {"loss_forget": 0.1, "loss_retain": 0.1, "loss_test": 0.4}
    return {
        "before": before,
        "after": before | {"loss_forget": 0.3} | changed.pop("after", {}),
        "retrained": [{"loss_forget": loss} for loss in (0.2, 0.3, 0.25)],
        "loss_validation": 0.25,
        "kind": "random",
        "accuracy_change": 0.001,
        "accuracy_change_error": 0.001,
        "warnings": [],
        "silent": False,
        "skipped": 0,
        "seconds": 1.0,
        "ratio": 1.2,
        "ratio_before": 0.4,
    } | changed


class TestOrdinaryNetworks:
    def test_harm(self):
        assert ordinary.harms(deletion_point()) == []
        assert ordinary.harms(deletion_point(after={"loss_forget": 0.6})) == ["over-forgotten"]
        for changed in ({"loss_validation": 0.3}, {"kind": "wrong"}):
            assert ordinary.harms(deletion_point(after={"loss_forget": 0.6}, **changed)) == []
        assert ordinary.harms(deletion_point(after={"loss_retain": 0.171})) == ["retained"]
        assert ordinary.harms(deletion_point(after={"loss_retain": float("nan")})) == ["retained"]
        gained = {"loss_retain": 0.171, "loss_test": 0.3}  # test samples gain more
        assert ordinary.harms(deletion_point(after=gained)) == []
        assert ordinary.harms(deletion_point(accuracy_change=-0.006)) == ["test"]
        clear = ordinary.harms(deletion_point(accuracy_change=-0.008))
        assert clear == ["test", "test, beyond chance"]

    def test_a_change_of_accuracy_is_paired(self):
        before, after = torch.ones(1000, dtype=bool), torch.ones(1000, dtype=bool)
        before[:3], after[10:20] = False, False
        moved, error = ordinary.change(before, after)
        assert moved == pytest.approx(-0.007)
        assert error == pytest.approx((13 / 1000 - 0.007**2) ** 0.5 / 1000**0.5)

    def test_claims(self):
        bad = deletion_point(ratio=2.1, accuracy_change=-0.006, silent=True, harm=["test"])
        points = [deletion_point(harm=[]) | {"ratio": ratio} for ratio in (0.5, 2.0)]
        one = {"requests": points, "training_seconds": 1.0}
        two = {"requests": [*points, bad], "training_seconds": 1.0}
        good, missed = (ordinary.claims({"a": ordinary.summary([each])}) for each in (one, two))
        assert [claim["met"] for claim in good] == [True, True, True]
        assert [claim["met"] for claim in missed] == [False, False, False]
        assert [claim["value"] for claim in missed] == [pytest.approx(2 / 3), -0.006, 1]

    def test_requests_are_apart(self):
        work = ordinary_models.task("adamw", 0)
        assert [each.kind for each in work.requests] == [
            "user",
            "user",
            "random",
            "random",
            "wrong",
        ]
        numbers = [i for each in work.requests for i in each.numbers]
        assert len(set(numbers)) == len(numbers)
        for each in work.requests[:2]:
            own = torch.isin(work.users, torch.tensor(each.users)).nonzero().flatten().tolist()
            assert own == each.numbers
        sizes = [len(work.data[1]), len(work.validation[1]), len(work.test[1])]
        assert sizes == [1000, 298, 499]
        forget, retain = work.parts(work.requests[0].numbers)
        assert len(forget[1]) + len(retain[1]) == 1000

    def test_shifts(self):
        x = torch.rand(50, 1, 28, 28, generator=torch.Generator().manual_seed(0))
        moved = ordinary_models.shifted(x, torch.Generator().manual_seed(1))
        assert moved.shape == x.shape
        centre = x[0, 0, 10:18, 10:18]
        places = [
            torch.equal(image[a : a + 8, b : b + 8], centre)
            for image in (moved[0, 0], moved[0, 0].flip(1))
            for a in range(8, 13)
            for b in range(8, 13)
        ]
        assert sum(places) == 1

    def test_every_network_runs(self):
        shapes = {"adamw": (2, 64), "distilbert": (2, ordinary_models.LENGTH)}
        for name, recipe in ordinary_models.RECIPES.items():
            x = torch.ones(shapes.get(name, (2, 1, 28, 28)))
            x = x.long() if name == "distilbert" else x
            classes = len(ordinary_models.LIBRARIES) if name == "distilbert" else 10
            assert recipe.network().eval()(x).shape == (2, classes)

    def test_trained_networks_are_kept(self, tmp_path):
        work = ordinary_models.task("adamw", 0)
        few = tuple(t[:64] for t in work.data)
        first, seconds = ordinary_models.fitted(tmp_path, "adamw", few, 0, 1)
        again, same = ordinary_models.fitted(tmp_path, "adamw", few, 0, 1)
        assert seconds == same
        for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
            assert torch.equal(a, b)
        assert len(list(tmp_path.iterdir())) == 1
        ordinary_models.fitted(tmp_path, "adamw", few, 1, 1)
        assert len(list(tmp_path.iterdir())) == 2


def test_over_ranks(tmp_path):
    """What a step of foci sends is what docs/distributed.md says."""
    path = tmp_path / "result.json"
    assert over_ranks.main(["--quick", "--repeats", "1", "--output", str(path)]) == 0
    record = results.load(path)
    assert record["bytes_a_step"]["measured"] == record["bytes_a_step"]["counted"] == 8036
    assert [each["p"] for each in record["points"]] == [2000, 1000]


def test_the_tables_of_influence_are_those_on_record():
    record = json.loads((ROOT / "benchmarks/results/influence.json").read_text())
    guide = (ROOT / "docs/models.md").read_text()
    for shown in influence.tables(record):
        assert shown in guide
    assert record["dirty"] is False
    seeds = {each["seed"] for each in record["trainings"]}
    assert seeds.isdisjoint({0, 1, 2})  # which settings were chosen with


def test_scores_of_wrong_labels():
    data, wrong, validation, _ = influence.task("mlp", 0)
    assert int(wrong.sum()) == 100
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 10))
    few = data[0][:90], data[1][:90]
    found = influence.scores(model, few, validation, 0.01)
    assert list(found) == list(influence.SCORES)
    assert all(values.shape == (90,) and seconds >= 0 for values, seconds in found.values())
    one = {"auc": 0.9, "precision": 0.8, "seconds": 1.0}
    trained = {
        "network": "mlp",
        "scores": dict.fromkeys(influence.SCORES, one),
        "deletion": {"accuracy_test_before": 0.5, "accuracy_test_after": 0.75},
    }
    found = influence.summary([trained, trained])["mlp"]
    assert found["trainings"] == found["accuracy_test_rose"] == 2
    assert found["loss"]["auc"] == {"mean": 0.9, "least": 0.9, "largest": 0.9}


def test_ekfac_runs():
    """Systems and large networks, in their tiny forms."""
    rows = ekfac.systems(Path("nowhere"), True)
    assert {row["preconditioner"] for row in rows} == {"none", "diagonal", "EK-FAC"}
    assert all(row["iterations"]["0.1"] is not None for row in rows)
    shares = ekfac.won(rows)
    assert len(shares) == 2 * len(ekfac.DAMPINGS)
    for part in ("resnet50", "vit"):
        for data in ("retained", "statistics"):
            found = ekfac.deletion(part, data, True)
            assert found["method"] == "ekfac"
            assert found["loss_forget"][1] > found["loss_forget"][0]
        assert ekfac.products(part, True)["relative_difference"] < 1e-5
