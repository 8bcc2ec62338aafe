// AVX2 + FMA + F16C target.
#include <immintrin.h>

#include <type_traits>

#include "../kernel_table.h"
#include "../simd_common.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace qvl::avx2 {

struct Vec {
  static constexpr int kWidth = 8;
  static constexpr int kPanelVectors = 2;
  static constexpr bool kHasBf16Dot = false;
  __m256 v;

  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec set1(float x) { return {_mm256_set1_ps(x)}; }

  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const bf16* p) { return widen(_mm_loadu_si128((const __m128i*)p)); }
  static Vec load(const f16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
  // First n lanes from memory (nothing beyond is touched), zero in the rest.
  static Vec load_n(const float* p, int64_t n) { return {_mm256_maskload_ps(p, lane_mask(n))}; }
  template <class T>
  static Vec load_n(const T* p, int64_t n) {
    T padded[8] = {};
    std::memcpy(padded, p, size_t(n) * sizeof(T));
    return load(padded);
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(bf16* p) const { _mm_storeu_si128((__m128i*)p, narrow_bf16()); }
  void store(f16* p) const { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
  void store_n(float* p, int64_t n) const { _mm256_maskstore_ps(p, lane_mask(n), v); }
  template <class T>
  void store_n(T* p, int64_t n) const {
    T padded[8];
    store(padded);
    std::memcpy(p, padded, size_t(n) * sizeof(T));
  }

  static __m256i lane_mask(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Vec widen(__m128i x) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16))}; }
  __m256i rounded_bf16_bits() const {  // nearest even; NaN stays NaN
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    return _mm256_castps_si256(
        _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), _mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
  }
  __m128i narrow_bf16() const {
    const __m256i high = _mm256_srli_epi32(rounded_bf16_bits(), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }
  // 16 bf16 -> the even and the odd elements (cheaper than widening in order).
  static void load_even_odd(const bf16* p, Vec& even, Vec& odd) {
    const __m256i bits = _mm256_loadu_si256((const __m256i*)p);
    even = {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16))};
    odd = {_mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(int(0xffff0000u))))};
  }

  static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  Vec operator+(Vec b) const { return {_mm256_add_ps(v, b.v)}; }
  Vec operator-(Vec b) const { return {_mm256_sub_ps(v, b.v)}; }
  Vec operator*(Vec b) const { return {_mm256_mul_ps(v, b.v)}; }
  Vec operator/(Vec b) const { return {_mm256_div_ps(v, b.v)}; }
  // max and min return b where either is NaN.
  static Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  static Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
  static Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
  static Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  // a * 2^n for integral n in [-252, 254]; in two steps so that results may be subnormal
  static Vec scale_pow2(Vec a, Vec n) {
    const __m256i whole = _mm256_cvtps_epi32(n.v);
    const __m256i half = _mm256_srai_epi32(whole, 1);
    const __m256i rest = _mm256_sub_epi32(whole, half);
    return {_mm256_mul_ps(_mm256_mul_ps(a.v, pow2(half)), pow2(rest))};
  }
  static __m256 pow2(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }
  // where(a < b, x, y) and where(a is NaN, x, y)
  static Vec select_lt(Vec a, Vec b, Vec x, Vec y) {
    return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
  }
  static Vec select_nan(Vec a, Vec x, Vec y) {
    return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q))};
  }
  static bool any_lt(Vec a, Vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)) != 0; }
  float sum() const {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  float max_lane() const {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
  }
  // 8 x 8 block of 32-bit elements: dst[i][j] = src[j][i].
  static void transpose(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
    __m256 r[8], t[8];
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(src + i * src_stride);
    for (int i = 0; i < 4; ++i) {
      t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
      r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
      r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
      r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
      r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      _mm256_storeu_ps(dst + i * dst_stride, _mm256_permute2f128_ps(r[i], r[4 + i], 0x20));
      _mm256_storeu_ps(dst + (4 + i) * dst_stride, _mm256_permute2f128_ps(r[i], r[4 + i], 0x31));
    }
  }
};

// Integer dot products along k for the quantised GEMV: int8 pairs widened to 16 bits; int4 weights, unsigned, times
// int8 activations, which cannot saturate.
struct GemvInts {
  static constexpr int kInt8Step = 16, kInt4Step = 64;
  using Int8Value = int16_t;
  using Int4Value = int8_t;
  struct Int8 {
    __m256i v;
  };
  struct Int4 {
    __m256i low, high;
  };
  __m256i v;

  static GemvInts zero() { return {_mm256_setzero_si256()}; }
  static GemvInts load(const int32_t* p) { return {_mm256_loadu_si256((const __m256i*)p)}; }
  void store(int32_t* p) const { _mm256_storeu_si256((__m256i*)p, v); }
  GemvInts operator-(GemvInts b) const { return {_mm256_sub_epi32(v, b.v)}; }
  Vec to_float() const { return {_mm256_cvtepi32_ps(v)}; }
  // Transposed horizontal reduction (4x4): in each block of four lanes the block's sums of a, b, c and d.
  static GemvInts transpose_reduce(GemvInts a, GemvInts b, GemvInts c, GemvInts d) {
    return {_mm256_hadd_epi32(_mm256_hadd_epi32(a.v, b.v), _mm256_hadd_epi32(c.v, d.v))};
  }

  static Int8 load_int8(const int8_t* p) { return {_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p))}; }
  static Int4 load_int4(const uint8_t* p) {
    const __m256i bytes = _mm256_loadu_si256((const __m256i*)p), nibble = _mm256_set1_epi8(15);
    return {_mm256_and_si256(bytes, nibble), _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble)};
  }
  static GemvInts dot(GemvInts acc, Int8 w, const int16_t* x) {
    return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(w.v, _mm256_loadu_si256((const __m256i*)x)))};
  }
  static GemvInts dot(GemvInts acc, Int4 w, const int8_t* x) {
    const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(w.low, _mm256_loadu_si256((const __m256i*)x)),
                                           _mm256_maddubs_epi16(w.high, _mm256_loadu_si256((const __m256i*)(x + 32))));
    return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
  }
  // Scales of four weight rows' groups in the lanes of transpose_reduce: 64 inputs lie in two blocks of 32.
  template <int GROUP, class Scale>
  static Vec load_scales(const char* p, int64_t stride) {
    const auto row = [&](int64_t r) {
      std::conditional_t<GROUP == 32, uint32_t, uint16_t> scales;
      std::memcpy(&scales, p + r * stride, sizeof(scales));
      return int(scales);
    };
    const __m128i scales = _mm_set_epi32(row(3), row(2), row(1), row(0)), first = _mm_slli_epi32(scales, 16);
    const __m128i second = GROUP == 32 ? _mm_blend_epi16(_mm_setzero_si128(), scales, 0xaa) : first;
    if constexpr (std::is_same_v<Scale, bf16>) return {_mm256_castsi256_ps(_mm256_set_m128i(second, first))};
    return {_mm256_cvtph_ps(_mm_packus_epi32(_mm_srli_epi32(first, 16), _mm_srli_epi32(second, 16)))};
  }
  // Zero-points of the same groups, in the same lanes. The first is the low or, with odd = 1, the high nibble of *p.
  template <int GROUP>
  static Vec load_zeros(const uint8_t* p, int64_t stride, int64_t odd) {
    const __m128i zeros = _mm_set_epi32(p[3 * stride], p[2 * stride], p[stride], p[0]);
    const __m256i places = GROUP == 32 ? _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4) : _mm256_set1_epi32(int(4 * odd));
    const __m256i shifted = _mm256_srlv_epi32(_mm256_set_m128i(zeros, zeros), places);
    return {_mm256_cvtepi32_ps(_mm256_and_si256(shifted, _mm256_set1_epi32(15)))};
  }
};

#include "int4_unpack.inl.h"

// Integer words of the quantised GEMM: two 16-bit elements, because vpmaddubsw on bytes would saturate.
struct GemmInts {
  using Weight = int16_t;
  static constexpr int kPerWord = 2;
  __m256i v;

  static GemmInts set1(int32_t x) { return {_mm256_set1_epi32(x)}; }
  static GemmInts load(const uint32_t* p) { return {_mm256_loadu_si256((const __m256i*)p)}; }
  void store(uint32_t* p) const { _mm256_storeu_si256((__m256i*)p, v); }
  void store(float* p) const { _mm256_storeu_si256((__m256i*)p, v); }
  static GemmInts multiply_add(GemmInts acc, GemmInts activations, uint32_t weights) {
    return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(activations.v, _mm256_set1_epi32(int(weights))))};
  }
  Vec to_float() const { return {_mm256_cvtepi32_ps(v)}; }
  static int32_t zero_point_compensation(const char*, int64_t) { return 0; }
  static GemmInts load_values(const int8_t* p) { return {_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p))}; }
  // See unpack_int4.
  static void unpack(const uint8_t* nibbles, int zero, Weight* out) {
    const __m256i values = unpack_int4(nibbles, zero);
    _mm256_storeu_si256((__m256i*)out, _mm256_cvtepi8_epi16(_mm256_castsi256_si128(values)));
    _mm256_storeu_si256((__m256i*)(out + 16), _mm256_cvtepi8_epi16(_mm256_extracti128_si256(values, 1)));
  }
  static GemmInts pack(const Vec* x) {
    return {_mm256_blend_epi16(_mm256_cvtps_epi32(x[0].v), _mm256_slli_epi32(_mm256_cvtps_epi32(x[1].v), 16), 0xaa)};
  }
};

#include "../kernels/vector_target.inl.h"

const KernelTable kTable = QVL_KERNEL_TABLE("avx2");

}  // namespace qvl::avx2
#pragma GCC pop_options

namespace qvl {
bool avx2_supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
extern const Target kAvx2Target{"avx2", avx2_supported, &avx2::kTable};
}  // namespace qvl
