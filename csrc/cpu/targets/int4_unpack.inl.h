// int4 -> int8 for the x86 targets: 16 bytes of nibbles, the low ones first, as 32 values nibble - zero.
inline __m256i unpack_int4(const uint8_t* nibbles, int zero) {
  const __m128i x = _mm_loadu_si128((const __m128i*)nibbles);
  const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(x), _mm_srli_epi16(x, 4), 1);
  return _mm256_sub_epi8(_mm256_and_si256(both, _mm256_set1_epi8(15)), _mm256_set1_epi8(char(zero)));
}
