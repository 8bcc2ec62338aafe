// Huge pages for weights: fewer TLB misses while they are streamed.
#pragma once
#include <cstdint>

namespace qvl {

constexpr int64_t kHugePage = int64_t(2) << 20;

// Puts the whole 2 MB blocks of [address, address + bytes) on huge pages; addresses and contents stay. Memory of a
// private map of a file (`mapped`) is copied to fresh pages, which then take its place: nothing else may write to it
// meanwhile. Anonymous memory is collapsed by the kernel. A block for which there is no huge page stays as it was.
// Returns the bytes that lie on huge pages now.
int64_t use_huge_pages(uintptr_t address, int64_t bytes, bool mapped, bool writable);

}  // namespace qvl
