// Matrix-vector products over int8 and int4 weights: integer sums per group of activations, fp32 sums over groups.

inline int32_t int8_dot(const int8_t* w, const int8_t* x, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += int32_t(w[i]) * x[i];
  return sum;
}

// Blocks of 32 inputs: byte j of 16 holds input j in its low and input j + 16 in its high nibble.
inline int32_t int4_dot(const uint8_t* w, const int8_t* x, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; i += 32, w += 16)
    for (int64_t j = 0; j < 16; ++j) sum += (int32_t(w[j] & 15) - 8) * x[i + j] + (int32_t(w[j] >> 4) - 8) * x[i + j + 16];
  return sum;
}

inline float quant_dot(const QuantGemvArgs& a, const void* w, const void* scales, int64_t m) {
  const int8_t* x = a.values + m * a.k_padded;
  const float* x_scales = a.x_scales + m * (a.k_padded / a.group);
  float sum = 0.0f;
  if (a.format == WeightFormat::int8) {
    for (int64_t i = 0; i < a.k; i += a.group)
      sum += x_scales[i / a.group] * float(int8_dot(static_cast<const int8_t*>(w) + i, x + i, min_i(a.group, a.k - i)));
    return sum * *static_cast<const float*>(scales);
  }
  for (int64_t i = 0; i < a.k_padded; i += a.group) {
    const float scale = x_scales[i / a.group] * to_float(static_cast<const bf16*>(scales)[i / a.group]);
    sum += scale * float(int4_dot(static_cast<const uint8_t*>(w) + i / 2, x + i, a.group));
  }
  return sum;
}

template <class T>
void quant_gemv_rows_typed(const QuantGemvArgs& a, int64_t n_begin, int64_t n_end) {
  const int64_t scale_bytes = a.format == WeightFormat::int8 ? 4 : 2;
  const auto row = [](const void* base, int64_t bytes) { return static_cast<const char*>(base) + bytes; };
  for (int64_t n = n_begin; n < n_end; ++n) {
    const float bias = a.bias ? to_float(static_cast<const T*>(a.bias)[n]) : 0.0f;
    for (int64_t m = 0; m < a.m; ++m) {
      float y = quant_dot(a, row(a.w, n * a.w_stride), row(a.scales, n * a.scale_stride * scale_bytes), m) + bias;
      if (a.activation == Activation::gelu_tanh) y = scalar_gelu_tanh(y);
      if (a.activation == Activation::swiglu)
        y = scalar_silu(y) * quant_dot(a, row(a.w2, n * a.w2_stride), row(a.scales2, n * a.scale2_stride * scale_bytes), m);
      if (a.residual) y += to_float(static_cast<const T*>(a.residual)[m * a.residual_stride + n]);
      from_float(y, static_cast<T*>(a.out)[m * a.out_stride + n]);
    }
  }
}

void quant_gemv_rows(const QuantGemvArgs& a, int64_t n_begin, int64_t n_end) {
  switch (a.dtype) {
    case DType::f32: return quant_gemv_rows_typed<float>(a, n_begin, n_end);
    case DType::bf16: return quant_gemv_rows_typed<bf16>(a, n_begin, n_end);
    case DType::f16: return quant_gemv_rows_typed<f16>(a, n_begin, n_end);
  }
}
