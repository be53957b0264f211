"""benchmarks/occupancy.py: its arithmetic, and that it finds the kernels of a build."""
import importlib.util
import os
import shutil
from pathlib import Path

import pytest

from machine_code_test import BUILD, SOURCE, disassembler

spec = importlib.util.spec_from_file_location("occupancy", SOURCE / "benchmarks/occupancy.py")
occupancy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(occupancy)

IN_MACHINE_CODE = "void trireme::kernels::cuda::arch::entry<trireme::kernels::cuda::(anonymous namespace)::Down<__nv_bfloat16, 16, 2> >(trireme::kernels::cuda::(anonymous namespace)::Down<__nv_bfloat16, 16, 2>::Params)"
LAUNCHED = "trireme::kernels::emulated::arch::launch<trireme::kernels::emulated::(anonymous namespace)::Down<trireme::kernels::emulated::arch::bf16, 16, 2> >(trireme::kernels::emulated::arch::Index3 const&, int)::{lambda()#1}"


@pytest.mark.parametrize("arch, registers, threads, shared_bytes, expected", [
    ("sm_80", 255, 128, 0, (2, "registers")),
    ("sm_80", 40, 96, 0, (16, "registers")),  # of 51 warps whole fours: 48
    ("sm_80", 33, 256, 0, (6, "registers")),  # as 40
    ("sm_80", 32, 1024, 0, (2, "registers and threads")),
    ("sm_80", 16, 32, 0, (32, "blocks")),
    ("sm_80", 64, 128, 81 << 10, (2, "shared memory")),  # and a KiB of the system's each: all of it
    ("sm_80", 64, 128, (81 << 10) + 1, (1, "shared memory")),
    ("sm_90a", 64, 128, (81 << 10) + 1, (2, "shared memory")),
    ("sm_90a", 168, 384, 200 << 10, (1, "registers and shared memory")),
])
def test_blocks_are_those_of_the_limits(arch, registers, threads, shared_bytes, expected):
    assert occupancy.blocks_together(arch, registers, threads, shared_bytes) == expected


def test_a_kernel_has_one_name():
    assert occupancy.kernel_name(IN_MACHINE_CODE, "entry") == occupancy.kernel_name(LAUNCHED, "launch") == "Down<bf16, 16, 2>"


def test_a_kernel_that_was_not_launched_is_named():
    usage = {("lora", "sm_80"): occupancy.registers_of(f" Function {IN_MACHINE_CODE}:\n  REG:80 STACK:0 SHARED:0\n")}
    assert occupancy.table(usage, occupancy.launches_of(f"128 66560 {LAUNCHED}\n128 65536 {LAUNCHED}\n128 0 {LAUNCHED}\n")).splitlines()[-1] == "| lora.cu | `Down<bf16, 16, 2>` | 128 | 65,536 to 66,560 | 80 | 2 | shared memory |  |  |  |"
    with pytest.raises(SystemExit, match=r"lora.cu has Down<bf16, 16, 2>, but no launch of it"):
        occupancy.table(usage, {})


def test_kernels_of_a_build_are_found(monkeypatch, capsys):
    if not (BUILD / "libkernels.a").exists() or b".nv_fatbin" not in (BUILD / "libkernels.a").read_bytes():
        pytest.skip("libkernels.a is not there or holds no machine code: built without CUDA")
    monkeypatch.setenv("TRIREME_CUDA_TOOLS", os.path.dirname(shutil.which("cuobjdump", path=disassembler()["PATH"])))
    monkeypatch.setattr(occupancy, "SOURCES", ["lora"])
    monkeypatch.setattr(occupancy, "TESTS", ["emulated_lora_test"])
    occupancy.main(BUILD, None)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| lora.cu | ")]
    assert {row.split("|")[2].strip(" `").split("<")[0] for row in rows} == {"Down", "Slice", "Up"}
    assert all(int(row.split("|")[place]) > 20 for row in rows for place in (5, 8)), rows  # registers


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(SystemExit, match="libkernels.a is not there; build with CUDA and tests"):
        occupancy.main(tmp_path, None)
