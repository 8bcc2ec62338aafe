// Every kernel of a target with matrix units. No guards: each target includes this once.
#include "common.inl.h"
#include "tile.inl.h"
#include "tile_gemm.inl.h"
#include "tile_quant_gemm.inl.h"
#include "tile_attention.inl.h"
#include "tile_units.inl.h"
