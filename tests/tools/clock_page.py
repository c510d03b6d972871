"""Makes docs/clock.md: what is known of a call from what, and for which of diffusers' pipelines."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
from collections import defaultdict
from pathlib import Path

HEAD = """\
# The clock

<!-- Made by `python -m tools.pages` from diffusers' sources. Edit tests/tools/clock_page.py. -->

A policy needs to know at which step of which generation a call is, and to which CFG branch it belongs. Nobody has to
say so. The best evidence decides:

{evidence}
The pipeline is found on the call stack, so pipelines that share a transformer, and threads, do not meet. Nothing is
patched, and with a scheduler that tells its index **no timestep is read from a device**. A static mask or a preset then
never waits for the device (a calibrator reads the schedule once in a generation). A threshold waits once a call, for
the difference. In the first step, unnamed calls of guidance are compared by their timesteps, which is read for them.

- A call by a pipeline after its last step, as for side effects, is computed and counted as uncached.
- A call before the loop, at another timestep, begins no step: the generation begins after it.
- A scheduler that stands still while calls go on (a pipeline that denoises with a copy) is not believed: the timesteps
  decide, from the fifth call on.
- A scheduler may show a new generation at every step: its `timesteps` are a property that makes a tensor, or its
  `step_index` counts down. It is not believed from the fifth step on, and a warning says so once. The generation that
  is under way begins anew there; later ones are whole.
- A `step_index` that is no integer, such as a method, is no index.
- A batch that halves, as when guidance ends midway, is computed once, and the generation goes on.

Without a pipeline (a loop of your own), the fifth and sixth line decide.
[The tracker](../cachedit_fx/runtime/tracker.py) lists what these cannot tell apart. Calling
`cachedit_fx.refresh_context(model)` before a generation is always right.

## Pipelines

"""

EVIDENCE = [
    ("", "generation begins", "step", "branch", "number of steps"),
    ("---",) * 5,
    (
        "1. settings",
        "after `num_inference_steps` steps",
        "`enable_separate_cfg`",
        "`enable_separate_cfg`",
        "`num_inference_steps`",
    ),
    (
        "2. scheduler of the calling pipeline",
        "another `timesteps` tensor, or an index that goes back",
        "`step_index`, or the place of `pipe._current_timestep` in `timesteps`",
        "name, and number of the call within the step",
        "`len(timesteps)`, less `begin_index`",
    ),
    ("3. diffusers' hooks", "reset by the pipeline at its end", "", '`cache_context("cond")`', ""),
    ("4. the user", "`refresh_context`", "", "", ""),
    ("5. the timestep", "turns back", "changes", "repeats", ""),
    ("6. the shape", "changes, and there is no timestep", "", "", ""),
]
"""What is known from what."""

SOURCES = ("`step_index`", "`_current_timestep`", "the timestep", "the timestep alone")
"""What tells the steps of a pipeline, best first. The last has no scheduler."""


def page() -> str:
    """The page, as Markdown."""
    root = Path(str(importlib.util.find_spec("diffusers").submodule_search_locations[0]))  # type: ignore[union-attr,index]
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    count = 0
    for path in sorted((root / "pipelines").rglob("pipeline_*.py")):
        text = path.read_text()
        if "deprecated" in path.parts or "in enumerate(timesteps" not in text or "self.transformer" not in text:
            continue
        for name, scheduler in _pipelines(text):
            groups[_step_source(root, text, scheduler), _branch_source(text)].append(name)
            count += 1
    version = importlib.metadata.version("diffusers")
    lines = [
        f"The {count} pipelines of diffusers {version} that loop over a transformer, by default schedulers. Most reset",
        "diffusers' hooks at their end too (`maybe_free_model_hooks`), if their transformer has `cache_context`.",
        "",
        "| step from | branch from | pipelines |",
        "| --- | --- | --- |",
    ]
    for (step, branch), names in sorted(groups.items(), key=lambda group: (SOURCES.index(group[0][0]), group[0][1])):
        short = ", ".join(name.removesuffix("Pipeline") for name in names)
        lines.append(f"| {step} | {branch} | {len(names)}: {short} |")
    evidence = "".join(f"| {' | '.join(row)} |\n" for row in EVIDENCE)
    return HEAD.format(evidence=evidence) + "\n".join(lines) + "\n"


def _pipelines(text: str) -> list[tuple[str, str]]:
    """(class, name of its scheduler's class) of each pipeline in a module."""
    pipelines = []
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and node.name.endswith("Pipeline"):
            arguments = [
                argument
                for method in node.body
                if isinstance(method, ast.FunctionDef) and method.name == "__init__"
                for argument in method.args.args
                if argument.arg == "scheduler"
            ]
            annotation = ast.unparse(arguments[0].annotation) if arguments and arguments[0].annotation else ""
            pipelines.append((node.name, annotation))
    return pipelines


def _step_source(root: Path, text: str, scheduler: str) -> str:
    names = re.findall(r"\w+Scheduler", scheduler)
    if not names and "self.scheduler" not in text:
        return "the timestep alone"
    sources = [
        source
        for path in sorted((root / "schedulers").glob("scheduling_*.py"))
        for source in [path.read_text()]
        if any(f"class {name}(" in source for name in names)
    ]
    if sources and all("def step_index" in source for source in sources):
        return "`step_index`"
    if not sources:  # any of Karras' schedulers
        return "`step_index`"
    return "`_current_timestep`" if "self._current_timestep = t" in text else "the timestep"


def _branch_source(text: str) -> str:
    if "cache_context(" in text:
        return "names"
    calls = len(re.findall(r"= self\.transformer(?:_2)?\(|= current_model\(", text))
    return "order of calls" if calls > 1 else "one call a step"
