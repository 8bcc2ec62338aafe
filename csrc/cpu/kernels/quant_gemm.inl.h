// Quantised GEMM: int8 and int4 weights times activations quantised to int8. Activations are packed, weights broadcast,
// as in gemm.inl.h. A word is 32 bits of k: as many elements as the target multiplies at once (GemmInts). Integer sums
// run over one group of activations, fp32 sums over the groups. The VNNI instruction takes activations as unsigned
// bytes (u8s8): 128 is added to them, and the zero-point compensation, -128 times the sum of the group's weights,
// starts sums.

constexpr int64_t kQuantGemmKBlock =
    kQuantGemmKBlockBytes / int64_t(sizeof(GemmInts::Weight));  // elements of k per block

// One K-block of a tile's weight rows, shared by all panels of the tile.
struct QuantBlock {
  WeightFormat format;
  const char* source;  // the weight rows in memory; bytes of a row, and of a group of it
  int64_t source_row_bytes, source_group_bytes;
  // int4: [rows][groups] from the block's first group on; int8: fp32 [rows] in the last K-block, else nullptr
  const void* source_scales;
  int64_t scale_stride;
  DType scale_dtype;            // int4
  const uint8_t* source_zeros;  // int4: zero-points from the block's first group on, or nullptr
  int64_t zero_stride;
  GemmInts::Weight* unpacked;  // [rows][kQuantGemmKBlock], or nullptr where the rows in memory are words already
  const char* words;           // [rows][words] at word_row bytes: either of them
  int64_t word_row;
  int64_t depth;          // elements of k
  int64_t count, group;   // words, and words of a group: the last group may be shorter
  int32_t* compensation;  // zero-point compensation [group][kQuantGemmTileN], 0 where the target is s8s8
  float* scales;          // int4: [group][kQuantGemmTileN]; int8: [kQuantGemmTileN], 1 until the last K-block
};

// Micro-kernel: c[n][lane] (+)= sum over groups of x_scales[group][lane] * the group's integer sum, times the scale of
// the weights: of the group (GROUPED) or of the row. prefetch: software prefetch of the NR rows after these.
template <bool GROUPED, int MV, int NR>
inline void quant_microkernel(const QuantBlock& b, int64_t n0, const uint32_t* panel, const float* x_scales, float* c,
                              bool accumulate, bool prefetch) {
  const char* words = b.words + n0 * b.word_row;
  c += n0 * kPanelWidth;
  Vec sum[NR][MV];
#pragma GCC unroll 8
  for (int n = 0; n < NR; ++n)
#pragma GCC unroll 4
    for (int m = 0; m < MV; ++m)
      sum[n][m] = accumulate ? Vec::load(c + n * kPanelWidth + m * Vec::kWidth) : Vec::zero();
  for (int64_t begin = 0, group = 0; begin < b.count; begin += b.group, ++group) {
    GemmInts acc[NR][MV];
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n) {
      const GemmInts start = GemmInts::set1(b.compensation[group * kQuantGemmTileN + n0 + n]);
#pragma GCC unroll 4
      for (int m = 0; m < MV; ++m) acc[n][m] = start;
    }
    if (prefetch) {
      const char* next = b.source + (n0 + NR) * b.source_row_bytes + group * b.source_group_bytes;
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n, next += b.source_row_bytes) {
        __builtin_prefetch(next, 0, 2);  // a group of int8 is two lines, of int4 at most one
        __builtin_prefetch(next + 64, 0, 2);
      }
    }
    const int64_t count = min_i(b.group, b.count - begin);
    for (int64_t k = 0; k < count; ++k) {
      GemmInts a[MV];
#pragma GCC unroll 4
      for (int m = 0; m < MV; ++m) a[m] = GemmInts::load(panel + m * Vec::kWidth);
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) {
        uint32_t word;
        std::memcpy(&word, words + n * b.word_row, 4);
#pragma GCC unroll 4
        for (int m = 0; m < MV; ++m) acc[n][m] = GemmInts::multiply_add(acc[n][m], a[m], word);
      }
      panel += MV * Vec::kWidth;
      words += 4;
    }
#pragma GCC unroll 4
    for (int m = 0; m < MV; ++m) {
      const Vec x_scale = Vec::load(x_scales + m * Vec::kWidth);
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) {
        const Vec scale = GROUPED ? x_scale * Vec::set1(b.scales[group * kQuantGemmTileN + n0 + n]) : x_scale;
        sum[n][m] = Vec::fma(acc[n][m].to_float(), scale, sum[n][m]);
      }
    }
    x_scales += MV * Vec::kWidth;
  }
#pragma GCC unroll 8
  for (int n = 0; n < NR; ++n)
#pragma GCC unroll 4
    for (int m = 0; m < MV; ++m)
      (GROUPED ? sum[n][m] : sum[n][m] * Vec::set1(b.scales[n0 + n])).store(c + n * kPanelWidth + m * Vec::kWidth);
}

// Unpacks rows [n, end) of the block, and computes their zero-point compensation and scales.
inline void quant_unpack_rows(const QuantBlock& b, int64_t n, int64_t end) {
  for (; n < end; ++n) {
    const char* source = b.source + n * b.source_row_bytes;
    if (b.unpacked) {
      GemmInts::Weight* out = b.unpacked + n * kQuantGemmKBlock;
      if (b.format == WeightFormat::int4) {
        const uint8_t* zeros = b.source_zeros ? b.source_zeros + n * b.zero_stride : nullptr;
        const int64_t group = b.group * GemmInts::kPerWord;
        for (int64_t begin = 0; begin < b.depth; begin += group) {
          const int zero = int4_zero(zeros, begin / group);
          for (int64_t i = begin; i < min_i(begin + group, b.depth); i += 32)
            GemmInts::unpack(reinterpret_cast<const uint8_t*>(source) + i / 2, zero, out + i);
        }
      } else {
        for (int64_t i = 0; i < b.depth; ++i) out[i] = GemmInts::Weight(reinterpret_cast<const int8_t*>(source)[i]);
        for (int64_t i = b.depth; i < b.count * GemmInts::kPerWord; ++i) out[i] = GemmInts::Weight(0);
      }
    }
    for (int64_t begin = 0, group = 0; begin < b.count; begin += b.group, ++group) {
      b.compensation[group * kQuantGemmTileN + n] =
          GemmInts::zero_point_compensation(b.words + n * b.word_row + begin * 4, min_i(b.group, b.count - begin));
      if (b.format == WeightFormat::int4)
        b.scales[group * kQuantGemmTileN + n] = int4_scale(b.source_scales, b.scale_dtype, n * b.scale_stride + group);
    }
    if (b.format == WeightFormat::int8)
      b.scales[n] = b.source_scales ? static_cast<const float*>(b.source_scales)[n * b.scale_stride] : 1.0f;
  }
}

// All rows of the block and one panel. The first panel of a tile unpacks rows just before it multiplies them, while the
// next ones are prefetched.
template <bool GROUPED, int MV, int NR>
inline void quant_rows(const QuantBlock& b, int64_t rows, const uint32_t* panel, const float* x_scales, float* c,
                       bool accumulate, bool first) {
  int64_t n = 0;
  for (; n + NR <= rows; n += NR) {
    if (first) quant_unpack_rows(b, n, n + NR);
    quant_microkernel<GROUPED, MV, NR>(b, n, panel, x_scales, c, accumulate, first && n + 2 * NR <= rows);
  }
  for (; n < rows; ++n) {
    if (first) quant_unpack_rows(b, n, n + 1);
    quant_microkernel<GROUPED, MV, 1>(b, n, panel, x_scales, c, accumulate, false);
  }
}

template <bool GROUPED>
inline void quant_panel(int vectors, const QuantBlock& b, int64_t rows, const uint32_t* panel, const float* x_scales,
                        float* c, bool accumulate, bool first) {
  if constexpr (Vec::kPanelVectors == 4) {  // 32 vector registers: 16 integer sums, the fp32 ones partly in L1
    switch (vectors) {
      case 1:
        return quant_rows<GROUPED, 1, 8>(b, rows, panel, x_scales, c, accumulate, first);
      case 2:
        return quant_rows<GROUPED, 2, 8>(b, rows, panel, x_scales, c, accumulate, first);
      case 3:
        return quant_rows<GROUPED, 3, 4>(b, rows, panel, x_scales, c, accumulate, first);
      default:
        return quant_rows<GROUPED, 4, 4>(b, rows, panel, x_scales, c, accumulate, first);
    }
  } else {
    switch (vectors) {
      case 1:
        return quant_rows<GROUPED, 1, 8>(b, rows, panel, x_scales, c, accumulate, first);
      default:
        return quant_rows<GROUPED, 2, 4>(b, rows, panel, x_scales, c, accumulate, first);
    }
  }
}

// A tile's rows of one weight times its panels, over all k.
inline void quant_accumulate(const QuantGemmArgs& a, const Weight& weight, const GemmTile& tile, float* c,
                             float* scratch) {
  const bool int4 = weight.format == WeightFormat::int4;
  const int64_t groups = (a.k + a.group - 1) / a.group, rows = tile.n_end - tile.n_begin;
  QuantBlock b{};
  b.format = weight.format;
  b.source_row_bytes = weight.stride, b.source_group_bytes = int4 ? a.group / 2 : a.group;
  b.scale_stride = weight.scale_stride, b.scale_dtype = weight.scale_dtype, b.zero_stride = weight.zero_stride;
  b.group = a.group / GemmInts::kPerWord;
  if (int4 || GemmInts::kPerWord < 4 || a.k % 4 != 0) b.unpacked = reinterpret_cast<GemmInts::Weight*>(scratch);
  b.compensation = reinterpret_cast<int32_t*>(scratch + kQuantGemmTileN * kQuantGemmKBlockBytes / 4);
  b.scales = scratch + kQuantGemmTileN * (kQuantGemmKBlockBytes / 4 + kQuantGemmKBlockBytes / 32);
  for (int64_t k = 0; k < a.k; k += kQuantGemmKBlock) {
    b.depth = min_i(kQuantGemmKBlock, a.k - k);
    b.count = quant_words(b.depth);
    b.source = static_cast<const char*>(weight.w) + tile.n_begin * weight.stride + (int4 ? k / 2 : k);
    if (int4) {
      const int64_t group = k / a.group;
      b.source_scales = static_cast<const uint16_t*>(weight.scales) + tile.n_begin * weight.scale_stride + group;
      if (weight.zeros) b.source_zeros = weight.zeros + tile.n_begin * weight.zero_stride + group / 2;
    } else if (k + kQuantGemmKBlock >= a.k) {
      b.source_scales = static_cast<const float*>(weight.scales) + tile.n_begin * weight.scale_stride;
    }
    b.words = b.unpacked ? reinterpret_cast<const char*>(b.unpacked) : b.source;
    b.word_row = b.unpacked ? kQuantGemmKBlockBytes : b.source_row_bytes;
    for (int64_t p = tile.panel_begin; p < tile.panel_end; ++p) {
      const int vectors = panel_vectors(a.m, p);
      const int64_t width = vectors * Vec::kWidth;
      const uint32_t* panel =
          static_cast<const uint32_t*>(a.panels) + p * kPanelWidth * quant_words(a.k) + quant_words(k) * width;
      const float* x_scales = a.x_scales + p * kPanelWidth * groups + k / a.group * width;
      float* block = c + (p - tile.panel_begin) * kQuantPanelSums;
      const auto multiply = int4 ? quant_panel<true> : quant_panel<false>;
      multiply(vectors, b, rows, panel, x_scales, block, k > 0, p == tile.panel_begin);
    }
  }
}

template <class T>
void quant_gemm_tile_typed(const QuantGemmArgs& a, const GemmTile& tile, float* scratch) {
  float* c = scratch;
  scratch += kGemmTilePanels * kQuantPanelSums;
  quant_accumulate(a, a.weight, tile, c, scratch);
  if (a.activation == Activation::swiglu) quant_accumulate(a, a.up, tile, c + kQuantGemmTileN * kPanelWidth, scratch);
  for (int64_t p = tile.panel_begin; p < tile.panel_end; ++p, c += kQuantPanelSums)
    quant_epilogue_panel<T>(a, tile, p, c);
}

void quant_gemm_tile(const QuantGemmArgs& a, const GemmTile& tile, float* scratch) {
  for_dtype(a.dtype, [&](auto element) { quant_gemm_tile_typed<decltype(element)>(a, tile, scratch); });
}
