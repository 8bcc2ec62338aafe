// AVX-512 (F, BW, DQ, VL) with the dot product of bytes (vpdpbusd): Cascade Lake, Ice Lake.
#include <immintrin.h>

#include <array>
#include <type_traits>

#include "../kernel_table.h"
#include "../simd_common.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")

namespace qvl::avx512_vnni {

struct Vec {
  static constexpr int kWidth = 16;
  static constexpr int kPanelVectors = 4;
  static constexpr bool kHasBf16Dot = false;
#include "avx512_vec.inl.h"
};

#include "vnni_gemv_ints.inl.h"
#include "int4_unpack.inl.h"
#include "vnni_gemm_ints.inl.h"

#include "../kernels/vector_target.inl.h"

const KernelTable kTable = QVL_KERNEL_TABLE("avx512_vnni");

}  // namespace qvl::avx512_vnni
#pragma GCC pop_options

namespace qvl {
bool avx512_vnni_supported() { return avx512_supported() && __builtin_cpu_supports("avx512vnni"); }
extern const Target kAvx512VnniTarget{"avx512_vnni", avx512_vnni_supported, &avx512_vnni::kTable};
}  // namespace qvl
