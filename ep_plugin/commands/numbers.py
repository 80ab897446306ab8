"""Numbers as a reader wants them: none that is above 0 is printed as 0."""


def short_count(count: int) -> str:
    """Return a count, such as of parameters, in a unit that fits; four digits at most.

    Beyond a thousand billions it is still in billions, as papers have it.
    """
    if count < 1000:
        return str(count)
    for unit, size in (("K", 1e3), ("M", 1e6)):
        if float(text := f"{count / size:.4g}") < 1000:
            return text + unit
    return f"{count / 1e9:.4g}B" if count < 1e12 else f"{count / 1e9:.0f}B"


def rounded(value: float, decimals: int) -> str:
    """Return `value` to so many decimals, or to two digits where they would be all zeros."""
    text = f"{value:.{decimals}f}"
    return f"{value:.2g}" if value and float(text) == 0 else text
