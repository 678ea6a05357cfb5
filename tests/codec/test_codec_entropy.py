"""Entropy coders: lossless, bounded, robust to any bytes, and found by id."""

import logging
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_kvtc.codec import entropy
from dynamo_kvtc.codec.entropy import (
    DEFLATE,
    MAX_CHUNK_BYTES,
    MAX_DEFLATE_CHUNK_BYTES,
    RANS,
    STORE,
    DeflateCoder,
    EntropyCoder,
    HuffmanCoder,
    RansCoder,
    StoreCoder,
    find_coder,
    register_coder,
)
from dynamo_kvtc.errors import EntropyDecodeError, SizeLimitError, UnknownCoderError

CODERS = [StoreCoder(), DeflateCoder(), HuffmanCoder(), RansCoder()]
PAYLOADS = {
    "one byte": b"x",
    "zeros": bytes(65_536),
    "noise": np.random.default_rng(0).bytes(65_536),
    "peaked": np.random.default_rng(1).laplace(128, 3, 65_536).clip(0, 255).astype(np.uint8).tobytes(),
}


@pytest.fixture
def registry(monkeypatch):
    """A registry that forgets what the test registers."""
    monkeypatch.setattr(entropy, "_coders", dict(entropy._coders))
    monkeypatch.setattr(entropy, "_entry_points_loaded", False)


@pytest.mark.parametrize("coder", CODERS, ids=lambda coder: coder.name)
@pytest.mark.parametrize("name", PAYLOADS)
def test_round_trip_within_the_bound(coder, name):
    plain = PAYLOADS[name]
    for given_as in (plain, bytearray(plain), memoryview(plain)):
        data = coder.encode(given_as)
        assert len(data) <= coder.max_encoded_size(len(plain))
        assert coder.decode(memoryview(data), len(plain)) == plain


@pytest.mark.parametrize("coder", CODERS, ids=lambda coder: coder.name)
@given(plain=st.binary(max_size=400))
def test_round_trip_of_any_bytes(coder, plain):
    data = coder.encode(plain)
    assert len(data) <= coder.max_encoded_size(len(plain))
    assert coder.decode(data, len(plain)) == plain


@pytest.mark.parametrize("level", range(10))
@pytest.mark.parametrize("name", PAYLOADS)
def test_deflate_of_other_encoders_is_read(level, name):
    deflate = zlib.compressobj(level, wbits=-15)
    data = deflate.compress(PAYLOADS[name]) + deflate.flush()
    assert DeflateCoder().decode(data, len(PAYLOADS[name])) == PAYLOADS[name]


@pytest.mark.parametrize("name", PAYLOADS)
def test_deflate_is_read_by_other_decoders(name):
    assert zlib.decompress(DeflateCoder().encode(PAYLOADS[name]), wbits=-15) == PAYLOADS[name]


def test_deflate_comes_close_to_the_entropy_of_peaked_symbols():
    plain = PAYLOADS["peaked"]
    _, counts = np.unique(np.frombuffer(plain, np.uint8), return_counts=True)
    shares = counts / counts.sum()
    ideal = -(shares * np.log2(shares)).sum() * len(plain) / 8
    assert ideal < len(DeflateCoder().encode(plain)) < 1.06 * ideal


@pytest.mark.parametrize("wrong", [-1, 1, 1000])
@pytest.mark.parametrize("coder", CODERS, ids=lambda coder: coder.name)
def test_another_plain_size_is_refused(coder, wrong):
    data = coder.encode(b"some plain bytes")
    with pytest.raises(EntropyDecodeError):
        coder.decode(data, 16 + wrong)


def test_truncated_and_continued_deflate_is_refused():
    data = DeflateCoder().encode(PAYLOADS["peaked"])
    for broken in (data[:-1], data[:1000], b"", data + b"\0"):
        with pytest.raises(EntropyDecodeError):
            DeflateCoder().decode(broken, 65_536)


def test_a_bomb_stops_at_the_stated_size():
    deflate = zlib.compressobj(9, wbits=-15)
    bomb = deflate.compress(bytes(1 << 26)) + deflate.flush()
    with pytest.raises(EntropyDecodeError):
        DeflateCoder().decode(bomb, 65_536)


@given(data=st.binary(max_size=300), size=st.integers(0, 1000))
def test_any_bytes_decode_to_the_stated_size_or_not_at_all(data, size):
    try:
        plain = DeflateCoder().decode(data, size)
    except EntropyDecodeError:
        return
    assert len(plain) == size
    assert plain == zlib.decompress(data, wbits=-15)


def test_chunks_that_are_too_large_are_refused():
    with pytest.raises(SizeLimitError, match="deflate"):
        DeflateCoder().encode(bytes(MAX_DEFLATE_CHUNK_BYTES + 1))
    with pytest.raises(SizeLimitError, match="store"):
        StoreCoder().encode(bytes(MAX_CHUNK_BYTES + 1))


def test_threads_share_a_coder():
    coder = DeflateCoder()
    plains = [np.random.default_rng(i).integers(0, 9, 20_000, np.uint8).tobytes() for i in range(16)]
    expected = [coder.encode(plain) for plain in plains]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(coder.encode, plains)) == expected
        assert list(pool.map(coder.decode, expected, [20_000] * 16)) == plains


class TestRuns:
    @given(sizes=st.lists(st.integers(0, 400), min_size=1, max_size=8), seed=st.integers(0, 99))
    def test_any_runs_decode_to_the_same_bytes(self, sizes, seed):
        rng = np.random.default_rng(seed)
        runs = [(rng.random(size) < rng.choice([0.05, 0.9])).astype(np.uint8) * 7 for size in sizes]
        plain = np.concatenate(runs).tobytes()
        for coder in CODERS:
            data = coder.encode_runs(plain, sizes)
            assert find_coder(coder.coder_id).decode(data, len(plain)) == plain
        assert zlib.decompress(HuffmanCoder().encode_runs(plain, sizes), -15) == plain

    def test_runs_of_unlike_statistics_get_codes_of_their_own(self):
        rng = np.random.default_rng(2)
        runs = [rng.integers(first, first + 8, 4_000, dtype=np.uint8) for first in (1, 100, 200)]
        runs.append((rng.random(4_000) < 0.02).astype(np.uint8))
        plain = np.concatenate(runs).tobytes()
        coder = HuffmanCoder()
        together, apart = coder.encode(plain), coder.encode_runs(plain, [4_000] * 4)
        # Three bits a symbol in the first three runs, and far less than one in the last.
        assert len(apart) < 3 * 4_000 * 3 / 8 + 450 < len(together)


class XorCoder(EntropyCoder):
    """Stands for a third party's coder."""

    coder_id = 200
    name = "xor"

    def encode(self, plain):
        return bytes(byte ^ 255 for byte in plain)

    def decode(self, data, plain_size):
        return self.encode(data)

    def max_encoded_size(self, plain_size):
        return plain_size


class TestRegistry:
    def test_own_coders_are_found(self):
        found = [find_coder(coder_id).name for coder_id in (STORE, DEFLATE, RANS)]
        assert found == ["store", "deflate", "rans"]

    def test_an_unknown_id_names_the_way_out(self, registry):
        with pytest.raises(UnknownCoderError, match=entropy.ENTRY_POINT_GROUP):
            find_coder(201)

    def test_a_registered_coder_is_found(self, registry):
        register_coder(XorCoder())
        register_coder(XorCoder())
        assert find_coder(200).name == "xor"

    @pytest.mark.parametrize("coder_id", [-1, 0, 1, 2, 127, 256])
    def test_ids_of_the_specification_are_refused(self, registry, coder_id):
        coder = XorCoder()
        coder.coder_id = coder_id
        with pytest.raises(ValueError, match="128 to 255"):
            register_coder(coder)

    def test_a_taken_id_is_refused(self, registry):
        class Other(XorCoder):
            name = "other"

        register_coder(XorCoder())
        with pytest.raises(ValueError, match="taken by 'xor'"):
            register_coder(Other())

    @pytest.mark.parametrize("size", [0, MAX_CHUNK_BYTES + 1])
    def test_chunk_sizes_beyond_the_format_are_refused(self, registry, size):
        coder = XorCoder()
        coder.max_plain_size = size
        with pytest.raises(ValueError, match="chunks"):
            register_coder(coder)

    def test_an_installed_coder_is_loaded_when_its_id_is_met(self, registry, tmp_path, monkeypatch, caplog):
        """A distribution on the path, as pip would have put it there, with one sound and one broken entry."""
        info = tmp_path / "third_party-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(
            f"[{entropy.ENTRY_POINT_GROUP}]\nbroken = no_such_module_here:Coder\nxor = third_party_xor:make\n"
        )
        (tmp_path / "third_party_xor.py").write_text(
            f"from {XorCoder.__module__} import XorCoder\n\ndef make():\n    return XorCoder()\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        with caplog.at_level(logging.ERROR):
            assert find_coder(200).decode(b"\xff", 1) == b"\0"
        assert "broken" in caplog.text
