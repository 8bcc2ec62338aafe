// Dense GEMM. Activations are packed into panels, weights are broadcast as they lie in memory: no weight packing. The
// micro-kernel holds out^T in registers: NR weight rows by MV vectors of activation rows. Both backends step over
// 32-bit words of k: a float (fma) or a pair of bf16 (bf16_dot).

template <bool DOT, class V>  // V is always Vec: a parameter only so that targets without dot_pairs compile
inline V multiply_add(V acc, V a, const char* word) {
  uint32_t bits;
  std::memcpy(&bits, word, 4);
  if constexpr (DOT) {
    return V::dot_pairs(acc, a, bits);
  } else {
    float value;
    std::memcpy(&value, &bits, 4);
    return V::fma(a, V::set1(value), acc);
  }
}

// One panel times a block of weight rows: c[n][lane] (+)= sum_k w[n][k] * panel[k][lane].
struct GemmBlock {
  const float* panel;  // [words][vectors * kWidth]
  const char* w;
  int64_t w_row_bytes, w_word_bytes;  // from a weight row to the next, and from a word of k to the next
  int64_t words, rows;
  float* c;
  int64_t c_stride;
  bool accumulate;
};

// NR weight rows, the first of them w, into rows c. PREFETCH: software prefetch of the NR rows after these, so that the
// first panel of a tile does not wait for memory at every new row.
template <bool DOT, int MV, int NR, bool PREFETCH>
inline void gemm_microkernel(const GemmBlock& b, const char* w, float* c) {
  // Locals, because the compiler would read the struct again after every store to c.
  const int64_t w_row = b.w_row_bytes, w_word = b.w_word_bytes, words = b.words, c_stride = b.c_stride;
  const bool accumulate = b.accumulate;
  const float* panel = b.panel;
  Vec acc[NR][MV];
#pragma GCC unroll 16
  for (int n = 0; n < NR; ++n)
#pragma GCC unroll 4
    for (int m = 0; m < MV; ++m) acc[n][m] = Vec::zero();
  for (int64_t k = 0; k < words; ++k) {
    if (PREFETCH && k % 16 == 0)
#pragma GCC unroll 16
      for (int n = 0; n < NR; ++n) __builtin_prefetch(w + (NR + n) * w_row, 0, 2);
    Vec a[MV];
#pragma GCC unroll 4
    for (int m = 0; m < MV; ++m) a[m] = Vec::load(panel + m * Vec::kWidth);
#pragma GCC unroll 16
    for (int n = 0; n < NR; ++n)
#pragma GCC unroll 4
      for (int m = 0; m < MV; ++m) acc[n][m] = multiply_add<DOT>(acc[n][m], a[m], w + n * w_row);
    panel += MV * Vec::kWidth;
    w += w_word;
  }
#pragma GCC unroll 16
  for (int n = 0; n < NR; ++n)
#pragma GCC unroll 4
    for (int m = 0; m < MV; ++m) {
      float* at = c + n * c_stride + m * Vec::kWidth;
      (accumulate ? acc[n][m] + Vec::load(at) : acc[n][m]).store(at);
    }
}

// All rows of the block with a panel of MV vectors, NR rows at a time.
template <bool DOT, int MV, int NR>
inline void gemm_rows(const GemmBlock& b, bool prefetch) {
  const char* w = b.w;
  float* c = b.c;
  int64_t n = 0;
  const auto step = [&](int64_t rows) { n += rows, w += rows * b.w_row_bytes, c += rows * b.c_stride; };
  if (prefetch)
    for (; n + 2 * NR <= b.rows; step(NR)) gemm_microkernel<DOT, MV, NR, true>(b, w, c);
  for (; n + NR <= b.rows; step(NR)) gemm_microkernel<DOT, MV, NR, false>(b, w, c);
  for (; n + 2 <= b.rows; step(2)) gemm_microkernel<DOT, MV, 2, false>(b, w, c);
  for (; n < b.rows; step(1)) gemm_microkernel<DOT, MV, 1, false>(b, w, c);
}

template <bool DOT>
inline void gemm_block(int vectors, const GemmBlock& b, bool prefetch = false) {
  if constexpr (Vec::kPanelVectors == 4) {  // 32 vector registers: up to 24 accumulators
    switch (vectors) {
      case 1:
        return gemm_rows<DOT, 1, 12>(b, prefetch);
      case 2:
        return gemm_rows<DOT, 2, 8>(b, prefetch);
      case 3:
        return gemm_rows<DOT, 3, 8>(b, prefetch);
      default:
        return gemm_rows<DOT, 4, 6>(b, prefetch);
    }
  } else {  // 16 vector registers: 12 accumulators
    switch (vectors) {
      case 1:
        return gemm_rows<DOT, 1, 8>(b, prefetch);
      default:
        return gemm_rows<DOT, 2, 6>(b, prefetch);
    }
  }
}

constexpr int64_t kPanelWidth = Vec::kWidth * Vec::kPanelVectors;

inline int panel_vectors(int64_t m, int64_t panel) {
  const int64_t rows = min_i(kPanelWidth, m - panel * kPanelWidth);
  return int((rows + Vec::kWidth - 1) / Vec::kWidth);
}

// A kWidth x kWidth block of words of x: rows [row, row + kWidth) clipped to m, words from `word` on clipped to k; zero
// elsewhere.
template <class T>
inline void load_block(const GemmPackArgs& a, int64_t row, int64_t word, float* block) {
  for (int r = 0; r < Vec::kWidth; ++r) {
    Vec values = Vec::zero();
    if (row + r < a.m) {
      const T* x = static_cast<const T*>(a.x) + (row + r) * a.x_stride;
      if (a.backend == GemmBackend::bf16_dot) {
        values = Vec::load_n(reinterpret_cast<const float*>(x) + word, min_i(Vec::kWidth, a.k / 2 - word));
      } else {
        values = load_lanes(x + word, min_i(Vec::kWidth, a.k - word));
      }
    }
    values.store(block + r * Vec::kWidth);
  }
}

template <class T>
void gemm_pack_typed(const GemmPackArgs& a, int64_t panel) {
  const int64_t words = a.backend == GemmBackend::bf16_dot ? a.k / 2 : a.k;
  const int vectors = panel_vectors(a.m, panel);
  const int64_t width = vectors * Vec::kWidth;
  float* out = static_cast<float*>(a.panels) + panel * kPanelWidth * words;
  alignas(64) float block[Vec::kWidth * Vec::kWidth], turned[Vec::kWidth * Vec::kWidth];
  for (int v = 0; v < vectors; ++v) {
    for (int64_t word = 0; word < words; word += Vec::kWidth) {
      load_block<T>(a, panel * kPanelWidth + v * Vec::kWidth, word, block);
      float* dst = out + word * width + v * Vec::kWidth;
      const int64_t count = min_i(Vec::kWidth, words - word);
      if (count == Vec::kWidth) {
        Vec::transpose(block, Vec::kWidth, dst, width);
      } else {
        Vec::transpose(block, Vec::kWidth, turned, Vec::kWidth);
        for (int64_t i = 0; i < count; ++i) Vec::load(turned + i * Vec::kWidth).store(dst + i * width);
      }
    }
  }
}

void gemm_pack(const GemmPackArgs& a, int64_t panel) {
  for_dtype(a.dtype, [&](auto element) { gemm_pack_typed<decltype(element)>(a, panel); });
}

template <class T>
inline void widen_rows(const T* w, int64_t w_stride, int64_t rows, int64_t count, float* out) {
  for (int64_t n = 0; n < rows; ++n) QVL_FOR_LANES(i, lanes, count) {
      load_lanes(w + n * w_stride + i, lanes).store(out + n * kGemmKBlock + i);
    }
}

// c[panel][row][lane] of a tile's rows of one weight over all k; c holds them from row0 on.
template <class T>
inline void gemm_accumulate(const GemmArgs& a, const Weight& weight, const GemmTile& tile, int64_t row0, float* c,
                            float* widened) {
  const bool dot = Vec::kHasBf16Dot && a.backend == GemmBackend::bf16_dot;
  const int64_t words = dot ? a.k / 2 : a.k;
  const int64_t rows = tile.n_end - tile.n_begin, w_stride = weight.stride;
  const T* w = static_cast<const T*>(weight.w) + tile.n_begin * w_stride;
  // fp32 weights ask for fp32 accuracy: adding short partial sums rounds less than one long running sum.
  const int64_t max_depth = sizeof(T) == 4 ? kGemmKBlockFp32 : kGemmKBlock;
  // With k = 0 there is one empty block, which sets c to 0.
  for (int64_t word = 0; word == 0 || word < words; word += max_depth) {
    const int64_t depth = min_i(max_depth, words - word);
    const char* rows_ptr;
    int64_t row_bytes;
    if (dot || sizeof(T) == 4) {
      rows_ptr = reinterpret_cast<const char*>(w) + word * 4;
      row_bytes = w_stride * int64_t(sizeof(T));
    } else {
      widen_rows(w + word, w_stride, rows, depth, widened);
      rows_ptr = reinterpret_cast<const char*>(widened);
      row_bytes = kGemmKBlock * 4;
    }
    for (int64_t p = tile.panel_begin; p < tile.panel_end; ++p) {
      const int vectors = panel_vectors(a.m, p);
      const float* panel = static_cast<const float*>(a.panels) + p * kPanelWidth * words + word * vectors * Vec::kWidth;
      float* block = c + ((p - tile.panel_begin) * kGemmTileN + row0) * kPanelWidth;
      const GemmBlock b{panel, rows_ptr, row_bytes, 4, depth, rows, block, kPanelWidth, word > 0};
      if constexpr (Vec::kHasBf16Dot) {
        if (dot) {
          gemm_block<true>(vectors, b, p == tile.panel_begin);
          continue;
        }
      }
      gemm_block<false>(vectors, b, p == tile.panel_begin);
    }
  }
}

// Epilogue: bias and activation on c[row][lane], in place. SwiGLU is fused: the up projection begins at row up_row of
// c, and the result replaces the first `rows` rows.
template <class T>
inline void gemm_epilogue_activate(const GemmArgs& a, int64_t n_begin, int64_t rows, int64_t width, int64_t up_row,
                                   float* c) {
  const T* bias = static_cast<const T*>(a.weight.bias);
  if (!bias && a.activation == Activation::none) return;
  for (int64_t n = 0; n < rows; ++n) {
    const Vec b = Vec::set1(bias ? to_float(bias[n_begin + n]) : 0.0f);
    for (int64_t lane = 0; lane < width; lane += Vec::kWidth) {
      float* at = c + n * kPanelWidth + lane;
      Vec x = Vec::load(at) + b;
      if (a.activation == Activation::gelu_tanh) x = vec_gelu_tanh(x);
      if (a.activation == Activation::swiglu) x = vec_silu(x) * Vec::load(at + up_row * kPanelWidth);
      x.store(at);
    }
  }
}

// Epilogue: c becomes k = [n_begin, n_begin + rows) of the next GEMM's panel p. The layouts agree: no transpose.
template <class V>
inline void gemm_epilogue_store_panel(const GemmArgs& a, int64_t p, int64_t n_begin, int64_t rows, int64_t width,
                                      const float* c) {
  float* out = static_cast<float*>(a.out);
  if constexpr (V::kHasBf16Dot) {
    if (a.backend == GemmBackend::bf16_dot) {
      out += p * kPanelWidth * (a.n / 2) + n_begin / 2 * width;
      for (int64_t n = 0; n < rows; n += 2, out += width)
        for (int64_t lane = 0; lane < width; lane += Vec::kWidth)
          V::pack_pair_quick(V::load(c + n * kPanelWidth + lane), V::load(c + (n + 1) * kPanelWidth + lane))
              .store(out + lane);
      return;
    }
  }
  out += p * kPanelWidth * a.n + n_begin * width;
  for (int64_t n = 0; n < rows; ++n, out += width)
    for (int64_t lane = 0; lane < width; lane += Vec::kWidth) V::load(c + n * kPanelWidth + lane).store(out + lane);
}

// Epilogue: c is transposed to row-major, and the residual added.
template <class T>
inline void gemm_epilogue_store_rows(const GemmArgs& a, int64_t p, int64_t n_begin, int64_t rows, const float* c) {
  alignas(64) float turned[Vec::kWidth * Vec::kWidth];
  const int64_t row0 = p * kPanelWidth, row_count = min_i(kPanelWidth, a.m - row0);
  for (int64_t lane = 0; lane < row_count; lane += Vec::kWidth) {
    const int64_t lanes_used = min_i(Vec::kWidth, row_count - lane);
    for (int64_t n = 0; n < rows; n += Vec::kWidth) {
      const int64_t columns = min_i(Vec::kWidth, rows - n);
      Vec::transpose(c + n * kPanelWidth + lane, kPanelWidth, turned, Vec::kWidth);
      for (int64_t r = 0; r < lanes_used; ++r) {
        const int64_t row = row0 + lane + r, column = n_begin + n;
        Vec x = Vec::load(turned + r * Vec::kWidth);
        if (a.residual)
          x = x + load_lanes(static_cast<const T*>(a.residual) + row * a.residual_stride + column, columns);
        store_lanes(x, static_cast<T*>(a.out) + row * a.out_stride + column, columns);
      }
    }
  }
}

// The same for bf16 without a residual, where the target packs pairs: rounded first, so that half as much is
// transposed.
template <class V>
inline void gemm_epilogue_store_pairs(const GemmArgs& a, int64_t p, int64_t n_begin, int64_t rows, const float* c) {
  alignas(64) float words[V::kWidth * V::kWidth], turned[V::kWidth * V::kWidth];
  const int64_t row0 = p * kPanelWidth, row_count = min_i(kPanelWidth, a.m - row0);
  for (int64_t lane = 0; lane < row_count; lane += V::kWidth) {
    const int64_t lanes_used = min_i(V::kWidth, row_count - lane);
    for (int64_t n = 0; n < rows; n += 2 * V::kWidth) {
      const int64_t columns = min_i(2 * V::kWidth, rows - n);
      for (int64_t i = 0; i < columns / 2; ++i) {
        const float* at = c + (n + 2 * i) * kPanelWidth + lane;
        V::pack_pair_quick(V::load(at), V::load(at + kPanelWidth)).store(words + i * V::kWidth);
      }
      V::transpose(words, V::kWidth, turned, V::kWidth);
      for (int64_t r = 0; r < lanes_used; ++r) {
        bf16* out = static_cast<bf16*>(a.out) + (row0 + lane + r) * a.out_stride + n_begin + n;
        if (columns == 2 * V::kWidth) {
          std::memcpy(out, turned + r * V::kWidth, 2 * V::kWidth * sizeof(bf16));
        } else {
          std::memcpy(out, turned + r * V::kWidth, size_t(columns) * sizeof(bf16));
        }
      }
    }
  }
}

template <class T>
inline void gemm_epilogue_store(const GemmArgs& a, int64_t p, int64_t n_begin, int64_t rows, const float* c) {
  if constexpr (Vec::kHasBf16Dot && std::is_same_v<T, bf16>) {
    if (!a.residual && rows % 2 == 0) return gemm_epilogue_store_pairs<Vec>(a, p, n_begin, rows, c);
  }
  gemm_epilogue_store_rows<T>(a, p, n_begin, rows, c);
}

// All epilogues of one panel's sums c [rows][kPanelWidth]; up_row: see gemm_epilogue_activate.
template <class T>
inline void gemm_epilogue_panel(const GemmArgs& a, int64_t p, int64_t n_begin, int64_t rows, int64_t up_row, float* c) {
  const int64_t width = panel_vectors(a.m, p) * Vec::kWidth;
  gemm_epilogue_activate<T>(a, n_begin, rows, width, up_row, c);
  if (a.out_panels) {
    gemm_epilogue_store_panel<Vec>(a, p, n_begin, rows, width, c);
  } else {
    gemm_epilogue_store<T>(a, p, n_begin, rows, c);
  }
}

template <class T>
void gemm_tile_typed(const GemmArgs& a, const GemmTile& tile, float* scratch) {
  float* c = scratch;
  float* widened = scratch + kGemmTilePanels * kGemmTileN * kPanelWidth;
  gemm_accumulate<T>(a, a.weight, tile, 0, c, widened);
  if (a.activation == Activation::swiglu) gemm_accumulate<T>(a, a.up, tile, kGemmTileN / 2, c, widened);
  for (int64_t p = tile.panel_begin; p < tile.panel_end; ++p, c += kGemmTileN * kPanelWidth)
    gemm_epilogue_panel<T>(a, p, tile.n_begin, tile.n_end - tile.n_begin, kGemmTileN / 2, c);
}

void gemm_tile(const GemmArgs& a, const GemmTile& tile, float* scratch) {
  for_dtype(a.dtype, [&](auto element) { gemm_tile_typed<decltype(element)>(a, tile, scratch); });
}
