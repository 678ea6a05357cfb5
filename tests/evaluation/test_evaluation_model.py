from __future__ import annotations

import pytest
import torch

from dynamo_kvtc.calibration.models import BUILTIN_SMOLLM2, LoadedModel, load_model
from dynamo_kvtc.codec.geometry import LayerRange
from dynamo_kvtc.codec.kvtc import KvtcCodec
from dynamo_kvtc.codec.parameters import ARTIFACT_ID_BYTES, CodecParameters, GroupParameters, SideParameters
from dynamo_kvtc.codec.plan import BitPlan, PlanGroup, QuantType
from dynamo_kvtc.codec.raw import RawCodec
from dynamo_kvtc.data import HELDOUT_TEXTS
from dynamo_kvtc.evaluation import CodecUnderTest, EvaluationProtocol, evaluate_codecs
from dynamo_kvtc.evaluation.run import read_documents


def _plain_quantisation(loaded: LoadedModel, quant_type: QuantType) -> KvtcCodec:
    """Return the codec without any decorrelation: every channel quantised alike."""
    geometry = loaded.geometry
    size = geometry.layer_size
    plan = BitPlan(tuple(PlanGroup(start, 64, quant_type) for start in range(0, size, 64)))
    side = SideParameters(torch.zeros(size), torch.eye(size), {0: plan})
    groups = tuple(GroupParameters(LayerRange(layer, 1), side, side) for layer in range(geometry.num_layers))
    parameters = CodecParameters(
        artifact_id=bytes(ARTIFACT_ID_BYTES),
        geometry=geometry,
        rope=loaded.rope,
        groups=groups,
        ratios={0: 4.0},
    )
    return KvtcCodec(parameters, ratio=4.0)


@pytest.mark.model
def test_a_real_model_notices_coarse_quantisation_and_not_fine() -> None:
    loaded = load_model(BUILTIN_SMOLLM2)
    protocol = EvaluationProtocol(
        documents=2, context_tokens=160, scored_tokens=24, recent_window=32, tier_block_tokens=64
    )
    documents = read_documents(loaded, HELDOUT_TEXTS, protocol)
    codecs = [
        CodecUnderTest("raw", 1.0, RawCodec(loaded.geometry)),
        CodecUnderTest("8 bits", 2.0, _plain_quantisation(loaded, QuantType.FP8)),
        CodecUnderTest("2 bits", 8.0, _plain_quantisation(loaded, QuantType.INT2)),
    ]
    reference_nll, (raw, eight, two) = evaluate_codecs(loaded, codecs, documents, protocol)
    assert 1 < reference_nll < 5  # it is real text, and a real model of it
    assert (raw.kl, raw.top1) == (0, 1)
    assert 0 < eight.kl < two.kl
    assert eight.kl < 0.02
    assert two.kl > 0.1
    assert 0 < eight.key_error < two.key_error
    assert raw.ratio < eight.ratio < two.ratio
