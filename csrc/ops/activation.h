// Elementwise activations on the CPU.
#pragma once
#include "../cpu/kernel_table.h"

namespace qvl {

// out = silu(gate) * up (rows of `size`), or gelu_tanh(x + bias).
void run_activation(const ActivationArgs& args);

}  // namespace qvl
