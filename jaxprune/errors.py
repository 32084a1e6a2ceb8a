"""Exceptions that users see: each text names what, expected, found and remedy."""


class PruneError(Exception):
    """Base of every error that jaxprune raises for its users."""


class GraphError(PruneError):
    """The model cannot be traced, or does not match its variables or inputs."""


class PlanError(PruneError):
    """A plan does not fit the graph: unknown group, index out of range, empty axis."""


class BudgetError(PruneError):
    """No plan within the constraints meets the budget that was asked for."""


class ScoreError(PruneError):
    """Scores that cannot be ranked: wrong shape, NaN, missing data or loss."""


class EmissionError(PruneError):
    """The smaller model cannot be built, or does not equal the masked original."""


class DataError(PruneError):
    """A data set is missing, empty, or not of the form the job needs."""


class CheckpointError(PruneError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class ConfigError(PruneError):
    """A configuration value is unknown or out of range."""


def first_line(error: BaseException) -> str:
    """What `error` says, without the lines that other libraries put below it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
