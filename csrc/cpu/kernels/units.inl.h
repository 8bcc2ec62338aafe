// The compute roofline: loops over registers of one unit's instructions. Each returns the operations done, a
// multiplication and an addition as two, or 0 where the target has no such unit.

// As if the value had changed: what is computed from it is computed again. No instruction.
#if defined(QVL_RENEW)
#elif defined(__x86_64__)
#define QVL_RENEW(value) asm volatile("" : "+v"(value))
#elif defined(__aarch64__)
#define QVL_RENEW(value) asm volatile("" : "+w"(value))
#else
#define QVL_RENEW(value) asm volatile("" : "+m"(value))
#endif

// multiply_add(sum) on independent sums: as many as cover the latency, and as leave registers for the operands.
template <class Sum, class MultiplyAdd>
inline double unit_sums(int64_t steps, double operations, const MultiplyAdd& multiply_add) {
  constexpr int kSums = 12;
  Sum sums[kSums];
#pragma GCC unroll 12
  for (Sum& sum : sums) sum = Sum::zero();
  for (int64_t step = 0; step < steps; ++step)
#pragma GCC unroll 12
    for (Sum& sum : sums) sum = multiply_add(sum);
#pragma GCC unroll 12
  for (Sum& sum : sums) QVL_RENEW(sum.v);
  return operations * kSums * double(steps);
}

inline double fma_unit(int64_t steps) {
  Vec a = Vec::set1(0.7f), b = Vec::set1(1.3f);
  return unit_sums<Vec>(steps, 2 * Vec::kWidth, [&](Vec sum) {
    QVL_RENEW(a.v);
    return Vec::fma(a, b, sum);
  });
}

template <class V>
inline double bf16_dot_unit(int64_t steps) {
  if constexpr (V::kHasBf16Dot) {
    V a = V::set1(0.7f), b = V::set1(1.3f);
    return unit_sums<V>(steps, 4 * V::kWidth, [&](V sum) {
      QVL_RENEW(a.v);
      return V::dot_vectors(sum, a, b);
    });
  }
  return 0;
}

// Operands come from L1, which keeps up. Targets whose words of the quantised GEMM hold one element multiply bytes as
// floats.
template <class Ints>
inline double int8_dot_unit(int64_t steps) {
  if constexpr (GemmInts::kPerWord > 1) {
    int8_t weights[Ints::kInt8Step];
    typename Ints::Int8Value x[Ints::kInt8Step];
    for (int i = 0; i < Ints::kInt8Step; ++i) weights[i] = int8_t(7 * i - 100), x[i] = int8_t(5 * i - 90);
    typename Ints::Int8 w = Ints::load_int8(weights);
    return unit_sums<Ints>(steps, 2 * Ints::kInt8Step, [&](Ints sum) {
      QVL_RENEW(w.v);
      return Ints::dot(sum, w, x);
    });
  }
  return 0;
}

double run_unit(ComputeUnit unit, int64_t steps) {
  switch (unit) {
    case ComputeUnit::fma:
      return fma_unit(steps);
    case ComputeUnit::bf16_dot:
      return bf16_dot_unit<Vec>(steps);
    case ComputeUnit::int8_dot:
      return int8_dot_unit<GemvInts>(steps);
    default:
      return 0;
  }
}
