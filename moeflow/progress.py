"""Types of the callbacks through which long work tells how far it is."""

from collections.abc import Callable

ProgressCallback = Callable[[int, int], None]  # (done, in all), of what the docstring says
ShareCallback = Callable[[float, str], None]  # (share done, from 0 to 1; what is going on)
