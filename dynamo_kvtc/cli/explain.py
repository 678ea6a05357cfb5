"""``dynamo-kvtc explain``: what the policy would do with a prefix, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from dynamo_kvtc.cli.output import (
    JsonFlag,
    format_bytes,
    format_seconds,
    make_table,
    print_json,
    print_line,
    print_table,
)
from dynamo_kvtc.cli.worker import UrlOption, fetch_status
from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.policy import (
    RAW,
    Candidate,
    CostPolicy,
    CostSettings,
    Estimate,
    OffloadPolicy,
    Piece,
    Speeds,
    StoreDecision,
    StorePolicy,
    estimate_onboard,
)

__all__ = ["command"]


@dataclass(frozen=True)
class _Candidate:
    """One way to have a prefix back."""

    name: str
    tier: str
    nbytes: int
    estimate: Estimate | None
    action: str


def command(
    tokens: Annotated[int, typer.Option(help="Tokens of the sequence.", min=1)],
    url: UrlOption = "",
    prefill: Annotated[
        float | None, typer.Option(help="Prefill speed in tokens/s, in place of the worker's.", min=1e-9)
    ] = None,
    decode: Annotated[
        float | None, typer.Option(help="Decode speed in tokens/s, in place of the worker's.", min=1e-9)
    ] = None,
    read: Annotated[
        list[str] | None, typer.Option(help="Bytes/s of a tier, such as disk1=2e9, in place of the worker's.")
    ] = None,
    token_bytes: Annotated[
        list[str] | None, typer.Option(help="Stored bytes per token by encoder, such as raw=131072.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Show what the policy does with a prefix of so many tokens, and why: costs of each candidate."""
    status = fetch_status(url) if url else {}
    values: dict[str, Any] = {name: dict(status.get("speeds", {}).get(name) or {}) for name in _MAPPINGS}
    values |= {name: status.get("speeds", {}).get(name) for name in ("prefill", "decode", "overhead_s")}
    values["decode_by"] = status.get("speeds", {}).get("decode_by") if decode is None else {}
    values["found"] = status.get("speeds", {}).get("found")
    values |= {name: given for name, given in (("prefill", prefill), ("decode", decode)) if given is not None}
    values["read"] |= _pairs(read, "--read")
    values["token_bytes"] |= _pairs(token_bytes, "--token-bytes")
    speeds, policy, settings = Speeds.from_dict(values), *_policies(status)
    blocks = policy.tier_blocks_to_offload(tokens)
    found = [
        _candidate(encoder, tier, blocks, policy, CostPolicy(speeds, settings))
        for encoder in values["token_bytes"]
        for tier in values["read"]
    ]
    unknown = [name for name in ("prefill", "decode") if values[name] is None]
    unknown += [name for name in ("read", "token_bytes") if not values[name]]
    candidates = _candidates(status, values, {pair.rpartition("=")[0] for pair in token_bytes or []})
    tiers = list(status.get("tiers") or values["read"])
    storing = StorePolicy(speeds, settings)
    storing.current = status.get("policy", {}).get("stores_with")
    stored = (
        storing.decide(blocks * policy.tier_block_tokens, candidates, tiers) if blocks and tiers else None
    )
    if json:
        plain = _plain(tokens, blocks, policy, found, unknown)
        print_json(plain | {"store": None if stored is None else _plain_store(stored, candidates)})
        return
    print_line(_sentence(tokens, blocks, policy, unknown))
    rows = [_row(one) for one in found]
    if found and found[0].estimate is not None:
        rows.append(("recompute", "-", "-", "-", "-", format_seconds(found[0].estimate.recompute_s), ""))
    columns = ("candidate", "tier", "bytes", "transfer", "decode", "in all", "decision")
    if rows:
        print_table(make_table(f"{blocks * policy.tier_block_tokens:,} tokens", columns, rows))
    if stored is not None:
        _print_store(stored, candidates)


_MAPPINGS = ("read", "encode", "token_bytes")


def _pairs(given: list[str] | None, option: str) -> dict[str, float]:
    pairs = {}
    for text in given or []:
        name, _, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not name or not 0 < value < float("inf"):
            raise typer.BadParameter(f"{text!r} is not NAME=NUMBER", param_hint=option)
        pairs[name] = value
    return pairs


def _policies(status: dict[str, Any]) -> tuple[OffloadPolicy, CostSettings]:
    known = status.get("policy", {})
    try:
        return tuple(  # type: ignore[return-value]
            kind(**{name: known[name] for name in kind.__dataclass_fields__ if name in known})
            for kind in (OffloadPolicy, CostSettings)
        )
    except TypeError as error:
        raise ConfigError(f"the worker tells a policy that this release does not know: {error}") from error


def _candidates(status: dict[str, Any], values: dict[str, Any], given: set[str]) -> list[Candidate]:
    """Return what a sequence may be stored with: what the worker tells, or what was given, raw last."""
    told = status.get("policy", {}).get("candidates")
    if told is not None:
        return [
            Candidate(
                one["encoder"],
                values["token_bytes"][one["encoder"]] if one["encoder"] in given else one["token_bytes"],
                tuple(one["tiers"]),
                one["action"],
            )
            for one in told
        ]
    plans = sorted(values["token_bytes"].items(), key=lambda pair: (pair[0] == RAW, -pair[1]))
    tiers = tuple(values["read"])
    return [
        Candidate(name, nbytes, tiers, "raw" if name == RAW else "coarser" if index else "compress")
        for index, (name, nbytes) in enumerate(plans)
    ]


def _print_store(decision: StoreDecision, candidates: list[Candidate]) -> None:
    chosen = decision.candidate
    rows = []
    for index, one in enumerate(candidates):
        cost = decision.costs[index] if decision.costs else None
        times = ("-", "-") if cost is None else (cost.onboard_s, cost.expected_s)
        shown = (time if isinstance(time, str) else format_seconds(time) for time in times)
        is_chosen = chosen is not None and chosen.encoder == one.encoder
        tiers = ", ".join(one.tiers)
        size = f"{format_bytes(one.token_bytes)}/token"
        rows.append((one.encoder, size, tiers, *shown, decision.action if is_chosen else ""))
    columns = ("stored with", "bytes", "in", "fastest tier", "expected", "decision")
    print_table(make_table("What it would be stored with", columns, rows))
    if chosen is None:
        print_line("It is not stored: no tier gives it back faster than it is recomputed, or nothing may be.")


def _plain_store(decision: StoreDecision, candidates: list[Candidate]) -> dict[str, Any]:
    costs = decision.costs or (None,) * len(candidates)
    return {
        "action": decision.action,
        "encoder": None if decision.candidate is None else decision.candidate.encoder,
        "candidates": [
            {
                "encoder": one.encoder,
                "token_bytes": one.token_bytes,
                "tiers": list(one.tiers),
                **({} if cost is None else {"onboard_s": cost.onboard_s, "expected_s": cost.expected_s}),
            }
            for one, cost in zip(candidates, costs, strict=True)
        ],
    }


def _candidate(encoder: str, tier: str, blocks: int, policy: OffloadPolicy, costs: CostPolicy) -> _Candidate:
    nbytes = round((costs.speeds.token_bytes(encoder) or 0) * policy.tier_block_tokens)
    pieces = [Piece(policy.tier_block_tokens, nbytes, tier, encoder)] * blocks
    estimates = estimate_onboard(pieces, costs.speeds)
    decision = costs.prefix(pieces)
    action = decision.action if blocks else "skip"
    return _Candidate(encoder, tier, nbytes * blocks, estimates[-1] if estimates else None, action)


def _row(one: _Candidate) -> tuple[str, ...]:
    if one.estimate is None:
        return one.name, one.tier, format_bytes(one.nbytes), "-", "-", "-", one.action
    parts = (one.estimate.transfer_s, one.estimate.decode_s, one.estimate.onboard_s)
    return one.name, one.tier, format_bytes(one.nbytes), *map(format_seconds, parts), one.action


def _sentence(tokens: int, blocks: int, policy: OffloadPolicy, unknown: list[str]) -> str:
    if not blocks:
        why = (
            f"it is shorter than minimum_tokens ({policy.minimum_tokens})"
            if tokens < policy.minimum_tokens
            else f"the recent window ({policy.recent_window}) leaves no whole tier block"
        )
        return f"{tokens:,} tokens are skipped: {why}."
    stored = blocks * policy.tier_block_tokens
    text = (
        f"Of {tokens:,} tokens {stored:,} are stored, in {blocks} tier blocks; "
        f"{tokens - stored:,} are left to the engine."
    )
    if unknown:
        text += f" Not known yet: {', '.join(unknown)}; so nothing is decided by cost."
    return text


def _plain(
    tokens: int, blocks: int, policy: OffloadPolicy, found: list[_Candidate], unknown: list[str]
) -> dict[str, Any]:
    return {
        "tokens": tokens,
        "tier_blocks": blocks,
        "stored_tokens": blocks * policy.tier_block_tokens,
        "unknown": unknown,
        "candidates": [
            {
                "encoder": one.name,
                "tier": one.tier,
                "bytes": one.nbytes,
                "action": one.action,
                **(
                    {}
                    if one.estimate is None
                    else {
                        "transfer_s": one.estimate.transfer_s,
                        "decode_s": one.estimate.decode_s,
                        "overhead_s": one.estimate.overhead_s,
                        "onboard_s": one.estimate.onboard_s,
                        "recompute_s": one.estimate.recompute_s,
                    }
                ),
            }
            for one in found
        ],
    }
