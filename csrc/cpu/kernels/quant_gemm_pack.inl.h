// Quantises activations to int8 and packs them into panels for quant_gemm.inl.h.

// Rows [block * kWidth, (block + 1) * kWidth) of x, clipped to m; a panel is shared by up to kPanelVectors blocks.
void quant_gemm_pack(const QuantGemmPackArgs& a, int64_t block, char* scratch) {
  const QuantizeArgs& x = a.rows;
  const int64_t row0 = block * Vec::kWidth, rows = min_i(Vec::kWidth, a.m - row0);
  const int64_t panel = block / Vec::kPanelVectors, width = panel_vectors(a.m, panel) * Vec::kWidth;
  const int64_t lane = block % Vec::kPanelVectors * Vec::kWidth, words = quant_words(x.k),
                groups = x.k_padded / x.group;

  QuantizeArgs part = x;
  part.x = static_cast<const char*>(x.x) + row0 * x.x_stride * dtype_bytes(x.dtype);
  part.scales = reinterpret_cast<float*>(scratch);
  part.values = reinterpret_cast<int8_t*>(part.scales + Vec::kWidth * groups);
  std::memset(part.values + rows * x.k_padded, 0, size_t((Vec::kWidth - rows) * x.k_padded));
  std::memset(part.scales + rows * groups, 0, size_t((Vec::kWidth - rows) * groups) * sizeof(float));
  quantize_rows(part, 0, rows);

  float* scales = a.scales + panel * kPanelWidth * groups + lane;
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t row = 0; row < Vec::kWidth; ++row) scales[group * width + row] = part.scales[row * groups + group];
  float* out = reinterpret_cast<float*>(a.words) + panel * kPanelWidth * words + lane;
  alignas(64) float turned[Vec::kWidth * Vec::kWidth], rows_of_words[Vec::kWidth * Vec::kWidth];
  for (int64_t word = 0; word < words; word += Vec::kWidth) {
    for (int64_t row = 0; row < Vec::kWidth; ++row)
      GemmInts::load_values(part.values + row * x.k_padded + word * GemmInts::kPerWord)
          .store(rows_of_words + row * Vec::kWidth);
    Vec::transpose(rows_of_words, Vec::kWidth, turned, Vec::kWidth);
    for (int64_t i = 0; i < min_i(Vec::kWidth, words - word); ++i)
      Vec::load(turned + i * Vec::kWidth).store(out + (word + i) * width);
  }
}
