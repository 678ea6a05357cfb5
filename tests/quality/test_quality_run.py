"""The harness from end to end on real models: a tiny random one, and the demo's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.quality.__main__ import app
from benchmarks.quality.artifacts import CalibrationPlan
from benchmarks.quality.codecs.base import DocumentCodec, StoredKv
from benchmarks.quality.codecs.none import NoCodec
from benchmarks.quality.measure import DocumentScore, measure_document
from benchmarks.quality.run import RunRequest, Step, run_model
from benchmarks.quality.settings import FULL, QUICK, RunPlan
from benchmarks.quality.tasks.base import Document, Probe
from benchmarks.quality.tasks.choice import ChoiceTask
from benchmarks.quality.tasks.needle import NeedleTask
from benchmarks.quality.tasks.text import TextTask
from dynamo_kvtc.calibration.artifact import Artifact
from dynamo_kvtc.calibration.models import BUILTIN_SMOLLM2, LoadedModel
from dynamo_kvtc.errors import EvaluationError

_TEXT = TextTask(per_domain=1, context_tokens=300, scored_tokens=16, domains=("prose", "code"))


class _Negated(DocumentCodec):
    """Decodes every number as its negative, and remembers what it was given."""

    family = "negated"
    setting = "all"

    def store(self, keys: torch.Tensor, values: torch.Tensor) -> StoredKv:
        self.tokens = keys.shape[0]
        return StoredKv(-keys, -values, 1000)


class _Broken(DocumentCodec):
    family = "broken"
    setting = "all"

    def store(self, keys: torch.Tensor, values: torch.Tensor) -> StoredKv:
        return StoredKv(keys * torch.nan, values, 1000)


def _run(model: str, request: RunRequest) -> list[DocumentScore]:
    _, scores = run_model(model, request, lambda _: None)
    return list(scores)


def _request(artifact: Artifact, **changes: object) -> RunRequest:
    plan = RunPlan(tasks={"text": _TEXT}, codecs=("none", "kvtc"))
    request = RunRequest(plan=plan, tier_block_tokens=64, artifacts={"kvtc": [artifact.folder]})
    return dataclasses.replace(request, **changes)  # type: ignore[arg-type]


def test_all_but_the_window_is_stored_and_replaced(byte_model: LoadedModel) -> None:
    document = Document("g", tuple(range(200)), (Probe((1, 2), (3, 4, 5)), Probe((6,), (7,))))
    negated = _Negated()
    exact, changed = measure_document(
        byte_model, document, [NoCodec(rounded=False), negated], model="m", task="t", number=0
    )
    assert negated.tokens == 200 - 128
    assert exact.raw_bytes == exact.stored_bytes == 72 * byte_model.geometry.token_bytes_16bit
    assert (exact.kl, exact.nll) == (0, exact.reference_nll)
    assert (exact.tokens, exact.agreements, exact.probes) == (4, 4, 2)
    assert changed.kl > 0
    assert changed.stored_bytes == 1000
    assert changed.reference_nll == exact.nll != changed.nll


def test_an_answer_is_right_where_greedy_decoding_gives_it(byte_model: LoadedModel) -> None:
    context, suffix = list(range(150)), [65, 66]
    sequence = context + suffix
    with torch.inference_mode():
        for _ in range(3):
            logits = byte_model.model(input_ids=torch.tensor([sequence])).logits
            sequence.append(int(logits[0, -1].argmax()))
    greedy = tuple(sequence[-3:])
    wrong = (*greedy[:2], (greedy[2] + 1) % 256)
    probes = (Probe(tuple(suffix), greedy), Probe(tuple(suffix), wrong))
    [score] = measure_document(
        byte_model,
        Document("g", tuple(context), probes),
        [NoCodec(rounded=False)],
        model="m",
        task="t",
        number=0,
    )
    assert (score.probes, score.correct, score.reference_correct) == (2, 1, 1)


def test_codecs_that_decode_to_garbage_are_refused(byte_model: LoadedModel) -> None:
    document = Document("g", tuple(range(150)), (Probe((1,), (2,)),))
    with pytest.raises(EvaluationError, match=r"broken \(all\) decodes to NaN"):
        list(measure_document(byte_model, document, [_Broken()], model="m", task="t", number=0))


def test_a_run_scores_every_document_with_every_codec(
    byte_model_folder: Path, byte_artifact: Artifact
) -> None:
    steps: list[Step] = []
    artifacts, found = run_model(str(byte_model_folder), _request(byte_artifact), steps.append)
    scores = list(found)
    assert artifacts["kvtc"].parameters.artifact_id == byte_artifact.parameters.artifact_id
    assert [(s.document, s.group) for s in scores] == [(0, "prose")] * 5 + [(1, "code")] * 5
    settings = ["exact", "bfloat16", "2.5x nominal", "4x nominal", "8x nominal"]
    assert [s.setting for s in scores] == settings * 2
    by_setting = {s.setting: s for s in scores[:5]}
    assert by_setting["exact"].kl == 0 < by_setting["bfloat16"].kl < by_setting["2.5x nominal"].kl
    assert by_setting["2.5x nominal"].kl < by_setting["8x nominal"].kl
    assert by_setting["8x nominal"].stored_bytes < by_setting["2.5x nominal"].stored_bytes
    assert len({s.reference_nll for s in scores[:5]}) == 1  # one reference for all codecs
    assert (steps[-1].done, steps[-1].total) == (10, 10)
    assert scores == _run(str(byte_model_folder), _request(byte_artifact))


def test_missing_artifacts_are_calibrated_once(
    byte_model_folder: Path, byte_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYNAMO_KVTC_CACHE", str(tmp_path))
    plan = RunPlan(
        tasks={"text": _TEXT},
        codecs=("none", "kvtc"),
        calibration=CalibrationPlan(tokens=1200, document_tokens=400, ratios={"kvtc": (4.0,)}),
    )
    request = _request(byte_artifact, plan=plan, artifacts={})
    first, _ = run_model(str(byte_model_folder), request, lambda _: None)
    [manifest] = tmp_path.glob("quality/*/artifact.json")
    written = manifest.stat().st_mtime_ns
    second, _ = run_model(str(byte_model_folder), request, lambda _: None)
    assert first["kvtc"].parameters.artifact_id == second["kvtc"].parameters.artifact_id
    assert manifest.stat().st_mtime_ns == written
    assert first["kvtc"].parameters.artifact_id != byte_artifact.parameters.artifact_id


def test_models_get_the_tasks_they_solve_unless_others_are_asked_for() -> None:
    assert [task.name for task in FULL.tasks_of("smollm2")] == ["text", "needle", "choice"]
    assert [task.name for task in FULL.tasks_of("another")] == list(FULL.tasks)
    [choice, retrieval] = FULL.tasks_of("smollm2", ["choice", "retrieval"])
    assert isinstance(choice, ChoiceTask)
    assert "copying" not in choice.kinds
    assert retrieval is FULL.tasks["retrieval"]


def test_more_contexts_are_a_longer_list_of_the_same() -> None:
    plan = FULL.with_contexts(40)
    [retrieval, needle] = plan.tasks_of("qwen-coder", ["retrieval", "needle"])
    assert (retrieval.per_length, needle.per_length) == (40, 40)  # type: ignore[attr-defined]
    assert plan.tasks["text"] == FULL.tasks["text"]
    assert plan.tasks_of("smollm2", ["needle"]) == [needle]


def test_names_are_checked_before_anything_is_loaded() -> None:
    with pytest.raises(EvaluationError, match="no codec 'zip'; known: none, fp8"):
        RunRequest(plan=FULL, codecs=["zip"])
    with pytest.raises(EvaluationError, match="no task 'poems'; known: text"):
        RunRequest(plan=QUICK, tasks=["poems"])


def test_command_writes_scores_results_and_plots(
    byte_model_folder: Path, byte_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codecs = tuple(name for name in QUICK.codecs if name != "rd")  # rd has to be calibrated, kvtc is given
    plan = dataclasses.replace(QUICK, tasks={"text": _TEXT}, codecs=codecs)
    monkeypatch.setattr("benchmarks.quality.__main__.QUICK", plan)
    out = tmp_path / "out"
    arguments = ["run", "--quick", "--models", str(byte_model_folder), "--out", str(out)]
    arguments += ["--artifact", f"kvtc={byte_artifact.folder}"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "rotation" in result.stdout
    written = json.loads((out / "results.json").read_text())
    name = byte_model_folder.name
    assert written["settings"]["artifacts"][str(byte_model_folder)] == {
        "kvtc": byte_artifact.parameters.artifact_id.hex()
    }
    assert written["environment"]["date"]
    kl = {(r["group"], r["codec"], r["setting"]): r["metrics"]["kl"] for r in written["rows"]}
    assert kl["all", "none", "exact"] == {"mean": 0, "low": 0, "high": 0}
    assert kl["prose", "kvtc", "8x nominal"]["mean"] > kl["prose", "kvtc", "2.5x nominal"]["mean"] > 0
    assert {path.name for path in out.glob("*.png")} == {
        f"{name}-text-{metric}.png" for metric in ("kl", "top1", "perplexity")
    }
    before = (out / "results.json").read_text()
    assert CliRunner().invoke(app, ["report", "--out", str(out)]).exit_code == 0
    assert (out / "results.json").read_text() == before
    with pytest.raises(EvaluationError, match="another folder"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.mark.model
def test_the_demos_model_finds_needles_and_continues_examples() -> None:
    tasks = {
        "needle": NeedleTask(lengths=(384,), per_length=1),
        "choice": ChoiceTask(context_tokens=256, per_kind=1, probes=3, kinds=("category",)),
        "text": TextTask(per_domain=1, context_tokens=256, scored_tokens=16, domains=("dialogue",)),
    }
    plan = RunPlan(tasks=tasks, codecs=("none", "int4", "int2", "rotation"))
    scores = _run(BUILTIN_SMOLLM2, RunRequest(plan=plan))
    exact = [s for s in scores if s.setting == "exact"]
    assert [(s.task, s.correct) for s in exact if s.task != "text"] == [("needle", 1), ("choice", 3)]
    assert all((s.kl, s.correct) == (0, s.reference_correct) for s in exact)
    text = {(s.codec, s.setting): s for s in scores if s.task == "text"}
    assert text["rotation", "4 bits"].kl < text["rotation", "2 bits"].kl
    assert text["int4", "groups of 32"].kl < text["int2", "groups of 32"].kl
    assert text["int4", "groups of 32"].raw_bytes == 128 * 30 * 3 * 64 * 4
