// Python binding of norm.
#include "../ops/norm.h"

#include "common.h"

namespace qvl {

void bind_norm(py::module_& m) {
  m.def(
      "norm",
      [](Ptr x, Ptr residual, Ptr weight, Ptr bias, Ptr y, Ptr sum, int64_t rows, int64_t size, int64_t x_stride,
         int64_t residual_stride, int64_t y_stride, int64_t sum_stride, float eps, int dtype) {
        const NormArgs args{in(x),    in(residual),    in(weight), in(bias),   out(y), out(sum),       size,
                            x_stride, residual_stride, y_stride,   sum_stride, eps,    to_dtype(dtype)};
        py::gil_scoped_release release;
        run_norm(args, rows);
      },
      "x"_a, "residual"_a, "weight"_a, "bias"_a, "y"_a, "sum"_a, "rows"_a, "size"_a, "x_stride"_a, "residual_stride"_a,
      "y_stride"_a, "sum_stride"_a, "eps"_a, "dtype"_a, "RMS norm (bias 0) or layer norm of rows; residual 0 for none");
}

}  // namespace qvl
