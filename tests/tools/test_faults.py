"""The list of faults fits the checkout. `tests/faults/run.py` shows that the tests named there see them."""

import re
from collections import Counter
from pathlib import Path

import pytest
from faults.run import ROOT, read_faults

FAULTS = read_faults()
FEWEST = 40


def test_there_are_enough_and_no_two_alike():
    assert len(FAULTS) >= FEWEST
    for names in ([fault.name for fault in FAULTS], [(fault.file, fault.before) for fault in FAULTS]):
        assert [name for name, count in Counter(names).items() if count > 1] == []


def test_every_room_has_a_fault():
    packages = [folder for folder in ROOT.glob("cachedit_fx/**/") if any(folder.glob("*.py"))]
    with_code = [
        folder
        for folder in (*packages, ROOT / "kernels", ROOT / "passes")
        if any(file.name != "__init__.py" and file.stat().st_size for file in folder.glob("*.py"))
    ]
    rooms = {folder.relative_to(ROOT).as_posix() for folder in with_code}
    assert len(rooms) > 10
    assert sorted(rooms - {Path(fault.file).parent.as_posix() for fault in FAULTS}) == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_breaks_one_line_and_names_its_tests(fault):
    source = (ROOT / fault.file).read_text()
    assert source.count(fault.before) == 1
    assert "\n" not in fault.before + fault.after and fault.before != fault.after
    if fault.file.endswith(".py"):
        compile(source.replace(fault.before, fault.after), fault.file, "exec")
    assert fault.seen_by
    for test in fault.seen_by:
        file, _, function = test.partition("::")
        assert re.search(rf"^def {re.escape(function.partition('[')[0])}\(", (ROOT / file).read_text(), re.MULTILINE)
