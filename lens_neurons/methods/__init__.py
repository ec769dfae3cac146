"""Identification methods: one file each, all functions of recorded data, listed in one registry."""

from lens_neurons.methods.fixed_count import fixed_count
from lens_neurons.methods.lape import lape
from lens_neurons.methods.registry import cite, identify, list_methods, method

__all__ = ["cite", "fixed_count", "identify", "lape", "list_methods", "method"]
