"""A compression method of one's own: every other token. The output is that of plain generate, whatever it drops.

The tests of `vericache_compile.testing` run on it as on any other: `TestEveryOther` below is a whole test file.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import vericache_compile
from vericache_compile.compressors.scorer import Scorer
from vericache_compile.compressors.table import register
from vericache_compile.testing import compressor_suite


@register
@dataclass(frozen=True)
class EveryOther(Scorer):
    """Keep the fraction `keep` of the tokens: even ones before odd ones, late ones before early ones."""

    name: ClassVar[str] = "every_other"

    def score(self, keys: Tensor, values: Tensor, queries: Tensor | None, covered: int) -> Tensor:
        """Scores [K, C] of the first C = `covered` tokens of keys [K, S, D]: the highest stay."""
        token = torch.arange(covered, device=keys.device)
        return (token - covered * (token % 2)).expand(keys.shape[0], covered)


TestEveryOther = compressor_suite("every_other")

if __name__ == "__main__":
    model = LlamaForCausalLM(LlamaConfig(vocab_size=500, hidden_size=64, num_hidden_layers=3, num_attention_heads=4))
    inputs = {"input_ids": torch.randint(500, (1, 200)), "attention_mask": torch.ones(1, 200, dtype=torch.int64)}
    report = vericache_compile.check(model, inputs, compressor="every_other", keep=0.5, inductor=False)
    print(report)
    raise SystemExit(not report.identical)
