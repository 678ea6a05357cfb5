"""Hostile artifacts: what each folder does, and what the `ArtifactFormatError` it must meet says."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

from dynamo_kvtc.calibration.manifest import Manifest

__all__ = ["ARTIFACT_ATTACKS", "SOUND"]

#: A sound artifact of the rd profile, that all attacks are made of.
SOUND = Path(__file__).parent / "artifacts" / "sound"

#: Attack by folder name: how its two files are made, and what the error says.
ARTIFACT_ATTACKS: dict[str, tuple[Callable[[], tuple[bytes, bytes]], str]] = {}

Make = Callable[[], tuple[bytes, bytes]]


def attack(message: str) -> Callable[[Make], Make]:
    def register(make: Make) -> Make:
        ARTIFACT_ATTACKS[make.__name__.replace("_", "-")] = (make, message)
        return make

    return register


def manifest() -> Any:
    return json.loads((SOUND / "artifact.json").read_bytes())


def tensors() -> bytes:
    return (SOUND / "parameters.safetensors").read_bytes()


def sealed(document: Any, data: bytes) -> tuple[bytes, bytes]:
    """Both files, with every hash made right again."""
    document["parameters"] |= {"size": len(data), "blake2b": blake2b(data, digest_size=32).hexdigest()}
    document["id"] = Manifest.model_validate_json(json.dumps(document)).content_id()
    return json.dumps(document).encode(), data


def with_tensor_header(
    change: Callable[[dict[str, Any]], None], *, size: int | None = None
) -> tuple[bytes, bytes]:
    data = tensors()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    return sealed(
        manifest(), struct.pack("<Q", len(raw) if size is None else size) + raw + data[8 + length :]
    )


@attack("damaged or of another version")
def a_pickle_in_place_of_the_manifest() -> tuple[bytes, bytes]:
    return b"\x80\x04cos\nsystem\n(S'true'\ntR.", tensors()


@attack("damaged or of another version")
def ten_thousand_brackets() -> tuple[bytes, bytes]:
    return b"[" * 10_000, tensors()


@attack("damaged or of another version")
def version_from_the_future() -> tuple[bytes, bytes]:
    return json.dumps(manifest() | {"schema_version": 99}).encode(), tensors()


@attack("damaged or of another version")
def a_key_that_nobody_knows() -> tuple[bytes, bytes]:
    return json.dumps(manifest() | {"run": "me"}).encode(), tensors()


@attack("damaged or of another version")
def tensors_from_outside_the_folder() -> tuple[bytes, bytes]:
    document = manifest()
    document["parameters"]["name"] = "../../../../etc/passwd"
    return json.dumps(document).encode(), tensors()


@attack("content id")
def plan_changed_and_id_left() -> tuple[bytes, bytes]:
    document = manifest()
    document["groups"][0]["keys"]["plans"][0]["step"] *= 2
    return json.dumps(document).encode(), tensors()


@attack("damaged")
def one_bit_of_the_basis_flipped() -> tuple[bytes, bytes]:
    data = bytearray(tensors())
    data[-1] ^= 1
    return json.dumps(manifest()).encode(), bytes(data)


@attack("size does not fit")
def tensors_of_four_exabytes() -> tuple[bytes, bytes]:
    document = manifest()
    document["parameters"]["size"] = 2**62
    document["id"] = Manifest.model_validate_json(json.dumps(document)).content_id()
    return json.dumps(document).encode(), tensors()


@attack("size does not fit")
def rank_of_a_million() -> tuple[bytes, bytes]:
    document = manifest()
    document["groups"][0]["keys"]["rank"] = 2**20
    return sealed(document, tensors())


@attack("damaged")
def tensor_header_longer_than_the_file() -> tuple[bytes, bytes]:
    return with_tensor_header(lambda _: None, size=2**63)


@attack("damaged")
def two_tensors_share_their_bytes() -> tuple[bytes, bytes]:
    def change(header: dict[str, Any]) -> None:
        first, second, *_ = (name for name in header if name != "__metadata__")
        header[first]["data_offsets"] = header[second]["data_offsets"]

    return with_tensor_header(change)


@attack("damaged")
def a_tensor_of_negative_shape() -> tuple[bytes, bytes]:
    return with_tensor_header(lambda header: header["0.keys.mean"].update(shape=[-1]))


@attack("damaged")
def an_unknown_tensor_more() -> tuple[bytes, bytes]:
    return with_tensor_header(
        lambda header: header.update(x={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})
    )


@attack("NaN or infinity")
def a_mean_that_is_not_a_number() -> tuple[bytes, bytes]:
    data = bytearray(tensors())
    (length,) = struct.unpack_from("<Q", data)
    start, _ = json.loads(data[8 : 8 + length])["0.keys.mean"]["data_offsets"]
    struct.pack_into("<f", data, 8 + length + start, float("nan"))
    return sealed(manifest(), bytes(data))


@attack("positive definite")
def a_metric_that_is_none() -> tuple[bytes, bytes]:
    data = bytearray(tensors())
    (length,) = struct.unpack_from("<Q", data)
    start, _ = json.loads(data[8 : 8 + length])["0.keys.metric"]["data_offsets"]
    struct.pack_into("<f", data, 8 + length + start, -1.0)
    return sealed(manifest(), bytes(data))


@attack("reaches component")
def components_beyond_the_rank() -> tuple[bytes, bytes]:
    data = bytearray(tensors())
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    name = next(name for name in header if name.endswith("components") and header[name]["shape"] != [0])
    struct.pack_into("<i", data, 8 + length + header[name]["data_offsets"][0], 2**31 - 1)
    return sealed(manifest(), bytes(data))


@attack("part of the KV heads")
def half_of_the_heads() -> tuple[bytes, bytes]:
    document = manifest()
    document["head_shard"]["total"] = 2
    return sealed(document, tensors())


@attack("contradicts itself")
def a_rotary_scaling_of_nobody() -> tuple[bytes, bytes]:
    document = manifest()
    document["model"]["rope"]["scaling"] = "whatever"
    return sealed(document, tensors())


@attack("contradicts itself")
def a_rotary_base_of_four_hundred_digits() -> tuple[bytes, bytes]:
    document = manifest()
    document["model"]["rope"]["theta"] = 10**400
    return sealed(document, tensors())


@attack("contradicts itself")
def a_rotary_beta_that_is_not_a_number() -> tuple[bytes, bytes]:
    document = manifest()
    document["model"]["rope"]["beta_fast"] = float("nan")
    return sealed(document, tensors())


@attack("damaged")
def a_tensor_longer_than_all_memory() -> tuple[bytes, bytes]:
    return with_tensor_header(lambda header: header["0.keys.mean"].update(shape=[2**63, 0]))
