"""How much an artifact of ``rd`` depends on its calibration: the amount of text, its domains, and the draw.

Every variant is calibrated anew and measured on the same held-out documents of all domains. Variants are
compared with the reference by the bytes they take at equal divergence, over all documents and by domain.
There are no recall documents among them: what is varied is the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from rich.table import Table

from benchmarks.quality.artifacts import CalibrationPlan, calibrated
from benchmarks.quality.codecs.streams import StreamCodec
from benchmarks.quality.domains import DOMAINS
from benchmarks.quality.equal_quality import bytes_at_equal_kl
from benchmarks.quality.measure import DocumentScore
from benchmarks.quality.models import model_spec
from benchmarks.quality.run import Step, measure_task
from benchmarks.quality.summary import ALL_GROUPS, summarise
from benchmarks.quality.tasks import TextTask
from dynamo_kvtc.calibration.models import load_model, resolve_model
from dynamo_kvtc.cli.output import make_table
from dynamo_kvtc.codec.rd import RdCodec
from dynamo_kvtc.evaluation.bootstrap import Interval

__all__ = ["FULL", "QUICK", "SHORT", "RobustnessPlan", "compare", "robustness_table", "run_variants"]

_PROFILE = "rd"


@dataclass(frozen=True)
class RobustnessPlan:
    """What is varied, and on what it is measured.

    Attributes
    ----------
    base : CalibrationPlan
        The reference. Its ratios enclose `kl`.
    tokens : tuple[int, ...]
        Other amounts of calibration text.
    domains : tuple[str, ...]
        Domains to calibrate on alone, with as many tokens as the reference.
    seeds : tuple[int, ...]
        Other draws of as much text.
    task : TextTask
        The held-out documents.
    kl : float
        Divergence at which bytes are compared, in nats.
    """

    base: CalibrationPlan
    tokens: tuple[int, ...]
    domains: tuple[str, ...]
    seeds: tuple[int, ...]
    task: TextTask
    kl: float = 0.005

    @property
    def reference(self) -> str:
        """Name of the reference."""
        return f"{self.base.tokens} tokens"

    def variants(self) -> dict[str, CalibrationPlan]:
        """Return the calibrations by name, the reference first."""
        found = {self.reference: self.base}
        found |= {f"{tokens} tokens": replace(self.base, tokens=tokens) for tokens in self.tokens}
        found |= {f"{domain} only": replace(self.base, domains=(domain,)) for domain in self.domains}
        found |= {f"seed {seed}": replace(self.base, seed=seed) for seed in self.seeds}
        return found


#: Ratios around the level of divergence that variants are compared at.
_RATIOS: Mapping[str, tuple[float, ...]] = {_PROFILE: (16.0, 24.0, 40.0)}

FULL = RobustnessPlan(
    base=CalibrationPlan(
        tokens=20_480, ratios=_RATIOS, sensitivity_documents=10, validation_documents=2, recall_share=0.0
    ),
    tokens=(10_240, 40_960),
    domains=tuple(DOMAINS),
    seeds=(1, 2),
    task=TextTask(per_domain=2),
)

#: The same with half the text, ten layers a basis and fewer draws, at a fifth of the time.
SHORT = RobustnessPlan(
    base=CalibrationPlan(
        tokens=12_288,
        document_tokens=1024,
        ratios={_PROFILE: (10.0, 20.0, 40.0)},
        layers_per_group=10,
        sensitivity_documents=5,
        validation_documents=1,
        recall_share=0.0,
    ),
    tokens=(6_144, 24_576),
    domains=tuple(DOMAINS),
    seeds=(1,),
    task=TextTask(per_domain=2, context_tokens=1024),
    kl=0.008,
)

QUICK = RobustnessPlan(
    base=CalibrationPlan(
        tokens=4096,
        document_tokens=1024,
        ratios={_PROFILE: (10.0, 40.0)},
        layers_per_group=10,
        sensitivity_documents=2,
        validation_documents=1,
        recall_share=0.0,
    ),
    tokens=(),
    domains=("technical",),
    seeds=(),
    task=TextTask(per_domain=1, context_tokens=512, scored_tokens=64, domains=("technical", "dialogue")),
)


def run_variants(
    model: str, plan: RobustnessPlan, dtype: str, tier_block_tokens: int, on_step: Callable[[Step], None]
) -> Iterator[DocumentScore]:
    """Calibrate all variants, then yield the scores of the documents; `codec` names the variant.

    Raises
    ------
    KvtcError
        The subclass that names what is missing or does not fit.
    """
    folder = resolve_model(model_spec(model))
    codecs = []
    for name, calibration in plan.variants().items():
        artifact = calibrated(
            folder,
            _PROFILE,
            dtype,
            calibration,
            lambda progress, name=name: on_step(  # type: ignore[misc]
                Step(f"{name}: {progress.stage}", progress.done, progress.total)
            ),
        )
        parameters = artifact.parameters
        codecs += [
            StreamCodec(name, f"{ratio:g}x", RdCodec(parameters, ratio=ratio), tier_block_tokens)
            for ratio in sorted(parameters.ratios.values())
        ]
    yield from measure_task(load_model(folder, dtype), model, plan.task, codecs, on_step)


def compare(scores: Sequence[DocumentScore], plan: RobustnessPlan) -> dict[str, dict[str, Interval | None]]:
    """Return each variant's bytes over the reference's at equal divergence, by variant and group.

    None where a variant's own points do not enclose the level.
    """
    groups = [ALL_GROUPS, *dict.fromkeys(score.group for score in scores)]
    compared: dict[str, dict[str, Interval | None]] = {}
    for variant in list(plan.variants())[1:]:
        compared[variant] = {}
        for group in groups:
            own = [score for score in scores if group in (score.group, ALL_GROUPS)]
            found = bytes_at_equal_kl(own, variant, plan.reference, (plan.kl,))
            compared[variant][group] = found[0].bytes if found else None
    return compared


def robustness_table(
    scores: Sequence[DocumentScore],
    compared: Mapping[str, Mapping[str, Interval | None]],
    plan: RobustnessPlan,
) -> Table:
    """Return a line for each variant: bytes at equal divergence, all documents first, then each domain."""
    groups = list(next(iter(compared.values()))) if compared else []
    rows = {(row.codec, row.setting): row for row in summarise(scores) if row.group == ALL_GROUPS}
    lines = []
    for variant in plan.variants():
        points = "; ".join(
            f"{row.ratio:.1f}x {row.metrics['kl'].mean:.4f}"
            for (name, _), row in rows.items()
            if name == variant
        )
        cells = [_cell(compared[variant][group]) if variant in compared else "1" for group in groups]
        lines.append((variant, points, *cells))
    title = f"bytes over those of {plan.reference} at a KL of {plan.kl:g}"
    return make_table(title, ("calibration", "ratio and KL", *groups), lines)


def _cell(interval: Interval | None) -> str:
    if interval is None:
        return "not measured"
    return f"{interval.mean:.2f} ({interval.low:.2f} to {interval.high:.2f})"
