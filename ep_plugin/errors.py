"""A mistake of the user's, and how it is found: on every rank alike, before any communication.

A message has the rule, the names, the values and a legal alternative.
"""


class ConfigError(ValueError):
    """A setting the user can change. Commands print it as one sentence and exit with code 2."""


class BackendUnavailable(ConfigError):
    """A named option exists but its package is not installed."""


def largest_divisor(value: int, at_most: int) -> int:
    """Return the largest divisor of `value` that is at most `at_most`."""
    return next(d for d in range(max(1, min(value, at_most)), 0, -1) if value % d == 0)


def check_choice(name: str, value: str, legal: tuple[str, ...]) -> None:
    """Raise ConfigError unless `value` is one of `legal`."""
    if value not in legal:
        raise ConfigError(f"{name} must be one of {', '.join(legal)}; got {value!r}")


def check_counts(config: object, counts: dict[str, tuple[int, str]]) -> None:
    """Raise ConfigError unless each field that is set is an integer of at least its smallest."""
    for name, (smallest, legal) in counts.items():
        value = getattr(config, name)
        if value is not None and (not isinstance(value, int) or value < smallest):
            raise ConfigError(
                f"{name} must be an integer of at least {smallest}; got {value}; use {legal}"
            )
