"""The demo's report as two tables for a person."""

from __future__ import annotations

from rich.table import Table

from dynamo_kvtc.cli.output import format_bytes, format_rate, format_seconds, make_table
from dynamo_kvtc.demo.measure import DemoReport
from dynamo_kvtc.evaluation import EvaluationRow
from dynamo_kvtc.evaluation.report import ratio_at_kl

__all__ = ["quality_table", "serving_table"]


def serving_table(report: DemoReport) -> Table:
    """Return what the tiers did in the profile that they ran with."""
    title = f"{report.model}, served with profile {report.profile} at {report.nominal_ratio:g}x"
    table = make_table(title, ("what", "value", "detail"))
    serving = report.serving
    for tier in serving.tiers:
        table.add_row(
            f"bytes in tier {tier.tier}",
            format_bytes(tier.stored_bytes),
            f"raw {format_bytes(tier.raw_bytes)}, {tier.tokens} tokens in {tier.tier_blocks} objects",
        )
    table.add_section()
    table.add_row(
        "ratio", f"{serving.ratio_without_sinks:.1f}x", "coded tokens; headers and side data counted"
    )
    table.add_row("ratio with sinks", f"{serving.ratio_with_sinks:.1f}x", "everything that is stored")
    table.add_row(
        "ratio with sinks and window",
        f"{serving.ratio_with_sinks_and_window:.1f}x",
        "the conversation's recent tokens counted at 16 bits",
    )
    table.add_section()
    for times in serving.time_to_first_token:
        table.add_row(
            f"time to first token, {times.tokens} tokens",
            f"{times.recompute_s / times.onboard_disk_s:.1f}x faster",
            f"recompute {format_seconds(times.recompute_s)}, onboard from host "
            f"{format_seconds(times.onboard_host_s)}, from disk {format_seconds(times.onboard_disk_s)} "
            f"({times.onboarded_tokens} tokens onboarded, the rest computed)",
        )
    table.add_section()
    for onboard in serving.onboards:
        limit = onboard.disk_bytes_per_s
        table.add_row(
            "overlap" if limit is None else f"overlap, disk throttled to {format_rate(limit)}",
            f"{onboard.overlap:.2f}x",
            f"{onboard.tokens} tokens: transfer {format_seconds(onboard.transfer_s)} + decode "
            f"{format_seconds(onboard.open_s + onboard.project_s)} in {format_seconds(onboard.wall_s)}; "
            f"layer 0 usable after {format_seconds(onboard.first_layer_s)}",
        )
    table.add_section()
    talk = serving.conversation
    table.add_row(
        "next-token KL", f"{talk.kl:.4f}", f"turn 2 over onboarded KV, {talk.scored_tokens} tokens scored"
    )
    table.add_row("top-1 agreement", f"{100 * talk.top1:.1f} %", "with the uncompressed cache")
    table.add_row(
        "greedy continuation",
        "the same" if talk.same_continuation else "differs",
        f"{talk.same_leading_tokens} of {talk.generated_tokens} leading tokens are the same",
    )
    return table


def quality_table(report: DemoReport) -> Table:
    """Return ratio and quality of the profiles on the same held-out text, side by side."""
    first = next(iter(report.quality.values()))
    protocol = first.protocol
    table = make_table(
        f"{report.model}: held-out text, {protocol.documents} documents of {protocol.context_tokens} tokens",
        ("profile", "plan", "ratio", "bytes a token", "next-token KL", "top-1", "rd at this KL"),
    )
    for profile, quality in report.quality.items():
        table.add_section()
        for row in quality.rows:
            table.add_row(
                profile,
                f"{row.nominal_ratio:g}x",
                f"{row.ratio:.1f}x",
                f"{report.token_bytes / row.ratio:,.0f}",
                f"{row.kl:.4f} ({row.kl_low:.4f} to {row.kl_high:.4f})",
                f"{row.top1:.1%}",
                _rd_at_this_kl(report, row) if profile != "rd" else "",
            )
    return table


def _rd_at_this_kl(report: DemoReport, row: EvaluationRow) -> str:
    ratio = ratio_at_kl(report.quality["rd"].rows, row.kl)
    return "not measured" if ratio is None else f"{ratio:.1f}x, {ratio / row.ratio:.1f} times fewer bytes"
