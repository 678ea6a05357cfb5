"""What plans really do: streams of documents that took no part in the fit, and the model behind them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dynamo_kvtc.calibration.artifact_writer import MeasuredPlan
from dynamo_kvtc.calibration.capture import SINK_TOKENS
from dynamo_kvtc.calibration.divergence import DistributionSums
from dynamo_kvtc.calibration.model_cache import prefill, score
from dynamo_kvtc.calibration.models import LoadedModel
from dynamo_kvtc.codec.base import KvCodec, TierBlock
from dynamo_kvtc.errors import CalibrationError

__all__ = ["Validator", "coded_tokens"]

#: Tokens per stream.
_TIER_BLOCK_TOKENS = 256


def coded_tokens(tokens: int, *, scored_tokens: int, recent_window: int) -> int:
    """Return how many tokens of a document go through streams when plans are validated on it.

    Raises
    ------
    CalibrationError
        If there are none.
    """
    # The last token before the scored ones opens their run, so it is never in a stream.
    coded = tokens - scored_tokens - max(recent_window, 1)
    if coded <= SINK_TOKENS:
        raise CalibrationError(
            f"a document of {tokens} tokens is too short to validate plans with: a window of "
            f"{recent_window} and {scored_tokens} scored tokens leave nothing to compress; give more text "
            "or longer documents"
        )
    return coded


class Validator:
    """Measures codecs on documents.

    Of each document, what lies before the recent window and the scored tokens goes through real streams;
    the scored tokens' predictions behind the decoded cache are compared with those behind the original.

    Parameters
    ----------
    loaded : LoadedModel
        The model.
    documents : Sequence[Sequence[int]]
        Token ids.
    scored_tokens, recent_window : int
        Sizes at the end of each document, in tokens.

    Raises
    ------
    CalibrationError
        If a document is too short.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        documents: Sequence[Sequence[int]],
        *,
        scored_tokens: int,
        recent_window: int,
    ) -> None:
        self._loaded = loaded
        self._documents = [_Document(loaded, tokens, scored_tokens, recent_window) for tokens in documents]
        self.tokens = sum(document.targets.numel() for document in self._documents)

    @torch.inference_mode()
    def ratio(self, codec: KvCodec) -> float:
        """Return 16-bit bytes of all coded tokens, sinks among them, over all bytes of their streams."""
        tokens = sum(document.coded for document in self._documents)
        size = sum(len(s) for document in self._documents for s in codec.encode(document.blocks()))
        return tokens * codec.geometry.token_bytes_16bit / size

    @torch.inference_mode()
    def measure(self, codec: KvCodec) -> MeasuredPlan:
        """Return ratio, mean next-token KL (nats) and top-1 agreement."""
        sums = DistributionSums()
        tokens = size = 0
        for document in self._documents:
            streams = codec.encode(document.blocks())
            size += sum(len(stream) for stream in streams)
            tokens += document.coded
            keys, values = document.keys.clone(), document.values.clone()
            for stream in streams:
                block = codec.decode(stream)
                span = slice(block.first_position, block.first_position + block.num_tokens)
                keys[span], values[span] = block.keys, block.values
            logits = score(self._loaded, keys, values, document.scored_input)
            sums.add(document.reference, logits, document.targets)
        return MeasuredPlan(
            ratio=tokens * codec.geometry.token_bytes_16bit / size,
            kl=sums.kl / sums.tokens,
            top1=sums.agreements / sums.tokens,
            tokens=sums.tokens,
        )


class _Document:
    """One document's uncompressed cache and what the model predicts over it."""

    def __init__(self, loaded: LoadedModel, tokens: Sequence[int], scored: int, window: int) -> None:
        context = len(tokens) - scored
        self.coded = coded_tokens(len(tokens), scored_tokens=scored, recent_window=window)
        # The last token of the context opens the scored run, so that the first prediction is behind the
        # decoded cache too.
        self.scored_input = tokens[context - 1 : -1]
        self.targets = torch.tensor(tokens[context:])
        self.keys, self.values = prefill(loaded, tokens[: context - 1])
        self.reference = score(loaded, self.keys, self.values, self.scored_input)

    def blocks(self) -> list[TierBlock]:
        """Return the coded tokens as tier blocks."""
        blocks = []
        for first in range(0, self.coded, _TIER_BLOCK_TOKENS):
            span = slice(first, min(first + _TIER_BLOCK_TOKENS, self.coded))
            sinks = SINK_TOKENS if first == 0 else 0
            blocks.append(TierBlock(self.keys[span], self.values[span], first, sinks))
        return blocks
