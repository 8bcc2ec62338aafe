// Decode attention: up to four query rows. Keys and values are streamed once from the KV cache, with the queries and
// the result in registers. Lanes as in attention.inl.h would compute 16 columns to use two, and be bound by arithmetic.

constexpr int64_t kDecodeRows = 4;
constexpr int64_t kDecodeKeys = 512;            // per block: changing between keys and values is then rare
constexpr int64_t kDecodePrefetchBytes = 4096;  // distance of the software prefetch

// The keys of a row's causal prefix.
inline int64_t attention_limit(const AttentionArgs& a, const AttentionTile& t, int64_t row) {
  const int64_t limit = a.causal ? t.keys - t.queries + row % t.queries + 1 : t.keys;
  return limit > 0 ? limit : 0;
}

// Lives in the scratch of attention_tile, which is larger for every head_dim and panel width.
struct DecodeScratch {
  float *q, *out;  // [rows][padded], in the order of gemv_load
  float* scores;   // [rows][kDecodeKeys]
  int64_t padded;
  float row_max[kDecodeRows], row_sum[kDecodeRows];
  int64_t limit[kDecodeRows];
  bool unmasked[kDecodeKeys];  // whether any row sees the key; filled where there is a mask
};

// Index of element d in a row in the order of gemv_load.
inline int64_t decode_index(int64_t d, DType dtype) {
  if (dtype != DType::bf16) return d;
  const int64_t in_block = d % kGemvKStep;
  return d - in_block + in_block % 2 * Vec::kWidth + in_block / 2;
}

// sums[r][m] = w[row + r, :] . x[m, :]. Rows are short: software prefetch runs on into the rows at `next`.
template <class T, int ROWS, int M>
inline void decode_qk(const T* w, int64_t w_stride, const T* next, const float* x, int64_t k_padded, int64_t k,
                      float* sums) {
  Vec acc[ROWS][M][2];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) acc[r][m][0] = acc[r][m][1] = Vec::zero();
  constexpr int64_t kPrefetch = 1024 / int64_t(sizeof(T));
  int64_t i = 0;
  for (; i + kGemvKStep <= k; i += kGemvKStep) {
    const T* prefetch = i + kPrefetch < k ? w + i + kPrefetch : next + (i + kPrefetch - k);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      Vec first, second;
      __builtin_prefetch(reinterpret_cast<const char*>(prefetch + r * w_stride), 0, 3);
      gemv_load(w + r * w_stride + i, first, second);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        acc[r][m][0] = Vec::fma(first, Vec::load(x + m * k_padded + i), acc[r][m][0]);
        acc[r][m][1] = Vec::fma(second, Vec::load(x + m * k_padded + i + Vec::kWidth), acc[r][m][1]);
      }
    }
  }
  if (i < k) {
    for (int r = 0; r < ROWS; ++r) {
      T tail[kGemvKStep];
      std::memset(tail, 0, sizeof(tail));
      std::memcpy(tail, w + r * w_stride + i, size_t(k - i) * sizeof(T));
      Vec first, second;
      gemv_load(static_cast<const T*>(tail), first, second);
      for (int m = 0; m < M; ++m) {
        acc[r][m][0] = Vec::fma(first, Vec::load(x + m * k_padded + i), acc[r][m][0]);
        acc[r][m][1] = Vec::fma(second, Vec::load(x + m * k_padded + i + Vec::kWidth), acc[r][m][1]);
      }
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int m = 0; m < M; ++m) sums[r * M + m] = (acc[r][m][0] + acc[r][m][1]).sum();
}

template <class T, int M>
inline void decode_scores(const AttentionArgs& a, const T* k, int64_t keys, int64_t prefetch_rows,
                          const DecodeScratch& s) {
  float sums[4 * M];
  int64_t i = 0;
  for (; i + 4 <= keys; i += 4) {
    const T* row = k + i * a.k.stride_t;
    decode_qk<T, 4, M>(row, a.k.stride_t, row + prefetch_rows * a.k.stride_t, s.q, s.padded, a.head_dim, sums);
    for (int r = 0; r < 4; ++r)
      for (int m = 0; m < M; ++m) s.scores[m * kDecodeKeys + i + r] = sums[r * M + m];
  }
  for (; i < keys; ++i) {
    const T* row = k + i * a.k.stride_t;
    decode_qk<T, 1, M>(row, a.k.stride_t, row, s.q, s.padded, a.head_dim, sums);
    for (int m = 0; m < M; ++m) s.scores[m * kDecodeKeys + i] = sums[m];
  }
}

template <class T>
inline void decode_add_mask(const AttentionArgs& a, const AttentionTile& t, int64_t key, int64_t keys, int64_t row,
                            float* x) {
  const int64_t offset = row / t.queries * a.mask.stride_h + row % t.queries * a.mask.stride_t + key * a.mask.stride_s;
  if (a.mask.kind == MaskKind::boolean) {
    const uint8_t* visible = static_cast<const uint8_t*>(t.mask) + offset;
    for (int64_t i = 0; i < keys; ++i)
      if (!visible[i * a.mask.stride_s]) x[i] = -__builtin_inff();
  } else {
    const T* bias = static_cast<const T*>(t.mask) + offset;
    for (int64_t i = 0; i < keys; ++i) {
      const float b = to_float(bias[i * a.mask.stride_s]);
      x[i] = b < -3.4028234663852886e38f ? b : x[i] + b;  // masked whatever the score is, NaN included
    }
  }
}

// Online softmax of one row: scores become probabilities, row_max and row_sum are updated, the row's out is rescaled.
template <class T>
inline void decode_softmax(const AttentionArgs& a, const AttentionTile& t, int64_t key, int64_t keys, int m,
                           DecodeScratch& s) {
  float* x = s.scores + m * kDecodeKeys;
  const Vec scale = Vec::set1(a.scale);
  const int64_t padded = (keys + Vec::kWidth - 1) / Vec::kWidth * Vec::kWidth;
  for (int64_t i = 0; i < padded; i += Vec::kWidth) (Vec::load(x + i) * scale).store(x + i);
  if (a.mask.kind != MaskKind::none) decode_add_mask<T>(a, t, key, keys, t.row_begin + m, x);
  const int64_t visible = min_i(keys, s.limit[m] - key);
  for (int64_t i = visible > 0 ? visible : 0; i < padded; ++i) x[i] = -__builtin_inff();
  if (a.mask.kind != MaskKind::none)
    for (int64_t i = 0; i < keys; ++i) s.unmasked[i] = (m > 0 && s.unmasked[i]) || x[i] != -__builtin_inff();

  Vec max_lanes = Vec::set1(s.row_max[m]);
  for (int64_t i = 0; i < padded; i += Vec::kWidth) max_lanes = Vec::max(max_lanes, Vec::load(x + i));
  const float max = max_lanes.max_lane();
  const Vec base = Vec::set1(max == -__builtin_inff() ? 0.0f : max);
  Vec sum = Vec::zero();
  for (int64_t i = 0; i < padded; i += Vec::kWidth) {
    const Vec p = vec_exp(Vec::load(x + i) - base);
    sum = sum + p;
    p.store(x + i);
  }
  const Vec alpha = vec_exp(Vec::set1(s.row_max[m]) - base);
  s.row_sum[m] = s.row_sum[m] * alpha.max_lane() + sum.sum();
  if (s.row_max[m] != max) {
    float* out = s.out + m * s.padded;
    for (int64_t d = 0; d < s.padded; d += Vec::kWidth) (Vec::load(out + d) * alpha).store(out + d);
  }
  s.row_max[m] = max;
}

// out[m] += sum_i p[m][i] v[i] over BLOCKS blocks of columns, which stay in registers.
template <class T, int M, int BLOCKS>
inline void decode_pv_columns(const AttentionArgs& a, const T* v, int64_t keys, int64_t prefetch_rows, bool masked,
                              float* out, const DecodeScratch& s) {
  Vec acc[M][BLOCKS][2];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; ++b)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half)
        acc[m][b][half] = Vec::load(out + m * s.padded + b * kGemvKStep + half * Vec::kWidth);
  for (int64_t i = 0; i < keys; ++i) {
    if (masked && !s.unmasked[i]) continue;  // a masked value may be NaN, and 0 * NaN is NaN
    const T* row = v + i * a.v.stride_t;
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; ++b) {
      Vec first, second;
      __builtin_prefetch(reinterpret_cast<const char*>(row + prefetch_rows * a.v.stride_t + b * kGemvKStep), 0, 3);
      gemv_load(row + b * kGemvKStep, first, second);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const Vec p = Vec::set1(s.scores[m * kDecodeKeys + i]);
        acc[m][b][0] = Vec::fma(first, p, acc[m][b][0]);
        acc[m][b][1] = Vec::fma(second, p, acc[m][b][1]);
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; ++b)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half)
        acc[m][b][half].store(out + m * s.padded + b * kGemvKStep + half * Vec::kWidth);
}

template <class T, int M>
inline void decode_pv(const AttentionArgs& a, const T* v, int64_t keys, int64_t prefetch_rows, bool masked,
                      const DecodeScratch& s) {
  constexpr int kBlocks = Vec::kPanelVectors == 4 ? (M <= 2 ? 4 : 2) : (M == 1 ? 4 : M == 2 ? 2 : 1);  // registers
  int64_t d = 0;
  for (; d + kBlocks * kGemvKStep <= a.head_dim; d += kBlocks * kGemvKStep)
    decode_pv_columns<T, M, kBlocks>(a, v + d, keys, prefetch_rows, masked, s.out + d, s);
  for (; d + kGemvKStep <= a.head_dim; d += kGemvKStep)
    decode_pv_columns<T, M, 1>(a, v + d, keys, prefetch_rows, masked, s.out + d, s);
  if (d == a.head_dim) return;
  T tail[kGemvKStep];
  std::memset(tail, 0, sizeof(tail));
  for (int64_t i = 0; i < keys; ++i) {
    if (masked && !s.unmasked[i]) continue;
    std::memcpy(tail, v + i * a.v.stride_t + d, size_t(a.head_dim - d) * sizeof(T));
    Vec first, second;
    gemv_load(static_cast<const T*>(tail), first, second);
    for (int m = 0; m < M; ++m) {
      const Vec p = Vec::set1(s.scores[m * kDecodeKeys + i]);
      float* out = s.out + m * s.padded + d;
      Vec::fma(first, p, Vec::load(out)).store(out);
      Vec::fma(second, p, Vec::load(out + Vec::kWidth)).store(out + Vec::kWidth);
    }
  }
}

template <class T>
inline void decode_epilogue(const AttentionArgs& a, const AttentionTile& t, const DecodeScratch& s) {
  for (int64_t m = 0; m < t.row_end - t.row_begin; ++m) {
    const int64_t row = t.row_begin + m;
    const float* out = s.out + m * s.padded;
    const float sum = s.row_sum[m];
    if (t.partial) {
      float* partial = t.partial + m * (a.head_dim + 2);
      partial[0] = s.row_max[m];
      partial[1] = sum;
      for (int64_t d = 0; d < a.head_dim; ++d) partial[2 + d] = out[decode_index(d, a.dtype)];
      continue;
    }
    const float inverse = sum > 0.0f ? 1.0f / sum : (sum != sum ? sum : 0.0f);
    T* to = static_cast<T*>(t.out) + row / t.queries * a.out.stride_h + row % t.queries * a.out.stride_t;
    for (int64_t d = 0; d < a.head_dim; ++d) from_float(out[decode_index(d, a.dtype)] * inverse, to[d]);
    if (t.lse) t.lse[row / t.queries * t.lse_h + row % t.queries] = s.row_max[m] + __builtin_logf(sum);
  }
}

template <class T, int M>
inline void attention_decode_typed(const AttentionArgs& a, const AttentionTile& t, float* scratch) {
  DecodeScratch s;
  s.padded = (a.head_dim + kGemvKStep - 1) / kGemvKStep * kGemvKStep;
  s.q = scratch;
  s.out = s.q + M * s.padded;
  s.scores = s.out + M * s.padded;
  int64_t max_limit = 0;
  for (int m = 0; m < M; ++m) {
    const int64_t row = t.row_begin + m;
    gemv_prepare_typed(static_cast<const T*>(t.q) + row / t.queries * a.q.stride_h + row % t.queries * a.q.stride_t,
                       a.head_dim, s.q + m * s.padded);
    s.row_max[m] = -__builtin_inff();
    s.row_sum[m] = 0.0f;
    s.limit[m] = attention_limit(a, t, row);
    if (s.limit[m] > max_limit) max_limit = s.limit[m];
  }
  for (int64_t i = 0; i < M * s.padded; i += Vec::kWidth) Vec::zero().store(s.out + i);
  const int64_t prefetch_rows = 1 + kDecodePrefetchBytes / (a.head_dim * int64_t(sizeof(T)));
  const int64_t key_end = min_i(t.key_end, max_limit);
  for (int64_t key = t.key_begin; key < key_end; key += kDecodeKeys) {
    const int64_t keys = min_i(kDecodeKeys, key_end - key);
    decode_scores<T, M>(a, static_cast<const T*>(t.k) + key * a.k.stride_t, keys, prefetch_rows, s);
    for (int m = 0; m < M; ++m) decode_softmax<T>(a, t, key, keys, m, s);
    decode_pv<T, M>(a, static_cast<const T*>(t.v) + key * a.v.stride_t, keys, prefetch_rows,
                    a.mask.kind != MaskKind::none, s);
  }
  decode_epilogue<T>(a, t, s);
}

template <class T>
inline void attention_decode(const AttentionArgs& a, const AttentionTile& t, float* scratch) {
  switch (t.row_end - t.row_begin) {
    case 1:
      return attention_decode_typed<T, 1>(a, t, scratch);
    case 2:
      return attention_decode_typed<T, 2>(a, t, scratch);
    case 3:
      return attention_decode_typed<T, 3>(a, t, scratch);
    default:
      return attention_decode_typed<T, 4>(a, t, scratch);
  }
}
