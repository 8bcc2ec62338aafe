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
// clang-format off
#define QVL_TABLE_OF(target_name, gemm, quant_gemm, gather, attention, has_tiles, run_unit)              \
  {target_name,        Vec::kWidth,      Vec::kWidth * Vec::kPanelVectors, norm_rows,  gemm_pack,       \
   gemm,               gemv_prepare,     gemv_rows,                        quantize_rows,               \
   quant_gemv_prepare, quant_gemv_rows,  quant_gemm_pack,                  quant_gemm, rope_rows,       \
   activation_rows,    gather,           attention,                        read_bytes,                  \
   GemmInts::kPerWord, Vec::kHasBf16Dot, has_tiles,                        run_unit}
// clang-format on
#define QVL_KERNEL_TABLE(target_name) \
  QVL_TABLE_OF(target_name, gemm_tile, quant_gemm_tile, attention_gather, attention_tile, false, run_unit)
#define QVL_TILE_KERNEL_TABLE(target_name)                                                                          \
  QVL_TABLE_OF(target_name, tile_gemm_tile, tile_quant_gemm_tile, tile_attention_gather, tile_attention_tile, true, \
               tile_run_unit)
