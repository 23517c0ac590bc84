"""What a long prompt costs in memory beyond the KV that is held."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
    import json, resource, sys, torch
    from transformers import AutoModelForCausalLM, LlamaConfig
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=12, head_dim=64,
                         num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=8192)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    if sys.argv[1] == "vericache":
        model.compile(backend="vericache", options={"inductor": False, "compressor": "streaming", "keep": 0.1})
    ids = torch.randint(1, 97, (1, 4000))
    model.generate(ids[:, :300], max_new_tokens=20, do_sample=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model.generate(ids, max_new_tokens=8, do_sample=False)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    full = 12 * 2 * 16 * 64 * 4 * 4000
    print(json.dumps({"peak": peak, "full": full}))
"""


def peak(side: str) -> dict[str, int]:
    """Peak resident bytes that a 4,000-token prompt and eight tokens add, and the bytes of its KV (393 MB)."""
    program = [sys.executable, "-c", textwrap.dedent(PROGRAM), side]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_peak_is_full_kv_plus_draft_plus_a_layer_or_two() -> None:
    """Plain decoding copies the cache layer by layer as it grows; ours holds it once, and a tenth for the draft."""
    plain, ours = peak("plain"), peak("vericache")
    layer = ours["full"] / 12
    assert ours["peak"] <= plain["peak"] + 0.1 * ours["full"] + 3 * layer, (plain, ours)
