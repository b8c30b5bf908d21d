"""ROC of Markov blankets of the Bullseye network, by CODEC and by mutual information."""

import argparse

import h5py
import numpy as np
from codec import codec2, codec3
from pycit import MarkovBlanket, citest, itest
from scipy.spatial import cKDTree

parser = argparse.ArgumentParser()
parser.add_argument("--data", default="bullseye.h5")
parser.add_argument("--runs", type=int, default=2)
parser.add_argument("--trials", type=int, default=9)
parser.add_argument("--max_conditioning", type=int, default=1)
parser.add_argument("--outfile", default="roc.npz")
args = parser.parse_args()
TRUE, FALSE = {2, 3, 4, 5}, {0, 1}


def it(x, y):
    return 1 - codec2(x, y)


def cit(x, y, z):
    return 1 - codec3(x, y, z)


def it_permuted(x, y):
    observed = codec2(x, y)
    return np.mean([codec2(x, np.random.permutation(y)) >= observed for _ in range(args.trials)])


def near_permutation(z):
    """A row near each row in z, no row twice where that is possible."""
    near = cKDTree(z).query(z, 5, p=np.inf)[1]
    used, order = set(), np.empty(len(z), int)
    for row in np.random.permutation(len(z)):
        choice = np.random.permutation(near[row])
        order[row] = next((k for k in choice if k not in used), choice[0])
        used.add(order[row])
    return order


def cit_permuted(x, y, z):
    observed = codec3(x, y, z)
    drawn = [codec3(x, y[near_permutation(z)], z) for _ in range(args.trials)]
    return np.mean([each >= observed for each in drawn])


METHODS = {
    "codec": {"it": it, "cit": cit},
    "codec_perm": {"it": it_permuted, "cit": cit_permuted},
    "cmi": {"it": itest, "it_args": {"statistic": "ksg_mi"}, "cit": citest,
            "cit_args": {"statistic": "ksg_cmi"}},
}  # fmt: skip
CONFIDENCES = [0.05, 0.1, 0.5, 0.9]
rates = {name: np.zeros((len(CONFIDENCES), 2)) for name in METHODS}
with h5py.File(args.data, "r") as file:
    for run in range(args.runs):
        np.random.seed(run)
        x, y = (np.asarray(file[f"{name}_{run}"], np.float16).astype(float) for name in "xy")
        x, y = ((each - each.mean(0)) / each.std(0) for each in (x, y))
        for name, functions in METHODS.items():
            for row, confidence in enumerate(CONFIDENCES):
                search = MarkovBlanket(x, y, dict(functions))
                found = set(
                    search.find_markov_blanket(
                        max_conditioning=args.max_conditioning, confidence=confidence
                    )
                )
                rates[name][row] += len(found & TRUE) / 4, len(found & FALSE) / 2
np.savez(args.outfile, **{name: sums / args.runs for name, sums in rates.items()})
