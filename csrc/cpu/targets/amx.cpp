// AVX-512 with matrix units (AMX): Sapphire Rapids and later.
#include <cpuid.h>
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <array>
#include <type_traits>

#include "../kernel_table.h"
#include "../simd_common.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma,f16c")

namespace qvl::amx {

struct Vec {
  static constexpr int kWidth = 16;
  static constexpr int kPanelVectors = 4;
  static constexpr bool kHasBf16Dot = true;
#include "avx512_vec.inl.h"
#include "avx512_bf16_vec.inl.h"
  static Vec load_ints(const int32_t* p) { return {_mm512_cvtepi32_ps(_mm512_loadu_si512(p))}; }
};

#include "vnni_gemv_ints.inl.h"
#include "int4_unpack.inl.h"

// Integer words of the quantised GEMM: four signed bytes.
struct GemmInts {
  static constexpr int kPerWord = 4;
  __m512i v;

  void store(uint32_t* p) const { _mm512_storeu_si512(p, v); }
  void store(float* p) const { _mm512_storeu_si512(p, v); }
  static GemmInts load_values(const int8_t* p) { return {_mm512_loadu_si512(p)}; }
  // 16 bytes of nibbles, the low ones first, as 32 values round((nibble - zero) * factor).
  static void unpack_scaled(const uint8_t* nibbles, float zero, float factor, int8_t* out) {
    const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 scaled = _mm512_mul_ps(_mm512_sub_ps(values, _mm512_set1_ps(zero)), _mm512_set1_ps(factor));
    const __m256i table = _mm256_broadcastsi128_si256(_mm512_cvtepi32_epi8(_mm512_cvtps_epi32(scaled)));
    _mm256_storeu_si256((__m256i*)out, _mm256_shuffle_epi8(table, unpack_int4(nibbles, 0)));
  }
  static GemmInts pack(const Vec* x) {
    const __m512i byte = _mm512_set1_epi32(255);
    const auto low_byte = [&](int i) { return _mm512_and_si512(_mm512_cvtps_epi32(x[i].v), byte); };
    const __m512i low = _mm512_or_si512(low_byte(0), _mm512_slli_epi32(low_byte(1), 8));
    const __m512i high = _mm512_or_si512(low_byte(2), _mm512_slli_epi32(low_byte(3), 8));
    return {_mm512_or_si512(low, _mm512_slli_epi32(high, 16))};
  }
};

// The processor's tiles, in assembly: compilers take tile numbers only as literals.
struct Tiles {
  static void configure() {
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static constexpr Config config{};
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  static void release() { asm volatile("tilerelease"); }
  template <int TILE>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
  }
  template <int TILE>
  static void load(const void* rows, int64_t row_bytes) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(TILE), "r"(rows), "r"(row_bytes) : "memory");
  }
  // Of rows that are read once before others take their place: they pass L1 by.
  template <int TILE>
  static void load_streamed(const void* rows, int64_t row_bytes) {
    asm volatile("tileloaddt1 (%1,%2,1), %%tmm%c0" ::"i"(TILE), "r"(rows), "r"(row_bytes) : "memory");
  }
  template <int TILE>
  static void store(void* rows, int64_t row_bytes) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(TILE), "r"(rows), "r"(row_bytes) : "memory");
  }
  // c += a * b: pairs of bf16, or four signed bytes, of a row of a times those of a column of b.
  template <int C, int A, int B>
  static void dot_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
  template <int C, int A, int B>
  static void dot_int8() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};

#include "../kernels/tile_target.inl.h"

const KernelTable kTable = QVL_TILE_KERNEL_TABLE("amx");

}  // namespace qvl::amx
#pragma GCC pop_options

namespace qvl {
bool avx512_bf16_supported();

// Matrix units work only after the kernel has granted their state: once per process, for all its threads.
static bool amx_granted() {
#if defined(__linux__)
  unsigned a, b, c, d;
  if (!avx512_bf16_supported() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  if ((d & (kBf16 | kTile | kInt8)) != (kBf16 | kTile | kInt8)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
static bool amx_supported() {
  static const bool granted = amx_granted();
  return granted;
}
extern const Target kAmxTarget{"amx", amx_supported, &amx::kTable};
}  // namespace qvl
