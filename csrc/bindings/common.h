// Shared by the files that bind ops. Pointers are integers (Tensor.data_ptr()), 0 for none; strides are in elements;
// dtypes are 0 fp32, 1 bf16, 2 fp16. No arithmetic here: callers (qvl_kernels/ops/*/cpu.py) have checked shapes.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "../cpu/kernel_table.h"

namespace qvl {

namespace py = pybind11;
using namespace py::literals;

using Ptr = uintptr_t;
inline const void* in(Ptr p) { return reinterpret_cast<const void*>(p); }
inline void* out(Ptr p) { return reinterpret_cast<void*>(p); }

using Strides = std::array<int64_t, 3>;  // batch, time, head
inline View view(Ptr data, Strides s) { return {in(data), s[0], s[1], s[2]}; }
inline MutableView mutable_view(Ptr data, Strides s) { return {out(data), s[0], s[1], s[2]}; }
inline CosSinView cos_sin_view(Ptr data, std::array<int64_t, 2> s) { return {in(data), s[0], s[1]}; }
inline MaskView mask_view(int kind, Ptr data, std::array<int64_t, 4> s) {
  return {static_cast<MaskKind>(kind), in(data), s[0], s[1], s[2], s[3]};
}

inline DType to_dtype(int code) {
  if (code < 0 || code > 2)
    throw std::invalid_argument("dtype code must be 0 (fp32), 1 (bf16) or 2 (fp16), got " + std::to_string(code));
  return static_cast<DType>(code);
}

void bind_linear(py::module_& m);
void bind_norm(py::module_& m);
void bind_rope(py::module_& m);
void bind_activation(py::module_& m);
void bind_attention(py::module_& m);
void bind_layers(py::module_& m);

}  // namespace qvl
