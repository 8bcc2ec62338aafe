// What every target file needs before it opens its own namespace.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
namespace qvl {
// What all AVX-512 targets need. Baseline code, as every supported() is.
inline bool avx512_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}
}  // namespace qvl
#endif

// The table entry list is the same for every target; only the bodies behind the names differ.
#define QVL_KERNEL_TABLE(target_name)                                     \
  {target_name,        Vec::kWidth,     Vec::kWidth * Vec::kPanelVectors, \
   norm_rows,          gemm_pack,       gemm_tile,                        \
   gemv_prepare,       gemv_rows,       quantize_rows,                    \
   quant_gemv_prepare, quant_gemv_rows, quant_gemm_pack,                  \
   quant_gemm_tile,    rope_rows,       activation_rows,                  \
   attention_gather,   attention_tile,  read_bytes,                       \
   GemmInts::kPerWord, Vec::kHasBf16Dot}
