// Matrix-vector products over int8 and int4 weights for up to 16 rows of activations rounded to int8. Bytes are multiplied
// and summed in int32 over chunks of 128 inputs (int4: over the group), and the chunks in fp32.
//
// Weights are read front to back, a few rows at a time, each block prefetched in the order of its addresses while the one
// before it is multiplied: on Zen 4 31 GB/s a core, against 12 where each row prefetches its own place of the next block.

constexpr int kQuantTileRows = Vec::kPanelVectors == 4 ? 4 : 2;  // weight rows and activation rows held in registers:
constexpr int kQuantTileM = Vec::kPanelVectors == 4 ? 4 : 2;     // 32 or 16 vector registers
constexpr int64_t kInt4Steps = kQuantChunk / Bytes::kInt4Step;

// Where an activation row's prepared numbers lie: see QuantPrepareArgs.
template <class Value>
inline Value* quant_values(char* record) { return reinterpret_cast<Value*>(record); }
inline float* quant_scales(char* record, int64_t k_padded) { return reinterpret_cast<float*>(record + 2 * k_padded); }
inline int32_t* quant_starts(char* record, int64_t k_padded) { return reinterpret_cast<int32_t*>(record + 5 * k_padded / 2); }

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

inline void arrange_int4(const int8_t* values, const float* scales, int64_t group, char* record, int64_t k_padded, int64_t chunk) {
  alignas(64) uint8_t eights[Bytes::kInt4Step / 2];
  std::memset(eights, 0x88, sizeof(eights));
  for (int64_t step = 0; step < kInt4Steps; ++step, values += Bytes::kInt4Step) {
    const int64_t at = chunk * kInt4Steps + step;
    auto* out = quant_values<Bytes::Int4Value>(record) + at * Bytes::kInt4Step;
    for (int64_t i = 0; i < Bytes::kInt4Step; ++i)
      out[i % 32 / 16 * (Bytes::kInt4Step / 2) + i / 32 * 16 + i % 16] = values[i];
    float* lanes = quant_scales(record, k_padded) + at * Vec::kWidth;
    for (int64_t lane = 0; lane < Vec::kWidth; ++lane) lanes[lane] = scales[(step * Bytes::kInt4Step + lane / 4 * 32) / group];
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
    for (int64_t i = 0; i < count; i += a.group) quantize_group(x + i, min_i(a.group, count - i), values + i, scales + i / a.group);
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
    case DType::f32: return quant_prepare_typed<float>(a, begin, end);
    case DType::bf16: return quant_prepare_typed<bf16>(a, begin, end);
    case DType::f16: return quant_prepare_typed<f16>(a, begin, end);
  }
}

// A matrix of weights from its row n on.
struct QuantMatrix {
  const char* w;
  int64_t stride_bytes;
  const char* scales;
  int64_t scale_stride_bytes;
};

// Prefetches run through memory once: each of a block's passes fetches its share of the next block, some lines a chunk.
struct QuantFetch {
  const char* next;
  int64_t lines_per_chunk;

  void chunk() {
    for (int64_t i = 0; i < lines_per_chunk; ++i, next += 64) __builtin_prefetch(next, 0, 3);
  }
};

struct Int8Format {
  static constexpr int64_t kChunkLines = 2;  // cache lines of one row's chunk

  static int64_t row_bytes(const QuantGemvArgs& a) { return a.k; }
  static float row_scale(const QuantMatrix& matrix, int64_t row) {
    float scale;
    std::memcpy(&scale, matrix.scales + row * matrix.scale_stride_bytes, 4);
    return scale;
  }

  // sums[r][m] += w[r, chunks] . x[m, chunks]; w begins with the first chunk.
  template <int ROWS, int M>
  static void add(const QuantMatrix& matrix, char* records, int64_t k_padded, int64_t begin, int64_t end, QuantFetch fetch,
                  float* sums) {
    const auto* w = reinterpret_cast<const int8_t*>(matrix.w);
    const int64_t stride = matrix.stride_bytes, record_bytes = quant_record_bytes(k_padded);
    Vec total[ROWS][M];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) total[r][m] = Vec::zero();
    for (int64_t chunk = begin; chunk < end; ++chunk, w += kQuantChunk) {
      fetch.chunk();
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
          const auto weights = Bytes::load_int8(w + r * stride + i);
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m)
            acc[r][m] = Bytes::dot(acc[r][m], weights,
                                   quant_values<Bytes::Int8Value>(records + m * record_bytes) + chunk * kQuantChunk + i);
        }
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const Vec scale = Vec::set1(quant_scales(records + m * record_bytes, k_padded)[chunk]);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) total[r][m] = Vec::fma(acc[r][m].to_float(), scale, total[r][m]);
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int m = 0; m < M; ++m) sums[r * M + m] += total[r][m].sum();
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
  static int64_t chunk_bytes() { return kQuantChunk; }
};

template <int GROUP>
struct Int4Format {
  static constexpr int64_t kChunkLines = 1;

  static int64_t row_bytes(const QuantGemvArgs& a) { return (a.k + GROUP - 1) / GROUP * (GROUP / 2); }
  static float row_scale(const QuantMatrix&, int64_t) { return 1.0f; }

  template <int ROWS, int M>
  static void add(const QuantMatrix& matrix, char* records, int64_t k_padded, int64_t begin, int64_t end, QuantFetch fetch,
                  float* sums) {
    const auto* w = reinterpret_cast<const uint8_t*>(matrix.w);
    const char* scales = matrix.scales;
    const int64_t stride = matrix.stride_bytes, record_bytes = quant_record_bytes(k_padded);
    Vec total[ROWS][M];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) total[r][m] = Vec::zero();
    for (int64_t chunk = begin; chunk < end; ++chunk, w += kQuantChunk / 2, scales += kQuantChunk / GROUP * 2) {
      fetch.chunk();
#pragma GCC unroll 4
      for (int64_t step = 0; step < kInt4Steps; ++step) {
        const int64_t at = chunk * kInt4Steps + step;
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
          const auto weights = Bytes::load_int4(w + r * stride + step * (Bytes::kInt4Step / 2));
          const char* row_scales = scales + r * matrix.scale_stride_bytes + step * Bytes::kInt4Step / GROUP * 2;
          const Vec w_scale = Bytes::load_scales<GROUP>(reinterpret_cast<const bf16*>(row_scales));
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) {
            char* record = records + m * record_bytes;
            const Bytes start = Bytes::load(quant_starts(record, k_padded) + at * Vec::kWidth);
            const Bytes dot = Bytes::dot(start, weights, quant_values<Bytes::Int4Value>(record) + at * Bytes::kInt4Step);
            const Vec scale = w_scale * Vec::load(quant_scales(record, k_padded) + at * Vec::kWidth);
            total[r][m] = Vec::fma(dot.to_float(), scale, total[r][m]);
          }
        }
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int m = 0; m < M; ++m) sums[r * M + m] += total[r][m].sum();
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
      return {reinterpret_cast<const char*>(values), kQuantChunk / 2, reinterpret_cast<const char*>(scales), kQuantChunk / GROUP * 2};
    }
  };
  static int64_t chunk_bytes() { return kQuantChunk / 2; }
};

// sums[r][m] of ROWS weight rows and the M activation rows of `records`; pass of `passes` over this block.
template <class Format, int ROWS, int M>
inline void quant_sums(const QuantGemvArgs& a, const QuantMatrix& matrix, char* records, int64_t pass, int64_t passes, float* sums) {
  for (int i = 0; i < ROWS * M; ++i) sums[i] = 0.0f;
  const int64_t bytes = Format::row_bytes(a), chunks = bytes / Format::chunk_bytes(), rest = bytes % Format::chunk_bytes();
  const int64_t lines = (ROWS * Format::kChunkLines + passes - 1) / passes;
  const QuantFetch fetch{matrix.w + ROWS * matrix.stride_bytes + pass * lines * chunks * 64, lines};
  Format::template add<ROWS, M>(matrix, records, a.k_padded, 0, chunks, fetch, sums);
  if (rest) {
    typename Format::template Tail<ROWS> tail;
    const QuantMatrix copied = tail.copy(matrix, chunks, rest);
    Format::template add<ROWS, M>(copied, records, a.k_padded, chunks, chunks + 1, QuantFetch{nullptr, 0}, sums);
  }
  for (int r = 0; r < ROWS; ++r)
    for (int m = 0; m < M; ++m) sums[r * M + m] *= Format::row_scale(matrix, r);
}

template <class T>
void quant_finish(const QuantGemvArgs& a, int64_t n, int64_t rows, int64_t m_begin, int64_t m_count, const float* sums, const float* sums2) {
  for (int64_t r = 0; r < rows; ++r) {
    const float bias = a.bias ? to_float(static_cast<const T*>(a.bias)[n + r]) : 0.0f;
    for (int64_t i = 0; i < m_count; ++i) {
      const int64_t m = m_begin + i;
      float y = sums[r * m_count + i] + bias;
      if (a.activation == Activation::gelu_tanh) y = scalar_gelu_tanh(y);
      if (a.activation == Activation::swiglu) y = scalar_silu(y) * sums2[r * m_count + i];
      if (a.residual) y += to_float(static_cast<const T*>(a.residual)[m * a.residual_stride + n + r]);
      from_float(y, static_cast<T*>(a.out)[m * a.out_stride + n + r]);
    }
  }
}

template <class Format, int ROWS, int M>
void quant_pass(const QuantGemvArgs& a, int64_t n, int64_t m_begin, int64_t pass, int64_t passes) {
  const int64_t scale_bytes = a.format == WeightFormat::int8 ? 4 : 2;
  const auto matrix = [&](const void* w, int64_t stride, const void* scales, int64_t scale_stride) {
    return QuantMatrix{static_cast<const char*>(w) + n * stride, stride,
                       static_cast<const char*>(scales) + n * scale_stride * scale_bytes, scale_stride * scale_bytes};
  };
  char* records = a.records + m_begin * quant_record_bytes(a.k_padded);
  float sums[ROWS * M], sums2[ROWS * M];
  quant_sums<Format, ROWS, M>(a, matrix(a.w, a.w_stride, a.scales, a.scale_stride), records, pass, passes, sums);
  if (a.activation == Activation::swiglu)
    quant_sums<Format, ROWS, M>(a, matrix(a.w2, a.w2_stride, a.scales2, a.scale2_stride), records, pass, passes, sums2);
  switch (a.dtype) {
    case DType::f32: return quant_finish<float>(a, n, ROWS, m_begin, M, sums, sums2);
    case DType::bf16: return quant_finish<bf16>(a, n, ROWS, m_begin, M, sums, sums2);
    case DType::f16: return quant_finish<f16>(a, n, ROWS, m_begin, M, sums, sums2);
  }
}

// The passes over one block of weight rows, which stay in the L1 cache: at most kQuantTileM activation rows each.
template <class Format, int ROWS>
inline void quant_block(const QuantGemvArgs& a, int64_t n) {
  const int64_t passes = (a.m + kQuantTileM - 1) / kQuantTileM;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t m = a.m * pass / passes;
    switch (a.m * (pass + 1) / passes - m) {
      case 1: quant_pass<Format, ROWS, 1>(a, n, m, pass, passes); break;
      case 2: quant_pass<Format, ROWS, 2>(a, n, m, pass, passes); break;
      case 3: quant_pass<Format, ROWS, kQuantTileM == 4 ? 3 : 1>(a, n, m, pass, passes); break;
      default: quant_pass<Format, ROWS, kQuantTileM>(a, n, m, pass, passes);
    }
  }
}

template <class Format>
void quant_gemv_format(const QuantGemvArgs& a, int64_t n_begin, int64_t n_end) {
  int64_t n = n_begin;
  for (; n + kQuantTileRows <= n_end; n += kQuantTileRows) quant_block<Format, kQuantTileRows>(a, n);
  for (; n < n_end; ++n) quant_block<Format, 1>(a, n);
}

void quant_gemv_rows(const QuantGemvArgs& a, int64_t n_begin, int64_t n_end) {
  if (a.format == WeightFormat::int8) return quant_gemv_format<Int8Format>(a, n_begin, n_end);
  switch (a.group) {
    case 32: return quant_gemv_format<Int4Format<32>>(a, n_begin, n_end);
    case 64: return quant_gemv_format<Int4Format<64>>(a, n_begin, n_end);
    default: return quant_gemv_format<Int4Format<128>>(a, n_begin, n_end);
  }
}
