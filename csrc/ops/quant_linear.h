// Linear layers over quantised weights. Internal to run_linears and run_mlp.
#pragma once
#include "linear.h"

namespace qvl {

// All calls over the same rows, at most kQuantGemvMaxM of them, in one parallel region; their weights have one
// quantised format and group.
void run_quant_gemvs(const Rows& rows, const LinearCall* calls, int count);

// All calls over the same rows, any number of them; one format and group, as above.
void run_quant_linears(const Rows& rows, const LinearCall* calls, int count);

// run_mlp for more than kQuantGemvMaxM rows, both weights quantised: what lies between is rounded in panel layout.
void run_quant_mlp(const Rows& rows, const LinearCall& first, const LinearCall& down);

}  // namespace qvl
