"""The loops of `cpu.cpp`: compiled when first needed, kept on disk next to inductor's code, called by ctypes.

Without a C++ compiler, for dtypes that have no loop (float16, float64) and for layouts that are no rows, torch's ops do
the same: each kernel's reference, in several passes instead of one.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from ctypes import c_double, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch

from . import layout, variants

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-trapping-math", "-fPIC", "-shared", "-pthread")
INSTRUCTIONS = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
}
"""Beyond those that every processor of its kind has, by what torch finds this one to have. `-march=native` would
make code that another machine with the same folder must not run."""
LONGEST_COMPILATION = 120
"""Seconds."""

_loading = threading.Lock()


class Layout(ctypes.Structure):
    """`layout.Layout`, as the loops take it. This and the next two are cpu.cpp's structs of the same names."""

    _fields_ = [("samples", c_int64), ("rows", c_int64), ("cols", c_int64)]


class Strided(ctypes.Structure):
    """Where a tensor's data begin, and its strides from sample to sample and from row to row."""

    _fields_ = [("data", c_void_p), ("sample", c_int64), ("row", c_int64)]


class Tokens(ctypes.Structure):
    """`layout.Tokens`, as the loops take them."""

    _fields_ = [(name, c_int64) for name in layout.Tokens._fields]


ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "residual_apply": (Layout, Strided, c_void_p, c_void_p, c_int64, c_void_p, c_int64),
    "residual_store": (Layout, Strided, Strided, c_void_p, c_int64),
    "l1_sums": (Layout, Strided, Strided, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64),
    "quant_fp8": (Tokens, c_void_p, c_int64, c_void_p, c_int64, c_int64),
    "dequant_fp8": (Tokens, c_void_p, c_void_p, c_int64),
}


def loop(name: str, tensors: Sequence[torch.Tensor], *dtypes: torch.dtype) -> Callable[..., None] | None:
    """The loop `name` for these dtypes; None if there is none, or one of `tensors` is no plain tensor on the CPU."""
    return _loop(name, dtypes) if all(map(_is_plain, tensors)) else None


def _is_plain(x: torch.Tensor) -> bool:
    return x.is_cpu and type(x) in (torch.Tensor, torch.nn.Parameter)


def loop_over_rows(
    name: str,
    values: Sequence[torch.Tensor | None],
    residuals: Sequence[torch.Tensor | None],
    per_sample: bool = False,
) -> Callable[..., None] | None:
    """The loop `name` for values as rows.

    Args:
        values: of one shape.
        residuals: of the same shape, contiguous.
        per_sample: see `layout.layout`.

    Returns:
        A function of the tensors that the loop takes as `Strided`, in a sequence, and of the arguments after them. None
        if there is no loop, the values or the residuals differ in dtype, or a value must be copied to have rows.
    """
    run = _loop(name, (_common_dtype(values), _common_dtype(residuals)))
    rows = layout.layout(values, per_sample) if run is not None else None
    if run is None or rows is None:
        return None

    def run_on(tensors: Sequence[torch.Tensor | None], *arguments: Any) -> None:
        run(Layout(*rows), *[_strided(x, rows) for x in tensors], *arguments, torch.get_num_threads())

    return run_on


def _common_dtype(tensors: Sequence[torch.Tensor | None]) -> torch.dtype | None:
    """The dtype of plain tensors on the CPU; None if there are several dtypes, no tensors or other tensors."""
    dtype = None
    for x in tensors:
        if x is not None:
            if not _is_plain(x) or dtype not in (None, x.dtype):
                return None
            dtype = x.dtype
    return dtype


@functools.cache
def _loop(name: str, dtypes: tuple[torch.dtype | None, ...]) -> Callable[..., None] | None:
    suffixes = [variants.TYPES[dtype] for dtype in dtypes if dtype in variants.TYPES]
    if len(suffixes) < len(dtypes):
        return None
    function = getattr(library(), "_".join([name, *suffixes]), None)
    if function is not None:
        function.argtypes, function.restype = ARGUMENTS[name], None
    return function


def library() -> ctypes.CDLL | None:
    """The compiled loops; None, with a line in the log, if they cannot be had."""
    with _loading:
        return _load()


def compiler() -> list[str] | None:
    """The words that start the C++ compiler; None if there is none. The variable CXX comes first."""
    words = shlex.split(os.environ.get("CXX", ""))
    found = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    return words or ([found] if found else None)


@functools.cache
def _load() -> ctypes.CDLL | None:
    words = compiler()
    if words is None:
        logger.info("no C++ compiler: on the CPU, torch's ops take the place of the fused loops")
        return None
    instructions = INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), ())
    command = [*words, *FLAGS, *instructions]
    name = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), *map(str.encode, command)])).hexdigest()[:32]
    try:
        compiled = _folder() / f"{name}.so"
        if not os.path.lexists(compiled):
            _compile(command, compiled)
        _check_private(compiled)
        return ctypes.CDLL(str(compiled))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        logger.warning("no loops from %s: on the CPU, torch's ops take their place: %s", SOURCE, said)
        return None


def _folder() -> Path:
    """Where compiled loops are kept: in inductor's folder if there is one, else in one of the user's own.

    Raises:
        OSError: if there can be no such folder, or if others may write to it.
    """
    chosen = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    folder = Path(chosen) / "cachedit_fx" if chosen else Path(tempfile.gettempdir()) / f"cachedit_fx_{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_private(folder)
    return folder


def _check_private(path: Path) -> None:
    """Raise unless the path is no link, this user's, and for nobody else to write: its code would run in our process.

    Raises:
        PermissionError: with the reason.
    """
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        raise PermissionError(f"{path} is a symbolic link; remove it")
    if status.st_uid != os.getuid():
        raise PermissionError(f"{path} belongs to user {status.st_uid}; remove it")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"others may write to {path}: chmod go-w, if you trust what is in it, or remove it")


def _compile(command: Sequence[str], target: Path) -> None:
    """Another process may do the same at the same time: the last one to finish replaces an equal file."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        subprocess.run(
            [*command, str(SOURCE), "-o", str(made)],
            check=True,
            capture_output=True,
            text=True,
            timeout=LONGEST_COMPILATION,
        )
        made.chmod(0o700)
        made.replace(target)


def _strided(tensor: torch.Tensor | None, rows: layout.Layout) -> Strided:
    return Strided(None if tensor is None else tensor.data_ptr(), *rows.strides(tensor))


def pointers(tensors: Sequence[torch.Tensor]) -> Any:
    """An array of the addresses of `tensors`."""
    return (c_void_p * len(tensors))(*[x.data_ptr() for x in tensors])


def doubles(numbers: Sequence[float]) -> Any:
    return (c_double * len(numbers))(*numbers)
