"""The parts of the object tier that need no server: breaker, names and headers, lookups, credentials."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dynamo_kvtc.errors import ObjectCorruptError, TierError, TransferError
from dynamo_kvtc.tiers.breaker import CircuitBreaker
from dynamo_kvtc.tiers.object_client import shared_credentials, static_credentials
from dynamo_kvtc.tiers.object_format import HEADER_BYTES, key_of, object_name, pack_object, unpack_object
from dynamo_kvtc.tiers.object_lookup import BucketLookup

KEYS = [number.to_bytes(32, "big") for number in range(400)]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_breaker_opens_waits_tries_and_closes() -> None:
    clock = Clock()
    breaker = CircuitBreaker(failures=3, pause_s=5.0, longest_pause_s=12.0, clock=clock)
    for _ in range(2):
        assert breaker.allow()
        breaker.failed()
    breaker.succeeded()
    for _ in range(3):
        assert breaker.allow() and breaker.state == "closed"
        breaker.failed()
    for pause in (5.0, 10.0, 12.0, 12.0):
        assert breaker.state == "open" and not breaker.allow()
        assert breaker.retry_in_s == pause
        breaker.failed()  # a straggler from before changes nothing
        clock.now += pause
        assert breaker.state == "half_open"
        assert breaker.allow() and not breaker.allow()
        breaker.failed()
    clock.now += 12.0
    assert breaker.allow()
    breaker.undecided()
    assert breaker.allow()
    breaker.succeeded()
    assert breaker.state == "closed" and breaker.retry_in_s == 0.0
    assert breaker.openings == 5


class BreakerMachine(RuleBasedStateMachine):
    """However requests end, the breaker never gets stuck: after a pause one of them may be sent."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.breaker = CircuitBreaker(clock=self.clock)
        self.sent = 0

    @rule()
    def send(self) -> None:
        self.sent += self.breaker.allow()

    @rule(outcome=st.sampled_from(["succeeded", "failed", "undecided"]))
    def end(self, outcome: str) -> None:
        if self.sent:
            self.sent -= 1
            getattr(self.breaker, outcome)()

    @rule(seconds=st.floats(0, 200))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def never_stuck(self) -> None:
        if not self.sent:
            now = self.clock.now
            self.clock.now += 120.0
            assert self.breaker.state in ("closed", "half_open")
            self.clock.now = now


TestBreaker = BreakerMachine.TestCase


@given(key=st.binary(min_size=32, max_size=32))
def test_names_and_keys(key: bytes) -> None:
    assert key_of(object_name(key)) == key


@pytest.mark.parametrize("name", ["", "ab", "AB/" + "0" * 62, "ab/" + "0" * 61, "probe/ab", "ab/" + "0" * 63])
def test_other_names_are_no_objects(name: str) -> None:
    assert key_of(name) is None


@given(data=st.binary(min_size=1, max_size=300), where=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_damaged_object_is_found_out(data: bytes, where: int, bit: int) -> None:
    key, into = KEYS[3], memoryview(bytearray(len(data)))
    stored = bytearray(pack_object(key, memoryview(data)))
    assert len(stored) == HEADER_BYTES + len(data)
    unpack_object(key, memoryview(stored), into)
    assert into == data
    with pytest.raises(ObjectCorruptError):
        unpack_object(KEYS[4], memoryview(stored), into)
    stored[where % len(stored)] ^= 1 << bit
    with pytest.raises(ObjectCorruptError):
        unpack_object(key, memoryview(stored), into)


class Bucket:
    """What a `BucketLookup` asks in these tests: a set of keys, and an event that holds the answers back."""

    def __init__(self, stored: int) -> None:
        self.stored = set(KEYS[:stored])
        self.asked: list[bytes] = []
        self.found: list[bytes] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.broken = False
        self.most_at_once = self.at_once = 0

    async def ask(self, key: bytes) -> int | None:
        self.asked.append(key)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await self.gate.wait()
        self.at_once -= 1
        if self.broken:
            raise TransferError("the bucket is gone")
        return 10 if key in self.stored else None

    def lookup(self, **settings: object) -> BucketLookup:
        chosen = {"miss_ttl_s": 5.0, **settings}
        return BucketLookup(self.ask, lambda key, _: self.found.append(key), **chosen)  # type: ignore[arg-type]


@pytest.mark.parametrize(("stored", "asked"), [(0, 1), (1, 5), (3, 5), (5, 21), (21, 85), (300, 341)])
async def test_a_lookup_asks_in_growing_steps(stored: int, asked: int) -> None:
    bucket = Bucket(stored)
    await bucket.lookup().extend(KEYS, 10.0)
    assert (len(bucket.found), len(bucket.asked)) == (stored, asked)
    assert bucket.most_at_once <= 64


async def test_misses_are_remembered_for_a_while_and_within_a_bound() -> None:
    bucket, clock = Bucket(0), Clock()
    lookup = bucket.lookup(clock=clock, most_misses=2)
    for _ in range(3):
        await lookup.extend(KEYS[:1], 10.0)
    assert len(bucket.asked) == 1
    clock.now += 6.0
    await lookup.extend(KEYS[:1], 10.0)
    assert len(bucket.asked) == 2
    lookup.note_stored(KEYS[0])
    assert not lookup.known_missing(KEYS[0])
    for key in KEYS[:3]:
        lookup.note_missing(key)
    assert [lookup.known_missing(key) for key in KEYS[:3]] == [False, True, True]


async def test_a_lookup_waits_no_longer_than_it_may_and_the_question_goes_on() -> None:
    bucket = Bucket(3)
    lookup = bucket.lookup()
    bucket.gate.clear()
    await lookup.extend(KEYS[:3], 0.0)
    waiting = asyncio.ensure_future(lookup.extend(KEYS[:3], 10.0))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    bucket.gate.set()
    await lookup.extend(KEYS[:3], 10.0)
    assert bucket.found == KEYS[:3] and len(bucket.asked) == 3


async def test_questions_are_bounded_and_end_with_the_lookup() -> None:
    bucket = Bucket(0)
    lookup = bucket.lookup(most_questions=4)
    bucket.gate.clear()
    for key in KEYS[:50]:
        await lookup.extend([key], 0.0)
    await asyncio.sleep(0)
    assert len(bucket.asked) == 4
    await lookup.close()
    assert not lookup._questions


async def test_a_broken_bucket_is_a_miss_that_is_not_remembered() -> None:
    bucket = Bucket(2)
    lookup = bucket.lookup()
    bucket.broken = True
    await lookup.extend(KEYS[:2], 10.0)
    assert not bucket.found and not lookup.known_missing(KEYS[0])
    bucket.broken = False
    await lookup.extend(KEYS[:2], 10.0)
    assert bucket.found == KEYS[:2]


def test_credentials_come_from_the_environment_or_the_shared_file(tmp_path: Path) -> None:
    path = tmp_path / "credentials"
    path.write_text(
        "[default]\naws_access_key_id = A\naws_secret_access_key = B%C\n"
        "[kv]\naws_access_key_id = D\naws_secret_access_key = E\naws_session_token = F\n"
    )
    env = {"AWS_SHARED_CREDENTIALS_FILE": str(path)}
    assert static_credentials(env) == {"access_key": "A", "secret_key": "B%C"}
    assert static_credentials({**env, "AWS_PROFILE": "kv"})["session_token"] == "F"
    explicit = {**env, "AWS_ACCESS_KEY_ID": "G", "AWS_SECRET_ACCESS_KEY": "H"}
    assert static_credentials(explicit) == {"access_key": "G", "secret_key": "H"}
    assert shared_credentials({**env, "AWS_WEB_IDENTITY_TOKEN_FILE": "/token"}) is None
    with pytest.raises(TierError, match="profile absent"):
        shared_credentials({**env, "AWS_PROFILE": "absent"})
    path.write_text("no section\n")
    with pytest.raises(TierError, match="no S3 credentials") as error:
        shared_credentials(env)
    assert "no section" not in str(error.value)
