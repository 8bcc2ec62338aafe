// Integer dot products of the quantised GEMV for the AVX-512 VNNI targets (vpdpbusd, u8s8): int8 weights + 128, or int4
// weights + 8, times int8 activations.
struct GemvInts {
#include "avx512_gemv_ints.inl.h"
  static constexpr int kInt8Step = 64;
  using Int8Value = int8_t;
  struct Int8 {
    __m512i v;
  };

  static Int8 load_int8(const int8_t* p) { return {_mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128))}; }
  static GemvInts dot(GemvInts acc, Int8 w, const int8_t* x) {
    return {_mm512_dpbusd_epi32(acc.v, w.v, _mm512_loadu_si512(x))};
  }
  static GemvInts dot(GemvInts acc, Int4 w, const int8_t* x) {
    acc.v = _mm512_dpbusd_epi32(acc.v, w.low, _mm512_loadu_si512(x));
    return {_mm512_dpbusd_epi32(acc.v, w.high, _mm512_loadu_si512(x + 64))};
  }
};
