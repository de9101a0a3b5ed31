"""Compress LLM KV-cache pages and float arrays on the GPU under a strict error bound.

>>> import cuszp_cupy
>>> cuszp_cupy.Bound.parse("rms:0.05").kind
'rms'

``compress`` takes float32 and float64 arrays (stream ``cuszp``), ``encode_pages`` takes batches of 16-bit
pages (stream ``kv``); both need CuPy and a GPU. ``cuszp_cupy.reference`` does the same in NumPy, anywhere.
"""

from cuszp_cupy import reference
from cuszp_cupy.bound import Bound
from cuszp_cupy.codec import Compressed, EncodedPages, compress, decode_pages, encode_pages
from cuszp_cupy.format import FormatError, Geometry
from cuszp_cupy.pipeline import HostRows, SwapPipeline
from cuszp_cupy.reference import calibrate
from cuszp_cupy.tables import Tables

__version__ = "0.1.0"
__all__ = [
    "Bound",
    "Compressed",
    "EncodedPages",
    "FormatError",
    "Geometry",
    "HostRows",
    "SwapPipeline",
    "Tables",
    "calibrate",
    "compress",
    "decode_pages",
    "encode_pages",
    "reference",
]
