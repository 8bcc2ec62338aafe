// Per-head RMS norm and rotary position embedding of q and k in one pass.
#pragma once
#include "../cpu/kernel_table.h"

namespace qvl {

// Splits rows (batch x time) over threads.
void run_qk_norm_rope(const RopeArgs& args);

}  // namespace qvl
