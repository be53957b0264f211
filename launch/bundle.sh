#!/usr/bin/env bash
# Packs the build into one file that runs on machines without its packages and without a network:  launch/bundle.sh [FILE]
# FILE (build/trireme.run) holds the program, the tests and benchmarks for GPUs and what they need of Debian's libraries, Open MPI
# among them; a machine with GPUs has libtorch and CUDA of its own. There, as any user:
#   sh trireme.run FOLDER
#   export TRIREME_TORCH=$(python3 -c 'import torch; print(torch.__path__[0])')
#   FOLDER/bin/trireme doctor
#   FOLDER/bin/mpirun --bind-to none -n 8 FOLDER/bin/trireme train CONFIG.ini
# It wants x86-64 and a glibc and libstdc++ no older than this machine's. Networks between hosts are used over TCP: the drivers
# of faster ones are their machines' own.
set -euo pipefail
cd "$(dirname "$0")/.."
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' launch/bundle.sh; }
case "${1:-}" in
  -h | --help) usage; exit 0 ;;
  -*) echo "bundle: unknown argument '$1'" >&2; usage >&2; exit 2 ;;
esac
die() { echo "bundle: $1" >&2; exit 2; }
build=${TRIREME_BUILD:-build/release} file=${1:-build/trireme.run}
[ -x "$build/trireme" ] || die "$build/trireme is not there; build it first: launch/quickstart.sh, or launch/setup.sh --tests and cmake --build build/release"
for tool in ldd strip xz tar; do command -v $tool >/dev/null || die "$tool is missing; apt-get install binutils xz-utils"; done
[ -d "$(dirname "$file")" ] || die "the folder of $file does not exist"

work=$(mktemp -d "${TMPDIR:-/tmp}/bundle.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT
root=$work/root
mkdir -p "$root"/{bin,programs,lib,benchmarks,openmpi/etc}

# Libraries that `$1` needs, by path; those of the C and C++ compilers' run time, CUDA's and libtorch's are the target's own.
libraries_of() {
  local missing found
  found=$(env -u LD_LIBRARY_PATH ldd "$1")
  missing=$(sed -n 's/^\t\(\S*\) => not found$/\1/p' <<<"$found" | grep -vE '^lib(torch|c10)' || true)
  [ -z "$missing" ] || die "$1 needs ${missing//$'\n'/, }, which this machine does not have"
  sed -n 's/^\t\S* => \(\/.*\) (0x.*/\1/p' <<<"$found" | grep -vE "^$torch/|/nvidia/|/(ld-linux|lib(c|m|rt|dl|pthread|util|resolv|stdc\+\+|gcc_s))[-.][^/]*$" || true
}
add_program() { # FILE NAME
  strip -o "$root/programs/$2" "$1"
  ln -s ../start "$root/bin/$2"
}

torch=$(ldd "$build/trireme" | sed -n 's|.* => \(/.*\)/lib/libtorch_cpu.so .*|\1|p')
[ -e "$torch/version.py" ] || die "the libtorch that $build/trireme was built with is gone (see ldd $build/trireme)"
sed -n "s/^__version__ = '\([0-9]*\.[0-9]*\).*/\1/p" "$torch/version.py" >"$root/TORCH"

add_program "$build/trireme" trireme
left_out=""
for name in device_kernels_test kernels_test attention_torch_test nccl_gpu_mpi_test bench_gpu_kernels; do
  if [ -x "$build/$name" ]; then add_program "$build/$name" $name; else left_out+=" $name"; fi
done
[ -z "$left_out" ] || echo "bundle: without what is not built:$left_out (launch/setup.sh --tests)" >&2

# Open MPI: what it starts, what it loads at run time and what it prints. Its components for other networks need drivers.
mpirun=$(readlink -f "$(command -v mpirun || true)")
orted=$(command -v orted || true)
command -v ompi_info >/dev/null && [ -x "$mpirun" ] && [ -x "$orted" ] || die "mpirun, orted or ompi_info of Open MPI is missing; apt-get install openmpi-bin"
path_of() { ompi_info --parsable --path "$1" | cut -d: -f3; }
add_program "$mpirun" mpirun
add_program "$orted" orted
mkdir "$root/openmpi/bin"
ln -s ../../start "$root/openmpi/bin/orted" # where a program looks for it that starts MPI without mpirun
prefix=$(path_of prefix) components=$(path_of pkglibdir) help=$(path_of pkgdatadir)
mkdir -p "$root/openmpi/${components#"$prefix"/}" "$root/openmpi/${help#"$prefix"/}"
for component in "$components"/mca_*.so; do
  case $(env -u LD_LIBRARY_PATH ldd "$component") in
    *libucp.so* | *libfabric.so* | *libpsm* | *libibverbs.so* | *liboshmem.so*) ;;
    *) cp "$component" "$root/openmpi/${components#"$prefix"/}/" ;;
  esac
done
cp "$help"/help-*.txt "$root/openmpi/${help#"$prefix"/}/"
# Without ssh mpirun would not start even ranks of this machine.
printf 'btl_base_warn_component_unused = 0\nplm_rsh_agent = ssh : rsh : false\n' >"$root/openmpi/etc/openmpi-mca-params.conf"
: >"$root/openmpi/etc/openmpi-default-hostfile"

# A libtorch may come without OpenMP's run time; where it has one, that is found first.
{
  for file_of in "$root"/programs/* "$root/openmpi/${components#"$prefix"/}"/*.so; do libraries_of "$file_of"; done
  ldconfig -p | sed -n 's/.*x86-64.* => \(.*\/libgomp.so.1\)$/\1/p'
} | sort -u >"$work/libraries"
while read -r library; do cp -L "$library" "$root/lib/"; done <"$work/libraries"

cp launch/bundle_start "$root/start"
cp -r configs "$root/"
cp benchmarks/gpu* benchmarks/table.py "$root/benchmarks/"
{ git describe --always --dirty 2>/dev/null || echo unknown; } >"$root/COMMIT"

# One file: this head, xz with its library (a bare machine has gzip alone), and the rest.
mkdir "$work/xz"
cp "$(command -v xz)" "$(libraries_of "$(command -v xz)" | grep liblzma)" "$work/xz/"
tar -C "$work/xz" -czf "$work/xz.tar.gz" .
# By name and by size, so that what programs have in common stands within the window.
tar -C "$root" --sort=name --owner=0 --group=0 -cf - . | xz -T1 --lzma2=preset=2,dict=128MiB >"$work/all.tar.xz"
head_of() { # OFFSET of xz, of the rest, size of all
  cat <<END
#!/bin/sh
# Trireme $(cat "$root/COMMIT"), with the libraries that it needs:  sh $(basename "$file") FOLDER
[ \$# = 1 ] || { echo "usage: sh \$0 FOLDER" >&2; exit 2; }
fail() { echo "\$0: \$1" >&2; exit 2; }
[ "\$(uname -m)" = $(uname -m) ] || fail "this is for $(uname -m), and the machine is \$(uname -m)"
[ "\$(wc -c <"\$0")" -eq $3 ] || fail "this file has \$(wc -c <"\$0") bytes of $3; copy it again"
[ -z "\$(ls -A "\$1" 2>/dev/null)" ] || fail "\$1 is there already; give a new folder"
mkdir -p "\$1/.xz" && tail -c +$1 "\$0" | head -c $(stat -c %s "$work/xz.tar.gz") | tar -C "\$1/.xz" -xzf - &&
  tail -c +$2 "\$0" | LD_LIBRARY_PATH="\$1/.xz" "\$1/.xz/xz" -dc | tar -C "\$1" -xof - || fail "could not unpack into \$1"
rm -r "\$1/.xz"
echo "unpacked; now: export TRIREME_TORCH=/path/to/torch, then \$1/bin/trireme doctor"
exit
END
}
pad() { printf '%09d' "$1"; }
size=$(head_of "$(pad 0)" "$(pad 0)" "$(pad 0)" | wc -c)
second=$((size + $(stat -c %s "$work/xz.tar.gz")))
{ head_of "$(pad $((size + 1)))" "$(pad $((second + 1)))" "$(pad $((second + $(stat -c %s "$work/all.tar.xz"))))"; cat "$work/xz.tar.gz" "$work/all.tar.xz"; } >"$file.part"
chmod +x "$file.part"
mv "$file.part" "$file"
echo "$file: $(stat -c %s "$file") bytes, $(ls "$root/bin" | wc -l) programs, $(wc -l <"$work/libraries") libraries"
