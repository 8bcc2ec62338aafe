// Elementary functions over Vec, and small helpers shared by the kernels.

inline int64_t min_i(int64_t a, int64_t b) { return a < b ? a : b; }

// exp(x), relative error below 2e-7; 0 below -104, inf above 89, NaN for NaN.
inline Vec vec_exp(Vec x) {
  x = Vec::min(Vec::set1(89.0f), Vec::max(Vec::set1(-104.0f), x));
  const Vec n = Vec::round(x * Vec::set1(1.44269504088896341f));
  Vec r = Vec::fma(n, Vec::set1(-0.693359375f), x);
  r = Vec::fma(n, Vec::set1(2.12194440e-4f), r);
  Vec p = Vec::set1(1.9875691500e-4f);
  p = Vec::fma(p, r, Vec::set1(1.3981999507e-3f));
  p = Vec::fma(p, r, Vec::set1(8.3334519073e-3f));
  p = Vec::fma(p, r, Vec::set1(4.1665795894e-2f));
  p = Vec::fma(p, r, Vec::set1(1.6666665459e-1f));
  p = Vec::fma(p, r, Vec::set1(5.0000001201e-1f));
  p = Vec::fma(p, r * r, r + Vec::set1(1.0f));
  return Vec::scale_pow2(p, n);
}

// 2^x for x <= 0, relative error below 3e-6: enough for what becomes bf16. 1 for 0, 0 for -inf, NaN for NaN.
template <class V>  // V is always Vec: a parameter only so that targets without dot products of bf16 compile
inline V vec_exp2_short(V x) {
  const V r = V::fraction(x);
  V p = V::set1(1.3426684592e-2f);
  p = V::fma(p, r, V::set1(5.2242473501e-2f));
  p = V::fma(p, r, V::set1(2.4128020527e-1f));
  p = V::fma(p, r, V::set1(6.9304484479e-1f));
  p = V::fma(p, r, V::set1(1.0f));
  return V::scale_floor_pow2(p, x);
}

// x * sigmoid(x)
inline Vec vec_silu(Vec x) { return x / (Vec::set1(1.0f) + vec_exp(Vec::zero() - x)); }

// 0.5 x (1 + tanh(u)), u = sqrt(2/pi) (x + 0.044715 x^3); written as x * sigmoid(2u)
inline Vec vec_gelu_tanh(Vec x) {
  const Vec u2 = x * Vec::fma(x * x, Vec::set1(0.07135481282553226f), Vec::set1(1.5957691216057308f));
  return x / (Vec::set1(1.0f) + vec_exp(Vec::zero() - u2));
}

// x rounded to T and back.
template <class T>
inline Vec round_to(Vec x) {
  alignas(64) T stored[Vec::kWidth];
  x.store(stored);
  return Vec::load(stored);
}
template <>
inline Vec round_to<float>(Vec x) {
  return x;
}

// body(offset, lanes) over size elements; lanes is kWidth but for the tail.
#define QVL_FOR_LANES(offset, lanes, size) \
  for (int64_t offset = 0, lanes; (lanes = min_i(Vec::kWidth, (size) - offset)) > 0; offset += Vec::kWidth)

template <class T>
inline Vec load_lanes(const T* p, int64_t lanes) {
  return lanes == Vec::kWidth ? Vec::load(p) : Vec::load_n(p, lanes);
}
template <class T>
inline void store_lanes(Vec x, T* p, int64_t lanes) {
  if (lanes == Vec::kWidth)
    x.store(p);
  else
    x.store_n(p, lanes);
}
