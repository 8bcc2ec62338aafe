// Linear layers over quantised weights. Internal to run_linears and run_mlp.
#pragma once
#include "linear.h"

namespace qvl {

// All calls over the same rows, at most kQuantGemvMaxRows of them, in one parallel region; their weights have one
// quantised format and group.
void run_quant_gemvs(const Rows& rows, const LinearCall* calls, int count);

}  // namespace qvl
