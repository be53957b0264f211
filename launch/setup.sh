#!/usr/bin/env bash
# Installs what Trireme needs and configures build/release.
#   launch/setup.sh            packages of the system, libtorch, configure
#   launch/setup.sh --tests    the Python packages of the tests as well
#   launch/setup.sh --remove   removes what it put into the folder of dependencies
# TRIREME_DEPS   folder of dependencies, shared by all clones (default ~/.cache/trireme)
# TRIREME_TORCH  a torch package folder that is there already: nothing is downloaded
# nvcc 13 comes from the PATH or /usr/local/cuda where it is there, else from PyPI.
set -euo pipefail
cd "$(dirname "$0")/.."

deps=${TRIREME_DEPS:-$HOME/.cache/trireme}
packages=(g++ cmake ninja-build python3-venv openmpi-bin libopenmpi-dev libhdf5-dev libboost-program-options-dev libboost-context-dev libgtest-dev
  nlohmann-json3-dev libpcre2-dev libxxhash-dev libutf8proc-dev pkg-config ccache git)
tests=OFF

say() { printf '%s\n' "$*" >&2; }
die() { say "setup: $*"; exit 1; }

usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' launch/setup.sh; }
[ $# -le 1 ] || { say "setup: one argument at most, found $#"; usage >&2; exit 2; }
case "${1:-}" in
  "") ;;
  -h | --help) usage; exit 0 ;;
  --tests) tests=ON ;;
  --remove)
    for lock in "$deps"/env-*.lock; do
      [ -e "$lock" ] || continue
      exec 9>"$lock"
      flock -n 9 || die "another setup is installing into ${lock%.lock}; wait for it, then run this again"
      rm -rf --one-file-system "${lock%.lock}" "$lock"
    done
    tokens=${TRIREME_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/trireme}/tokens # where the program keeps them
    rm -rf --one-file-system build "$tokens"
    rmdir "$(dirname "$tokens")" "$deps" 2>/dev/null || true
    say "removed libtorch and the Python packages from $deps, the token cache $tokens, and build/; the system's packages stay"
    exit 0 ;;
  *) say "setup: unknown argument '$1'"; usage >&2; exit 2 ;;
esac

build_jobs() { # one compiler process takes up to 2 GB
  local cores memory_gb
  cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
  memory_gb=$(awk '/MemAvailable/ {print int($2 / 1048576)}' /proc/meminfo)
  local jobs=$((memory_gb / 2 < cores ? memory_gb / 2 : cores))
  echo $((jobs > 0 ? jobs : 1))
}

missing_packages() {
  local p
  for p in "${packages[@]}"; do
    [ "$(dpkg-query -W -f '${Status}' "$p" 2>/dev/null)" = "install ok installed" ] || echo "$p"
  done
}

install_packages() {
  if ! command -v apt-get >/dev/null || [ "$(uname -m)" != x86_64 ]; then
    say "setup: this is not Debian or Ubuntu on x86-64; packages are left to you (modules, spack, ...), CMake says what is missing."
    return
  fi
  local missing
  missing=$(missing_packages)
  [ -n "$missing" ] || return 0
  check_memory
  local command="apt-get install -y --no-install-recommends $(echo $missing)"
  say "installing Debian packages: $(echo $missing)"
  if [ "$(id -u)" = 0 ]; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive $command >/dev/null
  elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
    local keep=--preserve-env=http_proxy,https_proxy,no_proxy
    sudo $keep apt-get update -qq && sudo $keep DEBIAN_FRONTEND=noninteractive $command >/dev/null
  else
    die "packages are missing and this user may not install them. Ask an administrator to run:
  apt-get update && $command"
  fi
}

check_disk() { # VARIABLE FOLDER GB
  mkdir -p "$2" || die "cannot write $2; set $1 to a folder that can be written"
  local free
  free=$(df -Pk "$2" | awk 'NR == 2 {print int($4 / 1048576)}')
  [ "$free" -ge "$3" ] || die "$2 has $free GB free, $3 GB are needed; set $1 to a folder on a larger disk"
}

# Measured: a build takes 0.9 GB, what ccache keeps of it 0.1 GB, the files of two tests at a time 2.9 GB.
check_build_disk() {
  local free built needed=1200 what="the build needs" scratch=${TMPDIR:-/tmp}
  if [ $tests = ON ]; then
    check_disk TMPDIR "$scratch" 3
    [ "$(stat -c %d .)" != "$(stat -c %d "$scratch")" ] || needed=4200 what="the build and its tests need"
  fi
  free=$(df -Pk . | awk 'NR == 2 {print int($4 / 1024)}')
  built=$([ ! -d build ] || du -sm build | cut -f1)
  needed=$((needed - ${built:-0}))
  [ "$free" -ge "$needed" ] || die "$PWD has $free MB free, $what $needed MB; make room there or clone to a larger disk"
}

check_memory() { # the largest compiler process needs 2 GB
  local free
  free=$(awk '/MemAvailable/ {print int($2 / 1024)}' /proc/meminfo)
  [ "$free" -ge 2000 ] || die "$free MB of memory are free, compiling needs 2,000 MB; end other programs or add swap"
}

# A virtual environment for each set of pins and each Python. A step is done when its marker exists; `.unfinished` tells
# that an install was interrupted, and then it is done again from nothing: pip cannot see a package that is half there.
install_wheels() {
  local version pins
  version=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])') ||
    die "python3 is missing; it fetches the pinned wheels (or set TRIREME_TORCH to the folder of a torch 2.11 package)"
  pins=$(cat launch/requirements*.txt <(echo "$version") | sha256sum | cut -c1-16)
  env_folder=$deps/env-$pins
  python=$env_folder/bin/python
  if [ -e "$env_folder/.torch" ] && [ -n "$(cuda_compiler)" ] && { [ $tests = OFF ] || [ -e "$env_folder/.tests" ]; }; then
    return
  fi
  mkdir -p "$deps" || die "cannot write $deps; set TRIREME_DEPS to a folder that can be written"
  exec 9>"$env_folder.lock"
  flock -n 9 || { say "waiting for another setup of $env_folder"; flock 9; }
  if [ -e "$env_folder" ] && { [ -e "$env_folder/.unfinished" ] || [ ! -e "$env_folder/.torch" ]; }; then
    say "an earlier install in $env_folder was interrupted; starting it again"
    rm -rf --one-file-system "$env_folder"
  fi
  check_memory
  if [ ! -e "$env_folder/.torch" ]; then
    check_python "$version" 3.10 3.11 3.12 3.13 3.14
    check_disk TRIREME_DEPS "$deps" 6 # what the wheels unpack to
    check_disk TMPDIR "${TMPDIR:-/tmp}" 3 # the wheels
    [ "$(stat -c %d "$deps")" != "$(stat -c %d "${TMPDIR:-/tmp}")" ] || check_disk TRIREME_DEPS "$deps" 9 # one disk for both
    python3 -m venv "$env_folder" || die "python3 -m venv failed (see above)"
    wheels "libtorch and the CUDA libraries (2 GB, 4.2 GB unpacked)" launch/requirements.txt .torch
  fi
  if [ -z "$(cuda_compiler)" ]; then
    wheels "the CUDA compiler (100 MB)" launch/requirements-cuda.txt .nvcc
    ln -sfn lib "$(echo "$env_folder"/lib/python3*/site-packages/nvidia/cu13)/lib64" # where nvcc looks for libraries
  fi
  if [ $tests = ON ] && [ ! -e "$env_folder/.tests" ]; then
    check_python "$version" 3.11 3.12 3.13
    check_disk TRIREME_DEPS "$deps" 3
    wheels "the Python packages of the tests" launch/requirements-test.txt .tests
  fi
  exec 9>&-
}

check_python() { # VERSION ALLOWED...
  case " ${*:2} " in *" $1 "*) return ;; esac
  die "the pinned wheels are for Python ${*:2}, this is $1; set TRIREME_TORCH to the folder of a torch 2.11 package"
}

wheels() { # WHAT FILE MARKER
  say "installing $1 into $env_folder"
  touch "$env_folder/.unfinished"
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --no-cache-dir -r "$2" ||
    die "pip could not install $2 (see above); check the network or the proxy (http_proxy, https_proxy) and run this again"
  sync "$env_folder"
  touch "$env_folder/$3"
  rm -f "$env_folder/.unfinished"
}

check_torch() { # a torch that was there before us
  [ -d "$torch/include/ATen" ] || die "TRIREME_TORCH=$torch is not a torch package folder (it has no include/ATen)"
  local found
  found=$(sed -n "s/^__version__ = '\([0-9.]*\).*/\1/p" "$torch/version.py" 2>/dev/null || true)
  case "$found" in
    2.11.*) ;;
    *) die "TRIREME_TORCH=$torch is torch '$found'; Trireme is built and tested with 2.11" ;;
  esac
}

# The nvcc of the system if it is of libtorch's CUDA major version, else the one from PyPI, else nothing.
cuda_compiler() {
  local found
  for found in "$(command -v nvcc || true)" /usr/local/cuda/bin/nvcc "${env_folder:-}"/lib/python3*/site-packages/nvidia/cu13/bin/nvcc; do
    [ -x "$found" ] && "$found" --version 2>/dev/null | grep -q 'release 13\.' && { echo "$found"; return; }
  done
  true
}

configure() {
  # A build that has its tests keeps them: going to and fro would compile everything anew.
  [ $tests = ON ] || ! grep -qxF "$torch $python ON $nvcc" build/release/.configured 2>/dev/null || tests=ON
  local wanted="$torch $python $tests $nvcc"
  [ -e build/release/build.ninja ] && [ "$(cat build/release/.configured 2>/dev/null)" = "$wanted" ] && return
  check_memory
  say "configuring build/release"
  mkdir -p build
  # CMake and ninja remember a compiler and headers that are gone, or another user's: a build for others is made anew.
  local before
  before=$(cat build/release/.configured 2>/dev/null) || true
  [ "${before%% *}" = "$torch" ] && [ "${before##* }" = "$nvcc" ] || rm -rf build/release
  cmake --preset release -DTRIREME_TORCH="$torch" -DTRIREME_PYTHON="$python" -DTRIREME_TESTS=$tests \
    -DTRIREME_CUDA=$([ -n "$nvcc" ] && echo ON || echo OFF) -DCMAKE_CUDA_COMPILER="$nvcc" >build/configure.log 2>&1 ||
    { cat build/configure.log >&2; die "CMake could not configure; what is missing is named above"; }
  echo "$wanted" >build/release/.configured
}

check_build_disk
install_packages
python="" torch=${TRIREME_TORCH:-}
if [ -n "$torch" ]; then
  check_torch
elif [ "$(uname -m)" = x86_64 ]; then
  install_wheels
  torch=$(echo "$env_folder"/lib/python3*/site-packages/torch)
else
  say "setup: the pinned wheels are for x86-64; here TRIREME_TORCH has to name the folder of a torch 2.11 package"
fi
[ -n "$python" ] || [ $tests = OFF ] || python=${TRIREME_PYTHON:-$(command -v python3)}
nvcc=$(cuda_compiler)
[ -n "$nvcc" ] || say "setup: no nvcc of CUDA 13 on the PATH; building for CPUs alone"
configure
build_jobs >build/release/.jobs
