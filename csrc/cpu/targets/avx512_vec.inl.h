// Members of Vec, 16 floats, shared by the AVX-512 targets. Included inside struct Vec.
__m512 v;

static Vec zero() { return {_mm512_setzero_ps()}; }
static Vec set1(float x) { return {_mm512_set1_ps(x)}; }
static __mmask16 mask(int64_t n) { return n >= 16 ? __mmask16(0xffff) : __mmask16((1u << n) - 1u); }

static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
static Vec load(const bf16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
static Vec load(const f16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
// First n lanes from memory (nothing beyond is touched), zero in the rest.
static Vec load_n(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(mask(n), p)}; }
static Vec load_n(const bf16* p, int64_t n) { return widen(_mm256_maskz_loadu_epi16(mask(n), p)); }
static Vec load_n(const f16* p, int64_t n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask(n), p))}; }

void store(float* p) const { _mm512_storeu_ps(p, v); }
void store(bf16* p) const { _mm256_storeu_si256((__m256i*)p, narrow_bf16()); }
void store(f16* p) const { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
void store_n(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, mask(n), v); }
void store_n(bf16* p, int64_t n) const { _mm256_mask_storeu_epi16(p, mask(n), narrow_bf16()); }
void store_n(f16* p, int64_t n) const {
  _mm256_mask_storeu_epi16(p, mask(n), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

static Vec widen(__m256i x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))}; }
// Round to nearest even; NaN stays NaN. (vcvtneps2bf16 would flush denormals.)
__m512i rounded_bf16_bits() const {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
}
__m256i narrow_bf16() const { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_bf16_bits(), 16)); }
// Lane-wise pair (low, high) as two bf16 in one 32-bit lane.
static Vec pack_pair(Vec low, Vec high) {
  const __m512i low_bits = _mm512_srli_epi32(low.rounded_bf16_bits(), 16);
  const __m512i high_bits = _mm512_and_si512(high.rounded_bf16_bits(), _mm512_set1_epi32(int(0xffff0000u)));
  return {_mm512_castsi512_ps(_mm512_or_si512(low_bits, high_bits))};
}
// 32 bf16 -> the even and the odd elements (cheaper than widening in order).
static void load_even_odd(const bf16* p, Vec& even, Vec& odd) {
  const __m512i bits = _mm512_loadu_si512(p);
  even = {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))};
  odd = {_mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(int(0xffff0000u))))};
}

static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
Vec operator+(Vec b) const { return {_mm512_add_ps(v, b.v)}; }
Vec operator-(Vec b) const { return {_mm512_sub_ps(v, b.v)}; }
Vec operator*(Vec b) const { return {_mm512_mul_ps(v, b.v)}; }
Vec operator/(Vec b) const { return {_mm512_div_ps(v, b.v)}; }
// max and min return b where either is NaN.
static Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
static Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
static Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
static Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a * 2^n for integral n
static Vec scale_pow2(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// where(a < b, x, y) and where(a is NaN, x, y)
static Vec select_lt(Vec a, Vec b, Vec x, Vec y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
static Vec select_nan(Vec a, Vec x, Vec y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), y.v, x.v)};
}
static bool any_lt(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ) != 0; }
float sum() const { return _mm512_reduce_add_ps(v); }
float max_lane() const { return _mm512_reduce_max_ps(v); }

// 16 x 16 block of 32-bit elements: dst[i][j] = src[j][i].
static void transpose(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
  __m512 r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(src + i * src_stride);
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    _mm512_storeu_ps(dst + i * dst_stride, _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88));
    _mm512_storeu_ps(dst + (8 + i) * dst_stride, _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd));
  }
}
