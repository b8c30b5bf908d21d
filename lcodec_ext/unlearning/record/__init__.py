"""Perturbed samples, and what units and loss do on them."""
