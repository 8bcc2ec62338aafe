// Every kernel of a target without matrix units. No guards: each target includes this once.
#include "common.inl.h"
#include "quant_gemm.inl.h"
