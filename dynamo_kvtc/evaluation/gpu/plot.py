"""The roofline of a report: each stage's products or copies against what the device's rates allow."""

from __future__ import annotations

from pathlib import Path

from dynamo_kvtc.codec.gpu.stages import DECODE_STAGES, ENCODE_STAGES
from dynamo_kvtc.evaluation.gpu.report import GpuReport
from dynamo_kvtc.evaluation.plot import new_figure, save_figure

__all__ = ["plot_roofline"]


def plot_roofline(report: GpuReport, path: Path) -> None:
    """Write a PNG: operations a second against operations a byte, logarithmic, under the device's roof.

    A stage without products stands at one operation a byte, so that its height is its bytes a second.

    Raises
    ------
    MissingDependencyError
        If matplotlib is not installed.
    EvaluationError
        If the file cannot be written.
    """
    figure, axes = new_figure(8.0, 5.0)
    rates = report.rates
    ridge = rates.matrix / rates.memory
    intensities = [0.5, 1.0, ridge, 100 * ridge]
    axes.plot(intensities, [min(rates.matrix, x * rates.memory) for x in intensities], color="black")
    markers = dict(
        zip(dict.fromkeys((s.shape, s.profile) for s in report.shapes), "osD^vP*Xhd", strict=False)
    )
    names = [*ENCODE_STAGES, *DECODE_STAGES]
    for shape in report.shapes:
        for stage in (*shape.encode.stages, *shape.decode.stages):
            if not stage.seconds or not stage.bytes:
                continue
            work = stage.operations or stage.bytes
            axes.scatter(
                [work / stage.bytes],
                [work / stage.seconds],
                marker=markers.get((shape.shape, shape.profile), "."),
                color=f"C{names.index(stage.name)}",
                label=stage.name,
            )
    handles, labels = axes.get_legend_handles_labels()
    first = dict(zip(reversed(labels), reversed(handles), strict=True))
    axes.legend(first.values(), first.keys(), fontsize="small")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations a byte of device memory (1 where there are none)")
    axes.set_ylabel("operations a second; bytes a second where there are none")
    verb = "measured" if rates.source == "measured" else "predicted, roof of the data sheet"
    axes.set_title(f"{rates.device}, {verb}")
    axes.grid(visible=True, which="both", alpha=0.3)
    save_figure(figure, path)
