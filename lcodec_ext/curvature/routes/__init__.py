"""How a matrix multiplies: the cheapest way that is exact for the case.

A route is built in one pass over the data, and has the matrix of the objective without damping.
"""
