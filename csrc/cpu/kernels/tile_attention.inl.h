// Attention of bf16 on matrix units, the steps and softmax of attention.inl.h: keys, and then values, are the left
// operand, queries and probabilities the panels.

constexpr int64_t kTileKeys = kGatherKeys;  // keys of a step of the second product

inline bool tile_attention_fits(const AttentionArgs& a, const AttentionTile& t) {
  return a.dtype == DType::bf16 && t.backend == GemmBackend::bf16_dot && a.head_dim % kTileKeys == 0;
}

// Values of keys [0, keys), rounded up to a multiple of kTileKeys with zeros, as tiles [steps][head_dim / 16]: 16 rows
// of head_dim, 16 words of two keys. mask: of the keys, or nullptr.
inline void tile_pack_values(const AttentionArgs& a, const bf16* v, int64_t keys, int64_t width, const float* mask,
                             float* tiles) {
  bf16 zeros[kMaxHeadDim];
  std::memset(zeros, 0, sizeof(bf16) * size_t(a.head_dim));
  alignas(64) float words[kTileRows * kTileWords];
  for (int64_t key = 0; key < keys; key += kTileKeys) {
    const bf16* rows[kTileKeys];
    for (int64_t i = 0; i < kTileKeys; ++i) {
      const bool skip = key + i >= keys || (mask && attention_key_masked(mask + (key + i) * width, width));
      rows[i] = skip ? zeros : v + (key + i) * a.v.stride_t;
    }
    for (int64_t d = 0; d < a.head_dim; d += kTileRows, tiles += kTileRows * kTileWords) {
      for (int64_t i = 0; i < kTileWords; ++i)
        Vec::load_pair_n(rows[2 * i] + d, rows[2 * i + 1] + d, 16).store(words + i * 16);
      Vec::transpose(words, 16, tiles, 16);
    }
  }
}

void tile_attention_gather(const AttentionArgs& a, const AttentionTile& t, int64_t begin, int64_t end) {
  if (!tile_attention_fits(a, t)) return attention_gather(a, t, begin, end);
  const size_t row_bytes = sizeof(bf16) * size_t(a.head_dim);
  bf16* k_rows = static_cast<bf16*>(t.k_rows);
  for (int64_t i = begin; i < end; ++i)
    std::memcpy(k_rows + i * a.head_dim, static_cast<const bf16*>(t.k) + i * a.k.stride_t, row_bytes);
  const int64_t padded = (end + kTileKeys - 1) / kTileKeys * kTileKeys;
  std::memset(k_rows + end * a.head_dim, 0, size_t(padded - end) * row_bytes);
  tile_pack_values(a, static_cast<const bf16*>(t.v) + begin * a.v.stride_t, end - begin, 0, nullptr,
                   t.v_pairs + begin / 2 * a.head_dim);
}

// The scores [keys][width] of a block's keys, and of some more that nobody reads.
inline void tile_attention_scores(const AttentionArgs& a, const AttentionTile& t, const KeyBlock& b,
                                  const AttentionScratch& s, char* spare) {
  const int64_t row_bytes = (t.k_rows ? a.head_dim : a.k.stride_t) * int64_t(sizeof(bf16));
  const char* k = static_cast<const char*>(t.k_rows ? t.k_rows : t.k) + b.key * row_bytes;
  const int64_t steps = a.head_dim / kTileKeys, tiles = (b.keys + kTileRows - 1) / kTileRows;
  const int64_t whole = t.k_rows ? tiles : min_i(tiles, (t.keys - b.key) / kTileRows);  // tiles of 16 keys that exist
  const auto multiply = [&](const char* rows, int64_t bytes, int64_t row_tiles, float* scores) {
    tile_blocks(row_tiles, b.width / 16, [&](int64_t row, auto row_count, int64_t lane, auto lane_count) {
      constexpr int kRows = row_count, kLanes = lane_count;
      tile_zero_sums<kRows, kLanes>();
      const TilePanel panel{reinterpret_cast<const char*>(s.q + lane * 16), b.width * 4, steps, nullptr};
      tile_multiply<DotBf16, kRows, kLanes, false>(
          {rows + row * kTileRows * bytes, bytes, kTileRowBytes, kTileRows * bytes}, panel, 0, steps, [] {});
      tile_store_sums<kRows, kLanes>(scores + row * kTileRows * b.width + lane * 16, b.width);
    });
  };
  multiply(k, row_bytes, whole, s.scores);
  if (whole == tiles) return;
  const int64_t contiguous_row_bytes = a.head_dim * int64_t(sizeof(bf16));
  for (int64_t i = 0; i < kTileRows; ++i) {
    const int64_t key = whole * kTileRows + i;
    if (b.key + key < t.keys) {
      std::memcpy(spare + i * contiguous_row_bytes, k + key * row_bytes, size_t(contiguous_row_bytes));
    } else {
      std::memset(spare + i * contiguous_row_bytes, 0, size_t(contiguous_row_bytes));
    }
  }
  multiply(spare, contiguous_row_bytes, 1, s.scores + whole * kTileRows * b.width);
}

inline void tile_attention_block(const AttentionArgs& a, const AttentionTile& t, const KeyBlock& b,
                                 const AttentionScratch& s) {
  const int64_t steps = (b.keys + kTileKeys - 1) / kTileKeys, words = steps * kTileWords;
  // The block's values as tiles, and 16 keys behind them.
  tile_attention_scores(a, t, b, s, reinterpret_cast<char*>(s.kv + kAttentionKeys / 2 * a.head_dim));
  if (b.masked) attention_load_mask<bf16>(a, t, b.key, b.keys, b.width, s.mask);
  if (b.scale_first) attention_mask_scores(b, a.scale, s);
  attention_softmax_pairs<Vec>(b, s);
  const int64_t pairs = (b.keys + 1) / 2;
  std::memset(s.pairs + pairs * b.width, 0, size_t((words - pairs) * b.width) * 4);
  const float* values = t.v_pairs ? t.v_pairs + b.key / 2 * a.head_dim : s.kv;
  if (!t.v_pairs)
    tile_pack_values(a, static_cast<const bf16*>(t.v) + b.key * a.v.stride_t, b.keys, b.width,
                     b.masked ? s.mask : nullptr, s.kv);
  const int64_t d_tiles = a.head_dim / kTileRows;
  tile_blocks(d_tiles, b.width / 16, [&](int64_t row, auto row_count, int64_t lane, auto lane_count) {
    constexpr int kRows = row_count, kLanes = lane_count;
    float* out = s.out + row * kTileRows * b.width + lane * 16;
    if (b.first) {
      tile_zero_sums<kRows, kLanes>();
    } else {
      tile_load_sums<kRows, kLanes>(out, b.width);
    }
    const TilePanel panel{reinterpret_cast<const char*>(s.pairs + lane * 16), b.width * 4, steps, nullptr};
    const TileRows rows{reinterpret_cast<const char*>(values) + row * kTileBytes, kTileRowBytes, d_tiles * kTileBytes,
                        kTileBytes};
    tile_multiply<DotBf16, kRows, kLanes, false>(rows, panel, 0, steps, [] {});
    tile_store_sums<kRows, kLanes>(out, b.width);
  });
}

void tile_attention_tile(const AttentionArgs& a, const AttentionTile& t, float* scratch) {
  if (t.row_end - t.row_begin <= kDecodeRows || !tile_attention_fits(a, t)) return attention_tile(a, t, scratch);
  const TileRegion region;
  const AttentionScratch s = attention_scratch(scratch, a.head_dim);
  attention_steps<bf16>(a, t, true, s, [&](const KeyBlock& b) { tile_attention_block(a, t, b, s); });
}
