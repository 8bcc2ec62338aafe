// Integer words of the quantised GEMM for the AVX-512 VNNI targets (vpdpbusd, u8s8): four bytes, those of activations
// unsigned (+ 128).
struct GemmInts {
  using Weight = int8_t;
  static constexpr int kPerWord = 4;
  __m512i v;

  static GemmInts set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
  // The empty statement keeps the load outside the loop over weight rows: GCC 12 would repeat it there.
  static GemmInts load(const uint32_t* p) {
    GemmInts words{_mm512_loadu_si512(p)};
    asm("" : "+v"(words.v));
    return words;
  }
  void store(uint32_t* p) const { _mm512_storeu_si512(p, v); }
  void store(float* p) const { _mm512_storeu_si512(p, v); }
  // In assembly, because GCC 12 copies and spills the sums around its intrinsic: 200 -> 455 GOP/s a core on Zen 4.
  static GemmInts multiply_add(GemmInts acc, GemmInts activations, uint32_t weights) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(activations.v), "v"(_mm512_set1_epi32(int(weights))));
    return acc;
  }
  Vec to_float() const { return {_mm512_cvtepi32_ps(v)}; }
  static int32_t zero_point_compensation(const char* weights, int64_t words) {
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i sum = _mm512_setzero_si512();
    for (; words > 0; words -= 16, weights += 64)
      sum = _mm512_dpbusd_epi32(sum, ones, _mm512_maskz_loadu_epi32(Vec::mask(words), weights));
    return -128 * _mm512_reduce_add_epi32(sum);
  }
  static GemmInts load_values(const int8_t* p) {
    return {_mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128))};
  }
  // See unpack_int4.
  static void unpack(const uint8_t* nibbles, int zero, Weight* out) {
    _mm256_storeu_si256((__m256i*)out, unpack_int4(nibbles, zero));
  }
  static GemmInts pack(const Vec* x) {
    const __m512i low = _mm512_add_epi32(_mm512_cvtps_epi32(x[0].v), _mm512_slli_epi32(_mm512_cvtps_epi32(x[1].v), 8));
    const __m512i high = _mm512_add_epi32(_mm512_cvtps_epi32(x[2].v), _mm512_slli_epi32(_mm512_cvtps_epi32(x[3].v), 8));
    return {_mm512_add_epi32(_mm512_add_epi32(low, _mm512_slli_epi32(high, 16)), _mm512_set1_epi32(int(0x80808080u)))};
  }
};
