// More members of Vec, for targets with dot products of bf16 pairs. Included inside struct Vec.
// acc + a.lo * b.lo + a.hi * b.hi for 16 lanes of bf16 pairs.
static Vec dot_pairs(Vec acc, Vec pairs, uint32_t weight_pair) {
  return {_mm512_dpbf16_ps(acc.v, (__m512bh)pairs.v, (__m512bh)_mm512_set1_epi32(int(weight_pair)))};
}
// The same for 32 elements of each as they lie in memory.
static Vec dot_vectors(Vec acc, Vec a, Vec b) { return {_mm512_dpbf16_ps(acc.v, (__m512bh)a.v, (__m512bh)b.v)}; }
// The two halves of 32 words of 16 bits, interleaved.
static Vec interleave(__m512i halves) {
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i order = _mm512_or_si512(low, _mm512_slli_epi32(_mm512_add_epi32(low, _mm512_set1_epi32(16)), 16));
  return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(order, halves))};
}
// pack_pair in 2 instructions instead of 17, for values whose denormals do not matter (they become 0).
static Vec pack_pair_flush(Vec low, Vec high) { return interleave((__m512i)_mm512_cvtne2ps_pbh(high.v, low.v)); }
// pack_pair, in few instructions unless a value is a denormal.
static Vec pack_pair_quick(Vec low, Vec high) {
  constexpr int kDenormal = 0x20;
  if (_mm512_fpclass_ps_mask(low.v, kDenormal) | _mm512_fpclass_ps_mask(high.v, kDenormal)) return pack_pair(low, high);
  return pack_pair_flush(low, high);
}
// Two rows of bf16 as pairs: lane i is (a[i], b[i]).
static Vec load_pair_n(const bf16* a, const bf16* b, int64_t n) {
  const __m512i low = _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(mask(n), a));
  return interleave(_mm512_inserti64x4(low, _mm256_maskz_loadu_epi16(mask(n), b), 1));
}
// x - floor(x), 0 for infinities; and a * 2^floor(x).
static Vec fraction(Vec x) { return {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }
static Vec scale_floor_pow2(Vec a, Vec x) { return {_mm512_scalef_ps(a.v, x.v)}; }
