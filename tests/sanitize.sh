#!/usr/bin/env bash
# The kernel tests over an extension with AddressSanitizer and UBSan, built into build/sanitize; fails if either reports anything.
# PyTorch and the OpenMP runtime are not instrumented: memory errors of the kernels are found, races between threads are not. GCC leaves
# masked vector loads and stores unchecked, too; the guard pages of tests/kernels/test_fuzz.py cover those.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
CXX=${CXX:-g++}
folder=$PWD/build/sanitize
rm -f "$folder"/report.*
QVL_SANITIZE=1 QVL_TEST_TARGETS=1 "$PYTHON" setup.py -q build --build-base "$folder" --build-temp "$folder/temp" --build-lib "$folder/lib"

# Reports go to files, but UBSan's sometimes only to the standard streams, so pytest must not capture those. Python never frees all
# memory, so leak detection is off.
export ASAN_OPTIONS=detect_leaks=0:log_path=$folder/report
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1:log_path=$folder/report

find "$folder/temp" -name '*.o' ! -path '*/bindings/*' -print0 |
  xargs -0 $CXX -std=c++17 -O1 -g1 -fopenmp -fsanitize=address,undefined tests/cpp/kernels_test.cpp -o "$folder/kernels_test"
for isa in $("$PYTHON" -c 'import qvl_kernels; print(*qvl_kernels.cpu_info()["supported"])'); do
  QVL_CPU_ISA=$isa "$folder/kernels_test"
done

# The copy in build/sanitize comes before the source tree, in processes that tests start too. The C++ library goes in before
# ASan looks for its exceptions.
export PYTHONPATH=$folder/lib PYTHONSAFEPATH=1
sanitized() {
  LD_PRELOAD="$($CXX -print-file-name=libasan.so) $($CXX -print-file-name=libstdc++.so)" "$PYTHON" "$@"
}
overrun='import torch; from qvl_kernels import _C; x = torch.zeros(8); _C.swiglu(*[x.data_ptr()] * 3, 1, 64, 64, 64, 64, 0)'
if sanitized -c "$overrun" || ! grep -q "ERROR: AddressSanitizer" "$folder"/report.*; then
  echo "sanitize: an overrun made on purpose was not reported"
  exit 1
fi
rm "$folder"/report.*

status=0
sanitized -m pytest -q --capture=sys -p no:cacheprovider -m "not slow" --durations=15 tests/kernels/test_fuzz.py tests/kernels/test_attention.py tests/kernels/test_quant.py \
  tests/kernels/test_quant_gemm.py tests/kernels/test_quantized_linear.py tests/kernels/test_robustness.py tests/kernels/test_bad_arguments.py tests/kernels/test_ops.py tests/kernels/test_isa.py \
  -k "not model_sizes and not compile" "$@" || status=$?
if compgen -G "$folder/report.*" >/dev/null; then
  cat "$folder"/report.*
  exit 1
fi
exit $status
