// Products of few rows with weights as stored, each weight read from memory once. Eight rows of weights side by side, the next
// eight prefetched in the order of their addresses, as in quant_gemv.inl.h: on Zen 5 88 to 95 % of plain reads, without that
// 75 to 90. Sums are fp32; bf16 is multiplied in pairs by the dot instruction, else weights are widened in registers.

constexpr int64_t kGemvBlock = 2 * Vec::kWidth;  // elements of k per step

// Two vectors of weights in the order in which gemv_prepare lays out x.
template <class T>
inline void gemv_load(const T* p, Vec& first, Vec& second) {
  first = Vec::load(p);
  second = Vec::load(p + Vec::kWidth);
}
inline void gemv_load(const bf16* p, Vec& first, Vec& second) { Vec::load_even_odd(p, first, second); }

// One row x [k] widened, in the order of gemv_load, padded with zeros to a multiple of kGemvBlock.
template <class T>
inline void gemv_prepare_typed(const T* x, int64_t k, float* out) {
  for (int64_t i = 0; i < k; i += kGemvBlock) {
    Vec first, second;
    if (i + kGemvBlock <= k) {
      gemv_load(x + i, first, second);
    } else {
      T tail[kGemvBlock];
      std::memset(tail, 0, sizeof(tail));
      std::memcpy(tail, x + i, size_t(k - i) * sizeof(T));
      gemv_load(static_cast<const T*>(tail), first, second);
    }
    first.store(out + i);
    second.store(out + i + Vec::kWidth);
  }
}

// dot: x as it is, padded with zeros; fma: widened.
void gemv_prepare(const void* x, DType dtype, int64_t k, Route route, float* out) {
  if (route == Route::dot) {
    if (k > 0) std::memcpy(out, x, size_t(k) * 2);  // rows of no elements have no address
    std::memset(reinterpret_cast<char*>(out) + k * 2, 0, size_t((kGemvBlock - k % kGemvBlock) % kGemvBlock) * 2);
    return;
  }
  switch (dtype) {
    case DType::f32: return gemv_prepare_typed(static_cast<const float*>(x), k, out);
    case DType::bf16: return gemv_prepare_typed(static_cast<const bf16*>(x), k, out);
    case DType::f16: return gemv_prepare_typed(static_cast<const f16*>(x), k, out);
  }
}

// acc[r][m] += w[r, block] . x[m, block]
template <bool DOT, int ROWS, int M, class V, class T>  // V is always Vec, as in multiply_add
inline void gemv_step(const T* w, int64_t w_stride, const float* x, int64_t x_stride, V (&acc)[ROWS][M]) {
  if constexpr (DOT) {
    V values[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) values[m] = V::load(x + m * x_stride);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const V weights = V::load(reinterpret_cast<const float*>(w + r * w_stride));
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) acc[r][m] = V::dot_vectors(acc[r][m], weights, values[m]);
    }
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      V first, second;
      gemv_load(w + r * w_stride, first, second);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        acc[r][m] = V::fma(first, V::load(x + m * x_stride), acc[r][m]);
        acc[r][m] = V::fma(second, V::load(x + m * x_stride + V::kWidth), acc[r][m]);
      }
    }
  }
}

// sums[m * ROWS + r] = w[r, :] . x[m, :]. fetch: the rows after these are prefetched meanwhile, in the order of their addresses.
template <bool DOT, int ROWS, int M, class T>
inline void gemv_tile(const GemvArgs& a, const T* w, int64_t w_stride, const float* x, bool fetch, float* sums) {
  Vec acc[ROWS][M];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) acc[r][m] = Vec::zero();
  constexpr int64_t kWords = DOT ? kGemvBlock / 2 : kGemvBlock;  // of prepared x per step
  constexpr int64_t kLine = 64, kLines = ROWS * kGemvBlock * int64_t(sizeof(T)) / kLine;  // of memory per step
  const char* next = reinterpret_cast<const char*>(w + ROWS * w_stride);
  int64_t i = 0;
  for (; i + kGemvBlock <= a.k; i += kGemvBlock, x += kWords, next += kLines * kLine) {
    if (fetch) {
#pragma GCC unroll 16
      for (int line = 0; line < kLines; ++line) __builtin_prefetch(next + line * kLine, 0, 3);
    }
    gemv_step<DOT>(w + i, w_stride, x, a.x_stride, acc);
  }
  if (i < a.k) {
    T tail[ROWS * kGemvBlock];
    std::memset(tail, 0, sizeof(tail));
    for (int r = 0; r < ROWS; ++r) std::memcpy(tail + r * kGemvBlock, w + r * w_stride + i, size_t(a.k - i) * sizeof(T));
    gemv_step<DOT>(static_cast<const T*>(tail), kGemvBlock, x, a.x_stride, acc);
  }
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < ROWS; ++r) sums[m * ROWS + r] = acc[r][m].sum();
}

constexpr int kGemvChunk = 4;  // rows of x at a time

// ROWS outputs of every row of x. Where that takes several chunks of x, all but the first find the weights in cache.
template <bool DOT, int ROWS, class T>
inline void gemv_sums(const GemvArgs& a, const T* w, int64_t w_stride, float* sums) {
  const int64_t chunks = (a.m + kGemvChunk - 1) / kGemvChunk;
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t m = a.m * c / chunks;
    const float* x = a.x + m * a.x_stride;
    float* out = sums + m * ROWS;
    switch (a.m * (c + 1) / chunks - m) {
      case 1: gemv_tile<DOT, ROWS, 1>(a, w, w_stride, x, true, out); break;
      case 2: gemv_tile<DOT, ROWS, 2>(a, w, w_stride, x, c == 0, out); break;
      case 3: gemv_tile<DOT, ROWS, 3>(a, w, w_stride, x, c == 0, out); break;
      default: gemv_tile<DOT, ROWS, 4>(a, w, w_stride, x, c == 0, out);
    }
  }
}

template <bool DOT, int ROWS, class T>
inline void gemv_group(const GemvArgs& a, int64_t n) {
  alignas(64) float sums[ROWS * kGemvMaxRows], gated[ROWS * kGemvMaxRows];
  gemv_sums<DOT, ROWS>(a, static_cast<const T*>(a.w) + n * a.w_stride, a.w_stride, sums);
  if (a.activation == Activation::swiglu)
    gemv_sums<DOT, ROWS>(a, static_cast<const T*>(a.w2) + n * a.w2_stride, a.w2_stride, gated);
  if (a.bias)
    for (int64_t i = 0; i < ROWS * a.m; ++i) sums[i] += to_float(static_cast<const T*>(a.bias)[n + i % ROWS]);
  QVL_FOR_LANES(i, lanes, ROWS * a.m) {
    Vec y = Vec::load_n(sums + i, lanes);
    if (a.activation == Activation::gelu_tanh) y = vec_gelu_tanh(y);
    if (a.activation == Activation::swiglu) y = vec_silu(y) * Vec::load_n(gated + i, lanes);
    y.store_n(sums + i, lanes);
  }
  for (int64_t m = 0; m < a.m; ++m)
    for (int r = 0; r < ROWS; ++r) {
      float y = sums[m * ROWS + r];
      if (a.residual) y += to_float(static_cast<const T*>(a.residual)[m * a.residual_stride + n + r]);
      from_float(y, static_cast<T*>(a.out)[m * a.out_stride + n + r]);
    }
}

template <bool DOT, int ROWS, class T>
inline void gemv_groups(const GemvArgs& a, int64_t n_begin, int64_t n_end) {
  int64_t n = n_begin;
  for (; n + ROWS <= n_end; n += ROWS) gemv_group<DOT, ROWS, T>(a, n);
  for (; n < n_end; ++n) gemv_group<DOT, 1, T>(a, n);
}

// Rows of weights side by side so that their sums fit in registers, and enough of them to hide the instructions' latency.
template <bool DOT, class T>
inline void gemv_rows_typed(const GemvArgs& a, int64_t n_begin, int64_t n_end) {
  constexpr bool kMany = Vec::kPanelVectors == 4;  // 32 vector registers, else 16
  if (a.m == 1) return gemv_groups<DOT, 8, T>(a, n_begin, n_end);
  if constexpr (DOT) {
    if (a.m <= 3) return gemv_groups<DOT, 8, T>(a, n_begin, n_end);
    if (a.m > 4) return gemv_groups<DOT, 6, T>(a, n_begin, n_end);
  } else if (a.m == 2) {
    return gemv_groups<DOT, kMany ? 8 : 4, T>(a, n_begin, n_end);
  }
  return gemv_groups<DOT, kMany ? 4 : 2, T>(a, n_begin, n_end);
}

void gemv_rows(const GemvArgs& a, int64_t n_begin, int64_t n_end) {
  if constexpr (Vec::kHasDot) {
    if (a.route == Route::dot) return gemv_rows_typed<true, bf16>(a, n_begin, n_end);
  }
  switch (a.dtype) {
    case DType::f32: return gemv_rows_typed<false, float>(a, n_begin, n_end);
    case DType::bf16: return gemv_rows_typed<false, bf16>(a, n_begin, n_end);
    case DType::f16: return gemv_rows_typed<false, f16>(a, n_begin, n_end);
  }
}
