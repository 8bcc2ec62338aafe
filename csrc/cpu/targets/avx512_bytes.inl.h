  // Members of Bytes shared by the AVX-512 targets. Included inside struct Bytes.
  static constexpr int kInt4Step = 128;
  using Int4Value = int8_t;
  struct Int4 {
    __m512i low, high;
  };
  __m512i v;

  static Bytes zero() { return {_mm512_setzero_si512()}; }
  static Bytes load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
  void store(int32_t* p) const { _mm512_storeu_si512(p, v); }
  Bytes operator-(Bytes b) const { return {_mm512_sub_epi32(v, b.v)}; }
  Vec to_float() const { return {_mm512_cvtepi32_ps(v)}; }
  // In each block of four lanes the block's sums of a, b, c and d: a quarter of the conversions that each would need.
  static Bytes join(Bytes a, Bytes b, Bytes c, Bytes d) {
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a.v, b.v), _mm512_unpackhi_epi32(a.v, b.v));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c.v, d.v), _mm512_unpackhi_epi32(c.v, d.v));
    return {_mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd))};
  }
  static Int4 load_int4(const uint8_t* p) {
    const __m512i bytes = _mm512_loadu_si512(p), nibble = _mm512_set1_epi8(15);
    return {_mm512_and_si512(bytes, nibble), _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble)};
  }
  // The scale of each lane's group: 128 inputs lie in blocks of 32, four lanes each.
  template <int GROUP>
  static Vec load_scales(const bf16* p) {
    uint64_t bits = 0;
    std::memcpy(&bits, p, 128 / GROUP * sizeof(bf16));
    constexpr int kPerBlock = GROUP / 32;
    const auto place = [](int block) { return int(0x01008080u + uint32_t(block / kPerBlock) * 0x02020000u); };
    const __m512i order = _mm512_inserti64x4(
        _mm512_castsi256_si512(_mm256_set_m128i(_mm_set1_epi32(place(1)), _mm_set1_epi32(place(0)))),
        _mm256_set_m128i(_mm_set1_epi32(place(3)), _mm_set1_epi32(place(2))), 1);
    return {_mm512_castsi512_ps(_mm512_shuffle_epi8(_mm512_set1_epi64(int64_t(bits)), order))};
  }
