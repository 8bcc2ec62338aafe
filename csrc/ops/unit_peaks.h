// The compute roofline: what each unit of the processor reaches.
#pragma once
#include <map>
#include <string>

namespace qvl {

// GFLOP/s (GOP/s of integers) by the name of the unit: all threads run `repeats` loops on registers at once, and the
// fastest loop of each thread counts. Units that the instruction set in use lacks are absent.
std::map<std::string, double> unit_peaks(int repeats);

}  // namespace qvl
