"""What xi is made of: integers that every backend delivers, and the rationals made of them."""

import math
from operator import mul
from typing import NamedTuple

from lcodec_ext.dependence.limits import PairSums


class RankSums(NamedTuple):
    """Sums over a response of n rows, with max ranks R and L = #{y_j >= y_i}."""

    denominator: int  # sum L_i (n - L_i); 0 if y is constant
    total: int  # sum R_i
    squares: int  # sum R_i^2
    minima: int  # sum_ij min(R_i, R_j)
    minima_squares: int  # sum_ij min(R_i, R_j)^2
    minima_rows: int  # sum_i (sum_j min(R_i, R_j))^2
    distance_rows: int  # sum_i (sum_j abs(R_i - R_j))^2
    cube: float  # trace of the cube of the centred min(R_i, R_j), over n^3

    def limit_variance(self, n: int) -> int:
        """n^6 (a - 2 b + c^2), the numerator of the variance in Chatterjee (2021), Theorem 2.2."""
        return n * n * self.minima_squares - 2 * n * self.minima_rows + self.minima**2

    def distances(self, n: int) -> PairSums:
        """Sums of the kernel abs(R_i - R_j)."""
        squares = 2 * (n * self.squares - self.total**2)
        return PairSums(n, 1, 2 * self.denominator, self.distance_rows, squares)


class PathSums(NamedTuple):
    """Lengths of responses in the order of a column x: sums of fractions where x is tied.

    The length of response j is ``sum_d lengths[j][d] / denominators[d]``. Over pairs of rows it is
    ``sum_{i != j} a_ij abs(R_i - R_j)``, and `rows` and `squares` belong to the weights a.
    """

    denominators: list[int]  # the common one alone up to 2^20; 1 where no tied rows are averaged
    rows: list[int]  # over 4 of these: sum_i (sum_j a_ij)^2
    squares: list[int]  # over 2 of these: sum_ij a_ij^2
    lengths: list[list[int]]
    cube: float  # trace of the cube of the centred a; 0 where no tied rows are averaged

    @property
    def averaged(self) -> bool:
        """Whether the lengths are expectations over orders of tied rows."""
        return self.denominators != [1]

    def length(self, j: int) -> tuple[int, int]:
        """Numerator and denominator, not always in lowest terms."""
        if len(self.denominators) == 1:
            return self.lengths[j][0], self.denominators[0]
        over = math.lcm(*self.denominators)
        return sum(map(mul, self.lengths[j], [over // each for each in self.denominators])), over

    def weights(self, n: int) -> PairSums:
        """Sums of the weights a."""
        over, rows, squares = self.denominators[0], self.rows[0], self.squares[0]
        if len(self.denominators) > 1:
            over = math.lcm(*self.denominators)
            shares = [over // each for each in self.denominators]
            rows, squares = sum(map(mul, self.rows, shares)), sum(map(mul, self.squares, shares))
        # over 2 common denominators, and the square of these
        return PairSums(n, 2 * over, (n - 1) * 2 * over, rows * over, 2 * squares * over)
