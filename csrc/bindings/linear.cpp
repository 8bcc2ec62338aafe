// Python binding of linear, and the weight handle.
#include "../ops/linear.h"

#include "common.h"

namespace qvl {

void bind_linear(py::module_& m) {
  py::class_<Weight>(m, "Weight", "A weight [n, k] of a linear layer, by pointers that must outlive it")
      .def(py::init([](Ptr w, int64_t stride, Ptr bias, int format, Ptr scales, int64_t scale_stride, int64_t group) {
             if (format < 0 || format > 2)
               throw std::invalid_argument("format must be 0 (dense), 1 (int8) or 2 (int4), got " +
                                           std::to_string(format));
             return Weight{in(w), stride, in(bias), static_cast<WeightFormat>(format), in(scales), scale_stride, group};
           }),
           "w"_a, "stride"_a, "bias"_a = 0, "format"_a = 0, "scales"_a = 0, "scale_stride"_a = 0, "group"_a = 0);
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
}

}  // namespace qvl
