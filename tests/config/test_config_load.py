"""Files, environment overrides, and errors that name the place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_kvtc.config import (
    Config,
    DiskTierConfig,
    HostTierConfig,
    Problem,
    check_config,
    load_config,
)
from dynamo_kvtc.errors import ConfigError

TEN_LINES = """\
artifact: artifacts/model
codec:
  ratio: 16
tiers:
  - kind: host
    capacity: 4GiB
  - kind: disk
    path: kv
    capacity: 500GB
"""

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


def problems(path: Path, env: dict[str, str] | None = None) -> list[Problem]:
    config, found = check_config(path, env or {})
    assert (config is None) == bool(found)
    return found


def only(path: Path, env: dict[str, str] | None = None) -> Problem:
    (problem,) = problems(path, env)
    return problem


def test_a_host_and_a_disk_tier_take_ten_lines(write: Write, tmp_path: Path) -> None:
    assert len(TEN_LINES.splitlines()) <= 10
    config = load_config(write(TEN_LINES), {})
    host, disk = config.tiers
    assert isinstance(host, HostTierConfig) and host.capacity == 4 * 2**30
    assert isinstance(disk, DiskTierConfig) and disk.capacity == 500 * 10**9
    assert disk.path == tmp_path / "kv"
    assert config.artifact == tmp_path / "artifacts/model"
    assert config.codec.ratio == 16
    assert config.policy.recent_window == 128


def test_absolute_and_home_paths_stay(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    config = load_config(write("artifact: /a/b\ntiers: [{kind: disk, path: ~/kv, capacity: 1GB}]\n"), {})
    assert config.artifact == Path("/a/b")
    assert isinstance(config.tiers[0], DiskTierConfig)
    assert config.tiers[0].path == Path("/home/someone/kv")


def test_an_empty_section_has_its_defaults(write: Write) -> None:
    assert load_config(write(TEN_LINES + "policy:\n"), {}).policy == load_config(write(TEN_LINES), {}).policy


@pytest.mark.parametrize(
    ("key", "where", "closest"),
    [
        ("artefact: x\n", "artefact", "artifact"),
        ("policy: {recent_windw: 1}\n", "policy.recent_windw", "recent_window"),
        ("transfer: {timeuot: 5s}\n", "transfer.timeuot", "timeout"),
    ],
)
def test_an_unknown_key_names_the_closest_known_one(write: Write, key: str, where: str, closest: str) -> None:
    problem = only(write(TEN_LINES + key))
    assert problem.where == where
    assert problem.source == "line 10"
    assert f"did you mean {closest}?" in problem.message


def test_an_unknown_key_of_a_tier_names_that_kinds_keys(write: Write) -> None:
    found = problems(write(TEN_LINES.replace("path: kv", "pth: kv")))
    assert [problem.where for problem in found] == ["tiers[1].path", "tiers[1].pth"]
    assert "is missing" in found[0].message
    assert "did you mean path?" in found[1].message and "segment_size" in found[1].message


def test_problems_in_sections_of_a_tier_are_told_in_their_own_words(write: Write) -> None:
    keys = "encryption: {keys: [{id: a, fiel: b}], kyes: 1}"
    found = problems(write(f"tiers: [{{kind: host, capacity: 1GiB, {keys}}}]\ncodec: {{profile: raw}}\n"))
    assert [problem.where for problem in found] == [
        "tiers[0].encryption.keys[0].file",
        "tiers[0].encryption.keys[0].fiel",
        "tiers[0].encryption.kyes",
    ]
    assert "is missing: File with 32 random bytes" in found[0].message
    assert "did you mean file? Known here: file, id" in found[1].message
    assert "did you mean keys?" in found[2].message


def test_all_problems_are_reported_at_once(write: Write) -> None:
    text = TEN_LINES.replace("16", "many").replace("4GiB", "4 bananas") + "policy: {sink_tokens: -1}\n"
    path = write(text)
    assert [problem.where for problem in problems(path)] == [
        "codec.ratio",
        "tiers[0].capacity",
        "policy.sink_tokens",
    ]
    with pytest.raises(ConfigError, match=r"codec.ratio .*; tiers\[0\].capacity .*; policy.sink_tokens"):
        load_config(path, {})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "must hold keys and values"),
        ("just words", "must hold keys and values"),
        ("tiers: [", "not valid YAML"),
        ("a: &x [1]\nb: *x\n", "aliases are not supported"),
        ("a: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("[" * 20_000, "not valid YAML"),
        ("a: 2001-99-99\n", "not valid YAML"),
        ("a: \x00\n", "not valid YAML"),
        ("#" * (1024**2 + 1), "larger than"),
    ],
)
def test_what_is_not_a_configuration_is_refused(write: Write, text: str, says: str) -> None:
    assert says in only(write(text)).message


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in only(tmp_path / "absent.yaml").message
    assert "it is not a file" in only(tmp_path).message


def test_a_key_that_stands_twice_is_an_error(write: Write) -> None:
    problem = only(write(TEN_LINES + "codec:\n  ratio: 8\n"))
    assert (problem.where, problem.source) == ("codec", "line 2")
    assert "lines 2 and 10" in problem.message


@pytest.mark.parametrize(
    ("tiers", "says"),
    [
        ("[]", "at least one"),
        ("{kind: host}", "begin each item with a dash"),
        ("[{capacity: 1GB}]", "known kinds: host, disk"),
        ("[{kind: tape, capacity: 1GB}]", "known kinds: host, disk"),
        ("[{kind: host, capacity: 1GB}, {kind: host, capacity: 1GB}]", "one host tier"),
        ("[{kind: disk, path: a, capacity: 1GB}, {kind: host, capacity: 1GB}]", "from fast to slow"),
        ("[{kind: disk, path: a, capacity: 1GB}, {kind: disk, path: ./a, capacity: 1GB}]", "share a folder"),
        ("[{kind: disk, path: a, capacity: 1GB}, {kind: disk, path: a/b, capacity: 1GB}]", "share a folder"),
        ("[{kind: disk, path: '', capacity: 1GB}]", "not a path"),
        ("[{kind: disk, path: a, capacity: 1GB, segment_size: 4KiB}]", "1048576"),
    ],
)
def test_tiers_that_contradict_each_other_are_refused(write: Write, tiers: str, says: str) -> None:
    assert says in only(write(f"artifact: a\ntiers: {tiers}\n")).message


@pytest.mark.parametrize(
    ("addition", "says"),
    [
        ("policy: {tier_block_tokens: 2, sink_tokens: 4}\n", "must fit into one tier block"),
        ("policy: 5\n", "must hold keys and values"),
        ("policy: {sink_tokens: true}\n", "valid integer"),
        ("policy: {sink_tokens: '4'}\n", "valid integer"),
        ("transfer: {timeout: 5}\n", "not a duration"),
        ("transfer: {io_uring: maybe}\n", "valid boolean"),
        ("transfer: {max_descriptors: 100000}\n", "65536"),
    ],
)
def test_values_are_not_coerced_and_have_bounds(write: Write, addition: str, says: str) -> None:
    assert says in only(write(TEN_LINES + addition)).message


@pytest.mark.parametrize(
    ("codec", "first_tier", "chosen"),
    [
        ("", "", (20.0, None)),
        ("profile: kvtc", "", (16.0, None)),
        ("profile: raw", "", (None, None)),
        ("ratio: 40", "", (40.0, None)),
        ("max_kl: 0.01", "", (None, 0.01)),
        ("ratio: 40", "ratio: 10", (10.0, None)),
        ("ratio: 40", "max_kl: 0.02", (None, 0.02)),
        ("max_kl: 0.01", "ratio: 10", (10.0, None)),
        ("max_kl: 0.01", "null", (None, 0.01)),
        ("profile: kvtc, ratio: 8", "ratio: 32", (32.0, None)),
    ],
)
def test_codec_or_the_first_tier_choose_the_plan(
    write: Write, codec: str, first_tier: str, chosen: tuple[float | None, float | None]
) -> None:
    own = first_tier if first_tier == "null" else f"{{{first_tier}}}"
    text = f"artifact: a\ncodec: {{{codec}}}\ntiers: [{{kind: host, capacity: 1GB, codec: {own}}}]\n"
    encoding = load_config(write(text), {}).encoding
    assert (encoding.plan_ratio, encoding.max_kl) == chosen


@pytest.mark.parametrize(
    ("codec", "first", "second", "says"),
    [
        ("ratio: 20, max_kl: 0.01", "", "", "give one of them"),
        ("", "ratio: 20, max_kl: 0.01", "", "give one of them"),
        ("", "", "ratio: 20", "encoded once"),
        ("", "", "max_kl: 0.1", "first tier's entry"),
        ("profile: kvtc, max_kl: 0.01", "", "", "state no divergences"),
        ("profile: kvtc", "max_kl: 0.01", "", "state no divergences"),
        ("max_kl: 0", "", "", "greater than 0"),
        ("ratio: .nan", "", "", "4096, not nan"),
        ("ratio: 5000", "", "", "4096"),
        ("", "max_lk: 0.01", "", "did you mean max_kl? Known here: max_kl, ratio"),
        ("", "5", "", "must hold keys and values"),
    ],
)
def test_plans_that_cannot_be_are_refused(
    write: Write, codec: str, first: str, second: str, says: str
) -> None:
    first = first if first == "5" else f"{{{first}}}"
    text = (
        f"artifact: a\ncodec: {{{codec}}}\ntiers: [{{kind: host, capacity: 1GB, codec: {first}}}, "
        f"{{kind: disk, path: kv, capacity: 1GB, codec: {{{second}}}}}]\n"
    )
    assert says in only(write(text)).message


def test_the_environment_reaches_the_plan_of_the_first_tier(write: Write) -> None:
    config = load_config(write(TEN_LINES), {"DYNAMO_KVTC__TIERS__0__CODEC__MAX_KL": "0.01"})
    assert (config.encoding.plan_ratio, config.encoding.max_kl) == (None, 0.01)


def test_kvtc_needs_an_artifact_and_raw_does_not(write: Write) -> None:
    text = TEN_LINES.replace("artifact: artifacts/model\n", "")
    assert "calibrate" in only(write(text)).message
    assert load_config(write(text), {"DYNAMO_KVTC__CODEC__PROFILE": "raw"}).artifact is None


def test_the_environment_overrides_single_values(write: Write) -> None:
    env = {
        "DYNAMO_KVTC__TIERS__0__CAPACITY": "8GiB",
        "DYNAMO_KVTC__TRANSFER__TIMEOUT": "200ms",
        "DYNAMO_KVTC__TRANSFER__IO_URING": "false",
        "DYNAMO_KVTC__CODEC__RATIO": "32",
        "DYNAMO_KVTC_CACHE": "not one of these",
        "HOME": "/home/someone",
    }
    config = load_config(write(TEN_LINES), env)
    assert config.tiers[0].capacity == 8 * 2**30
    assert config.transfer.timeout == pytest.approx(0.2)
    assert config.transfer.io_uring is False
    assert config.codec.ratio == 32


@pytest.mark.parametrize(
    ("variable", "value", "where"),
    [
        ("DYNAMO_KVTC__TIERS__0__CAPACTY", "8GiB", "tiers[0].capacty"),
        ("DYNAMO_KVTC__TIERS__0__CAPACITY", "8 bananas", "tiers[0].capacity"),
        ("DYNAMO_KVTC__TIERS__7__CAPACITY", "8GiB", "tiers[7].capacity"),
        ("DYNAMO_KVTC__ARTIFACT__NAME", "x", "artifact.name"),
        ("DYNAMO_KVTC__CODEC", "{ratio: 8}", "codec"),
        ("DYNAMO_KVTC__", "x", ""),
    ],
)
def test_a_bad_variable_is_named(write: Write, variable: str, value: str, where: str) -> None:
    problem = only(write(TEN_LINES), {variable: value})
    assert (problem.where, problem.source) == (where, variable)


def test_a_salt_is_never_shown(write: Write) -> None:
    problem = only(write(TEN_LINES), {"DYNAMO_KVTC__SECURITY__SALT": "4711"})
    assert problem.where == "security.salt" and "4711" not in str(problem)
    config = load_config(write(TEN_LINES), {"DYNAMO_KVTC__SECURITY__SALT": "tenant"})
    assert config.security.salt == "tenant" and "tenant" not in repr(config)


def test_settings_cannot_be_changed(write: Write) -> None:
    config = load_config(write(TEN_LINES), {})
    with pytest.raises(ValueError, match="frozen"):
        config.artifact = None  # type: ignore[misc]


_keys = st.sampled_from(
    ["artifact", "codec", "tiers", "policy", "kind", "host", "disk", "path", "capacity", "ratio"]
)
_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(_keys, _values, max_size=6))
def test_any_yaml_gives_settings_or_problems(tmp_path_factory: pytest.TempPathFactory, data: object) -> None:
    import yaml

    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump(data))
    config, found = check_config(path, {})
    assert isinstance(config, Config) or found
    assert all(problem.message for problem in found)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_give_settings_or_problems(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.yaml"
    path.write_bytes(data)
    config, found = check_config(path, {})
    assert config is None and found
