"""Run by `make check` where NumPy is the only package beside lcodec_ext: the core needs no more.

Every wheel of a release passes it, on each Python and architecture.
"""

import importlib.util
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import lcodec_ext

rng = np.random.default_rng(0)
X = rng.normal(size=(200, 4))
y = X[:, 2] ** 2 + 0.1 * X[:, 0]

result = lcodec_ext.foci(X, y)
assert list(result.ordering)[:1] == [2], result
assert 0 < lcodec_ext.codec(y, X[:, 2]) < 1
for name in ("torch", "sklearn", "pandas", "matplotlib", "tqdm", "scipy"):
    assert name not in sys.modules, name
said = ""
try:
    lcodec_ext.foci(X, y, group=1)
except ImportError as error:
    said = str(error)
assert said == "group= needs PyTorch: pip install 'lcodec_ext[torch]'", said
assert importlib.util.find_spec("lcodec_ext._emulated") is None, "for tests only"
assert not hasattr(lcodec_ext._core.dependence, "saturate"), "for benchmarks only"

# Eight threads at once give what one gives, and free-threaded Python stays so.
if sysconfig.get_config_var("Py_GIL_DISABLED"):
    assert not sys._is_gil_enabled(), "the module has switched the GIL on"


def measure(seed):
    x = np.random.default_rng(seed).normal(size=(150, 6))
    z = x[:, seed % 6] * x[:, 0]
    steps = lcodec_ext.foci(x, z)
    pairs = lcodec_ext.xi(x[:, 1], z), lcodec_ext.codec(z, x[:, 1], x[:, 2:4])
    tested = lcodec_ext.codec_test(z, x[:, 0], n_permutations=99, seed=seed).pvalue
    return [*steps.ordering, *steps.cumulative, *pairs, tested]


alone = [measure(seed) for seed in range(16)]
with ThreadPoolExecutor(8) as pool:
    assert list(pool.map(measure, range(16))) == alone

print(lcodec_ext.build_info())
print(lcodec_ext.cuda_status())
