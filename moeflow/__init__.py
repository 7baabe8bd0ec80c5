"""Run any transformers mixture-of-experts model inside the memory you name.

The public names are those of `__all__`; all else may move. Importing this package imports neither torch nor
transformers: a name is resolved when it is first used.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeflow.engine.engine import Engine
    from moeflow.engine.sampling_params import SamplingParams
    from moeflow.errors import MoeflowError
    from moeflow.fit.fit import fit
    from moeflow.loading.load_moe import load_moe

__version__ = "0.1.0"
__all__ = ["Engine", "MoeflowError", "SamplingParams", "__version__", "fit", "load_moe"]

_HOMES = {
    "Engine": "moeflow.engine.engine",
    "MoeflowError": "moeflow.errors",
    "SamplingParams": "moeflow.engine.sampling_params",
    "fit": "moeflow.fit.fit",
    "load_moe": "moeflow.loading.load_moe",
}

# In a checkout the sub-packages kernels/, placement/ and predictors/ lie beside this folder. Appending the
# checkout keeps them together with the moeflow that was imported, even when another copy is installed.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file():
    __path__.append(str(_checkout))
del _checkout


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'moeflow' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
