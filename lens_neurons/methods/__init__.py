"""Identification methods: one file each, all functions of recorded data, listed in one registry.

Importing a method's file registers it. The functions are not repeated here: a function that bears its module's name
would be replaced by the module.
"""

from lens_neurons.methods import fixed_count as _fixed_count
from lens_neurons.methods import lape as _lape
from lens_neurons.methods.registry import cite, identify, list_methods, method

__all__ = ["cite", "identify", "list_methods", "method"]

_REGISTERED = (_fixed_count, _lape)
