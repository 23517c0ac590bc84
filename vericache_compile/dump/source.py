"""A program as readable Python: a header of what is known, then each graph as a class with shapes and source lines."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch.fx import GraphModule

from vericache_compile.dump.describe import describe_roles, describe_segments, describe_sites, graphs_of
from vericache_compile.passes.program import Program, SegmentGraph

PARAMETER = re.compile(r'(\*{0,2}\w+(?:: "[^"]*")?)(?:, |$)')


def program_source(name: str, count: int, program: Program) -> str:
    """All graphs of a program after the pass `name`, which returned `count`."""
    parts = ["\n".join(_header(name, count, program))]
    parts += [module_source(graph, module) for graph, module in graphs_of(program).items()]
    parts += [module_source(f"segment_{key[:12]}", each.module) for key, each in _distinct(program).items()]
    return "\n\n\n".join(parts) + "\n"


def module_source(name: str, module: GraphModule) -> str:
    """One graph as a class of that name, one parameter to a line."""
    text: str = module.print_readable(print_output=False)
    text = re.sub(r"^class .*?\(", f"class {name}(", text, count=1, flags=re.MULTILINE)
    return "\n".join(_one_parameter_a_line(line) for line in text.rstrip().split("\n"))


def _one_parameter_a_line(line: str) -> str:
    """Spread the signature, which holds one parameter per weight, so that a diff shows the one that changed."""
    opening, end = "    def forward(", "):"
    if not line.startswith(opening) or not line.endswith(end):
        return line
    parameters = PARAMETER.findall(line[len(opening) : -len(end)])
    return "\n".join([opening, *(f"        {parameter}," for parameter in parameters), f"    {end}"])


def _header(name: str, count: int, program: Program) -> Iterator[str]:
    yield f"# {name}: {count}"
    yield f"# batch {program.batch}, window {program.window}"
    for role, value in describe_roles(program).items():
        yield f"# {role}: {value}"
    for site in describe_sites(program):
        yield (
            f"# site {site['layer']}: {site['heads']} heads, {site['kv_heads']} KV heads, size {site['head_size']}, "
            f"{site['dtype']}, mask: {site['mask']}"
        )
    for mode in program.segments:
        for segment in describe_segments(program, mode):
            same = ", ".join(map(str, segment["shared_with"]))
            shared = f", the same program as {same}" if same else ""
            yield f"# {mode} segment {segment['segment']}: {segment['key']}, {segment['nodes']} nodes{shared}"
    for mode, segmented in program.segmented.items():
        yield f"# {mode}: {len(segmented.steps)} steps over {segmented.slots} slots, {segmented.distinct} programs"


def _distinct(program: Program) -> dict[str, SegmentGraph]:
    """One segment for each key, over all variants."""
    return {segment.key: segment for segments in program.segments.values() for segment in reversed(segments)}
