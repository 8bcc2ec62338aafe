#pragma once
#include <string>

#include "kernel_table.h"

namespace qvl {

// Names of the targets that this machine supports, lowest first, comma separated.
std::string supported_isas();

}  // namespace qvl
