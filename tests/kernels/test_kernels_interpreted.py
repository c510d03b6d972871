"""Starts interpreted.py and interpreted_attention.py: Triton looks at TRITON_INTERPRET when it is imported, so its
interpreter takes a process."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from lib.marks import only_in

HERE = Path(__file__).parent
DEFAULT = [("interpreted.py", "bfloat16"), ("interpreted_attention.py", "bfloat16")]
MORE = [("interpreted.py", "float16 float32"), ("interpreted_attention.py", "bfloat16 float16 float32")]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="without Triton")
@pytest.mark.parametrize(("name", "dtypes"), only_in("kernels", DEFAULT + MORE, but=DEFAULT))
def test_kernels_in_the_interpreter(name, dtypes, tmp_path):
    report = tmp_path / "report.xml"
    options = ("-q", "-p", "no:cacheprovider", f"--junitxml={report}")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", str(HERE / name), *options],
        cwd=HERE.parent,
        env=os.environ | {"TRITON_INTERPRET": "1", "INTERPRETED_DTYPES": dtypes},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (suite,) = ElementTree.parse(report).getroot()
    assert int(suite.get("tests", 0)) > int(suite.get("skipped", 0))
