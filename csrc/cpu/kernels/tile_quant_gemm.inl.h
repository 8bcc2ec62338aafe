// Quantised GEMM on matrix units: int8 activations in groups of kTileQuantGroup times int8 weights, or int4 weights
// unpacked to int8 per task. Integer sums leave the tiles after every group; they become fp32 while the next group is
// multiplied.

// One K-block of a pair of row tiles, and their scales.
struct TileQuantBlock {
  TileRows rows;        // of the first row tile; the other one is rows.next bytes on
  const float* scales;  // int4: [groups][kQuantGemmTileN]; nullptr for int8, whose rows are scaled at the end
  int64_t steps, group_steps;
};

// Integer sums of one group that wait to be added, scaled, to c.
template <int ROWS, int LANES>
struct TileQuantPending {
  const int32_t* sums;  // [ROWS * 16][LANES * 16]; nullptr: none wait
  const float* x_scales;
  const float* scales;
  float* c;
  bool first;  // nothing lies in c yet
  int64_t row = ROWS * 16;

  // Adds `count` more rows.
  void advance(int64_t count) {
    const int64_t end = min_i(row + count, ROWS * 16);
    if (row == end) return;
    Vec x_scale[LANES];
#pragma GCC unroll 2
    for (int l = 0; l < LANES; ++l) x_scale[l] = Vec::load(x_scales + l * 16);
    for (; row < end; ++row) {
#pragma GCC unroll 2
      for (int l = 0; l < LANES; ++l) {
        const Vec scale = scales ? x_scale[l] * Vec::set1(scales[row]) : x_scale[l];
        float* at = c + row * kPanelWidth + l * 16;
        const Vec before = first ? Vec::zero() : Vec::load(at);
        Vec::fma(Vec::load_ints(sums + (row * LANES + l) * 16), scale, before).store(at);
      }
    }
  }
};

// c [ROWS * 16][LANES * 16] (+)= the block's rows times the panel. x_scales: of the first group and lane, groups
// `width` apart.
template <int ROWS, int LANES, class Between>
inline void tile_quant_multiply(const TileQuantBlock& b, int64_t row_tile, const TilePanel& panel,
                                const float* x_scales, int64_t width, bool accumulate, float* c, Between&& between) {
  alignas(64) int32_t sums[2][ROWS * 16 * LANES * 16];
  const int64_t rows_per_dot = (ROWS * 16 + ROWS * LANES * b.group_steps - 1) / (ROWS * LANES * b.group_steps);
  TileQuantPending<ROWS, LANES> pending{};
  pending.c = c;
  TileRows rows = b.rows;
  rows.at += row_tile * rows.next;
  for (int64_t begin = 0, group = 0; begin < b.steps; begin += b.group_steps, ++group) {
    tile_zero_sums<ROWS, LANES>();
    tile_multiply<DotInt8, ROWS, LANES, true>(rows, panel, begin, min_i(begin + b.group_steps, b.steps), [&] {
      between();
      pending.advance(rows_per_dot);
    });
    pending.advance(ROWS * 16);
    tile_store_sums<ROWS, LANES>(sums[group % 2], LANES * 16);
    pending.sums = sums[group % 2], pending.x_scales = x_scales + group * width, pending.row = 0;
    pending.first = group == 0 && !accumulate;
    if (b.scales) pending.scales = b.scales + group * kQuantGemmTileN + row_tile * 16;
  }
  pending.advance(ROWS * 16);
}

// How an int4 row becomes int8 with one scale per group of activations: that scale times the int8 is nearly the
// weight's scale times (nibble - zero), where the int8 is (nibble - zero) times the factor of its weight group,
// rounded.
struct TileInt4Row {
  float zeros[kQuantGemmKBlockBytes / 32], factors[kQuantGemmKBlockBytes / 32];  // of the weight's groups
};

// Of inputs [k, k + depth) of a row. scales: [groups of activations][kQuantGemmTileN].
template <int GROUP>
inline void tile_int4_row(const Weight& weight, int64_t row, int64_t k, int64_t depth, float* scales,
                          TileInt4Row& out) {
  constexpr int kTogether = kTileQuantGroup / GROUP;
  const int64_t first = k / GROUP, count = (depth + GROUP - 1) / GROUP, groups = (count + kTogether - 1) / kTogether;
  const char* row_scales = static_cast<const char*>(weight.scales) + (row * weight.scale_stride + first) * 2;
  alignas(64) float most[kQuantGemmKBlockBytes / 32 + kTogether] = {}, inverse[kQuantGemmKBlockBytes / kTileQuantGroup];
  if (weight.zeros) {
    const uint8_t* bytes =
        weight.zeros + row * weight.zero_stride + first / 2;  // K-blocks have an even number of groups
    for (int64_t g = 0; g < count; ++g) out.zeros[g] = float(bytes[g / 2] >> (g % 2 * 4) & 15);
  } else {
    for (int64_t g = 0; g < count; ++g) out.zeros[g] = float(kInt4Zero);
  }
  QVL_FOR_LANES(g, lanes, count) {
    const Vec scale = weight.scale_dtype == DType::bf16
                          ? load_lanes(reinterpret_cast<const bf16*>(row_scales) + g, lanes)
                          : load_lanes(reinterpret_cast<const f16*>(row_scales) + g, lanes);
    store_lanes(scale, out.factors + g, lanes);
    const Vec zero = load_lanes(static_cast<const float*>(out.zeros) + g, lanes);
    const Vec reach = scale * Vec::max(zero, Vec::set1(15.0f) - zero);
    store_lanes(Vec::max(Vec::zero() - reach, reach), most + g, lanes);
  }
  for (int64_t g = 0; g < groups; ++g) {
    float largest = most[g * kTogether];
    for (int i = 1; i < kTogether; ++i) {
      const float other = most[g * kTogether + i];
      largest = other > largest || other != other ? other : largest;
    }
    scales[g * kQuantGemmTileN] = largest / 127.0f;
    inverse[g] = largest > 0.0f ? 127.0f / largest : 0.0f;
  }
  for (int64_t g = 0; g < count; ++g) out.factors[g] *= inverse[g / kTogether];
}

// Up to 16 int4 rows, inputs [k, k + depth), as tiles of int8 [steps]; missing rows and inputs are zero.
template <int GROUP>
inline void tile_unpack_int4(const Weight& weight, int64_t row, int64_t count, int64_t k, int64_t depth, float* scales,
                             char* tiles) {
  TileInt4Row rows[kTileRows];
  for (int64_t r = 0; r < count; ++r) tile_int4_row<GROUP>(weight, row + r, k, depth, scales + r, rows[r]);
  const uint8_t* nibbles = static_cast<const uint8_t*>(weight.w) + row * weight.stride + k / 2;
  for (int64_t begin = 0; begin < depth; begin += kTileRowBytes, tiles += kTileBytes) {
    if (count < kTileRows || depth - begin < kTileRowBytes) std::memset(tiles, 0, kTileBytes);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t i = begin; i < min_i(begin + kTileRowBytes, depth); i += 32)
        GemmInts::unpack_scaled(nibbles + r * weight.stride + i / 2, rows[r].zeros[i / GROUP],
                                rows[r].factors[i / GROUP],
                                reinterpret_cast<int8_t*>(tiles) + r * kTileRowBytes + i - begin);
  }
}

// Rows [n, n_end) of a quantised weight as a pair: at most 32.
inline TileWeightPair tile_quant_pair(const Weight& weight, int64_t n, int64_t n_end) {
  TileWeightPair pair;
  for (int i = 0; i < 2; ++i) {
    const int64_t row = n + i * kTileRows;
    pair.rows[i] = static_cast<const char*>(weight.w) + row * weight.stride, pair.row_bytes[i] = weight.stride;
    pair.count[i] = n_end > row ? min_i(kTileRows, n_end - row) : 0;
  }
  return pair;
}

// Inputs [k, k + depth) of a pair as tiles; scales of int4: [groups][kQuantGemmTileN].
inline void tile_quant_pack(const Weight& weight, const TileWeightPair& pair, int64_t n, int64_t k, int64_t depth,
                            float* scales, char* tiles) {
  const int64_t steps = (depth + kTileRowBytes - 1) / kTileRowBytes;
  for (int64_t i = 0; i < pair.tiles(); ++i, tiles += steps * kTileBytes) {
    if (weight.format == WeightFormat::int8) {
      tile_pack_rows(pair.rows[i] + k, weight.stride, pair.count[i], depth, tiles);
      continue;
    }
    const auto unpack = weight.group == 32   ? tile_unpack_int4<32>
                        : weight.group == 64 ? tile_unpack_int4<64>
                                             : tile_unpack_int4<128>;
    unpack(weight, n + i * kTileRows, pair.count[i], k, depth, scales + i * kTileRows, tiles);
  }
}

// A tile's rows of one weight times its panels, over all k. `then`: the rows that are multiplied after these.
inline void tile_quant_accumulate(const QuantGemmArgs& a, const Weight& weight, const GemmTile& tile,
                                  const TileWeightPair& then, float* c, float* scratch) {
  constexpr int64_t kPairRows = 2 * kTileRows;
  const bool int4 = weight.format == WeightFormat::int4, in_place = !int4 && tile_rows_in_place(a, tile, kTileRowBytes);
  const int64_t groups = (a.k + a.group - 1) / a.group;
  const int64_t lane_tiles = tile_lanes(a.m, tile);
  const int64_t per_byte = int4 ? 2 : 1;  // inputs
  char* tiles = reinterpret_cast<char*>(scratch);
  float* scales = scratch + kPairRows * kQuantGemmKBlockBytes / 4;
  alignas(64) uint32_t tail[kTileWords * kPanelWidth];
  const int64_t block_bytes = in_place ? kQuantGemmKBlockBytes : kTileQuantKBlockBytes;
  for (int64_t k = 0; k < a.k; k += block_bytes) {
    const int64_t depth = min_i(block_bytes, a.k - k), steps = (depth + kTileRowBytes - 1) / kTileRowBytes;
    for (int64_t n = tile.n_begin; n < tile.n_end; n += kPairRows) {
      const TileWeightPair pair = tile_quant_pair(weight, n, tile.n_end);
      TileRows from = packed_tile_rows(tiles, 0, steps);
      if (in_place) {
        from = {pair.rows[0] + k, weight.stride, kTileRowBytes, kTileRows * weight.stride};
      } else {
        tile_quant_pack(weight, pair, n, k, depth, scales, tiles);
      }
      const TileQuantBlock block{from, int4 ? scales : nullptr, steps, a.group / kTileRowBytes};
      // Next are the tile's other rows, then the first ones of its next K-block.
      const bool last_rows = n + kPairRows >= tile.n_end, last_k = k + block_bytes >= a.k;
      const int64_t next_k = !last_rows ? k : last_k ? 0 : k + block_bytes;
      TilePairPrefetch prefetch(
          last_rows && last_k ? then : tile_quant_pair(weight, last_rows ? tile.n_begin : n + kPairRows, tile.n_end),
          next_k / per_byte, min_i(block_bytes, a.k - next_k) / per_byte, lane_tiles);
      for (int64_t p = tile.panel_begin; p < tile.panel_end; ++p) {
        const int64_t width = panel_vectors(a.m, p) * Vec::kWidth, words = quant_words(depth);
        const uint32_t* panel =
            static_cast<const uint32_t*>(a.panels) + p * kPanelWidth * quant_words(a.k) + quant_words(k) * width;
        const float* x_scales = a.x_scales + p * kPanelWidth * groups + k / a.group * width;
        float* sums = c + (p - tile.panel_begin) * kQuantPanelSums + (n - tile.n_begin) * kPanelWidth;
        const char* padded = tile_tail(panel, words, width, tail);
        tile_blocks(pair.tiles(), width / 16, [&](int64_t row, auto row_count, int64_t lane, auto lane_count) {
          const TilePanel b{reinterpret_cast<const char*>(panel + lane * 16), width * 4, steps,
                            padded ? padded + lane * kTileRowBytes : nullptr};
          const auto multiply = [&](auto& between) {
            tile_quant_multiply<row_count, lane_count>(block, row, b, x_scales + lane * 16, width, k > 0,
                                                       sums + row * 16 * kPanelWidth + lane * 16, between);
          };
          if (in_place) {
            TilePrefetch in_rows(from, row_count, steps);
            multiply(in_rows);
          } else {
            multiply(prefetch);
          }
        });
      }
    }
  }
}

// Sums [rows][kPanelWidth] of one panel times the scales of their int8 rows, from n on.
inline void tile_quant_scale_rows(const Weight& weight, int64_t n, int64_t rows, int64_t width, float* c) {
  const float* scales = static_cast<const float*>(weight.scales) + n * weight.scale_stride;
  for (int64_t row = 0; row < rows; ++row, scales += weight.scale_stride) {
    const Vec scale = Vec::set1(*scales);
    for (int64_t lane = 0; lane < width; lane += Vec::kWidth) {
      float* at = c + row * kPanelWidth + lane;
      (Vec::load(at) * scale).store(at);
    }
  }
}

void tile_quant_gemm_tile(const QuantGemmArgs& a, const GemmTile& tile, float* scratch) {
  float* c = scratch;
  scratch += kGemmTilePanels * kQuantPanelSums;
  const bool swiglu = a.activation == Activation::swiglu;
  {
    const TileRegion region;
    const TileWeightPair next = tile_quant_pair(a.weight, tile.n_end, tile.next_end);
    if (swiglu) {
      tile_quant_accumulate(a, a.weight, tile, tile_quant_pair(a.up, tile.n_begin, tile.n_end), c, scratch);
      tile_quant_accumulate(a, a.up, tile, next, c + kQuantGemmTileN * kPanelWidth, scratch);
    } else {
      tile_quant_accumulate(a, a.weight, tile, next, c, scratch);
    }
  }
  const auto scale_rows = [&](const Weight& weight, int64_t p, float* sums) {
    if (weight.format != WeightFormat::int8) return;
    const int64_t width = panel_vectors(a.m, p) * Vec::kWidth;
    tile_quant_scale_rows(weight, tile.n_begin, tile.n_end - tile.n_begin, width, sums);
  };
  for_dtype(a.dtype, [&](auto element) {
    for (int64_t p = tile.panel_begin; p < tile.panel_end; ++p, c += kQuantPanelSums) {
      scale_rows(a.weight, p, c);
      if (swiglu) scale_rows(a.up, p, c + kQuantGemmTileN * kPanelWidth);
      quant_epilogue_panel<decltype(element)>(a, tile, p, c);
    }
  });
}
