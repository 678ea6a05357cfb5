"""Golden streams decode with the codec, the reference and the specification's decoder, to the same KV."""

import json

import numpy as np
import pytest
import spec_decoder
import torch
from golden_files import GOLDEN, from_json, parameter_file, to_json
from synthetic import make_block, make_parameters

from dynamo_kvtc.codec.base import KvCodec
from dynamo_kvtc.codec.bitstream import Profile, SectionKind, parse_header
from dynamo_kvtc.codec.geometry import KvGeometry
from dynamo_kvtc.codec.kvtc import KvtcCodec
from dynamo_kvtc.codec.open import open_codec
from dynamo_kvtc.codec.raw import RawCodec
from dynamo_kvtc.codec.rd_reference import RdReferenceCodec
from dynamo_kvtc.codec.reference import ReferenceCodec

CASES = sorted(path.stem for path in GOLDEN.glob("*.kvtc"))


def decoders(stream: bytes, case: str) -> list[KvCodec]:
    parameters = from_json(parameter_file(case).read_text())
    header = parse_header(stream)
    if header.profile is Profile.RAW:
        return [RawCodec(parameters.geometry, parameters.artifact_id, layer_groups=header.layer_groups)]
    reference = RdReferenceCodec if header.profile is Profile.RD else ReferenceCodec
    return [
        open_codec(parameters, compute_dtype="float32", threads=1),
        reference(parameters, ratio=parameters.ratios[header.plan_id]),
    ]


def assert_close(decoded: torch.Tensor, expected: np.ndarray, slack: float) -> None:
    """Within one rounding to the cache's dtype, plus `slack` of the largest number for the order of sums."""
    precision = torch.finfo(decoded.dtype).eps / 2
    decoded = decoded.float().numpy()
    assert decoded.shape == expected.shape
    tolerance = precision * np.abs(expected) + slack * np.abs(expected).max()
    assert (np.abs(decoded - expected) <= tolerance).all()


def test_all_kinds_of_streams_are_there():
    assert len(CASES) >= 13
    headers = [parse_header((GOLDEN / f"{case}.kvtc").read_bytes()) for case in CASES]
    assert {header.profile for header in headers} == set(Profile)
    assert {header.geometry.dtype for header in headers} == {"bfloat16", "float16", "float32"}
    assert {header.version for header in headers} == {1}


@pytest.mark.parametrize("case", CASES)
def test_golden_stream_decodes_as_on_the_day_it_was_written(case):
    stream = (GOLDEN / f"{case}.kvtc").read_bytes()
    with np.load(GOLDEN / f"{case}.npz", allow_pickle=False) as expected:
        header, kv = spec_decoder.decode(stream, spec_decoder.load_parameters(parameter_file(case)))
        for side in ("keys", "values"):
            exact = np.array(kv[side]).reshape(expected[side].shape)
            np.testing.assert_allclose(exact, expected[side], rtol=1e-6, atol=1e-9)
        for codec in decoders(stream, case):
            block = codec.decode(stream, binding=case.encode().ljust(32, b"-"))
            slack = 0 if header.profile == spec_decoder.RAW else 2e-6
            assert_close(block.keys, expected["keys"], slack)
            assert_close(block.values, expected["values"], slack)
            found = (block.first_position, block.num_tokens, block.sink_tokens)
            assert found == (header.position, header.tokens, header.sinks)


def test_larger_streams_decode_alike_in_any_arithmetic():
    """Several chunks a section; products in bfloat16 stay within the specification's 1 %."""
    geometry = KvGeometry(2, 2, 16, "float32")
    parameters = make_parameters(geometry, ratios=(2.5,), seed=3)
    block = make_block(parameters, 2100, first_position=256, sink_tokens=4)
    (stream,) = KvtcCodec(parameters, ratio=2.5, compute_dtype="float32").encode([block])
    header = parse_header(stream)
    assert min(len(header.chunks_of(0, kind)) for kind in (SectionKind.KEYS, SectionKind.VALUES)) > 1
    plain = json.loads(to_json(parameters))
    for group, own in zip(plain["groups"], parameters.groups, strict=True):
        # The file format rounds to float16, which golden parameters are and these are not.
        for name, side in (("keys", own.keys), ("values", own.values)):
            group[name] |= {"mean": side.mean.tolist(), "basis": side.basis.flatten().tolist()}
    _, kv = spec_decoder.decode(stream, plain)
    exact = {side: np.array(numbers).reshape(block.keys.shape) for side, numbers in kv.items()}
    decoded = KvtcCodec(parameters, compute_dtype="float32").decode(stream)
    assert_close(decoded.keys, exact["keys"], 2e-6)
    assert_close(decoded.values, exact["values"], 2e-6)

    coarse = KvtcCodec(parameters, compute_dtype="bfloat16").decode(stream)
    mean = parameters.groups[0].values.mean.view(block.values.shape[1:]).numpy()
    error = coarse.values.numpy()[4:] - exact["values"][4:]
    centred = exact["values"][4:] - mean
    for layer in range(geometry.num_layers):
        assert np.linalg.norm(error[:, layer]) < 0.01 * np.linalg.norm(centred[:, layer])
