// Matrix units (AMX): what the GEMMs and attention on tiles share. A tile is 16 rows of 64 bytes. One instruction adds
// to 16 x 16 sums the products of 16 weight rows and 16 lanes of a panel over 16 words of k: weights are the left
// operand, in rows as they lie in memory, and a panel's words the right one. Tiles 0 to 3 hold sums, 4 and 5 weights,
// 6 and 7 activations.

constexpr int64_t kTileRows = 16, kTileRowBytes = 64, kTileBytes = kTileRows * kTileRowBytes;
constexpr int64_t kTileWords = 16;  // of k in a step

// Tiles are configured while this lives. Released ones cost no context switch, and PyTorch's kernels configure their
// own.
struct TileRegion {
  TileRegion() { Tiles::configure(); }
  ~TileRegion() { Tiles::release(); }
  TileRegion(const TileRegion&) = delete;
  TileRegion& operator=(const TileRegion&) = delete;
};

// One K-block of a panel, beginning at a lane: words [steps * 16] at row_bytes. The last step may be read from `tail`,
// a copy padded with zeros.
struct TilePanel {
  const char* words;
  int64_t row_bytes, steps;
  const char* tail;
};

// The left operand: up to two tiles of rows, the second `next` bytes on.
struct TileRows {
  const char* at;
  int64_t row_bytes, step_bytes, next;
};

// Tiles [row tiles][steps], as tile_pack_rows leaves them.
inline TileRows packed_tile_rows(const char* tiles, int64_t row_tile, int64_t steps) {
  return {tiles + row_tile * steps * kTileBytes, kTileRowBytes, kTileBytes, steps * kTileBytes};
}

// Fetches rows that come from memory into L2, ahead of the steps that read them, and at their end the beginning of the
// rows behind them: 16 rows for every dot product of a block of one lane tile.
class TilePrefetch {
 public:
  TilePrefetch(const TileRows& rows, int64_t row_tiles, int64_t steps)
      : rows_(rows), row_tiles_(row_tiles), steps_(steps) {}
  void operator()() {
    const int64_t step = step_ + kAhead;
    const char* at = rows_.at + tile_ * rows_.next;
    at += step < steps_ ? step * kTileRowBytes
                        : row_tiles_ * kTileRows * rows_.row_bytes + (step - steps_) * kTileRowBytes;
#pragma GCC unroll 16
    for (int64_t r = 0; r < kTileRows; ++r) __builtin_prefetch(at + r * rows_.row_bytes, 0, 2);
    if (++tile_ == row_tiles_) tile_ = 0, ++step_;
  }

 private:
  static constexpr int64_t kAhead = 8;  // steps
  const TileRows& rows_;
  int64_t row_tiles_, steps_, step_ = 0, tile_ = 0;
};

// Words [16][16] of a panel. STREAMED: they pass L1 by, where the rows are to stay.
template <int TILE, bool STREAMED>
inline void tile_load_words(const char* words, int64_t row_bytes) {
  if constexpr (STREAMED) {
    Tiles::load_streamed<TILE>(words, row_bytes);
  } else {
    Tiles::load<TILE>(words, row_bytes);
  }
}

// Sums of ROWS x LANES tiles += rows times the panel, over steps [begin, end); after each dot product, between() does
// what else there is to do.
template <class Dot, int ROWS, int LANES, bool STREAMED, class Between>
inline void tile_multiply(const TileRows& rows, const TilePanel& b, int64_t begin, int64_t end, Between&& between) {
  const char* a = rows.at + begin * rows.step_bytes;
  for (int64_t step = begin; step < end; ++step, a += rows.step_bytes) {
    const char* words = b.tail && step == b.steps - 1 ? b.tail : b.words + step * kTileWords * b.row_bytes;
    // All loads come first: a neighbour on the same core makes each change from loads to products expensive.
    Tiles::load<4>(a, rows.row_bytes);
    tile_load_words<6, STREAMED>(words, b.row_bytes);
    if constexpr (LANES == 2) tile_load_words<7, STREAMED>(words + kTileRowBytes, b.row_bytes);
    if constexpr (ROWS == 2) Tiles::load<5>(a + rows.next, rows.row_bytes);
    Dot::template dot<0, 4, 6>();
    between();
    if constexpr (LANES == 2) {
      Dot::template dot<1, 4, 7>();
      between();
    }
    if constexpr (ROWS == 2) {
      Dot::template dot<2, 5, 6>();
      between();
    }
    if constexpr (ROWS == 2 && LANES == 2) {
      Dot::template dot<3, 5, 7>();
      between();
    }
  }
}

struct DotBf16 {
  template <int C, int A, int B>
  static void dot() {
    Tiles::dot_bf16<C, A, B>();
  }
};
struct DotInt8 {
  template <int C, int A, int B>
  static void dot() {
    Tiles::dot_int8<C, A, B>();
  }
};

template <int ROWS, int LANES>
inline void tile_zero_sums() {
  Tiles::zero<0>();
  if constexpr (LANES == 2) Tiles::zero<1>();
  if constexpr (ROWS == 2) Tiles::zero<2>();
  if constexpr (ROWS == 2 && LANES == 2) Tiles::zero<3>();
}

// Sums [ROWS * 16][LANES * 16] of 32 bits; stride in elements.
template <int ROWS, int LANES>
inline void tile_load_sums(const float* c, int64_t stride) {
  Tiles::load<0>(c, stride * 4);
  if constexpr (LANES == 2) Tiles::load<1>(c + 16, stride * 4);
  if constexpr (ROWS == 2) Tiles::load<2>(c + 16 * stride, stride * 4);
  if constexpr (ROWS == 2 && LANES == 2) Tiles::load<3>(c + 16 * stride + 16, stride * 4);
}
template <int ROWS, int LANES>
inline void tile_store_sums(void* c, int64_t stride) {
  float* out = static_cast<float*>(c);
  Tiles::store<0>(out, stride * 4);
  if constexpr (LANES == 2) Tiles::store<1>(out + 16, stride * 4);
  if constexpr (ROWS == 2) Tiles::store<2>(out + 16 * stride, stride * 4);
  if constexpr (ROWS == 2 && LANES == 2) Tiles::store<3>(out + 16 * stride + 16, stride * 4);
}

// body(row, rows, lane, lanes) over blocks of 2 x 2 tiles, 1 at the edges; the counts are constants.
template <class Body>
inline void tile_blocks(int64_t row_tiles, int64_t lane_tiles, const Body& body) {
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  for (int64_t lane = 0; lane < lane_tiles; lane += 2)
    for (int64_t row = 0; row < row_tiles; row += 2) {
      if (lane + 1 < lane_tiles) {
        row + 1 < row_tiles ? body(row, Two{}, lane, Two{}) : body(row, One{}, lane, Two{});
      } else {
        row + 1 < row_tiles ? body(row, Two{}, lane, One{}) : body(row, One{}, lane, One{});
      }
    }
}

// Up to 16 weight rows of `bytes` as tiles [steps]; missing rows, and bytes of the last step, are zero. Step by step:
// whole tiles are written at once, and the rows are read as streams side by side.
inline void tile_pack_rows(const char* rows, int64_t row_bytes, int64_t count, int64_t bytes, char* tiles) {
  const int64_t whole = bytes / kTileRowBytes, rest = bytes % kTileRowBytes;
  for (int64_t step = 0; step < whole; ++step, tiles += kTileBytes) {
    const char* from = rows + step * kTileRowBytes;
    for (int64_t r = 0; r < count; ++r) std::memcpy(tiles + r * kTileRowBytes, from + r * row_bytes, kTileRowBytes);
    for (int64_t r = count; r < kTileRows; ++r) std::memset(tiles + r * kTileRowBytes, 0, kTileRowBytes);
  }
  if (rest == 0) return;
  std::memset(tiles, 0, kTileBytes);
  for (int64_t r = 0; r < count; ++r)
    std::memcpy(tiles + r * kTileRowBytes, rows + whole * kTileRowBytes + r * row_bytes, size_t(rest));
}

// The last step of a panel, where it has fewer than 16 words: a copy [16][width] padded with zeros, or nullptr.
inline const char* tile_tail(const uint32_t* words, int64_t count, int64_t width, uint32_t* copy) {
  const int64_t rest = count % kTileWords;
  if (rest == 0) return nullptr;
  std::memcpy(copy, words + (count - rest) * width, size_t(rest * width) * 4);
  std::memset(copy + rest * width, 0, size_t((kTileWords - rest) * width) * 4);
  return reinterpret_cast<const char*>(copy);
}

// Two row tiles of weights: 32 rows, or for SwiGLU of a dense GEMM 16 of the gate and the 16 of the up projection.
struct TileWeightPair {
  const char* rows[2];
  int64_t row_bytes[2], count[2];
  int64_t tiles() const { return count[1] > 0 ? 2 : 1; }
};

// Lane tiles of all panels of a tile of the output.
inline int64_t tile_lanes(int64_t m, const GemmTile& tile) {
  int64_t lanes = 0;
  for (int64_t p = tile.panel_begin; p < tile.panel_end; ++p) lanes += panel_vectors(m, p);
  return lanes;
}

// Fetches the K-block of a pair that is multiplied next into L2, a few lines for every dot product of this one.
class TilePairPrefetch {
 public:
  // `lane_tiles`: of all panels, by which the pair at hand is multiplied.
  TilePairPrefetch(const TileWeightPair& pair, int64_t offset, int64_t bytes, int64_t lane_tiles)
      : pair_(pair),
        offset_(offset),
        bytes_(bytes),
        lines_((kTileRows + lane_tiles - 1) / lane_tiles),
        tile_(pair.count[0] > 0 && bytes > 0 ? 0 : 2) {}
  void operator()() {
    for (int64_t line = 0; line < lines_ && tile_ < 2; ++line) {
      __builtin_prefetch(pair_.rows[tile_] + row_ * pair_.row_bytes[tile_] + offset_ + at_, 0, 2);
      if ((at_ += 64) < bytes_) continue;
      at_ = 0;
      if (++row_ < pair_.count[tile_]) continue;
      row_ = 0, ++tile_;
      if (tile_ == 1 && pair_.count[1] == 0) tile_ = 2;
    }
  }

 private:
  TileWeightPair pair_;
  int64_t offset_, bytes_, lines_, at_ = 0, row_ = 0;
  int tile_;
};
