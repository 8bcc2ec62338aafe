// Python binding of linear and of the quantised embedding, and the weight handle.
#include "../ops/linear.h"

#include "../ops/quant_embedding.h"
#include "common.h"

namespace qvl {

void bind_linear(py::module_& m) {
  py::class_<Weight>(m, "Weight", "A weight [n, k] of a linear layer, by pointers that must outlive it")
      .def(py::init([](Ptr w, int64_t stride, Ptr bias, int format, Ptr scales, int64_t scale_stride, int64_t group,
                       int scale_dtype, Ptr zeros, int64_t zero_stride) {
             if (format < 0 || format > 2)
               throw std::invalid_argument("format must be 0 (dense), 1 (int8) or 2 (int4), got " +
                                           std::to_string(format));
             const auto weight_format = static_cast<WeightFormat>(format);
             const DType scales_of = to_dtype(scale_dtype);
             if (weight_format == WeightFormat::int4 && scales_of == DType::f32)
               throw std::invalid_argument("int4 weights take bf16 or fp16 scales");
             if (weight_format == WeightFormat::int4 && group != 32 && group != 64 && group != 128)
               throw std::invalid_argument("int4 groups have 32, 64 or 128 inputs, got " + std::to_string(group));
             return Weight{in(w),         stride,     in(bias),
                           weight_format, in(scales), scale_stride,
                           group,         scales_of,  static_cast<const uint8_t*>(in(zeros)),
                           zero_stride};
           }),
           "w"_a, "stride"_a, "bias"_a = 0, "format"_a = 0, "scales"_a = 0, "scale_stride"_a = 0, "group"_a = 0,
           "scale_dtype"_a = int(DType::bf16), "zeros"_a = 0, "zero_stride"_a = 0);
  m.def(
      "linear",
      [](Ptr x, const Weight& weight, Ptr y, int64_t rows, int64_t n, int64_t k, int64_t x_stride, int64_t y_stride,
         int dtype) {
        LinearCall call;
        call.weight = weight;
        call.n = n;
        call.out = out(y), call.out_stride = y_stride;
        const LinearInput input{in(x), x_stride, rows, k, to_dtype(dtype)};
        py::gil_scoped_release release;
        run_linears(input, &call, 1);
      },
      "x"_a, "weight"_a, "y"_a, "rows"_a, "n"_a, "k"_a, "x_stride"_a, "y_stride"_a, "dtype"_a, "y = x w^T + bias");
  m.def(
      "quantized_embedding",
      [](Ptr ids, const Weight& weight, Ptr y, int64_t count, int64_t vocabulary, int64_t k, int dtype) {
        if (weight.format == WeightFormat::dense) throw std::invalid_argument("weight must be int8 or int4");
        const QuantEmbeddingArgs a{
            static_cast<const int64_t*>(in(ids)), count, vocabulary, k, weight, to_dtype(dtype), out(y)};
        py::gil_scoped_release release;
        const int64_t bad = first_bad_id(a);
        if (bad >= 0)
          throw std::out_of_range("id " + std::to_string(a.ids[bad]) + " is outside of the " +
                                  std::to_string(vocabulary) + " rows of the embedding");
        run_quant_embedding(a);
      },
      "ids"_a, "weight"_a, "y"_a, "count"_a, "vocabulary"_a, "k"_a, "dtype"_a, "y = dequantised rows ids of w");
}

}  // namespace qvl
