// Rows of a quantised weight, split over threads.
#include "quant_embedding.h"

#include "../threads.h"

namespace qvl {

namespace {

template <class T>
void dequantize_int8(const Weight& weight, int64_t row, int64_t k, T* out) {
  const auto* values = static_cast<const int8_t*>(weight.w) + row * weight.stride;
  const float scale = static_cast<const float*>(weight.scales)[row * weight.scale_stride];
  for (int64_t i = 0; i < k; ++i) from_float(float(values[i]) * scale, out[i]);
}

template <class T>
void dequantize_int4(const Weight& weight, int64_t row, int64_t k, T* out) {
  const auto* bytes = static_cast<const uint8_t*>(weight.w) + row * weight.stride;
  const auto* scales = static_cast<const uint16_t*>(weight.scales) + row * weight.scale_stride;
  const uint8_t* zeros = weight.zeros ? weight.zeros + row * weight.zero_stride : nullptr;
  for (int64_t block = 0; block < k; block += 32, bytes += 16) {
    const float scale = int4_scale(scales, weight.scale_dtype, block / weight.group);
    const int zero = int4_zero(zeros, block / weight.group);
    T values[32];
    for (int64_t i = 0; i < 16; ++i) {
      from_float(float(int(bytes[i] & 15) - zero) * scale, values[i]);
      from_float(float(int(bytes[i] >> 4) - zero) * scale, values[16 + i]);
    }
    std::memcpy(out + block, values, size_t(k - block < 32 ? k - block : 32) * sizeof(T));
  }
}

}  // namespace

int64_t first_bad_id(const QuantEmbeddingArgs& args) {
  for (int64_t i = 0; i < args.count; ++i)
    if (args.ids[i] < 0 || args.ids[i] >= args.vocabulary) return i;
  return -1;
}

void run_quant_embedding(const QuantEmbeddingArgs& args) {
  parallel_ranges(args.count, 1 + 32768 / (args.k + 1), [&](int64_t begin, int64_t end) {
    for_dtype(args.dtype, [&](auto element) {
      using T = decltype(element);
      for (int64_t i = begin; i < end; ++i) {
        T* out = static_cast<T*>(args.out) + i * args.k;
        if (args.weight.format == WeightFormat::int8) {
          dequantize_int8(args.weight, args.ids[i], args.k, out);
        } else {
          dequantize_int4(args.weight, args.ids[i], args.k, out);
        }
      }
    });
  });
}

}  // namespace qvl
