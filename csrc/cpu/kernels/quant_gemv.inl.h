// Quantised GEMV and small-M GEMM: int8 and int4 weights times up to 16 rows of activations quantised to int8. Integer
// sums run in int32 over chunks of 128 inputs (int4: over the group), and the chunks are summed in fp32.
//
// Weights are read front to back, a few rows at a time. Software prefetch runs through memory in the order of
// addresses, one cache line beside each load: 31 GB/s a core on Zen 4, 1 row. It is 12 GB/s where each weight row
// prefetches within itself, or where lines come in bursts of eight. With one activation row the next four weight rows
// are prefetched into L1; with more, whose passes find weights in L2, the next 32. int4 scales and zero-points are
// prefetched four rows ahead.

constexpr int kQuantGemvTileN = 4;                                // weight rows and activation rows held in registers:
constexpr int kQuantGemvTileM = Vec::kPanelVectors == 4 ? 4 : 2;  // 32 or 16 vector registers
constexpr int64_t kQuantGemvSums = 512;         // fp32 sums of all activation rows between two vectorised epilogues
constexpr int64_t kQuantGemvKBlockChunks = 16;  // K-block of several activation rows: 4 of them take 12 KB of L1
static_assert(kQuantGemvKBlockChunks % 2 == 0, "the zero-points of a K-block begin with a whole byte");
constexpr int64_t kInt4Steps = kQuantChunk / GemvInts::kInt4Step;

// The parts of a packed quantised activation row: see packed_row_bytes.
template <class Value>
inline Value* packed_row_values(char* packed_row) {
  return reinterpret_cast<Value*>(packed_row);
}
inline float* packed_row_scales(char* packed_row, int64_t k_padded) {
  return reinterpret_cast<float*>(packed_row + 2 * k_padded);
}
inline int32_t* packed_row_compensation(char* packed_row, int64_t k_padded) {
  return reinterpret_cast<int32_t*>(packed_row + 5 * k_padded / 2);
}

// Packs the values [128] of one chunk in the order in which the format's dot products read them.
inline void pack_row_int8(const int8_t* values, float scale, char* packed_row, int64_t k_padded, int64_t chunk) {
  auto* out = packed_row_values<GemvInts::Int8Value>(packed_row) + chunk * kQuantChunk;
  for (int64_t i = 0; i < kQuantChunk; ++i) out[i] = values[i];
  packed_row_scales(packed_row, k_padded)[chunk] = scale;
  alignas(64) const int8_t zeros[GemvInts::kInt8Step] = {};
  GemvInts sum = GemvInts::zero();
  for (int64_t i = 0; i < kQuantChunk; i += GemvInts::kInt8Step)
    sum = GemvInts::dot(sum, GemvInts::load_int8(zeros), out + i);
  (GemvInts::zero() - sum).store(packed_row_compensation(packed_row, k_padded) + chunk * Vec::kWidth);
}

inline void pack_row_int4(const int8_t* values, const float* scales, int64_t group, char* packed_row, int64_t k_padded,
                          int64_t chunk) {
  for (int64_t step = 0; step < kInt4Steps; ++step, values += GemvInts::kInt4Step) {
    const int64_t at = chunk * kInt4Steps + step;
    auto* out = packed_row_values<GemvInts::Int4Value>(packed_row) + at * GemvInts::kInt4Step;
    float* lanes = packed_row_scales(packed_row, k_padded) + at * Vec::kWidth;
    int32_t* compensation = packed_row_compensation(packed_row, k_padded) + at * Vec::kWidth;
    for (int64_t block = 0; block < GemvInts::kInt4Step / 32; ++block) {
      for (int64_t i = 0; i < 16; ++i) out[block * 16 + i] = values[block * 32 + i];
      for (int64_t i = 0; i < 16; ++i) out[GemvInts::kInt4Step / 2 + block * 16 + i] = values[block * 32 + 16 + i];
      const float scale = scales[(step * GemvInts::kInt4Step + block * 32) / group];
      int32_t sum = 0;
      for (int64_t i = 0; i < 32; ++i) sum += values[block * 32 + i];
      for (int64_t lane = 0; lane < 4; ++lane) {
        lanes[block * 4 + lane] = scale;
        compensation[block * 4 + lane] = -kInt4Zero / 4 * sum;
      }
    }
  }
}

template <class T>
void quant_gemv_prepare_typed(const QuantGemvPrepareArgs& a, int64_t begin, int64_t end) {
  const int64_t chunks = a.k_padded / kQuantChunk;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t row = index / chunks, chunk = index % chunks, first = chunk * kQuantChunk;
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride + first;
    alignas(64) int8_t values[kQuantChunk] = {};
    float scales[kQuantChunk / 32] = {};
    const int64_t count = min_i(kQuantChunk, a.k - first);
    for (int64_t i = 0; i < count; i += a.group)
      quantize_group(x + i, min_i(a.group, count - i), values + i, scales + i / a.group);
    char* packed_row = a.packed_rows + row * packed_row_bytes(a.k_padded);
    if (a.format == WeightFormat::int8) {
      pack_row_int8(values, *scales, packed_row, a.k_padded, chunk);
    } else {
      pack_row_int4(values, scales, a.group, packed_row, a.k_padded, chunk);
    }
  }
}

void quant_gemv_prepare(const QuantGemvPrepareArgs& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto element) { quant_gemv_prepare_typed<decltype(element)>(a, begin, end); });
}

// Quantised weights from row n on.
struct QuantMatrix {
  const char* w;
  int64_t stride_bytes;
  const char* scales;
  int64_t scale_stride_bytes;
  DType scale_dtype;     // int4
  const uint8_t* zeros;  // int4, or nullptr
  int64_t zero_stride;

  QuantMatrix from_row(int64_t n) const {
    QuantMatrix rows = *this;
    rows.w += n * stride_bytes, rows.scales += n * scale_stride_bytes;
    if (zeros) rows.zeros += n * zero_stride;
    return rows;
  }
};

// Software prefetch that runs through memory once: of every 64 bytes of the tile's rows, the first `lines` rows bring
// one line each.
struct SoftwarePrefetch {
  const char* next;
  int64_t lines;

  void at_row(int64_t row) {
    if (row >= lines) return;
    __builtin_prefetch(next, 0, 3);
    next += 64;
  }
};

// sums[i] += lanes i, i + 4, i + 8, ... of x: the last step of the transposed horizontal reduction.
inline void add_reduced_blocks(Vec x, float* sums) {
  typedef float Float4 __attribute__((vector_size(16)));
  alignas(64) float lanes[Vec::kWidth];
  x.store(lanes);
  Float4 sum, block;
  std::memcpy(&sum, sums, sizeof(sum));
  for (int i = 0; i < Vec::kWidth; i += 4) {
    std::memcpy(&block, lanes + i, sizeof(block));
    sum += block;
  }
  std::memcpy(sums, &sum, sizeof(sum));
}

// Transposed horizontal reduction (4x4): the sums of four weight rows side by side. One row alone is added up in the
// same order, so that its result does not depend on its neighbours.
template <int ROWS, int M>
inline Vec reduce_rows(const GemvInts (&acc)[ROWS][M], int m) {
  if constexpr (ROWS == 4) return GemvInts::transpose_reduce(acc[0][m], acc[1][m], acc[2][m], acc[3][m]).to_float();
  return GemvInts::transpose_reduce(acc[0][m], GemvInts::zero(), GemvInts::zero(), GemvInts::zero()).to_float();
}

// fp32 sums of one weight, [m][n_block].
struct QuantSums {
  float* sums;
  int64_t n_block;

  float* row(int64_t m) const { return sums + m * n_block; }
  QuantSums from(int64_t m, int64_t r) const { return {row(m) + r, n_block}; }

  // [m][r] += the reduced rows of total[m].
  template <int ROWS, int M>
  void add(const Vec (&total)[M]) const {
    for (int m = 0; m < M; ++m) {
      if constexpr (ROWS == 4) {
        add_reduced_blocks(total[m], row(m));
      } else {
        float alone[4] = {*row(m)};
        add_reduced_blocks(total[m], alone);
        *row(m) = alone[0];
      }
    }
  }
};

struct Int8Format {
  static constexpr int64_t kChunkBytes = kQuantChunk, kChunkScaleBytes = 0, kChunkGroups = 0;
  static constexpr bool kRowScale = true;

  static int64_t row_bytes(const QuantGemvArgs& a) { return a.k; }
  static void prefetch_scales(const QuantMatrix&, int64_t, int64_t) {}
  static float row_scale(const QuantMatrix& matrix, int64_t row) {
    float scale;
    std::memcpy(&scale, matrix.scales + row * matrix.scale_stride_bytes, sizeof(scale));
    return scale;
  }

  // sums[m][r] += w[r, chunks] . x[m, chunks]; w begins with the first chunk.
  template <int ROWS, int M>
  static void add(const QuantMatrix& matrix, char* packed_rows, int64_t k_padded, int64_t begin, int64_t end,
                  SoftwarePrefetch& prefetch, const QuantSums& sums) {
    const auto* w = reinterpret_cast<const int8_t*>(matrix.w);
    const int64_t stride = matrix.stride_bytes, row_bytes = packed_row_bytes(k_padded);
    Vec total[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) total[m] = Vec::zero();
    for (int64_t chunk = begin; chunk < end; ++chunk, w += kQuantChunk) {
      GemvInts acc[ROWS][M];
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const GemvInts start =
            GemvInts::load(packed_row_compensation(packed_rows + m * row_bytes, k_padded) + chunk * Vec::kWidth);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) acc[r][m] = start;
      }
#pragma GCC unroll 8
      for (int64_t i = 0; i < kQuantChunk; i += GemvInts::kInt8Step)
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
          if (i % 64 == 0) prefetch.at_row(r);
          const auto weights = GemvInts::load_int8(w + r * stride + i);
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m)
            acc[r][m] = GemvInts::dot(
                acc[r][m], weights,
                packed_row_values<GemvInts::Int8Value>(packed_rows + m * row_bytes) + chunk * kQuantChunk + i);
        }
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const Vec scale = Vec::set1(packed_row_scales(packed_rows + m * row_bytes, k_padded)[chunk]);
        total[m] = Vec::fma(reduce_rows(acc, m), scale, total[m]);
      }
    }
    sums.add<ROWS>(total);
  }

  template <int ROWS>
  struct Tail {
    alignas(64) int8_t values[ROWS][kQuantChunk];

    QuantMatrix copy(const QuantMatrix& matrix, int64_t chunk, int64_t bytes) {
      std::memset(values, 0, sizeof(values));
      for (int r = 0; r < ROWS; ++r)
        std::memcpy(values[r], matrix.w + r * matrix.stride_bytes + chunk * kQuantChunk, size_t(bytes));
      return {reinterpret_cast<const char*>(values), kQuantChunk, nullptr, 0, DType::f32, nullptr, 0};
    }
  };
};

// int4 in groups of GROUP inputs, with scales of type Scale, and with zero-points if ZEROS.
template <int GROUP, class Scale, bool ZEROS>
struct Int4Format {
  static constexpr int64_t kChunkBytes = kQuantChunk / 2, kChunkGroups = kQuantChunk / GROUP,
                           kChunkScaleBytes = kChunkGroups * 2;
  static constexpr bool kRowScale = false;

  static int64_t row_bytes(const QuantGemvArgs& a) { return (a.k + GROUP - 1) / GROUP * (GROUP / 2); }
  static float row_scale(const QuantMatrix&, int64_t) { return 1.0f; }  // scales are those of groups
  // Scales and zero-points of a K-block's next four rows. One activation row reads whole rows, which lie one behind the
  // other: `add` prefetches them as it goes, since lines in a burst hold up the weights.
  static void prefetch_scales(const QuantMatrix& matrix, int64_t begin, int64_t end) {
    for (int r = 0; r < kQuantGemvTileN; ++r)
      for (int64_t at = begin * kChunkScaleBytes; at < end * kChunkScaleBytes; at += 64)
        __builtin_prefetch(matrix.scales + r * matrix.scale_stride_bytes + at, 0, 3);
    if (!ZEROS) return;
    for (int r = 0; r < kQuantGemvTileN; ++r)
      for (int64_t at = begin * kChunkGroups / 2; at < end * kChunkGroups / 2; at += 64)
        __builtin_prefetch(matrix.zeros + r * matrix.zero_stride + at, 0, 3);
  }

  template <int ROWS, int M>
  static void add(const QuantMatrix& matrix, char* packed_rows, int64_t k_padded, int64_t begin, int64_t end,
                  SoftwarePrefetch& prefetch, const QuantSums& sums) {
    const auto* w = reinterpret_cast<const uint8_t*>(matrix.w);
    const char* scales = matrix.scales;
    const int64_t stride = matrix.stride_bytes, row_bytes = packed_row_bytes(k_padded);
    const int64_t scale_stride = ROWS == 4 ? matrix.scale_stride_bytes : 0;
    const int64_t zero_stride = ROWS == 4 ? matrix.zero_stride : 0;
    Vec total[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) total[m] = Vec::zero();
    for (int64_t chunk = begin; chunk < end; ++chunk, w += kQuantChunk / 2, scales += kChunkScaleBytes) {
      if (ROWS == 4 && M == 1) {
        __builtin_prefetch(scales + 4 * scale_stride + 3 * (chunk - begin) * kChunkScaleBytes, 0, 3);
        if (ZEROS) __builtin_prefetch(matrix.zeros + 4 * zero_stride + 2 * (chunk - begin) * kChunkGroups, 0, 3);
      }
#pragma GCC unroll 4
      for (int64_t step = 0; step < kInt4Steps; ++step) {
        const int64_t at = chunk * kInt4Steps + step;
        GemvInts acc[ROWS][M];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
          if (step * (GemvInts::kInt4Step / 2) % 64 == 0) prefetch.at_row(r);
          const auto weights = GemvInts::load_int4(w + r * stride + step * (GemvInts::kInt4Step / 2));
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) {
            char* packed_row = packed_rows + m * row_bytes;
            const GemvInts start =
                ZEROS ? GemvInts::zero()
                      : GemvInts::load(packed_row_compensation(packed_row, k_padded) + at * Vec::kWidth);
            acc[r][m] = GemvInts::dot(start, weights,
                                      packed_row_values<GemvInts::Int4Value>(packed_row) + at * GemvInts::kInt4Step);
          }
        }
        const Vec w_scale =
            GemvInts::load_scales<GROUP, Scale>(scales + step * GemvInts::kInt4Step / GROUP * 2, scale_stride);
        Vec zero;  // in units of the compensation
        if constexpr (ZEROS) {
          const int64_t group = (chunk - begin) * kChunkGroups + step * GemvInts::kInt4Step / GROUP;
          zero = GemvInts::load_zeros<GROUP>(matrix.zeros + group / 2, zero_stride, group % 2) *
                 Vec::set1(4.0f / kInt4Zero);
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          char* packed_row = packed_rows + m * row_bytes;
          const Vec scale = w_scale * Vec::load(packed_row_scales(packed_row, k_padded) + at * Vec::kWidth);
          Vec sum = reduce_rows(acc, m);
          if constexpr (ZEROS)
            sum = Vec::fma(
                zero, GemvInts::load(packed_row_compensation(packed_row, k_padded) + at * Vec::kWidth).to_float(), sum);
          total[m] = Vec::fma(sum, scale, total[m]);
        }
      }
    }
    sums.add<ROWS>(total);
  }

  template <int ROWS>
  struct Tail {
    alignas(64) uint8_t values[ROWS][kQuantChunk / 2];
    uint16_t scales[ROWS][kChunkGroups];
    uint8_t zeros[ROWS][(kChunkGroups + 1) / 2];

    QuantMatrix copy(const QuantMatrix& matrix, int64_t chunk, int64_t bytes) {
      std::memset(values, 0, sizeof(values));
      std::memset(scales, 0, sizeof(scales));
      std::memset(zeros, 0, sizeof(zeros));
      for (int r = 0; r < ROWS; ++r) {
        std::memcpy(values[r], matrix.w + r * matrix.stride_bytes + chunk * (kQuantChunk / 2), size_t(bytes));
        std::memcpy(scales[r], matrix.scales + r * matrix.scale_stride_bytes + chunk * kChunkScaleBytes,
                    size_t(bytes * 2 / GROUP * 2));
        if (ZEROS)
          std::memcpy(zeros[r], matrix.zeros + r * matrix.zero_stride + chunk * kChunkGroups / 2,
                      size_t((bytes * 2 / GROUP + 1) / 2));
      }
      return {reinterpret_cast<const char*>(values),
              kQuantChunk / 2,
              reinterpret_cast<const char*>(scales),
              kChunkScaleBytes,
              matrix.scale_dtype,
              ZEROS ? zeros[0] : nullptr,
              int64_t(sizeof(zeros[0]))};
    }
  };
};

inline QuantMatrix quant_matrix(const Weight& weight, int64_t n) {
  const QuantMatrix matrix{static_cast<const char*>(weight.w),
                           weight.stride,
                           static_cast<const char*>(weight.scales),
                           weight.scale_stride * (weight.format == WeightFormat::int8 ? 4 : 2),
                           weight.scale_dtype,
                           weight.zeros,
                           weight.zero_stride};
  return matrix.from_row(n);
}

// sums[m][r] += chunks [begin, end) of ROWS weight rows times M activation rows; the last chunk may be a part of one.
template <class Format, int ROWS, int M>
void quant_gemv_k_block(const QuantGemvArgs& a, QuantMatrix matrix, char* packed_rows, int64_t begin, int64_t end,
                        SoftwarePrefetch& prefetch, const QuantSums& sums) {
  const int64_t bytes = Format::row_bytes(a), whole = bytes / Format::kChunkBytes;
  if (end > whole) {
    typename Format::template Tail<ROWS> tail;
    const QuantMatrix copied = tail.copy(matrix, whole, bytes % Format::kChunkBytes);
    SoftwarePrefetch nothing{nullptr, 0};
    Format::template add<ROWS, M>(copied, packed_rows, a.k_padded, whole, end--, nothing, sums);
  }
  matrix.w += begin * Format::kChunkBytes, matrix.scales += begin * Format::kChunkScaleBytes;
  if (matrix.zeros) matrix.zeros += begin * Format::kChunkGroups / 2;
  Format::template add<ROWS, M>(matrix, packed_rows, a.k_padded, begin, end, prefetch, sums);
}

// sums[m][r] of `rows` weight rows and M activation rows, whose current K-block stays in the L1 cache.
template <class Format, int M>
void quant_gemv_m_tile(const QuantGemvArgs& a, const QuantMatrix& matrix, int64_t rows, char* packed_rows,
                       SoftwarePrefetch prefetch, const QuantSums& sums) {
  std::memset(sums.sums, 0, size_t(M * sums.n_block) * sizeof(float));
  const SoftwarePrefetch next_n_block = prefetch;
  const int64_t chunks = a.k_padded / kQuantChunk, depth = a.m == 1 ? chunks : kQuantGemvKBlockChunks;
  for (int64_t begin = 0; begin < chunks; begin += depth) {
    const int64_t end = min_i(begin + depth, chunks);
    int64_t r = 0;
    for (; r + kQuantGemvTileN <= rows; r += kQuantGemvTileN) {
      if (a.m == 1)
        prefetch = r + 2 * kQuantGemvTileN <= rows
                       ? SoftwarePrefetch{matrix.from_row(r + kQuantGemvTileN).w, kQuantGemvTileN}
                       : next_n_block;
      if (M > 1) Format::prefetch_scales(matrix.from_row(r + kQuantGemvTileN), begin, end);
      quant_gemv_k_block<Format, kQuantGemvTileN, M>(a, matrix.from_row(r), packed_rows, begin, end, prefetch,
                                                     sums.from(0, r));
    }
    for (; r < rows; ++r)
      quant_gemv_k_block<Format, 1, M>(a, matrix.from_row(r), packed_rows, begin, end, prefetch, sums.from(0, r));
  }
}

// sums[m][r] of an N-block of weight rows: passes of at most kQuantGemvTileM activation rows, in which the weights stay
// in the L2 cache. A pass prefetches its share of the rows at `next`.
template <class Format>
inline void quant_gemv_n_block(const QuantGemvArgs& a, const QuantMatrix& matrix, int64_t rows, const char* next,
                               const QuantSums& sums) {
  const int64_t passes = (a.m + kQuantGemvTileM - 1) / kQuantGemvTileM, lines = (kQuantGemvTileN + passes - 1) / passes;
  const int64_t share =
      Format::row_bytes(a) / Format::kChunkBytes * Format::kChunkBytes * lines * (rows / kQuantGemvTileN);
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t m = a.m * pass / passes;
    char* packed_rows = a.packed_rows + m * packed_row_bytes(a.k_padded);
    const QuantSums out = sums.from(m, 0);
    const SoftwarePrefetch prefetch{next + pass * share, next ? lines : 0};
    switch (a.m * (pass + 1) / passes - m) {
      case 1:
        quant_gemv_m_tile<Format, 1>(a, matrix, rows, packed_rows, prefetch, out);
        break;
      case 2:
        quant_gemv_m_tile<Format, 2>(a, matrix, rows, packed_rows, prefetch, out);
        break;
      case 3:
        quant_gemv_m_tile<Format, kQuantGemvTileM == 4 ? 3 : 1>(a, matrix, rows, packed_rows, prefetch, out);
        break;
      default:
        quant_gemv_m_tile<Format, kQuantGemvTileM>(a, matrix, rows, packed_rows, prefetch, out);
    }
  }
  if (!Format::kRowScale) return;
  alignas(64) float scales[kQuantGemvSums];
  for (int64_t r = 0; r < sums.n_block; ++r) scales[r] = r < rows ? Format::row_scale(matrix, r) : 0.0f;
  for (int64_t m = 0; m < a.m; ++m)
    for (int64_t r = 0; r < rows; r += Vec::kWidth)
      (Vec::load(sums.row(m) + r) * Vec::load(scales + r)).store(sums.row(m) + r);
}

struct Int8Weights {
  static void n_block(const QuantGemvArgs& a, const QuantMatrix& matrix, int64_t rows, const char* next,
                      const QuantSums& sums) {
    quant_gemv_n_block<Int8Format>(a, matrix, rows, next, sums);
  }
};

template <int GROUP>
struct Int4Weights {
  static void n_block(const QuantGemvArgs& a, const QuantMatrix& matrix, int64_t rows, const char* next,
                      const QuantSums& sums) {
    const auto run = [&](auto scale) {
      using Scale = decltype(scale);
      if (matrix.zeros)
        quant_gemv_n_block<Int4Format<GROUP, Scale, true>>(a, matrix, rows, next, sums);
      else
        quant_gemv_n_block<Int4Format<GROUP, Scale, false>>(a, matrix, rows, next, sums);
    };
    if (matrix.scale_dtype == DType::bf16)
      run(bf16{});
    else
      run(f16{});
  }
};

template <class Weights>
void quant_gemv_weights(const QuantGemvArgs& a, int64_t n_begin, int64_t n_end) {
  alignas(64) float sums_memory[kQuantGemvSums], sums2_memory[kQuantGemvSums];
  // With several activation rows the N-block is short, so that it stays in L2, where the block before has prefetched
  // it. One row prefetches on its own, and reads faster the less often SwiGLU changes between its two weights.
  const int64_t n_block = a.m == 1 ? kQuantGemvSums : kQuantGemvSums / kQuantGemvMaxM;
  const QuantSums sums{sums_memory, n_block}, sums2{sums2_memory, n_block};
  for (int64_t n = n_begin; n < n_end; n += n_block) {
    const int64_t rows = min_i(n_block, n_end - n);
    const char* next = n + n_block < n_end ? quant_matrix(a.weight, n + n_block).w : nullptr;
    if (a.activation == Activation::swiglu) {
      const QuantMatrix up = quant_matrix(a.up, n);
      Weights::n_block(a, quant_matrix(a.weight, n), rows, up.w, sums);
      Weights::n_block(a, up, rows, next, sums2);
    } else {
      Weights::n_block(a, quant_matrix(a.weight, n), rows, next, sums);
    }
    for_dtype(a.dtype, [&](auto element) {
      for (int64_t m = 0; m < a.m; ++m) gemv_epilogue<decltype(element)>(a, m, n, rows, sums.row(m), sums2.row(m));
    });
  }
}

void quant_gemv_rows(const QuantGemvArgs& a, int64_t n_begin, int64_t n_end) {
  if (a.weight.format == WeightFormat::int8) return quant_gemv_weights<Int8Weights>(a, n_begin, n_end);
  switch (a.group) {
    case 32:
      return quant_gemv_weights<Int4Weights<32>>(a, n_begin, n_end);
    case 64:
      return quant_gemv_weights<Int4Weights<64>>(a, n_begin, n_end);
    default:
      return quant_gemv_weights<Int4Weights<128>>(a, n_begin, n_end);
  }
}
