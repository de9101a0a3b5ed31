"""The entry point by which vLLM patches itself in every process that it starts.

Apart from ``vllm_patch`` because importing that installs it, and vLLM imports every plugin that it finds; and
because vLLM only logs an error of that import, but stops at one of ``register``.
"""

from __future__ import annotations

import os


def register() -> None:
    """Import ``vllm_patch`` if ``CUSZP_VLLM`` is 1; else do nothing.

    Raises:
        ImportError: a vLLM that the patch does not know.
    """
    if os.environ.get("CUSZP_VLLM") == "1":
        import vllm_patch  # noqa: F401 - importing installs
