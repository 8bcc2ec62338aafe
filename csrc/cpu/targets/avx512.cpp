// AVX-512 (F, BW, DQ, VL) target.
#include <immintrin.h>

#include <array>
#include <type_traits>

#include "../kernel_table.h"
#include "../simd_common.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

namespace qvl::avx512 {

struct Vec {
  static constexpr int kWidth = 16;
  static constexpr int kPanelVectors = 4;
  static constexpr bool kHasBf16Dot = false;
#include "avx512_vec.inl.h"
};

// Integer dot products along k for the quantised GEMV: int8 pairs widened to 16 bits; int4 weights, unsigned, times
// int8 activations, which cannot saturate.
struct GemvInts {
#include "avx512_gemv_ints.inl.h"
  static constexpr int kInt8Step = 32;
  using Int8Value = int16_t;
  struct Int8 {
    __m512i v;
  };

  static Int8 load_int8(const int8_t* p) { return {_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p))}; }
  static GemvInts dot(GemvInts acc, Int8 w, const int16_t* x) {
    return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(w.v, _mm512_loadu_si512(x)))};
  }
  static GemvInts dot(GemvInts acc, Int4 w, const int8_t* x) {
    const __m512i pairs = _mm512_add_epi16(_mm512_maddubs_epi16(w.low, _mm512_loadu_si512(x)),
                                           _mm512_maddubs_epi16(w.high, _mm512_loadu_si512(x + 64)));
    return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
  }
};

#include "int4_unpack.inl.h"

// Integer words of the quantised GEMM: two 16-bit elements, because vpmaddubsw on bytes would saturate.
struct GemmInts {
  using Weight = int16_t;
  static constexpr int kPerWord = 2;
  __m512i v;

  static GemmInts set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
  static GemmInts load(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
  void store(uint32_t* p) const { _mm512_storeu_si512(p, v); }
  void store(float* p) const { _mm512_storeu_si512(p, v); }
  static GemmInts multiply_add(GemmInts acc, GemmInts activations, uint32_t weights) {
    return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(activations.v, _mm512_set1_epi32(int(weights))))};
  }
  Vec to_float() const { return {_mm512_cvtepi32_ps(v)}; }
  static int32_t zero_point_compensation(const char*, int64_t) { return 0; }
  static GemmInts load_values(const int8_t* p) { return {_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p))}; }
  // See unpack_int4.
  static void unpack(const uint8_t* nibbles, int zero, Weight* out) {
    _mm512_storeu_si512(out, _mm512_cvtepi8_epi16(unpack_int4(nibbles, zero)));
  }
  static GemmInts pack(const Vec* x) {
    const __m512i low = _mm512_cvtps_epi32(x[0].v), high = _mm512_slli_epi32(_mm512_cvtps_epi32(x[1].v), 16);
    return {_mm512_mask_blend_epi16(0xaaaaaaaau, low, high)};
  }
};

#include "../kernels/vector_target.inl.h"

const KernelTable kTable = QVL_KERNEL_TABLE("avx512");

}  // namespace qvl::avx512
#pragma GCC pop_options

namespace qvl {
extern const Target kAvx512Target{"avx512", avx512_supported, &avx512::kTable};
}  // namespace qvl
