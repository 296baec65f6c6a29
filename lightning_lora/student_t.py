"""Student's t: critical values and tail probabilities, for degrees of freedom that need not be whole."""

from __future__ import annotations

# scipy takes 0.3 s to import, and a command that compares nothing does not need it.


def t_quantile(level: float, freedom: float) -> float:
    """The value that a t variable stays below with probability ``level``; infinite ``freedom`` gives the normal one."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, level))


def t_above(value: float, freedom: float) -> float:
    """The probability that a t variable exceeds ``value``."""
    from scipy.special import stdtr

    return float(stdtr(freedom, -value))
