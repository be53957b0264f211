"""The machine code of the kernels: what the gate in the build refuses, and which instructions are in the library."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

SOURCE = Path(os.environ.get("TRIREME_SOURCE", Path(__file__).parent.parent))
BUILD = Path(os.environ.get("TRIREME_BINARY", SOURCE / "build/release/trireme")).parent

spec = importlib.util.spec_from_file_location("gate", SOURCE / "kernels/gate.py")
gate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gate)

# As ptxas 13.0 says it, of kernels made to spill and to be serial.
CLEAN = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5cleanPf' for 'sm_80'
ptxas info    : Function properties for _Z5cleanPf
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 256 bytes cumulative stack size, 360 bytes cmem[0]
"""
SPILLED = """ptxas info    : Compiling entry function '_Z6spillsPf' for 'sm_80'
ptxas info    : Function properties for _Z6spillsPf
    256 bytes stack frame, 288 bytes spill stores, 312 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 256 bytes cumulative stack size, 360 bytes cmem[0]
"""
SERIAL = """ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored; unable to determine register count at entry.
ptxas info    : (C7519) warpgroup.arrive is injected in around line 45 by compiler to allow use of registers in GMMA in function '_Z6serialPfmm'
ptxas info    : (C7517) warpgroup.wait is injected in around line 39 by compiler to allow use of registers defined by GMMA in function '_Z6serialPfmm'
ptxas info    : (C7517) warpgroup.wait is injected in around line 43 by compiler to allow use of registers defined by GMMA in function '_Z6serialPfmm'
ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient register resources \
for the wgmma pipeline in the function '_Z6serialPfmm'
ptxas info    : Compiling entry function '_Z6serialPfmm' for 'sm_90a'
ptxas info    : Function properties for _Z6serialPfmm
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""


def judged(tmp_path, text, exceptions=""):
    table = tmp_path / "spills.txt"
    table.write_text(exceptions)
    return gate.judge(text, "x.cu", str(table))


def test_the_gate_lets_clean_kernels_pass(tmp_path):
    assert judged(tmp_path, CLEAN) == []


def test_the_gate_names_spills_with_bytes_kernel_and_architecture(tmp_path):
    (sentence,) = judged(tmp_path, CLEAN + SPILLED)
    assert sentence.startswith("x.cu: 600 bytes of registers are spilled in spills(float*) for sm_80; mend the kernel, or give the reason in ")


@pytest.mark.parametrize("number", ["C7510", "C7514", "C7520"])
def test_the_gate_knows_every_reason_of_serial_wgmma(tmp_path, number):
    (sentence,) = judged(tmp_path, CLEAN + f"ptxas info    : ({number}) Potential Performance Loss: wgmma.mma_async instructions are serialized in the function '_Z6serialPfmm'\n")
    assert number in sentence


def test_the_gate_names_serial_wgmma(tmp_path):
    sentences = judged(tmp_path, CLEAN + SERIAL)
    assert [s.split(":")[1].strip() for s in sentences] == ["C7508", "C7519", "C7517", "C7511"]
    assert "in serial(float*, unsigned long, unsigned long) for sm_90a" in sentences[3]


@pytest.mark.parametrize("line, passes", [
    ("x.cu | sm_80 | 600 | spills(float | tried", True),
    ("x.cu | sm_80 | 599 | spills(float | tried", False),
    ("x.cu | sm_90a | 600 | spills(float | tried", False),
    ("x.cu | sm_80 | 600 | other(float | tried", False),
    ("y.cu | sm_80 | 600 | spills(float | tried", False),
])
def test_an_exception_fits_its_file_architecture_and_bytes(tmp_path, line, passes):
    wrong = judged(tmp_path, SPILLED, line)
    assert any("600 bytes" in sentence for sentence in wrong) != passes


def test_an_exception_of_serial_wgmma_fits_its_number(tmp_path):
    sentences = judged(tmp_path, SERIAL, "x.cu | sm_90a | C7517 | serial( | tried\n")
    assert len(sentences) == 3 and not any("C7517" in s for s in sentences)


def test_an_exception_that_is_not_needed_is_wrong(tmp_path):
    (sentence,) = judged(tmp_path, CLEAN, "# a remark\nx.cu | sm_80 | 600 | clean | tried\ny.cu | sm_80 | 8 | z | of another file\n")
    assert sentence.endswith("spills.txt:2: nothing in x.cu needs this exception any more")


@pytest.mark.parametrize("line", ["x.cu | sm_80 | 600 | spills", "x.cu | sm_80 | 600 | spills | ", "x.cu | sm_80 | many | spills | tried"])
def test_an_exception_needs_all_its_parts(tmp_path, line):
    with pytest.raises(SystemExit, match="spills.txt:1: not SOURCE"):
        judged(tmp_path, CLEAN, line)


def test_the_table_names_files_that_exist():
    for line in (SOURCE / "kernels/spills.txt").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            assert (SOURCE / "kernels" / line.split("|")[0].strip()).exists(), line


def test_the_gate_fails_the_build_and_leaves_no_object(tmp_path):
    """Run as the launcher, before a compiler that says what ptxas said."""
    said, compiler, out = tmp_path / "said", tmp_path / "compiler", tmp_path / "x.o"
    compiler.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/arguments\n: >{out}\ncat {said} >&2\n')
    compiler.chmod(0o755)
    for text, status in ((CLEAN, 0), (SPILLED, 1)):
        said.write_text(text + "x.cu(3): warning: a warning\n")
        run = subprocess.run([sys.executable, SOURCE / "kernels/gate.py", compiler, "-c", "x.cu", "-o", out], capture_output=True, text=True)
        assert (run.returncode, out.exists()) == (status, status == 0), run.stderr
        assert "a warning" in run.stderr and "Used 32" not in run.stderr
        assert "-Xptxas=-v" in (tmp_path / "arguments").read_text()


# What is written in a kernel, and what must stand in the machine code then.
STORES = {store: r"STG\.E\.128" for store in ("store_values<", "store_part<", "write_rows<")}
INSTRUCTIONS = {
    "sm_80": {"arch::mma<": "HMMA", "arch::copy_async(": "LDGSTS", **STORES},
    "sm_90a": {"arch::group_mma<": "HGMMA", "arch::tile_load(": "UTMALDG", ".write_rows(": r"STG\.E\.128", **STORES},
}


def disassembler():
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    places = [os.path.dirname(nvcc), Path(sysconfig.get_path("purelib")) / "nvidia/cu13/bin", os.environ.get("TRIREME_CUDA_TOOLS", "")]
    path = os.pathsep.join([*map(str, places), os.environ["PATH"]])
    if not shutil.which("cuobjdump", path=path) or not shutil.which("nvdisasm", path=path):
        pytest.skip("cuobjdump and nvdisasm are neither in the CUDA toolkit nor installed from PyPI; set TRIREME_CUDA_TOOLS to their folder")
    return {**os.environ, "PATH": path}


def written_in(source):
    """The text of a kernel's file and of the headers that belong to it."""
    text = source.read_text()
    for header in re.findall(r'#include "((?:kernels/)?(?!arch)\w+\.h)"', text):
        text += next(p for p in (SOURCE / header, source.parent / header) if p.exists()).read_text()
    return text


@pytest.mark.parametrize("library, folder", [("libkernels.a", "kernels"), ("tests/libhopper_gemm.a", "tests")])
def test_libraries_have_the_instructions_that_their_kernels_are_written_with(tmp_path, library, folder):
    library = BUILD / library
    if not library.exists() or b".nv_fatbin" not in library.read_bytes():
        pytest.skip(f"{library} is not there or holds no machine code: built without CUDA")
    env = disassembler()
    subprocess.run(["ar", "x", library], cwd=tmp_path, check=True)
    kernels = 0
    for source in sorted((SOURCE / folder).glob("*.cu")):
        written, object_file = written_in(source), tmp_path / f"{source.name}.o"
        for arch, instructions in INSTRUCTIONS.items():
            code = subprocess.run(["cuobjdump", "-sass", "-arch", arch, object_file], env=env, capture_output=True, text=True)
            assert code.returncode == 0, code.stderr
            functions = code.stdout.split("Function : ")[1:]
            kernels += len(functions)
            for function in functions:  # never an empty kernel in place of one that does not fit
                assert re.search(r"\b(STG?|REDG?|ATOMG?|UTMASTG|UTMAREDG|UBLKCP|UBLKRED|BPT\.TRAP)\b", function), f"writes nothing: {function[:200]}"
            for written_as, instruction in instructions.items():
                if written_as in written and (arch == "sm_90a" or "kHopper" not in written):
                    assert re.search(rf"\b{instruction}\b", code.stdout), f"{source.name} has {written_as} but no {instruction} for {arch}"
    assert kernels > 3
