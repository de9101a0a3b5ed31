"""Shows measurements: rich tables, a JSON file, a plot of rate against error. Measures nothing."""

from __future__ import annotations

import json
from pathlib import Path

from rich import box
from rich.table import Table

CODEC_CAPTION = (
    "GB/s: 1e9 raw (uncompressed) bytes a second, ± half the interquartile range. of copy: bytes read and "
    "written a second, as a share of the device copy in the first row of the same data. Device to device, cold "
    "in L2, GPU time of the kernels, variants in turns. Not like for like with that: rows marked (call) are wall "
    "clock of whole blocking calls with their allocations, and nvCOMP is lossless. "
    "kv counts 16 bytes of metadata a page."
)
REFERENCE_CAPTION = (
    "Through the NumPy reference: the kernels' bytes, no speeds. kv counts 16 bytes of metadata a page."
)
LINK_CAPTION = (
    "raw GB/s: 1e9 raw bytes a second, what a swapped cache sees; link GB/s: bytes that crossed the link. The "
    "copy is one transfer by the copy engines; kernels store to and load from mapped pinned memory themselves."
)


def codec_table(rows: list[dict], title: str) -> Table:
    """Return the table of ``evaluation.codec`` rows; columns of speeds only where a row has one."""
    timed = any(row["compress_gbps"] for row in rows)
    table = Table(
        title=title,
        caption=CODEC_CAPTION if timed else REFERENCE_CAPTION,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for name in ("data", "MB", "codec", "bound", "ratio", "bits /\nvalue"):
        table.add_column(name, justify="left" if name in ("data", "codec", "bound") else "right")
    if timed:
        for name in ("compress\nGB/s", "± %", "of\ncopy", "decompress\nGB/s", "± %", "of\ncopy"):
            table.add_column(name, justify="right")
    table.add_column("max err\n/ eb", justify="right")
    previous = None
    for row in rows:
        new = row["data"] != previous
        if new and previous is not None:
            table.add_section()
        cells = [
            row["data"] if new else "",
            _show(row["mbytes"], "{:.1f}") if new else "",
            row["codec"],
            row["bound"] or "",
            _show(row["ratio"], "{:.2f}"),
            _show(row["bits_per_value"], "{:.2f}"),
        ]
        if timed:
            for what in ("compress", "decompress"):
                gbps = row[f"{what}_gbps"]
                cells.append(_show(gbps, "{:.1f}" if gbps and gbps < 100 else "{:.0f}"))
                cells.append(_show(row[f"{what}_spread_percent"], "{:.1f}"))
                cells.append(_show(row[f"{what}_of_copy"], "{:.0%}"))
        table.add_row(*cells, _show(row["max_error_over_eb"], "{:.3f}"))
        previous = row["data"]
    return table


def link_table(rows: list[dict], title: str) -> Table:
    """Return the table of ``evaluation.codec.link_rows``."""
    table = Table(title=title, caption=LINK_CAPTION, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("data", "what", "bound", "ratio", "to host:\nraw GB/s", "link\nGB/s", "± %",
                 "from host:\nraw GB/s", "link\nGB/s", "± %"):  # fmt: skip
        table.add_column(name, justify="left" if name in ("data", "what", "bound") else "right")
    for row in rows:
        cells = [row["data"], row["what"], row["bound"] or "", _show(row["ratio"], "{:.2f}")]
        for where in ("to_host", "from_host"):
            cells += [
                _show(row[f"{where}_{key}"], "{:.1f}") for key in ("raw_gbps", "link_gbps", "spread_percent")
            ]
        table.add_row(*cells)
    return table


def _show(value, pattern: str) -> str:
    return "" if value is None else pattern.format(value)


def write_json(result: dict, path: str | Path) -> None:
    """Write ``result`` as JSON; a value that JSON does not know raises TypeError or ValueError."""
    Path(path).write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def pyplot():
    """Return ``matplotlib.pyplot``, drawing to files only; raise ImportError with what to install."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(f"a plot needs matplotlib ({error}): install the extra, cuszp_cupy[plot]") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def plot_rate_error(points: list[dict], path: str | Path) -> None:
    """Draw the points of ``evaluation.codec.rate_error`` to ``path`` (PNG, SVG, ... by its ending)."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6, 4.5), layout="constrained")
    for part, colour in (("K", "tab:blue"), ("V", "tab:orange")):
        own = sorted((p for p in points if p["part"] == part), key=lambda p: p["bits_per_value"])
        bits = [p["bits_per_value"] for p in own]
        axes.plot(bits, [p["rmse"] for p in own], "o-", ms=3, color=colour, label=f"{part}: RMSE / RMS")
        axes.plot(
            bits, [p["max_error"] for p in own], "^--", ms=3, color=colour, label=f"{part}: max error / RMS"
        )
    axes.set(xlabel="bits a value (16 uncompressed, metadata counted)", ylabel="error", yscale="log")
    axes.set_title("Rate against error: kv fixed, bfloat16 pages of 16 tokens x 192 channels", fontsize=10)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
