// Kernel selection by instruction set: what is supported, and the override for tests.
#pragma once
#include <string>

#include "kernel_table.h"

namespace qvl {

// Names of the targets that this machine supports, comma separated: those for tests, then lowest first.
std::string supported_isas();

// Calls from now on run on the named target: for tests, which go through all of them. No kernel may be running.
void use_isa(const std::string& isa);

}  // namespace qvl
