"""``dynamo-kvtc plan``: tiers, memory and volumes for a model, and the values file for the Helm chart."""

from __future__ import annotations

from typing import Annotated, Any, get_args

import typer
import yaml

from dynamo_kvtc.cli.output import (
    JsonFlag,
    format_bytes,
    make_table,
    print_json,
    print_line,
    print_note,
    print_table,
)
from dynamo_kvtc.cli.parsing import parse_bytes
from dynamo_kvtc.planning import Plan, PlanRequest, chart_values, plan, read_model
from dynamo_kvtc.planning.sizing import Connector, Mode

__all__ = ["command"]

_PLACES = {"gpu": "GPU (G1)", "pool": "engine's raw pool", "host": "host tier (G2)", "disk": "disk tier (G3)"}


def command(
    model: Annotated[str, typer.Option(help="Name of a known model, or its config.json.")],
    gpus: Annotated[int, typer.Option(help="GPUs in all.", min=1)],
    ratio: Annotated[float, typer.Option(help="Ratio of real streams, as `evaluate` prints it.", min=1)],
    profile: Annotated[str, typer.Option(help="codec.profile: rd, kvtc or raw.")] = "rd",
    connector: Annotated[
        str, typer.Option(help="kvtc, offloading or kvbm: how the tier is reached.")
    ] = "kvtc",
    mode: Annotated[
        str, typer.Option(help="aggregated, or disaggregated: prefill and decode apart.")
    ] = "aggregated",
    gpus_per_worker: Annotated[
        int | None, typer.Option(help="Tensor parallel size; by default what the weights need.", min=1)
    ] = None,
    gpu_memory: Annotated[str, typer.Option(help="Memory of one GPU.")] = "80GiB",
    gpu_share: Annotated[float, typer.Option(help="vLLM's --gpu-memory-utilization.")] = 0.9,
    memory: Annotated[str, typer.Option(help="Memory that one worker with tiers may have.")] = "128GiB",
    disk: Annotated[str, typer.Option(help="Disk volume of one worker with tiers; 0 for none.")] = "1TiB",
    sequence: Annotated[int, typer.Option(help="Tokens of a typical sequence.", min=1)] = 8192,
    prefill_share: Annotated[float, typer.Option(help="Share of disaggregated workers that prefill.")] = 0.5,
    block_size: Annotated[int, typer.Option(help="Tokens of the engine's blocks.", min=1)] = 16,
    dtype: Annotated[str, typer.Option(help="dtype of the KV cache.")] = "bfloat16",
    values: Annotated[bool, typer.Option("--values", help="Print the values file and nothing else.")] = False,
    json: JsonFlag = False,
) -> None:
    """Size tiers, memory and volumes, tell what they will hold, and print values for the Helm chart."""
    if values and json:
        raise typer.BadParameter("print either", param_hint="--values, --json")
    result = plan(
        PlanRequest(
            model=read_model(model, dtype),
            gpus=gpus,
            ratio=ratio,
            profile=_one_of(profile, ("rd", "kvtc", "raw"), "--profile"),
            connector=_one_of(connector, get_args(Connector), "--connector"),
            mode=_one_of(mode, get_args(Mode), "--mode"),
            gpu_memory=parse_bytes(gpu_memory, "--gpu-memory"),
            gpu_share=gpu_share,
            gpus_per_worker=gpus_per_worker,
            memory=parse_bytes(memory, "--memory"),
            disk=parse_bytes(disk, "--disk"),
            sequence_tokens=sequence,
            prefill_share=prefill_share,
            block_size=block_size,
        )
    )
    text = yaml.safe_dump(chart_values(result), sort_keys=False)
    if json:
        print_json(_to_dict(result))
    elif values:
        print_line(text.rstrip())
    else:
        _print(result)
        print_line("Values for k8s/chart:\n")
        print_line(text.rstrip())
        for note in result.notes:
            print_note(f"note: {note}")


def _one_of(text: str, known: tuple[str, ...], option: str) -> Any:
    if text not in known:
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(known)}", param_hint=option)
    return text


def _to_dict(result: Plan) -> dict[str, Any]:
    request, geometry = result.request, result.request.model.geometry
    raw, compressed = result.fleet_tokens
    return {
        "model": {
            "name": request.model.name,
            "layers": geometry.num_layers,
            "kv_heads": geometry.num_kv_heads,
            "head_size": geometry.head_size,
            "dtype": geometry.dtype,
            "weights": request.model.weights,
        },
        "workers": result.workers,
        "tier_workers": result.tier_workers,
        "gpus_per_worker": result.gpus_per_worker,
        "token_bytes": result.token_bytes,
        "stored_token_bytes": result.stored_token_bytes,
        "tier_block_bytes": result.tier_block_bytes,
        "ratio": request.ratio,
        "effective_ratio": {"sequence_tokens": request.sequence_tokens, "ratio": result.effective_ratio},
        "held_per_worker": {
            place: {"capacity_bytes": held.capacity, "raw_tokens": held.raw, "tokens": held.compressed}
            for place, held in result.held.items()
        },
        "held_in_all_tiers": {"raw_tokens": raw, "tokens": compressed},
        "memory_bytes": result.memory,
        "memory_limit_bytes": result.memory_limit,
        "shared_memory_bytes": result.shared_memory,
        "volume_bytes": result.volume,
        "staging_bytes": result.staging,
        "artifact_bytes_at_most": result.artifact_bytes,
        "notes": list(result.notes),
        "values": chart_values(result),
    }


def _print(result: Plan) -> None:
    request = result.request
    raw, compressed = result.fleet_tokens
    length = request.sequence_tokens
    print_table(
        make_table(
            request.model.name,
            ["per worker", "bytes", "tokens as they are", "tokens held", f"sequences of {length:,}"],
            [
                [
                    _PLACES[place],
                    format_bytes(held.capacity),
                    f"{held.raw:,}",
                    f"{held.compressed:,}",
                    f"{held.compressed // length:,}",
                ]
                for place, held in result.held.items()
            ]
            + [["all workers, once each", "", f"{raw:,}", f"{compressed:,}", f"{compressed // length:,}"]],
        )
    )
    print_line(
        f"{result.workers} workers of {result.gpus_per_worker} GPUs, {result.tier_workers} with tiers.\n"
        f"A token takes {format_bytes(result.token_bytes)}, "
        f"stored {format_bytes(result.stored_token_bytes)}.\n"
        f"A sequence of {length:,} tokens is stored at {result.effective_ratio:.1f}x, its recent window "
        "counted as it is.\n"
    )
    memory = [[what, format_bytes(nbytes)] for what, nbytes in result.memory.items()]
    print_table(
        make_table(
            "memory of a worker's container",
            ["for", "at most"],
            [*memory, ["limit", format_bytes(result.memory_limit)]],
        )
    )
