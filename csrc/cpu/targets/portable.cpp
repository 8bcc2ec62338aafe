// Portable target: GCC/Clang vector extensions of four floats (SSE2 on x86-64, NEON on aarch64).
#include <cmath>
#include <utility>

#include "../kernel_table.h"
#include "../simd_common.h"

namespace qvl::portable {

struct Vec {
  static constexpr int kWidth = 4;
  static constexpr int kPanelVectors = 2;
  static constexpr bool kHasBf16Dot = false;
#include "portable_vec.inl.h"
};

#include "portable_gemv_ints.inl.h"

// Words of the quantised GEMM: one element as a float. Products of bytes summed over a group are exact in fp32.
struct GemmInts {
  using Weight = float;
  static constexpr int kPerWord = 1;
  Vec v;

  static GemmInts set1(int32_t x) { return {Vec::set1(float(x))}; }
  static GemmInts load(const uint32_t* p) { return {Vec::load(reinterpret_cast<const float*>(p))}; }
  void store(uint32_t* p) const { v.store(reinterpret_cast<float*>(p)); }
  void store(float* p) const { v.store(p); }
  static GemmInts multiply_add(GemmInts acc, GemmInts activations, uint32_t weight) {
    return {Vec::fma(activations.v, Vec::set1(bits_to_float(weight)), acc.v)};
  }
  Vec to_float() const { return v; }
  static int32_t zero_point_compensation(const char*, int64_t) { return 0; }
  static GemmInts load_values(const int8_t* p) {
    return {Vec::from_lanes([&](int i) { return float(p[i]); })};
  }
  // 16 bytes of nibbles, the low ones first, as 32 elements nibble - zero.
  static void unpack(const uint8_t* nibbles, int zero, Weight* out) {
    for (int j = 0; j < 16; ++j) {
      out[j] = float(int(nibbles[j] & 15) - zero);
      out[j + 16] = float(int(nibbles[j] >> 4) - zero);
    }
  }
  static GemmInts pack(const Vec* x) { return {Vec::round(x[0])}; }
};

#include "../kernels/vector_target.inl.h"

const KernelTable kTable = QVL_KERNEL_TABLE("portable");

}  // namespace qvl::portable

namespace qvl {
static bool always_supported() { return true; }
extern const Target kPortableTarget{"portable", always_supported, &portable::kTable};
}  // namespace qvl
