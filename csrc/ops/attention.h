// Scaled dot-product attention on the CPU: blocks of query rows as vector lanes, online softmax, no T x S memory.
#pragma once
#include "../cpu/kernel_table.h"

namespace qvl {

// Rows that see no key give 0. Splits over (batch, head, query block), and over keys when queries are few.
void run_attention(const AttentionArgs& args);

}  // namespace qvl
