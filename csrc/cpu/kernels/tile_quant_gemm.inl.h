// Quantised GEMM on matrix units: int8 activations in groups of tile_quant_group times int8 weights, int4 weights unpacked to
// int8 per task. Integer sums leave the tiles after every group; they become fp32 while the next group is multiplied.

// One K-block of weight rows as tiles, and their scales.
struct TileQuantBlock {
  const char* tiles;    // [row tiles][steps]
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
  int64_t row = ROWS * 16;

  // Adds `count` more rows.
  void advance(int64_t count) {
    const int64_t end = min_i(row + count, ROWS * 16);
    for (; row < end; ++row) {
      Vec scale;
      if (scales) scale = Vec::set1(scales[row]);
#pragma GCC unroll 2
      for (int l = 0; l < LANES; ++l) {
        const Vec x_scale = Vec::load(x_scales + l * 16);
        float* at = c + row * kPanelWidth + l * 16;
        Vec::fma(Vec::load_ints(sums + (row * LANES + l) * 16), scales ? x_scale * scale : x_scale, Vec::load(at)).store(at);
      }
    }
  }
};

// c [ROWS * 16][LANES * 16] += the block's rows times the panel. x_scales: of the first group and lane, groups `width`
// apart.
template <int ROWS, int LANES>
inline void tile_quant_multiply(const TileQuantBlock& b, int64_t row_tile, const TilePanel& panel,
                                const float* x_scales, int64_t width, float* c) {
  alignas(64) int32_t sums[2][ROWS * 16 * LANES * 16];
  const int64_t rows_per_dot = (ROWS * 16 + ROWS * LANES * b.group_steps - 1) / (ROWS * LANES * b.group_steps);
  TileQuantPending<ROWS, LANES> pending{};
  pending.c = c;
  for (int64_t begin = 0, group = 0; begin < b.steps; begin += b.group_steps, ++group) {
    tile_zero_sums<ROWS, LANES>();
    tile_multiply<DotInt8, ROWS, LANES>(packed_tile_rows(b.tiles, row_tile, b.steps), panel, begin,
                                        min_i(begin + b.group_steps, b.steps),
                                        [&] { pending.advance(rows_per_dot); });
    pending.advance(ROWS * 16);
    tile_store_sums<ROWS, LANES>(sums[group % 2], LANES * 16);
    pending.sums = sums[group % 2], pending.x_scales = x_scales + group * width, pending.row = 0;
    if (b.scales) pending.scales = b.scales + group * kQuantGemmTileN + row_tile * 16;
  }
  pending.advance(ROWS * 16);
}

// An int4 row's inputs [begin, end) as int8, with one scale that is returned: scale * int8 is nearly weight scale *
// (nibble - zero). `begin` is the first input of a group of activations; tiles: the row's 64 bytes of the first step.
inline float tile_unpack_int4(const Weight& weight, int64_t row, int64_t begin, int64_t end, char* tiles) {
  const uint8_t* nibbles = static_cast<const uint8_t*>(weight.w) + row * weight.stride + begin / 2;
  const uint8_t* zeros = weight.zeros ? weight.zeros + row * weight.zero_stride : nullptr;
  const char* scales = static_cast<const char*>(weight.scales) + row * weight.scale_stride * 2;
  const int64_t first = begin / weight.group, count = (end - begin + weight.group - 1) / weight.group;
  float group_scales[kTileQuantGroup / 32], largest = 0.0f;
  int group_zeros[kTileQuantGroup / 32];
  for (int64_t g = 0; g < count; ++g) {
    const float scale = int4_scale(scales, weight.scale_dtype, first + g);
    const int zero = int4_zero(zeros, first + g);
    group_scales[g] = scale, group_zeros[g] = zero;
    const float reach = __builtin_fabsf(scale) * float(zero > 7 ? zero : 15 - zero);
    largest = reach > largest || reach != reach ? reach : largest;
  }
  const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
  for (int64_t i = begin; i < end; i += 32, nibbles += 16) {
    const int64_t g = (i - begin) / weight.group;
    int8_t* out = reinterpret_cast<int8_t*>(tiles + (i - begin) / kTileRowBytes * kTileBytes + (i - begin) % kTileRowBytes);
    GemmInts::unpack_scaled(nibbles, group_zeros[g], group_scales[g] * inverse, out);
  }
  return largest / 127.0f;
}

// A tile's rows of one weight times its panels, over all k.
inline void tile_quant_accumulate(const QuantGemmArgs& a, const Weight& weight, const GemmTile& tile, float* c,
                                  float* scratch) {
  const bool int4 = weight.format == WeightFormat::int4;
  const int64_t groups = (a.k + a.group - 1) / a.group, rows = tile.n_end - tile.n_begin;
  const int64_t row_tiles = (rows + kTileRows - 1) / kTileRows;
  char* tiles = reinterpret_cast<char*>(scratch);
  float* scales = scratch + kQuantGemmTileN * kQuantGemmKBlockBytes / 4;
  alignas(64) uint32_t tail[kTileWords * kPanelWidth];
  for (int64_t k = 0; k < a.k; k += kQuantGemmKBlockBytes) {
    const int64_t depth = min_i(kQuantGemmKBlockBytes, a.k - k), steps = (depth + kTileRowBytes - 1) / kTileRowBytes;
    for (int64_t n = 0; n < rows; n += kTileRows) {
      char* row_tiles_at = tiles + n / kTileRows * steps * kTileBytes;
      const int64_t count = min_i(kTileRows, rows - n);
      if (!int4) {
        const char* w = static_cast<const char*>(weight.w) + (tile.n_begin + n) * weight.stride + k;
        tile_pack_rows(w, weight.stride, count, depth, row_tiles_at);
        continue;
      }
      if (count < kTileRows || depth % kTileRowBytes) std::memset(row_tiles_at, 0, size_t(steps * kTileBytes));
      for (int64_t begin = 0; begin < depth; begin += a.group)
        for (int64_t r = 0; r < kTileRows; ++r)
          scales[begin / a.group * kQuantGemmTileN + n + r] =
              r < count ? tile_unpack_int4(weight, tile.n_begin + n + r, k + begin, k + min_i(begin + a.group, depth),
                                           row_tiles_at + begin / kTileRowBytes * kTileBytes + r * kTileRowBytes)
                        : 0.0f;
    }
    const TileQuantBlock block{tiles, int4 ? scales : nullptr, steps, a.group / kTileRowBytes};
    for (int64_t p = tile.panel_begin; p < tile.panel_end; ++p) {
      const int64_t width = panel_vectors(a.m, p) * Vec::kWidth, words = quant_words(depth);
      const uint32_t* panel =
          static_cast<const uint32_t*>(a.panels) + p * kPanelWidth * quant_words(a.k) + quant_words(k) * width;
      const float* x_scales = a.x_scales + p * kPanelWidth * groups + k / a.group * width;
      float* sums = c + (p - tile.panel_begin) * kQuantPanelSums;
      if (k == 0) std::memset(sums, 0, size_t(row_tiles * kTileRows * kPanelWidth) * 4);
      const char* padded = tile_tail(panel, words, width, tail);
      tile_blocks(row_tiles, width / 16, [&](int64_t row, auto row_count, int64_t lane, auto lane_count) {
        const TilePanel b{reinterpret_cast<const char*>(panel + lane * 16), width * 4, steps,
                          padded ? padded + lane * kTileRowBytes : nullptr};
        tile_quant_multiply<row_count, lane_count>(block, row, b, x_scales + lane * 16, width,
                                                   sums + row * 16 * kPanelWidth + lane * 16);
      });
    }
  }
  if (int4) return;
  for (int64_t p = tile.panel_begin; p < tile.panel_end; ++p, c += kQuantPanelSums)
    for (int64_t n = 0; n < rows; ++n) {
      const Vec scale = Vec::set1(static_cast<const float*>(weight.scales)[(tile.n_begin + n) * weight.scale_stride]);
      for (int64_t lane = 0; lane < kPanelWidth; lane += Vec::kWidth) {
        float* at = c + n * kPanelWidth + lane;
        (Vec::load(at) * scale).store(at);
      }
    }
}

void tile_quant_gemm_tile(const QuantGemmArgs& a, const GemmTile& tile, float* scratch) {
  float* c = scratch;
  scratch += kGemmTilePanels * kQuantPanelSums;
  {
    const TileRegion region;
    tile_quant_accumulate(a, a.weight, tile, c, scratch);
    if (a.activation == Activation::swiglu)
      tile_quant_accumulate(a, a.up, tile, c + kQuantGemmTileN * kPanelWidth, scratch);
  }
  for_dtype(a.dtype, [&](auto element) { quant_epilogue<decltype(element)>(a, tile, c); });
}
