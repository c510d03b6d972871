"""The loops of `kernels/cpu.cpp`: compiled once, found again by other processes, done without where there is no
compiler; and as many threads as torch has give the same bits. What they compute: test_kernels.py."""

import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from cachedit_fx.kernels import cpu
from cachedit_fx.kernels.l1_sums import l1_sums
from cachedit_fx.kernels.quant_fp8 import dequant_fp8, quant_fp8
from cachedit_fx.kernels.residual_apply import residual_apply
from cachedit_fx.kernels.residual_store import residual_like, residual_store


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", cpu.ARGUMENTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_kernel_has_a_loop(name, dtype):
    value = torch.empty(0, dtype=dtype)
    kept = {"l1_sums": [torch.float32], "quant_fp8": [], "dequant_fp8": []}.get(name, [residual_like(value).dtype])
    assert cpu.loop(name, [value], dtype, *kept) is not None


def test_what_is_no_plain_tensor_on_the_cpu_has_none():
    class Own(torch.Tensor):
        pass

    for x in (torch.empty(0, device="meta"), torch.empty(0).as_subclass(Own)):
        assert cpu.loop("quant_fp8", [x], torch.float32) is None
    assert cpu.loop("quant_fp8", [torch.empty(0)], torch.float64) is None


def test_loops_over_rows_take_one_dtype_of_values_and_one_of_residuals():
    value, residual, wider = torch.ones(3, 4), torch.ones(3, 4), torch.ones(3, 4, dtype=torch.float64)
    for name, values, residuals in (
        ("l1_sums", (value, None), (residual,)),
        ("residual_store", (value, value), (wider,)),
        ("residual_apply", (None, value), (residual, residual)),
    ):
        assert cpu.loop_over_rows(name, values, residuals) is not None
        assert cpu.loop_over_rows(name, (*values, value.bfloat16()), residuals) is None
        assert cpu.loop_over_rows(name, values, (*residuals, residual.bfloat16())) is None
        assert cpu.loop_over_rows(name, values, ()) is None
        assert cpu.loop_over_rows(name, (*values, value.t().contiguous().t()[:, ::2]), residuals) is None


def test_compiled_once_and_kept(empty_folder, monkeypatch):
    def kept():
        assert cpu._load.__wrapped__() is not None
        return {path: path.stat().st_mtime_ns for path in (empty_folder / "cachedit_fx").iterdir()}

    first = kept()
    assert [path.suffix for path in first] == [".so"] and kept() == first
    monkeypatch.setattr(cpu, "FLAGS", (*cpu.FLAGS, "-DANOTHER"))
    assert len(kept()) == 2


@pytest.mark.parametrize(("compiler", "said"), [("false", "no loops"), ("/no/such/compiler", "No such file")])
def test_a_compiler_that_does_not_work_is_told(empty_folder, monkeypatch, caplog, compiler, said):
    monkeypatch.setenv("CXX", compiler)
    with caplog.at_level(logging.WARNING):
        assert cpu._load.__wrapped__() is None
    assert said in caplog.text and "torch's ops take their place" in caplog.text
    assert not list((empty_folder / "cachedit_fx").iterdir())


@pytest.mark.parametrize("chosen", [True, False], ids=["inductor's folder", "a folder of its own"])
@pytest.mark.parametrize("what", ["folder", "file"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: path.chmod(path.stat().st_mode | 0o020), "others may write"),
        (lambda path: path.chmod(path.stat().st_mode | 0o002), "others may write"),
        (lambda path: path.rename(f"{path}.moved") and path.symlink_to(f"{path}.moved"), "symbolic link"),
    ],
    ids=["group", "everyone", "link"],
)
def test_code_that_others_may_have_written_is_not_loaded(tmp_path, monkeypatch, caplog, chosen, what, change, said):
    """Whoever can write there could have anything run in our process."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if chosen:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    else:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setattr(
        cpu, "_compile", lambda command, target: target.write_bytes(b"no library") and target.chmod(0o700)
    )
    folder = cpu._folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert cpu._load.__wrapped__() is None and said not in caplog.text  # the file was looked at, and is no library
    (file,) = folder.iterdir()
    change(folder if what == "folder" else file)
    assert cpu._load.__wrapped__() is None
    assert said in caplog.text and "torch's ops take their place" in caplog.text


@pytest.mark.parametrize("chosen", [True, False])
def test_a_folder_of_another_user_is_not_used(tmp_path, monkeypatch, caplog, chosen):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if chosen:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    else:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    owner = os.getuid()
    cpu._folder()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    (tmp_path / f"cachedit_fx_{owner + 1}").mkdir()
    assert cpu._load.__wrapped__() is None
    assert f"belongs to user {owner}" in caplog.text


def test_a_source_that_is_refused_shows_what_the_compiler_said(empty_folder, monkeypatch, caplog):
    broken = empty_folder / "broken.cpp"
    broken.write_text("int main( {")
    monkeypatch.setattr(cpu, "SOURCE", broken)
    assert cpu._load.__wrapped__() is None
    assert "error" in caplog.text


def test_without_a_compiler_torch_does_it(tmp_path):
    """In a process that finds none."""
    code = """
import logging, torch
logging.basicConfig(level=logging.INFO)
from cachedit_fx.kernels import cpu
from cachedit_fx.kernels.residual_apply import residual_apply
x, r, out = torch.ones(3), torch.ones(3, dtype=torch.float64), torch.empty(3)
residual_apply([x], [[r]], [1.0], [out])
assert out.tolist() == [2, 2, 2] and cpu.library() is None
"""
    env = {name: value for name, value in os.environ.items() if name != "CXX"}
    env |= {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler" in done.stderr


@pytest.fixture
def threads():
    """Sets their number, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_number_of_threads_changes_no_bit(threads, dtype):
    """With enough elements for four of them, in tiles that do not divide evenly."""
    torch.manual_seed(0)
    hidden, base = torch.randn(2, 3, 1401, 130).to(dtype)
    previous = list(torch.randn(2, 3, 1401, 130))
    heads = torch.randn(3, 1401, 2, 65).to(dtype)

    def everything():
        r, result = torch.empty(hidden.shape), torch.empty_like(hidden)
        kept = [residual_like(hidden) for _ in range(2)]
        residual_store([hidden, base], [base, hidden], kept)
        residual_apply([base], [kept], [1.0, -0.3], [result])
        packed = quant_fp8(heads)
        sums = [l1_sums(hidden, base, previous, r, per_sample) for per_sample in (False, True)]
        return [*sums, r, *kept, result, packed, dequant_fp8(packed, 2, dtype)]

    assert hidden.numel() >= 4 * 2**17
    threads(1)
    expected = everything()
    for count in (2, 4):
        threads(count)
        assert all(map(torch.equal, everything(), expected))


def test_a_cpu_needs_no_triton():
    """Only the modules named *_triton import it."""
    paths = Path(cpu.__file__).parent.glob("*.py")
    modules = [f"cachedit_fx.kernels.{path.stem}" for path in paths if not path.stem.endswith("_triton")]
    assert len(modules) >= 7
    code = f"import sys, {', '.join(modules)}; assert 'triton' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
