"""Blocks of near rows to permute values in, and a test of whether that loses anything."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._arrays import array_module, is_tensor
from lcodec_ext._one_rank import ONE_RANK
from lcodec_ext.dependence.backends.base import Backend
from lcodec_ext.dependence.classes import Response
from lcodec_ext.dependence.permutation import (
    Blocks,
    Neighbors,
    column_ranks,
    find_neighbors,
    near_blocks,
    neighbor_pairs,
    numerators,
    permuted_sums,
    reordered,
)
from lcodec_ext.dependence.ranks import AnyRanks

DOUBTFUL = 0.05  # p-values up to it speak against the permutations


class NearRows:
    """Blocks of rows with near ranks in a table, and what their permutations lose.

    Parameters
    ----------
    backend : Backend
    table : array or tensor of shape (n, k)
    least : int
        Rows of a block, at least.
    """

    def __init__(self, backend: Backend, table: Any, least: int) -> None:
        self._backend, self._table = backend, table
        self._ranks = column_ranks(table)
        self.blocks: Blocks = near_blocks(self._ranks, least)

    def exchangeability(
        self,
        permuted: list[Response],
        seed: int,
        n_permutations: int,
        ranks: AnyRanks = ONE_RANK,
    ) -> float:
        """A p-value of the assumption that values are exchangeable within the blocks.

        It tests by T(values, ranks of the table), which is too large for its permutations where
        values follow the table within a block. Exact: under the assumption it is at most alpha with
        probability alpha at most. Of several columns, or classes, the largest T counts, in standard
        deviations of its permutations, which `ranks` share out.
        """
        with ranks.alone("the search for near rows"):
            weighted = neighbor_pairs(self._near())
            pairs = reordered(weighted.pairs, self.blocks.position)
        largest = np.full(n_permutations + 1, -np.inf)
        for R, sums in permuted:
            if not sums.constant:
                moved = R[self.blocks.order]
                found = permuted_sums(
                    self._backend, pairs, moved, self.blocks.start, seed, n_permutations + 1, ranks
                )
                largest = np.maximum(largest, _in_deviations(numerators(found, weighted)[0]))
        return int((largest >= largest[0]).sum()) / len(largest)  # the data are among them

    def _near(self) -> Neighbors:
        """The nearest rows by the ranks of the table."""
        ranks: Any = self._ranks
        if is_tensor(self._table):
            ranks = array_module(self._table).from_numpy(ranks).to(self._table.device)
        return find_neighbors(self._backend, ranks, np.ones(ranks.shape[1]), "average", 0)


def _in_deviations(values: list[int]) -> NDArray[np.float64]:
    """Integers less their mean, in standard deviations: equal ones stay equal, on any machine."""
    n, total = len(values), sum(values)
    spread = math.isqrt((n * sum(v * v for v in values) - total * total) << 128)
    if spread == 0:
        return np.zeros(n)
    return np.array([((n * v - total) << 64) / spread for v in values])
