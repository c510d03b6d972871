"""One `System` in a process of its own: requests come in as JSON lines, answers go out as JSON lines.

    process.py ── {"prompts": [...], "steps": 28, "seed": 3, "count": true} ──► worker.py '{"system": "cache-dit", ...}'
               ◄─ {"seconds": 0.41, "cached_steps": [10, 12], "pictures": ..., ...} ──

A process each, because cache-dit patches the pipeline's class. Not to be run by hand; runs in any environment that has
cachedit_fx's requirements (and, for `cache-dit`, cache-dit).
"""

from __future__ import annotations

import json
import os
import platform
import sys
import traceback
from typing import TextIO


def main() -> None:
    # Answers get the real standard output to themselves: whatever libraries print goes to standard error.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        from cachedit_fx.bench.process import pack
        from cachedit_fx.bench.systems import LIBRARIES, Setup, System
        from cachedit_fx.report.files import versions

        system = System(Setup(**json.loads(sys.argv[1])))
        _answer(answers, {"versions": {"python": platform.python_version()} | versions(*LIBRARIES, "cache_dit")})
        for line in sys.stdin:
            _answer(answers, pack(system.draw(**json.loads(line))))
    except Exception as error:  # every cause is the driver's to report
        _answer(answers, {"error": repr(error), "traceback": traceback.format_exc()})


def _answer(answers: TextIO, message: dict[str, object]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
