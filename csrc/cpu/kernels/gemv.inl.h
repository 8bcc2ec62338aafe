// Dense GEMV and small-M GEMM (up to 16 rows of activations): every weight is read from memory once. A thread reads its
// weight rows as a few streams side by side, each from its first row to its last, because the hardware prefetchers
// follow a stream from page to page: 97 to 100 % of the achieved read bandwidth on Zen 5. Neighbouring rows side by
// side, of which each begins a page, reach 88 to 92 %. Sums are fp32; bf16 is multiplied in pairs by the dot
// instruction, other weights are widened in registers.

constexpr int64_t kGemvKStep = 2 * Vec::kWidth;  // elements of k per step
constexpr int64_t kGemvPrefetchBytes = 1024;     // distance of the software prefetch in a stream, from 3 rows of x on
constexpr int64_t kGemvNBlock = 16;              // weight rows of a stream between two vectorised epilogues

// Two vectors of weights in the order in which gemv_prepare lays out x.
template <class T>
inline void gemv_load(const T* p, Vec& first, Vec& second) {
  first = Vec::load(p);
  second = Vec::load(p + Vec::kWidth);
}
inline void gemv_load(const bf16* p, Vec& first, Vec& second) { Vec::load_even_odd(p, first, second); }

// One row x [k] widened, in the order of gemv_load, padded with zeros to a multiple of kGemvKStep.
template <class T>
inline void gemv_prepare_typed(const T* x, int64_t k, float* out) {
  for (int64_t i = 0; i < k; i += kGemvKStep) {
    Vec first, second;
    if (i + kGemvKStep <= k) {
      gemv_load(x + i, first, second);
    } else {
      T tail[kGemvKStep];
      std::memset(tail, 0, sizeof(tail));
      std::memcpy(tail, x + i, size_t(k - i) * sizeof(T));
      gemv_load(static_cast<const T*>(tail), first, second);
    }
    first.store(out + i);
    second.store(out + i + Vec::kWidth);
  }
}

// bf16_dot: x as it is, padded with zeros; fma: widened.
void gemv_prepare(const void* x, DType dtype, int64_t k, GemmBackend backend, float* out) {
  if (backend == GemmBackend::bf16_dot) {
    if (k > 0) std::memcpy(out, x, size_t(k) * 2);  // rows of no elements have no address
    std::memset(reinterpret_cast<char*>(out) + k * 2, 0, size_t((kGemvKStep - k % kGemvKStep) % kGemvKStep) * 2);
    return;
  }
  for_dtype(dtype, [&](auto element) { gemv_prepare_typed(static_cast<const decltype(element)*>(x), k, out); });
}

// acc[r][m] += w[r, block] . x[m, block]
template <bool DOT, int ROWS, int M, class V, class T>  // V is always Vec, as in multiply_add
inline void gemv_step(const T* w, int64_t w_stride, const float* x, int64_t x_stride, V (&acc)[ROWS][M]) {
  // From 3 rows of x on, waiting multiplications fill the out-of-order window, and later loads do not enter it.
  if constexpr (M > 2) {
    constexpr int64_t kBytes = kGemvKStep * int64_t(sizeof(T));
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
      for (int64_t i = 0; i < kBytes; i += 64)
        __builtin_prefetch(
            reinterpret_cast<const void*>(uintptr_t(w + r * w_stride) + uintptr_t(kGemvPrefetchBytes + i)), 0, 3);
  }
  if constexpr (DOT) {
    V weights[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) weights[r] = V::load(reinterpret_cast<const float*>(w + r * w_stride));
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const V values = V::load(x + m * x_stride);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) acc[r][m] = V::dot_vectors(acc[r][m], weights[r], values);
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

// sums[m][r][0] = w[r, :] . x[m, :]
template <bool DOT, int ROWS, int M, class T>
inline void gemv_tile(const GemvArgs& a, const T* w, int64_t w_stride, const float* x, float* sums) {
  Vec acc[ROWS][M];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) acc[r][m] = Vec::zero();
  constexpr int64_t kWords = DOT ? kGemvKStep / 2 : kGemvKStep;  // of prepared x per step
  int64_t i = 0;
  for (; i + kGemvKStep <= a.k; i += kGemvKStep, x += kWords) gemv_step<DOT>(w + i, w_stride, x, a.x_stride, acc);
  if (i < a.k) {
    T tail[ROWS * kGemvKStep];
    std::memset(tail, 0, sizeof(tail));
    for (int r = 0; r < ROWS; ++r)
      std::memcpy(tail + r * kGemvKStep, w + r * w_stride + i, size_t(a.k - i) * sizeof(T));
    gemv_step<DOT>(static_cast<const T*>(tail), kGemvKStep, x, a.x_stride, acc);
  }
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < ROWS; ++r) sums[(m * ROWS + r) * kGemvNBlock] = acc[r][m].sum();
}

constexpr int kGemvTileM = 4;  // rows of x at a time

// gemv_tile for `count` rows of x, at most M.
template <bool DOT, int ROWS, int M, class T>
inline void gemv_tile_m(const GemvArgs& a, int64_t count, const T* w, int64_t w_stride, const float* x, float* sums) {
  if constexpr (M > 1) {
    if (count < M) return gemv_tile_m<DOT, ROWS, M - 1>(a, count, w, w_stride, x, sums);
  }
  gemv_tile<DOT, ROWS, M>(a, w, w_stride, x, sums);
}

// sums[m][r][i] = w[r, i, :] . x[m, :] for `rows` rows of every stream r. x takes several passes of kGemvTileM rows;
// all but the first find the weights in cache.
template <bool DOT, int ROWS, class T>
inline void gemv_sums(const GemvArgs& a, const T* w, int64_t w_stride, int64_t apart, int64_t rows, float* sums) {
  const int64_t chunks = (a.m + kGemvTileM - 1) / kGemvTileM;
  for (int64_t i = 0; i < rows; ++i, w += w_stride)
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t m = a.m * c / chunks, count = a.m * (c + 1) / chunks - m;
      float* out = sums + m * ROWS * kGemvNBlock + i;
      gemv_tile_m<DOT, ROWS, kGemvTileM>(a, count, w, apart * w_stride, a.x + m * a.x_stride, out);
    }
}

// Epilogue: outputs [n, n + rows) of row m from their sums, with bias, activation and residual. up_sums: SwiGLU's.
template <class T>
inline void gemv_epilogue(const LinearArgs& a, int64_t m, int64_t n, int64_t rows, const float* sums,
                          const float* up_sums) {
  QVL_FOR_LANES(r, lanes, rows) {
    Vec y = Vec::load(sums + r);
    if (a.weight.bias) y = y + load_lanes(static_cast<const T*>(a.weight.bias) + n + r, lanes);
    if (a.activation == Activation::gelu_tanh) y = vec_gelu_tanh(y);
    if (a.activation == Activation::swiglu) y = vec_silu(y) * Vec::load(up_sums + r);
    if (a.residual) y = y + load_lanes(static_cast<const T*>(a.residual) + m * a.residual_stride + n + r, lanes);
    store_lanes(y, static_cast<T*>(a.out) + m * a.out_stride + n + r, lanes);
  }
}

// ROWS streams of `rows` outputs each.
template <bool DOT, int ROWS, class T>
inline void gemv_streams(const GemvArgs& a, int64_t n_begin, int64_t apart) {
  alignas(64) float sums[kGemvMaxM * ROWS * kGemvNBlock], up_sums[kGemvMaxM * ROWS * kGemvNBlock];
  for (int64_t i = 0; i < apart; i += kGemvNBlock) {
    const int64_t rows = min_i(kGemvNBlock, apart - i), n = n_begin + i;
    gemv_sums<DOT, ROWS>(a, static_cast<const T*>(a.weight.w) + n * a.weight.stride, a.weight.stride, apart, rows,
                         sums);
    if (a.activation == Activation::swiglu)
      gemv_sums<DOT, ROWS>(a, static_cast<const T*>(a.up.w) + n * a.up.stride, a.up.stride, apart, rows, up_sums);
    for (int64_t m = 0; m < a.m; ++m)
      for (int64_t r = 0; r < ROWS; ++r) {
        const int64_t at = (m * ROWS + r) * kGemvNBlock;
        gemv_epilogue<T>(a, m, n + r * apart, rows, sums + at, up_sums + at);
      }
  }
}

template <bool DOT, int ROWS, class T>
inline void gemv_split(const GemvArgs& a, int64_t n_begin, int64_t n_end) {
  const int64_t apart = (n_end - n_begin) / ROWS, rest = n_begin + ROWS * apart;
  gemv_streams<DOT, ROWS, T>(a, n_begin, apart);
  gemv_streams<DOT, 1, T>(a, rest, n_end - rest);
}

// Four streams read fastest. Six load x less often per weight, which pays with the dot instruction from 5 rows on; with
// 16 vector registers and more than 2 rows, the sums of only two fit.
template <bool DOT, class T>
inline void gemv_rows_typed(const GemvArgs& a, int64_t n_begin, int64_t n_end) {
  constexpr bool kMany = Vec::kPanelVectors == 4;  // 32 vector registers, else 16
  if (DOT && a.m > kGemvTileM) return gemv_split<DOT, 6, T>(a, n_begin, n_end);
  if (!kMany && a.m > 2) return gemv_split<DOT, 2, T>(a, n_begin, n_end);
  return gemv_split<DOT, 4, T>(a, n_begin, n_end);
}

void gemv_rows(const GemvArgs& a, int64_t n_begin, int64_t n_end) {
  if constexpr (Vec::kHasBf16Dot) {
    if (a.backend == GemmBackend::bf16_dot) return gemv_rows_typed<true, bf16>(a, n_begin, n_end);
  }
  for_dtype(a.dtype, [&](auto element) { gemv_rows_typed<false, decltype(element)>(a, n_begin, n_end); });
}
