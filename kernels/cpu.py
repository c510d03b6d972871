"""The loops of `cpu.cpp`: compiled where they are first needed, kept on disk beside inductor's code, called by ctypes.

Without a C++ compiler, for dtypes that have no loop (float16, float64) and for layouts that are no rows, torch's ops do
the same: each kernel's reference, several passes where a loop takes one.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from ctypes import c_double, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch

from . import variants
from .layout import Layout as TensorLayout

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
    """`TensorLayout`, as the loops take it. This and the next two are cpu.cpp's structs of the same names."""

    _fields_ = [("samples", c_int64), ("rows", c_int64), ("cols", c_int64)]


class Strided(ctypes.Structure):
    """Where a tensor's data begin, and its strides from sample to sample and from row to row."""

    _fields_ = [("data", c_void_p), ("sample", c_int64), ("row", c_int64)]


class Tokens(ctypes.Structure):
    """How many rows (a token's head each) there are, and where tokens lie."""

    names = ("rows", "heads", "head_dim", "size_1", "size_2", "stride_0", "stride_1", "stride_2")
    _fields_ = [(name, c_int64) for name in names]


ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "residual_apply": (Layout, Strided, c_void_p, c_void_p, c_int64, c_void_p, c_int64),
    "residual_store": (Layout, Strided, Strided, c_void_p, c_int64),
    "l1_sums": (Layout, Strided, Strided, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64),
    "quant_fp8": (Tokens, c_void_p, c_int64, c_void_p, c_int64, c_int64),
    "dequant_fp8": (Tokens, c_void_p, c_void_p, c_int64),
}


def loop(name: str, tensors: Sequence[torch.Tensor | None], *dtypes: torch.dtype) -> Callable[..., None] | None:
    """The loop `name` for these dtypes; None where there is none, or one of `tensors` is no plain tensor on the CPU."""
    for x in tensors:
        if x is not None and (x.device.type != "cpu" or type(x) not in (torch.Tensor, torch.nn.Parameter)):
            return None
    return _loop(name, dtypes)


@functools.cache
def _loop(name: str, dtypes: tuple[torch.dtype, ...]) -> Callable[..., None] | None:
    if any(dtype not in variants.TYPES for dtype in dtypes):
        return None
    found = getattr(library(), "_".join([name, *(variants.TYPES[dtype] for dtype in dtypes)]), None)
    if found is not None:
        found.argtypes, found.restype = ARGUMENTS[name], None
    return found


def library() -> ctypes.CDLL | None:
    """The compiled loops; None, with a line in the log, where they cannot be had."""
    with _loading:
        return _load()


@functools.cache
def _load() -> ctypes.CDLL | None:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        logger.info("no C++ compiler: on the CPU, torch's ops take the place of the fused loops")
        return None
    instructions = INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), ())
    command = [*shlex.split(compiler), *FLAGS, *instructions]
    name = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), *map(str.encode, command)])).hexdigest()[:32]
    try:
        compiled = _folder() / f"{name}.so"
        if not compiled.exists():
            _compile(command, compiled)
        return ctypes.CDLL(str(compiled))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        logger.warning("%s does not compile; on the CPU, torch's ops take the place of its loops: %s", SOURCE, said)
        return None


def _folder() -> Path:
    """Where compiled loops are kept: in inductor's folder if the user named one, else in one of the user's own, since
    whoever can write there can have anything run.

    Raises:
        OSError: where there can be no such folder.
    """
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    folder = Path(given) / "cachedit_fx" if given else Path(tempfile.gettempdir()) / f"cachedit_fx_{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not given and folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} is another user's")
    return folder


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
        made.replace(target)


def strided(tensor: torch.Tensor | None, seen: TensorLayout) -> Strided:
    return Strided(None if tensor is None else tensor.data_ptr(), *seen.strides(tensor))


def pointers(tensors: Sequence[torch.Tensor]) -> Any:
    """An array of where the data of `tensors` begin."""
    return (c_void_p * len(tensors))(*[x.data_ptr() for x in tensors])


def doubles(numbers: Sequence[float]) -> Any:
    return (c_double * len(numbers))(*numbers)
