// Activations rounded to int8 in groups: see QuantizeArgs.

template <class T>
inline void quantize_group(const T* x, int64_t count, int8_t* values, float* scale) {
  float top = 0.0f, poison = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float value = to_float(x[i]), magnitude = value < 0.0f ? -value : value;
    if (magnitude > top) top = magnitude;
    poison += value * 0.0f;
  }
  const float inverse = top > kTinyActivation ? 127.0f / top : 0.0f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves no bits behind the point, rounded to even
  for (int64_t i = 0; i < count; ++i) {
    const float scaled = to_float(x[i]) * inverse;
    values[i] = poison == 0.0f ? int8_t(int32_t((scaled + kRound) - kRound)) : int8_t(0);
  }
  *scale = top / 127.0f + poison;
}

template <class T>
void quantize_rows_typed(const QuantizeArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    int8_t* values = a.values + row * a.k_padded;
    float* scales = a.scales + row * (a.k_padded / a.group);
    std::memset(values + a.k, 0, size_t(a.k_padded - a.k));
    for (int64_t i = 0; i < a.k; i += a.group)
      quantize_group(x + i, min_i(a.group, a.k - i), values + i, scales + i / a.group);
  }
}

void quantize_rows(const QuantizeArgs& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::f32: return quantize_rows_typed<float>(a, begin, end);
    case DType::bf16: return quantize_rows_typed<bf16>(a, begin, end);
    case DType::f16: return quantize_rows_typed<f16>(a, begin, end);
  }
}
