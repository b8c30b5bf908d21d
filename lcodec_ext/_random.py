"""Everything drawn at random: the choice among tied neighbours, noise, the order of rows."""

import numpy as np
from numpy.typing import NDArray

_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_BLOCK = 64  # columns of noise that are transposed together


def _mix(word: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finaliser of splitmix64 (Steele, Lea, Flood 2014), a bijection of 64-bit words."""
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def tie_hash(seed: int, n: int) -> NDArray[np.uint64]:
    """One 64-bit word per row, a function of seed and row alone.

    ``ties="random"`` takes neighbour ``floor(word * count / 2**64)`` of a row's tied ones, so
    the draw is the same for any thread count, chunking and device. The native twin is
    ``tie_hash`` in ``csrc/common/random.hpp``.
    """
    start = _mix(np.array([(seed + _GAMMA) & _MASK], dtype=np.uint64))
    rows = np.arange(1, n + 1, dtype=np.uint64)
    return _mix(start + rows * np.uint64(_GAMMA))


def pick(word: int, count: int) -> int:
    """Which of ``count`` tied neighbours (in increasing index) a row's word picks."""
    return (int(word) * count) >> 64


def tie_seed(ties: str, seed: int | None) -> int:
    """The seed for a tie rule: for "random" and None fresh entropy of the operating system."""
    if ties != "random":
        return 0
    return int(np.random.SeedSequence().generate_state(1, np.uint64)[0]) if seed is None else seed


def random_order(n: int, seed: int, stream: int) -> NDArray[np.int64]:
    """The numbers below n in random order, a function of the seed, the stream and n.

    They are sorted by words of ``Philox(seed).jumped(stream)``, so that streams can be drawn in any
    order, and the order is the same with every version of NumPy.
    """
    words = np.random.Philox(seed).jumped(stream).random_raw(n)
    return np.argsort(words, kind="stable")


def gaussian_noise(n: int, sigmas: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """n rows of independent N(0, sigma^2), one Philox stream per column.

    Column k draws from ``Generator(Philox(seed).jumped(k))``: 2**128 draws apart, and the same
    noise for a column whatever the other columns are.
    """
    noise = np.empty((n, len(sigmas)))
    philox = np.random.Philox(seed)
    generator = np.random.Generator(philox)
    state = philox.state
    for first in range(0, len(sigmas), _BLOCK):
        columns = slice(first, first + _BLOCK)
        block = np.empty((len(sigmas[columns]), n))
        for k, row in enumerate(block, first):
            state["state"]["counter"][2] = k  # what jumped(k) sets, in a tenth of the time
            philox.state = state
            generator.standard_normal(out=row)
        noise[:, columns] = (sigmas[columns, None] * block).T
    return noise
