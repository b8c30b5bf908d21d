"""Everything drawn at random: tied neighbours, noise, the order of rows, permutations."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_BLOCK = 64  # columns of noise that are transposed together


def mixed(word: NDArray[np.uint64]) -> NDArray[np.uint64]:
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
    start = mixed(np.array([(seed + _GAMMA) & _MASK], dtype=np.uint64))
    rows = np.arange(1, n + 1, dtype=np.uint64)
    return mixed(start + rows * np.uint64(_GAMMA))


def pick(word: int, count: int) -> int:
    """Which of ``count`` tied neighbours (in increasing index) a row's word picks."""
    return (int(word) * count) >> 64


def tie_seed(ties: str, seed: int | None) -> int:
    """The seed for a tie rule: for "random" and None fresh entropy of the operating system."""
    if ties != "random":
        return 0
    return fresh_seed() if seed is None else seed


def random_order(n: int, seed: int, stream: int) -> NDArray[np.int64]:
    """The numbers below n in random order, a function of the seed, the stream and n.

    They are sorted by words of ``Philox(seed).jumped(stream)``, so that streams can be drawn in any
    order, and the order is the same with every version of NumPy.
    """
    words = np.random.Philox(seed).jumped(stream).random_raw(n)
    return np.argsort(words, kind="stable")


def gaussian_noise(
    n: int, sigmas: NDArray[np.float64], seed: int, streams: Sequence[int] | None = None
) -> NDArray[np.float64]:
    """n rows of independent N(0, sigma^2), one Philox stream per column.

    Column k draws from ``Generator(Philox(seed).jumped(streams[k]))``, by default from stream k:
    2**128 draws apart, and the same noise for a column whatever the other columns are.
    """
    streams = range(len(sigmas)) if streams is None else streams
    noise = np.empty((n, len(sigmas)))
    philox = np.random.Philox(seed)
    generator = np.random.Generator(philox)
    state = philox.state
    for first in range(0, len(sigmas), _BLOCK):
        columns = slice(first, first + _BLOCK)
        block = np.empty((len(sigmas[columns]), n))
        for stream, row in zip(streams[columns], block, strict=True):
            state["state"]["counter"][2] = stream  # what jumped sets, in a tenth of the time
            philox.state = state
            generator.standard_normal(out=row)
        noise[:, columns] = (sigmas[columns, None] * block).T
    return noise


def fresh_seed() -> int:
    """A seed from the operating system's entropy."""
    return int(np.random.SeedSequence().generate_state(1, np.uint64)[0])


def _philox(key: int, counter: tuple[int, int, int, int]) -> list[int]:
    """The four words of Philox4x64-10 (Salmon, Moraes, Dror and Shaw 2011) for key (key, 0)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key, 0
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * c0, 1 << 64)
        high1, low1 = divmod(0xCA5A826395121157 * c2, 1 << 64)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & _MASK, (k1 + 0xBB67AE8584CAA73B) & _MASK
    return [c0, c1, c2, c3]


def _bounded(bound: int, seed: int, stream: int, i: int) -> int:
    """One of the integers from 0 to bound - 1, each as likely as any other (Lemire 2019)."""
    attempt = 0
    while True:
        words = _philox(seed, (i // 8, attempt, stream, 0))
        word = (words[i % 8 // 2] >> (32 * (i % 2))) & 0xFFFFFFFF
        value, rest = divmod(word * bound, 1 << 32)
        if rest >= (1 << 32) % bound:
            return value
        attempt += 1


def permutation(
    n: int, seed: int, stream: int, start: NDArray[np.int32] | None = None
) -> NDArray[np.int64]:
    """Whose response each of n rows has under permutation `stream` of a seed.

    Fisher and Yates, from the last row to the first one: row i is exchanged with one of the rows
    from ``start[i]``, where its block begins, to i. Stream 0 leaves all rows as they are. What row
    i draws is a function of seed, stream and i, so that every backend can draw it by itself; the
    native twin, which says which words it takes, is ``csrc/common/philox.hpp``.
    """
    rows = list(range(n))
    for i in reversed(range(n if stream else 0)):
        low = 0 if start is None else int(start[i])
        j = low + _bounded(i - low + 1, seed, stream, i)
        rows[i], rows[j] = rows[j], rows[i]
    return np.array(rows, dtype=np.int64)
