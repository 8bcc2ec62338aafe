// Members of GemvInts, the integer dot products of the quantised GEMV, shared by the AVX-512 targets. Included inside
// it.
static constexpr int kInt4Step = 128;
using Int4Value = int8_t;
struct Int4 {
  __m512i low, high;
};
__m512i v;

static GemvInts zero() { return {_mm512_setzero_si512()}; }
static GemvInts load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
void store(int32_t* p) const { _mm512_storeu_si512(p, v); }
GemvInts operator-(GemvInts b) const { return {_mm512_sub_epi32(v, b.v)}; }
Vec to_float() const { return {_mm512_cvtepi32_ps(v)}; }
// Transposed horizontal reduction (4x4): in each block of four lanes the block's sums of a, b, c and d. One conversion
// to fp32 serves four weight rows.
static GemvInts transpose_reduce(GemvInts a, GemvInts b, GemvInts c, GemvInts d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a.v, b.v), _mm512_unpackhi_epi32(a.v, b.v));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c.v, d.v), _mm512_unpackhi_epi32(c.v, d.v));
  return {_mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd))};
}
static Int4 load_int4(const uint8_t* p) {
  __m512i bytes = _mm512_loadu_si512(p), nibble = _mm512_set1_epi8(15);
  // Keeps the bytes in a register: GCC 12 stores them and loads them twice.
  asm("" : "+v"(bytes));
  return {_mm512_and_si512(bytes, nibble), _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble)};
}
// Scales of four weight rows' groups in the lanes of transpose_reduce: 128 inputs lie in blocks of 32.
template <int GROUP, class Scale>
static Vec load_scales(const char* p, int64_t stride) {
  // A row's scales go through a register: loads from a buffer would wait for the stores to it.
  const auto row = [&](int64_t r) {
    std::conditional_t<GROUP == 32, uint64_t, std::conditional_t<GROUP == 64, uint32_t, uint16_t>> scales;
    std::memcpy(&scales, p + r * stride, sizeof(scales));
    return int64_t(scales);
  };
  constexpr bool kBf16 = std::is_same_v<Scale, bf16>;  // the upper halves of fp32
  alignas(64) static constexpr auto places = [] {
    std::array<uint16_t, 32> places{};
    for (int lane = 0; lane < 16; ++lane)
      places[kBf16 ? 2 * lane + 1 : lane] = uint16_t(lane % 4 * 4 + lane / 4 / (GROUP / 32));
    return places;
  }();
  const __m256i scales = _mm256_set_epi64x(row(3), row(2), row(1), row(0));
  if constexpr (kBf16)
    return {_mm512_castsi512_ps(
        _mm512_maskz_permutexvar_epi16(0xaaaaaaaau, _mm512_load_si512(places.data()), _mm512_castsi256_si512(scales)))};
  const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(places.data()));
  return {_mm512_cvtph_ps(_mm256_permutexvar_epi16(order, scales))};
}
// Zero-points of the same groups, in the same lanes. The first is the low or, with odd = 1, the high nibble of *p.
template <int GROUP>
static Vec load_zeros(const uint8_t* p, int64_t stride, int64_t odd) {
  const auto row = [&](int64_t r) {
    std::conditional_t<GROUP == 32, uint16_t, uint8_t> zeros;
    std::memcpy(&zeros, p + r * stride, sizeof(zeros));
    return int(zeros);
  };
  alignas(64) static constexpr auto shifts = [] {
    std::array<int32_t, 16> shifts{};
    for (int lane = 0; lane < 16; ++lane) shifts[lane] = lane / 4 / (GROUP / 32) * 4;
    return shifts;
  }();
  const __m512i zeros = _mm512_broadcast_i32x4(_mm_set_epi32(row(3), row(2), row(1), row(0)));
  const __m512i places = GROUP == 128 ? _mm512_set1_epi32(int(4 * odd)) : _mm512_load_si512(shifts.data());
  return {_mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srlv_epi32(zeros, places), _mm512_set1_epi32(15)))};
}
