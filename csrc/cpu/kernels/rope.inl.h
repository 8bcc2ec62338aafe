// Rotary embedding (RoPE) of q and k heads: optional RMS norm, rounded as the separate op would, then
// x cos + rotate_half(x) sin in fp32.

template <class T>
inline void load_cos_sin(const void* table, DType cos_sin_dtype, int64_t offset, int64_t size, float* out) {
  QVL_FOR_LANES(i, lanes, size) {
    const Vec x = cos_sin_dtype == DType::f32 ? load_lanes(static_cast<const float*>(table) + offset + i, lanes)
                                              : load_lanes(static_cast<const T*>(table) + offset + i, lanes);
    store_lanes(x, out + i, lanes);
  }
}

template <class T>
inline void rope_head(const T* x, const T* weight, float eps, const float* cos, const float* sin, int64_t size,
                      T* out) {
  alignas(64) float head[kMaxHeadDim];
  QVL_FOR_LANES(i, lanes, size) { store_lanes(load_lanes(x + i, lanes), head + i, lanes); }
  if (weight) {
    Vec squares = Vec::zero();
    QVL_FOR_LANES(i, lanes, size) {
      const Vec h = load_lanes(static_cast<const float*>(head) + i, lanes);
      squares = Vec::fma(h, h, squares);
    }
    const Vec rstd = Vec::set1(1.0f) / Vec::sqrt(Vec::set1(squares.sum() / float(size) + eps));
    QVL_FOR_LANES(i, lanes, size) {
      const Vec normed = round_to<T>(load_lanes(static_cast<const float*>(head) + i, lanes) * rstd);
      store_lanes(round_to<T>(normed * load_lanes(weight + i, lanes)), head + i, lanes);
    }
  }
  const int64_t half = size / 2;
  const float *low = head, *high = head + half;
  QVL_FOR_LANES(i, lanes, half) {
    const Vec a = load_lanes(low + i, lanes), b = load_lanes(high + i, lanes);
    const Vec turned_low = a * load_lanes(cos + i, lanes) - b * load_lanes(sin + i, lanes);
    const Vec turned_high = b * load_lanes(cos + half + i, lanes) + a * load_lanes(sin + half + i, lanes);
    store_lanes(turned_low, out + i, lanes);
    store_lanes(turned_high, out + half + i, lanes);
  }
}

template <class T>
void rope_rows_typed(const RopeArgs& a, int64_t begin, int64_t end) {
  alignas(64) float cos[kMaxHeadDim], sin[kMaxHeadDim];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / a.time, t = row % a.time;
    load_cos_sin<T>(a.cos.data, a.cos_sin_dtype, b * a.cos.stride_b + t * a.cos.stride_t, a.head_dim, cos);
    load_cos_sin<T>(a.sin.data, a.cos_sin_dtype, b * a.sin.stride_b + t * a.sin.stride_t, a.head_dim, sin);
    const T* q = static_cast<const T*>(a.q.data) + b * a.q.stride_b + t * a.q.stride_t;
    const T* k = static_cast<const T*>(a.k.data) + b * a.k.stride_b + t * a.k.stride_t;
    T* q_out = static_cast<T*>(a.q_out.data) + b * a.q_out.stride_b + t * a.q_out.stride_t;
    T* k_out = static_cast<T*>(a.k_out.data) + b * a.k_out.stride_b + t * a.k_out.stride_t;
    for (int64_t h = 0; h < a.heads; ++h)
      rope_head(q + h * a.q.stride_h, static_cast<const T*>(a.q_weight), a.eps, cos, sin, a.head_dim,
                q_out + h * a.q_out.stride_h);
    for (int64_t h = 0; h < a.kv_heads; ++h)
      rope_head(k + h * a.k.stride_h, static_cast<const T*>(a.k_weight), a.eps, cos, sin, a.head_dim,
                k_out + h * a.k_out.stride_h);
  }
}

void rope_rows(const RopeArgs& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto element) { rope_rows_typed<decltype(element)>(a, begin, end); });
}
