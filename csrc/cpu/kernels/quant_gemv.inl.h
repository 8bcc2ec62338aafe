// Matrix-vector products over int8 and int4 weights for up to 16 rows of activations rounded to int8. Bytes are
// multiplied and summed in int32 over chunks of 128 inputs (int4: over the group), and the chunks in fp32.
//
// Weights are read front to back, a few rows at a time, and prefetched in the order of their addresses while what comes
// before them is multiplied, a line beside each load: on Zen 4 31 GB/s a core, against 12 where each row prefetches its
// own place, or where the lines come in bursts of eight. For one activation row that is the next four weight rows, in
// L1; for more, whose passes and parts of k find weights in L2, the next 32. The scales of int4 are fetched four rows
// ahead.

constexpr int kQuantTileRows = 4;                             // weight rows and activation rows held in registers:
constexpr int kQuantTileM = Vec::kPanelVectors == 4 ? 4 : 2;  // 32 or 16 vector registers
constexpr int64_t kQuantSums =
    512;  // kept until bias, activation and residual follow in vectors: of a span of weight rows, all activation rows
constexpr int64_t kQuantDepthChunks = 16;  // chunks of an activation row in use at a time: 4 rows of them take 12 KB
constexpr int64_t kInt4Steps = kQuantChunk / Bytes::kInt4Step;

// Where an activation row's prepared numbers lie: see QuantPrepareArgs.
template <class Value>
inline Value* quant_values(char* record) {
  return reinterpret_cast<Value*>(record);
}
inline float* quant_scales(char* record, int64_t k_padded) { return reinterpret_cast<float*>(record + 2 * k_padded); }
inline int32_t* quant_starts(char* record, int64_t k_padded) {
  return reinterpret_cast<int32_t*>(record + 5 * k_padded / 2);
}

// values [128] of one chunk, in the order in which the format's dot products read them.
inline void arrange_int8(const int8_t* values, float scale, char* record, int64_t k_padded, int64_t chunk) {
  auto* out = quant_values<Bytes::Int8Value>(record) + chunk * kQuantChunk;
  for (int64_t i = 0; i < kQuantChunk; ++i) out[i] = values[i];
  quant_scales(record, k_padded)[chunk] = scale;
  alignas(64) const int8_t zeros[Bytes::kInt8Step] = {};
  Bytes sum = Bytes::zero();
  for (int64_t i = 0; i < kQuantChunk; i += Bytes::kInt8Step) sum = Bytes::dot(sum, Bytes::load_int8(zeros), out + i);
  (Bytes::zero() - sum).store(quant_starts(record, k_padded) + chunk * Vec::kWidth);
}

inline void arrange_int4(const int8_t* values, const float* scales, int64_t group, char* record, int64_t k_padded,
                         int64_t chunk) {
  alignas(64) uint8_t eights[Bytes::kInt4Step / 2];
  std::memset(eights, 0x88, sizeof(eights));
  for (int64_t step = 0; step < kInt4Steps; ++step, values += Bytes::kInt4Step) {
    const int64_t at = chunk * kInt4Steps + step;
    auto* out = quant_values<Bytes::Int4Value>(record) + at * Bytes::kInt4Step;
    float* lanes = quant_scales(record, k_padded) + at * Vec::kWidth;
    for (int64_t block = 0; block < Bytes::kInt4Step / 32; ++block) {
      for (int64_t i = 0; i < 16; ++i) out[block * 16 + i] = values[block * 32 + i];
      for (int64_t i = 0; i < 16; ++i) out[Bytes::kInt4Step / 2 + block * 16 + i] = values[block * 32 + 16 + i];
      const float scale = scales[(step * Bytes::kInt4Step + block * 32) / group];
      for (int64_t lane = 0; lane < 4; ++lane) lanes[block * 4 + lane] = scale;
    }
    const Bytes sum = Bytes::dot(Bytes::zero(), Bytes::load_int4(eights), out);
    (Bytes::zero() - sum).store(quant_starts(record, k_padded) + at * Vec::kWidth);
  }
}

template <class T>
void quant_prepare_typed(const QuantPrepareArgs& a, int64_t begin, int64_t end) {
  const int64_t chunks = a.k_padded / kQuantChunk;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t row = index / chunks, chunk = index % chunks, first = chunk * kQuantChunk;
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride + first;
    alignas(64) int8_t values[kQuantChunk] = {};
    float scales[kQuantChunk / 32] = {};
    const int64_t count = min_i(kQuantChunk, a.k - first);
    for (int64_t i = 0; i < count; i += a.group)
      quantize_group(x + i, min_i(a.group, count - i), values + i, scales + i / a.group);
    char* record = a.records + row * quant_record_bytes(a.k_padded);
    if (a.format == WeightFormat::int8) {
      arrange_int8(values, *scales, record, a.k_padded, chunk);
    } else {
      arrange_int4(values, scales, a.group, record, a.k_padded, chunk);
    }
  }
}

void quant_prepare(const QuantPrepareArgs& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::f32:
      return quant_prepare_typed<float>(a, begin, end);
    case DType::bf16:
      return quant_prepare_typed<bf16>(a, begin, end);
    case DType::f16:
      return quant_prepare_typed<f16>(a, begin, end);
  }
}

// A matrix of weights from its row n on.
struct QuantMatrix {
  const char* w;
  int64_t stride_bytes;
  const char* scales;
  int64_t scale_stride_bytes;
};

// Prefetches run through memory once: `lines` for each 64 bytes of ROWS rows.
struct QuantFetch {
  const char* next;
  int64_t lines;

  void at_row(int64_t row) {
    if (row >= lines) return;
    __builtin_prefetch(next, 0, 3);
    next += 64;
  }
};

// sums[i] += lanes i, i + 4, i + 8, ... of x: rows that Bytes::join laid side by side.
inline void add_blocks(Vec x, float* sums) {
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

// The sums of a chunk's rows side by side. One row alone is added up in the same order, so that it does not depend on
// who its neighbours are.
template <int ROWS, int M>
inline Vec join_rows(const Bytes (&acc)[ROWS][M], int m) {
  if constexpr (ROWS == 4) return Bytes::join(acc[0][m], acc[1][m], acc[2][m], acc[3][m]).to_float();
  return Bytes::join(acc[0][m], Bytes::zero(), Bytes::zero(), Bytes::zero()).to_float();
}

// Sums of one matrix, [m][span].
struct QuantSums {
  float* sums;
  int64_t span;

  float* row(int64_t m) const { return sums + m * span; }
  QuantSums from(int64_t m, int64_t r) const { return {row(m) + r, span}; }

  // [m][r] += the joined rows of total[m].
  template <int ROWS, int M>
  void add(const Vec (&total)[M]) const {
    for (int m = 0; m < M; ++m) {
      if constexpr (ROWS == 4) {
        add_blocks(total[m], row(m));
      } else {
        float alone[4] = {*row(m)};
        add_blocks(total[m], alone);
        *row(m) = alone[0];
      }
    }
  }
};

struct Int8Format {
  static constexpr int64_t kChunkBytes = kQuantChunk, kChunkScaleBytes = 0;
  static constexpr bool kRowScale = true;

  static int64_t row_bytes(const QuantGemvArgs& a) { return a.k; }
  static void fetch_scales(const QuantMatrix&, int64_t, int64_t) {}
  static float row_scale(const QuantMatrix& matrix, int64_t row) {
    float scale;
    std::memcpy(&scale, matrix.scales + row * matrix.scale_stride_bytes, sizeof(scale));
    return scale;
  }

  // sums[m][r] += w[r, chunks] . x[m, chunks]; w begins with the first chunk.
  template <int ROWS, int M>
  static void add(const QuantMatrix& matrix, char* records, int64_t k_padded, int64_t begin, int64_t end,
                  QuantFetch& fetch, const QuantSums& sums) {
    const auto* w = reinterpret_cast<const int8_t*>(matrix.w);
    const int64_t stride = matrix.stride_bytes, record_bytes = quant_record_bytes(k_padded);
    Vec total[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) total[m] = Vec::zero();
    for (int64_t chunk = begin; chunk < end; ++chunk, w += kQuantChunk) {
      Bytes acc[ROWS][M];
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const Bytes start = Bytes::load(quant_starts(records + m * record_bytes, k_padded) + chunk * Vec::kWidth);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) acc[r][m] = start;
      }
#pragma GCC unroll 8
      for (int64_t i = 0; i < kQuantChunk; i += Bytes::kInt8Step)
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
          if (i % 64 == 0) fetch.at_row(r);
          const auto weights = Bytes::load_int8(w + r * stride + i);
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m)
            acc[r][m] =
                Bytes::dot(acc[r][m], weights,
                           quant_values<Bytes::Int8Value>(records + m * record_bytes) + chunk * kQuantChunk + i);
        }
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const Vec scale = Vec::set1(quant_scales(records + m * record_bytes, k_padded)[chunk]);
        total[m] = Vec::fma(join_rows(acc, m), scale, total[m]);
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
      return {reinterpret_cast<const char*>(values), kQuantChunk, nullptr, 0};
    }
  };
};

template <int GROUP>
struct Int4Format {
  static constexpr int64_t kChunkBytes = kQuantChunk / 2, kChunkScaleBytes = kQuantChunk / GROUP * 2;
  static constexpr bool kRowScale = false;

  static int64_t row_bytes(const QuantGemvArgs& a) { return (a.k + GROUP - 1) / GROUP * (GROUP / 2); }
  static float row_scale(const QuantMatrix&, int64_t) { return 1.0f; }  // scales are those of groups
  static void fetch_scales(const QuantMatrix& matrix, int64_t begin, int64_t end) {
    for (int r = 0; r < kQuantTileRows; ++r)
      for (int64_t at = begin * kChunkScaleBytes; at < end * kChunkScaleBytes; at += 64)
        __builtin_prefetch(matrix.scales + r * matrix.scale_stride_bytes + at, 0, 3);
  }

  template <int ROWS, int M>
  static void add(const QuantMatrix& matrix, char* records, int64_t k_padded, int64_t begin, int64_t end,
                  QuantFetch& fetch, const QuantSums& sums) {
    const auto* w = reinterpret_cast<const uint8_t*>(matrix.w);
    const char* scales = matrix.scales;
    const int64_t stride = matrix.stride_bytes, record_bytes = quant_record_bytes(k_padded);
    Vec total[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) total[m] = Vec::zero();
    for (int64_t chunk = begin; chunk < end; ++chunk, w += kQuantChunk / 2, scales += kQuantChunk / GROUP * 2) {
#pragma GCC unroll 4
      for (int64_t step = 0; step < kInt4Steps; ++step) {
        const int64_t at = chunk * kInt4Steps + step;
        Bytes acc[ROWS][M];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
          if (step * (Bytes::kInt4Step / 2) % 64 == 0) fetch.at_row(r);
          const auto weights = Bytes::load_int4(w + r * stride + step * (Bytes::kInt4Step / 2));
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) {
            char* record = records + m * record_bytes;
            const Bytes start = Bytes::load(quant_starts(record, k_padded) + at * Vec::kWidth);
            acc[r][m] = Bytes::dot(start, weights, quant_values<Bytes::Int4Value>(record) + at * Bytes::kInt4Step);
          }
        }
        const Vec w_scale = Bytes::load_scales<GROUP>(scales + step * Bytes::kInt4Step / GROUP * 2,
                                                      ROWS == 4 ? matrix.scale_stride_bytes : 0);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          const Vec scale = w_scale * Vec::load(quant_scales(records + m * record_bytes, k_padded) + at * Vec::kWidth);
          total[m] = Vec::fma(join_rows(acc, m), scale, total[m]);
        }
      }
    }
    sums.add<ROWS>(total);
  }

  template <int ROWS>
  struct Tail {
    alignas(64) uint8_t values[ROWS][kQuantChunk / 2];
    bf16 scales[ROWS][kQuantChunk / GROUP];

    QuantMatrix copy(const QuantMatrix& matrix, int64_t chunk, int64_t bytes) {
      std::memset(values, 0, sizeof(values));
      std::memset(scales, 0, sizeof(scales));
      for (int r = 0; r < ROWS; ++r) {
        std::memcpy(values[r], matrix.w + r * matrix.stride_bytes + chunk * (kQuantChunk / 2), size_t(bytes));
        std::memcpy(scales[r], matrix.scales + r * matrix.scale_stride_bytes + chunk * (kQuantChunk / GROUP * 2),
                    size_t(bytes * 2 / GROUP * 2));
      }
      return {reinterpret_cast<const char*>(values), kQuantChunk / 2, reinterpret_cast<const char*>(scales),
              kQuantChunk / GROUP * 2};
    }
  };
};

inline QuantMatrix quant_matrix(const QuantGemvArgs& a, int64_t n, bool second) {
  const int64_t scale_bytes = a.format == WeightFormat::int8 ? 4 : 2;
  const int64_t stride = second ? a.w2_stride : a.w_stride,
                scale_stride = (second ? a.scale2_stride : a.scale_stride) * scale_bytes;
  return {static_cast<const char*>(second ? a.w2 : a.w) + n * stride, stride,
          static_cast<const char*>(second ? a.scales2 : a.scales) + n * scale_stride, scale_stride};
}

// sums[m][r] += chunks [begin, end) of ROWS weight rows times M activation rows; the last chunk may be a part of one.
template <class Format, int ROWS, int M>
void quant_sums(const QuantGemvArgs& a, QuantMatrix matrix, char* records, int64_t begin, int64_t end,
                QuantFetch& fetch, const QuantSums& sums) {
  const int64_t bytes = Format::row_bytes(a), whole = bytes / Format::kChunkBytes;
  if (end > whole) {
    typename Format::template Tail<ROWS> tail;
    const QuantMatrix copied = tail.copy(matrix, whole, bytes % Format::kChunkBytes);
    QuantFetch nothing{nullptr, 0};
    Format::template add<ROWS, M>(copied, records, a.k_padded, whole, end--, nothing, sums);
  }
  matrix.w += begin * Format::kChunkBytes, matrix.scales += begin * Format::kChunkScaleBytes;
  Format::template add<ROWS, M>(matrix, records, a.k_padded, begin, end, fetch, sums);
}

// sums[m][r] of `rows` weight rows and M activation rows, whose part of a few chunks stays in the L1 cache.
template <class Format, int M>
void quant_pass(const QuantGemvArgs& a, const QuantMatrix& matrix, int64_t rows, char* records, QuantFetch fetch,
                const QuantSums& sums) {
  const auto from = [&](int64_t r) {
    return QuantMatrix{matrix.w + r * matrix.stride_bytes, matrix.stride_bytes,
                       matrix.scales + r * matrix.scale_stride_bytes, matrix.scale_stride_bytes};
  };
  std::memset(sums.sums, 0, size_t(M * sums.span) * sizeof(float));
  const QuantFetch following = fetch;
  const int64_t chunks = a.k_padded / kQuantChunk, depth = a.m == 1 ? chunks : kQuantDepthChunks;
  for (int64_t begin = 0; begin < chunks; begin += depth) {
    const int64_t end = min_i(begin + depth, chunks);
    int64_t r = 0;
    for (; r + kQuantTileRows <= rows; r += kQuantTileRows) {
      if (a.m == 1)
        fetch = r + 2 * kQuantTileRows <= rows ? QuantFetch{from(r + kQuantTileRows).w, kQuantTileRows} : following;
      Format::fetch_scales(from(r + kQuantTileRows), begin, end);
      quant_sums<Format, kQuantTileRows, M>(a, from(r), records, begin, end, fetch, sums.from(0, r));
    }
    for (; r < rows; ++r) quant_sums<Format, 1, M>(a, from(r), records, begin, end, fetch, sums.from(0, r));
  }
}

// sums[m][r] of a span of weight rows: passes over them, which stay in the L2 cache, with at most kQuantTileM
// activation rows each. A pass fetches its share of the rows at `next`.
template <class Format>
inline void quant_span(const QuantGemvArgs& a, const QuantMatrix& matrix, int64_t rows, const char* next,
                       const QuantSums& sums) {
  const int64_t passes = (a.m + kQuantTileM - 1) / kQuantTileM, lines = (kQuantTileRows + passes - 1) / passes;
  const int64_t share =
      Format::row_bytes(a) / Format::kChunkBytes * Format::kChunkBytes * lines * (rows / kQuantTileRows);
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t m = a.m * pass / passes;
    char* records = a.records + m * quant_record_bytes(a.k_padded);
    const QuantSums out = sums.from(m, 0);
    const QuantFetch fetch{next + pass * share, next ? lines : 0};
    switch (a.m * (pass + 1) / passes - m) {
      case 1:
        quant_pass<Format, 1>(a, matrix, rows, records, fetch, out);
        break;
      case 2:
        quant_pass<Format, 2>(a, matrix, rows, records, fetch, out);
        break;
      case 3:
        quant_pass<Format, kQuantTileM == 4 ? 3 : 1>(a, matrix, rows, records, fetch, out);
        break;
      default:
        quant_pass<Format, kQuantTileM>(a, matrix, rows, records, fetch, out);
    }
  }
  if (!Format::kRowScale) return;
  alignas(64) float scales[kQuantSums];
  for (int64_t r = 0; r < sums.span; ++r) scales[r] = r < rows ? Format::row_scale(matrix, r) : 0.0f;
  for (int64_t m = 0; m < a.m; ++m)
    for (int64_t r = 0; r < rows; r += Vec::kWidth)
      (Vec::load(sums.row(m) + r) * Vec::load(scales + r)).store(sums.row(m) + r);
}

template <class T>
void quant_finish(const QuantGemvArgs& a, int64_t n, int64_t rows, const QuantSums& sums, const QuantSums& sums2) {
  for (int64_t m = 0; m < a.m; ++m) gemv_finish<T>(a, m, n, rows, sums.row(m), sums2.row(m));
}

template <class Format>
void quant_gemv_format(const QuantGemvArgs& a, int64_t n_begin, int64_t n_end) {
  alignas(64) float sums_memory[kQuantSums], sums2_memory[kQuantSums];
  // Several activation rows find weights in L2 that the span before has fetched: a short one. One row fetches what
  // comes next, and reads on the faster the more rarely SwiGLU changes matrices.
  const int64_t span = a.m == 1 ? kQuantSums : kQuantSums / kMaxQuantRows;
  const QuantSums sums{sums_memory, span}, sums2{sums2_memory, span};
  for (int64_t n = n_begin; n < n_end; n += span) {
    const int64_t rows = min_i(span, n_end - n);
    const char* next = n + span < n_end ? quant_matrix(a, n + span, false).w : nullptr;
    if (a.activation == Activation::swiglu) {
      const QuantMatrix up = quant_matrix(a, n, true);
      quant_span<Format>(a, quant_matrix(a, n, false), rows, up.w, sums);
      quant_span<Format>(a, up, rows, next, sums2);
    } else {
      quant_span<Format>(a, quant_matrix(a, n, false), rows, next, sums);
    }
    switch (a.dtype) {
      case DType::f32:
        quant_finish<float>(a, n, rows, sums, sums2);
        break;
      case DType::bf16:
        quant_finish<bf16>(a, n, rows, sums, sums2);
        break;
      case DType::f16:
        quant_finish<f16>(a, n, rows, sums, sums2);
        break;
    }
  }
}

void quant_gemv_rows(const QuantGemvArgs& a, int64_t n_begin, int64_t n_end) {
  if (a.format == WeightFormat::int8) return quant_gemv_format<Int8Format>(a, n_begin, n_end);
  switch (a.group) {
    case 32:
      return quant_gemv_format<Int4Format<32>>(a, n_begin, n_end);
    case 64:
      return quant_gemv_format<Int4Format<64>>(a, n_begin, n_end);
    default:
      return quant_gemv_format<Int4Format<128>>(a, n_begin, n_end);
  }
}
