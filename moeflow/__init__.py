"""Run any transformers mixture-of-experts model inside the memory you name.

`load_moe` is the one name most people need. Importing this package imports neither torch nor
transformers: names are resolved on first use.
"""

from pathlib import Path

__version__ = "0.1.0"
__all__ = ["MoeflowError", "__version__", "load_moe"]

# In a checkout the sub-packages kernels/, placement/ and predictors/ lie beside this folder. Appending the
# checkout keeps them together with the moeflow that was imported, even when another copy is installed.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file():
    __path__.append(str(_checkout))
del _checkout


def __getattr__(name):
    if name == "load_moe":
        from moeflow.loading.load_moe import load_moe

        return load_moe
    if name == "MoeflowError":
        from moeflow.errors import MoeflowError

        return MoeflowError
    raise AttributeError(f"module 'moeflow' has no attribute {name!r}")
