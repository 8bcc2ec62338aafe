// Dynamic quantisation of activations to int8, one scale per group: see QuantizeArgs.

constexpr int64_t kMaxGroup = 128;

template <class T>
inline void quantize_group(const T* x, int64_t count, int8_t* values, float* scale) {
  alignas(64) float rounded[kMaxGroup];
  Vec amax_lanes = Vec::zero(), nonfinite = Vec::zero();
  QVL_FOR_LANES(i, lanes, count) {
    const Vec value = load_lanes(x + i, lanes);
    amax_lanes = Vec::max(Vec::max(value, Vec::zero() - value), amax_lanes);
    nonfinite = Vec::fma(value, Vec::zero(), nonfinite);
    value.store(rounded + i);
  }
  const float amax = amax_lanes.max_lane(), invalid = nonfinite.sum();
  *scale = amax / 127.0f + invalid;
  if (!(amax > kTinyActivation) || invalid != 0.0f) {
    std::memset(values, 0, size_t(count));
    return;
  }
  const Vec inverse = Vec::set1(127.0f / amax);
  QVL_FOR_LANES(i, lanes, count) { Vec::round(Vec::load(rounded + i) * inverse).store(rounded + i); }
  for (int64_t i = 0; i < count; ++i) values[i] = int8_t(int32_t(rounded[i]));
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
  for_dtype(a.dtype, [&](auto element) { quantize_rows_typed<decltype(element)>(a, begin, end); });
}
