"""The demo's two plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynamo_kvtc.demo.measure import DemoReport, Onboard
from dynamo_kvtc.errors import MissingDependencyError

__all__ = ["write_plots"]

_COLOURS = {"transfer": "#4c72b0", "open": "#dd8452", "project": "#55a868"}
_LABELS = {
    "transfer": "transfer (NIXL)",
    "open": "checksum, inflate, dequantise",
    "project": "project, RoPE, scatter",
}


def write_plots(report: DemoReport, folder: Path) -> list[Path]:
    """Write ``ratio-kl.png`` and ``timeline.png``.

    Raises
    ------
    MissingDependencyError
        If matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependencyError("plots need matplotlib: pip install 'dynamo-kvtc[demo]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    paths = [folder / "ratio-kl.png", folder / "timeline.png"]
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    _ratio_plot(axes, report)
    figure.savefig(paths[0], dpi=130)
    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    _timeline_plot(axes, report.serving.onboard)
    figure.savefig(paths[1], dpi=130)
    pyplot.close("all")
    return paths


def _ratio_plot(axes: Any, report: DemoReport) -> None:
    rows = sorted(report.quality, key=lambda row: float(row["ratio"]))
    axes.plot([row["ratio"] for row in rows], [row["kl"] for row in rows], "o-", label=report.profile)
    for row in rows:
        axes.annotate(
            f"nominal {row['nominal_ratio']:g}",
            (row["ratio"], row["kl"]),
            textcoords="offset points",
            xytext=(6, -10),
            fontsize=8,
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="ratio (16-bit bytes over all stored bytes)",
        ylabel="next-token KL against the uncompressed cache, nats",
        title=f"{report.model}: size against quality on held-out text",
    )
    axes.set_xticks([row["ratio"] for row in rows], [f"{row['ratio']:.1f}x" for row in rows])
    axes.minorticks_off()
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()


def _timeline_plot(axes: Any, onboard: Onboard) -> None:
    groups = sorted({interval.group for interval in onboard.intervals})
    rows: list[tuple[int, str]] = []
    for group in groups:
        stages = ("transfer",) if group < 0 else ("transfer", "open", "project")
        rows += [(group, stage) for stage in stages]
    for interval in onboard.intervals:
        axes.barh(
            rows.index((interval.group, interval.stage)),
            1e3 * (interval.stop - interval.start),
            left=1e3 * interval.start,
            height=0.8,
            color=_COLOURS[interval.stage],
            edgecolor="white",
            linewidth=0.4,
        )
    names = {-1: "headers"}
    axes.set_yticks(
        range(len(rows)), [f"{names.get(group, f'layer group {group}')}: {stage}" for group, stage in rows]
    )
    axes.invert_yaxis()
    first = 1e3 * onboard.first_layer_s
    axes.axvline(first, color="black", linewidth=0.8, linestyle="--")
    axes.annotate(f"layer 0 usable, {first:.0f} ms", (first, -0.6), fontsize=8, annotation_clip=False)
    for stage, colour in _COLOURS.items():
        axes.bar(0, 0, color=colour, label=_LABELS[stage])
    axes.legend(loc="lower left", fontsize=8)
    axes.set(
        xlabel="milliseconds",
        title=f"Onboarding {onboard.tokens} tokens from disk, overlap {onboard.overlap:.2f}x",
    )
    axes.title.set_position((0.5, 1.05))
    axes.grid(True, axis="x", alpha=0.3)
