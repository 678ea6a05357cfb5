"""Reports: scores kept line by line, the JSON of a run, and its tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.quality.equal_quality import EqualQuality, bytes_at_equal_kl
from benchmarks.quality.measure import DocumentScore
from benchmarks.quality.summary import Row
from dynamo_kvtc.cli.output import make_table
from dynamo_kvtc.errors import EvaluationError
from dynamo_kvtc.evaluation.bootstrap import Interval

__all__ = [
    "BASELINE",
    "compare_bytes",
    "equal_quality_table",
    "read_scores",
    "tables",
    "write_results",
    "write_score",
]

#: The codec that others are compared with at equal quality, and the task that quality is measured on.
BASELINE, _EQUAL_QUALITY_TASK = "kvtc", "text"

_PERCENT = ("top1", "accuracy", "accuracy_change")


def write_score(path: Path, score: DocumentScore) -> None:
    """Append a score to a file, one JSON object a line, so that an interrupted run keeps what it has."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(score), allow_nan=False) + "\n")


def read_scores(path: Path) -> list[DocumentScore]:
    """Read the scores that `write_score` wrote.

    Raises
    ------
    EvaluationError
        If the file cannot be read or holds something else.
    """
    names = {field.name for field in fields(DocumentScore)}
    scores = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            if not isinstance(values, dict) or values.keys() != names:
                raise ValueError("a line is not a score")
            scores.append(DocumentScore(**values))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"cannot read the scores {path}: {error}; run the evaluation again") from error
    return scores


def compare_bytes(scores: Sequence[DocumentScore]) -> dict[str, list[EqualQuality]]:
    """Compare all codecs with the baseline at equal divergence, by model, where both were measured."""
    found = {}
    for model in dict.fromkeys(s.model for s in scores):
        own = [s for s in scores if s.model == model and s.task == _EQUAL_QUALITY_TASK]
        codecs = dict.fromkeys(s.codec for s in own)
        if BASELINE in codecs:
            pairs = (bytes_at_equal_kl(own, codec, BASELINE) for codec in codecs if codec != BASELINE)
            found[model] = [one for pair in pairs for one in pair]
    return found


def write_results(
    path: Path,
    rows: Sequence[Row],
    equal_quality: Mapping[str, Sequence[EqualQuality]],
    *,
    environment: Mapping[str, Any],
    settings: Mapping[str, Any],
    **more: Any,
) -> None:
    """Write everything but the single scores as JSON, and what else there is under names of its own.

    Raises
    ------
    EvaluationError
        If the file cannot be written.
    """
    content = {
        "environment": environment,
        "settings": settings,
        "rows": [asdict(row) for row in rows],
        "bytes_at_equal_kl": {
            model: [asdict(one) for one in found] for model, found in equal_quality.items()
        },
        **more,
    }
    try:
        path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise EvaluationError(f"cannot write {path}: {error}; choose another place") from error


def tables(rows: Sequence[Row], metrics_of: Mapping[str, Sequence[str]]) -> list[Table]:
    """Return a table for each model and task.

    Parameters
    ----------
    metrics_of : Mapping[str, Sequence[str]]
        Which metrics to show, by task.
    """
    found = []
    for model, task in dict.fromkeys((row.model, row.task) for row in rows):
        own = [row for row in rows if (row.model, row.task) == (model, task)]
        metrics = metrics_of.get(task, ())
        lines = [
            (
                row.group,
                row.codec,
                row.setting,
                f"{row.ratio:.2f}x",
                str(row.documents),
                str(row.probes),
                *(_cell(metric, row.metrics[metric]) for metric in metrics),
            )
            for row in own
        ]
        columns = ("group", "codec", "setting", "ratio", "documents", "probes", *metrics)
        found.append(make_table(f"{model}: {task}", columns, lines))
    return found


def equal_quality_table(model: str, found: Iterable[EqualQuality]) -> Table:
    """Return a model's table of bytes at equal divergence: one line a codec, one column a level."""
    cells = {(one.codec, one.kl): one.bytes for one in found}
    levels = sorted({kl for _, kl in cells})
    lines = [
        (
            codec,
            *(
                f"{cell.mean:.3f} ({cell.low:.3f} to {cell.high:.3f})" if cell else "not measured"
                for cell in (cells.get((codec, level)) for level in levels)
            ),
        )
        for codec in dict.fromkeys(codec for codec, _ in cells)
    ]
    title = f"{model}: bytes over those of {BASELINE} at equal next-token KL"
    return make_table(title, ("codec", *(f"KL {level:g}" for level in levels)), lines)


def _cell(metric: str, interval: Interval) -> str:
    if metric in _PERCENT:
        sign = "+" if metric.endswith("change") else ""
        return f"{interval.mean:{sign}.1%} ({interval.low:{sign}.1%} to {interval.high:{sign}.1%})"
    return f"{interval.mean:.4g} ({interval.low:.4g} to {interval.high:.4g})"
