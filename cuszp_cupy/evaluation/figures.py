"""The figures of ``docs/report.md`` that no other command draws, to be read at a width of 800 pixels."""

from __future__ import annotations

from cuszp_cupy.evaluation import serve
from cuszp_cupy.evaluation.report import draw_timeline, pyplot, variant_colours

DPI = 120
WAYS = {"D2H": "to the host", "H2D": "from the host"}
#: (transport, slots) -> colour, style, name; in the order they are drawn
PAGE_CURVES = {
    ("staged", "arena"): ("C0", "o-", "staged, arena"),
    ("staged", "scattered"): ("C0", "o--", "staged, scattered"),
    ("fused", "arena"): ("C1", "s-", "fused, arena"),
    ("raw copy", "scattered"): ("dimgrey", "^--", "raw, one batched call"),
    ("one call a page", "scattered"): ("dimgrey", "v:", "raw, one call a page"),
}


def link_speeds(rows: list[dict], link: list[dict], path) -> None:
    """Draw min(codec, ratio x link) against the speed of a link: rows of one data set and bound, and ``link``."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(8, 4.3), layout="constrained", sharey=True)
    speeds = [2.0 ** (i / 8) for i in range(104)]  # 1 to 7500 GB/s
    ways = zip(panels, ("compress", "decompress"), ("to_host", "from_host"), WAYS.values(), strict=True)
    for axes, coder, where, title in ways:
        axes.plot(speeds, speeds, color="black", lw=1)
        labels = [(speeds[-1], "raw", "black")]
        for i, row in enumerate(rows):
            codec = row[f"{coder}_gbps"]
            axes.plot(speeds, [min(codec, row["ratio"] * x) for x in speeds], color=f"C{i}")
            axes.plot(codec, codec, "x", color=f"C{i}", ms=9, mew=2)
            labels.append((codec, f"{row['codec']}\n{row['ratio']:.2f}x", f"C{i}"))
        for row in link:
            if row["what"] == "copy":
                axes.axvline(row[f"{where}_raw_gbps"], color="grey", lw=1, ls=":")
                text = f"measured link\n{row[f'{where}_raw_gbps']:.0f} GB/s"
                axes.annotate(text, (row[f"{where}_raw_gbps"], 1.3), (4, 0), textcoords="offset points",
                              fontsize=8.5, color="dimgrey")  # fmt: skip
        own = [row for row in link if row["bound"] == rows[0]["bound"]]
        for row in own:
            axes.plot(row[f"{where}_link_gbps"], row[f"{where}_raw_gbps"], "o", color="C0", mec="black", ms=7)
        axes.set(xscale="log", yscale="log", xlim=(1, 1e5), ylim=(1, 2e4), title=title)
        axes.minorticks_off()
        axes.set_xticks(ticks := [1, 10, 100, 1000], map(str, ticks))
        axes.set_yticks(ticks, map(str, ticks))
        axes.set_xlabel("speed of the link, GB/s")
        axes.grid(True, alpha=0.3)
        _end_labels(axes, speeds[-1], labels)
    panels[0].set_ylabel("raw GB/s")
    what = f"{rows[0]['data']}, {rows[0]['bound']}"
    figure.suptitle(f"min(codec, ratio x link), {what}; x: break-even, o: measured", fontsize=10)
    _save(figure, path)


def page_sizes(rows: list[dict], path) -> None:
    """Draw GB/s against page size, each way: the pipeline, raw copies, the link and ratio x link."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(8, 5), layout="constrained", sharey=True)
    sizes = sorted({row["page_kib"] for row in rows})
    lines = {}
    for axes, way in zip(panels, WAYS, strict=True):
        here = sorted((row for row in rows if row["direction"] == way), key=lambda row: row["page_kib"])
        for (transport, slots), (colour, style, name) in PAGE_CURVES.items():
            own = [row for row in here if (row["transport"], row["slots"]) == (transport, slots)]
            if own:
                x, y = [row["page_kib"] for row in own], [row["gbps"] for row in own]
                (lines[name],) = axes.plot(x, y, style, color=colour, ms=4.5)
        link = max(row["gbps"] for row in here if row["transport"] == "large copy")
        most = link * max(row["ratio"] for row in here if row["transport"] == "staged")
        for height, text, style, side in ((link, "link", "-", "top"), (most, "ratio x link", ":", "bottom")):
            axes.axhline(height, color="black", lw=1, ls=style)
            axes.annotate(
                f"{text}: {height:.0f}",
                (0.02, height),
                (0, -3 if side == "top" else 3),
                axes.get_yaxis_transform(),
                textcoords="offset points",
                va=side,
                fontsize=9,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, map(str, sizes))
        axes.set_yticks(ticks := [1, 2, 5, 10, 20, 50, 100, 200, 500], map(str, ticks))
        axes.set(xlabel="page, KiB", title=f"{WAYS[way]} ({way})")
        drawn = [row["gbps"] for row in rows if (row["transport"], row["slots"]) in PAGE_CURVES]
        axes.set_ylim(0.8 * min(drawn), 1.7 * most)
        axes.minorticks_off()
        axes.grid(True, alpha=0.3)
    panels[0].set_ylabel("raw GB/s")
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle("Compression pays where its curve is above the raw one of such pages", fontsize=10)
    _save(figure, path)


def timeline(stages: list[dict], raw_ms: dict[str, float], path) -> None:
    """Draw the stages of one staged store and load, and below them what a raw copy of the batch takes."""
    plt = pyplot()
    figure, panels = plt.subplots(2, 1, figsize=(8, 4.3), layout="constrained", sharex=True)
    for axes, (direction, ms) in zip(panels, raw_ms.items(), strict=True):
        draw_timeline(axes, stages, direction)
        axes.broken_barh([(0, ms)], (-1.35, 0.7), color="darkgrey")
        axes.text(0.98 * ms, -1, f"{ms:.2f} ms", ha="right", va="center", fontsize=9)
        end = max(stage["end_ms"] for stage in stages if stage["direction"] == direction)
        axes.axvline(end, color="black", lw=1, ls=":")
        axes.annotate(f"done {end:.2f} ms", (end, 1.2), (4, 0), textcoords="offset points", fontsize=9)
        axes.set_yticks([-1, 0, 1], ["raw copy", "copy", "encode" if direction == "store" else "decode"])
        axes.set(xlabel="" if direction == "store" else "ms since the call", ylim=(-1.6, 1.6))
        axes.title.set_fontsize(10)
    _save(figure, path)


def tax(rows: list[dict], path) -> None:
    """Draw how much slower work gets beside each kind of swap."""
    plt = pyplot()
    works, swaps = (list(dict.fromkeys(row[key] for row in rows if row["swap"])) for key in ("work", "swap"))
    figure, panels = plt.subplots(
        1, len(works), figsize=(8, 4.5), layout="constrained", sharey=True, squeeze=False
    )
    right = max(row["slowdown"] for row in rows)
    for axes, work in zip(panels[0], works, strict=True):
        for offset, way, colour in ((-0.2, "D2H", "C0"), (0.2, "H2D", "C1")):
            for row in (row for row in rows if (row["work"], row["direction"]) == (work, way)):
                y = swaps.index(row["swap"]) + offset
                axes.barh(y, row["slowdown"], 0.38, color=colour)
                axes.text(row["slowdown"] + 0.03 * right, y, f"{row['slowdown']:.2f}", va="center", fontsize=8)
        axes.axvline(1, color="black", lw=1)
        axes.set_yticks(range(len(swaps)), swaps)
        axes.set_xlim(0, right * 1.22)
        axes.set_title(work, fontsize=9)
        axes.set_xlabel("time / time alone")
    panels[0][0].invert_yaxis()
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in ("C0", "C1")]
    figure.legend(handles, [f"{text} ({way})" for way, text in WAYS.items()], loc="outside upper center", ncols=2,
                  frameon=False)  # fmt: skip
    _save(figure, path)


def layer_bits(rows: list[dict], path) -> None:
    """Draw bits a value of each layer's K and V against the bound, a panel for each coding."""
    plt = pyplot()
    codings, bounds = (list(dict.fromkeys(row[key] for row in rows)) for key in ("coding", "bound"))
    places = sorted({(row["part"], row["layer"]) for row in rows})
    figure, panels = plt.subplots(
        1, len(codings), figsize=(8, 4), layout="constrained", sharey=True, squeeze=False
    )
    found = {(row["coding"], row["part"], row["layer"], row["bound"]): row["bits_per_value"] for row in rows}
    least, most = min(found.values()), max(found.values())
    for axes, coding in zip(panels[0], codings, strict=True):
        grid = [[found[(coding, *place, bound)] for bound in bounds] for place in places]
        image = axes.imshow(grid, vmin=least, vmax=most, cmap="viridis", aspect="auto")
        for y, line in enumerate(grid):
            for x, bits in enumerate(line):
                dark = bits < (least + most) / 2
                axes.text(x, y, f"{bits:.2f}", ha="center", va="center", fontsize=9,
                          color="white" if dark else "black")  # fmt: skip
        axes.set_xticks(range(len(bounds)), bounds, fontsize=9)
        axes.set_yticks(range(len(places)), [f"{part}, layer {layer}" for part, layer in places])
        axes.set(xlabel="bound", title=f"kv {coding}")
    figure.colorbar(image, ax=panels[0].tolist(), label="bits a value (16 uncompressed)")
    _save(figure, path)


def first_token(rows: list[dict], path) -> None:
    """Draw the distribution of the time to the first token, a panel for each number of requests in flight."""
    plt = pyplot()
    flights = sorted({row["in_flight"] for row in rows})
    figure, panels = plt.subplots(
        1, len(flights), figsize=(8, 4), layout="constrained", sharey=True, squeeze=False
    )
    for axes, flight in zip(panels[0], flights, strict=True):
        for variant, colour in variant_colours(rows).items():
            for row in (row for row in rows if (row["variant"], row["in_flight"]) == (variant, flight)):
                percent, ms = percentiles(row)
                axes.plot(ms, percent, "o-", ms=2.5, color=colour, label=variant)
        every = [ms for row in rows if row["in_flight"] == flight for ms in percentiles(row)[1]]
        low, high = 0.8 * min(every), 1.25 * max(every)
        axes.set(xscale="log", xlim=(low, high), xlabel="ms", title=f"{flight} in flight", ylim=(0, 103))
        axes.minorticks_off()
        ticks = [digit * 10**power for power in range(6) for digit in (1, 2, 5)]
        ticks = [tick for tick in ticks if low < tick < high]
        axes.set_xticks(ticks, map(str, ticks))
        axes.grid(True, alpha=0.3)
    panels[0][0].set_ylabel("% of restored requests")
    labels = {}  # name -> handle, of any panel: recompute is in the last one alone
    for axes in panels[0]:
        labels |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(labels.values(), labels, loc="outside upper center", ncols=min(4, len(labels)), frameon=False)
    _save(figure, path)


def percentiles(row: dict) -> tuple[tuple[int, ...], list[float]]:
    """Return (per cent, ms) of a row of ``evaluation.serve``: what it holds of the distribution.

    >>> percentiles({"first_token_ms_p50": 1.0, "first_token_ms_p90": 2.0, "first_token_ms_p99": 3.0})
    ((50, 90, 99), [1.0, 2.0, 3.0])
    """
    if "first_token_ms_percentiles" in row:
        return serve.PERCENTILES, row["first_token_ms_percentiles"]
    return (50, 90, 99), [row[f"first_token_ms_p{percent}"] for percent in (50, 90, 99)]


def _end_labels(axes, x: float, labels) -> None:
    """Write (y, text, colour) right of ``x`` on a logarithmic axis, moved apart where they would overlap."""
    axes.figure.canvas.draw()  # axes have their size after this alone
    scale, lowest = axes.transData, -1e9
    for y, text, colour in sorted(labels):
        height = scale.transform((x, y))[1]
        lowest = max(height, lowest + 15 * (1 + text.count("\n")) * DPI / 100)
        at = scale.inverted().transform((0, lowest))[1]
        axes.annotate(text, (x, at), (5, 0), textcoords="offset points", color=colour, fontsize=8.5, va="center")


def _save(figure, path) -> None:
    figure.savefig(path, dpi=DPI)
    pyplot().close(figure)
