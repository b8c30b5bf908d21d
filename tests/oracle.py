"""CODEC and FOCI once more in pure Python, from the definitions alone, for small inputs.

Shares nothing with the package: lists of floats, fractions, loops. Distances are exact rationals
of the given values, so it is meant for columns whose float arithmetic is exact (small integers).
"""

from fractions import Fraction
from itertools import permutations


def mean_minima(columns, y, k=1):
    """sum_i m_i over the k nearest rows, in all orders of equally near ones."""
    n = len(y)
    R = [sum(b <= a for b in y) for a in y]
    total = Fraction(0)
    for i in range(n):
        distance = {
            j: sum((Fraction(c[i]) - Fraction(c[j])) ** 2 for c in columns)
            for j in range(n)
            if j != i
        }
        left = k  # places, filled by one group of equally near rows after the other
        for near in sorted(set(distance.values())):
            tied = [j for j, d in distance.items() if d == near]
            share = Fraction(min(left, len(tied)), len(tied))
            total += share * sum(min(R[i], R[j]) for j in tied) / k
            left -= min(left, len(tied))
    return total


def T(columns, y, k=1):
    n = len(y)
    L = [sum(b >= a for b in y) for a in y]
    numerator = n * mean_minima(columns, y, k) - sum(v * v for v in L)
    return numerator / sum(v * (n - v) for v in L)


def conditional_T(z, x, y, k=1):
    R = [sum(b <= a for b in y) for a in y]
    m_x = mean_minima(x, y, k)
    return (mean_minima(x + z, y, k) - m_x) / (sum(R) - m_x)


def Tq(columns, ys, k=1):
    """T^q of several responses in their order (Ansari and Fuchs); constant ones are left out."""
    ys = [y for y in ys if len(set(y)) > 1]
    above = below = Fraction(len(ys))
    for i, y in enumerate(ys):
        above -= T(ys[:i] + columns, y, k)
        below -= T(ys[:i], y, k) if i else 0
    return 1 - above / below


def conditional_Tq(z, x, ys, k=1):
    return (Tq(x + z, ys, k) - Tq(x, ys, k)) / (1 - Tq(x, ys, k))


def mean_Tq(columns, ys, k=1):
    """The mean of Tq over all orders of the responses."""
    orders = list(permutations([y for y in ys if len(set(y)) > 1]))
    return sum(Tq(columns, list(order), k) for order in orders) / len(orders)


def foci(columns, y, stop=True, T=T):
    """Ordering and cumulative T by exact comparison, lowest index on equality."""
    selected, values, last = [], [], Fraction(0)
    while len(selected) < len(columns):
        scores = {
            f: T([columns[s] for s in [*selected, f]], y)
            for f in range(len(columns))
            if f not in selected
        }
        best = min(scores, key=lambda f: (-scores[f], f))
        if stop and scores[best] <= last:
            break
        selected.append(best)
        values.append(last := scores[best])
    return selected, values
