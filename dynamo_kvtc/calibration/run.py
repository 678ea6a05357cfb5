"""The whole calibration, stage by stage; it can be interrupted and continued, and repeats exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dynamo_kvtc.calibration.artifact import MANIFEST_NAME, Artifact, load_artifact
from dynamo_kvtc.calibration.kvtc_run import KvtcCalibration
from dynamo_kvtc.calibration.models import load_model, resolve_model
from dynamo_kvtc.calibration.rd_run import RdCalibration
from dynamo_kvtc.calibration.settings import CalibrationSettings, InputDigests, digest_inputs
from dynamo_kvtc.calibration.stages import STATE_FOLDER, Calibration, Progress
from dynamo_kvtc.errors import ArtifactError

__all__ = ["STATE_FOLDER", "Progress", "calibrate"]


def calibrate(
    settings: CalibrationSettings,
    progress: Callable[[Progress], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Artifact:
    """Calibrate a model and write the artifact and its report to ``settings.out``.

    A ready artifact of the same inputs is returned as it is. An unfinished calibration of the same inputs
    is continued, with the same result as without the interruption.

    Parameters
    ----------
    settings : CalibrationSettings
        What to do.
    progress : Callable[[Progress], None]
        Called after each piece of work.
    should_stop : Callable[[], bool]
        Asked between pieces of work, every few seconds; when it says yes, the state is saved.

    Raises
    ------
    CalibrationStoppedError
        If `should_stop` said yes.
    CalibrationError
        If the model or the text is unfit, or the statistics would not fit into memory.
    MissingDependencyError, RopeError
        As `dynamo_kvtc.calibration.models.load_model`.
    """
    with _torch_threads(settings.threads):
        folder = resolve_model(settings.model)
        digests = digest_inputs(settings, folder)
        ready = _ready_artifact(settings.out, digests)
        if ready is not None:
            return ready
        loaded = load_model(folder, settings.dtype)
        profile: type[Calibration] = RdCalibration if settings.profile == "rd" else KvtcCalibration
        return profile(settings, loaded, digests, progress, should_stop).run()


def _ready_artifact(out: Path, digests: InputDigests) -> Artifact | None:
    if not (out / MANIFEST_NAME).is_file():
        return None
    try:
        artifact = load_artifact(out)
    except ArtifactError:
        return None  # it will be replaced
    return artifact if artifact.manifest.calibration.input_digest == digests.everything else None


@contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
