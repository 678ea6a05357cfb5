from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from dynamo_kvtc.adapters.kvbm.joined import JoinedTransfers


def test_what_one_party_does_alone_is_passed_on_at_once() -> None:
    transfers = JoinedTransfers()
    assert transfers.report({"a"}, {"b"}) == {"a", "b"}


def test_what_both_do_is_held_until_the_second_report() -> None:
    transfers = JoinedTransfers()
    transfers.expect({"a"})
    assert transfers.report({"a"}, set()) == set()
    assert transfers.report(set(), {"b"}) == {"b"}
    assert transfers.report(set(), {"a"}) == {"a"}


def test_both_in_one_step() -> None:
    transfers = JoinedTransfers()
    transfers.expect({"a"})
    assert transfers.report({"a"}, {"a"}) == {"a"}


def test_a_request_may_come_again() -> None:
    transfers = JoinedTransfers()
    transfers.expect({"a"})
    transfers.report({"a"}, {"a"})
    assert transfers.report({"a"}, set()) == {"a"}


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.sampled_from(["kvbm", "ours", "both"])),
    st.randoms(use_true_random=False),
)
def test_every_request_is_passed_on_once_and_never_early(parties: dict[str, str], random: object) -> None:
    transfers = JoinedTransfers()
    transfers.expect({name for name, who in parties.items() if who == "both"})
    reports = [(name, 0) for name, who in parties.items() if who in ("kvbm", "both")]
    reports += [(name, 1) for name, who in parties.items() if who in ("ours", "both")]
    random.shuffle(reports)  # type: ignore[attr-defined]
    done: Counter[str] = Counter()
    open_reports = Counter(name for name, _ in reports)
    for name, party in reports:
        open_reports[name] -= 1
        for finished in transfers.report(*([{name}, set()] if party == 0 else [set(), {name}])):
            assert not open_reports[finished]
            done[finished] += 1
    assert done == Counter(dict.fromkeys(parties, 1))
