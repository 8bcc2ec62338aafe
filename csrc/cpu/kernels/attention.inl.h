// Attention of one block of query rows, which are the vector lanes. Scores are computed transposed, [keys][lanes], by
// the GEMM tile with keys in the place of weight rows, so that softmax runs down the columns without any horizontal
// reduction; the result is already the panel that the second product, with values as the weight rows, reads.
// [FlashAttention-2, Dao 2023, arXiv:2307.08691: online softmax over key blocks]

struct AttentionScratch {
  float *q, *scores, *pairs, *kv, *mask, *out;
  float *row_max, *row_sum, *limit;  // limit: keys that the row may see
};

inline AttentionScratch attention_scratch(float* base, int64_t head_dim) {
  const int64_t padded = (head_dim + 15) / 16 * 16;
  AttentionScratch s;
  s.q = base;
  s.out = s.q + padded * kPanelWidth;
  s.scores = s.out + padded * kPanelWidth;
  s.pairs = s.scores + kAttentionKeys * kPanelWidth;
  s.mask = s.pairs + kAttentionKeys * kPanelWidth;
  s.kv = s.mask + kAttentionKeys * kPanelWidth;
  s.row_max = s.kv + kAttentionKeys * padded;
  s.row_sum = s.row_max + kPanelWidth;
  s.limit = s.row_sum + kPanelWidth;
  return s;
}

// Query rows -> panel [head_dim words][width].
template <class T>
inline void attention_pack_q(const AttentionArgs& a, const AttentionTask& t, bool dot, int64_t width, float* panel) {
  const int64_t words = dot ? a.head_dim / 2 : a.head_dim;
  alignas(64) float block[Vec::kWidth * Vec::kWidth], turned[Vec::kWidth * Vec::kWidth];
  for (int64_t lane = 0; lane < width; lane += Vec::kWidth) {
    for (int64_t word = 0; word < words; word += Vec::kWidth) {
      const int64_t count = min_i(Vec::kWidth, words - word);
      for (int r = 0; r < Vec::kWidth; ++r) {
        const int64_t row = t.row_begin + lane + r;
        Vec values = Vec::zero();
        if (row < t.row_end) {
          const T* q = static_cast<const T*>(t.q) + row / t.queries * a.q_h + row % t.queries * a.q_t;
          values = dot ? Vec::load_n(reinterpret_cast<const float*>(q) + word, count) : Vec::load_n(q + word, count);
        }
        values.store(block + r * Vec::kWidth);
      }
      Vec::transpose(block, Vec::kWidth, turned, Vec::kWidth);
      for (int64_t i = 0; i < count; ++i) Vec::load(turned + i * Vec::kWidth).store(panel + (word + i) * width + lane);
    }
  }
}

// mask of keys [key, key + keys) as [keys][width] additive values, -inf where a boolean mask hides.
template <class T>
inline void attention_load_mask(const AttentionArgs& a, const AttentionTask& t, int64_t key, int64_t keys, int64_t width,
                                float* mask) {
  for (int64_t lane = 0; lane < width; ++lane) {
    const int64_t row = t.row_begin + lane < t.row_end ? t.row_begin + lane : t.row_end - 1;
    const int64_t offset = row / t.queries * a.mask_h + row % t.queries * a.mask_t + key * a.mask_s;
    if (a.mask_kind == MaskKind::boolean) {
      const uint8_t* visible = static_cast<const uint8_t*>(t.mask) + offset;
      for (int64_t s = 0; s < keys; ++s) mask[s * width + lane] = visible[s * a.mask_s] ? 0.0f : -__builtin_inff();
    } else {
      const T* bias = static_cast<const T*>(t.mask) + offset;
      for (int64_t s = 0; s < keys; ++s) mask[s * width + lane] = to_float(bias[s * a.mask_s]);
    }
  }
}

// Scale, mask and limit the scores of one block.
inline void attention_mask_scores(const AttentionArgs& a, int64_t key, int64_t keys, int64_t width, bool limited,
                                  bool masked, const AttentionScratch& s) {
  const Vec scale = Vec::set1(a.scale), hidden = Vec::set1(-__builtin_inff()), lowest = Vec::set1(-3.4028234663852886e38f);
  for (int64_t i = 0; i < keys; ++i) {
    const Vec index = Vec::set1(float(key + i));
    for (int64_t lane = 0; lane < width; lane += Vec::kWidth) {
      float* at = s.scores + i * width + lane;
      Vec x = Vec::load(at) * scale;
      if (masked) {
        const Vec m = Vec::load(s.mask + i * width + lane);
        x = Vec::select_lt(m, lowest, hidden, x + m);
      }
      if (limited) x = Vec::select_lt(index, Vec::load(s.limit + lane), x, hidden);
      x.store(at);
    }
  }
}

// Scores times a positive scale -> probabilities; updates the row state and rescales out where a maximum rose.
inline void attention_softmax(int64_t keys, int64_t width, int64_t head_dim, float scale_by, bool first,
                              const AttentionScratch& s) {
  const Vec scale = Vec::set1(scale_by);
  for (int64_t lane = 0; lane < width; lane += Vec::kWidth) {
    const Vec old_max = Vec::load(s.row_max + lane);
    Vec highest = Vec::load(s.scores + lane);
    for (int64_t i = 1; i < keys; ++i) highest = Vec::max(highest, Vec::load(s.scores + i * width + lane));
    const Vec new_max = Vec::max(old_max, highest * scale);
    // A row that has seen nothing keeps -inf; its exponent is taken from 0, which gives exp(-inf) = 0 and no NaN.
    const Vec lowest = Vec::set1(-3.4028234663852886e38f);
    const Vec base = Vec::select_lt(new_max, lowest, Vec::zero(), new_max);
    const Vec minus_base = Vec::zero() - base;
    Vec sum = Vec::zero();
    for (int64_t i = 0; i < keys; ++i) {
      float* at = s.scores + i * width + lane;
      const Vec p = vec_exp(Vec::fma(Vec::load(at), scale, minus_base));
      sum = sum + p;
      p.store(at);
    }
    const Vec alpha = vec_exp(old_max - base);
    Vec::fma(Vec::load(s.row_sum + lane), alpha, sum).store(s.row_sum + lane);
    new_max.store(s.row_max + lane);
    if (!first && Vec::any_lt(old_max, new_max))
      for (int64_t d = 0; d < head_dim; ++d) (Vec::load(s.out + d * width + lane) * alpha).store(s.out + d * width + lane);
  }
}

// A key that no row of the block may see must not touch the result, whatever its value holds: NaN * 0 is NaN.
inline bool attention_key_hidden(const float* mask, int64_t width) {
  for (int64_t lane = 0; lane < width; ++lane)
    if (mask[lane] >= -3.4028234663852886e38f) return false;
  return true;
}

template <class T>
inline void attention_widen_values(const AttentionArgs& a, const T* v, int64_t keys, int64_t width, bool masked,
                                   const AttentionScratch& s) {
  for (int64_t i = 0; i < keys; ++i) {
    float* row = s.kv + i * a.head_dim;
    const bool hidden = masked && attention_key_hidden(s.mask + i * width, width);
    QVL_FOR_LANES(d, lanes, a.head_dim) {
      store_lanes(hidden ? Vec::zero() : load_lanes(v + i * a.v_s + d, lanes), row + d, lanes);
    }
  }
}

// Probabilities and values in pairs of keys for the dot route; an odd last key is paired with zeros.
template <class V>
inline void attention_pair_block(const AttentionArgs& a, const bf16* v, int64_t keys, int64_t width, bool masked,
                                 const AttentionScratch& s) {
  bf16 zeros[kMaxHeadDim];
  std::memset(zeros, 0, sizeof(bf16) * size_t(a.head_dim));
  for (int64_t i = 0; i < keys; i += 2) {
    const bool pair = i + 1 < keys;
    for (int64_t lane = 0; lane < width; lane += V::kWidth) {
      const V high = pair ? V::load(s.scores + (i + 1) * width + lane) : V::zero();
      V::pack_pair_flush(V::load(s.scores + i * width + lane), high).store(s.pairs + i / 2 * width + lane);
    }
    const bool hide_low = masked && attention_key_hidden(s.mask + i * width, width);
    const bool hide_high = !pair || (masked && attention_key_hidden(s.mask + (i + 1) * width, width));
    const bf16* low = hide_low ? zeros : v + i * a.v_s;
    const bf16* high = hide_high ? zeros : v + (i + 1) * a.v_s;
    QVL_FOR_LANES(d, lanes, a.head_dim) {
      V::load_pair_n(low + d, high + d, lanes).store_n(s.kv + i / 2 * a.head_dim + d, lanes);
    }
  }
}

template <class T>
inline void attention_finish(const AttentionArgs& a, const AttentionTask& t, int64_t width, const AttentionScratch& s) {
  alignas(64) float turned[Vec::kWidth * Vec::kWidth];
  const int64_t rows = t.row_end - t.row_begin;
  for (int64_t lane = 0; lane < width && !t.partial; lane += Vec::kWidth) {
    const Vec sum = Vec::load(s.row_sum + lane);
    const Vec inverse = Vec::select_lt(Vec::zero(), sum, Vec::set1(1.0f) / sum, Vec::select_nan(sum, sum, Vec::zero()));
    for (int64_t d = 0; d < a.head_dim; ++d)
      (Vec::load(s.out + d * width + lane) * inverse).store(s.out + d * width + lane);
  }
  for (int64_t lane = 0; lane < rows; lane += Vec::kWidth) {
    for (int64_t d = 0; d < a.head_dim; d += Vec::kWidth) {
      const int64_t count = min_i(Vec::kWidth, a.head_dim - d);
      Vec::transpose(s.out + d * width + lane, width, turned, Vec::kWidth);
      for (int64_t r = 0; r < min_i(Vec::kWidth, rows - lane); ++r) {
        const int64_t row = t.row_begin + lane + r;
        const Vec x = Vec::load(turned + r * Vec::kWidth);
        if (t.partial) {
          x.store_n(t.partial + (lane + r) * (a.head_dim + 2) + 2 + d, count);
        } else {
          store_lanes(x, static_cast<T*>(t.out) + row / t.queries * a.out_h + row % t.queries * a.out_t + d, count);
        }
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = t.row_begin + r;
    if (t.partial) {
      t.partial[r * (a.head_dim + 2)] = s.row_max[r];
      t.partial[r * (a.head_dim + 2) + 1] = s.row_sum[r];
    } else if (t.lse) {
      t.lse[row / t.queries * t.lse_h + row % t.queries] = s.row_max[r] + __builtin_logf(s.row_sum[r]);
    }
  }
}

template <class T, bool DOT>
inline void attention_block(const AttentionArgs& a, const AttentionTask& t, int64_t key, int64_t keys, int64_t min_limit,
                            int64_t width, bool first, const AttentionScratch& s) {
  const int vectors = int(width / Vec::kWidth);
  const T* k = static_cast<const T*>(t.k) + key * a.k_s;
  const T* v = static_cast<const T*>(t.v) + key * a.v_s;
  const int64_t words = DOT ? a.head_dim / 2 : a.head_dim;
  const bool masked = a.mask_kind != MaskKind::none, limited = key + keys > min_limit;
  if (DOT || sizeof(T) == 4) {
    const int64_t max_depth = DOT ? words : kGemmDepthFp32;  // short partial sums keep fp32 accuracy
    for (int64_t word = 0; word < words; word += max_depth)
      gemm_block<DOT>(vectors, s.q + word * width, reinterpret_cast<const char*>(k) + word * 4,
                      a.k_s * int64_t(sizeof(T)), 4, min_i(max_depth, words - word), keys, s.scores, width, word > 0);
  } else {
    for (int64_t i = 0; i < keys; ++i)
      QVL_FOR_LANES(d, lanes, a.head_dim) { store_lanes(load_lanes(k + i * a.k_s + d, lanes), s.kv + i * a.head_dim + d, lanes); }
    gemm_block<false>(vectors, s.q, reinterpret_cast<const char*>(s.kv), a.head_dim * 4, 4, words, keys, s.scores, width,
                      false);
  }
  if (masked) attention_load_mask<T>(a, t, key, keys, width, s.mask);
  const bool plain = !masked && !limited && a.scale > 0.0f;
  if (!plain) attention_mask_scores(a, key, keys, width, limited, masked, s);
  attention_softmax(keys, width, a.head_dim, plain ? a.scale : 1.0f, first, s);
  if constexpr (DOT) {
    attention_pair_block<Vec>(a, v, keys, width, masked, s);
    gemm_block<true>(vectors, s.pairs, reinterpret_cast<const char*>(s.kv), 4, a.head_dim * 4, (keys + 1) / 2, a.head_dim,
                     s.out, width, !first);
  } else if (sizeof(T) == 4 && !masked) {
    gemm_block<false>(vectors, s.scores, reinterpret_cast<const char*>(v), 4, a.v_s * 4, keys, a.head_dim, s.out, width,
                      !first);
  } else {
    attention_widen_values(a, v, keys, width, masked, s);
    gemm_block<false>(vectors, s.scores, reinterpret_cast<const char*>(s.kv), 4, a.head_dim * 4, keys, a.head_dim, s.out,
                      width, !first);
  }
}

template <class T, bool DOT>
inline void attention_task_typed(const AttentionArgs& a, const AttentionTask& t, float* scratch) {
  const AttentionScratch s = attention_scratch(scratch, a.head_dim);
  const int64_t rows = t.row_end - t.row_begin, width = (rows + Vec::kWidth - 1) / Vec::kWidth * Vec::kWidth;
  int64_t max_limit = 0, min_limit = t.keys;
  for (int64_t lane = 0; lane < width; ++lane) {
    const int64_t row = t.row_begin + lane < t.row_end ? t.row_begin + lane : t.row_end - 1;
    const int64_t limit = attention_limit(a, t, row);
    if (limit > max_limit) max_limit = limit;
    if (limit < min_limit) min_limit = limit;
    s.limit[lane] = float(limit);
    s.row_max[lane] = -__builtin_inff();
    s.row_sum[lane] = 0.0f;
  }
  for (int64_t i = 0; i < a.head_dim * width; i += Vec::kWidth) Vec::zero().store(s.out + i);
  attention_pack_q<T>(a, t, DOT, width, s.q);
  const int64_t key_end = min_i(t.key_end, max_limit);
  for (int64_t key = t.key_begin; key < key_end; key += kAttentionKeys)
    attention_block<T, DOT>(a, t, key, min_i(kAttentionKeys, key_end - key), min_limit, width, key == t.key_begin, s);
  attention_finish<T>(a, t, width, s);
}

void attention_task(const AttentionArgs& a, const AttentionTask& t, float* scratch) {
  if (t.row_end - t.row_begin <= kFewRows) {
    switch (a.dtype) {
      case DType::f32: return attention_few<float>(a, t, scratch);
      case DType::bf16: return attention_few<bf16>(a, t, scratch);
      case DType::f16: return attention_few<f16>(a, t, scratch);
    }
  }
  if constexpr (Vec::kHasDot) {
    if (a.dtype == DType::bf16 && t.route == Route::dot) return attention_task_typed<bf16, true>(a, t, scratch);
  }
  switch (a.dtype) {
    case DType::f32: return attention_task_typed<float, false>(a, t, scratch);
    case DType::bf16: return attention_task_typed<bf16, false>(a, t, scratch);
    case DType::f16: return attention_task_typed<f16, false>(a, t, scratch);
  }
}
