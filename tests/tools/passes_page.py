"""Makes passes/README.md from the passes of the pipeline: their contracts and docstrings, and what was measured."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

from tools.docstrings import class_docstring

from cachedit_fx.config.options import Options
from cachedit_fx.pass_pipeline import pass_manager, pipeline
from cachedit_fx.passes.base import NOTHING_KNOWN, Analysis, Pass, Rewrite

PASSES = Path(__file__).resolve().parents[2] / "passes"

MEASURED = {
    "normalize": ("0.03", "right differences for blocks that write in place; else 0 or NaN"),
    "fuse_rotary": (
        "SECONDS",
        "a query's norm and rotary embedding move 0.62 of the bytes, two kernels in place of three",
    ),
    "find_timestep": ("0.002", "nobody announces steps and generations"),
    "infer_dependence": ("0.25", "`explain` shows how much of the weights serves the timestep alone"),
    "detect_block_loops": ("0.39", "no adapter for a model"),
    "infer_batch_axis": ("0.6", "no plan per model for a doubled batch"),
    "insert_cfg_parallel": ("0.9", "two halves of the ranks take a branch of guidance each"),
    "infer_sequence_axes": ("0.6", "no plan per model for context parallelism"),
    "insert_ulysses": ("1.1", "8 ranks: an eighth of the linear layers' work each, 674 MiB sent a step"),
    "replace_attention": ("0.28", "another kernel for all 57 calls of attention, and no processor set"),
    "send_float8": ("0.3", "exchanges of attention send 0.64 of the bytes, with keys 0.52"),
    "overlap_collectives": ("SECONDS", "a step waits 0.31 as long for collectives of 20 ms each"),
    "plan_regions": ("0.06", "no rule per model for the results of its blocks"),
    "outline_blocks": ("0.48", "compiling takes 15 s; 132 s by plain `torch.compile`"),
    "hoist_invariants": ("0.4", "a step reads 27 % fewer weights, once their results are kept"),
    "insert_cache_branch": ("0.05", "a cached step takes 4 % of an eager one, F = 1"),
    "insert_low_precision": ("0.12", "a step in int8 takes 0.33 of one in float32, width 1024"),
    "insert_attention_forms": ("0.12", "steps change their attention, and compile nothing"),
    "gather_inputs": ("0.05", "Python of a cached step: 3.2 ms; 4.2 ms without the pass"),
}
"""Pass -> seconds that it takes, and its gain: both on a FLUX of 57 blocks."""

HEAD = """\
# The passes

<!-- Made by `python -m tools.pages` from contracts and docstrings. Edit these, or tests/tools/passes_page.py. -->

A pass is an *analysis*, which learns one fact about the graph, or a *rewrite*, which changes the graph. A fact is a
frozen dataclass, known by its type. After a rewrite that matched, the [manager](manager.py) drops every fact that the
rewrite does not keep, and repeats the analyses on demand. Each pass has a test of the same name in
[tests/passes](../tests/passes).

`passes={"name": False}` switches a pass off by its name in the table. `plan_regions` and `insert_cache_branch` are off
with `cache=None`, `insert_low_precision` without the option `precision`, `replace_attention` without `attention`, and
`fuse_rotary` if the inner backend is "eager". `insert_attention_forms` is on if `attention` chooses steps. A pass that
lacks a fact is skipped.
"""

TABLE = """\
## In order

**needs**: facts without which the pass is skipped; in brackets: facts that it reads if they are known. **gives**: facts
that are true after it. **keeps**: facts that stay true.

| pass | default | kind | needs | gives | keeps | seconds | gain |
| --- | --- | --- | --- | --- | --- | ---: | --- |
"""

COST = """
**seconds** and **gain** are for a FLUX of 57 blocks on one thread of a 2-core x86_64 CPU. Seconds are the least of
three runs, once per graph; capturing that graph takes dynamo 11 s. [Performance](../docs/performance.md) has the other
figures.
"""

SHARED = """\
## What they share

| file | |
| --- | --- |
"""


def page() -> str:
    """The page, as Markdown."""
    passes = pipeline(Options(), NOTHING_KNOWN)
    own = {file_of(item) for item in passes}
    shared = [path for path in sorted(PASSES.glob("*.py")) if path not in own]
    table = TABLE + "".join(f"| {' | '.join(cells(item))} |\n" for item in passes) + COST
    sections = [section(item) for item in passes]
    return "\n".join([HEAD, table, *sections, SHARED + "".join(map(shared_row, shared))])


def cells(item: Pass) -> tuple[str, ...]:
    """The pass's row of the table."""
    default = "on" if pass_manager(Options()).enabled[item.name] else "off"
    used = f"({names(item.uses)})" if item.uses else ""
    needs = " ".join(filter(None, (names(item.requires), used)))
    if isinstance(item, Analysis):
        contract = "analysis", needs, names((item.provides,)), "all"
    else:
        assert isinstance(item, Rewrite)
        contract = "rewrite", needs, names(item.provides), names(item.preserves)
    if item.name not in MEASURED:
        raise SystemExit(f"enter {item.name!r} in MEASURED of tests/tools/passes_page.py: its seconds, and its gain")
    return (f"[`{item.name}`](#{item.name})", default, *contract, *MEASURED[item.name])


def names(kinds: tuple[type, ...]) -> str:
    return ", ".join(f"`{kind.__name__}`" for kind in kinds)


def section(item: Pass) -> str:
    """The first line of the class's docstring, then the sketch before → after of its module."""
    file = file_of(item)
    summary = class_docstring(type(item)).splitlines()[0]
    parts = [f"### {item.name}", f"[{file.name}]({file.name}): {summary}", sketch(module_docstring(file))]
    return "\n\n".join(filter(None, parts)) + "\n"


def sketch(docstring: str) -> str:
    """The first indented block, as a block of code; empty if there is none."""
    match = re.search(r"^    \S.*(?:\n(?:    .*)?)*", docstring, flags=re.MULTILINE)
    return "\n".join(["```", inspect.cleandoc("\n" + match[0]), "```"]) if match else ""


def shared_row(path: Path) -> str:
    summary = " ".join(module_docstring(path).split("\n\n")[0].split())
    return f"| [{path.name}]({path.name}) | {summary} |\n"


def file_of(item: Pass) -> Path:
    return PASSES / Path(inspect.getfile(type(item))).name


def module_docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())) or ""
