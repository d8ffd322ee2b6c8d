"""One file per heatmap method. Importing the package registers all that are in it; nothing else lists them."""

from importlib import import_module
from pkgutil import iter_modules

for module in iter_modules(__path__, prefix=f"{__name__}."):
    import_module(module.name)
