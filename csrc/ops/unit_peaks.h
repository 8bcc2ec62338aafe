// The compute roofline: what each unit of the processor reaches.
#pragma once
#include <map>
#include <string>

namespace qvl {

// Highest GFLOP/s (GOP/s of integers) of all threads together over `repeats` loops on registers, by the name of the
// unit. Units that the instruction set in use lacks are absent.
std::map<std::string, double> unit_peaks(int repeats);

}  // namespace qvl
