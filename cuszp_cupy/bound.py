"""Error bounds: ``abs:E``, ``rel:E`` (times max - min) and ``rms:A`` (times the root mean square).

>>> Bound.parse("rms:0.05")
Bound(kind='rms', value=0.05)
>>> str(Bound("abs", 0.125))
'abs:0.125'
"""

from __future__ import annotations

import math
from dataclasses import dataclass

KINDS = ("abs", "rel", "rms")


@dataclass(frozen=True)
class Bound:
    """How far a value may come back from what it was.

    Args:
        kind: ``abs``: eb = value, in the unit of the data. ``rel``: eb = value x (max - min).
            ``rms``: eb = value x root mean square. ``rel`` and ``rms`` are taken over what is compressed as
            one: an array, a page, or each of the parts K and V of a page; over its finite values.
        value: > 0 and finite.

    Raises:
        TypeError, ValueError: an unknown kind, or a value that is no positive finite number.
    """

    kind: str
    value: float

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"bound: expected abs:E, rel:E or rms:A, got the kind {self.kind!r}")
        try:
            value = float(self.value)
        except (TypeError, ValueError):
            raise TypeError(f"bound: expected a number after '{self.kind}:', got {self.value!r}") from None
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"bound: expected a positive finite number, got {self.kind}:{value:g}")
        object.__setattr__(self, "value", value)

    def __str__(self) -> str:
        return f"{self.kind}:{self.value!r}"

    @classmethod
    def parse(cls, bound: Bound | str | float) -> Bound:
        """Return ``bound`` as a Bound: a Bound as it is, text like ``"rms:0.05"``, or a number (``abs``)."""
        if isinstance(bound, Bound):
            return bound
        if isinstance(bound, str):
            kind, colon, value = bound.partition(":")
            if not colon:
                raise ValueError(f"bound: expected text like 'abs:1e-3', 'rel:1e-3' or 'rms:0.05', got {bound!r}")
            try:
                return cls(kind.strip(), float(value))
            except ValueError as error:
                if "could not convert" not in str(error):
                    raise
                raise ValueError(f"bound: expected a number after '{kind}:', got {value!r}") from None
        return cls("abs", bound)


def parse_parts(bound, parts: int) -> tuple[Bound, ...]:
    """Return one Bound a part: ``bound`` for each, or, given a pair, the first for K, the second for V."""
    if isinstance(bound, (tuple, list)):
        if len(bound) != parts:
            raise ValueError(f"bound: the page has {parts} part(s), got {len(bound)} bounds")
        return tuple(Bound.parse(b) for b in bound)
    return (Bound.parse(bound),) * parts
