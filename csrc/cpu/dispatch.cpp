// Chooses the instruction set once, at the first call: the best one that the machine supports, or QVL_CPU_ISA.
#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace qvl {

#if defined(__x86_64__)
extern const Target kAvx2Target, kAvx512Target, kAvx512VnniTarget, kAvx512Bf16Target;
#endif
extern const Target kPortableTarget;

namespace {

// Lowest first.
const Target* const kTargets[] = {
    &kPortableTarget,
#if defined(__x86_64__)
    &kAvx2Target,
    &kAvx512Target,
    &kAvx512VnniTarget,
    &kAvx512Bf16Target,
#endif
};

const KernelTable& choose() {
  const char* forced = std::getenv("QVL_CPU_ISA");
  if (forced && *forced) {
    for (const Target* target : kTargets) {
      if (std::strcmp(target->name, forced) != 0) continue;
      if (!target->supported())
        throw std::runtime_error("QVL_CPU_ISA=" + std::string(forced) + ": this processor does not support it; supported: " +
                                 supported_isas());
      return *target->table;
    }
    throw std::runtime_error("QVL_CPU_ISA=" + std::string(forced) + " is not an instruction set; supported here: " +
                             supported_isas());
  }
  const Target* best = &kPortableTarget;
  for (const Target* target : kTargets)
    if (target->supported()) best = target;
  return *best->table;
}

}  // namespace

std::string supported_isas() {
  std::string names;
  for (const Target* target : kTargets) {
    if (!target->supported()) continue;
    if (!names.empty()) names += ", ";
    names += target->name;
  }
  return names;
}

const KernelTable& kernels() {
  static const KernelTable& table = choose();
  return table;
}

}  // namespace qvl
