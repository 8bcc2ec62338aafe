// What every quantised GEMM does with its sums, and the layout of its panels.

inline int64_t quant_words(int64_t k) { return (k + 3) / 4 * 4 / GemmInts::kPerWord; }

constexpr int64_t kQuantPanelSums = 2 * kQuantGemmTileN * kPanelWidth;  // of one panel: two weights' rows

// The scale of one group of activations in each lane: see QuantizeArgs.
struct LaneScales {
  Vec amax = Vec::zero(), nonfinite = Vec::zero();
  void see(Vec x) {
    amax = Vec::max(Vec::max(x, Vec::zero() - x), amax);
    nonfinite = Vec::fma(x, Vec::zero(), nonfinite);
  }
  Vec scale() const { return amax / Vec::set1(127.0f) + nonfinite; }
  Vec inverse() const {
    return Vec::select_lt(Vec::set1(kTinyActivation), amax, Vec::set1(127.0f) / amax, Vec::zero());
  }
};

// Epilogue: c becomes k = [n_begin, n_begin + rows) of the next GEMM's panel p, quantised. Groups lie within one tile.
inline void quant_epilogue_store_panel(const QuantGemmArgs& a, int64_t p, int64_t n_begin, int64_t rows, int64_t width,
                                       const float* c) {
  const int64_t groups = (a.n + a.out_group - 1) / a.out_group;
  uint32_t* out = static_cast<uint32_t*>(a.out) + p * kPanelWidth * quant_words(a.n) + quant_words(n_begin) * width;
  float* scales = a.out_scales + p * kPanelWidth * groups + n_begin / a.out_group * width;
  for (int64_t begin = 0; begin < rows; begin += a.out_group, scales += width) {
    const int64_t count = min_i(a.out_group, rows - begin), words = quant_words(count);
    for (int64_t lane = 0; lane < width; lane += Vec::kWidth) {
      const float* column = c + begin * kPanelWidth + lane;
      LaneScales of;
      for (int64_t i = 0; i < count; ++i) of.see(Vec::load(column + i * kPanelWidth));
      of.scale().store(scales + lane);
      const Vec inverse = of.inverse();
      for (int64_t word = 0; word < words; ++word) {
        Vec elements[GemmInts::kPerWord];
        for (int e = 0; e < GemmInts::kPerWord; ++e) {
          const int64_t i = word * GemmInts::kPerWord + e;
          elements[e] = i < count ? Vec::load(column + i * kPanelWidth) * inverse : Vec::zero();
        }
        GemmInts::pack(elements).store(out + word * width + lane);
      }
    }
    out += words * width;
  }
}

// All epilogues of one panel's sums c [2][kQuantGemmTileN][kPanelWidth]; the second half is the up projection's.
template <class T>
inline void quant_epilogue_panel(const QuantGemmArgs& a, const GemmTile& tile, int64_t p, float* c) {
  const int64_t rows = tile.n_end - tile.n_begin, width = panel_vectors(a.m, p) * Vec::kWidth;
  gemm_epilogue_activate<T>(a, tile.n_begin, rows, width, kQuantGemmTileN, c);
  if (a.out_panels) {
    quant_epilogue_store_panel(a, p, tile.n_begin, rows, width, c);
  } else {
    gemm_epilogue_store<T>(a, p, tile.n_begin, rows, c);
  }
}
