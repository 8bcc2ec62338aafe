#!/usr/bin/env bash
# Cross-compiles the portable target, the emulated matrix units and the C++ kernel test for aarch64 and runs them under emulation.
set -euo pipefail
cd "$(dirname "$0")/.."
CXX=${CXX_AARCH64:-aarch64-linux-gnu-g++}
RUN=${RUN-qemu-aarch64}
for tool in "$CXX" $RUN; do
  command -v "$tool" >/dev/null || { echo "needs $tool: apt-get install qemu-user g++-aarch64-linux-gnu"; exit 1; }
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$CXX" -std=c++17 -O2 -fopenmp -fno-math-errno -fno-trapping-math -Wall -Werror -static -DQVL_TEST_TARGETS \
  csrc/ops/*.cpp csrc/cpu/dispatch.cpp csrc/cpu/targets/{portable,amx_emulated}.cpp tests/cpp/kernels_test.cpp -o "$folder/kernels_test"
for isa in portable amx_emulated; do
  QVL_CPU_ISA=$isa $RUN "$folder/kernels_test"
done
