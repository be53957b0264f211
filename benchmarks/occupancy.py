"""How many blocks of the attention and adapter kernels a multiprocessor holds, from what the compiler used: no GPU is needed.

  benchmarks/occupancy.py [BUILD [LAUNCHES]] >benchmarks/results/occupancy.md

BUILD (build/release) is a build with CUDA and tests. Registers are read from its machine code by cuobjdump (the toolkit's, that of the
tests' Python, or TRIREME_CUDA_TOOLS); threads and shared memory from launches in the emulation, where the same source runs: LAUNCHES is
a file that TRIREME_LAUNCHES=LAUNCHES had tests write, else those of TESTS are run, which takes minutes. Blocks are arithmetic on the limits of a
multiprocessor ("Compute Capabilities", CUDA C++ Programming Guide); they say what can run at once, not how fast it runs."""
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile

SOURCE = pathlib.Path(__file__).resolve().parent.parent
SOURCES = ["attention_forward", "attention_forward_hopper", "attention_backward", "attention_backward_hopper", "decode_attention", "lora"]
TESTS = ["emulated_attention_test", "emulated_lora_test"]
DTYPE = "bf16"  # those of fp16 are the same source
REGISTERS, THREADS, BLOCKS, GRANULE, WARP_GRANULE, RESERVED = 65536, 2048, 32, 256, 4, 1024
SHARED = {"sm_80": 164 << 10, "sm_90a": 228 << 10}  # of a multiprocessor of A100, of H100 and H200


def blocks_together(arch, registers, threads, shared_bytes):
    """(blocks of one kernel that a multiprocessor holds at once, what limits them)"""
    warps = threads // 32
    of_warp = -(-registers * 32 // GRANULE) * GRANULE  # are given out in granules
    limits = {"registers": REGISTERS // of_warp // WARP_GRANULE * WARP_GRANULE // warps, "shared memory": SHARED[arch] // (shared_bytes + RESERVED),
              "threads": THREADS // threads, "blocks": BLOCKS}
    least = min(limits.values())
    return least, " and ".join(name for name, limit in limits.items() if limit == least)


def kernel_name(text, template):
    """Of arch::TEMPLATE<NAME>(...) the name, the same in machine code and in the emulation."""
    begin = text.index(template + "<") + len(template) + 1
    end, depth = begin, 1
    while depth:
        depth += {"<": 1, ">": -1}.get(text[end], 0)
        end += 1
    name = text[begin:end - 1].strip()
    name = re.sub(r"trireme::kernels::(cuda|emulated)::|\(anonymous namespace\)::|arch::", "", name)
    name = name.replace("c10::BFloat16", "bf16").replace("__nv_bfloat16", "bf16").replace("c10::Half", "fp16").replace("__half", "fp16")
    return re.sub(r"\s+>", ">", name)


def registers_of(listing):
    """{name: registers} from cuobjdump -res-usage, demangled."""
    return {kernel_name(function, "entry"): int(used) for function, used in re.findall(r"Function (.*entry<.*):\n\s*REG:(\d+)", listing)}


def launches_of(text):
    """{name: {(threads, bytes of shared memory)}}"""
    launches = {}
    for line in text.splitlines():
        threads, shared_bytes, launched = line.split(" ", 2)
        launches.setdefault(kernel_name(launched, "launch"), set()).add((int(threads), int(shared_bytes)))
    return launches


def table(usage, launches):
    """usage: {(source, arch): {name: registers}}"""
    rows = {}  # by what is said of launches: the shared memory of those of which the same is said
    for source, name in dict.fromkeys((source, name) for (source, _), kernels in usage.items() for name in sorted(kernels) if DTYPE in name):
        if name not in launches:
            sys.exit(f"occupancy: {source}.cu has {name}, but no launch of it is in the launches; run more tests with TRIREME_LAUNCHES")
        for threads, shared_bytes in sorted(launches[name]):
            if shared_bytes == 0:  # no tiles: these move memory
                continue
            found = []
            for arch in SHARED:
                registers = usage.get((source, arch), {}).get(name)
                traps = "Hopper" in name and arch != "sm_90a"
                found += ["", "", ""] if registers is None or traps else [registers, *blocks_together(arch, registers, threads, shared_bytes)]
            rows.setdefault((f"{source}.cu", f"`{name.removeprefix('attention::')}`", threads, *found), []).append(f"{shared_bytes:,}")
    lines = ["| source | kernel | threads | shared memory | " + " | ".join(f"{arch}: registers | blocks | limited by" for arch in SHARED) + " |", "|---|---|---:|---:|" + "---:|---:|---|" * len(SHARED)]
    for (source, name, threads, *found), shared in rows.items():
        lines.append("| " + " | ".join(map(str, [source, name, threads, shared[0] if len(shared) == 1 else f"{shared[0]} to {shared[-1]}", *found])) + " |")
    return "\n".join(lines)


def main(build, launches):
    tools = os.pathsep.join(filter(None, [os.environ.get("TRIREME_CUDA_TOOLS"), str(pathlib.Path(sysconfig.get_path("purelib")) / "nvidia/cu13/bin"), os.environ["PATH"], "/usr/local/cuda/bin"]))
    if not shutil.which("cuobjdump", path=tools):
        sys.exit("occupancy: there is no cuobjdump; set TRIREME_CUDA_TOOLS to its folder, or run with the Python of a build with tests")
    if not (build / "libkernels.a").exists():
        sys.exit(f"occupancy: {build}/libkernels.a is not there; build with CUDA and tests (launch/setup.sh --tests), or name the build's folder")
    with tempfile.TemporaryDirectory() as folder:
        if launches is None:
            launches = pathlib.Path(folder) / "launches"
            for test in TESTS:
                subprocess.run([build / test], env={**os.environ, "TRIREME_LAUNCHES": str(launches)}, stdout=subprocess.DEVNULL, check=True)
        subprocess.run(["ar", "x", (build / "libkernels.a").resolve()], cwd=folder, check=True)
        usage = {}
        for source in SOURCES:
            for arch in SHARED:
                listing = subprocess.run(["cuobjdump", "-res-usage", "-arch", arch, f"{folder}/{source}.cu.o"], env={**os.environ, "PATH": tools}, capture_output=True, text=True, check=True)
                usage[source, arch] = registers_of(subprocess.run(["c++filt"], input=listing.stdout + listing.stderr, capture_output=True, text=True, check=True).stdout)
        rows = table(usage, launches_of(pathlib.Path(launches).read_text()))
    commit = subprocess.run(["git", "-C", SOURCE, "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    print("Blocks of the kernels with tiles that a multiprocessor holds at once (sm_80: A100, sm_90a: H100, H200), by `benchmarks/occupancy.py`: arithmetic on the\n"
          "registers that the compiler used and the shared memory that launches ask for, no measurement. Kernels with `Hopper` in their name are for sm_90a alone;\n"
          "they give registers of the warps that load to those that compute (setmaxnreg), so theirs is the mean. What is spilled stands in\n"
          f"kernels/spills.txt. Of {DTYPE}; commit {commit}.\n\n" + rows)


if __name__ == "__main__":
    words = [pathlib.Path(word) for word in sys.argv[1:]]
    main(words[0] if words else SOURCE / "build/release", words[1] if len(words) > 1 else None)
