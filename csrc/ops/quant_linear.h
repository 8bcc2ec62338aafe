// Linear layers over quantised weights. Internal to run_linears and run_mlp.
#pragma once
#include "linear.h"

namespace qvl {

// All calls over the same input of at most kQuantGemvMaxM rows, in one parallel region; their weights have one
// quantised format and group.
void run_quant_gemvs(const LinearInput& input, const LinearCall* calls, int count);

// All calls over the same input of any number of rows; one format and group, as above.
void run_quant_linears(const LinearInput& input, const LinearCall* calls, int count);

// run_mlp for more rows than GEMV takes, both weights quantised: the hidden layer is quantised in panel layout.
void run_quant_mlp(const LinearInput& input, const LinearCall& first, const LinearCall& down);

}  // namespace qvl
