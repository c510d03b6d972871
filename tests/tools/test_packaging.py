"""The wheel and the editable install: built, installed into a fresh environment, and used from another folder.

Nothing is downloaded: the fresh environments see this one's site-packages through a path line in a `.pth` file. Python
does not run the `.pth` files of a folder added that way, so an editable install of this checkout in the outer
environment stays out of the test.
"""

import itertools
import os
import pkgutil
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from lib.marks import only_in

import cachedit_fx

ROOT = Path(__file__).resolve().parents[2]
# Where each package's files lie in the checkout, and in the wheel.
FOLDERS = {"cachedit_fx": "cachedit_fx", "kernels": "cachedit_fx/kernels", "passes": "cachedit_fx/passes"}
DATA = [
    "cachedit_fx/py.typed",
    "cachedit_fx/bench/default.toml",
    "cachedit_fx/kernels/cpu.cpp",
    "cachedit_fx/shapes/MODEL_CARD.md",
    "cachedit_fx/shapes/weights",
]

# Compiles through the entry point alone; the package is imported by torch, when it needs the backend, and not before.
COMPILE_BY_NAME = """
import sys, torch
assert "cachedit" in torch._dynamo.list_backends(), torch._dynamo.list_backends()

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
    def forward(self, hidden_states):
        return hidden_states + torch.tanh(self.linear(hidden_states))

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block() for _ in range(4))
    def forward(self, hidden_states, timestep):
        hidden_states = hidden_states * (1 + timestep.reshape(-1, 1, 1))
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states

model, x, t = Model().eval(), torch.randn(1, 4, 8), torch.tensor([0.5])
assert not any(name.split(".")[0] == "cachedit_fx" for name in sys.modules), "imported before the first compile"
options = {"inner_backend": "eager", "Fn_compute_blocks": 1}
compiled = torch.compile(model, backend="cachedit", fullgraph=True, options=options)
with torch.no_grad():
    assert torch.equal(compiled(x, t), model(x, t))
assert "cachedit_fx" in sys.modules
"""

# Every module of the package, found on disk; prints where the package came from.
IMPORT_ALL = """
import importlib, os, sys
import cachedit_fx
for name in sys.argv[1:]:
    importlib.import_module(name)
from diffusers import FluxPipeline
assert FluxPipeline.__module__.startswith("diffusers.pipelines"), "a placeholder: transformers did not import"
# transformers may look at a top-level `kernels`; it must find nothing in it to execute.
assert not [name for name in sys.modules if name.startswith(("kernels.", "passes."))]
assert not getattr(sys.modules.get("kernels"), "__file__", None)
print(os.path.realpath(cachedit_fx.__file__))
"""

# One module of each folder; prints where the package came from.
IMPORT_SOME = """
import os
import cachedit_fx, cachedit_fx.kernels.layout, cachedit_fx.passes.base
print(os.path.realpath(cachedit_fx.__file__))
"""


def sources() -> dict[str, str]:
    """Every Python file of the package: path in the checkout -> path in the wheel."""
    return {
        path.relative_to(ROOT).as_posix(): f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in FOLDERS.items()
        for path in sorted((ROOT / folder).rglob("*.py"))
    }


def modules() -> list[str]:
    """The dotted name of every source file; a `__main__` is not for import."""
    names = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in sources().values()]
    return [name for name in names if not name.endswith("__main__")]


def run(*command: object, cwd: Path, **env: str) -> str:
    """Run a program as a user would in a plain shell: nothing of this run's Python settings reaches it."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    result = subprocess.run(
        [str(word) for word in command], cwd=cwd, env={**clean, **env}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, f"{command} failed in {cwd}:\n{result.stdout}\n{result.stderr}"
    return result.stdout


def fresh_environment(folder: Path, *what: object) -> Path:
    """Make a virtual environment with `what` (pip's words) and this environment's libraries; return its python."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder).strip())
    (site / "outer.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n{sysconfig.get_paths()['platlib']}\n")
    if what:
        # --ignore-installed: pip sees the outer environment too, whose install of this checkout is not to be touched.
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
        run(*pip, "install", "--quiet", "--no-index", "--no-deps", "--ignore-installed", *what, cwd=folder)
    return python


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the build reads: setuptools leaves a `build` folder behind, whose stale modules it takes again."""
    copy = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ["pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy2(ROOT / name, copy / name)
    for folder in [*FOLDERS, "tests", "examples"]:
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    return copy


@pytest.fixture(scope="module")
def built(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source archive, and the wheel that was built from it (as `python -m build` does)."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, checkout, cwd=out)
    (archive,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return archive, wheel


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds nothing of ours."""
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="module")
def wheel_python(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fresh_environment(tmp_path_factory.mktemp("wheel-env"), built[1])


@pytest.fixture(scope="module")
def editable_python(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # pip is given no index, so the build must use the setuptools that is here.
    return fresh_environment(tmp_path_factory.mktemp("editable-env"), "--no-build-isolation", "--editable", checkout)


def test_flat_folders_hold_no_init():
    """A top-level `kernels` package would be imported in place of PyPI's; a `tests` package shadows others."""
    for folder in ["kernels", "passes", "tests"]:
        assert not (ROOT / folder / "__init__.py").exists()
    assert not (ROOT / "conftest.py").exists()
    for folder in ["kernels", "passes"]:
        assert [path for path in (ROOT / folder).iterdir() if path.is_dir() and path.name != "__pycache__"] == []


def test_constraints_pin_every_dependency_within_its_range():
    packaging_requirements = pytest.importorskip("packaging.requirements")
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *sum(extras.values(), [])]:
        requirement = packaging_requirements.Requirement(text)
        if requirement.name == project["name"]:
            assert requirement.extras <= extras.keys(), text
        elif requirement.name != "triton":  # depends on the build of torch: see constraints.txt
            assert requirement.specifier.contains(pins[requirement.name]), text


def test_wheel_holds_the_package_and_nothing_else(built):
    _, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = (archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    assert {name for name in names if name.endswith(".py")} == set(sources().values())
    assert {name.split("/")[0] for name in names} == {"cachedit_fx", "cachedit_fx-0.1.0.dist-info"}

    data = {path for root in DATA for path in [ROOT / root, *(ROOT / root).glob("*")] if path.is_file()}
    assert {path.relative_to(ROOT).as_posix() for path in data} <= names
    assert any(name.startswith("cachedit_fx/shapes/weights/") and name.endswith(".safetensors") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)

    parsed = ConfigParser()
    parsed.read_string(entry_points)
    assert dict(parsed["torch_dynamo_backends"]) == {"cachedit": "cachedit_fx.backend:cachedit"}
    assert dict(parsed["console_scripts"]) == {"cachedit": "cachedit_fx.cli:app"}


def test_source_archive_holds_every_source(built):
    archive, _ = built
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[-1] for name in tar.getnames()}
    assert set(sources()) <= names
    assert {"LICENSE", "README.md", "pyproject.toml"} <= names


def origin(python: Path, code: str, cwd: Path, **env: str) -> Path:
    """Where a start of Python in `cwd` finds the package, by the last line that `code` prints."""
    return Path(run(python, "-c", code, *modules(), cwd=cwd, **env).strip().splitlines()[-1])


def test_wheel_imports_from_another_folder(wheel_python, elsewhere):
    assert origin(wheel_python, IMPORT_ALL, elsewhere).is_relative_to(wheel_python.parent.parent.resolve())


def test_wheel_backend_is_found_by_name(wheel_python, elsewhere):
    run(wheel_python, "-c", COMPILE_BY_NAME, cwd=elsewhere)


def test_wheel_command_line_starts(wheel_python, elsewhere):
    assert "demo" in run(wheel_python.parent / "cachedit", "--help", cwd=elsewhere)


IMPORTS = {"all": IMPORT_ALL, "some": IMPORT_SOME}
STARTS = list(itertools.product(("elsewhere", "checkout", "kernels"), IMPORTS))
BY_DEFAULT = [("elsewhere", "some"), ("checkout", "some"), ("kernels", "some")]


@pytest.mark.parametrize(("start", "imports"), only_in("packaging", STARTS, but=BY_DEFAULT))
def test_editable_imports_wherever_python_starts(start, imports, editable_python, checkout, elsewhere):
    """In the checkout's root Python finds the package by itself, elsewhere through the install's finder."""
    cwd = {"elsewhere": elsewhere, "checkout": checkout, "kernels": checkout / "kernels"}[start]
    assert origin(editable_python, IMPORTS[imports], cwd) == (checkout / "cachedit_fx" / "__init__.py").resolve()


@pytest.mark.full("packaging")
def test_editable_backend_is_found_by_name(editable_python, elsewhere):
    run(editable_python, "-c", COMPILE_BY_NAME, cwd=elsewhere)


@pytest.mark.parametrize("imports", only_in("packaging", IMPORTS, but=["some"]))
def test_checkout_imports_without_an_install(imports, checkout, elsewhere, tmp_path):
    """As a reader tries it: PYTHONPATH, nothing installed."""
    python = fresh_environment(tmp_path / "env")
    found = origin(python, IMPORTS[imports], elsewhere, PYTHONPATH=str(checkout))
    assert found == (checkout / "cachedit_fx" / "__init__.py").resolve()


def test_a_checkout_does_not_hold_itself():
    """`TORCH_LOGS="+cachedit_fx"` lets torch walk the package: with the root on its path, the walk has no end."""
    names = (module.name for module in pkgutil.walk_packages(cachedit_fx.__path__, "cachedit_fx."))
    assert not [name for name in itertools.islice(names, 1000) if name.startswith("cachedit_fx.cachedit_fx")]
