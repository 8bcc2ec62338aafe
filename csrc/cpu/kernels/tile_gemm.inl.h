// Dense GEMM of bf16 on matrix units: panels and epilogues of gemm.inl.h. Two row tiles of weights at a time are copied
// into whole tiles, multiplied by all panels of the output's tile, and finished, while the next two are fetched.

// Two row tiles of weights: 32 rows, or for SwiGLU 16 of the gate and the 16 of the up projection.
struct TileWeightPair {
  const char* rows[2];
  int64_t row_bytes[2], count[2];
  int64_t tiles() const { return count[1] > 0 ? 2 : 1; }
};

inline int64_t tile_pair_rows(const GemmArgs& a) {
  return a.activation == Activation::swiglu ? kTileRows : 2 * kTileRows;
}

inline TileWeightPair tile_weight_pair(const GemmArgs& a, int64_t n, int64_t n_end) {
  const bool swiglu = a.activation == Activation::swiglu;
  TileWeightPair pair;
  for (int i = 0; i < 2; ++i) {
    const Weight& weight = swiglu && i == 1 ? a.up : a.weight;
    const int64_t row = swiglu ? n : n + i * kTileRows;
    pair.row_bytes[i] = weight.stride * int64_t(sizeof(bf16));
    pair.rows[i] = static_cast<const char*>(weight.w) + row * pair.row_bytes[i];
    pair.count[i] = n_end > row ? min_i(kTileRows, n_end - row) : 0;
  }
  return pair;
}

// Whether tiles are loaded from weight rows as they lie: for few lanes copying them would take longer than multiplying.
inline bool tile_rows_in_place(const GemmArgs& a, const GemmTile& tile, int64_t step_elements) {
  return tile.panel_end - tile.panel_begin == 1 && panel_vectors(a.m, tile.panel_begin) == 1 &&
         a.k % step_elements == 0 && (tile.n_end - tile.n_begin) % kTileRows == 0;
}

// Fetches the K-block of a pair that is multiplied next into L2, a line for every dot product.
class TilePairPrefetch {
 public:
  TilePairPrefetch(const TileWeightPair& pair, int64_t offset, int64_t bytes)
      : pair_(pair), offset_(offset), bytes_(bytes), tile_(pair.count[0] > 0 ? 0 : 2) {}
  void operator()() {
    if (tile_ == 2) return;
    __builtin_prefetch(pair_.rows[tile_] + row_ * pair_.row_bytes[tile_] + offset_ + at_, 0, 2);
    if ((at_ += 64) < bytes_) return;
    at_ = 0;
    if (++row_ < pair_.count[tile_]) return;
    row_ = 0, ++tile_;
    if (tile_ == 1 && pair_.count[1] == 0) tile_ = 2;
  }

 private:
  TileWeightPair pair_;
  int64_t offset_, bytes_, at_ = 0, row_ = 0;
  int tile_;
};

// c [rows][kPanelWidth] (+)= one K-block of a pair of row tiles times all lanes of a panel.
template <class Between>
inline void tile_gemm_panel(const TileRows& rows, int64_t row_tiles, const uint32_t* panel, int64_t width,
                            int64_t words, bool accumulate, float* c, Between&& between) {
  alignas(64) uint32_t tail[kTileWords * kPanelWidth];
  const char* padded = tile_tail(panel, words, width, tail);
  const int64_t steps = (words + kTileWords - 1) / kTileWords;
  tile_blocks(row_tiles, width / 16, [&](int64_t, auto row_count, int64_t lane, auto lane_count) {
    constexpr int kRows = row_count, kLanes = lane_count;
    if (accumulate) {
      tile_load_sums<kRows, kLanes>(c + lane * 16, kPanelWidth);
    } else {
      tile_zero_sums<kRows, kLanes>();
    }
    const TilePanel b{reinterpret_cast<const char*>(panel + lane * 16), width * 4, steps,
                      padded ? padded + lane * kTileRowBytes : nullptr};
    tile_multiply<DotBf16, kRows, kLanes>(rows, b, 0, steps, between);
    tile_store_sums<kRows, kLanes>(c + lane * 16, kPanelWidth);
  });
}

void tile_gemm_tile(const GemmArgs& a, const GemmTile& tile, float* scratch) {
  if (a.backend != GemmBackend::bf16_dot) return gemm_tile(a, tile, scratch);
  const TileRegion region;
  constexpr int64_t kPairSums = 2 * kTileRows * kPanelWidth;  // of one panel
  const int64_t words = a.k / 2, pair_rows = tile_pair_rows(a), panels = tile.panel_end - tile.panel_begin;
  const bool same_rows = a.activation != Activation::swiglu || a.up.stride == a.weight.stride;
  const bool in_place = same_rows && tile_rows_in_place(a, tile, 2 * kTileWords);
  char* tiles = reinterpret_cast<char*>(scratch + kGemmTilePanels * kGemmTileN * kPanelWidth);
  // With k = 0 there is one empty block, which sets the sums to 0.
  for (int64_t word = 0; word == 0 || word < words; word += kGemmKBlock) {
    const int64_t depth = min_i(kGemmKBlock, words - word), steps = (depth + kTileWords - 1) / kTileWords;
    float* pair_sums = scratch;  // [pairs][panels]
    for (int64_t n = tile.n_begin; n < tile.n_end; n += pair_rows, pair_sums += panels * kPairSums) {
      const TileWeightPair pair = tile_weight_pair(a, n, tile.n_end);
      TileRows rows = packed_tile_rows(tiles, 0, steps);
      if (in_place) {
        rows = {pair.rows[0] + word * 4, pair.row_bytes[0], kTileRowBytes, pair.rows[1] - pair.rows[0]};
      } else {
        for (int i = 0; i < pair.tiles(); ++i)
          tile_pack_rows(pair.rows[i] + word * 4, pair.row_bytes[i], pair.count[i], depth * 4,
                         tiles + i * steps * kTileBytes);
      }
      TilePairPrefetch prefetch(tile_weight_pair(a, n + pair_rows, tile.n_end), word * 4, depth * 4);
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t width = panel_vectors(a.m, tile.panel_begin + p) * Vec::kWidth;
        const uint32_t* panel =
            static_cast<const uint32_t*>(a.panels) + (tile.panel_begin + p) * kPanelWidth * words + word * width;
        float* c = pair_sums + p * kPairSums;
        if (in_place) {
          tile_gemm_panel(rows, pair.tiles(), panel, width, depth, word > 0, c,
                          TilePrefetch(rows, pair.tiles(), steps));
        } else {
          tile_gemm_panel(rows, pair.tiles(), panel, width, depth, word > 0, c, prefetch);
        }
        if (word + kGemmKBlock >= words)
          gemm_epilogue_panel<bf16>(a, tile.panel_begin + p, n, min_i(pair_rows, tile.n_end - n), kTileRows, c);
      }
    }
  }
}
