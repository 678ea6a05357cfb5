"""A decoder of KVTC streams written from docs/bitstream.md alone: plain Python, slow, exact.

It shares no code with the package, so that a fault in either the specification or the package shows as a
difference. Section numbers refer to the specification. Numbers are Python floats (binary64); results are
not rounded to the cache's dtype.
"""

from __future__ import annotations

import base64
import json
import math
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import spec_rans
import spec_rd
import xxhash
from spec_error import SpecError, require

DTYPES = {1: "bfloat16", 2: "float16", 3: "float32"}
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
#: Magnitudes from which on rounding gives infinity.
INFINITE_FROM = {
    "bfloat16": 2.0**128 - 2.0**119,
    "float16": 2.0**16 - 2.0**4,
    "float32": 2.0**128 - 2.0**103,
}
RAW, KVTC, RD = 0, 1, 2
KEYS, VALUES, SINKS, RAW_KV = 1, 2, 3, 4
BITS = {"FP8": 8, "INT4": 4, "INT2": 2}


@dataclass
class Chunk:
    first: int
    count: int
    kind: int
    coder: int
    offset: int
    stored: int
    plain: int
    checksum: int


@dataclass
class Header:
    profile: int
    dtype: str
    sink_bits: int
    plan_id: int
    layers: int
    heads: int
    head_size: int
    tokens: int
    sinks: int
    position: int
    artifact_id: bytes
    binding: bytes
    size: int
    #: {(first layer, number of layers): {kind: chunks}}
    groups: dict[tuple[int, int], dict[int, list[Chunk]]] = field(default_factory=dict)


def align(x: int) -> int:
    return (x + 15) // 16 * 16


def xxh3(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data)


# --- sections 3 and 4: header and chunks ---------------------------------------------------------------


def read_header(data: bytes) -> Header:
    magic = b"\x89KVTC\r\n\x1a"
    require(data[:8] == magic[: len(data)], "BadMagicError")
    require(len(data) >= 128, "TruncatedStreamError")
    version, flags, profile, dtype, sink_bits, reserved = struct.unpack_from("<HHBBBB", data, 8)
    plan_id, layers, heads, head_size, tokens, sinks = struct.unpack_from("<6I", data, 16)
    position, num_chunks = struct.unpack_from("<QI", data, 40)
    require(version == 1, "UnsupportedVersionError")
    require(1 <= num_chunks <= 65536, "SizeLimitError")
    size = align(136 + 32 * num_chunks)
    require(len(data) >= size, "TruncatedStreamError")
    end = 128 + 32 * num_chunks
    require(xxh3(data[:end]) == struct.unpack_from("<Q", data, end)[0], "HeaderChecksumError")
    require(not (flags or reserved or any(data[52:64]) or any(data[end + 8 : size])), "ReservedBitsError")
    require(all(1 <= number <= 4096 for number in (layers, heads, head_size)), "SizeLimitError")
    require(1 <= tokens <= 65536 and sinks <= tokens, "SizeLimitError")
    require(position <= 2**48 - tokens, "SizeLimitError")
    require(profile in (RAW, KVTC, RD) and dtype in DTYPES, "UnsupportedVersionError")
    require(sink_bits in (8, 16), "UnsupportedVersionError")
    header = Header(
        profile, DTYPES[dtype], sink_bits, plan_id, layers, heads, head_size, tokens, sinks, position,
        data[64:96], data[96:128], size,
    )  # fmt: skip
    read_table(header, data, num_chunks)
    return header


def read_table(header: Header, data: bytes, num_chunks: int) -> None:
    offset = header.size
    for index in range(num_chunks):
        first, count, kind, coder, reserved, *rest = struct.unpack_from("<HHBBHQIIQ", data, 128 + 32 * index)
        require(reserved == 0, "ReservedBitsError")
        chunk = Chunk(first, count, kind, coder, *rest)
        require(chunk.plain <= (65536 if coder in (1, 2) else 16777216), "SizeLimitError")
        require(
            chunk.stored == chunk.plain if coder == 0 else 0 < chunk.stored < chunk.plain, "ChunkTableError"
        )
        require(chunk.offset == offset, "ChunkTableError")
        offset = align(offset + chunk.stored)
        sections = header.groups.setdefault((first, count), {})
        # A section or group that is left and entered again would be in the wrong order.
        is_last_group = (first, count) == list(header.groups)[-1]
        is_last_kind = not sections or kind >= list(sections)[-1]
        require(is_last_group and is_last_kind, "ChunkTableError")
        sections.setdefault(kind, []).append(chunk)
    layer = 0
    for (first, count), sections in header.groups.items():
        require(first == layer and count >= 1, "ChunkTableError")
        layer += count
        if header.profile == RAW:
            kinds = [RAW_KV]
        else:
            kinds = [KEYS, VALUES, SINKS] if header.sinks else [KEYS, VALUES]
        require(list(sections) == kinds, "ChunkTableError")
        limit = 8 * header.tokens * header.heads * header.head_size * count
        for chunks in sections.values():
            require(sum(chunk.plain for chunk in chunks) <= limit, "SizeLimitError")
            require(len(chunks) == 1 or all(chunk.plain for chunk in chunks), "ChunkTableError")
    require(layer == header.layers, "ChunkTableError")


def read_payload(data: bytes, chunks: list[Chunk], least: int, most: int) -> bytes:
    require(least <= sum(chunk.plain for chunk in chunks) <= most, "ChunkTableError")
    payload = b""
    for chunk in chunks:
        end = chunk.offset + chunk.stored
        require(len(data) >= align(end), "TruncatedStreamError")
        stored = data[chunk.offset : end]
        require(xxh3(stored) == chunk.checksum, "ChunkChecksumError")
        require(not any(data[end : align(end)]), "ReservedBitsError")
        payload += decode_chunk(stored, chunk)
    return payload


def decode_chunk(stored: bytes, chunk: Chunk) -> bytes:
    if chunk.coder == 0:
        return stored
    if chunk.coder == 2:
        return spec_rans.decode(stored, chunk.plain)
    require(chunk.coder == 1, "UnknownCoderError")
    inflate = zlib.decompressobj(wbits=-15)
    try:
        plain = inflate.decompress(stored, chunk.plain + 1)
    except zlib.error as error:
        raise SpecError("EntropyDecodeError") from error
    whole = inflate.eof and not inflate.unused_data and len(plain) == chunk.plain
    require(whole, "EntropyDecodeError")
    return plain


# --- numbers -------------------------------------------------------------------------------------------


def floats(data: bytes, dtype: str) -> list[float]:
    if dtype == "float32":
        return list(struct.unpack(f"<{len(data) // 4}f", data))
    if dtype == "float16":
        return list(struct.unpack(f"<{len(data) // 2}e", data))
    # bfloat16 is the upper half of a float32.
    wide = b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2))
    return floats(wide, "float32")


def e4m3(pattern: int) -> float:
    sign = -1.0 if pattern & 0x80 else 1.0
    exponent, mantissa = pattern >> 3 & 15, pattern & 7
    require(pattern & 0x7F != 0x7F, "PayloadError")
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


# --- section 6: profile kvtc ---------------------------------------------------------------------------


def read_side(payload: bytes, plan: list, n: int) -> dict[int, list[float]]:
    """Section 6.2 and 6.3: {component: decoded coefficient of each coded token}."""
    plane = 2 * len(plan) * n
    high, low = payload[:plane], payload[plane : 2 * plane]
    side = floats(bytes(byte for pair in zip(low, high, strict=True) for byte in pair), "float16")
    require(all(math.isfinite(number) for number in side), "PayloadError")
    at = 2 * plane
    coefficients = {}
    for wanted in ("FP8", "INT4", "INT2"):
        bits = BITS[wanted]
        for g, (start, size, type_) in enumerate(plan):
            if type_ != wanted:
                continue
            for component in range(start, start + size):
                row = payload[at : at + (n * bits + 7) // 8]
                at += len(row)
                per_byte = 8 // bits
                symbols = [byte >> bits * k & 2**bits - 1 for byte in row for k in range(per_byte)]
                require(not any(symbols[n:]), "ReservedBitsError")
                numbers = [e4m3(symbol) if wanted == "FP8" else symbol for symbol in symbols[:n]]
                shifts = side[g * n : (g + 1) * n]
                scales = side[(len(plan) + g) * n : (len(plan) + g + 1) * n]
                coefficients[component] = [
                    shift + number * scale
                    for shift, number, scale in zip(shifts, numbers, scales, strict=True)
                ]
    return coefficients


def side_size(plan: list, n: int) -> int:
    return 4 * len(plan) * n + sum(size * ((n * BITS[type_] + 7) // 8) for _, size, type_ in plan)


def reconstruct(coefficients: dict[int, list[float]], side: dict, n: int) -> list[list[float]]:
    """Section 6.4: rows of the coded tokens."""
    mean, basis = side["mean"], side["basis"]
    width = len(mean)
    rows = [list(mean) for _ in range(n)]
    for component, numbers in coefficients.items():
        vector = basis[component * width : (component + 1) * width]
        for row, number in zip(rows, numbers, strict=True):
            for j in range(width):
                row[j] += number * vector[j]
    return rows


def frequencies(rope: dict) -> list[float]:
    """Section 6.6: angle per position of each pair."""
    theta, r, factor = rope["theta"], rope["rotary_dim"], rope["factor"]
    plain = [theta ** (-2 * i / r) for i in range(r // 2)]
    original = rope["original_max_position_embeddings"]

    def clamp(x: float) -> float:
        return min(max(x, 0.0), 1.0)

    if rope["scaling"] == "default":
        return plain
    if rope["scaling"] == "linear":
        return [f / factor for f in plain]
    if rope["scaling"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        a = [clamp((original * f / (2 * math.pi) - low) / (high - low)) for f in plain]
        return [f * ((1 - x) / factor + x) for f, x in zip(plain, a, strict=True)]

    def d(q: float) -> float:
        return r * math.log(original / (2 * math.pi * q)) / (2 * math.log(theta))

    low, high = d(rope["beta_fast"]), d(rope["beta_slow"])
    if rope["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, r - 1)
    if low == high:
        high += 0.001
    a = [clamp((i - low) / (high - low)) for i in range(r // 2)]
    return [f * (x / factor + 1 - x) for f, x in zip(plain, a, strict=True)]


def attention_factor(rope: dict) -> float:
    def g(u: float) -> float:
        return 1.0 if rope["factor"] <= 1 else 0.1 * u * math.log(rope["factor"]) + 1.0

    if rope["scaling"] != "yarn":
        return 1.0
    if rope["attention_factor"] is not None:
        return rope["attention_factor"]
    if rope["mscale"] and rope["mscale_all_dim"]:
        return g(rope["mscale"]) / g(rope["mscale_all_dim"])
    return g(1.0)


def rotate(head: list[float], position: int, rope: dict) -> list[float]:
    r, s = rope["rotary_dim"], attention_factor(rope)
    result = list(head)
    for i, w in enumerate(frequencies(rope)):
        a, b = (i, i + r // 2) if rope["style"] == "half" else (2 * i, 2 * i + 1)
        c, z = s * math.cos(position * w), s * math.sin(position * w)
        result[a], result[b] = head[a] * c - head[b] * z, head[b] * c + head[a] * z
    return result


def sink_size(header: Header, count: int) -> int:
    heads = 2 * count * header.sinks * header.heads
    if header.sink_bits == 8:
        return heads * (4 + header.head_size)
    return heads * header.head_size * ITEMSIZE[header.dtype]


def read_sinks(payload: bytes, header: Header, count: int) -> list[float]:
    """Section 6.5: [side][layer][token][head][channel]."""
    if header.sink_bits == 16:
        result = floats(payload, header.dtype)
    else:
        border = 4 * 2 * count * header.sinks * header.heads
        scales = floats(payload[:border], "float32")
        patterns = payload[border:]
        result = [e4m3(pattern) * scales[i // header.head_size] for i, pattern in enumerate(patterns)]
    require(all(abs(number) < INFINITE_FROM[header.dtype] for number in result), "PayloadError")
    return result


# --- whole streams -------------------------------------------------------------------------------------


def decode(data: bytes, parameters: dict) -> tuple[Header, dict[str, list[float]]]:
    """Decode a stream.

    Returns the header and, under "keys" and "values", flat lists ``[token][layer][head][channel]``.
    """
    header = read_header(data)
    geometry = parameters["geometry"]
    found = (header.layers, header.heads, header.head_size, header.dtype)
    wanted = tuple(geometry[name] for name in ("num_layers", "num_kv_heads", "head_size", "dtype"))
    require(found == wanted, "StreamMismatchError")
    require(header.artifact_id.hex() == parameters["artifact_id"], "StreamMismatchError")
    kv: dict[str, list] = {
        side: [[None] * header.layers for _ in range(header.tokens)] for side in ("keys", "values")
    }
    if header.profile == RAW:
        for (first, count), sections in header.groups.items():
            decode_raw_group(data, header, range(first, first + count), sections[RAW_KV], kv)
    else:
        profile = {"KVTC": KVTC, "RD": RD}[parameters.get("profile", "KVTC")]
        require(header.profile == profile, "StreamMismatchError")
        require(list(header.groups) == [(g["first"], g["count"]) for g in parameters["groups"]],
                "StreamMismatchError")  # fmt: skip
        for group in parameters["groups"]:
            decode_group(data, header, group, parameters["rope"], kv)
    flat = {
        side: [number for token in tokens for layer in token for number in layer]
        for side, tokens in kv.items()
    }
    return header, flat


def decode_raw_group(data: bytes, header: Header, layers: range, chunks: list[Chunk], kv: dict) -> None:
    size = header.heads * header.head_size
    expected = len(layers) * 2 * header.tokens * size * ITEMSIZE[header.dtype]
    payload = read_payload(data, chunks, expected, expected)
    numbers = floats(payload, header.dtype)
    for i, layer in enumerate(layers):
        for s, side in enumerate(("keys", "values")):
            for token in range(header.tokens):
                start = ((i * 2 + s) * header.tokens + token) * size
                kv[side][token][layer] = numbers[start : start + size]


def decode_group(data: bytes, header: Header, group: dict, rope: dict, kv: dict) -> None:
    first, count, n = group["first"], group["count"], header.tokens - header.sinks
    sections = header.groups[first, count]
    size, d = header.heads * header.head_size, header.head_size
    for kind, side in ((KEYS, "keys"), (VALUES, "values")):
        require(str(header.plan_id) in group[side]["plans"], "UnsupportedVersionError")
        plan = group[side]["plans"][str(header.plan_id)]
        if header.profile == RD:
            payload = read_payload(data, sections[kind], *spec_rd.bounds(plan, n))
            rows = spec_rd.reconstruct(spec_rd.read_rows(payload, plan, n), group[side], n)
        else:
            expected = side_size(plan, n)
            payload = read_payload(data, sections[kind], expected, expected)
            rows = reconstruct(read_side(payload, plan, n), group[side], n)
        for i, row in enumerate(rows):
            token = header.sinks + i
            for layer in range(count):
                numbers = row[layer * size : (layer + 1) * size]
                if side == "keys":
                    heads = [numbers[h : h + d] for h in range(0, size, d)]
                    rotated = [rotate(head, header.position + token, rope) for head in heads]
                    numbers = [number for head in rotated for number in head]
                if header.dtype == "float16":
                    numbers = [min(max(number, -65504.0), 65504.0) for number in numbers]
                kv[side][token][first + layer] = numbers
    if header.sinks:
        expected = sink_size(header, count)
        payload = read_payload(data, sections[SINKS], expected, expected)
        numbers = read_sinks(payload, header, count)
        for s, side in enumerate(("keys", "values")):
            for layer in range(count):
                for token in range(header.sinks):
                    start = ((s * count + layer) * header.sinks + token) * size
                    kv[side][token][first + layer] = numbers[start : start + size]


def load_parameters(path: Path) -> dict:
    """Parameters of golden streams: JSON, arrays as base64 of little-endian float16."""
    parameters = json.loads(path.read_text())
    for group in parameters["groups"]:
        for side in (group["keys"], group["values"]):
            for name in {"mean", "basis", "metric", "importance"} & set(side):
                side[name] = floats(base64.b64decode(side[name]), "float16")
            if "metric" in side:
                prepare_rd(side, parameters["geometry"]["head_size"])
    return parameters


def prepare_rd(side: dict, d: int) -> None:
    flat = side["metric"]
    rows = [flat[start : start + d] for start in range(0, len(flat), d)]
    side["inverse"] = [spec_rd.invert(rows[start : start + d]) for start in range(0, len(rows), d)]
    side["head_size"] = d
    for plan in side["plans"].values():
        plan["offsets"] = floats(base64.b64decode(plan["offsets"]), "float16")
