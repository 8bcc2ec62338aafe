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
template <int GROUP>
static Vec load_scales(const char* p, int64_t stride) {
  // A row's scales go through a register: loads from a buffer would wait for the stores to it.
  const auto row = [&](int64_t r) {
    std::conditional_t<GROUP == 32, uint64_t, std::conditional_t<GROUP == 64, uint32_t, uint16_t>> scales;
    std::memcpy(&scales, p + r * stride, sizeof(scales));
    return int64_t(scales);
  };
  alignas(64) static constexpr auto places = [] {
    std::array<uint16_t, 32> places{};
    for (int lane = 0; lane < 16; ++lane) places[2 * lane + 1] = uint16_t(lane % 4 * 4 + lane / 4 / (GROUP / 32));
    return places;
  }();
  const __m512i scales = _mm512_castsi256_si512(_mm256_set_epi64x(row(3), row(2), row(1), row(0)));
  return {_mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, _mm512_load_si512(places.data()), scales))};
}
