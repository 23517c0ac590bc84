"""What `vericache plan` does: where full KV should live for a model, a context and a device, with the arithmetic."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from vericache_compile.cli_commands import first_line, model_path, options_of
from vericache_compile.errors import OptionError, VericacheError
from vericache_compile.terminal import format_bytes, phase, print_columns

if TYPE_CHECKING:
    import torch

    from vericache_compile.config import Config
    from vericache_compile.plan import Site
    from vericache_compile.runtime.planner import Choice, Load, Machine


def plan(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Exit code 1 where no way to decode fits."""
    from vericache_compile.config import make_config
    from vericache_compile.runtime.planner import choices, choose

    options = make_config(options_of(args))
    load, machine = find_load(args, options), find_machine(args)
    made = choices(load, machine, options.staging_bytes)
    best = choose(made)
    if not args.json:
        _show(load, machine, made, best)
    found = {
        "load": asdict(load),
        "machine": asdict(machine),
        "choices": [asdict(each) for each in made],
        "choice": None if best is None else best.name,
    }
    return found, 0 if best is not None else 1


def find_machine(args: argparse.Namespace) -> Machine:
    """The device in reach; what is given stands in for it, for machines that are not there."""
    import torch

    from vericache_compile.machine import bandwidths
    from vericache_compile.runtime.planner import Machine

    device = _device(args)
    given = (args.memory_bandwidth, args.link_bandwidth)
    memory, link = given
    if None in given:
        with phase("measuring bandwidths, or reading what was measured"), _reaching(args):
            measured = bandwidths(device)
        memory, link = memory or measured.memory_gbps, link or measured.link_gbps
    if args.device_memory is not None:
        return Machine(args.device_memory * 1e9, memory, link)
    if device.type != "cuda":
        fix = "give --device-memory in GB"
        raise OptionError("no memory size to plan for", "a CPU, whose memory is the host's as well", fix)
    with _reaching(args):
        return Machine(torch.cuda.mem_get_info(device)[1], memory, link)


def _device(args: argparse.Namespace) -> torch.device:
    import torch

    with _reaching(args):
        return torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))


@contextmanager
def _reaching(args: argparse.Namespace) -> Iterator[None]:
    """Whatever torch says of a device that is not there, in three parts."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        fix = "`vericache doctor` lists the devices; for another give its memory and both bandwidths"
        raise OptionError(f"no such device: {first_line(error)}", f"--device {args.device}", fix) from error


def find_load(args: argparse.Namespace, options: Config) -> Load:
    """Bytes from the model's configuration alone; no weights are read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from vericache_compile.estimate import measure
    from vericache_compile.load import count_weights, make_load

    device, path = _device(args), model_path(args)
    try:
        config = AutoConfig.from_pretrained(path)
        dtype = getattr(torch, args.dtype) if args.dtype != "auto" else (config.dtype or torch.bfloat16)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (OSError, ValueError) as error:
        fix = "name `demo`, a folder with the config.json of a causal language model, or one of the hub"
        found = f"the model's configuration cannot be read: {first_line(error)}"
        raise VericacheError(found, f"--model {args.model}", fix) from error
    weights = count_weights(list(model.parameters()))
    measured = measure(options.make_compressor(), _sites(model, dtype))
    return make_load(options, measured, weights, device, args.context, args.batch, args.tokens_per_round)


def _sites(model: Any, dtype: Any) -> list[Site]:
    """One site per layer, as the configuration describes it; checked against no capture."""
    from vericache_compile.plan import Site

    config = model.config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    site = Site(0, heads, kv_heads, size, size, size**-0.5, dtype, None)
    if (rank := getattr(config, "kv_lora_rank", None)) and (rotated := getattr(config, "qk_rope_head_dim", None)):
        size = config.qk_nope_head_dim + rotated
        site = Site(0, heads, 1, rank + rotated, rank, size**-0.5, dtype, None, latent=True)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    windows = [getattr(config, "sliding_window", None) if kind == "sliding_attention" else None for kind in kinds]
    return [replace(site, layer=layer, window=window) for layer, window in enumerate(windows)]


def _show(load: Load, machine: Machine, made: list[Choice], best: Choice | None) -> None:
    rows = [
        (
            "*" if each is best else "",
            each.name,
            str(each.batch),
            format_bytes(each.device_bytes) + ("" if each.fits else " (does not fit)"),
            f"{each.tokens_per_second:.1f}",
        )
        for each in made
    ]
    title = (
        f"{load.context:,} tokens of context, batch {load.batch}; {format_bytes(machine.device_bytes)} at "
        f"{machine.memory_gbps:g} GB/s, link {machine.link_gbps:g} GB/s"
    )
    print_columns(title, ("", "how", "batch", "device memory", "tokens/s, predicted"), rows)
    for each in made:
        print(f"\n{each.name}" + (f", batch {each.batch}" if each.batch != load.batch else ""))
        for line in each.arithmetic:
            print(f"  {line}")
    if best is None:
        print("\nnothing fits: more device memory, a smaller batch or a shorter context is needed")
