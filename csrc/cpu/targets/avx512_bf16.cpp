// AVX-512 with dot products of bf16 pairs (vdpbf16ps) and of bytes (vpdpbusd): Cooper Lake, Sapphire Rapids, Zen 4 and
// later.
#include <immintrin.h>

#include <array>
#include <type_traits>

#include "../kernel_table.h"
#include "../simd_common.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma,f16c")

namespace qvl::avx512_bf16 {

struct Vec {
  static constexpr int kWidth = 16;
  static constexpr int kPanelVectors = 4;
  static constexpr bool kHasBf16Dot = true;
#include "avx512_vec.inl.h"

#include "avx512_bf16_vec.inl.h"
};

#include "vnni_gemv_ints.inl.h"
#include "int4_unpack.inl.h"
#include "vnni_gemm_ints.inl.h"

#include "../kernels/vector_target.inl.h"

const KernelTable kTable = QVL_KERNEL_TABLE("avx512_bf16");

}  // namespace qvl::avx512_bf16
#pragma GCC pop_options

namespace qvl {
bool avx512_bf16_supported() {
  return avx512_supported() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}
extern const Target kAvx512Bf16Target{"avx512_bf16", avx512_bf16_supported, &avx512_bf16::kTable};
}  // namespace qvl
