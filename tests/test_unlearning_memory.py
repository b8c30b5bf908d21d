"""Memory: what is available, the default limit, what is lowered for it, and what is kept."""

import dataclasses
import importlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lcodec_ext._torch import memory
from lcodec_ext._torch.loss import euclidean_norm, in_parts
from lcodec_ext.curvature import UnitSelection, all_trainable, layout
from lcodec_ext.unlearning import Settings, estimate, unlearn
from lcodec_ext.unlearning.limit import SHARE
from lcodec_ext.unlearning.workload import HISTORY, Graphs, Sizes, Workload

X = torch.randn(400, 12, generator=torch.Generator().manual_seed(0))
Y = (X[:, :4] + 0.5 * torch.randn(400, 4, generator=torch.manual_seed(1))).argmax(1)
PARTS = (X[:8], Y[:8]), (X[8:250], Y[8:250]), cross_entropy
HELD = X[250:], Y[250:]
CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------
# What is available


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A file system of a machine with 1000 kB available."""
    monkeypatch.setattr(memory, "_ROOT", tmp_path)

    def write(path, text):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    write("proc/meminfo", "MemTotal: 4000 kB\nMemFree: 10 kB\nMemAvailable: 1000 kB\n")
    write("proc/self/cgroup", "")
    return write


def test_what_the_system_has_available(root):
    assert memory.available_memory(CPU) == 1_024_000


@pytest.mark.parametrize("top", ["sys/fs/cgroup", "sys/fs/cgroup/unified"])
def test_control_groups_of_version_2(root, top):
    """Those above count, and files that may be forgotten do not."""
    root("proc/self/cgroup", "0::/batch/job\n")
    root(f"{top}/batch/job/memory.max", "max\n")
    root(f"{top}/batch/job/memory.current", "5000\n")
    assert memory.available_memory(CPU) == 1_024_000
    root(f"{top}/batch/memory.max", "90000\n")
    root(f"{top}/batch/memory.current", "50000\n")
    assert memory.available_memory(CPU) == 40_000
    root(f"{top}/batch/memory.stat", "anon 7\ninactive_file 20000\n")
    assert memory.available_memory(CPU) == 60_000
    root(f"{top}/batch/job/memory.max", "6000\n")
    assert memory.available_memory(CPU) == 1000


def test_control_groups_of_version_1_in_a_container(root):
    """The path is the host's, and only the top is there."""
    root("proc/self/cgroup", "9:name=systemd:/\n4:cpu,memory:/docker/0a1b\n0::/\n")
    top = "sys/fs/cgroup/memory"
    root(f"{top}/memory.usage_in_bytes", "300000\n")
    root(f"{top}/memory.limit_in_bytes", f"{2**63 - 4096}\n")
    assert memory.available_memory(CPU) == 1_024_000
    root(f"{top}/memory.limit_in_bytes", "500000\n")
    root(f"{top}/memory.stat", "cache 9\ntotal_inactive_file 1000\n")
    assert memory.available_memory(CPU) == 201_000
    root(f"{top}/memory.limit_in_bytes", "1000\n")
    assert memory.available_memory(CPU) == 0


def test_nothing_tells_on_other_systems(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_ROOT", tmp_path)
    assert memory.available_memory(CPU) is None
    assert memory.available_memory(torch.device("mps")) is None


def test_a_gpu_has_what_is_free_and_what_pytorch_keeps(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert memory.available_memory(torch.device("cuda")) == 1300


# ---------------------------------------------------------------------------------------------
# The default


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 300), nn.ReLU(), nn.Linear(300, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(model(X[:250]), Y[:250]).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def available(monkeypatch):
    def set_to(n):
        module = importlib.import_module("lcodec_ext.unlearning.limit")
        monkeypatch.setattr(module, "available_memory", lambda device: n)

    return set_to


def deleted(model, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = unlearn(model, *PARTS, validation=HELD, **options)
    return result, [str(w.message) for w in caught if "default of max_memory" in str(w.message)]


def test_enough_memory_changes_nothing(model, available):
    available(None)
    without, _ = deleted(model, finish=0)
    available(2**40)
    result, told = deleted(model, finish=0)
    assert told == []
    assert result.chosen == {}
    assert result.estimate is None
    assert result.settings.max_memory is None
    for a, b in zip(result.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_closer_look_may_find_that_it_fits(model, available, monkeypatch):
    """The quick look takes graphs for larger than they are; nothing is lowered for that."""
    peak = estimate(model, *PARTS, validation=HELD, finish=0).memory["peak"]
    module = importlib.import_module("lcodec_ext.unlearning.estimate")
    monkeypatch.setattr(module, "_GRAPH", 10**6)
    available(int(1.05 * peak / SHARE))
    result, told = deleted(model, finish=0)
    assert (told, result.chosen, result.estimate) == ([], {}, None)


def test_too_little_memory_lowers_settings_and_says_so(model, available):
    whole = estimate(model, *PARTS, validation=HELD, finish=0).memory["peak"]
    available(int(0.6 * whole / SHARE))
    result, told = deleted(model, finish=0)
    (text,) = told
    assert result.chosen["max_memory"] == int(SHARE * int(0.6 * whole / SHARE))
    lowered = result.chosen.keys() - {"max_memory"}
    assert lowered
    assert all(f"{name}={result.chosen[name]}" in text for name in lowered)
    assert "75% of the" in text
    assert "It costs time" in text
    assert ("a less exact step" in text) == ("max_iterations" in lowered)
    assert result.estimate.memory["peak"] <= result.chosen["max_memory"]
    assert estimate(model, *PARTS, validation=HELD, finish=0).chosen == result.chosen


def test_what_does_not_fit_is_refused_before_anything_is_done(model, available):
    available(1000)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(
        ValueError,
        match=r"does not fit 750 bytes, 75% of the 1,000 that are available .*: it takes [\d,]+ "
        "bytes. Allow that much, with max_memory, or select fewer parameters",
    ):
        deleted(model, inplace=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    with pytest.raises(ValueError, match="or compute in float32"):
        deleted(model, dtype=torch.float64)


def test_a_limit_of_ones_own_comes_first(model, available):
    available(1000)
    result, told = deleted(model, finish=0, max_memory=10**12)
    assert told == []
    assert result.chosen == {}


def test_a_theorem_has_no_limit(available):
    """Its step cannot be made cheaper."""
    available(1000)
    module = importlib.import_module("lcodec_ext.unlearning.limit")
    certified = Settings.preset("recommended", update="certified", epsilon=1.0, delta=0.1)
    assert module.Limit.of(certified, CPU) is None
    assert module.Limit.of(Settings(), CPU).most == 750


# ---------------------------------------------------------------------------------------------
# What is counted


def test_l_bfgs_keeps_fewer_pairs_where_memory_is_limited():
    sizes = Sizes(5, 1000, 100, 10, 10**6, 10**6, 10**6, 4, batch_norm=False)
    settings = Settings.preset("recommended", **CALIBRATED)
    found = {}
    for most in (None, 10**12, 120_000_000, 80_000_000):
        load = Workload(dataclasses.replace(settings, max_memory=most), sizes, Graphs(0, 0))
        found[most] = load.history
    assert found[None] == found[10**12] == HISTORY
    assert 2 < found[120_000_000] < HISTORY
    assert found[80_000_000] == 2
    few = dataclasses.replace(settings, finish=3)  # iterations, each of which adds one
    assert Workload(few, sizes, Graphs(0, 0)).history == 3
    batches = Workload(settings, dataclasses.replace(sizes, n_retain=10**5), Graphs(0, 0))
    assert not batches.l_bfgs


CALIBRATED = {"calibrate": True, "damping": 0.0, "output_damping": 0.0, "lengthen": None}


def test_the_gradient_before_goes_where_the_selection_is_known(model):
    """Its norm on the selection is the same, taken before or after."""
    whole, _ = deleted(model, finish=0)
    given, _ = deleted(model, finish=0, selection=all_trainable(model))
    assert whole.gradient_norm_selected.before == given.gradient_norm_selected.before
    assert whole.gradient_norm_selected.before == pytest.approx(whole.gradient_norm.before)


def test_large_tensors_are_taken_in_parts(monkeypatch):
    module = importlib.import_module("lcodec_ext._torch.loss")
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Linear(7, 6), nn.LayerNorm(6))
    selection = UnitSelection({"0": [1, 3], "1": [0, 5], "2": [2]})
    whole = selection.gather(network)
    with torch.no_grad():
        monkeypatch.setattr(layout, "_LARGE", 1)
        assert torch.equal(selection.gather(network), whole)
        mixed = {k: p.double() if k == "1.bias" else p for k, p in network.named_parameters()}
        assert selection.gather(mixed, model=network).dtype == torch.float64
    assert selection.gather(network).requires_grad
    before = euclidean_norm(network.parameters())
    monkeypatch.setattr(module, "_PART", 4)
    assert [len(part) for part in in_parts(torch.zeros(3, 3))] == [4, 4, 1]
    assert euclidean_norm(network.parameters()) == pytest.approx(before, rel=1e-12)


def test_the_page_has_what_was_recorded():
    root = Path(__file__).parent.parent
    found = json.loads((root / "benchmarks/results/large_models.json").read_text())
    page = (root / "docs/models.md").read_text()
    assert not found["settings"]["quick"]
    for way in found["large_models"].values():
        assert not way["dirty"]
        assert way["parameters"] > 10**8
        assert way["peak_rss"] < 24 * 2**30
        assert way["peak"] < way["expected"]["memory"]["peak"]
        assert way["skipped"] == 0
    names = {"estimate": "estimate", "L-BFGS, tried first": "finish", "calibration": "calibration"}
    for way in found["large_models"].values():
        assert f"took {way['peak_rss'] / 1e9:.1f} GB in all" in page
        for shown, name in names.items():
            gb, seconds = way["peaks"][name] / 1e9, way["phases"][name]
            assert f"| {shown} | {gb:.1f} | {seconds:.0f} |" in page
        expected = way["expected"]["memory"]["peak"] / 1e9
        last = f"| {way['peak'] / 1e9:.1f} ({expected:.1f} expected) | {way['seconds']:.0f} |"
        assert last in page
    seconds = found["large_models"]["ekfac"]["expected"]["seconds"]["total"]
    assert f"said {seconds:.0f} seconds" in page


PEAK = """
import importlib, resource, sys, warnings
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from lcodec_ext.curvature import GaussNewtonOperator, UnitSelection, per_sample_gradients
from lcodec_ext.unlearning import estimate, unlearn

def kept(name):
    status = open("/proc/self/status").read().split()
    return 1024 * int(status[status.index(name + ":") + 1])

def taken(do):
    open("/proc/self/clear_refs", "w").write("5")  # sets the peak back
    before = kept("VmRSS")
    do()
    return kept("VmHWM") - before

torch.set_num_threads(1)
warnings.simplefilter("ignore")
torch.manual_seed(0)
"""

DELETION = """
block = nn.TransformerEncoderLayer(256, 4, 1024, 0.0, batch_first=True)
class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(2000, 256)
        self.encoder = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(256, 4)
    def forward(self, x):
        return self.head(self.encoder(self.tokens(x)).mean(1))

x, y = torch.randint(0, 2000, (50, 6)), torch.arange(50) % 4
parts = (x[:3], y[:3]), (x[3:35], y[3:35]), cross_entropy
options = {"validation": (x[35:], y[35:]), "n_curvature": 6, "finish": 3, "curvature": sys.argv[1]}
unlearn(nn.Sequential(nn.Embedding(2000, 4), nn.Flatten(), nn.Linear(24, 4)), *parts, **options)
module = importlib.import_module("lcodec_ext.unlearning.limit")
module.available_memory = lambda device: int(sys.argv[2])
model = Classifier().eval()
found = []
peak = taken(lambda: found.append(unlearn(model, *parts, **options)))
expected = estimate(model, *parts, **options).memory["peak"]
print(peak, expected, int("max_memory" in found[0].chosen))
"""

PRODUCTS = """
model = nn.Sequential(nn.Linear(100, 400), nn.Tanh(), nn.Linear(400, 3)).eval()
selection = UnitSelection.all(model)
def product(n):
    x, y = torch.randn(n, 100), torch.arange(n) % 3
    data = [(x[k:k + 50], y[k:k + 50]) for k in range(0, n, 50)]
    operator = GaussNewtonOperator(model, cross_entropy, data, selection, cache_bytes=0)
    operator @ torch.ones(operator.shape[0])
def gradients(n):
    x, y = torch.randn(n, 100), torch.arange(n) % 3
    chunks = per_sample_gradients(model, cross_entropy, (x, y), selection, max_bytes=2**24)
    sum(float(chunk.dense().sum()) for chunk in chunks)
for do in (product, gradients):
    do(100)
    print(*(taken(lambda: do(n)) for n in (200, 3000)))
"""

FACTORS = """
from lcodec_ext.curvature import all_trainable
from lcodec_ext.curvature.kronecker import EKFACOperator, KroneckerOperator
from lcodec_ext.curvature.kronecker.plan import plan_blocks
from lcodec_ext.curvature.masked.model import MaskedModel
model = nn.Sequential(*(nn.Linear(500, 500) for _ in range(24))).eval()
x, y = torch.randn(4, 500), torch.arange(4)
made = []
masked = MaskedModel(model, all_trainable(model), None)
print(taken(lambda: plan_blocks(masked)) / masked.size)
few = nn.Sequential(*(nn.Linear(50, 50) for _ in range(2)))
factors = EKFACOperator(few, cross_entropy, (x[:, :50], y), all_trainable(few)).factors
del masked
wide = [(torch.eye(2000), torch.rand(2000, 2000, dtype=torch.float64)) for _ in range(3)]
blocks = [type(factors.blocks[0])(("w",), None, Q, Q[0], Q, values) for Q, values in wide]
factors = type(factors)(12_000_000, 4, "model", 0, 1, tuple(blocks))
print(taken(lambda: made.append(KroneckerOperator(factors, 0.25))) / factors.size)
"""


def run(text, *arguments):
    command = [sys.executable, "-P", "-c", PEAK + text, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")


needs_peaks = pytest.mark.skipif(sys.platform != "linux", reason="reads and writes /proc")


@needs_peaks
@pytest.mark.parametrize(
    ("curvature", "n", "tight"),
    [("gauss_newton", 370_000_000, True), ("ekfac", 330_000_000, False)],
)
def test_the_peak_of_a_transformer_is_within_the_default(curvature, n, tight):
    """Of two million parameters: with less than a calibration would take, and without products."""
    peak, expected, lowered = map(int, run(DELETION, curvature, n)[-2].split())
    assert bool(lowered) == tight
    assert expected <= SHARE * n
    assert 0.5 <= peak / expected <= 1.33


@needs_peaks
def test_peaks_do_not_grow_with_the_samples():
    """Of products and of gradients by sample: 15 times as many take 20 MB more at most."""
    for line in run(PRODUCTS)[:2]:
        few, many = map(int, line.split())
        assert many <= few + 20_000_000


@needs_peaks
def test_factors_are_held_once():
    """Bytes a parameter: of the plan of the blocks, and of an operator beside its factors."""
    planned, beside = map(float, run(FACTORS)[:2])
    assert planned < 12
    assert beside < 1
