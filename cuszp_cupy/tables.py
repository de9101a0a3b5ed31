"""The frequency tables of coding ``entropy`` (format.py, 2.12): built-in or calibrated; files of them."""

from __future__ import annotations

import functools
import io
import math
import zipfile
import zlib
from dataclasses import dataclass

import numpy as np

from .format import (
    CLASS_FREQUENCIES,
    CLASS_LIMIT,
    MAX_PAGE_VALUES,
    NUM_CLASS_SYMBOLS,
    NUM_SYMBOLS,
    NUM_TABLES,
    SYMBOL_FREQUENCIES,
    TABLE_TOTAL,
    TILE_TOKENS,
    FormatError,
    Geometry,
)

#: symbols that can occur in classes 1..8: values below 2^e, after the low bits of class 8 and above are cut off
POSSIBLE = np.arange(NUM_SYMBOLS) < np.array([[min(2**e, 12 + e)] for e in (1, 2, 3, 4, 5, 6, 7, 7)])
#: of a file, or an array in one: the hints of the widest page, a byte for each channel, and what else there is
MOST_FILE_BYTES = MAX_PAGE_VALUES // TILE_TOKENS + 8192


@dataclass(frozen=True, eq=False)
class Tables:
    """Frequencies of each part, and what is known of each pair of channels. Arrays are checked and not copied.

    Args:
        classes: (2, 40) uint16, of d (2.10) in each part.
        symbols: (2, 8, 19) uint16, of the symbols of classes 1..8.
        hints: None, or (channels / 2, 2) int8: o and f of each pair of channels (2.9).

    Raises:
        FormatError: arrays that are no tables.
    """

    classes: np.ndarray
    symbols: np.ndarray
    hints: np.ndarray | None = None

    def __post_init__(self):
        _check("classes", self.classes, np.uint16, (2, NUM_CLASS_SYMBOLS))
        _check("symbols", self.symbols, np.uint16, (2, NUM_TABLES, NUM_SYMBOLS))
        possible = np.broadcast_to(POSSIBLE, self.symbols.shape)
        for name, f, may in (("classes", self.classes, True), ("symbols", self.symbols, possible)):
            if ((f > 0) != may).any():
                raise FormatError(f"tables: {name} must be 1 or more where a symbol can occur, else 0")
            if (f.sum(axis=-1, dtype=np.int64) != TABLE_TOTAL).any():
                raise FormatError(f"tables: {name} must add up to {TABLE_TOTAL}, got {f.sum(axis=-1).tolist()}")
        if self.hints is None:
            return
        _check("hints", self.hints, np.int8, (len(self.hints), 2))
        o, f = self.hints.T
        if not len(o) or (np.abs(o.astype(int)) > CLASS_LIMIT).any() or ((f != 0) & (f != 1)).any():
            raise FormatError(f"tables: hints must be o in -{CLASS_LIMIT}..{CLASS_LIMIT} and f in 0..1")

    @functools.cached_property
    def digest(self) -> int:
        """32 bits that tell tables apart; 0 for the built-in ones."""
        if self is BUILT_IN:
            return 0
        data = b"".join(
            self.classes[part].astype("<u2").tobytes() + self.symbols[part].astype("<u2").tobytes()
            for part in range(2)
        )
        return zlib.crc32(data + (b"" if self.hints is None else self.hints.tobytes()))

    @property
    def id(self) -> int:
        """The number that pages carry: 0 for the built-in tables, else 1..255."""
        return 0 if self is BUILT_IN else 1 + self.digest % 255

    def check_geometry(self, geometry: Geometry) -> None:
        """Raise ValueError unless pages of this geometry can be coded with these tables."""
        pairs = 0 if geometry.flat else geometry.channels // 2
        if self.hints is not None and len(self.hints) != pairs:
            raise ValueError(
                f"tables: they were calibrated for pages of {2 * len(self.hints)} channels in groups of tokens, "
                f"not for {geometry}"
            )

    def hints_of_groups(self, geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
        """Return o and f of each group of a page; zeros where there are no hints."""
        if self.hints is None:
            return np.zeros((2, geometry.groups), np.int64)
        return self.hints.astype(np.int64)[np.arange(geometry.groups) % len(self.hints)].T

    def save(self, path) -> None:
        """Write the tables to ``path``, an .npz file."""
        arrays = {"classes": self.classes, "symbols": self.symbols}
        if self.hints is not None:
            arrays["hints"] = self.hints
        with open(path, "wb") as file:  # given a name, savez may append to it
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path) -> Tables:
        """Return the tables that ``save`` wrote to ``path``.

        Raises:
            FormatError: a file that holds no tables. Nothing in it is run (no pickle), and nothing larger is
            allocated than tables can be, whatever sizes it names.
        """
        with open(path, "rb") as file:
            content = file.read(MOST_FILE_BYTES + 1)
        try:
            if len(content) > MOST_FILE_BYTES:
                raise ValueError(f"more than {MOST_FILE_BYTES} bytes")
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                members = archive.infolist()[:4]  # one more than there may be
                arrays = {each.filename.removesuffix(".npy"): _read_array(archive, each) for each in members}
        except Exception as error:  # of what zipfile and NumPy raise for hostile files, few are ValueErrors
            why = f"{type(error).__name__} {error}"
            raise FormatError(f"{path}: no tables can be read from it ({why})") from None
        if not {"classes", "symbols"} <= set(arrays) <= {"classes", "symbols", "hints"}:
            raise FormatError(f"{path}: expected the arrays classes, symbols (and hints), got {sorted(arrays)}")
        return cls(**arrays)


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """Return an array of a file; raise where its sizes are not those of the bytes that are there."""
    name, size, method = member.filename, member.file_size, member.compress_type
    if size > MOST_FILE_BYTES or method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others know no limit
        raise ValueError(f"{name}: {size} bytes by compression method {method}")
    content = archive.read(member)
    file = io.BytesIO(content)
    np.lib.format.read_magic(file)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    body = content[file.tell() :]
    if math.prod(shape) * dtype.itemsize != len(body):
        raise ValueError(f"{name}: {dtype} {shape} in {len(body)} bytes")
    return np.frombuffer(body, dtype).reshape(shape, order="F" if fortran else "C")


def _check(name, array, dtype, shape) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != shape:
        got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise FormatError(f"tables: {name} must be {np.dtype(dtype)} {shape}, got {got}")


def frequencies(counts: np.ndarray, possible=True) -> np.ndarray:
    """Return integers near ``counts`` (..., symbols), scaled so that each row adds up to 2^10.

    They are 1 or more where a symbol is ``possible`` and 0 elsewhere; the largest takes what rounding leaves.
    """
    possible = np.broadcast_to(possible, counts.shape)
    share = np.where(possible, counts, 0) + 1e-9 * possible
    share = share / share.sum(axis=-1, keepdims=True)
    f = np.where(possible, np.maximum(np.rint(share * TABLE_TOTAL), 1), 0).astype(np.int64)
    largest = f.argmax(axis=-1)[..., None]
    missing = TABLE_TOTAL - f.sum(axis=-1, keepdims=True)
    np.put_along_axis(f, largest, np.take_along_axis(f, largest, -1) + missing, -1)
    return f.astype(np.uint16)


BUILT_IN = Tables(
    np.array([CLASS_FREQUENCIES] * 2, np.uint16),
    np.array([[(*f, *[0] * (NUM_SYMBOLS - len(f))) for f in SYMBOL_FREQUENCIES]] * 2, np.uint16),
)
