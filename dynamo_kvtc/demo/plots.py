"""The demo's two plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynamo_kvtc.demo.measure import DemoReport, Onboard
from dynamo_kvtc.errors import MissingDependencyError
from dynamo_kvtc.evaluation.plot import plot_ratio_against_kl

__all__ = ["write_plots"]

#: Colour and description of each stage of an onboard.
_STAGES = {
    "transfer": ("#4c72b0", "transfer (NIXL)"),
    "open": ("#dd8452", "checksum, inflate, dequantise"),
    "project": ("#55a868", "project, RoPE, scatter"),
}


def write_plots(report: DemoReport, folder: Path) -> list[Path]:
    """Write ``ratio-kl.png`` and ``timeline.png``.

    Raises
    ------
    MissingDependencyError
        If matplotlib is not installed.
    """
    paths = [folder / "ratio-kl.png", folder / "timeline.png"]
    plot_ratio_against_kl(list(report.quality.values()), paths[0])
    _plot_timelines(report.serving.onboards, paths[1])
    return paths


def _plot_timelines(onboards: tuple[Onboard, ...], path: Path) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("plots need matplotlib: pip install 'dynamo-kvtc[demo]'") from error
    figure = Figure(figsize=(9, 4.2 * len(onboards)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, onboard in zip(figure.subplots(len(onboards), squeeze=False)[:, 0], onboards, strict=True):
        _draw_timeline(axes, onboard)
    figure.savefig(path, dpi=120)


def _draw_timeline(axes: Any, onboard: Onboard) -> None:
    rows = list(dict.fromkeys((i.group, i.stage) for i in sorted(onboard.intervals, key=_row_order)))
    for interval in onboard.intervals:
        axes.barh(
            rows.index((interval.group, interval.stage)),
            1e3 * (interval.stop - interval.start),
            left=1e3 * interval.start,
            height=0.8,
            color=_STAGES[interval.stage][0],
            edgecolor="white",
            linewidth=0.4,
        )
    labels = ["headers" if group < 0 else f"layer group {group}: {stage}" for group, stage in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    first = 1e3 * onboard.first_layer_s
    axes.axvline(first, color="black", linewidth=0.8, linestyle="--")
    axes.annotate(
        f" layer 0 usable, {first:.0f} ms", (first, 0), fontsize="small", verticalalignment="center"
    )
    for colour, label in _STAGES.values():
        axes.bar(0, 0, color=colour, label=label)
    axes.legend(loc="lower left", fontsize="small")
    limit = onboard.disk_bytes_per_s
    disk = "from disk" if limit is None else f"from a disk throttled to {limit / 1e6:.1f} MB/s"
    axes.set_title(f"Onboarding {onboard.tokens} tokens {disk}: overlap {onboard.overlap:.2f}x")
    axes.set_xlabel("milliseconds")
    axes.grid(True, axis="x", alpha=0.3)


def _row_order(interval: Any) -> tuple[int, int]:
    return interval.group, list(_STAGES).index(interval.stage)
