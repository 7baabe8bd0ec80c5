"""Errors that moeflow raises. Each message says what was found, what is allowed and what to do."""


class MoeflowError(Exception):
    """Every error moeflow raises on purpose."""


class ConfigError(MoeflowError, ValueError):
    """An option, or a field of a config, is malformed or does not fit the model or this machine."""


class BudgetError(ConfigError):
    """A memory budget is below what the model needs, or above what the machine has."""


class CheckpointError(MoeflowError):
    """A checkpoint is missing, truncated, corrupt, or names what it may not."""


class UnsupportedModelError(MoeflowError):
    """The model is dense, or stored in a format this version does not read."""


class ExpertReadError(MoeflowError):
    """One expert could not be read; the model stays usable and the next call tries again."""


class GpuError(MoeflowError, RuntimeError):
    """A GPU ran out of memory in a pass, or its driver reported an error; the message says what is still usable."""


class ClosedModelError(MoeflowError):
    """The model's experts were released by close()."""


class ForkedProcessError(MoeflowError):
    """The process was forked, and what it holds cannot go on in the child."""


class QueueFullError(MoeflowError):
    """As many requests wait as an engine allows; try again when some have ended."""


class ModelSourceError(MoeflowError):
    """A model id or folder could not be found or fetched."""


class PredictorError(MoeflowError):
    """A predictor is of another model, damaged, or answered with nonsense."""


class TraceError(MoeflowError):
    """A routing trace is missing, empty, truncated, corrupt, no trace at all, or of another model."""


class PlacementError(MoeflowError, ValueError):
    """A placement problem has no solution, or its counts, topology or plan are malformed."""


class DemoModelError(MoeflowError):
    """The demo model could not be fetched or built."""


class ParallelError(MoeflowError):
    """Another rank of an expert-parallel run failed, or was lost."""
