"""The language-specific neurons of multilingual language models: find, steer, measure and show them.

The public names are listed in `__init__.pyi` and imported when they are first used, so that `import lens_neurons`
costs nothing.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
