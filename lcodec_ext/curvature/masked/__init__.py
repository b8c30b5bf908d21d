"""A copy of a model that is a function of the parameters of its selected units alone."""
