// Rows of a quantised weight, dequantised: the lookup of an embedding.
#pragma once
#include "../cpu/kernel_table.h"

namespace qvl {

struct QuantEmbeddingArgs {
  const int64_t* ids;  // [count], each in [0, vocabulary)
  int64_t count, vocabulary, k;
  Weight weight;  // int8 or int4
  DType dtype;    // of out
  void* out;      // [count, k]
};

// The index of the first id that is out of range, or -1 if there is none.
int64_t first_bad_id(const QuantEmbeddingArgs& args);

// out[i] = dequantised row ids[i]. The ids must be in range.
void run_quant_embedding(const QuantEmbeddingArgs& args);

}  // namespace qvl
