#!/usr/bin/env bash
# Sets up, builds and runs every test. The last line is `N passed, N failed, N skipped`, counted by test case.
# Arguments go to ctest, e.g. launch/test.sh -R tokenizer
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' launch/test.sh; exit 0 ;; esac
launch/setup.sh --tests
echo "building"
cmake --build build/release -j "$(cat build/release/.jobs)" >build/release/build.log 2>&1 ||
  { grep -E -A5 'error|FAILED' build/release/build.log | head -60; echo "the build failed: build/release/build.log"; exit 1; }
rm -rf build/release/results build/release/Testing/Temporary/LastTestsFailed.log
mkdir -p build/release/results
# The data folder beside the checkout, where there is one; tests that need it are skipped otherwise.
if [ -z "${TRIREME_TEST_DATA:-}" ] && [ -d ../shared/data ]; then
  TRIREME_TEST_DATA=$(cd ../shared/data && pwd)
  export TRIREME_TEST_DATA
fi
# Whatever a test leaves behind, because it fails or is killed, is removed: at the end, or when this is run again.
scratch=${TMPDIR:-/tmp}/trireme-tests-$(id -u)-$(pwd | cksum | cut -d' ' -f1)
rm -rf --one-file-system "$scratch"
mkdir -m 700 "$scratch"
trap 'rm -rf --one-file-system "$scratch"' EXIT
export TMPDIR=$scratch
ctest --test-dir build/release --output-on-failure -j 2 "$@" || true
python3 launch/count_results.py build/release/results build/release/Testing/Temporary
