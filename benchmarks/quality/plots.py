"""Plots: quality against ratio, a line for each codec, bars for the intervals over documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.quality.summary import ALL_GROUPS, Row
from dynamo_kvtc.evaluation.plot import RATIO_LABEL, new_figure, save_figure

__all__ = ["write_plots"]

_LABELS = {
    "kl": "next-token KL (nats)",
    "top1": "same most likely next token",
    "perplexity": "perplexity",
    "nll_change": "change of negative log-likelihood (nats)",
    "accuracy": "accuracy",
    "accuracy_change": "change of accuracy",
}


def write_plots(rows: Sequence[Row], metrics_of: Mapping[str, Sequence[str]], folder: Path) -> list[Path]:
    """Write a PNG for each model, task and metric, over all documents of the task.

    Parameters
    ----------
    metrics_of : Mapping[str, Sequence[str]]
        Which metrics to draw, by task.
    folder : Path
        Where to; files are called ``model-task-metric.png``.

    Raises
    ------
    MissingDependencyError
        If matplotlib is not installed.
    EvaluationError
        If a file cannot be written.
    """
    paths = []
    for model, task in dict.fromkeys((row.model, row.task) for row in rows):
        own = [row for row in rows if (row.model, row.task) == (model, task)]
        whole = [row for row in own if row.group == ALL_GROUPS] or own
        for metric in metrics_of.get(task, ()):
            path = folder / f"{model}-{task}-{metric}.png"
            _plot(whole, metric, f"{model}, {task}, {whole[0].documents} documents", path)
            paths.append(path)
    return paths


def _plot(rows: Sequence[Row], metric: str, title: str, path: Path) -> None:
    figure, axes = new_figure(7.2, 4.8)
    logarithmic = metric == "kl"
    for codec in dict.fromkeys(row.codec for row in rows):
        # No divergence has no place on a logarithmic axis.
        points = [
            (row.ratio, row.metrics[metric])
            for row in sorted(rows, key=lambda row: row.ratio)
            if row.codec == codec and (row.metrics[metric].mean > 0 or not logarithmic)
        ]
        if not points:
            continue
        estimates = [interval for _, interval in points]
        bars = [[e.mean - e.low for e in estimates], [e.high - e.mean for e in estimates]]
        axes.errorbar(
            [ratio for ratio, _ in points],
            [e.mean for e in estimates],
            yerr=bars,
            marker="o",
            markersize=4,
            capsize=3,
            label=codec,
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}x")
    if logarithmic:
        axes.set_yscale("log")
    axes.set_xlabel(RATIO_LABEL)
    axes.set_ylabel(_LABELS[metric])
    axes.set_title(f"{title}; bars are 95 % intervals")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize="small")
    save_figure(figure, path)
