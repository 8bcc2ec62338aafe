// Members of Vec, kWidth floats in GCC/Clang vector extensions. Included inside struct Vec.
typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));
Floats v;

static Vec zero() { return {Floats{}}; }
static Vec set1(float x) { return {x - Floats{}}; }  // minus: 0 + -0 would be 0
template <class Lane, int... I>
static Vec from_lanes(const Lane& lane, std::integer_sequence<int, I...>) {
  return {Floats{lane(I)...}};
}
template <class Lane>
static Vec from_lanes(const Lane& lane) {
  return from_lanes(lane, std::make_integer_sequence<int, kWidth>{});
}

static Vec load(const float* p) {
  Vec out;
  std::memcpy(&out.v, p, sizeof(out.v));
  return out;
}
static Vec load(const bf16* p) {
  Halves bits;
  std::memcpy(&bits, p, sizeof(bits));
  return {(Floats)(__builtin_convertvector(bits, Words) << 16)};
}
static Vec load(const f16* p) {
  return from_lanes([&](int i) { return to_float(p[i]); });
}
// First n lanes from memory (nothing beyond is touched), zero in the rest.
template <class T>
static Vec load_n(const T* p, int64_t n) {
  return from_lanes([&](int i) {
    T element{};  // pairs of bf16 that move as floats lie at any two bytes
    if (i < n) std::memcpy(&element, p + i, sizeof(T));
    return to_float(element);
  });
}
void store(float* p) const { std::memcpy(p, &v, sizeof(v)); }
template <class T>
void store(T* p) const {
  for (int i = 0; i < kWidth; ++i) from_float(v[i], p[i]);
}
template <class T>
void store_n(T* p, int64_t n) const {
  for (int64_t i = 0; i < n && i < kWidth; ++i) from_float(v[i], p[i]);
}
// The low and the high halves of words as floats: of pairs of bf16, the even and the odd elements.
static void split_pairs(Words pairs, Vec& low, Vec& high) {
  low = {(Floats)(pairs << 16)};
  high = {(Floats)(pairs & 0xffff0000u)};
}
static void load_even_odd(const bf16* p, Vec& even, Vec& odd) {
  Words pairs;
  std::memcpy(&pairs, p, sizeof(pairs));
  split_pairs(pairs, even, odd);
}
static Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
Vec operator+(Vec b) const { return {v + b.v}; }
Vec operator-(Vec b) const { return {v - b.v}; }
Vec operator*(Vec b) const { return {v * b.v}; }
Vec operator/(Vec b) const { return {v / b.v}; }
// max and min return b where either is NaN.
static Vec max(Vec a, Vec b) { return blend(a.v > b.v, a, b); }
static Vec min(Vec a, Vec b) { return blend(a.v < b.v, a, b); }
static Vec sqrt(Vec a) {
  return from_lanes([&](int i) { return std::sqrt(a.v[i]); });
}
static Vec round(Vec a) {
  return from_lanes([&](int i) { return std::nearbyint(a.v[i]); });
}
// a * 2^n for integral n in [-252, 254]; in two steps so that results may be subnormal
static Vec scale_pow2(Vec a, Vec n) {
  const Ints whole = __builtin_convertvector(n.v, Ints), half = whole >> 1, rest = whole - half;
  return {a.v * (Floats)((half + 127) << 23) * (Floats)((rest + 127) << 23)};
}
// where(a < b, x, y) and where(a is NaN, x, y)
static Vec select_lt(Vec a, Vec b, Vec x, Vec y) { return blend(a.v < b.v, x, y); }
static Vec select_nan(Vec a, Vec x, Vec y) { return blend(a.v != a.v, x, y); }
static bool any_lt(Vec a, Vec b) {
  const Ints lt = a.v < b.v;
  int any = 0;
  for (int i = 0; i < kWidth; ++i) any |= lt[i];
  return any != 0;
}
static Vec blend(Ints mask, Vec x, Vec y) { return {(Floats)(((Ints)x.v & mask) | ((Ints)y.v & ~mask))}; }
// Of all lanes, neighbours first.
template <class Join>
float reduce(const Join& join) const {
  alignas(64) float lanes[kWidth];
  store(lanes);
  for (int count = kWidth / 2; count > 0; count /= 2)
    for (int i = 0; i < count; ++i) lanes[i] = join(lanes[2 * i], lanes[2 * i + 1]);
  return lanes[0];
}
float sum() const {
  return reduce([](float a, float b) { return a + b; });
}
float max_lane() const {
  return reduce([](float a, float b) { return a > b ? a : b; });
}
// kWidth x kWidth block of 32-bit elements: dst[i][j] = src[j][i].
static void transpose(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
  for (int i = 0; i < kWidth; ++i)
    for (int j = 0; j < kWidth; ++j) std::memcpy(dst + i * dst_stride + j, src + j * src_stride + i, 4);
}
