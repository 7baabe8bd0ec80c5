"""What a model takes and how fast it runs on a machine, said before it is loaded, and the plan that loading obeys.

Sizes come from headers alone, speeds from a machine's profile and a model of a step's time. The package is also the
public function: `moeflow.fit(model)` is `moeflow.fit.fit.fit(model)`. Knows nothing of torch or of how a model is
loaded. `loading/`, `engine/`, `chat/` and `cli/` import it.
"""

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    """This package: a name of `moeflow` that is both a room and a function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call `moeflow.fit.fit.fit`."""
        from moeflow.fit.fit import fit

        return fit(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
