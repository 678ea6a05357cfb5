"""Plots of evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynamo_kvtc.errors import EvaluationError, MissingDependencyError
from dynamo_kvtc.evaluation.report import EvaluationReport

__all__ = ["RATIO_LABEL", "new_figure", "plot_ratio_against_kl", "save_figure"]

#: What the ratio axis of every plot is called.
RATIO_LABEL = "ratio (16-bit bytes over all stored bytes)"


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """Return a matplotlib figure of so many inches, and its axes; no display is needed.

    Raises
    ------
    MissingDependencyError
        If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "plots need matplotlib: pip install 'dynamo-kvtc[demo]', or leave out the plot"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG.

    Raises
    ------
    EvaluationError
        If the file cannot be written.
    """
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise EvaluationError(f"cannot write the plot {path}: {error}; choose another place") from error


def plot_ratio_against_kl(reports: Sequence[EvaluationReport], path: Path) -> None:
    """Write a PNG: ratio against next-token divergence, both logarithmic, one line per profile.

    Bars are the 95 % intervals over documents. Rows without divergence (the raw profile) have no place on a
    logarithmic axis and are left out.

    Parameters
    ----------
    reports : Sequence[EvaluationReport]
        At least one, each of another artifact; of the same model and protocol.
    path : Path
        The file.

    Raises
    ------
    MissingDependencyError
        If matplotlib is not installed.
    EvaluationError
        If the file cannot be written.
    """
    figure, axes = new_figure(6.4, 4.4)
    found = [row for report in reports for row in report.rows if row.kl > 0]
    for profile in dict.fromkeys(row.profile for row in found):
        rows = sorted((row for row in found if row.profile == profile), key=lambda row: row.ratio)
        bars = [[r.kl - r.kl_low for r in rows], [r.kl_high - r.kl for r in rows]]
        axes.errorbar(
            [r.ratio for r in rows], [r.kl for r in rows], yerr=bars, marker="o", capsize=3, label=profile
        )
        for row in rows:
            axes.annotate(
                f"{profile} {row.nominal_ratio:g}",
                (row.ratio, row.kl),
                textcoords="offset points",
                xytext=(6, -10),
                fontsize="small",
            )
        axes.legend()
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(RATIO_LABEL)
    axes.set_ylabel("next-token KL (nats)")
    report = reports[0]
    axes.set_title(f"{report.architecture}, {report.dtype}, {report.protocol.documents} documents")
    axes.grid(visible=True, which="both", alpha=0.3)
    save_figure(figure, path)
