"""Rows of a report: scores of documents put together, with intervals over documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.quality.measure import DocumentScore
from dynamo_kvtc.evaluation.bootstrap import Interval, ratio_interval

__all__ = ["ALL_GROUPS", "METRICS", "Row", "summarise"]

#: Name of the group that holds all documents of a task.
ALL_GROUPS = "all"


@dataclass(frozen=True)
class Row:
    """One codec with one setting, over the documents of one group of a task.

    Attributes
    ----------
    model, task, group, codec, setting : str
        What the row is about.
    ratio : float
        16-bit bytes of the tokens that were stored over the bytes they take.
    documents, probes, tokens : int
        How much was measured.
    metrics : dict[str, Interval]
        By name, see `METRICS`.
    """

    model: str
    task: str
    group: str
    codec: str
    setting: str
    ratio: float
    documents: int
    probes: int
    tokens: int
    metrics: dict[str, Interval]


def _kl(scores: Sequence[DocumentScore]) -> Interval:
    return ratio_interval([s.kl for s in scores], [s.tokens for s in scores])


def _top1(scores: Sequence[DocumentScore]) -> Interval:
    return ratio_interval([s.agreements for s in scores], [s.tokens for s in scores])


def _perplexity(scores: Sequence[DocumentScore]) -> Interval:
    nll = ratio_interval([s.nll for s in scores], [s.tokens for s in scores])
    return Interval(math.exp(nll.mean), math.exp(nll.low), math.exp(nll.high))


def _nll_change(scores: Sequence[DocumentScore]) -> Interval:
    return ratio_interval([s.nll - s.reference_nll for s in scores], [s.tokens for s in scores])


def _accuracy(scores: Sequence[DocumentScore]) -> Interval:
    return ratio_interval([s.correct for s in scores], [s.probes for s in scores])


def _accuracy_change(scores: Sequence[DocumentScore]) -> Interval:
    return ratio_interval([s.correct - s.reference_correct for s in scores], [s.probes for s in scores])


#: Metrics by name. Changes are against the uncompressed cache, document by document.
METRICS: dict[str, Callable[[Sequence[DocumentScore]], Interval]] = {
    "kl": _kl,
    "top1": _top1,
    "perplexity": _perplexity,
    "nll_change": _nll_change,
    "accuracy": _accuracy,
    "accuracy_change": _accuracy_change,
}


def summarise(scores: Sequence[DocumentScore]) -> list[Row]:
    """Put scores together by model, task, group, codec and setting, in the order in which they came.

    A task with several groups has rows for each of them and for all of them together.
    """
    groups: dict[tuple[str, str], dict[str, None]] = {}
    for score in scores:
        groups.setdefault((score.model, score.task), {})[score.group] = None
    rows = []
    for (model, task), names in groups.items():
        own = [s for s in scores if (s.model, s.task) == (model, task)]
        for group in [*names, *([ALL_GROUPS] if len(names) > 1 else [])]:
            members = [s for s in own if group in (s.group, ALL_GROUPS)]
            for codec, setting in dict.fromkeys((s.codec, s.setting) for s in members):
                chosen = [s for s in members if (s.codec, s.setting) == (codec, setting)]
                rows.append(_row(model, task, group, codec, setting, chosen))
    return rows


def _row(model: str, task: str, group: str, codec: str, setting: str, scores: Sequence[DocumentScore]) -> Row:
    return Row(
        model=model,
        task=task,
        group=group,
        codec=codec,
        setting=setting,
        ratio=sum(s.raw_bytes for s in scores) / sum(s.stored_bytes for s in scores),
        documents=len(scores),
        probes=sum(s.probes for s in scores),
        tokens=sum(s.tokens for s in scores),
        metrics={name: metric(scores) for name, metric in METRICS.items()},
    )
