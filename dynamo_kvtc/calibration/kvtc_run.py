"""Calibration of the kvtc profile: capture, then a basis and bit plans for each side of each layer group."""

from __future__ import annotations

import shutil
from pathlib import Path

from dynamo_kvtc.calibration.artifact import Artifact
from dynamo_kvtc.calibration.artifact_writer import FittedSide, write_artifact
from dynamo_kvtc.calibration.report import write_report
from dynamo_kvtc.calibration.settings import CalibrationSettings
from dynamo_kvtc.calibration.sides import fit_side, load_side, save_side
from dynamo_kvtc.calibration.stages import Calibration, Progress, check_memory
from dynamo_kvtc.calibration.statistics import SIDES, KvStatistics
from dynamo_kvtc.codec.geometry import CACHE_DTYPES

__all__ = ["KvtcCalibration"]


class KvtcCalibration(Calibration):
    """One run of the kvtc profile's calibration."""

    def run(self) -> Artifact:
        """Calibrate and write the artifact and its report."""
        settings, geometry = self.settings, self.loaded.geometry
        groups = settings.layer_groups(geometry)
        rows = [layers.count * geometry.layer_size for layers in groups]
        check_memory(rows)
        documents = self.documents()
        work = _Work(settings, len(documents), self.parameters, rows)
        state = self.open_state()
        statistics = self.capture(
            documents, len(documents), groups, state / "statistics.safetensors", work.captured
        )
        sides = self._fit(statistics, state, work)
        artifact = self._write(statistics, sides)
        shutil.rmtree(state, ignore_errors=True)
        return artifact

    def _fit(self, statistics: KvStatistics, state: Path, work: _Work) -> list[tuple[FittedSide, FittedSide]]:
        fitted: dict[tuple[int, str], FittedSide] = {}
        pending = [(group, side) for group in range(len(statistics.groups)) for side in SIDES]
        for number, (group, side) in enumerate(pending):
            path = state / f"side-{group}-{side}.safetensors"
            layers = statistics.groups[group]
            stage = f"fit {side} of layers {layers.first} to {layers.stop - 1}"
            self.progress(Progress(stage, work.fitted(number), work.total))
            if path.is_file():
                fitted[group, side] = load_side(path)
                continue
            if number == 0:
                statistics.save(state / "statistics.safetensors")
            fitted[group, side] = fit_side(
                statistics.moments(group, side),
                statistics.sample(group, side),
                self.settings.plan_ratios,
                layers=layers.count,
                method=self.settings.method,
                seed=self.settings.seed,
                basis_dtype=CACHE_DTYPES[self.settings.basis_dtype],
            )
            save_side(path, fitted[group, side])
            self.stop_if(self.should_stop())
        self.progress(Progress("write the artifact", work.total, work.total))
        return [(fitted[group, "keys"], fitted[group, "values"]) for group in range(len(statistics.groups))]

    def _write(self, statistics: KvStatistics, sides: list[tuple[FittedSide, FittedSide]]) -> Artifact:
        settings = self.settings
        artifact = write_artifact(
            settings.out,
            fingerprint=self.loaded.fingerprint,
            layer_groups=statistics.groups,
            sides=sides,
            ratios=settings.plan_ratios,
            calibration=self.record(statistics),
        )
        write_report(artifact)
        return artifact


class _Work:
    """Estimates of the work of each stage, so that the time left can be told.

    The factors are measured times relative to a product of matrices with as many operations.
    """

    def __init__(
        self, settings: CalibrationSettings, documents: int, parameters: int, rows: list[int]
    ) -> None:
        covariance = sum(2 * len(SIDES) * row**2 for row in rows)
        self._per_document = float(settings.document_tokens * (2 * parameters + covariance))
        self._capture = documents * self._per_document
        self._sides = [20.0 * row**3 + 4e5 * row * settings.sample_tokens for row in rows for _ in SIDES]
        self.total = self._capture + sum(self._sides)

    def captured(self, documents: int) -> Progress:
        """Progress after so many documents."""
        return Progress("capture keys and values", documents * self._per_document, self.total)

    def fitted(self, sides: int) -> float:
        """Work after all documents and so many sides."""
        return self._capture + sum(self._sides[:sides])
