"""Error bounds: ``abs:E``, ``rel:E`` (times max - min) and ``rms:A`` (times the root mean square).

Pages of K and V take pairs of them, too, and ``PRESETS``.

>>> Bound.parse("rms:0.05")
Bound(kind='rms', value=0.05)
>>> str(Bound("abs", 0.125))
'abs:0.125'
"""

from __future__ import annotations

import math
from dataclasses import dataclass

KINDS = ("abs", "rel", "rms")
#: name -> bounds of K and V, by what they were measured to match in results/accuracy-h100.json
#: (SmolLM2-135M-Instruct, WikiText-2): a KL divergence no larger than that of a cache in FP8 e4m3, or in NVFP4;
#: about a quarter of FP8's. Other models may bear less: ``python bench.py accuracy MODEL TEXT``.
PRESETS = {"as-fp8": "rms:0.05/rms:0.07", "as-nvfp4": "rms:0.14/rms:0.24", "near-lossless": "rms:0.02/rms:0.02"}


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
                raise ValueError(
                    f"bound: expected text like 'abs:1e-3', 'rel:1e-3' or 'rms:0.05' (for pages of K and V also "
                    f"{', '.join(map(repr, PRESETS))}), got {bound!r}"
                )
            try:
                return cls(kind.strip(), float(value))
            except ValueError as error:
                if "could not convert" not in str(error):
                    raise
                raise ValueError(f"bound: expected a number after '{kind}:', got {value!r}") from None
        return cls("abs", bound)


def parse_parts(bound, parts: int) -> tuple[Bound, ...]:
    """Return one Bound a part: ``bound`` for each, or, given a pair, the first for K, the second for V.

    A pair may be text as well: ``rms:0.05/rms:0.1``, or a name in PRESETS; for pages of one part, K or V, that
    stands for the stricter of its two.

    >>> [str(bound) for bound in parse_parts("as-fp8", 2)]
    ['rms:0.05', 'rms:0.07']
    """
    if isinstance(bound, str):
        name = bound.strip()
        pair = [Bound.parse(text) for text in PRESETS.get(name, bound).split("/")]
        if name in PRESETS and parts == 1:
            return (min(pair, key=lambda one: one.value),)
        bound = pair if len(pair) > 1 else pair[0]
    if isinstance(bound, (tuple, list)):
        if len(bound) != parts:
            raise ValueError(f"bound: the page has {parts} part(s), got {len(bound)} bounds")
        return tuple(Bound.parse(b) for b in bound)
    return (Bound.parse(bound),) * parts
