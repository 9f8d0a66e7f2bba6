"""The checks of machine code, on text that the CUDA 13.0 tools printed (shortened)."""

import subprocess
import sys
from pathlib import Path

import check_sass
import pytest
from check_sass import Usage, parse_ptxas, parse_sass, problems_of

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'silu_mul' for 'sm_80'
ptxas info    : Function properties for silu_mul
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 26 registers, used 0 barriers, 372 bytes cmem[0]
ptxas info    : Compile time = 9.899 ms
ptxas info    : Compiling entry function 'paged_attention' for 'sm_80'
ptxas info    : Function properties for paged_attention
    104 bytes stack frame, 100 bytes spill stores, 172 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 104 bytes cumulative stack size, 23072 bytes smem, 460 bytes cmem[0]
"""  # noqa: E501 (as ptxas breaks its lines)

NVDISASM = """\
\t.headerflags\t@"EF_CUDA_TEXMODE_UNIFIED EF_CUDA_64BIT_ADDRESS EF_CUDA_SM80 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
//--------------------- .text.silu_mul            --------------------------
\t.section\t.text.silu_mul,"ax",@progbits
.text.silu_mul:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*00b0*/                   LDG.E.128.CONSTANT R4, [R4.64] ;
.L_x_1:
        /*0640*/                   STG.E.128 [R2.64], R4 ;
        /*0650*/                   EXIT ;
//--------------------- .nv.shared.rms_norm       --------------------------
\t.section\t.nv.shared.rms_norm,"aw",@nobits
//--------------------- .text.rms_norm            --------------------------
\t.section\t.text.rms_norm,"ax",@progbits
.text.rms_norm:
        /*0000*/                   STL [R1+0xc], R0 ;
"""

CUOBJDUMP = """\
\tcode for sm_80
\t\tFunction : silu_mul
\t.headerflags\t@"EF_CUDA_SM80 EF_CUDA_PTX_SM(EF_CUDA_SM80)"
        /*0000*/                   MOV R1, c[0x0][0x28] ;                     /* 0x00000a0000017a02 */
                                                                              /* 0x000fe40000000f00 */
        /*00b0*/                   LDG.E.128.CONSTANT R4, [R4.64] ;           /* 0x0000000404047981 */
\t\tFunction : rms_norm
        /*0000*/                   STL [R1+0xc], R0 ;                         /* 0x0000000404047981 */
"""

CLEAN = Usage(registers=26, shared_nbytes=0, stack_nbytes=0, spill_nbytes=0)


def test_usage_is_read_by_kernel() -> None:
    assert parse_ptxas(PTXAS) == {
        "silu_mul": CLEAN,
        "paged_attention": Usage(registers=168, shared_nbytes=23072, stack_nbytes=104, spill_nbytes=272),
    }


@pytest.mark.parametrize("listing", [NVDISASM, CUOBJDUMP], ids=["nvdisasm", "cuobjdump"])
def test_instructions_are_read_by_kernel(listing: str) -> None:
    sass = parse_sass(listing)
    assert sorted(sass) == ["rms_norm", "silu_mul"]
    assert "LDG.E.128" in sass["silu_mul"]
    assert "STL" not in sass["silu_mul"]
    assert "STL" in sass["rms_norm"]


def test_a_kernel_as_wanted_has_no_problems() -> None:
    assert list(problems_of({"silu_mul": CLEAN}, parse_sass(NVDISASM))) == []


@pytest.mark.parametrize(
    ("name", "usage", "problem"),
    [
        ("silu_mul", Usage(26, 0, 104, 272), "silu_mul spills registers, 272 bytes"),
        ("silu_mul", Usage(26, 0, 8, 0), "silu_mul uses local memory, a stack frame of 8 bytes"),
        ("rms_norm", CLEAN, "rms_norm uses local memory"),
        ("rms_norm", CLEAN, "rms_norm has no instruction LDG"),
        ("other", CLEAN, "other is not in REQUIRED"),
    ],
)
def test_each_problem_is_named(name: str, usage: Usage, problem: str) -> None:
    problems = list(problems_of({name: usage}, parse_sass(NVDISASM)))
    assert any(found.startswith(problem) for found in problems), problems


def test_every_kernel_of_the_sources_has_requirements() -> None:
    text = "".join(path.read_text() for path in check_sass.CUDA.glob("*.cu"))
    for name in check_sass.REQUIRED:
        assert f" {name}(" in text
    assert len(check_sass.REQUIRED) == text.count('extern "C" __global__')


def test_missing_tools_are_named(tmp_path: Path) -> None:
    script = check_sass.__file__
    run = subprocess.run(
        [sys.executable, script], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert run.stderr.startswith("check-sass: no nvcc in $CUDA_HOME/bin or on PATH: install the CUDA toolkit")
