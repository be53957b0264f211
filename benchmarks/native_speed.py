"""Runs the C++ benchmarks (built with -DTRIREME_BENCHMARKS=ON) that are about checkpoints and loading, and
keeps what they say as one result. FOLDER is on the disk to be measured."""
import argparse
import json
import pathlib
import tempfile

import measure

BUILD = pathlib.Path(measure.BINARY).resolve().parent


def report(name, *arguments, ranks=0):
    command = [str(BUILD / f"bench_{name}"), *map(str, arguments)]
    return json.loads(measure.run(measure.mpirun(ranks, *command) if ranks else command)["stdout"])


def checkpoint(folder):
    result = report("checkpoint_stall", folder, 128, ranks=2)
    return [measure.row("checkpoint holds up the step", f"2 ranks, {result['bytes_a_rank'] / 1e6:.0f} MB a rank", "s",
                        result["held_up_seconds"], result["waited_for_seconds"], "waiting for the whole save")]


def loading(folder, gigabytes):
    result = report("load_speed", folder, gigabytes)
    shape = f"safetensors of {result['file_bytes'] / 1e9:.1f} GB, bf16"
    speeds = result["gigabytes_per_second"]
    return [measure.row("loading a model", f"{shape}, page cache warm", "GB/s", speeds["load"], speeds["read"],
                        "reading the file into memory", result["load_over_read"], 0.8),
            measure.row("loading a model", f"{shape}, from the disk", "GB/s", speeds["cold_load"], speeds["cold_scan"],
                        "reading the file and keeping nothing", result["cold_load_over_cold_scan"], 0.8),
            measure.row("loading a model", f"{shape}, page cache warm", "GB/s", speeds["load"], speeds["scan"],
                        "reading the file and keeping nothing", result["load_over_scan"]),
            measure.row("memory beside the model while loading", f"{shape}, into bf16 and fp32 weights", "MB",
                        result["memory_beside_the_model_bytes"] / 1e6, result["largest_tensor_bytes"] / 1e6,
                        "the largest tensor", target=1)]


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("folder", nargs="?", default=tempfile.gettempdir())
    arguments.add_argument("--gigabytes", type=float, default=1)
    arguments.add_argument("--print", action="store_true", help="write no result file")
    options = arguments.parse_args()
    rows = checkpoint(options.folder) + loading(options.folder, options.gigabytes)
    measure.finish("native_speed", rows, "medians of 7 (checkpoint) and 9 (loading)", not options.print)


if __name__ == "__main__":
    main()
