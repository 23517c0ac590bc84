"""A question about a long document, answered over a compressed KV cache: the same tokens, sooner.

`make demo` runs this. The model is SmolLM2-135M-Instruct; the document is a chapter of Python's own
reference, which every Python carries (`help("SEQUENCES")` prints it).
"""

import argparse
import sys
from pydoc_data.topics import topics
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

import vericache_compile
from vericache_compile.terminal import AnswerStream, format_bytes, format_rate, phase, print_table

DOCUMENT = topics["typesseq"][:20_000]
QUESTION = "What is the difference between a list, a tuple and a range?"


def main() -> int:
    args = read_arguments()
    options = {"compressor": "snapkv", "keep": 0.25}
    if args.compressor is not None or args.keep is not None:
        options = {"compressor": args.compressor or "snapkv", "keep": args.keep}

    path = vericache_compile.demo_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    chat = [{"role": "user", "content": f"{DOCUMENT}\n\n{QUESTION}"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)

    # The one line that matters. What follows is a plain generate.
    model.compile(backend="vericache", options=options)

    print(f"a document of {inputs.input_ids.shape[1]:,} tokens, and the question: {QUESTION}\n")
    with AnswerStream(tokenizer) as stream:
        model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False, streamer=stream)
    numbers = vericache_compile.stats(model)

    print()
    with phase("comparing with plain generate, and with the compressed cache alone"):
        report = vericache_compile.check(model, inputs, max_new_tokens=args.max_new_tokens, **options)
    print_table("what happened", rows(numbers, report))
    return 0 if report.identical else 1


def rows(numbers: dict[str, Any], report: vericache_compile.CheckReport) -> dict[str, str]:
    lossy = "never" if report.lossy_divergence is None else f"token {report.lossy_divergence}"
    return {
        "tokens identical to plain generate": "yes" if report.identical else f"no: {report}",
        "the compressed cache alone diverges at": lossy,
        "tokens per round": f"{report.tokens_per_round:.1f}",
        "decoding, plain generate": format_rate(report.plain_seconds_per_token),
        "decoding, vericache": format_rate(report.seconds_per_token),
        "KV bytes, draft": format_bytes(numbers["bytes"]["draft"]),
        "KV bytes, full": format_bytes(numbers["bytes"]["full"]),
        "compiling": f"{numbers['seconds']['compile']:.1f} s",
    }


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--compressor", help="a method that `vericache compressors` lists (default: snapkv)")
    parser.add_argument("--keep", type=float, help="fraction of the tokens that the draft keeps (default 0.25)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
