// RMS norm and layer norm on the CPU.
#pragma once
#include "../cpu/kernel_table.h"

namespace qvl {

void run_norm(const NormArgs& args, int64_t rows);

}  // namespace qvl
