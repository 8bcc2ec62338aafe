// Portable target: GCC/Clang vector extensions of four floats (SSE2 on x86-64, NEON on aarch64).
#include <cmath>

#include "../kernel_table.h"
#include "../simd_common.h"

namespace qvl::portable {

struct Vec {
  static constexpr int kWidth = 4;
  static constexpr int kPanelVectors = 2;
  static constexpr bool kHasBf16Dot = false;
  typedef float Float4 __attribute__((vector_size(16)));
  typedef int32_t Int4 __attribute__((vector_size(16)));
  Float4 v;

  static Vec zero() { return {Float4{0, 0, 0, 0}}; }
  static Vec set1(float x) { return {Float4{x, x, x, x}}; }
  template <class T>
  static Vec load(const T* p) {
    return {Float4{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
  }
  // First n lanes from memory (nothing beyond is touched), zero in the rest.
  template <class T>
  static Vec load_n(const T* p, int64_t n) {
    float lanes[4] = {0, 0, 0, 0};
    for (int64_t i = 0; i < n && i < 4; ++i) lanes[i] = to_float(p[i]);
    return load(lanes);
  }
  template <class T>
  void store(T* p) const {
    for (int i = 0; i < 4; ++i) from_float(v[i], p[i]);
  }
  template <class T>
  void store_n(T* p, int64_t n) const {
    for (int64_t i = 0; i < n && i < 4; ++i) from_float(v[i], p[i]);
  }
  // 8 bf16 -> the even and the odd elements.
  static void load_even_odd(const bf16* p, Vec& even, Vec& odd) {
    even = {Float4{to_float(p[0]), to_float(p[2]), to_float(p[4]), to_float(p[6])}};
    odd = {Float4{to_float(p[1]), to_float(p[3]), to_float(p[5]), to_float(p[7])}};
  }
  static Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
  Vec operator+(Vec b) const { return {v + b.v}; }
  Vec operator-(Vec b) const { return {v - b.v}; }
  Vec operator*(Vec b) const { return {v * b.v}; }
  Vec operator/(Vec b) const { return {v / b.v}; }
  // max and min return b where either is NaN.
  static Vec max(Vec a, Vec b) { return blend(a.v > b.v, a, b); }
  static Vec min(Vec a, Vec b) { return blend(a.v < b.v, a, b); }
  static Vec sqrt(Vec a) {
    return {Float4{std::sqrt(a.v[0]), std::sqrt(a.v[1]), std::sqrt(a.v[2]), std::sqrt(a.v[3])}};
  }
  static Vec round(Vec a) {
    return {Float4{std::nearbyint(a.v[0]), std::nearbyint(a.v[1]), std::nearbyint(a.v[2]), std::nearbyint(a.v[3])}};
  }
  // a * 2^n for integral n in [-252, 254]; in two steps so that results may be subnormal
  static Vec scale_pow2(Vec a, Vec n) {
    Float4 out = a.v;
    for (int i = 0; i < 4; ++i) {
      const int whole = int(n.v[i]), half = whole >> 1;
      out[i] = out[i] * bits_to_float(uint32_t(half + 127) << 23) * bits_to_float(uint32_t(whole - half + 127) << 23);
    }
    return {out};
  }
  // where(a < b, x, y) and where(a is NaN, x, y)
  static Vec select_lt(Vec a, Vec b, Vec x, Vec y) { return blend(a.v < b.v, x, y); }
  static Vec select_nan(Vec a, Vec x, Vec y) { return blend(a.v != a.v, x, y); }
  static bool any_lt(Vec a, Vec b) {
    const Int4 lt = a.v < b.v;
    return (lt[0] | lt[1] | lt[2] | lt[3]) != 0;
  }
  float sum() const { return (v[0] + v[1]) + (v[2] + v[3]); }
  float max_lane() const {
    const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
    return a > b ? a : b;
  }
  // 4 x 4 block of 32-bit elements: dst[i][j] = src[j][i].
  static void transpose(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j) std::memcpy(dst + i * dst_stride + j, src + j * src_stride + i, 4);
  }

 private:
  static Vec blend(Int4 mask, Vec x, Vec y) { return {(Float4)(((Int4)x.v & mask) | ((Int4)y.v & ~mask))}; }
};

// Integer dot products along k for the quantised GEMV, in vectors of eight 16-bit numbers: two products of int8, or
// four of int4 and int8, add up without overflow.
struct GemvInts {
  static constexpr int kInt8Step = 16, kInt4Step = 32;
  using Int8Value = int16_t;
  using Int4Value = int16_t;
  typedef int16_t Short8 __attribute__((vector_size(16)));
  typedef int8_t Char8 __attribute__((vector_size(8)));
  typedef int16_t Short4 __attribute__((vector_size(8)));
  struct Int8 {
    Short8 v[2];
  };
  struct Int4 {
    Short8 v[4];
  };
  Vec::Int4 v;

  static GemvInts zero() { return {Vec::Int4{0, 0, 0, 0}}; }
  static GemvInts load(const int32_t* p) {
    GemvInts sums;
    std::memcpy(&sums.v, p, sizeof(sums.v));
    return sums;
  }
  void store(int32_t* p) const { std::memcpy(p, &v, sizeof(v)); }
  GemvInts operator-(GemvInts b) const { return {v - b.v}; }
  Vec to_float() const { return {__builtin_convertvector(v, Vec::Float4)}; }
  // Transposed horizontal reduction (4x4): the sums of a, b, c and d.
  static GemvInts transpose_reduce(GemvInts a, GemvInts b, GemvInts c, GemvInts d) {
    const auto sum = [](const GemvInts& x) { return x.v[0] + x.v[1] + x.v[2] + x.v[3]; };
    return {Vec::Int4{sum(a), sum(b), sum(c), sum(d)}};
  }

  static Short8 load_values(const int16_t* p) {
    Short8 values;
    std::memcpy(&values, p, sizeof(values));
    return values;
  }
  static Short8 widen(const void* p) {
    Char8 bytes;
    std::memcpy(&bytes, p, sizeof(bytes));
    return __builtin_convertvector(bytes, Short8);
  }
  static Int8 load_int8(const int8_t* p) { return {{widen(p), widen(p + 8)}}; }
  static Int4 load_int4(const uint8_t* p) {
    const Short8 first = widen(p), second = widen(p + 8);
    return {{first & 15, second & 15, (first >> 4) & 15, (second >> 4) & 15}};
  }
  GemvInts add(Short8 x) const {
    Short4 low, high;
    std::memcpy(&low, &x, sizeof(low));
    std::memcpy(&high, reinterpret_cast<const char*>(&x) + sizeof(low), sizeof(high));
    return {v + __builtin_convertvector(low, Vec::Int4) + __builtin_convertvector(high, Vec::Int4)};
  }
  static GemvInts dot(GemvInts acc, const Int8& w, const int16_t* x) {
    return acc.add(w.v[0] * load_values(x) + w.v[1] * load_values(x + 8));
  }
  static GemvInts dot(GemvInts acc, const Int4& w, const int16_t* x) {
    return acc.add(w.v[0] * load_values(x) + w.v[1] * load_values(x + 8) + w.v[2] * load_values(x + 16) +
                   w.v[3] * load_values(x + 24));
  }
  // Scales of four weight rows' groups in the lanes of transpose_reduce.
  template <int GROUP, class Scale>
  static Vec load_scales(const char* p, int64_t stride) {
    float scales[4];
    for (int r = 0; r < 4; ++r) {
      Scale scale;
      std::memcpy(&scale, p + r * stride, sizeof(scale));
      scales[r] = qvl::to_float(scale);
    }
    return Vec::load(scales);
  }
  // Zero-points of the same groups, in the same lanes: low nibbles or, with odd = 1, high ones.
  template <int GROUP>
  static Vec load_zeros(const uint8_t* p, int64_t stride, int64_t odd) {
    float zeros[4];
    for (int r = 0; r < 4; ++r) zeros[r] = float(p[r * stride] >> 4 * odd & 15);
    return Vec::load(zeros);
  }
};

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
    return {{Vec::Float4{float(p[0]), float(p[1]), float(p[2]), float(p[3])}}};
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
