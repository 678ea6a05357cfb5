"""Tasks with the tokenizer of the tiny model, whose tokens are bytes: what they generate can be read back."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.quality import RECENT_WINDOW
from benchmarks.quality.domains import DOMAINS
from benchmarks.quality.tasks import TASKS, Task
from benchmarks.quality.tasks.base import Document, Probe, lay_out
from benchmarks.quality.tasks.choice import ChoiceTask
from benchmarks.quality.tasks.needle import NeedleTask
from benchmarks.quality.tasks.retrieval import RetrievalTask
from benchmarks.quality.tasks.text import TextTask
from benchmarks.quality.tasks.tracking import TrackingTask
from benchmarks.quality.tasks.words import CATEGORIES
from dynamo_kvtc.calibration.models import LoadedModel
from dynamo_kvtc.errors import EvaluationError

#: The tasks at sizes for tokens that are bytes.
SMALL: list[Task] = [
    TextTask(per_domain=2, context_tokens=300, scored_tokens=20),
    RetrievalTask(lengths=(600, 1500), per_length=2, probes=4),
    NeedleTask(lengths=(1500,), per_length=3),
    TrackingTask(lengths=(3000,), per_length=2),
    ChoiceTask(context_tokens=900, per_kind=2, probes=4),
]

Decode = Callable[[tuple[int, ...]], str]


@pytest.fixture(scope="module")
def decode(byte_model: LoadedModel) -> Decode:
    return byte_model.tokenizer.decode  # type: ignore[no-any-return]


@pytest.mark.parametrize("task", SMALL, ids=lambda task: task.name)
def test_documents_are_the_same_in_every_run_and_all_differ(task: Task, byte_model: LoadedModel) -> None:
    documents = task.documents(byte_model.tokenizer)
    assert documents == task.documents(byte_model.tokenizer)
    assert len({(document.context, document.group) for document in documents}) == len(documents)
    assert all(document.stored_tokens > 0 for document in documents)


def test_every_task_of_the_registry_has_a_small_one_here() -> None:
    assert list(TASKS) == [task.name for task in SMALL]
    assert all(TASKS[name].metrics for name in TASKS)


@pytest.mark.parametrize("task", [SMALL[1], SMALL[2]], ids=lambda task: task.name)
def test_an_answer_stands_once_in_what_is_stored(task: Task, byte_model: LoadedModel, decode: Decode) -> None:
    for document in task.documents(byte_model.tokenizer):
        assert f"{len(document.context)} tokens" == document.group
        stored, whole = decode(document.context[: document.stored_tokens]), decode(document.context)
        for probe in document.probes:
            answer = decode(probe.answer).strip()
            assert len(answer) == 5
            assert whole.count(answer) == stored.count(answer) == 1
            assert answer not in decode(probe.suffix)


def test_retrieval_asks_for_pairs_of_the_list(byte_model: LoadedModel, decode: Decode) -> None:
    for document in SMALL[1].documents(byte_model.tokenizer):
        context = decode(document.context)
        asked = [decode(probe.suffix).split('"')[1] for probe in document.probes]
        assert len(set(asked)) == len(asked)
        for name, probe in zip(asked, document.probes, strict=True):
            assert context.count(f'"{name}": "{decode(probe.answer)}",') == 1
            assert context.count(f'"{name}"') == 1


def test_a_needle_lies_at_different_depths_of_prose(byte_model: LoadedModel, decode: Decode) -> None:
    depths = set()
    for document in NeedleTask(lengths=(2000,), per_length=8).documents(byte_model.tokenizer):
        context, [probe] = decode(document.context), document.probes
        fact = (decode(probe.suffix) + decode(probe.answer)).strip() + "."
        assert context.count(fact) == 1
        depths.add(context.index(fact) // 200)
    assert len(depths) > 3


def test_tracking_follows_references_that_stand_in_the_stored_list(
    byte_model: LoadedModel, decode: Decode
) -> None:
    documents = SMALL[3].documents(byte_model.tokenizer)
    assert [document.group[:5] for document in documents] == ["1 hop", "2 hop"] * 2
    for document in documents:
        stored = decode(document.context[: document.stored_tokens])
        for probe in document.probes:
            asked = decode(probe.suffix).split('"')[1]
            answers = [decode(probe.answer), *(decode(answer) for _, answer in probe.further)]
            assert len(answers) == int(document.group[0]) + 1
            for name, answer in zip([asked, *answers], answers, strict=False):
                target = answer if answer.isdigit() else f"@{answer}"
                assert stored.count(f'"{name}": "{target}",') == 1
            assert answers[-1].isdigit()


def test_places_of_a_probe_are_one_before_its_targets() -> None:
    probe = Probe((1, 2), (3, 4), (((5,), (6,)), ((7, 8), (9, 10))))
    assert probe.token_ids == tuple(range(1, 11))
    assert probe.targets == (3, 4, 6, 9, 10)
    assert tuple(probe.token_ids[place + 1] for place in probe.places) == probe.targets


def test_copying_continues_the_list(byte_model: LoadedModel, decode: Decode) -> None:
    task = ChoiceTask(context_tokens=900, per_kind=2, probes=4, kinds=("copying",))
    for document in task.documents(byte_model.tokenizer):
        stored = decode(document.context[: document.stored_tokens])
        for probe in document.probes:
            assert stored.count(decode(probe.suffix).lstrip() + decode(probe.answer)) == 1


def test_examples_and_questions_are_right(byte_model: LoadedModel, decode: Decode) -> None:
    task = ChoiceTask(context_tokens=900, per_kind=1, probes=8, kinds=("addition", "product", "category"))
    for document in task.documents(byte_model.tokenizer):
        lines = decode(document.context).split("\n")[:-1]
        lines += [decode(probe.suffix + probe.answer).strip() for probe in document.probes]
        for line in lines:
            if document.group == "category":
                word, category = line.split(" is a kind of ")
                assert word in CATEGORIES[category]
            else:
                a, sign, b, _, result = line.split()
                assert int(result) == (int(a) + int(b) if sign == "+" else int(a) * int(b))


def test_text_is_cut_from_every_domain_and_scored_behind_the_context(
    byte_model: LoadedModel, decode: Decode
) -> None:
    documents = SMALL[0].documents(byte_model.tokenizer)
    assert [document.group for document in documents] == [name for name in DOMAINS for _ in range(2)]
    for document in documents:
        [probe] = document.probes
        assert (len(document.context), len(probe.suffix), len(probe.answer)) == (300, 1, 20)
        text = DOMAINS[document.group].heldout.read_text(encoding="utf-8")
        assert decode(document.context + probe.suffix + probe.answer) in text


def test_texts_too_short_are_refused(byte_model: LoadedModel) -> None:
    with pytest.raises(EvaluationError, match="prose text does not hold 2 documents"):
        TextTask(per_domain=2, context_tokens=200_000).documents(byte_model.tokenizer)


def test_no_held_out_text_is_calibrated_on() -> None:
    for domain in DOMAINS.values():
        calibrated = domain.calibration.read_text(encoding="utf-8")
        lines = {line for line in domain.heldout.read_text(encoding="utf-8").splitlines() if len(line) > 70}
        assert len(lines) > 50
        assert not [line for line in lines if line in calibrated]
        assert domain.heldout.stat().st_size > 100_000


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    filler=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    extra=st.integers(0, 200),
    seed=st.integers(0, 1000),
)
def test_facts_are_laid_out_whole_in_order_and_before_the_window(
    sizes: list[int], filler: list[int], extra: int, seed: int
) -> None:
    facts = [tuple([1000 + number] * size) for number, size in enumerate(sizes)]
    tokens = RECENT_WINDOW + max(filler) + sum(sizes) + extra
    context = lay_out(facts, [tuple([7] * size) for size in filler], tokens, Random(seed))
    assert len(context) == tokens
    assert set(context[-RECENT_WINDOW:]) == {7}
    assert [token for token in context if token != 7] == [token for fact in facts for token in fact]


def test_facts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(EvaluationError, match="longer contexts"):
        lay_out([(1,) * 50], [(2,)], RECENT_WINDOW + 50, Random(0))


def test_documents_and_probes_that_measure_nothing_are_refused() -> None:
    with pytest.raises(EvaluationError):
        Probe((), (1,))
    with pytest.raises(EvaluationError):
        Document("g", (1,) * RECENT_WINDOW, (Probe((1,), (2,)),))
    with pytest.raises(EvaluationError):
        Document("g", (1,) * 500, ())
