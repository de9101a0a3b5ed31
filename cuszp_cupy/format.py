"""The two stream formats: this docstring is the specification, the code below its constants and checks.

Everything is little-endian. A *block* or *group* is 32 values. ``bits(a)`` is the bit length of an
integer, 0 for 0. "Word" is 32 bits. Format version 1; changes are listed under *Format* in CHANGELOG.md.


1. Stream ``cuszp``: float32 and float64 arrays
===============================================
Upstream's headerless 1-D stream (cuSZp V2.0 to V3.0.0), byte for byte. n, eb, mode and dtype T are kept
elsewhere. nb = ceil(n / 32) blocks, nc = ceil(n / 32768) chunks. ::

    [0, 1024 nc)      one rate byte a block, in order; the bytes of blocks >= nb are 0
    [1024 nc, size)   the payloads of blocks 0, 1, 2, ... back to back

1.1 Quantiser (each operation rounded to nearest even in T, no fused multiply-add)::

    r = 0.5 / eb      s = x r      t = s + 0.5      q = int32(trunc(t)) - (0 if s >= -0.5 else 1)

    The conversion saturates and the subtraction wraps: NaN gives -1 (float32) or INT_MAX (float64),
    +Inf, -Inf and everything beyond the int32 range give INT_MAX.

1.2 Codes. Mode ``fixed``: v = q. Modes ``plain`` and ``outlier``: v = q - (the q before it in the block,
    0 for the first), wrapping. Positions >= n hold v = 0. Sign: v < 0. Magnitude: a = |v| (INT_MIN stays
    INT_MIN, is left out of the maximum, and decodes as 0).

1.3 Payload of ``fixed`` and ``plain``. k = bits(max a); rate byte = k; no payload if k = 0, else::

    +--------------+-----------+-----------+-----+-------------+
    | 32 signs, 4B | plane 0   | plane 1   | ... | plane k-1   |   plane p = bit p of every magnitude
    +--------------+-----------+-----------+-----+-------------+
    in each 4 bytes: bit 7-t of byte b belongs to value 8b + t

1.4 Payload of ``outlier``. k1 = bits(max a), k2 = bits(max a but the first), ob = ceil(bits(a[0]) / 8).
    If (4 + 4 k1 if k1 else 0) <= 4 + 4 k2 + ob: as 1.3. Else the first magnitude is stored apart::

    rate byte   | 1 | ob - 1 : 2 bits | k2 : 5 bits |
    payload     a[0] in ob bytes, 32 signs, planes 0 .. k2-1 (value 0 has zero bits in them)

    k2 = 31 cannot occur here (the stored part would not be smaller), so a decoder refuses it: no payload is
    longer than 128 bytes.

1.5 Decoder. q = v, or its running int32 sum over the block; x = (T(q) eb) 2, each product rounded in T.
    A block without payload decodes to zeros. Stream size = 1024 nc + the sum of the payload sizes, at
    most ``max_stream_bytes(n)``.

1.6 Errata of upstream. (a) A reported size of 1024 for every n <= 32768: the size is 1.5's. (b) Upstream's
    decoder leaves the output of a block without payload untouched. (c) The bound holds to rounding only:
    |x - y| <= eb + 2 ulp(x) while |x| / eb < 2^22; beyond that T's own rounding shows, and at |q| >= 2^31
    values are lost. (d) -Inf comes back positive.


2. Stream ``kv``: pages of 16-bit floats
========================================
A page is ``outer x tokens x channels`` values of float16 or bfloat16, in this memory order. A page may
have two *parts*: channels repeat with period kw + vw, the first kw of a period are K, the other vw V.
Each part has its own step. Strict bound: |x - y| <= eb for every finite value, after storage rounding;
non-finite values and -0.0 come back bit for bit.

2.1 Page metadata. As the 32-byte header of a *blob* (header + payload), or as a 16-byte *row* of a table
    whose geometry is known (words 1, 6, 7 of the header and one word that says where the payload lies). ::

    word  0   'k' 'v' version=1 dtype (0 float16, 1 bfloat16)
          1   | step of part 0 + 512 : 10 | step of part 1 + 512 : 10 | coding : 4 | tables : 8 |   (LSB first)
          2   tokens        3   channels
          4   kw : 16, vw : 16 (both 0: one part)
          5   outer : 16, 0 : 16
          6   payload bytes
          7   checksum
    coding    0 raw, 1 fixed, 2 entropy.  In raw pages, and for a missing part 1, the step is 0.
    tables    of coding entropy: 0 the built-in tables (2.12), else the id of calibrated ones. Else 0.

2.2 Checksum. The sum of w_i c_i mod 2^32 - 5 (a prime), over header words i = 0..6 and payload words
    i = 8, 9, ... (the last one padded with zero bytes), with c_i = ((i + 1) 0x9E3779B1 mod 2^26) | 1.
    w_7 is the digest of the tables (0 for the built-in ones), so other tables of the same id are found out.
    A change within one word is seen, unless it is by 2^32 - 5 exactly, which takes more than one bit; others
    are with probability 1 - 2^-32.

2.3 Steps. A step number s = 4 k + m - 4, m in 4..7, -400 <= s <= 400, stands for step = m 2^(k-2).
    The grid of s (magnitudes; two slopes, so that every point is a storage value)::

    y(q) = min(q m, 4 q + 32 (m - 4)) 2^(k-2)

    i.e. multiples of step up to 32 step, and from there on multiples of 2^k <= step. Points <= 32 step
    need 8 significant bits at most; points beyond are multiples of 2^k, and where the type's own spacing
    exceeds 2^k, x is such a multiple itself. Hence |x - y| <= step / 2 with no rounding left over.
    (In float16 this needs step >= 2^-22: points of smaller steps fall between its denormals, see 2.7.)

2.4 Groups. If tokens is a multiple of 16 and channels, kw, vw are even: a group is 16 tokens x 2
    neighbouring channels, numbered channel pair fastest, then tile of 16 tokens, then outer. Its pair i is
    (token i, channels 2j and 2j+1). Else (*flat*): 32 values in memory order, pair i is values 2i and 2i+1;
    the last group is padded with +0.0; with two parts kw and vw must then be multiples of 32.

2.5 Coding ``fixed``. For a group: magnitude q of each value (2.6), b = bits(max q). ::

    width code 0        every q is 0 and no value is -0.0: no words
               1..14    b + 1: magnitude planes 0 .. b-1, then the plane of sign bits (b <= 13)
               15       q >= 2^13, or |x| + step (rounded to float32) above the largest finite value of the
                        dtype, or x not finite: the 16 planes of the storage bits, LSB first
    plane word          bit i: first value of pair i;  bit 16 + i: second value of pair i

    payload  | width codes, 4 bits a group, low nibble first, zero-padded to 16 bytes | words of group 0, 1, ... |

    A value with q = 0 comes back as -0.0 if its sign bit was stored, which is what -0.0 needs.
    Coding ``raw``: the page's bytes. An encoder must use ``raw`` unless ``fixed`` is smaller. Asked for
    ``entropy``, it must use that instead of ``fixed`` where it is allowed (2.11) and smaller than ``fixed``.

2.6 Encoder arithmetic (float32, one rounding to nearest even for each q; results are the same in any
    precision that keeps the products exact)::

    q = max(rint(|x| (1 / step)), rint(|x| 2^-k - 8 (m - 4)))       1 / step rounded to float32

2.7 Choosing the step: the largest s with step <= 2 eb, found by its thresholds: k = floor(log2(2 eb)), and
    m = 4 + the number of f in (5/4, 6/4, 7/4) with 2 eb / 2^k >= f (1 + 2^-16) (the margin covers the
    rounding of 1 / step). s > 400 is lowered to 400; a page with a part at s < -400 (float16: s < -88) is
    coded ``raw``.
    In float64, with A the bound's value and n the number of values in the part:

    abs   2 eb = 2 A
    rel   2 eb = (2 A) (max - min), over the finite values, padding left out
    rms   (2 eb)^2 = ((4 A A) / n) S 2^(E-20), compared with f^2: S is an integer sum over the groups of the part.
          t = sum of the squares of a group in float32: pairs in order, first and second values each summed
          apart by fused multiply-add from 0, the two sums then added; non-finite values are left out.
          2^E > max t >= 2^(E-1);  S = sum of trunc(t 2^(20-E)).
          If max t < 2^-100 or a t overflows, the page is coded ``raw``.
    Under rel and rms, a part whose finite values are all zero has s = 0.

2.8 Pages seen before (rel and rms). Decoded pages come back and are stored again; their rms or range may
    have moved a little. So, among the steps s+4, s+3, ..., s-4 in this order, the encoder takes the first one
    (|.| <= 400) on whose grid each group of the part lies: every value of the group is a y(q) with
    q < 2^13, or the group would have width code 15. If none fits: s. Re-encoding a decoded page then
    changes nothing (rms:A with A < 0.5, rel:A with A < 0.25).

2.9 Coding ``entropy``: what is coded. The q of 2.6 with their signs. In each group the 16 first values of the
    pairs, and the 16 second values, are a sequence q_0 .. q_15 each (of tokens, unless flat), predicted by p::

    a_0 = 0     a_1 = 10 q_0     a_(t+1) = a_t + floor(3 (16 q_t - a_t) / 8)     p_t = floor((a_t + 8) / 16)

    The group's flag f is 1 if the sum of its |q - p| is less than that of its |q|. v = q - f p, e = bits(sum of
    |v|) <= 19, and the class of the group is c = e. Two kinds of groups have f = 0 and another class:
    signed zeros   a group that holds -0.0: c = 20 + e (e <= 18). A v = 0 has the sign of its value in it.
    escaped        one that would have width code 15: c = 39; v is the value's storage bits, 15 and the sign.
    The class is coded relative to o + base, where o is 0, and base is the mean of e - o over the n groups of the
    part that are not escaped: floor((2 sum + n) / (2 n)), at least 0, at most 19; 0 if n = 0.
    Calibrated tables may have *hints*: o and f for each pair of channels. Then f is given where it was chosen.

2.10 Symbols. Each *lane* codes groups one after the other in one number x (range asymmetric numeral system).
    A table is a list of frequencies F_s, 0 where s cannot occur, that add up to 1024; C_s is the sum of those
    before s. There is one table of classes, s = (c - o - base + 19) mod 39, or 39 for c = 39; and one for each
    e = 1 .. 7, and for all e >= 8. A decoder's steps::

    read      slot = x mod 1024;  s such that C_s <= slot < C_s + F_s;  x = F_s floor(x / 1024) + slot - C_s
    bits(n)   x mod 2^n;  x = floor(x / 2^n)
    refill    if x < 2^15: x = 2^16 x + the next half-word (16 bits) of the stream

    group     read c;  without hints f = bits(1);  refill;  then its values: pair 0, first and second, pair 1, ...
    value     read s from the table of e;  u = s - 12 if s >= 16, else 0;  n = u + max(e - 7, 0)
              r = bits(min(n, 4));  if n > 4: refill, r = r + 16 bits(n - 4)
              |v| = (2^u if s >= 16, else s) 2^max(e - 7, 0) + r
              if v != 0 or c >= 20, and the sign is not a *late* one: sign = bits(1), 1 if negative.  refill
              Without a table nothing is read: s = 0. For e = 0, n = 0; for c = 39, n = 15 and |v| = r.

    Late are the signs of the second values in the last group of a lane. The decoder finds them in what x is
    left at: 2^16 + (sign of pair t) 2^t, 0 for no sign. That is what an encoder, which takes these steps
    backwards, starts from; before a symbol it moves the low half-word of x to the stream if x would pass 2^31.

2.11 Streams and payload. A *stream* codes g = 256 groups (the last one what is left) in L = min(32, ceil(g / 8))
    lanes: lane l has groups l, L + l, 2 L + l, ... of it. All lanes take each step at the same time. At a
    refill, those that need a half-word take the next ones in order of l. (That for n > 4 is for such lanes.) ::

    payload   | base of part 0 : 8 | base of part 1 : 8 | half-words of stream 0, 1, ... : 16 each |
              | stream 0 | stream 1 | ... |  zeros to a multiple of 4 bytes
    stream    x of lane 0 .. L-1 as the decoder starts, 2 half-words each (low first) | half-words in order of use

    The coding is allowed if no stream takes more than 32 g half-words (a raw page's size).
    A decoder refuses, whatever the checksum: a base above 19, or of a missing part and not 0; a stream shorter
    than 2 L or longer than 32 g half-words; streams that do not fill the payload; padding that is not zero;
    x outside 2^15 .. 2^31 - 1 at the start; |q| >= 2^13; a stream that ends early or late; x outside
    2^16 .. 2^17 - 1 at the end, or a sign there for v = 0 in a class below 20; tables that it was not given.

2.12 Tables. The built-in ones are CLASS_FREQUENCIES and SYMBOL_FREQUENCIES below, for both parts, without hints.
    Calibrated ones have frequencies for each part. Their digest is the CRC-32 of the frequencies (for each part:
    of classes, then of e = 1 .. 8 with 19 symbols each; uint16) and of the hints (int8: o, f for each pair of
    channels); their id is 1 + digest mod 255.
    The built-in ones come from a formula: F_s is 1 or more, nearest to 1024 P; the largest takes what is missing
    from the sum. Of classes, P ~ 2^(-2 |s - 19|), 0 for s = 39. Of e, |v| has the density
    exp(-(|v| / a)^1.5), integrated over |v| - 1/2 .. |v| + 1/2, for e >= 8 over units of 2^(e - 7); P is the
    mean of eight such, where |v| (for e >= 8: the middle of its unit) has the mean
    2^(min(e, 7) - 6 + (j + 1/2) / 8), j = 0..7.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import numpy as np

# --- stream cuszp -----------------------------------------------------------------------------------------
MODES = ("fixed", "plain", "outlier")
BLOCK = 32  # values in a block (and in a group of stream kv)
CHUNK = 32768  # values in a chunk: its 1024 rate bytes are written even where it has fewer blocks
MAX_VALUES = 2**31 - 1  # upstream indexes with int32
MAX_STREAM_BYTES = 2**32 - 1  # upstream's offsets are uint32

# --- stream kv --------------------------------------------------------------------------------------------
MAGIC = b"kv"
VERSION = 1
DTYPES = ("float16", "bfloat16")  # index = dtype byte
CODINGS = ("raw", "fixed", "entropy")  # index = coding nibble
HEADER_BYTES = 32
ROW_WORDS = 4
TILE_TOKENS = 16
STEP_BIAS = 512
STEP_LIMIT = 400
LOWEST_STEP = {"float16": -88, "bfloat16": -STEP_LIMIT}  # of an encoder: below it, pages are raw (2.7)
MAX_MAGNITUDE = 2**13  # a magnitude of this or more makes its group width code 15
MAX_PAGE_VALUES = 2**26
CHECKSUM_PRIME = 2**32 - 5
#: words a group of width code c takes
CODE_WORDS = np.array([*range(15), 16], np.uint32)
#: two_eb / 2^k from which on m is 5, 6, 7 (2.7)
STEP_THRESHOLDS = tuple(f * (1 + 2.0**-16) for f in (1.25, 1.5, 1.75))

# --- stream kv, coding entropy ----------------------------------------------------------------------------
TABLE_BITS = 10  # frequencies add up to 2^10
TABLE_TOTAL = 1 << TABLE_BITS
LOWEST_STATE = 2**15  # of x; it stays below 2^31, where its exact division by F takes one 32-bit product
CLASS_LIMIT = 19  # of e: bits(32 (2^14 - 1)), the sum of 32 differences of two |q| < 2^13
SIGNED_ZEROS = 20  # what is added to e in groups with -0.0
ESCAPED = 39  # class of groups that are stored as they are
EXACT_CLASS = 7  # up to this e every |v| below 16 has its own symbol; above, low bits are coded as they are
EXACT_SYMBOLS = 16
NUM_TABLES = 8  # of e = 1..7, and 8 and above
NUM_SYMBOLS = 19
NUM_CLASS_SYMBOLS = 40
STREAM_GROUPS = 256  # in a stream at most
STREAM_LANES = 32  # at most
GROUPS_PER_LANE = 8  # at least, where there are fewer lanes
#: 2.12: frequencies of classes
CLASS_FREQUENCIES = (
    1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 10, 38, 154,
    585, 154, 38, 10, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
)  # fmt: skip
#: 2.12: frequencies of the symbols that can occur for e = 1, 2, ... 7, and for all above
SYMBOL_FREQUENCIES = (
    (978, 46),
    (930, 92, 1, 1),
    (836, 182, 1, 1, 1, 1, 1, 1),
    (661, 332, 18, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1),
    (436, 444, 109, 20, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1),
    (253, 370, 212, 103, 46, 19, 8, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1),
    (132, 236, 190, 144, 104, 73, 50, 33, 22, 14, 9, 6, 4, 2, 1, 1, 1, 1, 1),
    (257, 216, 167, 123, 87, 59, 40, 26, 17, 11, 7, 4, 3, 2, 1, 1, 1, 1, 1),
)

_HEADER = struct.Struct("<2sBBIIIHHHHII")


class FormatError(ValueError):
    """A stream, blob or table row that does not follow the specification, or fails its checksum."""


# --- stream cuszp -----------------------------------------------------------------------------------------
def rate_bytes(n: int) -> int:
    """Return the size of the rate area of ``n`` values, in bytes."""
    return 1024 * -(-n // CHUNK)


def max_stream_bytes(n: int) -> int:
    """Return the most bytes a ``cuszp`` stream of ``n`` values can take, in any mode and dtype."""
    return rate_bytes(n) + 128 * -(-n // BLOCK)


def check_mode(mode: str) -> str:
    """Return ``mode`` if it names a mode of stream ``cuszp``; else raise ValueError."""
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    return mode


def check_coding(coding: str) -> str:
    """Return ``coding`` if it names a coding of stream ``kv``; else raise ValueError."""
    if coding not in CODINGS:
        raise ValueError(f"coding: expected one of {', '.join(CODINGS)}, got {coding!r}")
    return coding


# --- stream kv: steps -------------------------------------------------------------------------------------
def step_number(two_eb: float, exponent: int = 0, squared: bool = False) -> int:
    """Return the step number (2.7) for ``two_eb 2^exponent``, twice the error bound, or for its square.

    The result may lie outside +-STEP_LIMIT. ``two_eb`` must be positive; infinity gives a large number.
    """
    if two_eb == math.inf:
        return 4 * STEP_LIMIT
    mantissa, e = math.frexp(two_eb)
    e += exponent - 1
    k = e // 2 if squared else e
    ratio = math.ldexp(2 * mantissa, e - 2 * k if squared else 0)
    return 4 * k + sum(ratio >= (f * f if squared else f) for f in STEP_THRESHOLDS)


def step_parts(s: int) -> tuple[int, int]:
    """Return (k, m) of step number ``s``: step = m 2^(k-2)."""
    return s // 4, s % 4 + 4


def step_size(s: int) -> float:
    """Return the step of step number ``s``, in the unit of the data. The error is at most half of it."""
    k, m = step_parts(s)
    return math.ldexp(m, k - 2)


# --- stream kv: geometry ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Geometry:
    """The shape of a page and where K and V lie in it.

    Args:
        tokens: tokens in the page (1 where they are not known: the page is then ``flat``).
        channels: values a token has, in one ``outer`` index.
        outer: what the page repeats slower than tokens (heads, in layouts ``[heads][tokens][K|V]``).
        parts: ``None``, or ``(kw, vw)``: channels come in turns of kw of K, then vw of V
            (``(head_size, head_size_v)`` where vLLM packs a head's K and V side by side).

    Raises:
        ValueError: an extent out of range, or a page shape that cannot be coded (2.4).

    >>> Geometry(tokens=16, channels=2048, parts=(128, 128)).groups
    1024
    """

    tokens: int
    channels: int
    outer: int = 1
    parts: tuple[int, int] | None = None

    def __post_init__(self):
        for name, limit in (("tokens", 2**31), ("channels", 2**31), ("outer", 2**16)):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or not 1 <= value < limit:
                raise ValueError(f"{name}: expected an integer from 1 to {limit - 1}, got {value!r}")
            object.__setattr__(self, name, int(value))
        if self.values > MAX_PAGE_VALUES:
            raise ValueError(
                f"page: at most {MAX_PAGE_VALUES} values, got {self.outer} x {self.tokens} x "
                f"{self.channels}; split it into smaller pages"
            )
        if self.parts is None:
            return
        if len(self.parts) != 2:
            raise ValueError(f"parts: expected None or (K width, V width), got {self.parts!r}")
        kw, vw = (int(width) for width in self.parts)
        object.__setattr__(self, "parts", (kw, vw))
        if not (1 <= kw < 2**16 and 1 <= vw < 2**16) or self.channels % (kw + vw):
            raise ValueError(
                f"parts: expected two widths from 1 to 65535 whose sum divides the {self.channels} "
                f"channels, got {self.parts}"
            )
        if self.flat and (kw % BLOCK or vw % BLOCK):
            raise ValueError(
                f"page shape not supported: {self.tokens} tokens with parts {self.parts}; pages with K and "
                f"V need a multiple of {TILE_TOKENS} tokens and even widths, or widths that are multiples "
                f"of {BLOCK}"
            )

    @property
    def values(self) -> int:
        """Values in the page."""
        return self.outer * self.tokens * self.channels

    @property
    def nbytes(self) -> int:
        """Bytes of the raw page."""
        return 2 * self.values

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape a decoded page has: (tokens, channels), or (outer, tokens, channels)."""
        return (self.tokens, self.channels) if self.outer == 1 else (self.outer, self.tokens, self.channels)

    @property
    def flat(self) -> bool:
        """Whether groups are 32 values in memory order (2.4)."""
        widths = (self.channels, *(self.parts or ()))
        return bool(self.tokens % TILE_TOKENS or any(width % 2 for width in widths))

    @property
    def groups(self) -> int:
        """Groups in the page."""
        return -(-self.values // BLOCK)

    @property
    def code_bytes(self) -> int:
        """Bytes of the width codes of a ``fixed`` payload, padding included."""
        return -(-self.groups // 32) * 16

    @property
    def part_values(self) -> tuple[int, ...]:
        """Values in each part."""
        if self.parts is None:
            return (self.values,)
        period = sum(self.parts)
        return tuple(self.values // period * width for width in self.parts)

    @property
    def streams(self) -> tuple[int, ...]:
        """Groups in each stream of coding ``entropy`` (2.11)."""
        full, rest = divmod(self.groups, STREAM_GROUPS)
        return (STREAM_GROUPS,) * full + (rest,) * bool(rest)

    @property
    def least_entropy_bytes(self) -> int:
        """The least bytes that an ``entropy`` payload takes: the sizes of streams, and two half-words a lane."""
        lanes = sum(stream_lanes(groups) for groups in self.streams)
        return -(-(2 + 2 * len(self.streams) + 4 * lanes) // 4) * 4


def stream_lanes(groups: int) -> int:
    """Return the lanes of a stream of ``groups`` groups (2.11)."""
    return min(STREAM_LANES, -(-groups // GROUPS_PER_LANE))


# --- stream kv: metadata ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class PageHeader:
    """The metadata of one page (2.1)."""

    dtype: str
    geometry: Geometry
    coding: str
    steps: tuple[int, int]
    payload_bytes: int
    checksum: int
    tables: int = 0

    @property
    def word1(self) -> int:
        """Header word 1 = word 0 of a table row: steps, coding and tables."""
        return pack_word1(self.coding, self.steps, self.tables)

    def pack(self) -> bytes:
        """Return the 32 header bytes."""
        g = self.geometry
        kw, vw = g.parts or (0, 0)
        return _HEADER.pack(
            MAGIC, VERSION, DTYPES.index(self.dtype), self.word1, g.tokens, g.channels, kw, vw, g.outer, 0,
            self.payload_bytes, self.checksum,
        )  # fmt: skip

    @classmethod
    def parse(cls, blob) -> PageHeader:
        """Return the header of ``blob`` (header + payload), every field checked but not the checksum.

        Raises:
            FormatError: naming the field, what it held, and what it may hold.
        """
        blob = memoryview(blob).cast("B")
        if len(blob) < HEADER_BYTES:
            raise FormatError(f"blob: a page needs at least {HEADER_BYTES} bytes, got {len(blob)}")
        (magic, version, dtype, word1, tokens, channels, kw, vw, outer, zero, payload_bytes, checksum) = (
            _HEADER.unpack(blob[:HEADER_BYTES])
        )
        if magic != MAGIC:
            raise FormatError(f"blob: expected the magic {MAGIC!r}, got {magic!r}; this is no kv page")
        if version != VERSION:
            raise FormatError(f"version: this release reads version {VERSION}, got {version}")
        if dtype >= len(DTYPES):
            raise FormatError(f"dtype: expected 0 (float16) or 1 (bfloat16), got {dtype}")
        if zero:
            raise FormatError(f"header bytes 22-23: expected 0, got {zero}")
        if bool(kw) != bool(vw):
            raise FormatError(f"parts: expected two widths or none, got {(kw, vw)}")
        try:
            geometry = Geometry(tokens, channels, outer, (kw, vw) if kw else None)
        except ValueError as error:
            raise FormatError(str(error)) from None
        coding, steps = unpack_word1(word1, geometry)
        check_payload_bytes(coding, payload_bytes, geometry)
        if len(blob) != HEADER_BYTES + payload_bytes:
            raise FormatError(
                f"blob: the header says {payload_bytes} payload bytes, {len(blob) - HEADER_BYTES} are there"
            )
        return cls(DTYPES[dtype], geometry, coding, steps, payload_bytes, checksum, word1 >> 24)


def pack_word1(coding: str, steps: tuple[int, int], tables: int = 0) -> int:
    """Return header word 1 for a coding, the two step numbers and the id of the tables."""
    return (steps[0] + STEP_BIAS) | (steps[1] + STEP_BIAS) << 10 | CODINGS.index(coding) << 20 | tables << 24


def unpack_word1(word1: int, geometry: Geometry) -> tuple[str, tuple[int, int]]:
    """Return (coding, steps) of header word 1; raise FormatError where a field is out of range."""
    steps = ((word1 & 1023) - STEP_BIAS, (word1 >> 10 & 1023) - STEP_BIAS)
    coding, tables = word1 >> 20 & 15, word1 >> 24
    if coding >= len(CODINGS):
        raise FormatError(f"coding: expected 0 (raw), 1 (fixed) or 2 (entropy), got {coding}")
    if tables and CODINGS[coding] != "entropy":
        raise FormatError(f"tables: expected 0 (coding {CODINGS[coding]} has none), got {tables}")
    used = 0 if CODINGS[coding] == "raw" else len(geometry.part_values)
    for part, s in enumerate(steps):
        if abs(s) > STEP_LIMIT or (part >= used and s):
            allowed = f"-{STEP_LIMIT}..{STEP_LIMIT}" if part < used else "0"
            raise FormatError(f"step of part {part}: expected {allowed}, got {s}")
    return CODINGS[coding], steps


def check_payload_bytes(coding: str, payload_bytes: int, geometry: Geometry) -> None:
    """Raise FormatError unless ``payload_bytes`` is possible for the coding and geometry."""
    if coding == "raw":
        if payload_bytes != geometry.nbytes:
            raise FormatError(f"payload bytes: a raw page has {geometry.nbytes}, got {payload_bytes}")
        return
    least = geometry.code_bytes if coding == "fixed" else geometry.least_entropy_bytes
    if not least <= payload_bytes < geometry.nbytes or payload_bytes % 4:
        raise FormatError(
            f"payload bytes: expected a multiple of 4 from {least} to {geometry.nbytes - 1}, got {payload_bytes}"
        )


def checksum(header: bytes, payload, digest: int = 0) -> int:
    """Return the checksum (2.2) of the first seven header words, the tables' digest, and the payload."""
    payload = np.frombuffer(payload, np.uint8)
    payload = np.concatenate([payload, np.zeros(-payload.size % 4, np.uint8)]).view("<u4")
    words = np.concatenate([np.frombuffer(header[:28], "<u4"), np.array([digest], "<u4"), payload])
    factor = np.arange(1, words.size + 1, dtype=np.uint32)
    factor = factor * np.uint32(0x9E3779B1) & np.uint32(2**26 - 1) | np.uint32(1)
    terms = words.astype(np.uint64) * factor % np.uint64(CHECKSUM_PRIME)  # products of at most 58 bits
    return int(terms.sum()) % CHECKSUM_PRIME
