// The C++ kernels against fp64 references, plain loops, without Python: what tests/aarch64.sh runs under emulation.
#include <cmath>
#include <cstdio>
#include <utility>
#include <vector>

#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/ops/activation.h"
#include "../../csrc/ops/attention.h"
#include "../../csrc/ops/linear.h"
#include "../../csrc/ops/norm.h"
#include "../../csrc/ops/rope.h"

using namespace qvl;

namespace {

// Elements of one dtype, read and written as doubles.
class Buffer {
 public:
  Buffer(DType dtype, int64_t count)
      : dtype_(dtype), count_(count), words_(size_t(count * dtype_bytes(dtype) + 3) / 4, 0x7fc07fc0u) {}  // NaN

  static Buffer random(DType dtype, int64_t count, double scale = 1.0) {
    Buffer buffer(dtype, count);
    for (int64_t i = 0; i < count; ++i) {
      state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
      buffer.set(i, scale * (double(state_ >> 40) / double(1 << 23) - 1.0));
    }
    return buffer;
  }

  void* data() { return words_.data(); }
  int64_t size() const { return count_; }

  double operator[](int64_t i) const {
    const char* p = reinterpret_cast<const char*>(words_.data());
    if (dtype_ == DType::f32) return reinterpret_cast<const float*>(p)[i];
    if (dtype_ == DType::bf16) return to_float(reinterpret_cast<const bf16*>(p)[i]);
    return to_float(reinterpret_cast<const f16*>(p)[i]);
  }

 private:
  void set(int64_t i, double value) {
    char* p = reinterpret_cast<char*>(words_.data());
    if (dtype_ == DType::f32) from_float(float(value), reinterpret_cast<float*>(p)[i]);
    if (dtype_ == DType::bf16) from_float(float(value), reinterpret_cast<bf16*>(p)[i]);
    if (dtype_ == DType::f16) from_float(float(value), reinterpret_cast<f16*>(p)[i]);
  }

  static inline uint64_t state_ = 1;
  DType dtype_;
  int64_t count_;
  std::vector<uint32_t> words_;
};

int passed = 0, failed = 0;

// ||out - reference|| / ||reference|| must be within a few roundings of the dtype.
void check(const char* name, DType dtype, const Buffer& out, const std::vector<double>& reference) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < reference.size(); ++i) {
    difference += (out[int64_t(i)] - reference[i]) * (out[int64_t(i)] - reference[i]);
    norm += reference[i] * reference[i];
  }
  const double limit = dtype == DType::f32 ? 2e-6 : dtype == DType::bf16 ? 8e-3 : 1e-3;
  const double error = std::sqrt(difference / norm);
  const bool good = error <= limit;  // false for NaN
  good ? ++passed : ++failed;
  if (!good) std::printf("FAILED %s, dtype %d: error %.3e, limit %.1e\n", name, int(dtype), error, limit);
}

void test_norms(DType dtype) {
  const int64_t rows = 7, size = 131;
  for (const bool layer : {false, true}) {
    Buffer x = Buffer::random(dtype, rows * size), weight = Buffer::random(dtype, size),
           bias = Buffer::random(dtype, size);
    Buffer y(dtype, rows * size);
    NormArgs args{};
    args.x = x.data(), args.weight = weight.data(), args.bias = layer ? bias.data() : nullptr, args.y = y.data();
    args.size = size, args.x_stride = size, args.y_stride = size, args.eps = 1e-6f, args.dtype = dtype;
    run_norm(args, rows);
    std::vector<double> reference;
    for (int64_t r = 0; r < rows; ++r) {
      double mean = 0, square = 0;
      for (int64_t i = 0; i < size; ++i) mean += layer ? x[r * size + i] / size : 0;
      for (int64_t i = 0; i < size; ++i) square += std::pow(x[r * size + i] - mean, 2) / size;
      for (int64_t i = 0; i < size; ++i)
        reference.push_back((x[r * size + i] - mean) / std::sqrt(square + 1e-6) * weight[i] + (layer ? bias[i] : 0));
    }
    check(layer ? "layer_norm" : "rms_norm", dtype, y, reference);
  }
}

double gelu(double x) { return 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))); }
double silu(double x) { return x / (1 + std::exp(-x)); }

void test_linear(DType dtype, int64_t n, int64_t k) {
  for (const int64_t m : {1, 3, 5, 10, 70}) {
    for (const Activation activation : {Activation::none, Activation::gelu_tanh, Activation::swiglu}) {
      Buffer x = Buffer::random(dtype, m * k), w = Buffer::random(dtype, n * k, 0.2),
             up = Buffer::random(dtype, n * k, 0.2);
      Buffer bias = Buffer::random(dtype, n), residual = Buffer::random(dtype, m * n), out(dtype, m * n);
      const bool swiglu = activation == Activation::swiglu;
      LinearCall call;
      call.weight = {w.data(), k, swiglu ? nullptr : bias.data()};
      if (swiglu) call.up = {up.data(), k, nullptr};
      call.n = n, call.activation = activation;
      call.residual = residual.data(), call.residual_stride = n, call.out = out.data(), call.out_stride = n;
      run_linears(LinearInput{x.data(), k, m, k, dtype}, &call, 1);
      std::vector<double> reference;
      for (int64_t r = 0; r < m; ++r)
        for (int64_t c = 0; c < n; ++c) {
          double a = swiglu ? 0 : bias[c], b = 0;
          for (int64_t i = 0; i < k; ++i) a += x[r * k + i] * w[c * k + i], b += x[r * k + i] * up[c * k + i];
          const double value = swiglu ? silu(a) * b : activation == Activation::gelu_tanh ? gelu(a) : a;
          reference.push_back(value + residual[r * n + c]);
        }
      check("linear", dtype, out, reference);
    }
  }
}

void test_activation(DType dtype) {
  const int64_t rows = 3, size = 77;
  for (const Activation activation : {Activation::swiglu, Activation::gelu_tanh}) {
    Buffer x = Buffer::random(dtype, rows * size, 4), up = Buffer::random(dtype, rows * size), y(dtype, rows * size);
    ActivationArgs args{};
    args.activation = activation, args.x = x.data(), args.up = up.data(), args.y = y.data();
    args.rows = rows, args.size = size, args.x_stride = args.up_stride = args.y_stride = size, args.dtype = dtype;
    run_activation(args);
    std::vector<double> reference;
    for (int64_t i = 0; i < rows * size; ++i)
      reference.push_back(activation == Activation::swiglu ? silu(x[i]) * up[i] : gelu(x[i]));
    check("activation", dtype, y, reference);
  }
}

void test_rope(DType dtype) {
  const int64_t time = 5, heads = 6, kv_heads = 3, size = 24;
  Buffer q = Buffer::random(dtype, time * heads * size), k = Buffer::random(dtype, time * kv_heads * size);
  Buffer q_out(dtype, q.size()), k_out(dtype, k.size());
  Buffer q_weight = Buffer::random(dtype, size), k_weight = Buffer::random(dtype, size);
  Buffer cosine = Buffer::random(dtype, time * size), sine = Buffer::random(dtype, time * size);
  RopeArgs args{};
  args.q = {q.data(), time * heads * size, heads * size, size};
  args.k = {k.data(), time * kv_heads * size, kv_heads * size, size};
  args.q_out = {q_out.data(), time * heads * size, heads * size, size};
  args.k_out = {k_out.data(), time * kv_heads * size, kv_heads * size, size};
  args.q_weight = q_weight.data(), args.k_weight = k_weight.data();
  args.cos = {cosine.data(), time * size, size}, args.sin = {sine.data(), time * size, size};
  args.cos_sin_dtype = dtype;
  args.batch = 1, args.time = time, args.heads = heads, args.kv_heads = kv_heads, args.head_dim = size;
  args.eps = 1e-6f, args.dtype = dtype;
  run_qk_norm_rope(args);
  const auto reference = [&](const Buffer& x, const Buffer& weight, int64_t count) {
    std::vector<double> result;
    for (int64_t row = 0; row < time * count; ++row) {
      double square = 0;
      for (int64_t d = 0; d < size; ++d) square += x[row * size + d] * x[row * size + d] / size;
      const auto normed = [&](int64_t d) { return x[row * size + d] / std::sqrt(square + 1e-6) * weight[d]; };
      for (int64_t d = 0; d < size; ++d) {
        const double turned = d < size / 2 ? -normed(d + size / 2) : normed(d - size / 2);
        result.push_back(normed(d) * cosine[row / count * size + d] + turned * sine[row / count * size + d]);
      }
    }
    return result;
  };
  check("qk_norm_rope q", dtype, q_out, reference(q, q_weight, heads));
  check("qk_norm_rope k", dtype, k_out, reference(k, k_weight, kv_heads));
}

void test_attention(DType dtype, int64_t size) {
  const int64_t heads = 6, kv_heads = 3;
  for (const auto& [queries, keys] : {std::pair<int64_t, int64_t>{1, 300}, {9, 9}, {20, 150}}) {
    Buffer q = Buffer::random(dtype, queries * heads * size), k = Buffer::random(dtype, keys * kv_heads * size);
    Buffer v = Buffer::random(dtype, keys * kv_heads * size), out(dtype, q.size());
    AttentionArgs args{};
    args.q = {q.data(), queries * heads * size, heads * size, size};
    args.k = {k.data(), keys * kv_heads * size, kv_heads * size, size};
    args.v = {v.data(), keys * kv_heads * size, kv_heads * size, size};
    args.out = {out.data(), queries * heads * size, heads * size, size};
    args.batch = 1, args.queries = queries, args.keys = keys, args.heads = heads, args.kv_heads = kv_heads,
    args.head_dim = size;
    args.scale = 0.7f, args.causal = true, args.dtype = dtype;
    run_attention(args);
    std::vector<double> reference;
    for (int64_t t = 0; t < queries; ++t)
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t kv = h / (heads / kv_heads), visible = keys - queries + t + 1;
        std::vector<double> weights, row(size, 0.0);
        double total = 0;
        for (int64_t s = 0; s < visible; ++s) {
          double score = 0;
          for (int64_t d = 0; d < size; ++d) score += q[(t * heads + h) * size + d] * k[(s * kv_heads + kv) * size + d];
          weights.push_back(std::exp(0.7f * score));
          total += weights.back();
        }
        for (int64_t s = 0; s < visible; ++s)
          for (int64_t d = 0; d < size; ++d) row[d] += weights[s] / total * v[(s * kv_heads + kv) * size + d];
        reference.insert(reference.end(), row.begin(), row.end());
      }
    check("attention", dtype, out, reference);
  }
}

}  // namespace

int main() {
  std::printf("instruction set: %s of %s\n", kernels().name, supported_isas().c_str());
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    test_norms(dtype);
    test_linear(dtype, 99, 130);
    test_linear(dtype, 80, 64);  // whole tiles, of which SwiGLU leaves some out
    test_activation(dtype);
    test_rope(dtype);
    for (const int64_t size : {24, 64}) test_attention(dtype, size);  // the second fits matrix units
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
