"""CODEC and FOCI once more in pure Python, from the definitions alone, for small inputs.

Shares nothing with the package: lists of floats, fractions, loops. Distances are exact rationals
of the given values, so it is meant for columns whose float arithmetic is exact (small integers).
"""

from fractions import Fraction


def mean_minima(columns, y):
    """sum_i m_i under averaged ties; columns are lists of numbers."""
    n = len(y)
    R = [sum(b <= a for b in y) for a in y]
    total = Fraction(0)
    for i in range(n):
        distance = {
            j: sum((Fraction(c[i]) - Fraction(c[j])) ** 2 for c in columns)
            for j in range(n)
            if j != i
        }
        nearest = min(distance.values())
        tied = [j for j, d in distance.items() if d == nearest]
        total += Fraction(sum(min(R[i], R[j]) for j in tied), len(tied))
    return total


def T(columns, y):
    n = len(y)
    L = [sum(b >= a for b in y) for a in y]
    numerator = n * mean_minima(columns, y) - sum(v * v for v in L)
    return numerator / sum(v * (n - v) for v in L)


def conditional_T(z, x, y):
    R = [sum(b <= a for b in y) for a in y]
    m_x = mean_minima(x, y)
    return (mean_minima(x + z, y) - m_x) / (sum(R) - m_x)


def foci(columns, y, stop=True):
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
