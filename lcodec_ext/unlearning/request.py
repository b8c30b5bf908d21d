"""Which samples to delete."""

from typing import Any

import numpy as np
from torch import Tensor

from lcodec_ext._checks import check_integer, check_seed

# ---------------------------------------------------------------------------------------------
# Which samples to delete


def random_samples(n: int, m: int, seed: int = 0) -> list[int]:
    """Draw m of n sample numbers without replacement, ascending."""
    check_integer(n, "n", 1)
    if check_integer(m, "m", 1) > n:
        raise ValueError(f"m must be at most n, the number of samples; got m={m} and n={n}")
    check_seed(seed, optional=False)
    return sorted(np.random.default_rng(seed).choice(n, m, replace=False).tolist())


def samples_of(labels: Any, value: Any) -> list[int]:
    """The numbers of the samples that have a label: all of a class, or of one identity.

    Parameters
    ----------
    labels : array_like or Tensor, shape (n,)
        Of every training sample: its class, the person it shows, the user it came from.
    value : object
        The one to delete.
    """
    array = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if array.ndim != 1:
        raise ValueError(f"labels must have one entry a sample; got shape {array.shape}")
    found = np.flatnonzero(array == value)
    if not len(found):
        raise ValueError(f"no sample has the label {value!r}")
    return found.tolist()
