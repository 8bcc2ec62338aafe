// Every kernel body, over the Vec of the enclosing namespace. No guards: each target includes this once.
#include "math.inl.h"
#include "norm.inl.h"
#include "gemm.inl.h"
#include "gemv.inl.h"
#include "rope.inl.h"
#include "activation.inl.h"
#include "attention.inl.h"
#include "bandwidth.inl.h"
