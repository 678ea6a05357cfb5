"""Damaged and forged streams: a typed error or the original data, never a crash and never other data.

The decoder written from the specification judges beside the codecs: both must accept, or both refuse.
"""

import struct
from functools import cache

import numpy as np
import pytest
import spec_decoder
import xxhash
from golden_files import GOLDEN, from_json, parameter_file
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_kvtc.codec.base import KvCodec, TierBlock
from dynamo_kvtc.codec.bitstream import Profile, parse_header
from dynamo_kvtc.codec.open import open_codec
from dynamo_kvtc.codec.raw import RawCodec
from dynamo_kvtc.errors import BitstreamError

#: Small streams with all kinds of sections, coders and several layer groups.
CASES = ("groups.plan7-sinks8", "groups.plan9-sinks16", "linear.only-sinks", "gqa.one-token", "yarn.raw",
         "rd-groups.plan1", "rd-tiny.plan2-sinks8", "groups.raw-rans")  # fmt: skip
FIXED, ENTRY = 128, 32

hostile = settings(max_examples=60, deadline=None)
cases = st.sampled_from(CASES)
#: Numbers at the borders of fields and bounds, and any others.
numbers = st.one_of(
    st.sampled_from([0, 1, 2, 15, 16, 17, 255, 65_535, 65_536, 65_537, 2**24, 2**31, 2**32 - 1, 2**63]),
    st.integers(0, 2**64 - 1),
)


@cache
def golden(case: str) -> bytes:
    return (GOLDEN / f"{case}.kvtc").read_bytes()


@cache
def codec(case: str) -> KvCodec:
    parameters = from_json(parameter_file(case).read_text())
    if parse_header(golden(case)).profile is Profile.RAW:
        return RawCodec(parameters.geometry, parameters.artifact_id)
    return open_codec(parameters, compute_dtype="float32", threads=1)


@cache
def original(case: str) -> TierBlock:
    return codec(case).decode(golden(case))


@cache
def plain_parameters(case: str) -> dict:
    return spec_decoder.load_parameters(parameter_file(case))


def judge(case: str, data: bytes) -> TierBlock | None:
    """What both decoders make of `data`, None if they refuse it; they must agree."""
    try:
        _, expected = spec_decoder.decode(data, plain_parameters(case))
    except spec_decoder.SpecError:
        expected = None
    try:
        block = codec(case).decode(data)
    except BitstreamError:
        assert expected is None
        return None
    assert expected is not None
    for side, tensor in (("keys", block.keys), ("values", block.values)):
        found, exact = tensor.float().numpy(), np.array(expected[side]).reshape(tensor.shape)
        if isinstance(codec(case), RawCodec):
            np.testing.assert_array_equal(found, exact)
        else:
            assert np.isfinite(found).all()
            np.testing.assert_allclose(found, exact, rtol=2**-8, atol=1e-4 * np.abs(exact).max())
    return block


def assert_refused_or_unchanged(case: str, data: bytes) -> None:
    block = judge(case, data)
    if block is not None:
        assert block.keys.equal(original(case).keys)
        assert block.values.equal(original(case).values)
        assert block.first_position == original(case).first_position


def seal(data: bytearray) -> bytes:
    """Recompute the header's checksum where the number of chunks leaves room for one."""
    (num_chunks,) = struct.unpack_from("<I", data, 48)
    end = FIXED + ENTRY * num_chunks
    if end + 8 <= len(data):
        struct.pack_into("<Q", data, end, xxhash.xxh3_64_intdigest(bytes(data[:end])))
    return bytes(data)


@st.composite
def damage(draw, data: bytes, other: bytes) -> bytes:
    """One to three accidents: flipped bits, lost, doubled, moved, foreign or zeroed bytes."""
    result = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(len(result) - 1, 0)))
        length = draw(st.one_of(st.integers(1, 8), st.integers(1, 200)))
        accident = draw(st.sampled_from(["flip", "cut", "lose", "double", "move", "foreign", "zero"]))
        if accident == "flip" and result:
            result[start] ^= 1 << draw(st.integers(0, 7))
        elif accident == "cut":
            del result[start:]
        elif accident == "lose":
            del result[start : start + length]
        elif accident == "double":
            result[start:start] = result[start : start + length]
        elif accident == "move":
            target = draw(st.integers(0, len(result)))
            result[target : target + length] = result[start : start + length]
        elif accident == "foreign":
            result[start : start + length] = other[start : start + length]
        elif accident == "zero":
            result[start : start + length] = bytes(length)
    return bytes(result)


@hostile
@given(case=cases, other=cases, data=st.data())
def test_damage_is_noticed(case, other, data):
    stream = golden(case)
    damaged = data.draw(damage(stream, golden(other)))
    if damaged.startswith(stream):
        assert_refused_or_unchanged(case, damaged)
    else:
        assert judge(case, damaged) is None


@hostile
@given(case=cases, data=st.data())
def test_a_forged_chunk_table_brings_no_other_data(case, data):
    """Entries edited, exchanged, doubled or dropped, under a valid checksum of the header."""
    stream = bytearray(golden(case))
    (num_chunks,) = struct.unpack_from("<I", stream, 48)
    entries = [stream[FIXED + ENTRY * i : FIXED + ENTRY * (i + 1)] for i in range(num_chunks)]
    for _ in range(data.draw(st.integers(1, 3))):
        index = data.draw(st.integers(0, len(entries) - 1))
        act = data.draw(st.sampled_from(["edit", "shift", "exchange", "double", "drop"]))
        if act in ("edit", "shift"):
            form, position = data.draw(
                st.sampled_from([("<H", 0), ("<H", 2), ("<B", 4), ("<B", 5), ("<H", 6), ("<Q", 8), ("<I", 16),
                                 ("<I", 20), ("<Q", 24)])
            )  # fmt: skip
            (old,) = struct.unpack_from(form, entries[index], position)
            new = data.draw(numbers) if act == "edit" else old + data.draw(st.integers(-17, 17))
            struct.pack_into(form, entries[index], position, new % (1 << 8 * struct.calcsize(form)))
        elif act == "exchange":
            other = data.draw(st.integers(0, len(entries) - 1))
            entries[index], entries[other] = entries[other], entries[index]
        elif act == "double":
            entries.insert(index, bytearray(entries[index]))
        elif len(entries) > 1:
            del entries[index]
    table = b"".join(entries)
    struct.pack_into("<I", stream, 48, len(entries))
    stream[FIXED : FIXED + ENTRY * num_chunks] = table
    assert_refused_or_unchanged(case, seal(stream))


@hostile
@given(case=cases, edits=st.lists(st.tuples(st.integers(8, FIXED - 1), numbers), min_size=1, max_size=3))
def test_forged_fields_are_refused_or_describe_sound_kv(case, edits):
    """Under a valid checksum a field may be believed, such as a position; the decoders must agree on it."""
    stream = bytearray(golden(case))
    for position, number in edits:
        width = 4 if position % 4 == 0 else 1
        stream[position : position + width] = (number % (1 << 8 * width)).to_bytes(width, "little")
    judge(case, seal(stream))


@hostile
@given(case=cases, data=st.data())
def test_forged_chunks_are_refused_or_decode_to_sound_kv(case, data):
    """Chunk bytes edited under valid checksums: what a forger can do, and no more."""
    stream = bytearray(golden(case))
    header = parse_header(stream)
    index = data.draw(st.integers(0, len(header.chunks) - 1))
    chunk = header.chunks[index]
    stop = chunk.offset + chunk.stored_size
    for _ in range(data.draw(st.integers(1, 4)) if chunk.stored_size else 0):
        position = data.draw(st.integers(chunk.offset, stop - 1))
        stream[position] = data.draw(st.integers(0, 255))
    checksum = xxhash.xxh3_64_intdigest(bytes(stream[chunk.offset : stop]))
    struct.pack_into("<Q", stream, FIXED + ENTRY * index + 24, checksum)
    judge(case, seal(stream))


@hostile
@given(rest=st.binary(max_size=400), start=st.sampled_from([0, 8, 10, 48, 52, 64]))
def test_any_bytes_behind_a_valid_start_are_refused(rest, start):
    data = golden(CASES[0])[:start] + rest
    if not golden(CASES[0]).startswith(data):
        assert judge(CASES[0], data) is None
    else:
        with pytest.raises(BitstreamError):
            parse_header(data)
