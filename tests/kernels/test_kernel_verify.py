"""What is read from PTX and AMDGCN, what is caught, and that every specialisation of the kernels holds everywhere."""

import importlib
import itertools
import multiprocessing
import os
from typing import Any

import pytest
import torch
from lib.marks import only_in

from cachedit_fx.bench.kernels_assembly import (
    PRODUCTS,
    Accesses,
    amdgcn_accesses,
    amdgcn_usage,
    product_loops,
    ptx_accesses,
    ptxas_usage,
)
from cachedit_fx.bench.kernels_verify import (
    KERNELS,
    TARGETS,
    Specialization,
    Task,
    checker,
    judge_loops,
    leaves,
    module_of,
    not_minimal,
    shares,
    specialization,
    tasks,
    too_narrow,
    totals,
)
from cachedit_fx.kernels.int8_attention import FLOATS as DTYPES_OF_ATTENTION
from cachedit_fx.kernels.int8_attention import WIDE_HEAD_DIM
from cachedit_fx.kernels.residual_store import residual_like
from cachedit_fx.kernels.variants import TYPES, Loop, Variant

pytest.importorskip("triton")
from lib.bad_kernels import variants  # noqa: E402 - it imports Triton

NVIDIA = [name for name, target in TARGETS.items() if target.backend == "cuda"]
BAD = {variant.name: index for index, variant in enumerate(variants())}


@pytest.fixture(scope="module")
def run():
    with checker(1) as run:
        yield lambda todo: list(run(todo))


@pytest.mark.parametrize("target", only_in("kernels", ["sm80", "sm90", "gfx942"], but=["sm90", "gfx942"]))
def test_bad_kernels_are_caught(run, target):
    found = {row.variant: row for row in run([Task("lib.bad_kernels", BAD[name], target) for name in BAD])}
    assert found["good"].is_good and found["good"].is_wide and found["good"].is_exact
    assert found["good"].registers > 0 and found["good"].kernel == "bad_kernels"
    assert found["unaligned"].is_good and found["unaligned"].is_wide is None
    narrow = ["every other element"]
    if target in NVIDIA:  # AMD's loads need not be aligned, and are joined in the end
        narrow += ["shifted, and said to be aligned", "a mask that is not known to be a multiple"]
    for name in narrow:
        assert found[name].is_exact and not found[name].is_wide and "bytes" in found[name].problems[0]
    assert "8192 bytes read, 4096 would do" in found["reads twice"].problems
    assert found["writes less than it says"].problems == ("4096 bytes written, 8192 would do",)
    if target in NVIDIA:  # 512 values a thread, and 255 registers
        assert found["spills"].spills > 0 and f"{found['spills'].spills} spilled" in found["spills"].problems


def test_the_environment_may_ask_for_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with checker(1) as run:
        assert os.environ["TRITON_INTERPRET"] == "1"
        assert next(run([Task("lib.bad_kernels", BAD["good"], "sm90")])).is_good


def test_an_error_of_the_compiler_reaches_the_caller(run):
    with pytest.raises(IndexError, match="no variant 99"):
        run([Task("lib.bad_kernels", 99, "sm90")])


def shortcomings(rows):
    return {(row.variant, row.target): row.problems for row in rows if not row.is_good}


FAMILIES = [kernel for kernel in KERNELS if kernel != "int8_attention"]
FAMILIES += [f"int8_attention {TYPES[dtype]}" for dtype in DTYPES_OF_ATTENTION]
"""Texts that names of variants begin with."""


@pytest.mark.full("kernels")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("text", FAMILIES)
def test_every_specialisation(run, text, target):
    todo = tasks([target], [text])
    assert todo
    assert not shortcomings(run(todo))


def largest(kernel):
    """The place of the variant that moves the most bytes, for each function, its dtypes, and aligned or not."""
    places: dict[Any, tuple[tuple[int, int], int]] = {}
    for place, variant in enumerate(importlib.import_module(module_of(kernel)).variants()):
        types = (kind for _, kind in leaves(tuple(variant.signature.values())))
        pointers = frozenset(kind for kind in types if kind is not None and kind.startswith("*"))
        moved = variant.read_bytes + variant.written_bytes + variant.written_once
        size = moved, variant.constexprs.get("BLOCK_ROWS", 1)
        key = variant.kernel.__name__, pointers, variant.aligned
        places[key] = max(places.get(key, (size, place)), (size, place))
    return [place for _, place in places.values()]


LARGEST = {"l1_sums": 8, "residual_apply": 12, "residual_store": 12, "quant_fp8": 12}
"""Variants among the largest, by kernel."""
LARGEST_BY_DEFAULT = [("sm90", kernel) for kernel in LARGEST] + [("gfx942", "residual_apply")]


@pytest.mark.parametrize(
    ("target", "kernel"),
    only_in("kernels", itertools.product(("sm90", "gfx942"), LARGEST), but=LARGEST_BY_DEFAULT),
)
def test_the_largest_specialisations(run, kernel, target):
    """Registers run out there first. All others: the test above."""
    todo = [Task(module_of(kernel), place, target) for place in largest(kernel)]
    assert len(todo) == LARGEST[kernel]
    assert not shortcomings(run(todo))


def test_the_loop_of_attention(run):
    """Its largest tile of 16-bit values. All others: `test_every_specialisation`."""
    names = [variant.name for variant in importlib.import_module(module_of("int8_attention")).variants()]
    place = names.index("int8_attention bf16, heads of 128")
    assert not shortcomings(run([Task(module_of("int8_attention"), place, "sm90")]))


def test_what_loops_must_read():
    """Two tiles: 16 bytes of a thread twice, and 8; a mask of 64 bytes for all; a scale."""
    loop = Loop((8192, 2048), 64, 4, ("int8", "bf16"))
    for good in ((16, 16, 8, 2, 4), (16, 16, 8, 2), (16, 4, 1, 4)):  # AMD, scalars aside; half a tile
        assert judge_loops(loop, [good], 256) == ([], [])
    plain = Loop((8192, 2048), 0, 4, ("int8", "bf16"))
    assert judge_loops(plain, [(16, 8, 8, 8, 4)], 256) == (["1 loads of 16 bytes missing in a loop"], [])
    for loads in ((16, 16, 8, 16), (16, 16, 8, 8)):
        _, wrong = judge_loops(plain, [loads, (16, 16, 8, 4)], 256)
        assert wrong == [f"{256 * sum(loads)} bytes read in a loop, 10240 would do"]
    assert judge_loops(loop, [], 256) == ([], ["no loop with matrix instructions for int8 and bf16"])


def test_loops_with_matrix_instructions():
    int8, bf16 = (PRODUCTS[name] for name in ("int8", "bf16"))
    inner = "$L__BB0_3:\n mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32 a;\n@%p1 bra $L__BB0_3"
    other = "$L__BB0_5:\n add.s32 a, b;\n@%p1 bra $L__BB0_5"
    again = "$L__BB0_7:\n@%p bra $L__BB0_7;\n tcgen05.mma.cta_group::1.kind::i8 [a];\nbra $L__BB0_7"
    outer = "\n".join(["$L__BB0_1:", inner, other, "wgmma.f32.bf16.bf16 a;", "bra $L__BB0_1"])
    text = "\n".join([outer, again, "ret;"])
    assert product_loops(text, [int8]) == [inner, again]
    assert product_loops(text, [int8, bf16]) == [outer]
    product = "v_mfma_i32_16x16x32_i8 a[0:3], v[0:1], v[2:3], a[0:3]"
    amd = f".LBB0_2:\n {product}\n s_cbranch_scc1 .LBB0_2"
    assert product_loops(amd, [int8]) == [amd]
    # The second block jumps back to the first, which never comes to it.
    moved = (
        f"s_cbranch_scc1 .LBB0_4\n.LBB0_3:\n {product}\ns_branch .LBB0_5\n.LBB0_4:\ns_cbranch_scc0 .LBB0_3\n.LBB0_5:"
    )
    assert product_loops(moved, [int8]) == []


def test_loads_and_stores_of_ptx():
    text = """
        ld.param.b64 %rd1, [kernel_param_0];
        @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        ld.global.L1::evict_last.v2.b64 { %rd2, %rd3 }, [ %rd1 + 16 ];
        @!%p2 ld.global.b16 { %rs1 }, [ %rd1 + 32 ];
        ld.global.nc.u8 %rs2, [%rd1];
        ld.volatile.global.v8.b32 {%r1}, [%rd1];
        ld.relaxed.gpu.global.f32 %f1, [%rd1];
        ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r9];
        cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10;
        @%p1 st.global.v4.b32 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4 };
        st.global.b8 [%rd1], %rs1;
        @%p3 st.shared.b32 [ %r5 + 0 ], %r6;
    """
    assert ptx_accesses(text) == Accesses((16, 16, 2, 1, 32, 4, 16), (16, 1))


def test_loads_and_stores_of_amdgcn():
    text = """
        s_load_dwordx4 s[4:7], s[0:1], 0x0
        s_load_dword s8, s[0:1], 0x38
        s_load_dword s9, s[2:3], 0x0
        global_load_dwordx4 v[0:3], v[8:9], off
        buffer_load_dwordx2 v[4:5], v6, s[4:7], 0 offen
        global_load_ushort v1, v[8:9], off
        global_load_short_d16_hi v1, v[8:9], off
        global_load_ubyte v1, v[8:9], off
        flat_load_dword v1, v[8:9]
        ds_read_b128 v[0:3], v4
        global_load_b128 v[0:3], v[8:9], off
        global_store_dwordx3 v[8:9], v[0:2], off
        buffer_store_byte v1, v2, s[4:7], 0 offen
        global_store_d16_hi_b16 v[8:9], v1, off
    """
    assert amdgcn_accesses(text) == Accesses((16, 8, 2, 2, 1, 4, 16, 4), (12, 1, 2))
    with pytest.raises(ValueError, match="tile"):
        amdgcn_accesses("  global_load_lds_tile v1, v2, off")


def test_registers_and_spills():
    log = "0 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads\nptxas info : Used 40 registers, 400 bytes"
    assert ptxas_usage(log) == (40, 24)
    with pytest.raises(ValueError, match="ptxas"):
        ptxas_usage("")
    text = ".sgpr_count: 30\n .sgpr_spill_count: 2\n .vgpr_count:     17\n .vgpr_spill_count: 3\n"
    assert amdgcn_usage(text) == (17, 5)


@pytest.mark.parametrize(
    ("widths", "least", "own", "common"),
    [
        ((16, 16), 8192, [16, 16], []),
        ((16, 16, 4, 4), 8192 + 8, [16, 16], [4, 4]),  # two sums, written by one thread each
        ((16, 16, 4), 8192 + 128, [16, 16], [4]),  # a scale for each of 32 rows
        ((1, 1, 1, 1, 4), 1024 + 256, [1, 1, 1, 1], [4]),
        ((16, 16, 16), 8192, [16, 16, 16], []),  # read again
        ((16, 16, 4, 4, 4, 4), 8192 + 8, [4, 4, 4, 4, 16, 16], []),
        ((16,), 8192, [16], []),
    ],
)
def test_what_threads_have_in_common(widths, least, own, common):
    assert shares(widths, least, 256) == (own, common)


def made(**more):
    given: dict[str, Any] = {
        "read_bytes": 4096,
        "written_bytes": 2048,
        "signature": {"x": "*bf16", "out": "*u8", "n": "i32"},
    } | more
    return Variant(None, "a variant", constexprs={"BLOCK_ROWS": 8, "BLOCK_COLS": 256, "other": 3}, **given)


def test_a_thread_that_has_less_than_128_bits():
    """Eight bytes are all that a thread has of `out`, once."""
    assert not too_narrow(made(), Accesses((16,), (8,)), 256)
    assert too_narrow(made(), Accesses((8, 8), (8,)), 256) == ["3 accesses of 8 bytes"]
    assert too_narrow(made(), Accesses((16,), (4, 4)), 256) == ["2 accesses of 4 bytes"]
    sums = made(written_once=1028)  # one number, and 256: four bytes of a thread
    assert not too_narrow(sums, Accesses((16,), (8, 4, 4)), 256)
    assert too_narrow(sums, Accesses((16,), (8, 2, 2)), 256) == ["2 accesses of 2 bytes"]
    assert not not_minimal(made(), Accesses((16,), (4, 4)), 256)
    assert not_minimal(made(), Accesses((16,), ()), 256) == ["0 bytes written, 2048 would do"]


def test_hints_and_constants_by_their_paths():
    types = {"a": ("*bf16", None), "b": None, "c": (("*fp32", "*fp32"), "i32"), "n": ("i32", "i32"), "B": "constexpr"}
    variant = Variant(None, "", types, {"B": 8}, 1, multiples=frozenset({"n"}))
    hint = [["tt.divisibility", 16]]
    paths = [(0, 0), (2, 0, 0), (2, 0, 1), (3, 0), (3, 1)]
    expected = Specialization(
        types | {"a": ("*bf16", "constexpr"), "b": "constexpr"},
        {(4,): 8, (0, 1): None, (1,): None},
        dict.fromkeys(paths, hint),
    )
    assert specialization(variant) == expected
    assert not specialization(Variant(None, "", types, {"B": 8}, 1, aligned=False)).attrs


def test_totals_and_their_order(run):
    rows = run([Task("lib.bad_kernels", BAD[name], target) for target in ("gfx942", "sm90") for name in list(BAD)[:3]])
    first, second = totals(rows)
    assert (first.target, second.target) == ("sm90", "gfx942")
    assert (first.variants, first.wide, first.aligned, first.exact, first.failed) == (3, 1, 2, 3, 1)


def test_tasks_are_chosen_by_the_names_of_variants():
    chosen = tasks(["sm90", "sm80"], ["l1_sums bf16, 2 previous, row", "residual_store"])
    names = [list(importlib.import_module(task.module).variants())[task.place].name for task in chosen]
    assert chosen and all(
        "residual_store" in name or name.startswith("l1_sums bf16, 2 previous, row") for name in names
    )
    assert [task.target for task in chosen[:2]] == ["sm90", "sm80"]


def test_names_of_variants_are_their_own():
    for kernel in KERNELS:
        names = [variant.name for variant in importlib.import_module(module_of(kernel)).variants()]
        assert len(set(names)) == len(names)


# What the launchers choose, as Triton's JIT sees it: without a GPU, by a driver that only names a target.

LAYOUTS = ("contiguous", "sliced", "transposed", "unaligned")
SHAPES = ((2, 64, 128), (1, 16, 256), (2, 7, 5), (5,), (16, 1), (1, 1, 1))


def lying(shape, dtype, layout):
    if layout == "sliced":
        dim = max(len(shape) - 2, 0)
        return torch.ones([size + 16 * (d == dim) for d, size in enumerate(shape)], dtype=dtype).narrow(
            dim, 16, shape[dim]
        )
    if layout == "transposed":
        return torch.ones(shape[::-1], dtype=dtype).permute(*reversed(range(len(shape))))
    count = torch.Size(shape).numel()
    start = layout == "unaligned"
    return torch.ones(count + 8, dtype=dtype)[start : count + start].view(shape)


def launch_everything(case):
    """In a process of its own: what Triton would compile for the launches of one case."""
    import triton
    from triton.backends.compiler import GPUTarget

    from cachedit_fx.kernels import (
        int8_attention_triton,
        int8_keys_triton,
        l1_sums_triton,
        quant_fp8_triton,
        residual_apply_triton,
        residual_store_triton,
    )

    class Fake:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    found = []

    def instead_of_compiling(*, fn, compile, **_):
        given = Specialization(compile["signature"], compile["constants"], compile["configs"][0])
        found.append((fn.name.rpartition(".")[2], compile["num_warps"], given))
        return True

    triton.runtime.driver.set_active(Fake())
    triton.knobs.runtime.jit_cache_hook = instead_of_compiling
    kernel, shape, dtype, layout = case
    x, y = lying(shape, dtype, layout), lying(shape, dtype, layout)
    like = [torch.empty(shape, dtype=torch.float32) for _ in range(2)]
    if kernel == "l1_sums":
        for count, has_base in itertools.product(range(l1_sums_triton.MAX_PREVIOUS + 1), (True, False)):
            if count or has_base:
                out = torch.empty(shape) if has_base else None
                l1_sums_triton.launch(x, y if has_base else None, like[:count], out, count == 2)
    elif kernel == "residual_store":
        for kind in ("wider", "float32", "model"):
            outs = [residual_like(x, kind) for _ in range(3)]
            residual_store_triton.launch([x] * 3, [y] * 3, outs)
    elif kernel == "residual_apply":
        for kind, terms, has_base in itertools.product(("wider", "float32", "model"), (1, 2, 6), (True, False)):
            stored = [[residual_like(x, kind)] * terms] * 3
            outs = [torch.empty(shape, dtype=dtype) for _ in range(3)]
            residual_apply_triton.launch([x if has_base else None] * 3, stored, [0.5] * terms, outs)
    elif kernel.startswith("int8") and shape == SHAPES[0]:
        for parts, fp8 in itertools.product(int8_keys_triton.PARTS, (False, True)):
            if fp8 and sum(parts) > WIDE_HEAD_DIM:
                continue
            query = lying((2, 3, 70, sum(parts) - 8), dtype, layout)
            if kernel == "int8_keys":
                keys = int8_attention_triton.aligned(query)
                int8_keys_triton.quantize(keys, keys if fp8 else None, sum(parts))
                continue
            pairs = torch.ones(70, 70, dtype=dtype)
            masks = [None, torch.ones(2, 1, 1, 70).bool(), pairs[:1], pairs, pairs.bool()]
            masks = masks if sum(parts) <= WIDE_HEAD_DIM else [None]
            for mask, is_causal in (*((mask, False) for mask in masks), (None, True)):
                int8_attention_triton.launch(query, query, query, mask, is_causal, None, False, fp8)
        found = [launched for launched in found if (launched[0] == "_attend") == (kernel == "int8_attention")]
    elif kernel == "quant_fp8" and len(shape) > 1:
        heads = lying((*shape[:-1], 4, 64 if shape[-1] > 64 else 5), dtype, layout)
        packed = quant_fp8_triton.launch_quant(heads)
        quant_fp8_triton.launch_dequant(packed, 4, dtype)
    return found


@pytest.fixture(scope="module")
def launched():
    before = os.environ.pop("TRITON_INTERPRET", None)
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            yield lambda case: pool.apply(launch_everything, (case,))
    finally:
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


def types_of(specialized):
    return dict(leaves(tuple(specialized.signature.values())))


def covering(known, name, num_warps, derived):
    """The variants that are what Triton derived, or know less: fewer multiples of 16, no numbers that are always 1."""
    theirs = types_of(derived)
    return [
        variant
        for variant, own, ours in known
        if (variant.kernel.__name__, variant.num_warps) == (name, num_warps)
        and list(own.signature) == list(derived.signature)
        and covers(own, ours, derived, theirs)
    ]


def covers(own, ours, derived, theirs):
    if ours.keys() != theirs.keys() or not own.attrs.items() <= derived.attrs.items():
        return False
    for path, kind in theirs.items():
        if kind == "constexpr" and ours[path] == "i32" and derived.constexprs[path] == 1:
            continue
        if kind != ours[path] or (kind == "constexpr" and derived.constexprs[path] != own.constexprs[path]):
            return False
    return True


DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LAUNCHES = [
    (kernel, dtype)
    for kernel, dtype in itertools.product(KERNELS, DTYPES)
    if dtype in DTYPES_OF_ATTENTION or not kernel.startswith("int8")
]


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    only_in("kernels", LAUNCHES, but=[(kernel, dtype) for kernel, dtype in LAUNCHES if dtype is torch.bfloat16]),
    ids=str,
)
def test_what_the_launchers_choose_is_one_of_the_variants(launched, kernel, dtype):
    module = importlib.import_module(module_of(kernel))
    known = [(variant, own := specialization(variant), types_of(own)) for variant in module.variants()]
    chosen: dict[str, list[Variant]] = {}
    for shape, layout in itertools.product(SHAPES, LAYOUTS):
        for name, num_warps, derived in launched((kernel, shape, dtype, layout)):
            key = repr((name, num_warps, derived))  # most launches repeat one
            if key not in chosen:
                chosen[key] = covering(known, name, num_warps, derived)
            assert chosen[key], (shape, layout, name, derived)
            # The number of partial sums is a multiple of 16 by chance only.
            if shape in SHAPES[:2] and layout in ("contiguous", "sliced") and name != "_total":
                assert any(variant.aligned for variant in chosen[key]), (shape, layout, name, derived)
    names = {variant.name for variants in chosen.values() for variant in variants}
    assert any("unaligned" not in name for name in names)
    assert kernel.startswith("int8") or any("unaligned" in name for name in names)
