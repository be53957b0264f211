"""launch/bundle.sh: one file that unpacks anywhere and runs with a given libtorch and no other library of this machine than those of
the C and C++ compilers."""
import json
import os
import pathlib
import re
import shutil
import subprocess

import pytest
from program import BINARY, SOURCE

# The target has them: glibc, libstdc++ and libgcc.
RUN_TIME = re.compile(r"(ld-linux.*|lib(c|m|rt|dl|pthread|util|resolv|stdc\+\+|gcc_s))\.so\.\d+")
BUILD = pathlib.Path(BINARY).parent


def torch_folder():
    found = subprocess.run(["ldd", BINARY], text=True, capture_output=True, check=True).stdout
    return re.search(r"=> (/.*)/lib/libtorch_cpu.so ", found).group(1)


def call(words, cwd, **env):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TRIREME_", "OMPI_", "OPAL_", "PMIX_", "LD_"))}
    return subprocess.run(list(map(str, words)), cwd=cwd, text=True, capture_output=True, timeout=120, stdin=subprocess.DEVNULL,
                          env=clean | {"OMP_NUM_THREADS": "1", "TRIREME_CACHE": str(cwd)} | {name: str(value) for name, value in env.items()})


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    file = tmp_path_factory.mktemp("packed") / "trireme.run"
    done = call([SOURCE / "launch/bundle.sh", file], file.parent, TRIREME_BUILD=BUILD)
    assert done.returncode == 0, done.stderr
    return file


@pytest.fixture(scope="module")
def bundle(packed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("un packed") / "the bundle"
    done = call(["sh", packed, folder], packed.parent)
    assert done.returncode == 0, done.stderr
    return folder


def test_is_one_small_file(packed):
    assert packed.stat().st_size < 40 << 20
    assert [path.name for path in packed.parent.iterdir()] == [packed.name]


def test_holds_every_library_that_anything_in_it_needs(bundle):
    have = {path.name for path in (bundle / "lib").iterdir()} | {path.name for path in pathlib.Path(torch_folder(), "lib").iterdir()}
    checked = 0
    for path in bundle.rglob("*"):
        if path.is_symlink() or not path.is_file() or path.read_bytes()[:4] != b"\x7fELF":
            continue
        found = subprocess.run(["readelf", "-d", path], text=True, capture_output=True, check=True).stdout
        for name in re.findall(r"\(NEEDED\).*\[(.*)\]", found):
            assert name in have or RUN_TIME.fullmatch(name), f"{path.name} needs {name}"
        checked += 1
    assert checked > 100  # Open MPI's components too
    assert not any(name.startswith(("libtorch", "libc10", "libcuda", "libstdc++")) for name in os.listdir(bundle / "lib"))


@pytest.mark.parametrize("ranks", [0, 2], ids=["alone", "under its own mpirun"])
def test_trains_with_no_library_of_this_machine(bundle, tmp_path, ranks):
    (tmp_path / "bin").mkdir()
    for tool in ("sh", "dirname", "readlink", "sed", "cat", "id", "false"):  # a bare machine: no Open MPI, no ssh
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    data = bundle / "configs/quickstart"
    words = [bundle / "bin/trireme", "train", bundle / "configs/quickstart.ini", f"--run.dir={tmp_path}/run", "--train.steps=2",
             f"--data.train={data}/train.jsonl:8", f"--data.eval={data}/eval.jsonl:4", f"--model.config={data}/model/config.json"]
    if ranks:
        words = [bundle / "bin/mpirun", "--bind-to", "none", "--oversubscribe", "-n", ranks, *words]
    done = call(words, tmp_path, TRIREME_TORCH=torch_folder(), PATH=tmp_path / "bin", LD_DEBUG="libs", LD_DEBUG_OUTPUT=tmp_path / "libs")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2]
    loaded = {path for log in tmp_path.glob("libs.*") for path in re.findall(r"calling init: (/.*)", log.read_text())}
    assert sum("/mca_btl_vader.so" in path for path in loaded) == (ranks > 0)
    ours = (str(bundle), str(pathlib.Path(torch_folder()).parent))
    # What tools of scripts load (sed, id), and components of a PMIx of the system, are no part of it.
    strange = {path for path in loaded if not path.startswith(ours) and not RUN_TIME.fullmatch(path.rsplit("/")[-1])}
    assert {path for path in strange if not re.search(r"/pmix_mca_|lib(selinux|acl|attr|pcre2-8|tinfo)\.so", path)} == set()


def test_starts_mpi_without_mpirun(bundle, tmp_path):
    """As a test program does; Open MPI starts its daemon for that, which lies in the bundle."""
    done = call([bundle / "bin/nccl_gpu_mpi_test"], tmp_path, TRIREME_TORCH=torch_folder())
    assert "[==========] " in done.stdout, done.stdout + done.stderr


def test_prints_what_open_mpi_says(bundle, tmp_path):
    done = call([bundle / "bin/mpirun", "-n", "1", "no-such-program"], tmp_path)
    assert done.returncode != 0
    assert "unable to find the specified executable" in done.stderr, done.stderr  # of its help files


def test_says_what_is_wrong_with_the_torch_folder(bundle, tmp_path):
    trireme = bundle / "bin/trireme"
    version = (bundle / "TORCH").read_text().strip()
    none = call([trireme, "--version"], tmp_path)
    assert none.returncode == 2
    assert none.stderr.startswith(f"trireme: TRIREME_TORCH has to name the folder of a torch {version} package: export TRIREME_TORCH=")
    wrong = call([trireme, "--version"], tmp_path, TRIREME_TORCH=tmp_path)
    assert (wrong.returncode, wrong.stderr) == (2, f"trireme: TRIREME_TORCH={tmp_path} is not the folder of a torch package (it has no lib/libtorch_cpu.so)\n")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libtorch_cpu.so").touch()
    (tmp_path / "version.py").write_text("__version__ = '1.9.0+cu130'\n")
    old = call([trireme, "--version"], tmp_path, TRIREME_TORCH=tmp_path)
    assert (old.returncode, old.stderr) == (2, f"trireme: TRIREME_TORCH={tmp_path} is torch 1.9, and this was built with {version}\n")


def test_refuses_to_unpack_half_a_file_or_over_another(packed, bundle, tmp_path):
    half = tmp_path / "half.run"
    half.write_bytes(packed.read_bytes()[:1 << 20])
    done = call(["sh", half, tmp_path / "new"], tmp_path)
    assert (done.returncode, done.stderr) == (2, f"{half}: this file has 1048576 bytes of {packed.stat().st_size:09d}; copy it again\n")
    done = call(["sh", packed, bundle], tmp_path)
    assert (done.returncode, done.stderr) == (2, f"{packed}: {bundle} is there already; give a new folder\n")
    assert call(["sh", packed], tmp_path).stderr == f"usage: sh {packed} FOLDER\n"


def test_says_what_it_cannot_pack(tmp_path):
    script = SOURCE / "launch/bundle.sh"
    done = call([script, tmp_path / "x.run"], tmp_path, TRIREME_BUILD=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"bundle: {tmp_path}/trireme is not there; build it first: ")
    done = call([script, "--fast"], tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("bundle: unknown argument '--fast'\n")
    (tmp_path / "bin").mkdir()
    lost = tmp_path / "bin/ldd"
    lost.write_text(f"#!/bin/sh\n{shutil.which('ldd')} \"$@\" | sed 's/\\(libhdf5.*\\) => .*/\\1 => not found/'\n")
    lost.chmod(0o755)
    done = call([script, tmp_path / "x.run"], tmp_path, TRIREME_BUILD=BUILD, PATH=f"{lost.parent}:{os.environ['PATH']}")
    assert done.returncode == 2
    assert re.search(r"^bundle: .*/programs/\S+ needs libhdf5\S*, which this machine does not have$", done.stderr, re.M), done.stderr
    assert not (tmp_path / "x.run").exists()
