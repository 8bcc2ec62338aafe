// Python binding of swiglu and gelu_tanh.
#include "../ops/activation.h"

#include "common.h"

namespace qvl {

void bind_activation(py::module_& m) {
  m.def(
      "swiglu",
      [](Ptr gate, Ptr up, Ptr y, int64_t rows, int64_t size, int64_t gate_stride, int64_t up_stride, int64_t y_stride,
         int dtype) {
        const ActivationArgs a{Activation::swiglu, in(gate),  in(up),   nullptr,        out(y), rows, size,
                               gate_stride,        up_stride, y_stride, to_dtype(dtype)};
        py::gil_scoped_release release;
        run_activation(a);
      },
      "gate"_a, "up"_a, "y"_a, "rows"_a, "size"_a, "gate_stride"_a, "up_stride"_a, "y_stride"_a, "dtype"_a,
      "y = silu(gate) * up");
  m.def(
      "gelu_tanh",
      [](Ptr x, Ptr bias, Ptr y, int64_t rows, int64_t size, int64_t x_stride, int64_t y_stride, int dtype) {
        const ActivationArgs a{
            Activation::gelu_tanh, in(x), nullptr, in(bias), out(y), rows, size, x_stride, 0, y_stride,
            to_dtype(dtype)};
        py::gil_scoped_release release;
        run_activation(a);
      },
      "x"_a, "bias"_a, "y"_a, "rows"_a, "size"_a, "x_stride"_a, "y_stride"_a, "dtype"_a, "y = gelu_tanh(x + bias)");
}

}  // namespace qvl
