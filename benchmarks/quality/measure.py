"""Documents through codecs: a prefill for each document, a teacher-forced run for each probe and codec."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks.quality.codecs.base import DocumentCodec, StoredKv
from benchmarks.quality.tasks.base import Document, Probe
from dynamo_kvtc.calibration.divergence import DistributionSums
from dynamo_kvtc.calibration.model_cache import prefill, score
from dynamo_kvtc.calibration.models import LoadedModel
from dynamo_kvtc.errors import EvaluationError

__all__ = ["DocumentScore", "measure_document"]


@dataclass(frozen=True, slots=True)
class DocumentScore:
    """What one codec made of one document; sums over its probes.

    Attributes
    ----------
    model, task, group : str
        Where the document comes from.
    document : int
        Its number within the task.
    codec, setting : str
        What stored it.
    raw_bytes, stored_bytes : int
        Of the tokens that were handed over, at 16 bits, and what they take.
    tokens : int
        Answer tokens.
    kl, nll, reference_nll : float
        Sums over the answer tokens in nats: divergence from the predictions over the uncompressed cache,
        and negative log-likelihoods over the codec's cache and over the uncompressed one.
    agreements : int
        Answer tokens for which both caches give the same most likely token.
    probes, correct, reference_correct : int
        Probes, and how many of them are answered rightly over the codec's cache and the uncompressed one.
    """

    model: str
    task: str
    group: str
    document: int
    codec: str
    setting: str
    raw_bytes: int
    stored_bytes: int
    tokens: int
    kl: float
    nll: float
    reference_nll: float
    agreements: int
    probes: int
    correct: int
    reference_correct: int


@torch.inference_mode()
def measure_document(
    loaded: LoadedModel,
    document: Document,
    codecs: Sequence[DocumentCodec],
    *,
    model: str,
    task: str,
    number: int,
) -> Iterator[DocumentScore]:
    """Yield a document's score with each codec.

    Parameters
    ----------
    model, task, number
        What the scores are labelled with.

    Raises
    ------
    EvaluationError
        If a codec returns KV of another shape, or numbers that are not finite.
    """
    keys, values = prefill(loaded, document.context)
    references = [_predictions(loaded, keys, values, probe) for probe in document.probes]
    stored_tokens = document.stored_tokens
    for codec in codecs:
        stored = codec.store(keys[:stored_tokens], values[:stored_tokens])
        _check(codec, stored, keys[:stored_tokens])
        decoded_keys = torch.cat((stored.keys, keys[stored_tokens:]))
        decoded_values = torch.cat((stored.values, values[stored_tokens:]))
        sums = DistributionSums()
        correct = reference_correct = 0
        for probe, reference in zip(document.probes, references, strict=True):
            predictions = _predictions(loaded, decoded_keys, decoded_values, probe)
            answer = torch.tensor(probe.targets)
            sums.add(reference, predictions, answer)
            correct += _is_right(predictions, answer)
            reference_correct += _is_right(reference, answer)
        yield DocumentScore(
            model=model,
            task=task,
            group=document.group,
            document=number,
            codec=codec.family,
            setting=codec.setting,
            raw_bytes=stored_tokens * loaded.geometry.token_bytes_16bit,
            stored_bytes=stored.stored_bytes,
            tokens=sums.tokens,
            kl=sums.kl,
            nll=sums.nll,
            reference_nll=sums.reference_nll,
            agreements=sums.agreements,
            probes=len(document.probes),
            correct=correct,
            reference_correct=reference_correct,
        )


def _predictions(loaded: LoadedModel, keys: torch.Tensor, values: torch.Tensor, probe: Probe) -> torch.Tensor:
    """Return the logits before each of a probe's targets, float32 ``[targets, vocabulary]``."""
    return score(loaded, keys, values, probe.token_ids[:-1])[list(probe.places)]


def _is_right(predictions: torch.Tensor, answer: torch.Tensor) -> bool:
    return bool((predictions.argmax(-1) == answer).all())


def _check(codec: DocumentCodec, stored: StoredKv, keys: torch.Tensor) -> None:
    what = f"codec {codec.family} ({codec.setting})"
    if stored.keys.shape != keys.shape or stored.values.shape != keys.shape:
        raise EvaluationError(f"{what} changes the shape of the KV")
    if not (stored.keys.isfinite().all() and stored.values.isfinite().all()):
        raise EvaluationError(f"{what} decodes to NaN or infinity; its 16-bit side data do not hold this KV")
