"""examples/ulysses.py: how it is started, and what it prints on two ranks."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
import ulysses
from ulysses import Drawing

SCRIPT = Path(ulysses.__file__)


def test_without_torchrun_it_says_how_to_start_it(capsys):
    with pytest.raises(typer.Exit) as end:
        ulysses.main()
    assert end.value.exit_code == 2 and "torchrun --nproc_per_node=2 examples/ulysses.py" in capsys.readouterr().out


def test_ranks_that_differ_show():
    """The table and the notes tell of a rank that drew something else."""
    gray = torch.full((1, 3, 4, 4), 0.5)
    one, other = Drawing(gray, 0.2, 0.1, [3, 5], 2048), Drawing(gray + 0.1, 0.3, 0.2, [3], 1024)
    drawings = {("no cache", 1): [one], ("no cache", 2): [other, one]}
    _, ranks, wall, cpu, differs, decibels, cached, stored = (
        list(column.cells) for column in ulysses.table(drawings, 10).columns
    )
    assert ranks == ["1", "2"] and wall == ["20.0", "30.0"] and cpu == ["10.0", "20.0, 10.0"]
    assert differs == ["", "0.1"] and decibels == ["", "20.0"]
    assert cached == ["2", "1, 2"] and stored == ["2", "1, 2"]
    assert ulysses.notes(drawings) == "Cached steps: 3; other ones on every rank. The ranks' pictures are different."
    assert "the same on every rank. The ranks' pictures are equal" in ulysses.notes({("no cache", 2): [one, one]})


def test_figures_of_many_ranks_fit_the_table():
    assert ulysses.by_rank(["94.7", "88.4", "104.1"]) == "88.4 to 104.1"
    assert ulysses.by_rank(["0", "0", "0"]) == ulysses.by_rank(["0", "0"]) == "0, 0"
    assert ulysses.by_rank(["7"]) == "7"


@pytest.mark.full("parallel")
@pytest.mark.budget(150, "two processes import everything, and capture the bundled model twice")
def test_two_ranks_draw_what_one_draws():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT)]
    done = subprocess.run([*command, "--steps", "10", "--pictures", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Cached steps") == 1 and "same on every" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r"\s+2 ", line)]
    assert len(rows) == 2
    assert all(float(row[-6]) < 1e-4 for row in rows), done.stdout
