"""Plots of evaluations."""

from __future__ import annotations

from pathlib import Path

from dynamo_kvtc.errors import EvaluationError, MissingDependencyError
from dynamo_kvtc.evaluation.report import EvaluationReport

__all__ = ["plot_ratio_against_kl"]


def plot_ratio_against_kl(report: EvaluationReport, path: Path) -> None:
    """Write a PNG: ratio against next-token divergence, both logarithmic, one line per profile.

    Rows without divergence (the raw profile) have no place on a logarithmic axis and are left out.

    Raises
    ------
    MissingDependencyError
        If matplotlib is not installed.
    EvaluationError
        If the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "plots need matplotlib: pip install 'dynamo-kvtc[demo]', or leave out the plot"
        ) from error
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for profile in dict.fromkeys(row.profile for row in report.rows):
        rows = sorted((r for r in report.rows if r.profile == profile and r.kl > 0), key=lambda r: r.ratio)
        if not rows:
            continue
        axes.plot([r.ratio for r in rows], [r.kl for r in rows], marker="o", label=profile)
        for row in rows:
            axes.annotate(
                f"{row.nominal_ratio:g}x nominal",
                (row.ratio, row.kl),
                textcoords="offset points",
                xytext=(6, -10),
                fontsize="small",
            )
        axes.legend()
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("ratio (16-bit bytes over all stored bytes of the coded tokens)")
    axes.set_ylabel("next-token KL (nats)")
    axes.set_title(f"{report.architecture}, {report.dtype}, {report.protocol.documents} documents")
    axes.grid(visible=True, which="both", alpha=0.3)
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise EvaluationError(f"cannot write the plot {path}: {error}; choose another place") from error
