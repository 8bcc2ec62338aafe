// For tests only (QVL_TEST_TARGETS in setup.py): the kernels of the amx target over matrix units and vectors in plain
// C++, on every machine. GEMMs have the bits of amx's; GEMV and what else is left to vectors rounds as it likes.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <type_traits>
#include <utility>

#include "../kernel_table.h"
#include "../simd_common.h"

// 20 seconds of compiler instead of minutes: other targets hold in registers what lies in memory here.
#pragma GCC optimize("O1", "no-inline")

namespace qvl::amx_emulated {

struct Vec {
  static constexpr int kWidth = 16;
  static constexpr int kPanelVectors = 4;
  static constexpr bool kHasBf16Dot = true;
#include "portable_vec.inl.h"

  static Vec load_ints(const int32_t* p) {
    Ints ints;
    std::memcpy(&ints, p, sizeof(ints));
    return {__builtin_convertvector(ints, Floats)};
  }
  // acc + a.lo * b.lo + a.hi * b.hi for 16 lanes of bf16 pairs, in fp32 with denormals, which vdpbf16ps flushes.
  static Vec dot_pairs(Vec acc, Vec pairs, uint32_t weight_pair) {
    return dot_vectors(acc, pairs, set1(bits_to_float(weight_pair)));
  }
  // The same for 32 elements of each as they lie in memory.
  static Vec dot_vectors(Vec acc, Vec a, Vec b) {
    Vec a_low, a_high, b_low, b_high;
    split_pairs((Words)a.v, a_low, a_high);
    split_pairs((Words)b.v, b_low, b_high);
    return fma(a_high, b_high, fma(a_low, b_low, acc));
  }
  // Lane-wise pair (low, high) as two bf16 in one 32-bit lane.
  static Vec pack_pair(Vec low, Vec high) {
    bf16 halves[2][kWidth];
    low.store(halves[0]);
    high.store(halves[1]);
    return load_pair_n(halves[0], halves[1], kWidth);
  }
  static Vec pack_pair_flush(Vec low, Vec high) { return pack_pair(low, high); }
  static Vec pack_pair_quick(Vec low, Vec high) { return pack_pair(low, high); }
  // Two rows of bf16 as pairs: lane i is (a[i], b[i]).
  static Vec load_pair_n(const bf16* a, const bf16* b, int64_t n) {
    return from_lanes([&](int i) { return i < n ? bits_to_float(uint32_t(b[i].bits) << 16 | a[i].bits) : 0.0f; });
  }
  // x - floor(x), 0 for infinities; and a * 2^floor(x), for x below 254.
  static Vec fraction(Vec x) {
    return from_lanes([&](int i) { return std::isinf(x.v[i]) ? 0.0f : x.v[i] - std::floor(x.v[i]); });
  }
  static Vec scale_floor_pow2(Vec a, Vec x) {
    return scale_pow2(a, max(from_lanes([&](int i) { return std::floor(x.v[i]); }), set1(-252.0f)));
  }
};

#include "portable_gemv_ints.inl.h"

// Integer words of the quantised GEMM: four signed bytes.
struct GemmInts {
  static constexpr int kPerWord = 4;
  int8_t v[4 * Vec::kWidth];

  void store(void* p) const { std::memcpy(p, v, sizeof(v)); }
  static GemmInts load_values(const int8_t* p) {
    GemmInts words;
    std::memcpy(words.v, p, sizeof(words.v));
    return words;
  }
  // 16 bytes of nibbles, the low ones first, as 32 values round((nibble - zero) * factor).
  static void unpack_scaled(const uint8_t* nibbles, float zero, float factor, int8_t* out) {
    const auto scaled = [&](int nibble) { return round_to_byte((float(nibble) - zero) * factor); };
    for (int j = 0; j < 16; ++j) out[j] = scaled(nibbles[j] & 15), out[j + 16] = scaled(nibbles[j] >> 4);
  }
  static GemmInts pack(const Vec* x) {
    GemmInts words;
    for (int i = 0; i < Vec::kWidth; ++i)
      for (int e = 0; e < kPerWord; ++e) words.v[kPerWord * i + e] = round_to_byte(x[e].v[i]);
    return words;
  }
  // What is no number in the range of a byte becomes 0, as the low byte of what vcvtps2dq gives for it.
  static int8_t round_to_byte(float x) { return x > -129.0f && x < 128.0f ? int8_t(std::nearbyint(x)) : int8_t(0); }
};

// Eight tiles of 16 rows of 64 bytes in each thread.
struct Tiles {
  struct State {
    bool configured = false;
    alignas(64) char tiles[8][16][64];
  };
  static State& state() {
    thread_local State tiles;
    return tiles;
  }
  // On matrix units the same mistake is a fault, too.
  template <int TILE>
  static char (&tile())[16][64] {
    if (!state().configured) {
      std::fputs("qvl: a tile is used outside of TileRegion\n", stderr);
      std::abort();
    }
    return state().tiles[TILE];
  }

  static void configure() {
    state().configured = true;
    std::memset(state().tiles, 0, sizeof(state().tiles));
  }
  static void release() { state().configured = false; }
  template <int TILE>
  static void zero() {
    std::memset(tile<TILE>(), 0, sizeof(tile<TILE>()));
  }
  template <int TILE>
  static void load(const void* rows, int64_t row_bytes) {
    for (int r = 0; r < 16; ++r) std::memcpy(tile<TILE>()[r], static_cast<const char*>(rows) + r * row_bytes, 64);
  }
  template <int TILE>
  static void load_streamed(const void* rows, int64_t row_bytes) {
    load<TILE>(rows, row_bytes);
  }
  template <int TILE>
  static void store(void* rows, int64_t row_bytes) {
    for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(rows) + r * row_bytes, tile<TILE>()[r], 64);
  }

  typedef double Doubles __attribute__((vector_size(128)));
  typedef int64_t Longs __attribute__((vector_size(128)));
  static Doubles widen(Vec x) { return __builtin_convertvector(x.v, Doubles); }
  // The even and the odd elements of a row of bf16.
  static void widen_pairs(const char* row, Doubles (&out)[2]) {
    Vec even, odd;
    Vec::load_even_odd(reinterpret_cast<const bf16*>(row), even, odd);
    out[0] = round(widen(even)), out[1] = round(widen(odd));
  }
  // Rounds to fp32. What rounds to less than 2^-126, with any exponent allowed, becomes 0 with its sign.
  static Doubles round(Doubles x) {
    const Doubles rounded = widen({__builtin_convertvector(x, Vec::Floats)});
    const Longs tiny = (x < 0x1.ffffffp-127) & (x > -0x1.ffffffp-127);
    return (Doubles)((Longs)rounded & (~tiny | std::numeric_limits<int64_t>::min()));
  }
  // As tdpbf16ps: even and odd elements are summed apart, by FMA from 0, and then both added to c. Every operand that
  // is subnormal counts as 0, and every result, also that of an FMA (Intel's manual has no flush there; the processor
  // does). fp64 holds the products, and sums whose rounding to fp32 is that of the exact sum. What NaNs hold is left
  // open.
  template <int C, int A, int B>
  static void dot_bf16() {
    Doubles b[16][2];
    for (int k = 0; k < 16; ++k) widen_pairs(tile<B>()[k], b[k]);
    for (int m = 0; m < 16; ++m) {
      Doubles a[2], sums[2] = {};
      widen_pairs(tile<A>()[m], a);
      for (int k = 0; k < 16; ++k)
        for (int i = 0; i < 2; ++i) sums[i] = round(sums[i] + a[i][k] * b[k][i]);
      float* row = reinterpret_cast<float*>(tile<C>()[m]);
      const Doubles c = round(widen(Vec::load(row))) + round(sums[0] + sums[1]);
      Vec{__builtin_convertvector(round(c), Vec::Floats)}.store(row);
    }
  }
  // As tdpbssd; sums wrap around.
  template <int C, int A, int B>
  static void dot_int8() {
    const auto &a = tile<A>(), &b = tile<B>();
    for (int m = 0; m < 16; ++m) {
      uint32_t c[16];
      std::memcpy(c, tile<C>()[m], sizeof(c));
      for (int k = 0; k < 16; ++k)
        for (int i = 0; i < 64; ++i) c[i / 4] += uint32_t(int8_t(a[m][4 * k + i % 4]) * int8_t(b[k][i]));
      std::memcpy(tile<C>()[m], c, sizeof(c));
    }
  }
};

#define QVL_RENEW(value) asm volatile("" : "+m"(value))  // no register holds a vector
#include "../kernels/tile_target.inl.h"

const KernelTable kTable = QVL_TILE_KERNEL_TABLE("amx_emulated");

}  // namespace qvl::amx_emulated

namespace qvl {
static bool always_supported() { return true; }
extern const Target kAmxEmulatedTarget{"amx_emulated", always_supported, &amx_emulated::kTable, true};
}  // namespace qvl
