"""As much of pycit as a script calls: its search, and tests of another kind than its own."""

from itertools import combinations

import numpy as np
from scipy.stats import pearsonr


def _size(x):
    return np.square(x).reshape(len(x), -1).sum(1)


def itest(x_data, y_data, statistic="mixed_mi"):
    assert statistic.endswith("mi")
    return pearsonr(_size(x_data), np.ravel(y_data)).pvalue


def citest(x_data, y_data, z_data, statistic="mixed_cmi"):
    """Of the parts that a linear function of the sizes in z leaves."""
    assert statistic.endswith("cmi")
    given = np.c_[np.ones(len(x_data)), np.square(z_data)]
    x, y = (
        each - given @ np.linalg.lstsq(given, each, rcond=None)[0]
        for each in (_size(x_data), np.ravel(y_data))
    )
    return pearsonr(x, y).pvalue


class MarkovBlanket:
    """A search of PC type: what no test finds independent stays; then parents of children."""

    def __init__(self, x_data, y_data, cit_funcs):
        self.x_data, self.y_data, self.funcs = x_data, y_data, cit_funcs

    def _pvalue(self, k, given):
        x = self.x_data[:, :, k]
        if not given:
            return self.funcs["it"](x, self.y_data, **self.funcs.get("it_args", {}))
        z = self.x_data[:, :, sorted(given)].reshape(len(x), -1)
        return self.funcs["cit"](x, self.y_data, z, **self.funcs.get("cit_args", {}))

    def find_markov_blanket(self, min_conditioning=0, max_conditioning=None, confidence=0.95):
        n = self.x_data.shape[2]
        left = list(range(n))
        most = n - 1 if max_conditioning is None else max_conditioning
        for size in range(min_conditioning, most + 1):
            for k in list(left):
                others = combinations([j for j in left if j != k], size)
                if any(self._pvalue(k, given) >= 1 - confidence for given in others):
                    left.remove(k)
        for k in set(range(n)) - set(left):
            if self._pvalue(k, left) < 1 - confidence:
                left = [*left, k]
        return sorted(left)
