#!/usr/bin/env bash
# Installs what Trireme needs and configures build/release.
#   launch/setup.sh            packages of the system, libtorch, configure
#   launch/setup.sh --tests    the Python packages of the tests as well
#   launch/setup.sh --remove   removes what it put into the folder of dependencies
# TRIREME_DEPS   folder of dependencies, shared by all clones (default ~/.cache/trireme)
# TRIREME_TORCH  a torch package folder that is there already: nothing is downloaded
set -euo pipefail
cd "$(dirname "$0")/.."

deps=${TRIREME_DEPS:-$HOME/.cache/trireme}
packages=(g++ cmake ninja-build python3-venv openmpi-bin libopenmpi-dev libhdf5-dev libboost-program-options-dev libgtest-dev
  nlohmann-json3-dev libpcre2-dev libxxhash-dev libutf8proc-dev pkg-config ccache git)
tests=OFF

say() { printf '%s\n' "$*" >&2; }
die() { say "setup: $*"; exit 1; }

case "${1:-}" in
  "") ;;
  --tests) tests=ON ;;
  --remove)
    rm -rf --one-file-system "$deps"/env-* build
    say "removed $deps/env-* and build/; the system's packages stay"
    exit 0 ;;
  *) sed -n 2,8p "$0"; exit 2 ;;
esac

build_jobs() { # one compiler process takes up to 2 GB
  local cores memory_gb
  cores=$(nproc)
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
  local command="apt-get install -y --no-install-recommends $(echo $missing)"
  say "installing Debian packages: $(echo $missing)"
  if [ "$(id -u)" = 0 ]; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive $command >/dev/null
  elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
    sudo apt-get update -qq && sudo DEBIAN_FRONTEND=noninteractive $command >/dev/null
  else
    die "packages are missing and this user may not install them. Ask an administrator to run:
  apt-get update && $command"
  fi
}

check_room() { # FOLDER GB
  mkdir -p "$1" || die "cannot write $1; set TRIREME_DEPS to a folder that can be written"
  local free
  free=$(df -Pk "$1" | awk 'NR == 2 {print int($4 / 1048576)}')
  [ "$free" -ge "$2" ] || die "$1 has $free GB free, $2 GB are needed; set TRIREME_DEPS to a folder on a larger disk"
}

# One virtual environment a set of pins. A step is done when its marker exists; what an interrupted install left is
# simply installed over.
install_wheels() {
  local pins
  pins=$(cat launch/requirements.txt launch/requirements-test.txt | sha256sum | cut -c1-16)
  env_folder=$deps/env-$pins
  if [ ! -e "$env_folder/.torch" ] || { [ $tests = ON ] && [ ! -e "$env_folder/.tests" ]; }; then
    [ -e "$env_folder/.torch" ] || check_room "$deps" 12
    mkdir -p "$env_folder"
    exec 9>"$env_folder/.lock"
    flock -n 9 || { say "waiting for another setup in $env_folder"; flock 9; }
    python3 -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' ||
      die "the pinned wheels are for Python 3.11, this is $(python3 -V); set TRIREME_TORCH to the folder of a torch 2.11 package"
    [ -x "$env_folder/bin/pip" ] || python3 -m venv "$env_folder"
    if [ ! -e "$env_folder/.torch" ]; then
      say "downloading libtorch and the CUDA libraries (2 GB, 4.2 GB unpacked) into $env_folder"
      wheels launch/requirements.txt .torch
    fi
    if [ $tests = ON ] && [ ! -e "$env_folder/.tests" ]; then
      say "installing the Python packages of the tests into $env_folder"
      wheels launch/requirements-test.txt .tests
    fi
    exec 9>&-
  fi
  python=$env_folder/bin/python
}

wheels() { # FILE MARKER
  "$env_folder/bin/pip" install --quiet --disable-pip-version-check --no-deps --require-hashes --no-cache-dir -r "$1" ||
    die "pip could not install $1 (see above); check the network or the proxy (http_proxy, https_proxy) and run this again"
  touch "$env_folder/$2"
}

configure() {
  local wanted="$torch $python $tests"
  [ -e build/release/build.ninja ] && [ "$(cat build/release/.configured 2>/dev/null)" = "$wanted" ] && return
  say "configuring build/release"
  cmake --preset release -DTRIREME_TORCH="$torch" -DTRIREME_PYTHON="$python" -DTRIREME_TESTS=$tests >build.log 2>&1 ||
    { cat build.log >&2; rm -f build.log; die "CMake could not configure; what is missing is named above"; }
  rm -f build.log
  echo "$wanted" >build/release/.configured
}

install_packages
python=""
if [ -n "${TRIREME_TORCH:-}" ]; then
  torch=$TRIREME_TORCH
  [ -d "$torch/include/ATen" ] || die "TRIREME_TORCH=$torch is not a torch package folder (it has no include/ATen)"
  [ $tests = OFF ] || python=${TRIREME_PYTHON:-$(command -v python3)}
else
  install_wheels
  torch=$(echo "$env_folder"/lib/python3*/site-packages/torch)
fi
configure
build_jobs >build/release/.jobs
