"""Every hostile file of the corpus is refused by its own error; see ``make_attacks.py`` for what they are."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from artifact_attacks import ARTIFACT_ATTACKS, SOUND
from golden_files import GOLDEN, from_json, parameter_file
from make_attacks import ATTACKS, attack_files
from other_attacks import CONFIG_ATTACKS, SEGMENT_ATTACKS
from stream_attacks import BASE, STREAM_ATTACKS

from dynamo_kvtc.calibration.artifact import load_artifact
from dynamo_kvtc.codec.bitstream import parse_header
from dynamo_kvtc.codec.open import open_codec
from dynamo_kvtc.config.load import check_config
from dynamo_kvtc.errors import ArtifactFormatError, TierError
from dynamo_kvtc.tiers.disk_format import segment_name
from dynamo_kvtc.tiers.disk_recovery import recover_folder


def test_the_corpus_is_what_its_makers_make() -> None:
    expected = dict(attack_files())
    found = {
        path for path in ATTACKS.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc", ".md")
    }
    assert found - set(SOUND.iterdir()) == set(expected)
    assert all(path.read_bytes() == data for path, data in expected.items())


@pytest.mark.parametrize("name", STREAM_ATTACKS)
def test_a_hostile_stream_meets_its_error(name: str) -> None:
    data = (ATTACKS / "streams" / name).read_bytes()
    codec = open_codec(from_json(parameter_file(BASE).read_text()), compute_dtype="float32", threads=1)
    binding = parse_header((GOLDEN / f"{BASE}.kvtc").read_bytes()).binding
    with pytest.raises(STREAM_ATTACKS[name][1]) as caught:
        codec.read_header(data, binding=binding)
        codec.decode(data)
    assert type(caught.value) is STREAM_ATTACKS[name][1]


@pytest.mark.parametrize("name", ARTIFACT_ATTACKS)
def test_a_hostile_artifact_is_refused(name: str) -> None:
    with pytest.raises(ArtifactFormatError, match=ARTIFACT_ATTACKS[name][1]):
        load_artifact(ATTACKS / "artifacts" / name)


def test_the_artifact_that_attacks_are_made_of_is_sound() -> None:
    load_artifact(SOUND)


@pytest.mark.parametrize("name", SEGMENT_ATTACKS)
def test_a_hostile_segment_yields_no_object(name: str, tmp_path: Path) -> None:
    path = tmp_path / segment_name(1)
    shutil.copy(ATTACKS / "segments" / f"{name}.segment", path)
    if SEGMENT_ATTACKS[name][1] == "refused":
        with pytest.raises(TierError, match="format version"):
            recover_folder(tmp_path, verify_objects=True)
        assert path.exists()
        return
    recovery = recover_folder(tmp_path, verify_objects=True)
    assert recovery.segments == [] and not path.exists()
    assert recovery.damaged == (0 if name == "nothing-but-zeros" else 1)


@pytest.mark.parametrize("name", CONFIG_ATTACKS)
def test_a_hostile_configuration_is_refused_with_a_reason(name: str) -> None:
    config, problems = check_config(ATTACKS / "configs" / name, {})
    assert config is None
    assert any(CONFIG_ATTACKS[name][1] in str(problem) for problem in problems), problems
