"""Calibration of the rd profile: sensitivity, capture, bases, then plans measured by real streams."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from dynamo_kvtc.calibration.artifact import Artifact
from dynamo_kvtc.calibration.artifact_writer import FittedRdSide, write_artifact
from dynamo_kvtc.calibration.rd_basis import RdBasis, fit_rd_basis, load_rd_basis, save_rd_basis
from dynamo_kvtc.calibration.rd_plans import FittedPlan
from dynamo_kvtc.calibration.rd_search import PlanSearch, Rung
from dynamo_kvtc.calibration.report import write_report
from dynamo_kvtc.calibration.sensitivity_stage import Sensitivities, SensitivityStage
from dynamo_kvtc.calibration.sides import layer_errors
from dynamo_kvtc.calibration.stages import Calibration, Progress, check_memory
from dynamo_kvtc.calibration.statistics import SIDES, KvStatistics
from dynamo_kvtc.calibration.text import Documents
from dynamo_kvtc.calibration.validation import Validator, coded_tokens
from dynamo_kvtc.codec.geometry import CACHE_DTYPES, LayerRange
from dynamo_kvtc.codec.header import Profile
from dynamo_kvtc.codec.parameters import (
    ARTIFACT_ID_BYTES,
    CodecParameters,
    GroupParameters,
    RdParameters,
    RdSideParameters,
)
from dynamo_kvtc.codec.rd import RdCodec
from dynamo_kvtc.codec.rd_plan import RdPlan
from dynamo_kvtc.errors import CalibrationError

__all__ = ["RdCalibration"]


class RdCalibration(Calibration):
    """One run of the rd profile's calibration."""

    def run(self) -> Artifact:
        """Calibrate and write the artifact and its report."""
        settings, geometry = self.settings, self.loaded.geometry
        groups = settings.layer_groups(geometry)
        rows = [layers.count * geometry.layer_size for layers in groups]
        check_memory(rows)
        documents = self.documents()
        fitted = len(documents) - settings.validation_documents
        if fitted < 1:
            raise CalibrationError(
                f"{len(documents)} documents leave none to fit once {settings.validation_documents} are kept "
                "for validation; give more text or more --tokens"
            )
        # Validation comes last; what would end it is told before hours of work.
        for index in range(fitted, len(documents)):
            coded_tokens(
                len(documents[index]),
                scored_tokens=settings.scored_tokens,
                recent_window=settings.recent_window,
            )
        work = _Work(self, fitted, rows)
        state = self.open_state()
        stage = SensitivityStage(self.loaded, settings, documents, fitted, groups, state)
        for done in stage.capture():
            self.progress(Progress("capture what the model notices", *work.sensitivity(done, len(stage))))
            self.stop_if(self.should_stop())
        self.progress(Progress("fit metric and importance", *work.captured(0)))
        sensitivities = stage.fit()
        statistics = self.capture(
            documents,
            fitted,
            groups,
            state / "statistics.safetensors",
            lambda count: Progress("capture keys and values", *work.captured(count)),
            sensitivities.prepare,
        )
        bases = self._fit_bases(statistics, sensitivities, state, work)
        rungs = self._search(documents, fitted, statistics, bases, work)
        self.progress(Progress("write the artifact", work.total, work.total))
        artifact = self._write(statistics, bases, rungs, len(stage))
        shutil.rmtree(state, ignore_errors=True)
        return artifact

    def _fit_bases(
        self, statistics: KvStatistics, sensitivities: Sensitivities, state: Path, work: _Work
    ) -> list[RdBasis]:
        """Return the bases of keys and values of every layer group, in this order."""
        settings = self.settings
        bases = []
        for number, (group, side) in enumerate(map(_place, range(len(SIDES) * len(statistics.groups)))):
            layers = statistics.groups[group]
            name = f"fit {side} of layers {layers.first} to {layers.stop - 1}"
            self.progress(Progress(name, *work.fitted(number)))
            path = state / f"basis-{group}-{side}.safetensors"
            if not path.is_file():
                if number == 0:
                    statistics.save(state / "statistics.safetensors")
                fit = fit_rd_basis(
                    statistics.moments(group, side),
                    sensitivities[group, side],
                    method=settings.method,
                    seed=settings.seed,
                    basis_dtype=CACHE_DTYPES[settings.basis_dtype],
                )
                save_rd_basis(path, fit)
            bases.append(load_rd_basis(path))
            self.stop_if(self.should_stop())
        return bases

    def _search(
        self,
        documents: Documents,
        fitted: int,
        statistics: KvStatistics,
        bases: Sequence[RdBasis],
        work: _Work,
    ) -> dict[int, tuple[float, Rung]]:
        """Return nominal ratio and plans by plan id, by rising ratio."""
        settings, geometry = self.settings, self.loaded.geometry
        validator = Validator(
            self.loaded,
            [documents[index] for index in range(fitted, len(documents))],
            scored_tokens=settings.scored_tokens,
            recent_window=settings.recent_window,
        )

        def codec(plans: Sequence[FittedPlan]) -> RdCodec:
            parameters = self._parameters(statistics.groups, bases, [{0: fit.plan} for fit in plans])
            return RdCodec(parameters, ratio=parameters.ratios[0])

        samples = [
            basis.coefficients(statistics.sample(*_place(number))) for number, basis in enumerate(bases)
        ]
        search = PlanSearch(
            samples,
            8 * geometry.token_bytes_16bit,
            ratio_of=lambda plans: validator.ratio(codec(plans)),
            measure=lambda plans: validator.measure(codec(plans)),
        )
        found: list[tuple[float, Rung]] = []
        wanted = len(settings.ratios) + len(settings.max_kls)
        for ratio in sorted(settings.ratios):
            self.progress(Progress(f"plan for ratio {ratio:g}", *work.planned(len(found), wanted)))
            found.append((ratio, search.for_ratio(ratio)))
            self.stop_if(self.should_stop())
        ladder = [rung for _, rung in found]
        for max_kl in sorted(settings.max_kls):
            self.progress(Progress(f"plan for a KL of {max_kl:g}", *work.planned(len(found), wanted)))
            rung = search.for_divergence(max_kl, ladder)
            found.append((round(rung.measured.ratio, 3), rung))
            self.stop_if(self.should_stop())
        # Two targets may have led to the same step.
        by_ratio = dict(sorted(found, key=lambda entry: entry[0]))
        return dict(enumerate(by_ratio.items()))

    def _parameters(
        self, groups: Sequence[LayerRange], bases: Sequence[RdBasis], plans: Sequence[Mapping[int, RdPlan]]
    ) -> RdParameters:
        """Return parameters of one plan, as `load_artifact` would, for measuring it."""
        sides = [
            RdSideParameters(
                mean=basis.mean,
                basis=basis.basis.float(),
                metric=basis.metric,
                importance=basis.importance,
                importance_bias=basis.importance_bias,
                plans=plan,
            )
            for basis, plan in zip(bases, plans, strict=True)
        ]
        return CodecParameters(
            artifact_id=bytes(ARTIFACT_ID_BYTES),
            geometry=self.loaded.geometry,
            rope=self.loaded.rope,
            groups=tuple(
                GroupParameters(layers, keys, values)
                for layers, keys, values in zip(groups, sides[::2], sides[1::2], strict=True)
            ),
            ratios={0: 16.0},
            profile=Profile.RD,
        )

    def _write(
        self,
        statistics: KvStatistics,
        bases: Sequence[RdBasis],
        rungs: dict[int, tuple[float, Rung]],
        sensitivity_documents: int,
    ) -> Artifact:
        settings = self.settings
        sides = []
        for number, basis in enumerate(bases):
            fits = {plan_id: rung.plans[number] for plan_id, (_, rung) in rungs.items()}
            rank = max(fit.plan.rank for fit in fits.values())
            group, side = _place(number)
            rows = statistics.sample(group, side)
            layers = statistics.groups[group].count
            sides.append(
                FittedRdSide(
                    mean=basis.mean,
                    basis=basis.basis[:rank],
                    metric=basis.metric,
                    importance=basis.importance,
                    importance_bias=basis.importance_bias,
                    variances=basis.variances[:rank],
                    total_variance=basis.total_variance,
                    plans={plan_id: fit.plan for plan_id, fit in fits.items()},
                    errors={plan_id: _errors(basis, fit, rows, layers) for plan_id, fit in fits.items()},
                )
            )
        artifact = write_artifact(
            settings.out,
            fingerprint=self.loaded.fingerprint,
            layer_groups=statistics.groups,
            sides=list(zip(sides[::2], sides[1::2], strict=True)),
            ratios={plan_id: ratio for plan_id, (ratio, _) in rungs.items()},
            measured={plan_id: rung.measured for plan_id, (_, rung) in rungs.items()},
            calibration=self.record(
                statistics,
                sensitivity_documents=sensitivity_documents,
                scored_tokens=settings.scored_tokens,
                validation_documents=settings.validation_documents,
                sensitivity=settings.sensitivity,
            ),
        )
        write_report(artifact)
        return artifact


def _place(number: int) -> tuple[int, str]:
    """Return layer group and side of the basis with this number."""
    return number // len(SIDES), SIDES[number % len(SIDES)]


def _errors(basis: RdBasis, fit: FittedPlan, rows: torch.Tensor, layers: int) -> tuple[float, ...]:
    """Return each layer's squared error over its squared size, on sampled rows."""
    decoded = basis.reconstruct(fit.decoded / basis.scales(rows)[:, None], fit.plan.components)
    return layer_errors(rows - basis.mean, decoded, layers)


class _Work:
    """Estimates of the work of each stage, so that the time left can be told.

    The factors are measured times relative to a product of matrices with as many operations.
    """

    def __init__(self, calibration: RdCalibration, documents: int, rows: list[int]) -> None:
        settings, parameters = calibration.settings, calibration.parameters
        tokens = settings.document_tokens
        covariance = sum(2 * len(SIDES) * row**2 for row in rows)
        forward = 2.0 * parameters * tokens
        backward = 12.0 * parameters * settings.scored_tokens
        self._sensitivity = min(settings.sensitivity_documents, documents) * (forward + backward)
        self._per_document = forward + tokens * covariance
        self._capture = documents * self._per_document
        self._sides = [20.0 * row**3 for row in rows for _ in SIDES]
        plans = len(settings.ratios) + len(settings.max_kls)
        per_plan = 2 * forward * settings.validation_documents + 2e5 * sum(rows) * settings.sample_tokens
        self._plans = plans * per_plan
        self.total = self._sensitivity + self._capture + sum(self._sides) + self._plans

    def sensitivity(self, done: int, documents: int) -> tuple[float, float]:
        """Work after so many documents of the first stage, and all work."""
        return self._sensitivity * done / max(1, documents), self.total

    def captured(self, documents: int) -> tuple[float, float]:
        """Work after so many documents of the second stage, and all work."""
        return self._sensitivity + documents * self._per_document, self.total

    def fitted(self, sides: int) -> tuple[float, float]:
        """Work after so many bases, and all work."""
        return self._sensitivity + self._capture + sum(self._sides[:sides]), self.total

    def planned(self, done: int, wanted: int) -> tuple[float, float]:
        """Work after so many plans, and all work."""
        return self.total - self._plans * (1 - done / max(1, wanted)), self.total
