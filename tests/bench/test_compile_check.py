"""The compile check: it finds faults in faulty kernels, specialises launches as Triton does, and passes the shipped
kernels.
"""

import dataclasses
import json

import pytest
import torch
import triton
import triton.language as tl

import qvl_kernels
from bench.compile_check import __main__ as command
from bench.compile_check import chips, report, sass
from bench.compile_check.compiled import compile_all, inspect, violations
from bench.compile_check.known_issues import ACCEPTABLE, KNOWN_ISSUES, KnownIssue
from bench.compile_check.launches import kernels, record, record_call, specialise, target
from bench.compile_check.sources import sources
from bench.kernels import cases_of
from qvl_kernels import config
from qvl_kernels.gpu.device import ARCHITECTURES
from qvl_kernels.gpu.launch import Launch
from qvl_kernels.gpu.views import RowsView
from qvl_kernels.ops.rope.op import qk_norm_rope_to_cache_op

pytestmark = pytest.mark.skipif(config.interpreted(), reason="the interpreter replaces what the audit compiles")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


@triton.jit
def _matmul_kernel(x_ptr, w_ptr, y_ptr, size, stride, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """y = x w^T over blocks of SIZE columns; tiles of BLOCK rows each."""
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, SIZE)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for begin in range(0, size, SIZE):
        mask = (begin + columns)[None, :] < size
        x = tl.load(x_ptr + rows[:, None] * stride + (begin + columns)[None, :], mask=mask, other=0.0)
        w = tl.load(w_ptr + rows[:, None] * stride + (begin + columns)[None, :], mask=mask, other=0.0)
        acc = tl.dot(x, w.T, acc, input_precision="ieee")
    tl.store(y_ptr + rows[:, None] * stride + rows[None, :], acc.to(y_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["step"])
def _scale_kernel(x_ptr, y_ptr, size, one, odd, step, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs * one, mask=offs < size)
    tl.store(y_ptr + offs, x * odd * step, mask=offs < size)


def _scaled(x, y, size, odd, block, step=3):
    return {"x_ptr": x, "y_ptr": y, "size": size, "one": 1, "odd": odd, "step": step, "BLOCK": block}


def _found(arch, *, dtype=torch.bfloat16, block=64, size=64, **meta):
    x = torch.empty(1024, 1024, dtype=dtype)
    launch = Launch(
        _matmul_kernel,
        (1,),
        {
            **{"x_ptr": x, "w_ptr": x, "y_ptr": x, "size": 1024, "stride": 1024, "BLOCK": block, "SIZE": size},
            **{"num_warps": 4, "enable_fp_fusion": True, **meta},
        },
    )
    ((_, found),) = compile_all([specialise(launch, arch)], jobs=1)
    assert "error" not in found, found
    return found


def _kinds(arch, found):
    return {kind for kind, _ in violations(arch, found)}


@pytest.mark.parametrize(
    ("arch", "family"),
    [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA"), ("sm_120", "HMMA"), ("gfx942", "MFMA")],
)
def test_a_good_kernel_is_clean(arch, family):
    found = _found(arch, size=32)
    assert violations(arch, found) == []
    assert found["matrix_in_loops"][family] > 0 and found["has_loop"]
    assert found["dots"] == [{"m": 64, "n": 64, "k": 32, "dtype": "bf16", "in_loop": True}]
    assert found["resident_warps"] > 0 and found["shared"] > 0


@pytest.mark.parametrize(
    ("op", "case", "variants", "arch", "stage", "instruction"),
    [
        ("attention", "text_prefill", "DESCRIPTORS", "sm_90", "ptx", "cp.async.bulk.tensor"),
        ("quantized_linear", "int8_prefill_mlp", "DESCRIPTORS", "sm_90", "ptx", "cp.async.bulk.tensor"),
        (
            "quantized_linear",
            "int8_prefill_mlp",
            "DESCRIPTORS+PERSISTENT+WARP_SPECIALIZE",
            "sm_100",
            "ttgir",
            "ttg.warp_specialize",
        ),
        ("decode_step", "1_rows_16_bits", "PDL", "sm_90", "ptx", "griddepcontrol.wait"),
    ],
)
def test_variants_become_their_instructions(op, case, variants, arch, stage, instruction):
    """Without the feature the same kernels have none of these instructions, and the grid covers all tiles."""
    launches = {}
    for name in (op, f"{op}+{variants}"):
        source = sources()[name]
        chosen = next(c for c in source.cases if c.name == case)
        forward, _ = record(source.function, chosen, torch.bfloat16, arch)
        launches[name] = [
            launch
            for call in forward
            for launch in call.launches
            if any(v in launch.arguments for v in variants.split("+"))
        ]
    for plain, varied in zip(*launches.values(), strict=True):
        assert plain.kernel is varied.kernel and ("PERSISTENT" in variants) == (varied.grid != plain.grid)
        for launch, expected in ((plain, False), (varied, True)):
            made = specialise(launch, arch)
            compiled = triton.compile(made.source, target=target(arch), options=made.options)
            assert (instruction in compiled.asm[stage]) == expected
            assert getattr(compiled.metadata, "launch_pdl", False) == (expected and variants == "PDL")
    assert all(launches.values())


@pytest.mark.parametrize(
    ("arch", "stage", "wide"), [("sm_90", "ptx", "cp.async.cg.shared.global"), ("gfx942", "amdgcn", "_load_dwordx4")]
)
def test_keys_behind_an_address_are_loaded_16_bytes_at_once(arch, stage, wide):
    """Keys whose address comes from a table on the device use as many wide loads as caches that are arguments."""
    found = {}
    for op, name in (("decode_step", "32_rows_16_bits"), ("decode_attention", "decode_attention 32 x 2k")):
        source = sources()[op]
        forward, _ = record(source.function, next(c for c in source.cases if c.name == name), torch.bfloat16, arch)
        launches = [
            launch
            for call in forward
            for launch in call.launches
            if launch.kernel.__name__ == "_decode_attention_kernel"
        ]
        assert [launch.arguments["HAS_TABLE"] for launch in launches] == [op == "decode_step"]
        made = specialise(launches[0], arch)
        found[op] = triton.compile(made.source, target=target(arch), options=made.options).asm[stage]
    assert found["decode_step"].count(wide) >= found["decode_attention"].count(wide) > 0


def test_variants_count_only_where_they_are_on():
    result = command.compile_check(names=["attention+DESCRIPTORS"], plan=[("sm_80", "bf16")])
    assert result.rows == result.failures == result.work == []


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_spills_are_found(arch):
    # 256 x 256 fp32 sums over 4 warps are 512 registers a thread (256 on a wavefront of 64, beside everything else).
    found = _found(arch, block=256, size=32, num_warps=4 if arch == "sm_90" else 2)
    assert "spill" in _kinds(arch, found)
    assert found["stack"] > 0
    assert found["local_loads"] > 0 or found.get("vgpr_spills", 0) > 0


def test_too_much_shared_memory_is_found():
    found = _found("sm_89", block=128, size=128, num_stages=4)
    assert found["shared"] > 99 << 10
    assert "shared" in _kinds("sm_89", found)
    assert "shared" not in _kinds("sm_90", {**found, "shared": 227 << 10})
    assert found["resident_warps"] == 0


def test_missing_matrix_instructions_are_found():
    narrow = _found("sm_90", num_warps=2, size=16)  # a warp group has four warps: two can only issue HMMA
    assert _kinds("sm_90", narrow) == {"matrix"}
    assert "no HGMMA in the loop: " in violations("sm_90", narrow)[0][1]
    small = _found("sm_90", block=32)  # below 64 rows HMMA is right
    assert violations("sm_90", small) == [] and small["matrix_in_loops"].get("HMMA")
    outside = {**_found("sm_90"), "matrix_in_loops": {}}
    assert _kinds("sm_90", outside) == {"matrix"}


def test_full_precision_products_need_no_matrix_instructions():
    found = _found("sm_80", dtype=torch.float32, block=32, size=32)
    assert found["dots"][0]["dtype"] == "f32" and found["matrix"] == {}
    assert violations("sm_80", found) == []


def test_a_compiler_that_fails_or_hangs_is_one_error(monkeypatch):
    x = torch.empty(64, 64)
    good, bad = (Launch(_scale_kernel, (1,), _scaled(x, x, 64, 3, block)) for block in (64, 63))  # no power of two
    made = [specialise(launch, "sm_90") for launch in (good, bad)]
    results = {item.key: found for item, found in compile_all(made, jobs=2)}
    assert results[made[0].key]["registers"] > 0
    assert "power of 2" in results[made[1].key]["error"]
    ((_, late),) = compile_all(made[:1], jobs=1, timeout=0.0)
    assert "longer than" in late["error"]


def test_specialisation_is_tritons_own():
    x = torch.empty(4096, dtype=torch.bfloat16)
    launch = Launch(_scale_kernel, (4,), {**_scaled(x, x[1:], 4096, 17, 1024, step=32), "num_warps": 8})
    made = specialise(launch, "sm_90")
    assert made.source.signature == {
        "x_ptr": "*bf16",
        "y_ptr": "*bf16",
        "size": "i32",
        "one": "constexpr",
        "odd": "i32",
        "step": "i32",
        "BLOCK": "constexpr",
    }
    assert made.source.constants == {(3,): 1, (6,): 1024}
    divisible = {place[0] for place, attributes in made.source.attrs.items() if ["tt.divisibility", 16] in attributes}
    assert divisible == {0, 2}  # y begins 2 bytes in, 17 is odd, step asked not to be looked at
    assert made.options["num_warps"] == 8
    other = specialise(launch._replace(arguments={**launch.arguments, "size": 8192, "odd": 19, "step": 7}), "sm_90")
    assert other.key == made.key  # the same compilation
    assert specialise(launch._replace(arguments={**launch.arguments, "y_ptr": x}), "sm_90").key != made.key


@triton.jit
def _copy_kernel(x_rows, y_rows, mode: tl.constexpr):
    offs = tl.arange(0, 16)
    tl.store(y_rows.ptr + offs * y_rows.stride, tl.load(x_rows.ptr + offs * x_rows.stride) * mode[0])


def test_members_of_views_are_specialised_as_plain_arguments_are():
    x = torch.empty(4096, dtype=torch.bfloat16)
    arguments = {"x_rows": RowsView(x, 48), "y_rows": RowsView(x[1:], 1), "mode": (2, True)}
    made = specialise(Launch(_copy_kernel, (1,), arguments), "sm_90")
    assert made.source.signature == {"x_rows": ("*bf16", "i32"), "y_rows": ("*bf16", "constexpr"), "mode": "constexpr"}
    assert made.source.constants == {(1, 1): 1, (2,): (2, True)}
    divisible = {place for place, attributes in made.source.attrs.items() if ["tt.divisibility", 16] in attributes}
    assert divisible == {(0, 0), (0, 1)}
    assert inspect(made)["registers"] > 0
    for other in ({"x_rows": RowsView(x, 17)}, {"mode": (3, True)}):
        assert specialise(Launch(_copy_kernel, (1,), arguments | other), "sm_90").key != made.key
    same = {"x_rows": RowsView(x[8:], 64)}
    assert specialise(Launch(_copy_kernel, (1,), arguments | same), "sm_90").key == made.key


def _keys(function, make):
    forward, backward = record_call(function, make, "sm_90")
    return {specialise(launch, "sm_90").key for call in forward + backward for launch in call.launches}


def test_lengths_do_not_recompile():
    """One compilation of each kernel serves all lengths: odd ones, multiples of 16, other scales."""

    def attention(length):
        def make():
            q = torch.empty(1, length, 4, 64, dtype=torch.bfloat16, device="cuda")
            return {"q": q, "k": q[:, :, :2], "v": q[:, :, :2], "causal": True, "scale": 1 / length}

        return _keys(qvl_kernels.attention, make)

    def rope(past):
        def make():
            q = torch.empty(2, 1, 4, 64, dtype=torch.bfloat16, device="cuda")
            cache = torch.empty(2, 2, 512, 64, dtype=q.dtype, device="cuda")
            heads, norm, table = q[:, :, :2], q[0, 0, 0], q[:, :, 0]
            return {"arguments": (q, heads, heads, norm, norm, table, table, cache, cache, None, past, 1e-6)}

        return _keys(lambda arguments: qk_norm_rope_to_cache_op(*arguments), make)

    assert len(set().union(*map(attention, (128, 200, 1001, 1296)))) == 3  # forward, and two kernels of the backward
    assert len(set().union(*map(rope, (0, 1, 16, 77)))) == 1


def test_recording_sees_launchers_and_formulas():
    (case,) = (case for case in cases_of("swiglu") if case.model)
    forward, backward = record(qvl_kernels.swiglu, case, torch.bfloat16, "sm_90")
    assert [call.op for call in forward] == ["swiglu"] and [call.op for call in backward] == ["swiglu_backward"]
    assert forward[0].bytes == case.bytes(2)
    ((launch,), (gradient,)) = (calls[0].launches for calls in (forward, backward))
    assert launch.kernel.__name__ == "_swiglu_kernel" and gradient.kernel.__name__ == "_swiglu_backward_kernel"
    assert launch.arguments["gate_rows"].ptr.device.type == "cuda"
    assert launch.arguments["gate_rows"].ptr.shape == (262, 6144)
    assert {"qvl_kernels.ops.swiglu.triton_swiglu:_swiglu_kernel"} < kernels(qvl_kernels)


def test_check_of_an_op_known_issues_and_files(tmp_path, monkeypatch):
    result = command.compile_check(names=["swiglu"], plan=[("sm_90", "bf16"), ("gfx942", "bf16")], jobs=2)
    assert result.failures == []
    assert {(row["kernel"], row["arch"]) for row in result.rows} >= {
        (kernel, arch) for kernel in ("_swiglu_kernel", "_swiglu_backward_kernel") for arch in ("sm_90", "gfx942")
    }
    forward = next(work for work in result.work if work["op"] == "swiglu" and work["direction"] == "forward")
    assert forward["microseconds"]["H100"] == round(1e6 * 3 * 262 * 6144 * 2 / 3.35e12, 2)
    data = report.data(result, {"triton": "3.9.0"})
    assert json.loads(json.dumps(data)) == data
    text = report.markdown(data)
    assert "### `_swiglu_kernel`" in text and "| swiglu prefill forward | bf16 |" in text and "0 violations" in text


def test_violations_fail_unless_known(monkeypatch, capsys):
    monkeypatch.setattr(command, "violations", lambda arch, found: [("spill", "8 bytes of stack")])
    plan = [("sm_90", "bf16")]
    failed = command.compile_check(names=["swiglu"], plan=plan)
    assert failed.failures and "8 bytes of stack" in failed.failures[0] and failed.known_issues == []
    issue = KnownIssue("_swiglu*kernel", "sm_90", "bf16", "spill", "made up for this test")
    known_issues = command.compile_check(names=["swiglu"], plan=plan, known_issues=[issue])
    assert known_issues.failures == [] and "made up for this test" in known_issues.known_issues[0]
    for name, value in (
        ("kernel", "_other_kernel"),
        ("arch", "sm_80"),
        ("dtype", "fp32"),
        ("kind", "matrix"),
        ("triton", "2."),
    ):
        assert command.compile_check(
            names=["swiglu"], plan=plan, known_issues=[dataclasses.replace(issue, **{name: value})]
        ).failures
    monkeypatch.setattr(command, "violations", lambda arch, found: [("shared", "too much")])
    assert command.compile_check(
        names=["swiglu"], plan=plan, known_issues=[dataclasses.replace(issue, kind="shared")]
    ).failures
    assert command.main(["--op", "swiglu", "--arch", "sm_90", "--dtype", "bf16"]) == 1
    assert "violation:" in capsys.readouterr().out


def test_unused_known_issues_and_unreached_kernels_fail_a_whole_check(monkeypatch):
    """All ops, none of whose kernels is compiled here."""
    monkeypatch.setattr(command, "compile_all", lambda items, **_: ())
    monkeypatch.setattr(command, "kernels", lambda *_: {"somewhere:_lonely_kernel"})
    monkeypatch.setattr(command, "sources", lambda: {"swiglu": sources()["swiglu"]})
    plan = [(arch, "bf16") for arch in ARCHITECTURES]
    result = command.compile_check(
        plan=plan, known_issues=[KnownIssue("_swiglu_kernel", "sm_80", "bf16", "spill", "once upon a time")]
    )
    assert len(result.failures) == 2
    assert "_lonely_kernel: no case of any op launches it" in result.failures[0]
    assert "unused known issue: _swiglu_kernel" in result.failures[1] and "once upon a time" in result.failures[1]


def test_known_issues_are_explained():
    assert all(issue.reason and issue.kind in ACCEPTABLE for issue in KNOWN_ISSUES)
    assert len(set(KNOWN_ISSUES)) == len(KNOWN_ISSUES)


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "expected"),
    [
        ("sm_90", 32, 0, 4, 64),  # nothing limits
        ("sm_90", 128, 0, 4, 16),  # 65,536 / (128 x 32) = 16
        ("sm_90", 129, 0, 4, 12),  # handed out in eights: 136 give 3 warps on each of 4 schedulers
        ("sm_90", 255, 0, 8, 8),
        ("sm_90", 255, 0, 16, 0),  # 16 warps of 256 registers are twice what there is
        ("sm_90", 32, 100 << 10, 4, 8),
        ("sm_89", 32, 99 << 10, 4, 4),
        ("gfx942", 128, 0, 4, 16),  # 512 registers a SIMD
        ("gfx942", 512, 64 << 10, 4, 4),
    ],
)
def test_resident_warps(arch, registers, shared, warps, expected):
    assert chips.resident_warps(arch, registers, shared, warps) == expected


def test_loops_are_found_by_control_flow():
    """A backward jump out of a cold block does not make a loop of the code in between; neither does the trap at the
    end.
    """
    text = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/               @P0 BRA `(.L_x_0) ;
    .L_x_1:
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0030*/                   LDL.64 R2, [R1] ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
    .L_x_2:
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0060*/                   EXIT ;
    .L_x_0:
        /*0070*/                   STL [R1], R2 ;
        /*0080*/                   BRA `(.L_x_2) ;
    .L_x_3:
        /*0090*/                   BRA `(.L_x_3);
    """
    found = sass.nvidia_instructions(
        "\n".join(line[4:] if line.strip().startswith(".L") else line for line in text.splitlines())
    )
    assert found == sass.Instructions({"HMMA": 1, "HGMMA": 1}, {"HMMA": 1}, True, local_loads=1, local_stores=1)
    straight = sass.nvidia_instructions(
        "/*0000*/ HMMA.16816.F32 R4, R8, R12, R4 ;\n/*0010*/ EXIT ;\n.L_x_0:\n/*0020*/ BRA `(.L_x_0);"
    )
    assert not straight.has_loop and straight.matrix == {"HMMA": 1}


def test_compilation_in_process_equals_the_forked_one():
    x = torch.empty(64, 64)
    made = specialise(Launch(_scale_kernel, (1,), _scaled(x, x, 64, 3, 64)), "sm_80")
    ((_, forked),) = compile_all([made], jobs=1)
    assert inspect(made) == forked


def test_shipped_kernels_briefly():
    """Two ops on two architectures; `make audit` checks all."""
    result = command.compile_check(names=["swiglu", "rms_norm"], plan=[("sm_90", "bf16"), ("gfx942", "bf16")], jobs=2)
    assert result.rows and result.failures == []
