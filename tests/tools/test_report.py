"""cachedit_fx.report: tables for a terminal and as Markdown, files that are whole; and PSNR."""

import math

import pytest
import torch
from rich.console import Console

from cachedit_fx.metrics.image import mean_psnr, psnr
from cachedit_fx.report.files import check_folder, versions, whole_files
from cachedit_fx.report.tables import Heading, Table, page, terminal, titled_list


@pytest.fixture
def table():
    made = Table(("name", "text", "a\nfigure"), texts=(0, 1))
    made.add("a|b", "[red]x[/red]", "1")
    made.add("best", "✓", "22", stands_out=True)
    return made


def printed(table, width=60):
    console = Console(width=width, record=True, force_terminal=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal(table))
    return console.export_text(clear=False), console.export_text(styles=True)


def test_a_page_has_its_parts_in_order(table):
    text = page(Heading("Title"), "One.\nTwo.", "", table, [], ["a", "b"], *titled_list("None", []), Heading("Next", 2))
    assert text == (
        "# Title\n\nOne.\nTwo.\n\n"
        "| name | text | a figure |\n| --- | --- | ---: |\n| a/b | [red]x[/red] | 1 |\n| **best** | ✓ | 22 |\n\n"
        "- a\n- b\n\n## Next\n"
    )


def test_a_table_in_a_terminal_says_every_cell_as_it_is(table):
    text, styled = printed(table)
    assert all(cell in text for cell in ("a|b", "[red]x[/red]", "✓", "22"))
    assert "\x1b[1m" in styled and "\x1b[1;32m✓" in styled


def test_figures_are_never_wrapped_and_texts_fold():
    made = Table(("name", "figure"))
    made.add("a name of many words, far more than fit", "123456.789")
    text, _ = printed(made, width=30)
    assert "123456.789" in text and "…" not in text and len(text.splitlines()) > 3


@pytest.mark.parametrize("before", [None, {}, {"table.md": "old", "other.txt": "kept"}])
def test_files_are_whole_or_not_there(tmp_path, before):
    folder = tmp_path / "deep" / "out"
    for name, text in (before or {}).items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    if before == {}:
        folder.mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt), whole_files(folder) as staging:
        (staging / "table.md").write_text("half")
        raise KeyboardInterrupt
    left = {path.name: path.read_text() for path in folder.iterdir()} if folder.exists() else None
    assert left == before
    with whole_files(folder) as staging:
        (staging / "table.md").write_text("new")
    left = {path.name: path.read_text() for path in folder.iterdir()}
    assert left == {**(before or {}), "table.md": "new"}


def test_an_obstacle_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    assert check_folder(tmp_path / "new" / "folder") is None
    assert check_folder(tmp_path / "file" / "deeper") == f"{tmp_path / 'file'} is a file; give a folder"


def test_versions_are_those_that_are_installed():
    assert list(versions("torch", "no-such-distribution")) == ["torch"]


def test_psnr_is_per_picture_and_infinite_for_equal_ones():
    pictures = torch.zeros(2, 3, 4, 4)
    other = pictures.clone()
    other[1] += 0.1
    assert psnr(other, pictures) == [math.inf, pytest.approx(20.0, abs=1e-3)]


def test_means_leave_identical_pictures_out():
    assert mean_psnr([40.0, math.inf, 44.0]) == 42.0
    assert mean_psnr([math.inf, math.inf]) == math.inf
