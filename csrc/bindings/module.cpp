// The pybind11 module. Each op binds itself in a file of this folder.
#include "../cpu/dispatch.h"
#include "../ops/bandwidth.h"
#include "../ops/huge_pages.h"
#include "../ops/linear.h"
#include "../ops/unit_peaks.h"
#include "../threads.h"
#include "common.h"

PYBIND11_MODULE(_C, m) {
  using namespace qvl;
  m.doc() = "C++ CPU kernels of qvl_kernels";
  m.def("max_threads", &max_threads, "Threads that the next call from this thread will use");
  m.def("isa", [] { return std::string(kernels().name); }, "Instruction set in use");
  m.def("supported_isas", &supported_isas,
        "Instruction sets that this machine can run: those for tests, then lowest first");
  m.def("use_isa", &use_isa, "isa"_a, "Changes the instruction set; no kernel may be running");
  m.def(
      "gemm_backend",
      [](int dtype) { return gemm_backend(to_dtype(dtype), 2, 2) == GemmBackend::bf16_dot ? "dot" : "fma"; }, "dtype"_a,
      "How GEMMs of this dtype multiply: widening FMA or the bf16 pair dot product");
  m.def("read_bandwidth", &read_bandwidth, "bytes"_a, "repeats"_a, py::call_guard<py::gil_scoped_release>(),
        "Measured read bandwidth in GB/s");
  m.def("unit_peaks", &unit_peaks, "repeats"_a, py::call_guard<py::gil_scoped_release>(),
        "Measured GFLOP/s (GOP/s of integers) of each unit of the processor, by name");
  m.def("use_huge_pages", &use_huge_pages, "address"_a, "bytes"_a, "mapped"_a, "writable"_a,
        py::call_guard<py::gil_scoped_release>(),
        "Moves memory to huge pages under its addresses; bytes that lie on them now");
  bind_linear(m);
  bind_norm(m);
  bind_rope(m);
  bind_activation(m);
  bind_attention(m);
  bind_layers(m);
}
