// RMS norm and layer norm of rows: one kernel, in which RMS norm is the case without mean and bias. An optional
// residual is added first and rounded to T, as a separate add would. RMS norm rounds to T before the weight, as
// transformers does.

template <class T>
void norm_rows_typed(const NormArgs& a, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(a.weight);
  const T* bias = static_cast<const T*>(a.bias);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    T* y = static_cast<T*>(a.y) + row * a.y_stride;
    if (a.residual) {
      const T* residual = static_cast<const T*>(a.residual) + row * a.residual_stride;
      T* sum = static_cast<T*>(a.sum) + row * a.sum_stride;
      QVL_FOR_LANES(i, lanes, a.size) {
        store_lanes(load_lanes(x + i, lanes) + load_lanes(residual + i, lanes), sum + i, lanes);
      }
      x = sum;
    }
    float mean_value = 0.0f;
    if (bias) {
      Vec total = Vec::zero();
      QVL_FOR_LANES(i, lanes, a.size) { total = total + load_lanes(x + i, lanes); }
      mean_value = total.sum() / float(a.size);
    }
    const Vec mean = Vec::set1(mean_value);
    Vec squares0 = Vec::zero(), squares1 = Vec::zero();
    int64_t i = 0;
    for (; i + 2 * Vec::kWidth <= a.size; i += 2 * Vec::kWidth) {
      const Vec d0 = Vec::load(x + i) - mean, d1 = Vec::load(x + i + Vec::kWidth) - mean;
      squares0 = Vec::fma(d0, d0, squares0);
      squares1 = Vec::fma(d1, d1, squares1);
    }
    float square_sum = (squares0 + squares1).sum();
    for (; i < a.size; ++i) {
      const float d = to_float(x[i]) - mean_value;
      square_sum += d * d;
    }
    const Vec rstd = Vec::set1(1.0f) / Vec::sqrt(Vec::set1(square_sum / float(a.size) + a.eps));
    QVL_FOR_LANES(j, lanes, a.size) {
      const Vec value = load_lanes(x + j, lanes), w = load_lanes(weight + j, lanes);
      const Vec out =
          bias ? Vec::fma((value - mean) * rstd, w, load_lanes(bias + j, lanes)) : round_to<T>(value * rstd) * w;
      store_lanes(out, y + j, lanes);
    }
  }
}

void norm_rows(const NormArgs& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto element) { norm_rows_typed<decltype(element)>(a, begin, end); });
}
