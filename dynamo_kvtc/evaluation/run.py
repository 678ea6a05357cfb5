"""Evaluate codecs on held-out text with a real model and real streams."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dynamo_kvtc.calibration.artifact import Artifact
from dynamo_kvtc.calibration.divergence import DistributionSums
from dynamo_kvtc.calibration.model_cache import prefill, score
from dynamo_kvtc.calibration.models import LoadedModel
from dynamo_kvtc.calibration.text import Documents
from dynamo_kvtc.codec.base import TierBlock
from dynamo_kvtc.codec.geometry import KvGeometry
from dynamo_kvtc.codec.rope import RopeParameters
from dynamo_kvtc.errors import EvaluationError
from dynamo_kvtc.evaluation.bootstrap import ratio_interval
from dynamo_kvtc.evaluation.codecs import CodecUnderTest, codecs_under_test
from dynamo_kvtc.evaluation.metrics import RowErrorSums
from dynamo_kvtc.evaluation.protocol import EvaluationProtocol
from dynamo_kvtc.evaluation.report import EvaluationReport, EvaluationRow

__all__ = ["StepCallback", "evaluate", "evaluate_codecs", "read_documents"]

#: Called with the steps done and the steps in all; a step is one codec on one document.
StepCallback = Callable[[int, int], None]


def evaluate(
    loaded: LoadedModel,
    artifact: Artifact,
    texts: Sequence[Path],
    ratios: Sequence[float] | None = None,
    *,
    profile: str | None = None,
    protocol: EvaluationProtocol | None = None,
    on_step: StepCallback | None = None,
) -> EvaluationReport:
    """Measure ratio and quality of an artifact on held-out text.

    Parameters
    ----------
    loaded : LoadedModel
        The model that the artifact was calibrated for, in the dtype it was calibrated in.
    artifact : Artifact
        What to measure.
    texts : Sequence[Path]
        UTF-8 files, disjoint from the calibration's; documents are cut evenly from all of them.
    ratios : Sequence[float], optional
        Ratios of the artifact's plans; by default all of them.
    profile : str, optional
        One of `dynamo_kvtc.evaluation.codecs.PROFILES`; by default the artifact's own.
    protocol : EvaluationProtocol, optional
        Sizes; the published ones by default.

    Raises
    ------
    ArtifactMismatchError
        If the artifact is another model's, of another profile, or has no plan for a ratio.
    EvaluationError
        If a text is too short, or profile and ratios contradict each other.
    CalibrationError
        If a text cannot be read.
    """
    artifact.check_model(loaded.geometry, loaded.rope, loaded.fingerprint.weights_hash)
    protocol = protocol or EvaluationProtocol()
    codecs = codecs_under_test(artifact, profile, ratios)
    documents = read_documents(loaded, texts, protocol)
    reference_nll, rows = evaluate_codecs(loaded, codecs, documents, protocol, on_step=on_step)
    return EvaluationReport(
        architecture=loaded.fingerprint.architecture,
        dtype=loaded.geometry.dtype,
        artifact_id=artifact.parameters.artifact_id.hex(),
        protocol=protocol,
        reference_nll=reference_nll,
        rows=tuple(rows),
    )


def read_documents(
    loaded: LoadedModel, texts: Sequence[Path], protocol: EvaluationProtocol
) -> list[list[int]]:
    """Cut the protocol's documents evenly from text files; the same ones in every run.

    Raises
    ------
    EvaluationError
        If a stretch of a file does not hold a whole document.
    """
    wanted = protocol.document_tokens
    documents = list(
        Documents(texts, loaded.tokenizer, tokens=protocol.documents * wanted, document_tokens=wanted, seed=0)
    )
    shortest = min(len(document) for document in documents)
    if shortest < wanted:
        raise EvaluationError(
            f"cut into {protocol.documents} documents of {wanted} tokens, the texts leave one of {shortest}; "
            "give longer texts or ask for fewer documents"
        )
    return documents


def evaluate_codecs(
    loaded: LoadedModel,
    codecs: Sequence[CodecUnderTest],
    documents: Sequence[Sequence[int]],
    protocol: EvaluationProtocol,
    *,
    on_step: StepCallback | None = None,
) -> tuple[float, list[EvaluationRow]]:
    """Compare codecs on the same documents.

    The last token of a context opens the scored run instead of the prefill, so that every scored token's
    distribution comes from the replaced cache; the uncompressed cache is scored by the same two runs.

    Parameters
    ----------
    documents : Sequence[Sequence[int]]
        Token ids, ``protocol.document_tokens`` each.

    Returns
    -------
    tuple[float, list[EvaluationRow]]
        Mean negative log-likelihood over the uncompressed cache, and one row per codec.
    """
    trials = [_Trial(under_test, loaded.geometry, protocol) for under_test in codecs]
    done, total = 0, len(documents) * len(trials)
    for token_ids in documents:
        document = _Document(loaded, token_ids, protocol)
        for trial in trials:
            trial.run(loaded, document)
            done += 1
            if on_step is not None:
                on_step(done, total)
    first = trials[0].distributions
    reference_nll = sum(sums.reference_nll for sums in first) / sum(sums.tokens for sums in first)
    return reference_nll, [trial.row() for trial in trials]


class _Document:
    """One document's uncompressed cache and what the model predicts over it."""

    def __init__(self, loaded: LoadedModel, token_ids: Sequence[int], protocol: EvaluationProtocol) -> None:
        last = protocol.context_tokens - 1
        self.scored_input = token_ids[last:-1]
        self.targets = torch.tensor(token_ids[last + 1 :])
        self.keys, self.values = prefill(loaded, token_ids[:last])
        self.reference = score(loaded, self.keys, self.values, self.scored_input)


@dataclass
class _Trial:
    """One codec's sums, document by document."""

    under_test: CodecUnderTest
    geometry: KvGeometry
    protocol: EvaluationProtocol
    distributions: list[DistributionSums] = field(default_factory=list)
    stored_bytes: int = 0
    encode_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._key_errors = RowErrorSums(self.geometry.row_size)
        self._value_errors = RowErrorSums(self.geometry.row_size)

    @torch.inference_mode()
    def run(self, loaded: LoadedModel, document: _Document) -> None:
        """Encode and decode one document's context, and score what the model makes of it."""
        decoded = self._through_streams(document)
        replaced = slice(self.protocol.sink_tokens, self.protocol.coded_stop)
        keys, values = document.keys.clone(), document.values.clone()
        keys[replaced] = torch.cat([block.keys for block in decoded])[replaced]
        values[replaced] = torch.cat([block.values for block in decoded])[replaced]
        positions = torch.arange(replaced.start, replaced.stop)
        self._key_errors.add(
            _key_rows(loaded.rope, document.keys[replaced], positions),
            _key_rows(loaded.rope, keys[replaced], positions),
        )
        self._value_errors.add(document.values[replaced].flatten(1), values[replaced].flatten(1))
        logits = score(loaded, keys, values, document.scored_input)
        sums = DistributionSums()
        sums.add(document.reference, logits, document.targets)
        self.distributions.append(sums)

    def _through_streams(self, document: _Document) -> list[TierBlock]:
        codec = self.under_test.codec
        blocks = [
            TierBlock(
                keys=document.keys[first:stop],
                values=document.values[first:stop],
                first_position=first,
                sink_tokens=min(stop - first, max(0, self.protocol.sink_tokens - first)),
            )
            for first, stop in self.protocol.tier_blocks()
        ]
        start = time.perf_counter()
        streams = codec.encode(blocks)
        encoded = time.perf_counter()
        decoded = [codec.decode(stream) for stream in streams]
        self.decode_s.append(time.perf_counter() - encoded)
        self.encode_s.append(encoded - start)
        self.stored_bytes += sum(len(stream) for stream in streams)
        return decoded

    def row(self) -> EvaluationRow:
        """Return the means over everything that was run."""
        protocol, documents = self.protocol, len(self.distributions)
        tokens = [sums.tokens for sums in self.distributions]
        kl = ratio_interval([sums.kl for sums in self.distributions], tokens)
        top1 = ratio_interval([sums.agreements for sums in self.distributions], tokens)
        change = ratio_interval([sums.nll - sums.reference_nll for sums in self.distributions], tokens)
        token_bytes = self.geometry.token_bytes_16bit
        window_bytes = documents * protocol.recent_window * token_bytes
        return EvaluationRow(
            profile=self.under_test.profile,
            nominal_ratio=self.under_test.nominal_ratio,
            ratio=documents * protocol.coded_stop * token_bytes / self.stored_bytes,
            ratio_total=documents
            * protocol.context_tokens
            * token_bytes
            / (self.stored_bytes + window_bytes),
            kl=kl.mean,
            kl_low=kl.low,
            kl_high=kl.high,
            top1=top1.mean,
            top1_low=top1.low,
            top1_high=top1.high,
            nll=sum(sums.nll for sums in self.distributions) / sum(tokens),
            nll_delta=change.mean,
            nll_delta_low=change.low,
            nll_delta_high=change.high,
            key_error=self._key_errors.relative_error,
            value_error=self._value_errors.relative_error,
            encode_tokens_per_s=protocol.coded_stop / statistics.median(self.encode_s),
            decode_tokens_per_s=protocol.coded_stop / statistics.median(self.decode_s),
        )


def _key_rows(rope: RopeParameters, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return rope.remove_rope(keys, positions).flatten(1)
