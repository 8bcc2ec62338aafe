// Element types that cross the Python boundary, and their scalar conversions.
#pragma once
#include <cstdint>
#include <cstring>

namespace qvl {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// body(element) with a value of the type that dtype names.
template <class Body>
inline void for_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32:
      return body(float{});
    case DType::bf16:
      return body(bf16{});
    case DType::f16:
      return body(f16{});
  }
}

inline int64_t dtype_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
inline float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  if (rest >= 0x0400u) return bits_to_float(sign | ((rest + 0x1c000u) << 13));
  const float magnitude = float(rest) * 5.9604644775390625e-08f;  // subnormal: rest * 2^-24
  return bits_to_float(sign | float_to_bits(magnitude));
}

inline void from_float(float x, float& out) { out = x; }
inline void from_float(float x, bf16& out) {
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out.bits = uint16_t((bits >> 16) | 0x40u);  // keep NaN a NaN
  } else {
    out.bits = uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
}
inline void from_float(float x, f16& out) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    out.bits = uint16_t(sign | 0x7e00u);
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    out.bits = uint16_t(sign | 0x7c00u);
  } else if (magnitude < 0x38800000u) {  // subnormal: let the float adder round to nearest even
    const float shifted = bits_to_float(magnitude) + 0.5f;
    out.bits = uint16_t(sign | (float_to_bits(shifted) - 0x3f000000u));
  } else {
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    out.bits = uint16_t(sign | ((rounded - 0x38000000u) >> 13));
  }
}

}  // namespace qvl
