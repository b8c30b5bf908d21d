"""Run by `make check` where NumPy is the only package beside lcodec_ext: the core needs no more."""

import importlib.util
import sys

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

print(lcodec_ext.build_info())
print(lcodec_ext.cuda_status())
