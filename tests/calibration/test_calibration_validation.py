from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch

from dynamo_kvtc.calibration.models import LoadedModel, load_model
from dynamo_kvtc.calibration.validation import Validator, coded_tokens
from dynamo_kvtc.codec.base import TierBlock
from dynamo_kvtc.codec.raw import RawCodec
from dynamo_kvtc.errors import CalibrationError

SCORED = 24


class _DamagingCodec(RawCodec):
    """Keeps what it was given and decodes every number as its negative."""

    def encode(self, blocks: Sequence[TierBlock]) -> list[bytes]:
        self.blocks = list(blocks)
        return super().encode([dataclasses.replace(b, keys=-b.keys, values=-b.values) for b in blocks])


@pytest.fixture(scope="module")
def loaded(tiny_model) -> LoadedModel:
    return load_model(tiny_model, "bfloat16")


def _documents(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(256, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("window", [0, 1, 16])
def test_raw_streams_change_nothing(loaded, window):
    validator = Validator(loaded, _documents(320, 90), scored_tokens=SCORED, recent_window=window)
    codec = RawCodec(loaded.geometry)
    measured = validator.measure(codec)
    assert (measured.kl, measured.top1, measured.tokens) == (0.0, 1.0, 2 * SCORED)
    assert 0.9 < measured.ratio < 1  # raw bytes, and headers that are counted
    assert validator.ratio(codec) == measured.ratio


@pytest.mark.parametrize(("window", "coded"), [(0, 295), (1, 295), (16, 280)])
def test_all_but_window_and_scored_tokens_go_through_streams(loaded, window, coded):
    validator = Validator(loaded, _documents(320), scored_tokens=SCORED, recent_window=window)
    codec = _DamagingCodec(loaded.geometry)
    measured = validator.measure(codec)
    spans = [(block.first_position, block.num_tokens, block.sink_tokens) for block in codec.blocks]
    assert spans == [(0, 256, 4), (256, coded - 256, 0)]
    assert coded_tokens(320, scored_tokens=SCORED, recent_window=window) == coded
    assert measured.kl > 1e-4
    assert validator.measure(codec) == measured  # the originals were not touched


def test_the_first_prediction_is_behind_the_decoded_cache_too(loaded):
    validator = Validator(loaded, _documents(120), scored_tokens=1, recent_window=0)
    measured = validator.measure(_DamagingCodec(loaded.geometry))
    assert measured.tokens == 1 and measured.kl > 0


def test_the_ratio_is_that_of_all_bytes(loaded):
    validator = Validator(loaded, _documents(320, 100), scored_tokens=SCORED, recent_window=16)
    codec = RawCodec(loaded.geometry)
    sizes = []
    for tokens in (256, 24, 60):
        zeros = torch.zeros(tokens, 3, 2, 16, dtype=torch.bfloat16)
        sizes += [len(stream) for stream in codec.encode([TierBlock(zeros, zeros, 0)])]
    assert validator.ratio(codec) == pytest.approx(340 * loaded.geometry.token_bytes_16bit / sum(sizes))


@pytest.mark.parametrize("length", [0, SCORED, SCORED + 20])
def test_documents_that_leave_nothing_to_compress_are_refused(loaded, length):
    with pytest.raises(CalibrationError, match="too short to validate"):
        Validator(loaded, _documents(length), scored_tokens=SCORED, recent_window=16)
