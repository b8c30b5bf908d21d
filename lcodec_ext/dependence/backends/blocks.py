"""The backend of tables that are read in blocks of columns: another one computes on each block."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcodec_ext.dependence.backends.base import (
    Backend,
    Columns,
    Engine,
    HostBackend,
    HostEngine,
    Pairs,
    RowNumbers,
    Scores,
    Ties,
)
from lcodec_ext.dependence.backends.block_table import BlockTable, block_table
from lcodec_ext.dependence.backends.resolve import BackendLike, resolve


class BlockEngine(HostEngine):
    """An engine that reads its columns again in every step, block by block.

    Each block gets an engine of its own, which has the selected columns, too; these stay in memory.
    Nothing else is kept from step to step, so columns are sorted again in each.
    """

    def __init__(
        self,
        backend: HostBackend,
        table: BlockTable,
        factors: NDArray,
        R: NDArray[np.int64],
        ties: Ties,
        seed: int,
    ) -> None:
        super().__init__(len(factors))
        self.piece = table.width
        self._backend, self._table, self._factors = backend, table, factors
        self._given = R, ties, seed
        self._behind: list[NDArray] = []

    def select(self, column: int) -> None:
        super().select(column)
        self._behind.append(self._table.take([column])[:, 0])

    def row_sums(self, column: int) -> tuple[Any, Any]:
        return self._engine(np.array([column])).row_sums(0)

    def score(self, columns: NDArray[np.int64], floor: int | None = None) -> Scores:
        scores = np.empty((2, len(columns)), dtype=np.int64)
        for begin in range(0, len(columns), self.piece):
            some = slice(begin, begin + self.piece)
            scores[:, some] = self._score(columns[some], floor)
            if floor is not None:  # a candidate with an equal sum is still wanted
                floor = max(floor, int(scores[0, some].max()) - 1)
        return scores[0], scores[1]

    def _score(self, columns: NDArray[np.int64], floor: int | None) -> Scores:
        return self._engine(columns).score(np.arange(len(columns)), floor)

    def _engine(self, columns: NDArray[np.int64]) -> Engine:
        """An engine for some columns, numbered from 0; it lasts until the next one."""
        block = self._backend.lay_out(self._table.block(columns, self._behind))
        factors = self._factors[[*columns, *self._selected]]
        engine = self._backend.engine(block, factors, *self._given)
        for place in range(len(columns), len(factors)):
            engine.select(place)
        return engine


class BlockBackend(Backend):
    """A backend on the CPU, for arrays and for tables that are read in blocks.

    A table that fits into its memory in one block is read once, and is an array from then on.
    """

    tensors = False

    def __init__(self, backend: HostBackend) -> None:
        self._backend = backend

    def lay_out(self, X: Any) -> Columns:
        if not isinstance(X, BlockTable):
            return self._backend.lay_out(X)
        return self._backend.lay_out(X.in_memory()) if X.width == X.shape[1] else X

    def engine(self, columns: Any, factors: Any, R: Any, ties: Ties, seed: int) -> Engine:
        if not isinstance(columns, BlockTable):
            return self._backend.engine(columns, factors, R, ties, seed)
        return BlockEngine(self._backend, columns, factors, R, ties, seed)

    def nearest(self, columns: Any, ties: Ties, seed: int, factors: Any = None) -> tuple[Any, Any]:
        return self._backend.nearest(columns, ties, seed, factors)

    def nearest_minima(
        self, columns: Any, factors: Any, used: list[int], R: Any, k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        if isinstance(columns, BlockTable):
            columns, factors = self._backend.lay_out(columns.take(used)), factors[used]
            used = list(range(len(used)))
        return self._backend.nearest_minima(columns, factors, used, R, k)

    def permuted_sums(
        self, pairs: Pairs, R: Any, start: RowNumbers | None, seed: int, count: int, first: int = 0
    ) -> NDArray[np.int64]:
        return self._backend.permuted_sums(pairs, R, start, seed, count, first)

    def permutations(
        self, n: int, start: RowNumbers | None, seed: int, first: int, count: int
    ) -> NDArray:
        return self._backend.permutations(n, start, seed, first, count)

    def ranks(self, y: Any) -> tuple[Any, Any]:
        return self._backend.ranks(y)


def in_blocks(backend: BackendLike, X: Any, y: Any, max_memory: float | None) -> tuple[Any, Any]:
    """A backend and X for it: a `BlockTable` if X is read in blocks, otherwise as they are."""
    chosen = resolve(backend, X=X, y=y)
    table = block_table(X, "X", max_memory, chosen.lay_out)
    if table is None:
        return chosen, X
    if not isinstance(chosen, HostBackend):
        raise ValueError(
            "X is read in blocks, which are computed on the CPU; got another backend: pass "
            "backend='cpu'"
        )
    return BlockBackend(chosen), table
