"""Is a basis in fp8 (e4m3) as harmless as one in bfloat16? Bytes and quality of the same text with each.

The CPU codec encodes and decodes with its bases rounded as a device would hold them: with rd after the metric
has been multiplied in, the copy of each direction for itself. Products stay in float32, and artifacts should
be for float32 as well: KV in bfloat16 adds noise of its own.

python benchmarks/fp8_basis.py --artifacts artifact-rd-float32 artifact-kvtc-float32 --json result.json
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dynamo_kvtc.calibration.artifact import Artifact, load_artifact
from dynamo_kvtc.calibration.models import BUILTIN_SMOLLM2, LoadedModel, load_model
from dynamo_kvtc.cli.output import make_table, print_json, print_note, print_table
from dynamo_kvtc.codec.open import open_codec
from dynamo_kvtc.codec.parameters import AnyParameters, RdSideParameters, SideParameters
from dynamo_kvtc.data import HELDOUT_TEXTS
from dynamo_kvtc.evaluation import CodecUnderTest, EvaluationProtocol, evaluate_codecs
from dynamo_kvtc.evaluation.bootstrap import Interval, ratio_interval
from dynamo_kvtc.evaluation.environment import describe_environment
from dynamo_kvtc.evaluation.report import EvaluationRow
from dynamo_kvtc.evaluation.run import read_documents

#: Weights of one direction, float32 ``[components, row]``, to what is left of them on a device.
Rounding = Callable[[torch.Tensor], torch.Tensor]

#: Row elements that share a scale in the finer of the two e4m3 formats.
BLOCK_ELEMENTS = 128


def keep(weights: torch.Tensor) -> torch.Tensor:
    return weights


def to_bfloat16(weights: torch.Tensor) -> torch.Tensor:
    return weights.bfloat16().float()


def to_e4m3(weights: torch.Tensor) -> torch.Tensor:
    """Round to e4m3 (no component is all zeros), each component's largest weight to the largest number."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = weights.abs().amax(-1, keepdim=True) / largest
    # The quotient may be a rounding error above the largest number, and some casts make NaN of that.
    return (weights / scale).clamp(-largest, largest).to(torch.float8_e4m3fn).float() * scale


def to_e4m3_blocks(weights: torch.Tensor) -> torch.Tensor:
    """The same with a scale for each `BLOCK_ELEMENTS` elements of a component, the last block shorter."""
    return torch.cat([to_e4m3(block) for block in torch.split(weights, BLOCK_ELEMENTS, dim=-1)], dim=-1)


#: Roundings of the forward and of the inverse basis. Everything is compared with the first.
VARIANTS: Mapping[str, tuple[Rounding, Rounding]] = {
    "float32": (keep, keep),
    "bfloat16": (to_bfloat16, to_bfloat16),
    "e4m3, scale a component": (to_e4m3, to_e4m3),
    f"e4m3, scale a block of {BLOCK_ELEMENTS}": (to_e4m3_blocks, to_e4m3_blocks),
    "e4m3 forward, bfloat16 inverse": (to_e4m3, to_bfloat16),
    "bfloat16 forward, e4m3 inverse": (to_bfloat16, to_e4m3),
}
BASELINE = "float32"


def rounded(parameters: AnyParameters, roundings: tuple[Rounding, Rounding]) -> AnyParameters:
    """Return the same parameters, the weights that they give for each direction rounded."""
    forward, inverse = roundings

    def side(one: SideParameters | RdSideParameters) -> SideParameters | RdSideParameters:
        copy = replace(one)
        # The copy's methods are shadowed; sides are frozen.
        object.__setattr__(copy, "analysis", lambda components: forward(one.analysis(components)))
        object.__setattr__(copy, "synthesis", lambda components: inverse(one.synthesis(components)))
        return copy

    groups = tuple(replace(g, keys=side(g.keys), values=side(g.values)) for g in parameters.groups)
    return replace(parameters, groups=groups)


@dataclass(frozen=True)
class Measured:
    """One plan with one rounding.

    Figures are named and defined as in `EvaluationRow`; errors are root mean squares over documents. Those in
    ``_over`` are divided by the same of unrounded bases, and a ``_change`` is the difference from it, with
    intervals over documents in pairs. ``documents`` has single documents' figures.
    """

    profile: str
    nominal_ratio: float
    bases: str
    ratio: float
    kl: float
    top1: float
    key_error: float
    value_error: float
    bytes_over: Interval
    kl_over: Interval
    top1_change: Interval
    key_error_over: float
    value_error_over: float
    documents: dict[str, list[float]]


def compare(
    loaded: LoadedModel,
    artifacts: Sequence[Artifact],
    documents: Sequence[Sequence[int]],
    protocol: EvaluationProtocol,
    note: Callable[[str], None] = lambda _: None,
) -> list[Measured]:
    """Measure every plan of every artifact with every rounding, all on the same documents."""
    plans: dict[tuple[str, float, str], CodecUnderTest] = {}
    for artifact in artifacts:
        profile = artifact.manifest.profile
        for ratio in sorted(artifact.parameters.ratios.values()):
            for name, roundings in VARIANTS.items():
                if profile == "kvtc" and roundings[0] is not roundings[1]:
                    continue  # one copy serves both directions
                parameters = rounded(artifact.parameters, roundings)
                codec = open_codec(parameters, ratio=ratio, compute_dtype="float32")
                plans[profile, ratio, name] = CodecUnderTest(profile, ratio, codec)
    rows: dict[tuple[str, float, str], list[EvaluationRow]] = {key: [] for key in plans}
    for number, document in enumerate(documents):
        # One document a call: its own figures are what is compared in pairs.
        _, found = evaluate_codecs(loaded, list(plans.values()), [document], protocol)
        for key, row in zip(plans, found, strict=True):
            rows[key].append(row)
        note(f"{number + 1} of {len(documents)} documents")
    return [measured(key, rows[key], rows[key[0], key[1], BASELINE]) for key in plans]


def measured(
    key: tuple[str, float, str], rows: Sequence[EvaluationRow], baseline: Sequence[EvaluationRow]
) -> Measured:
    """Return the figures of one plan and rounding from its documents and from those of the baseline."""
    # Documents are equally long, so bytes are in proportion to the inverse of the ratio.
    sizes, own_sizes = ([1 / row.ratio for row in each] for each in (rows, baseline))
    kl, own_kl = ([row.kl for row in each] for each in (rows, baseline))
    changes = [row.top1 - own.top1 for row, own in zip(rows, baseline, strict=True)]

    def error(each: Sequence[EvaluationRow], side: str) -> float:
        return math.sqrt(sum(getattr(row, side) ** 2 for row in each) / len(each))

    key_error, value_error = (error(rows, side) for side in ("key_error", "value_error"))
    return Measured(
        *key,
        ratio=len(sizes) / sum(sizes),
        kl=sum(kl) / len(kl),
        top1=sum(row.top1 for row in rows) / len(rows),
        key_error=key_error,
        value_error=value_error,
        bytes_over=ratio_interval(sizes, own_sizes),
        kl_over=ratio_interval(kl, own_kl),
        top1_change=ratio_interval(changes, [1.0] * len(changes)),
        key_error_over=key_error / error(baseline, "key_error"),
        value_error_over=value_error / error(baseline, "value_error"),
        documents={name: [getattr(row, name) for row in rows] for name in ("ratio", "kl", "top1")},
    )


def percentages(found: Interval, unchanged: float, digits: str) -> str:
    mean, low, high = (f"{100 * (one - unchanged):+{digits}}" for one in (found.mean, found.low, found.high))
    return f"{mean} % ({low} to {high})"


LEGEND = """Changes are against float32 on the same documents, with 95 % intervals over them; keys and values
are rms errors against the original KV. The JSON beside this has protocol, artifacts and environment."""
COLUMNS = ("plan and bases", "ratio", "bytes", "keys", "values", "KL", "KL change", "top-1", "top-1 change")


def table_rows(found: Sequence[Measured]) -> list[tuple[str, ...]]:
    """Return the cells of the table: changes are relative to unrounded bases, with 95 % intervals."""
    return [
        (
            f"{one.profile} {one.nominal_ratio:g}x, {one.bases}",
            f"{one.ratio:.2f}",
            f"{100 * (one.bytes_over.mean - 1):+.2f} %",
            f"{100 * (one.key_error_over - 1):+.2f} %",
            f"{100 * (one.value_error_over - 1):+.2f} %",
            f"{one.kl:.5f}",
            percentages(one.kl_over, 1, ".1f"),
            f"{100 * one.top1:.2f} %",
            percentages(one.top1_change, 0, ".2f"),
        )
        for one in found
    ]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--artifacts", type=Path, nargs="+", required=True, help="one for each profile")
    parser.add_argument("--model", default=BUILTIN_SMOLLM2)
    parser.add_argument("--documents", type=int, default=8, help="held-out documents of 1,280 tokens")
    parser.add_argument("--threads", type=int, help="torch's threads; its own choice by default")
    parser.add_argument("--json", metavar="OUT", help="write the result as JSON; - is standard output")
    parser.add_argument("--markdown", type=Path, metavar="OUT", help="write the table as Markdown")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    artifacts = [load_artifact(folder) for folder in arguments.artifacts]
    loaded = load_model(arguments.model, artifacts[0].parameters.geometry.dtype)
    for artifact in artifacts:
        artifact.check_model(loaded.geometry, loaded.rope, loaded.fingerprint.weights_hash)
    protocol = EvaluationProtocol(documents=arguments.documents)
    documents = read_documents(loaded, HELDOUT_TEXTS, protocol)
    found = compare(loaded, artifacts, documents, protocol, print_note)
    result: dict[str, Any] = {
        "benchmark": "Bases in fp8",
        "rows": [asdict(one) for one in found],
        "details": {
            "protocol": asdict(protocol),
            "dtype": loaded.geometry.dtype,
            "artifacts": {a.manifest.profile: a.parameters.artifact_id.hex() for a in artifacts},
            "layer_groups": {a.manifest.profile: len(a.parameters.groups) for a in artifacts},
        },
        "environment": describe_environment(),
    }
    rows = table_rows(found)
    if arguments.markdown:
        lines = [COLUMNS, ("---", *["---:"] * (len(COLUMNS) - 1)), *rows]
        arguments.markdown.write_text(
            f"{LEGEND}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
        )
    if arguments.json == "-":
        print_json(result)
        return
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    print_table(make_table("Bases in fp8, changes against float32", COLUMNS, rows))


if __name__ == "__main__":
    main()
