"""The rANS coder: arrays against a byte at a time, close to the entropy, and only its own chunks are read."""

import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_kvtc.codec import rans_reference
from dynamo_kvtc.codec.bitstream import (
    Profile,
    Section,
    SectionKind,
    StreamHeader,
    encode_chunks,
    parse_header,
    read_section,
    write_stream,
)
from dynamo_kvtc.codec.entropy import (
    DEFLATE,
    MAX_RANS_CHUNK_BYTES,
    RANS,
    STORE,
    DeflateCoder,
    HuffmanCoder,
    RansCoder,
)
from dynamo_kvtc.codec.geometry import KvGeometry, LayerRange
from dynamo_kvtc.codec.rans_segments import LANES, MAX_SEGMENTS, segment_steps
from dynamo_kvtc.codec.rans_tables import (
    MAX_TABLE_BYTES,
    TOTAL,
    choose_levels,
    frequencies_of,
    pack_table,
    read_table,
)
from dynamo_kvtc.errors import EntropyDecodeError, SizeLimitError

CODER = RansCoder()

#: Bytes of some kinds of statistics, alike or changing along them.
payloads = st.builds(
    lambda seed, sizes, width: b"".join(
        np.random.default_rng(seed + size)
        .laplace(128, width * (index + 1), size)
        .clip(0, 255)
        .astype(np.uint8)
        .tobytes()
        for index, size in enumerate(sizes)
    ),
    st.integers(0, 99),
    st.lists(st.integers(1, 4_000), min_size=1, max_size=5),
    st.sampled_from([0.1, 1.0, 3.0, 40.0]),
)


def levels_of(plain: bytes, steps: list[int]) -> list[tuple[int, list[int]]]:
    """The segments that the coder chooses, as the reference takes them."""
    parts = np.split(np.frombuffer(plain, np.uint8), np.cumsum(steps)[:-1] * LANES)
    return [
        (length, choose_levels(np.bincount(part, minlength=256)).tolist())
        for length, part in zip(steps, parts, strict=True)
    ]


def decoded(data: bytes, size: int, decode=CODER.decode) -> bytes | None:
    """What a decoder makes of a chunk; None if it refuses it."""
    try:
        return decode(data, size)
    except EntropyDecodeError:
        return None


class TestAgainstTheReference:
    @settings(max_examples=40, deadline=None)
    @given(plain=st.one_of(payloads, st.binary(min_size=1, max_size=700)))
    def test_both_make_the_same_chunk_and_read_it(self, plain):
        steps = segment_steps(np.frombuffer(plain, np.uint8), (len(plain),))
        data = CODER.encode(plain)
        assert data == rans_reference.encode(plain, levels_of(plain, steps))
        assert rans_reference.decode(data, len(plain)) == plain
        assert CODER.decode(data, len(plain)) == plain

    @settings(max_examples=30, deadline=None)
    @given(plains=st.lists(payloads, max_size=6))
    def test_chunks_of_a_batch_are_what_they_are_alone(self, plains):
        alone = [CODER.encode(plain) for plain in plains]
        assert CODER.encode_many([(plain, (len(plain),)) for plain in plains]) == alone
        pairs = [(data, len(plain)) for data, plain in zip(alone, plains, strict=True)]
        assert CODER.decode_many(pairs) == plains

    @settings(max_examples=150, deadline=None)
    @given(data=st.data())
    def test_both_refuse_the_same_damage(self, data):
        plain = data.draw(payloads.map(lambda plain: plain[:1_500]))
        broken = bytearray(CODER.encode(plain))
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, min(len(broken) - 1, data.draw(st.sampled_from([4, 300, 9_999])))))
            broken[at] = data.draw(st.integers(0, 255))
        del broken[data.draw(st.sampled_from([9_999, len(broken) - 2, len(broken) // 2])) :]
        size = len(plain) + data.draw(st.sampled_from([0, 0, 0, -1, 1, 64]))
        found = decoded(bytes(broken), size)
        assert found == decoded(bytes(broken), size, rans_reference.decode)
        assert found is None or len(found) == size

    @settings(max_examples=150, deadline=None)
    @given(data=st.binary(max_size=400), size=st.integers(0, 2_000))
    def test_both_refuse_the_same_noise(self, data, size):
        assert decoded(data, size) == decoded(data, size, rans_reference.decode if size else CODER.decode)

    def test_most_damage_is_found_by_the_last_states(self):
        """Not all: a bit may turn one symbol into another of the same frequency. Checksums find the rest."""
        plain = np.random.default_rng(3).laplace(128, 3, 4_000).clip(0, 255).astype(np.uint8).tobytes()
        data = CODER.encode(plain)
        found = 0
        for at in range(300, len(data)):
            broken = bytearray(data)
            broken[at] ^= 1 << at % 8
            found += decoded(bytes(broken), len(plain)) is None
        assert found > 0.97 * (len(data) - 300)


class TestTables:
    @given(counts=st.lists(st.integers(0, 65_536), min_size=256, max_size=256), used=st.integers(1, 256))
    def test_frequencies_add_up_and_are_read_back(self, counts, used):
        counts = np.array(counts)
        counts[used:] = 0
        counts[used - 1] += 1
        levels = choose_levels(counts)
        frequencies = frequencies_of(levels)
        assert frequencies.sum() == TOTAL
        assert ((frequencies > 0) == (counts > 0)).all()
        assert frequencies.tolist() == rans_reference.frequencies_of(levels.tolist())
        packed = pack_table(levels)
        assert len(packed) % 2 == 0 and len(packed) <= MAX_TABLE_BYTES
        found, size = read_table(np.frombuffer(packed + b"more", np.uint8))
        assert size == len(packed) and (found == levels).all()

    @pytest.mark.parametrize("seed", range(5))
    def test_levels_cost_less_than_half_a_per_cent(self, seed):
        rng = np.random.default_rng(seed)
        counts = np.bincount(
            rng.laplace(128, 2.0 ** rng.uniform(0, 5), 6_400).clip(0, 255).astype(np.uint8), minlength=256
        )
        share = counts[counts > 0] / counts.sum()
        exact = -(share * np.log2(share)).sum()
        found = -(share * np.log2(frequencies_of(choose_levels(counts))[counts > 0] / TOTAL)).sum()
        assert exact <= found < 1.005 * exact

    def test_one_symbol_is_certain_and_takes_no_words(self):
        data = CODER.encode(b"\x07" * MAX_RANS_CHUNK_BYTES)
        assert len(data) == 2 + 6 + 128
        assert CODER.decode(data, MAX_RANS_CHUNK_BYTES) == b"\x07" * MAX_RANS_CHUNK_BYTES


class TestSegments:
    @given(plain=payloads, cuts=st.lists(st.integers(0, 4_000), max_size=20))
    @settings(max_examples=40, deadline=None)
    def test_segments_cover_the_chunk(self, plain, cuts):
        cuts = sorted(min(cut, len(plain)) for cut in cuts)
        runs = np.diff([0, *cuts, len(plain)]).tolist()
        steps = segment_steps(np.frombuffer(plain, np.uint8), runs)
        assert sum(steps) == -(-len(plain) // LANES)
        assert 1 <= len(steps) <= MAX_SEGMENTS and min(steps) >= 1
        assert CODER.decode(CODER.encode_runs(plain, runs), len(plain)) == plain

    def test_statistics_that_change_get_tables_of_their_own(self):
        rng = np.random.default_rng(2)
        parts = [rng.integers(first, first + 8, 4_000, dtype=np.uint8) for first in (1, 100, 200)]
        plain = np.concatenate(parts).tobytes()
        data = CODER.encode_runs(plain, [4_000] * 3)
        assert data[0] == 3
        # Three bits a symbol, where one table needs four and a half.
        assert len(data) < 3 * 4_000 * 3 / 8 + 250

    def test_chunks_are_about_as_long_as_huffman_codes_of_runs(self):
        rng = np.random.default_rng(5)
        parts = [rng.laplace(0, width, 6_400).round().astype(np.int8) for width in (1, 1.5, 2, 3, 4, 6, 8)]
        plain = np.concatenate(parts).tobytes()
        runs = [6_400] * len(parts)
        assert len(CODER.encode_runs(plain, runs)) < 1.01 * len(HuffmanCoder().encode_runs(plain, runs))


class TestHostileChunks:
    """What a table, a header or an end must be; each is refused by the reference, too."""

    SIZE = 64
    TABLE = pack_table(np.array([15, *[0] * 255], np.uint8))
    STATES = struct.pack("<32I", *[1 << 16] * 32)

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"\1",
            b"\1\0" + STATES,
            b"\1\1" + TABLE + STATES,
            b"\0\0" + TABLE + STATES,
            b"\x11\0" + struct.pack("<16H", *[1] * 16) + TABLE * 17 + STATES,
            b"\2\0\0\0" + TABLE * 2 + STATES,
            b"\2\0\2\0" + TABLE * 2 + STATES,
            b"\2\0\xff\xff" + TABLE * 2 + STATES,
            b"\1\0" + TABLE + STATES[:-2],
            b"\1\0" + TABLE + STATES + b"\0",
            b"\1\0" + TABLE + STATES + b"\0\0",
            b"\1\0" + TABLE + b"\1" + STATES[1:],
            b"\1\0" + TABLE + bytes(128),
            b"\1\0" + struct.pack("<HHBB", 1, 1, 1, 0) + STATES,  # one symbol, which weighs nothing
            b"\1\0" + struct.pack("<HHBB", 1, 1, 0, 0) + STATES,  # no level
            b"\1\0" + struct.pack("<HHBB", 1, 1, 0x1F, 0) + STATES,  # a level too many
            b"\1\0" + struct.pack("<HHBB", 1, 1, 15, 1) + STATES,  # padding
            b"\1\0" + struct.pack("<HH", 1, 0) + STATES,  # a row of no symbols
            b"\1\0" + struct.pack("<H", 0) + STATES,
            b"\1\0" + b"\xff" * 40,
            b"\1\0" + b"\xff",
        ],
    )
    def test_is_refused(self, data):
        for decode in (CODER.decode, rans_reference.decode):
            with pytest.raises(EntropyDecodeError):
                decode(data, self.SIZE)

    def test_the_sound_one_is_read(self):
        data = b"\1\0" + self.TABLE + self.STATES
        assert CODER.decode(data, self.SIZE) == rans_reference.decode(data, self.SIZE) == bytes(self.SIZE)

    def test_a_chunk_that_takes_words_of_its_neighbour_is_refused(self):
        """Words of a batch lie one behind the other; one with too few must not pass on its neighbour's."""
        plain = bytes(range(256)) * 8
        sound = CODER.encode(plain)
        with pytest.raises(EntropyDecodeError):
            CODER.decode_many([(sound[:-2], len(plain)), (sound[-2:] + sound, len(plain))])
        with pytest.raises(EntropyDecodeError):
            CODER.decode_many([(sound[:-2], len(plain)), (sound, len(plain))])

    def test_plain_sizes_beyond_the_limit_are_refused(self):
        data = b"\1\0" + self.TABLE + self.STATES
        with pytest.raises(EntropyDecodeError):
            CODER.decode(data, MAX_RANS_CHUNK_BYTES + 1)
        with pytest.raises(SizeLimitError, match="rans"):
            CODER.encode(bytes(MAX_RANS_CHUNK_BYTES + 1))


def test_a_section_of_many_chunks_and_coders_is_read():
    """More chunks than one call takes, others between them, and chunks that did not shrink."""
    rng = np.random.default_rng(8)
    plains = [
        rng.laplace(128, 2, 1_000 + index).clip(0, 255).astype(np.uint8).tobytes() for index in range(50)
    ]
    plains[7] = rng.bytes(1_007)
    pairs = [(plain, (len(plain),)) for plain in plains]
    chunks = encode_chunks(pairs[:40], CODER) + encode_chunks(pairs[40:44], DeflateCoder())
    chunks += encode_chunks(pairs[44:], CODER)
    assert [chunk.coder_id for chunk in chunks] == [RANS] * 7 + [STORE] + [RANS] * 32 + [DEFLATE] * 4 + [
        RANS
    ] * 6
    header = StreamHeader(Profile.RAW, 0, bytes(32), KvGeometry(1, 8, 64), 0, 200, 0, 16, bytes(32))
    stream = write_stream(header, [Section(LayerRange(0, 1), SectionKind.RAW, chunks)])
    parsed = parse_header(stream)
    payload = memoryview(stream)[slice(*parsed.group_span(0))]
    with ThreadPoolExecutor(2) as pool:
        for mapper in (map, pool.map):
            assert read_section(parsed, 0, SectionKind.RAW, payload, mapper) == b"".join(plains)
