"""Target ``artifact``: the manifest and the tensors of an artifact, and the codec that is made of them."""

from __future__ import annotations

import json
import struct
import sys
from copy import deepcopy
from hashlib import blake2b
from random import Random
from typing import Any, NamedTuple

from pydantic import ValidationError

from benchmarks.fuzz.streams import GOLDEN
from benchmarks.fuzz.target import NUMBERS, Violation, damage, scratch_folder
from dynamo_kvtc.calibration.artifact import MANIFEST_NAME, PARAMETERS_NAME, load_artifact
from dynamo_kvtc.calibration.manifest import Manifest
from dynamo_kvtc.codec.open import open_codec
from dynamo_kvtc.errors import ArtifactFormatError, ArtifactMismatchError, RopeError

__all__ = ["ArtifactTarget"]

#: Values that no part of a manifest expects everywhere.
_VALUES: tuple[Any, ...] = (*NUMBERS, None, True, False, "", "x", "0" * 64, "\ud7ff", -1, 0.5, 1e308,
                            -0.0, [], {}, [[]],
                            {"a": 1}, "9" * 5000, float("nan"), float("inf"), 10**400, "yarn", "llama3",
                            "dynamic")  # fmt: skip


class ArtifactCase(NamedTuple):
    """The two files of a mutated artifact, and whether its hashes were made right again."""

    manifest: bytes
    tensors: bytes
    forged: bool


class ArtifactTarget:
    """Mutates manifests and tensor files of a kvtc and an rd artifact."""

    name = "artifact"

    def __init__(self) -> None:
        # The makers of small artifacts are part of the tests.
        tests = GOLDEN.parent
        sys.path += [str(tests), str(tests / "calibration")]
        from random_rd import write_random_rd_artifact  # type: ignore[import-not-found]
        from test_calibration_artifact import write  # type: ignore[import-not-found]

        from dynamo_kvtc.codec.geometry import KvGeometry, LayerRange

        root = scratch_folder(self)
        self._place = root / "mutated"
        self._place.mkdir()
        write(root / "kvtc")
        groups = (LayerRange(0, 1), LayerRange(1, 1))
        write_random_rd_artifact(root / "rd", geometry=KvGeometry(2, 1, 8), groups=groups)
        self._golden = []
        self._manifests: set[str] = set()
        for name in ("kvtc", "rd"):
            manifest, tensors = (root / name / part for part in (MANIFEST_NAME, PARAMETERS_NAME))
            self._golden.append((manifest.read_bytes(), tensors.read_bytes()))
            self._manifests.add(load_artifact(root / name).manifest.model_dump_json())

    def make(self, random: Random) -> ArtifactCase:
        """Return two files with one to three changes."""
        manifest, tensors = map(bytearray, random.choice(self._golden))
        other = random.choice(self._golden)
        forged = random.random() < 0.7
        document: Any = json.loads(manifest)
        for _ in range(random.choice((1, 1, 2, 3))):
            act = random.randrange(6)
            if act <= 2:
                document = _mutate_json(random, document)
            elif act == 3:
                damage(random, tensors, other[1])
            elif act == 4:
                tensors = _mutate_tensor_header(random, tensors)
            elif not forged:
                damage(random, manifest, other[0])
        if forged:
            return ArtifactCase(_seal(document, bytes(tensors)), bytes(tensors), True)
        if document != json.loads(random.choice(self._golden)[0]) and random.random() < 0.7:
            manifest = bytearray(_dump(document))
        return ArtifactCase(bytes(manifest), bytes(tensors), False)

    def judge(self, case: ArtifactCase) -> str:
        """Load it: the original, or with forged hashes something that a codec can be made of."""
        (self._place / MANIFEST_NAME).write_bytes(case.manifest)
        (self._place / PARAMETERS_NAME).write_bytes(case.tensors)
        try:
            artifact = load_artifact(self._place)
        except ArtifactFormatError as error:
            return type(error).__name__
        unchanged = artifact.manifest.model_dump_json() in self._manifests
        if not case.forged and not unchanged:
            raise Violation("a damaged artifact was loaded as another one")
        try:
            codec = open_codec(artifact.parameters, compute_dtype="float32", threads=1)
            codec.max_header_bytes(16, 4)
        except (ArtifactMismatchError, RopeError) as error:
            return f"loaded, then {type(error).__name__}"
        return "unchanged" if unchanged else "forged and sound"

    def bound(self, case: ArtifactCase) -> int:
        """Allow a few copies of both files; tensors are not traced."""
        return (4 << 20) + 64 * (len(case.manifest) + len(case.tensors))


def _dump(document: Any) -> bytes:
    return json.dumps(document).encode("utf-8", "surrogatepass")


def _seal(document: Any, tensors: bytes) -> bytes:
    """Write the hashes that fit; a document that is no manifest stays as it is."""
    if isinstance(document, dict) and isinstance(document.get("parameters"), dict):
        document["parameters"]["size"] = len(tensors)
        document["parameters"]["blake2b"] = blake2b(tensors, digest_size=32).hexdigest()
    try:
        manifest = Manifest.model_validate_json(_dump(document))
        document["id"] = manifest.content_id()
    except (ValidationError, ValueError, TypeError):
        pass
    return _dump(document)


def _value(random: Random) -> Any:
    # A copy: what is changed in one case must not be part of the next, or of itself.
    return deepcopy(random.choice(_VALUES))


def _mutate_json(random: Random, document: Any) -> Any:
    """Replace, remove, double or rename something in a JSON document."""
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            places.append((node, key))
            visit(value)

    visit(document)
    if not places:
        return _value(random)
    parent, key = random.choice(places)
    act = random.randrange(8)
    if act <= 3:
        parent[key] = _value(random)
    elif act == 4 and isinstance(parent[key], int | float) and not isinstance(parent[key], bool):
        parent[key] += random.choice((-1, 1, 0.5, -parent[key], parent[key]))
    elif act == 5:
        del parent[key]
    elif act == 6 and isinstance(parent, dict):
        parent[random.choice(("x", "rope", "id", "plans"))] = parent[key]
    elif act == 7 and isinstance(parent, list):
        parent.insert(0, parent[key])
    else:
        other, elsewhere = random.choice(places)
        # A copy, so that no value holds itself.
        if elsewhere in other if isinstance(other, dict) else elsewhere < len(other):
            parent[key] = json.loads(json.dumps(other[elsewhere]))
    return document


def _mutate_tensor_header(random: Random, tensors: bytearray) -> bytearray:
    """Change the JSON in front of a safetensors file, its length following or not."""
    if len(tensors) < 8:
        return tensors
    (size,) = struct.unpack_from("<Q", tensors)
    try:
        header = json.loads(tensors[8 : 8 + size])
    except ValueError:
        return tensors
    raw = _dump(_mutate_json(random, header))
    length = len(raw) if random.random() < 0.8 else random.choice(NUMBERS)
    return bytearray(struct.pack("<Q", length % 2**64) + raw + tensors[8 + size :])
