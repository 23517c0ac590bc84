"""What a legal program is, after each pass; raises AssertionError naming the pass and the node."""

from __future__ import annotations

from vericache_compile.ops import ATTEND, LAYER, OUTSIDE, PREFETCH, WAIT
from vericache_compile.passes.expand_window import find_expanded, find_gemms
from vericache_compile.passes.program import Program, returned
from vericache_compile.plan import Act, SegmentedProgram


def check(program: Program, after: str) -> None:
    """Lint every graph and check the invariants that hold after the pass `after`."""
    for name, module in {"captured": program.captured, "unpadded": program.unpadded, **program.variants}.items():
        if module is not None:
            module.graph.lint()
            assert returned(module), f"after {after}: {name} returns nothing"
    _check_sites(program, after)
    if after == "find_rotation":
        found = len(program.rotations)
        assert found == len(program.sites), f"{found} rotations for {len(program.sites)} sites"
    if after == "expand_window":
        _check_gemms(program)
    if after in ("insert_transfers", "hoist_prefetch"):
        _check_transfers(program, after)
    if after == "partition":
        _check_segments(program)
    if after == "lower":
        for segmented in program.segmented.values():
            _check_slots(segmented)


def _check_sites(program: Program, after: str) -> None:
    for mode, module in program.variants.items():
        layers = [node.args[LAYER] for node in module.graph.nodes if node.target is ATTEND]
        assert layers == list(range(len(program.sites))), f"after {after}: {mode} attends at layers {layers}"


def _check_gemms(program: Program) -> None:
    """Verify has draft's GEMMs and those of rows besides logits; none reads a weight expanded over the window."""
    draft, verify = (find_gemms(program.variants[mode]) for mode in ("draft", "verify"))
    same = len(draft) == len(verify) or (len(draft) < len(verify) and len(program.rows) > 1)
    assert same, f"{len(draft)} GEMMs in draft, {len(verify)} in verify"
    for node in find_expanded(program.variants["verify"]):
        raise AssertionError(f"{node.name} reads an operand that is expanded")


def _check_transfers(program: Program, after: str) -> None:
    """Verify attends to what it has waited for, with a ticket of the same site; tickets are asked for in order."""
    verify = program.variants["verify"].graph
    for site in verify.nodes:
        if site.target is ATTEND:
            for held in site.args[3:5]:
                assert held.target is WAIT, (
                    f"after {after}: {site.name} attends to {held.name}, which is not waited for"
                )
                ticket = held.args[1]
                same = ticket.target is PREFETCH and ticket.args[1] == held.args[2] == site.args[LAYER]
                assert same, f"after {after}: {held.name} waits for another site than {site.name}"
    for mode, variant in program.variants.items():
        asked = [node.args[1] for node in variant.graph.nodes if node.target is PREFETCH]
        assert asked == list(range(len(asked))), f"after {after}: {mode} asks for sites {asked}"


def _check_segments(program: Program) -> None:
    for mode, segments in program.segments.items():
        expected = len(program.sites) + 1
        assert len(segments) == expected, f"{mode} has {len(segments)} segments, expected {expected}"
        for i, segment in enumerate(segments):
            segment.module.graph.lint()
            strays = [node.name for node in segment.module.graph.nodes if node.target in OUTSIDE]
            assert not strays, f"segment {i} of {mode} holds {strays}"


def _check_slots(program: SegmentedProgram) -> None:
    """Every slot is filled before it is read, and not read after it is dead."""
    filled = {program.tokens, program.positions, *(slot for slot, *_ in program.weights)}
    asked: set[int] = set()
    for i, step in enumerate(program.steps):
        if step.act is Act.PREFETCH:
            asked.add(step.layer)
        assert step.act is not Act.WAIT or step.layer in asked, f"step {i} waits for site {step.layer}, not asked for"
        missing = set(step.inputs) - filled
        assert not missing, f"step {i} of {program.mode} reads slots {sorted(missing)}, which hold nothing"
        filled = (filled | set(step.outputs)) - set(step.dead)
    missing = set(program.outputs) - filled
    assert not missing, f"{program.mode} returns slots {sorted(missing)}, which hold nothing"
