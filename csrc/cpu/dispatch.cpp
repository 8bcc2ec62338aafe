// Kernel selection: the best instruction set that the machine supports, or QVL_CPU_ISA, at the first call.
#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace qvl {

#if defined(__x86_64__)
extern const Target kAvx2Target, kAvx512Target, kAvx512VnniTarget, kAvx512Bf16Target;
#endif
extern const Target kPortableTarget, kAmxTarget, kAmxEmulatedTarget;

namespace {

// Those for tests, then lowest first. setup.py defines QVL_TEST_TARGETS and QVL_HAS_AMX.
const Target* const kTargets[] = {
#if defined(QVL_TEST_TARGETS)
    &kAmxEmulatedTarget,
#endif
    &kPortableTarget,
#if defined(__x86_64__)
    &kAvx2Target,        &kAvx512Target, &kAvx512VnniTarget, &kAvx512Bf16Target,
#endif
#if defined(QVL_HAS_AMX)
    &kAmxTarget,
#endif
};

// `request` opens the message if there is no such target here.
const KernelTable& table_of(const std::string& isa, const std::string& request) {
  for (const Target* target : kTargets) {
    if (isa != target->name) continue;
    if (!target->supported())
      throw std::runtime_error(request + ": this processor does not support it; supported: " + supported_isas());
    return *target->table;
  }
  throw std::runtime_error(request + " is not an instruction set; supported here: " + supported_isas());
}

const KernelTable& choose() {
  const char* forced = std::getenv("QVL_CPU_ISA");
  if (forced && *forced) return table_of(forced, "QVL_CPU_ISA=" + std::string(forced));
  const Target* best = &kPortableTarget;
  for (const Target* target : kTargets)
    if (!target->for_tests && target->supported()) best = target;
  return *best->table;
}

std::atomic<const KernelTable*>& chosen() {
  static std::atomic<const KernelTable*> table{&choose()};
  return table;
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

const KernelTable& kernels() { return *chosen().load(std::memory_order_relaxed); }

void use_isa(const std::string& isa) { chosen() = &table_of(isa, isa); }

}  // namespace qvl
