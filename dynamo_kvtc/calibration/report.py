"""What an artifact promises, for people (report.md, report.png) and for programs (report.json)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dynamo_kvtc.calibration.artifact import Artifact
from dynamo_kvtc.calibration.statistics import SIDES
from dynamo_kvtc.codec.plan import BitPlan, QuantType
from dynamo_kvtc.codec.rd_plan import RdPlan, SymbolClass

__all__ = ["summarise", "write_report"]

#: Shares of the variance for which the report names the number of components that hold them.
_SHARES = (0.5, 0.9, 0.95, 0.99)


def summarise(artifact: Artifact) -> dict[str, Any]:
    """Return the artifact's key figures as JSON-ready values.

    Returns
    -------
    dict[str, Any]
        ``id``, ``profile``, ``tool_version``, ``model``, ``calibration`` as in ``artifact.json``;
        ``groups``: per layer group and side the stored rank, the share of variance it explains and the number
        of components that hold 50, 90, 95 and 99 % of the variance (None if more than are stored);
        ``ratios``: per ratio the bits per token, components per type (kvtc) or class of symbols (rd), the
        expected relative squared error per layer and on average, and ``measured``: what streams of rd
        reached, None with kvtc.
    """
    manifest = artifact.manifest
    return {
        "id": manifest.id,
        "profile": manifest.profile,
        "tool_version": manifest.tool_version,
        "model": manifest.model.model_dump(mode="json"),
        "calibration": manifest.calibration.model_dump(mode="json"),
        "groups": list(_groups(artifact)),
        "ratios": list(_ratios(artifact)),
    }


def write_report(artifact: Artifact) -> None:
    """Write report.json, report.md and, where matplotlib is installed, report.png beside an artifact."""
    summary = summarise(artifact)
    folder = artifact.folder
    (folder / "report.json").write_text(json.dumps(summary, indent=1) + "\n")
    plotted = _plot(artifact, summary, folder / "report.png")
    (folder / "report.md").write_text(_markdown(summary, plotted))


def _sides(artifact: Artifact, group: int) -> Iterator[tuple[str, Any]]:
    parameters = artifact.parameters.groups[group]
    return zip(SIDES, (parameters.keys, parameters.values), strict=True)


def _groups(artifact: Artifact) -> Iterator[dict[str, Any]]:
    for index, group in enumerate(artifact.manifest.groups):
        for side, manifest in zip(SIDES, (group.keys, group.values), strict=True):
            explained = artifact.variances[index, side].double().cumsum(0) / manifest.total_variance
            yield {
                "first_layer": group.first_layer,
                "num_layers": group.num_layers,
                "side": side,
                "rank": manifest.rank,
                "explained_variance": manifest.explained_variance,
                "components_for": {f"{share:g}": _components_for(explained, share) for share in _SHARES},
            }


def _components_for(explained: torch.Tensor, share: float) -> int | None:
    count = int((explained < share).sum()) + 1
    return count if count <= explained.numel() else None


def _ratios(artifact: Artifact) -> Iterator[dict[str, Any]]:
    parameters = artifact.parameters
    measured = {entry.plan_id: entry.measured for entry in artifact.manifest.ratios}
    for expected in artifact.manifest.expected_error:
        plan_id = expected.plan_id
        plans = [
            {"first_layer": group.layers.first, "side": side, **_plan(side_parameters.plans[plan_id])}
            for index, group in enumerate(parameters.groups)
            for side, side_parameters in _sides(artifact, index)
        ]
        found = measured[plan_id]
        if found is None:
            bits_per_token = sum(plan["bits_per_token"] for plan in plans)
        else:
            bits_per_token = 8 * parameters.geometry.token_bytes_16bit / found.ratio
        yield {
            "plan_id": plan_id,
            "ratio": parameters.ratios[plan_id],
            "bits_per_token": bits_per_token,
            "measured": None if found is None else found.model_dump(mode="json"),
            "key_error": sum(expected.keys) / len(expected.keys),
            "value_error": sum(expected.values) / len(expected.values),
            "key_error_per_layer": expected.keys,
            "value_error_per_layer": expected.values,
            "plans": plans,
        }


def _plan(plan: BitPlan | RdPlan) -> dict[str, Any]:
    if isinstance(plan, RdPlan):
        components = {kind.name.lower(): plan.counts[kind] for kind in SymbolClass}
        return {"step": plan.step, "rank": plan.rank, "components": components}
    components = {
        type_.name.lower(): sum(group.size for group in plan.groups if group.type is type_)
        for type_ in QuantType
        if type_ is not QuantType.NONE
    }
    return {
        "bits_per_token": plan.bits_per_token,
        "rank": plan.rank,
        "groups": len(plan.groups),
        "components": components,
    }


# --- Markdown ------------------------------------------------------------------------------------


def _markdown(summary: dict[str, Any], plotted: bool) -> str:
    model, calibration = summary["model"], summary["calibration"]
    layers = range(model["num_layers"])
    is_rd = summary["profile"] == "rd"
    parts = [
        "# Calibration report",
        f"Artifact `{summary['id']}`, profile {summary['profile']}, made by dynamo-kvtc "
        f"{summary['tool_version']}.",
        f"Model: {model['architecture']}, {model['num_layers']} layers, {model['num_kv_heads']} KV heads of "
        f"{model['head_size']}, {model['dtype']} cache. Calibrated on {calibration['rows']:,} tokens of "
        f"{calibration['documents']} documents, without the first {calibration['sink_tokens']} and the last "
        f"{calibration['recent_window']} tokens of each; errors were measured on "
        f"{calibration['sample_rows']:,} of these tokens.",
    ]
    if plotted:
        parts.append("![Explained variance and expected error](report.png)")
    parts += [
        "## Explained variance",
        "Components stored, the share of the variance they hold, and how many components hold a given share."
        + (" Variances are those of coefficients weighted by what the model notices." * is_rd),
        _table(
            ["layers", "side", "stored", "explained", *(f"for {share:.0%}" for share in _SHARES)],
            [
                [
                    _layers(group),
                    group["side"],
                    f"{group['rank']:,}",
                    f"{group['explained_variance']:.1%}",
                    *(f"{n:,}" if n else "more" for n in group["components_for"].values()),
                ]
                for group in summary["groups"]
            ],
        ),
        *(_rd_plans(summary) if is_rd else _bit_plans(summary)),
        "## Expected error",
        "Squared error of decoded keys (before RoPE) and values over their variance.",
        _table(
            ["layer", *(f"{side} at {r['ratio']:g}" for r in summary["ratios"] for side in SIDES)],
            [_error_row(summary, str(layer), lambda errors, layer=layer: errors[layer]) for layer in layers]
            + [_error_row(summary, "mean", lambda errors: sum(errors) / len(errors))],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _bit_plans(summary: dict[str, Any]) -> list[str]:
    return [
        "## Bit plans",
        "Bits per token count side data; they do not count what entropy coding saves.",
        _plan_table(
            summary,
            ["bits/token", "rank", "groups"],
            lambda plan: [f"{plan[key]:,}" for key in ("bits_per_token", "rank", "groups")],
        ),
    ]


def _rd_plans(summary: dict[str, Any]) -> list[str]:
    calibration = summary["calibration"]
    return [
        "## Measured",
        "By real streams, all bytes counted, of documents that took no part in the fit, and by the model's "
        "next-token predictions over the decoded cache against those over the original one. Validation "
        f"documents: {calibration['validation_documents']}; scored tokens of each: "
        f"{calibration['scored_tokens']}.",
        _table(
            ["ratio", "measured ratio", "bits/token", "KL (nats)", "top-1 agreement"],
            [
                [
                    f"{ratio['ratio']:g}",
                    f"{ratio['measured']['ratio']:.2f}x",
                    f"{ratio['bits_per_token']:,.0f}",
                    f"{ratio['measured']['kl']:.4f}",
                    f"{ratio['measured']['top1']:.1%}",
                ]
                for ratio in summary["ratios"]
            ],
        ),
        "## Plans",
        "Width of the quantisation intervals, and how many components each class of symbols holds.",
        _plan_table(summary, ["step", "rank"], lambda plan: [f"{plan['step']:.4g}", f"{plan['rank']:,}"]),
    ]


def _plan_table(
    summary: dict[str, Any], columns: Sequence[str], describe: Callable[[dict[str, Any]], Sequence[str]]
) -> str:
    kinds = summary["ratios"][0]["plans"][0]["components"]
    return _table(
        ["ratio", "from layer", "side", *columns, *kinds],
        [
            [
                f"{ratio['ratio']:g}",
                plan["first_layer"],
                plan["side"],
                *describe(plan),
                *(f"{count:,}" for count in plan["components"].values()),
            ]
            for ratio in summary["ratios"]
            for plan in ratio["plans"]
        ],
    )


def _error_row(summary: dict[str, Any], label: str, pick: Any) -> list[str]:
    return [
        label,
        *(
            f"{pick(ratio[name]):.4f}"
            for ratio in summary["ratios"]
            for name in ("key_error_per_layer", "value_error_per_layer")
        ),
    ]


def _layers(group: dict[str, Any]) -> str:
    return f"{group['first_layer']} to {group['first_layer'] + group['num_layers'] - 1}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


# --- plot ----------------------------------------------------------------------------------------


def _plot(artifact: Artifact, summary: dict[str, Any], path: Path) -> bool:
    """Draw the explained variance and the expected errors; False where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for group, description in zip(artifact.variances, summary["groups"], strict=True):
        manifest = artifact.manifest.groups[group[0]]
        total = (manifest.keys if group[1] == "keys" else manifest.values).total_variance
        explained = artifact.variances[group].double().cumsum(0) / total
        style = "-" if group[1] == "keys" else "--"
        left.plot(explained.tolist(), style, label=f"{group[1]}, layers {_layers(description)}")
    left.set(xlabel="components", ylabel="explained variance", ylim=(0, 1), title="Explained variance")
    left.legend(fontsize="small")
    for number, ratio in enumerate(summary["ratios"]):
        for name, style in (("key", "-"), ("value", "--")):
            label = f"{name}s at {ratio['ratio']:g}x"
            right.plot(ratio[f"{name}_error_per_layer"], style, color=f"C{number}", label=label)
    right.set(xlabel="layer", ylabel="relative squared error", title="Expected error", yscale="log")
    right.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=120)
    return True
