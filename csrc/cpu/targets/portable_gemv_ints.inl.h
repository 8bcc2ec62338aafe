// Integer dot products along k for the quantised GEMV, in vectors of eight 16-bit numbers: two products of int8, or
// four of int4 and int8, add up without overflow. Four lanes are one block of 32 inputs of int4.
struct GemvInts {
  static constexpr int kBlocks = Vec::kWidth / 4, kInt8Step = 16 * kBlocks, kInt4Step = 32 * kBlocks;
  using Int8Value = int16_t;
  using Int4Value = int16_t;
  typedef int32_t Block __attribute__((vector_size(16)));
  typedef int16_t Short8 __attribute__((vector_size(16)));
  typedef int8_t Char8 __attribute__((vector_size(8)));
  typedef int16_t Short4 __attribute__((vector_size(8)));
  struct Int8 {
    Short8 v[2 * kBlocks];
  };
  struct Int4 {
    Short8 low[2 * kBlocks], high[2 * kBlocks];
  };
  Block v[kBlocks];

  static GemvInts zero() { return {}; }
  static GemvInts load(const int32_t* p) {
    GemvInts sums;
    std::memcpy(&sums.v, p, sizeof(sums.v));
    return sums;
  }
  void store(int32_t* p) const { std::memcpy(p, &v, sizeof(v)); }
  GemvInts operator-(GemvInts b) const {
    for (int i = 0; i < kBlocks; ++i) b.v[i] = v[i] - b.v[i];
    return b;
  }
  Vec to_float() const {
    Vec::Ints ints;
    std::memcpy(&ints, v, sizeof(ints));
    return {__builtin_convertvector(ints, Vec::Floats)};
  }
  // Transposed horizontal reduction (4x4): in each block of four lanes the block's sums of a, b, c and d.
  static GemvInts transpose_reduce(GemvInts a, GemvInts b, GemvInts c, GemvInts d) {
    const auto sum = [](Block x) { return x[0] + x[1] + x[2] + x[3]; };
    GemvInts sums;
    for (int i = 0; i < kBlocks; ++i) sums.v[i] = Block{sum(a.v[i]), sum(b.v[i]), sum(c.v[i]), sum(d.v[i])};
    return sums;
  }

  static Short8 load_values(const int16_t* p) {
    Short8 values;
    std::memcpy(&values, p, sizeof(values));
    return values;
  }
  static Short8 widen(const void* p) {
    Char8 bytes;
    std::memcpy(&bytes, p, sizeof(bytes));
    return __builtin_convertvector(bytes, Short8);
  }
  static Int8 load_int8(const int8_t* p) {
    Int8 values;
    for (int i = 0; i < 2 * kBlocks; ++i) values.v[i] = widen(p + 8 * i);
    return values;
  }
  static Int4 load_int4(const uint8_t* p) {
    Int4 values;
    for (int i = 0; i < 2 * kBlocks; ++i) {
      const Short8 bytes = widen(p + 8 * i);
      values.low[i] = bytes & 15, values.high[i] = (bytes >> 4) & 15;
    }
    return values;
  }
  static Block add(Block sums, Short8 x) {
    Short4 low, high;
    std::memcpy(&low, &x, sizeof(low));
    std::memcpy(&high, reinterpret_cast<const char*>(&x) + sizeof(low), sizeof(high));
    return sums + __builtin_convertvector(low, Block) + __builtin_convertvector(high, Block);
  }
  static GemvInts dot(GemvInts acc, const Int8& w, const int16_t* x) {
    for (int i = 0; i < kBlocks; ++i, x += 16)
      acc.v[i] = add(acc.v[i], w.v[2 * i] * load_values(x) + w.v[2 * i + 1] * load_values(x + 8));
    return acc;
  }
  static GemvInts dot(GemvInts acc, const Int4& w, const int16_t* x) {
    for (int i = 0; i < kBlocks; ++i, x += 16) {
      const int16_t* high = x + kInt4Step / 2;
      acc.v[i] = add(acc.v[i], w.low[2 * i] * load_values(x) + w.low[2 * i + 1] * load_values(x + 8) +
                                   w.high[2 * i] * load_values(high) + w.high[2 * i + 1] * load_values(high + 8));
    }
    return acc;
  }
  // Scales of four weight rows' groups in the lanes of transpose_reduce.
  template <int GROUP, class Scale>
  static Vec load_scales(const char* p, int64_t stride) {
    return Vec::from_lanes([&](int lane) {
      Scale scale;
      std::memcpy(&scale, p + lane % 4 * stride + lane / 4 * 32 / GROUP * int(sizeof(scale)), sizeof(scale));
      return qvl::to_float(scale);
    });
  }
  // Zero-points of the same groups, in the same lanes. The first is the low or, with odd = 1, the high nibble of *p.
  template <int GROUP>
  static Vec load_zeros(const uint8_t* p, int64_t stride, int64_t odd) {
    return Vec::from_lanes([&](int lane) {
      const int64_t group = odd + lane / 4 * 32 / GROUP;
      return float(p[lane % 4 * stride + group / 2] >> (group % 2 * 4) & 15);
    });
  }
};
