#include "../ops/linear.h"

#include "common.h"

namespace qvl {

void bind_linear(py::module_& m) {
  m.def(
      "linear",
      [](Ptr x, Ptr w, Ptr bias, Ptr y, int64_t rows, int64_t n, int64_t k, int64_t x_stride, int64_t w_stride,
         int64_t y_stride, int dtype) {
        LinearCall call;
        call.weight = Weight{in(w), w_stride, in(bias)};
        call.n = n;
        call.out = out(y), call.out_stride = y_stride;
        const Rows input{in(x), x_stride, rows, k, to_dtype(dtype)};
        py::gil_scoped_release release;
        run_linears(input, &call, 1);
      },
      "x"_a, "w"_a, "bias"_a, "y"_a, "rows"_a, "n"_a, "k"_a, "x_stride"_a, "w_stride"_a, "y_stride"_a, "dtype"_a,
      "y = x w^T + bias");
}

}  // namespace qvl
