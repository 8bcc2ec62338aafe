// Attention of one block of query rows, which are the vector lanes. Scores are computed transposed, [keys][lanes], by
// the GEMM micro-kernel with keys in the place of weight rows: softmax runs down the columns without a horizontal
// reduction, and its result is already the panel that the second matmul, with values as the weight rows, reads.
// [FlashAttention-2, Dao 2023, arXiv:2307.08691: online softmax over key blocks]

struct AttentionScratch {
  float *q, *scores, *pairs, *kv, *mask, *out;
  float *row_max, *row_sum, *limit;  // limit: the row's causal limit, in keys
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

// The keys [key, key + keys) of one step of the online softmax.
struct KeyBlock {
  int64_t key, keys;
  int64_t width, head_dim;  // width: lanes
  bool masked, limited;     // by the attention mask; by the causal limit of at least one row
  bool first;               // of the tile: out is written, not added to
  bool scale_first;         // scores are scaled before mask and limit, else inside the softmax
  float scale;              // of the softmax: positive, 1 with scale_first
};

// Query rows -> panel [head_dim words][width].
template <class T>
inline void attention_pack_q(const AttentionArgs& a, const AttentionTile& t, bool dot, int64_t width, float* panel) {
  const int64_t words = dot ? a.head_dim / 2 : a.head_dim;
  alignas(64) float block[Vec::kWidth * Vec::kWidth], turned[Vec::kWidth * Vec::kWidth];
  for (int64_t lane = 0; lane < width; lane += Vec::kWidth) {
    for (int64_t word = 0; word < words; word += Vec::kWidth) {
      const int64_t count = min_i(Vec::kWidth, words - word);
      for (int r = 0; r < Vec::kWidth; ++r) {
        const int64_t row = t.row_begin + lane + r;
        Vec values = Vec::zero();
        if (row < t.row_end) {
          const T* q = static_cast<const T*>(t.q) + row / t.queries * a.q.stride_h + row % t.queries * a.q.stride_t;
          values = dot ? Vec::load_n(reinterpret_cast<const float*>(q) + word, count) : Vec::load_n(q + word, count);
        }
        values.store(block + r * Vec::kWidth);
      }
      Vec::transpose(block, Vec::kWidth, turned, Vec::kWidth);
      for (int64_t i = 0; i < count; ++i) Vec::load(turned + i * Vec::kWidth).store(panel + (word + i) * width + lane);
    }
  }
}

// The mask of keys [key, key + keys) as an attention bias [keys][width], -inf where a boolean mask is false.
template <class T>
inline void attention_load_mask(const AttentionArgs& a, const AttentionTile& t, int64_t key, int64_t keys,
                                int64_t width, float* mask) {
  for (int64_t lane = 0; lane < width; ++lane) {
    const int64_t row = t.row_begin + lane < t.row_end ? t.row_begin + lane : t.row_end - 1;
    const int64_t offset =
        row / t.queries * a.mask.stride_h + row % t.queries * a.mask.stride_t + key * a.mask.stride_s;
    if (a.mask.kind == MaskKind::boolean) {
      const uint8_t* visible = static_cast<const uint8_t*>(t.mask) + offset;
      for (int64_t s = 0; s < keys; ++s)
        mask[s * width + lane] = visible[s * a.mask.stride_s] ? 0.0f : -__builtin_inff();
    } else {
      const T* bias = static_cast<const T*>(t.mask) + offset;
      for (int64_t s = 0; s < keys; ++s) mask[s * width + lane] = to_float(bias[s * a.mask.stride_s]);
    }
  }
}

// Applies scale, attention mask and causal limit to the scores of one block.
inline void attention_mask_scores(const KeyBlock& b, float scale_by, const AttentionScratch& s) {
  const int64_t keys = b.keys, width = b.width;
  const bool masked = b.masked, limited = b.limited;
  const Vec scale = Vec::set1(scale_by), minus_inf = Vec::set1(-__builtin_inff()),
            lowest = Vec::set1(-3.4028234663852886e38f);
  for (int64_t i = 0; i < keys; ++i) {
    const Vec index = Vec::set1(float(b.key + i));
    for (int64_t lane = 0; lane < width; lane += Vec::kWidth) {
      float* at = s.scores + i * width + lane;
      Vec x = Vec::load(at) * scale;
      if (masked) {
        const Vec m = Vec::load(s.mask + i * width + lane);
        x = Vec::select_lt(m, lowest, minus_inf, x + m);
      }
      if (limited) x = Vec::select_lt(index, Vec::load(s.limit + lane), x, minus_inf);
      x.store(at);
    }
  }
}

// new_max: row_max after this block of scores, times the scale; row_max itself is left as it was. base: what is
// subtracted in the exponent, new_max, or 0 for a fully masked row, since -inf - -inf would be NaN.
inline void attention_row_max(const KeyBlock& b, const AttentionScratch& s, Vec* new_max, Vec* base) {
  const int64_t keys = b.keys, width = b.width;
  const int vectors = int(width / Vec::kWidth);
  const Vec scale = Vec::set1(b.scale), lowest = Vec::set1(-3.4028234663852886e38f);
  for (int m = 0; m < vectors; ++m) new_max[m] = Vec::load(s.scores + m * Vec::kWidth);
  for (int64_t i = 1; i < keys; ++i)
    for (int m = 0; m < vectors; ++m)
      new_max[m] = Vec::max(new_max[m], Vec::load(s.scores + i * width + m * Vec::kWidth));
  for (int m = 0; m < vectors; ++m) {
    new_max[m] = Vec::max(Vec::load(s.row_max + m * Vec::kWidth), new_max[m] * scale);
    base[m] = Vec::select_lt(new_max[m], lowest, Vec::zero(), new_max[m]);
  }
}

// Online softmax after a block: updates row_max and row_sum, and rescales out where a maximum rose.
inline void attention_update_state(const KeyBlock& b, int64_t lane, Vec new_max, Vec base, Vec sum,
                                   const AttentionScratch& s) {
  const int64_t width = b.width, head_dim = b.head_dim;
  const Vec old_max = Vec::load(s.row_max + lane), alpha = vec_exp(old_max - base);
  Vec::fma(Vec::load(s.row_sum + lane), alpha, sum).store(s.row_sum + lane);
  new_max.store(s.row_max + lane);
  if (!b.first && Vec::any_lt(old_max, new_max))
    for (int64_t d = 0; d < head_dim; ++d)
      (Vec::load(s.out + d * width + lane) * alpha).store(s.out + d * width + lane);
}

// Scores, times the scale -> probabilities.
inline void attention_softmax(const KeyBlock& b, const AttentionScratch& s) {
  const int64_t keys = b.keys, width = b.width;
  const Vec scale = Vec::set1(b.scale);
  Vec new_max[Vec::kPanelVectors], base[Vec::kPanelVectors];
  attention_row_max(b, s, new_max, base);
  for (int64_t lane = 0; lane < width; lane += Vec::kWidth) {
    const int m = int(lane / Vec::kWidth);
    const Vec minus_base = Vec::zero() - base[m];
    Vec sum = Vec::zero();
    for (int64_t i = 0; i < keys; ++i) {
      float* at = s.scores + i * width + lane;
      const Vec p = vec_exp(Vec::fma(Vec::load(at), scale, minus_base));
      sum = sum + p;
      p.store(at);
    }
    attention_update_state(b, lane, new_max[m], base[m], sum, s);
  }
}

// The same for bf16_dot: probabilities leave as bf16 pairs of keys; an odd last key is paired with 0.
template <bool MASKED, class V>
inline void attention_softmax_pairs(const KeyBlock& b, const AttentionScratch& s) {
  const int64_t keys = b.keys, width = b.width;
  constexpr float kLog2E = 1.44269504088896341f;
  const V log2_e = V::set1(kLog2E), scale = V::set1(MASKED ? b.scale : b.scale * kLog2E);
  V new_max[V::kPanelVectors], base[V::kPanelVectors];
  attention_row_max(b, s, new_max, base);
  for (int64_t lane = 0; lane < width; lane += V::kWidth) {
    const int m = int(lane / V::kWidth);
    const V minus_base = MASKED ? V::zero() - base[m] : (V::zero() - base[m]) * log2_e;
    // With a mask log2_e is multiplied last: times the lowest float, which masks are made of, it would overflow.
    const auto probability = [&](const float* at) {
      const V x = V::fma(V::load(at), scale, minus_base);
      return vec_exp2_short(MASKED ? x * log2_e : x);
    };
    const float* scores = s.scores + lane;
    float* pairs = s.pairs + lane;
    V even = V::zero(), odd = V::zero();
    int64_t i = 0;
    for (; i + 2 <= keys; i += 2, scores += 2 * width, pairs += width) {
      const V low = probability(scores), high = probability(scores + width);
      even = even + low, odd = odd + high;
      V::pack_pair_flush(low, high).store(pairs);
    }
    if (i < keys) {
      const V low = probability(scores);
      even = even + low;
      V::pack_pair_flush(low, V::zero()).store(pairs);
    }
    attention_update_state(b, lane, new_max[m], base[m], even + odd, s);
  }
}

template <class V>
inline void attention_softmax_pairs(const KeyBlock& b, const AttentionScratch& s) {
  b.masked ? attention_softmax_pairs<true, V>(b, s) : attention_softmax_pairs<false, V>(b, s);
}

// True for a key that is masked for all rows of the block. Its value is then zeroed, because NaN * 0 would be NaN.
inline bool attention_key_masked(const float* mask, int64_t width) {
  for (int64_t lane = 0; lane < width; ++lane)
    if (mask[lane] >= -3.4028234663852886e38f) return false;
  return true;
}

template <class T>
inline void attention_widen_values(const AttentionArgs& a, const T* v, int64_t keys, int64_t width, bool masked,
                                   const AttentionScratch& s) {
  for (int64_t i = 0; i < keys; ++i) {
    float* row = s.kv + i * a.head_dim;
    const bool skip = masked && attention_key_masked(s.mask + i * width, width);
    QVL_FOR_LANES(d, lanes, a.head_dim) {
      store_lanes(skip ? Vec::zero() : load_lanes(v + i * a.v.stride_t + d, lanes), row + d, lanes);
    }
  }
}

// Values as bf16 pairs of keys for bf16_dot, [keys / 2][head_dim] words; an odd last key is paired with zeros. mask: of
// the keys, or nullptr.
template <class V>
inline void attention_pair_values(const AttentionArgs& a, const bf16* v, int64_t keys, int64_t width, const float* mask,
                                  float* pairs) {
  bf16 zeros[kMaxHeadDim];
  std::memset(zeros, 0, sizeof(bf16) * size_t(a.head_dim));
  for (int64_t i = 0; i < keys; i += 2) {
    const bool masked_low = mask && attention_key_masked(mask + i * width, width);
    const bool masked_high = i + 1 == keys || (mask && attention_key_masked(mask + (i + 1) * width, width));
    const bf16* low = masked_low ? zeros : v + i * a.v.stride_t;
    const bf16* high = masked_high ? zeros : v + (i + 1) * a.v.stride_t;
    QVL_FOR_LANES(d, lanes, a.head_dim) {
      V::load_pair_n(low + d, high + d, lanes).store_n(pairs + i / 2 * a.head_dim + d, lanes);
    }
  }
}

template <class T>
inline void attention_epilogue(const AttentionArgs& a, const AttentionTile& t, int64_t width,
                               const AttentionScratch& s) {
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
          store_lanes(x,
                      static_cast<T*>(t.out) + row / t.queries * a.out.stride_h + row % t.queries * a.out.stride_t + d,
                      count);
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
inline void attention_block(const AttentionArgs& a, const AttentionTile& t, const KeyBlock& b,
                            const AttentionScratch& s) {
  const int64_t key = b.key, keys = b.keys, width = b.width;
  const int vectors = int(width / Vec::kWidth);
  const bool gathered = DOT && t.k_rows;
  const int64_t k_s = gathered ? a.head_dim : a.k.stride_t;
  const T* k = static_cast<const T*>(gathered ? t.k_rows : t.k) + key * k_s;
  const T* v = static_cast<const T*>(t.v) + key * a.v.stride_t;
  const int64_t words = DOT ? a.head_dim / 2 : a.head_dim;
  if (DOT || sizeof(T) == 4) {
    const int64_t max_depth = DOT ? words : kGemmKBlockFp32;  // short partial sums keep fp32 accuracy
    for (int64_t word = 0; word < words; word += max_depth)
      gemm_block<DOT>(vectors,
                      {s.q + word * width, reinterpret_cast<const char*>(k) + word * 4, k_s * int64_t(sizeof(T)), 4,
                       min_i(max_depth, words - word), keys, s.scores, width, word > 0});
  } else {
    for (int64_t i = 0; i < keys; ++i) QVL_FOR_LANES(d, lanes, a.head_dim) {
        store_lanes(load_lanes(k + i * k_s + d, lanes), s.kv + i * a.head_dim + d, lanes);
      }
    gemm_block<false>(
        vectors, {s.q, reinterpret_cast<const char*>(s.kv), a.head_dim * 4, 4, words, keys, s.scores, width, false});
  }
  if (b.masked) attention_load_mask<T>(a, t, key, keys, width, s.mask);
  if (b.scale_first) attention_mask_scores(b, a.scale, s);
  if constexpr (DOT) {
    attention_softmax_pairs<Vec>(b, s);
    const float* pairs = gathered ? t.v_pairs + key / 2 * a.head_dim : s.kv;
    if (!gathered) attention_pair_values<Vec>(a, v, keys, width, b.masked ? s.mask : nullptr, s.kv);
    gemm_block<true>(vectors, {s.pairs, reinterpret_cast<const char*>(pairs), 4, a.head_dim * 4, (keys + 1) / 2,
                               a.head_dim, s.out, width, !b.first});
    return;
  }
  attention_softmax(b, s);
  if (sizeof(T) == 4 && !b.masked) {
    gemm_block<false>(vectors, {s.scores, reinterpret_cast<const char*>(v), 4, a.v.stride_t * 4, keys, a.head_dim,
                                s.out, width, !b.first});
  } else {
    attention_widen_values(a, v, keys, width, b.masked, s);
    gemm_block<false>(vectors, {s.scores, reinterpret_cast<const char*>(s.kv), 4, a.head_dim * 4, keys, a.head_dim,
                                s.out, width, !b.first});
  }
}

// block(key_block) for each step of the online softmax; dot: the query panel holds pairs of bf16.
template <class T, class Block>
inline void attention_steps(const AttentionArgs& a, const AttentionTile& t, bool dot, const AttentionScratch& s,
                            const Block& block) {
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
  attention_pack_q<T>(a, t, dot, width, s.q);
  const int64_t key_end = min_i(t.key_end, max_limit);
  for (int64_t key = t.key_begin; key < key_end; key += kAttentionKeys) {
    KeyBlock b{key, min_i(kAttentionKeys, key_end - key), width, a.head_dim};
    b.masked = a.mask.kind != MaskKind::none, b.limited = key + b.keys > min_limit, b.first = key == t.key_begin;
    b.scale_first = b.masked || b.limited || !(a.scale > 0.0f);
    b.scale = b.scale_first ? 1.0f : a.scale;
    block(b);
  }
  attention_epilogue<T>(a, t, width, s);
}

template <class T, bool DOT>
inline void attention_tile_typed(const AttentionArgs& a, const AttentionTile& t, float* scratch) {
  const AttentionScratch s = attention_scratch(scratch, a.head_dim);
  attention_steps<T>(a, t, DOT, s, [&](const KeyBlock& b) { attention_block<T, DOT>(a, t, b, s); });
}

// Gathers keys and values once per sequence and head for all its tiles. In a vision tower's qkv they lie 6 KB apart, so
// that each tile would read them again from beyond L2.
void attention_gather(const AttentionArgs& a, const AttentionTile& t, int64_t begin, int64_t end) {
  if constexpr (Vec::kHasBf16Dot) {
    const size_t row_bytes = sizeof(bf16) * size_t(a.head_dim);
    for (int64_t i = begin; i < end; ++i)
      std::memcpy(static_cast<bf16*>(t.k_rows) + i * a.head_dim, static_cast<const bf16*>(t.k) + i * a.k.stride_t,
                  row_bytes);
    attention_pair_values<Vec>(a, static_cast<const bf16*>(t.v) + begin * a.v.stride_t, end - begin, 0, nullptr,
                               t.v_pairs + begin / 2 * a.head_dim);
  }
}

void attention_tile(const AttentionArgs& a, const AttentionTile& t, float* scratch) {
  if constexpr (Vec::kHasBf16Dot) {
    if (t.row_end - t.row_begin > kDecodeRows && a.dtype == DType::bf16 && t.backend == GemmBackend::bf16_dot)
      return attention_tile_typed<bf16, true>(a, t, scratch);
  }
  for_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    if (t.row_end - t.row_begin <= kDecodeRows) return attention_decode<T>(a, t, scratch);
    attention_tile_typed<T, false>(a, t, scratch);
  });
}
