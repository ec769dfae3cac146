"""Identification methods: one file each, all functions of recorded data, listed in one registry.

Every file in this folder is imported, which registers what it decorates; so a method is added by adding its file. The
functions are not repeated here: a function that bears its module's name would be replaced by the module.
"""

import importlib
import pkgutil

from lens_neurons.methods.registry import cite, collect_for, identify, list_methods, method

__all__ = ["cite", "collect_for", "identify", "list_methods", "method"]

for _found in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_found.name}")
