// Moves weights to huge pages (Linux), in place.
#include "huge_pages.h"

#include <cstring>
#include <stdexcept>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace qvl {

#if defined(__linux__) && defined(MREMAP_FIXED)

namespace {

#ifndef MADV_COLLAPSE
constexpr int MADV_COLLAPSE = 25;  // Linux 6.1
#endif
constexpr int64_t kPiece = 16 * kHugePage;  // bytes moved at a time: they are in use twice meanwhile

// Copies a piece to `fresh`, memory on huge pages, and moves those pages under its addresses, in one step to other
// threads.
bool move_piece(char* piece, int64_t bytes, char* fresh, bool writable) {
  // Copied by one thread: a process that has used OpenMP may not fork and use it again.
  std::memcpy(fresh, piece, size_t(bytes));
  if (madvise(fresh, size_t(bytes), MADV_COLLAPSE) != 0)
    return false;  // returns at once for pages that are huge already
  if (!writable && mprotect(fresh, size_t(bytes), PROT_READ) != 0) return false;
  if (mremap(fresh, size_t(bytes), size_t(bytes), MREMAP_MAYMOVE | MREMAP_FIXED, piece) == piece) return true;
  // The kernel may have unmapped the piece before it ran out of memory of its own. The copy is still there.
  const int protection = writable ? PROT_READ | PROT_WRITE : PROT_READ;
  if (mmap(piece, size_t(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != piece)
    throw std::runtime_error("use_huge_pages: the kernel gave back neither old nor new pages; the weights are lost");
  std::memcpy(piece, fresh, size_t(bytes));
  mprotect(piece, size_t(bytes), protection);
  return false;
}

bool replace_piece(char* piece, int64_t bytes, bool writable) {
  const size_t reserved = size_t(bytes + kHugePage);
  void* const reserve =
      mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reserve == MAP_FAILED) return false;
  char* const start = static_cast<char*>(reserve);
  char* const fresh = reinterpret_cast<char*>((uintptr_t(reserve) + kHugePage - 1) / kHugePage * kHugePage);
  const bool moved = madvise(fresh, size_t(bytes), MADV_HUGEPAGE) == 0 && move_piece(piece, bytes, fresh, writable);
  if (fresh > start) munmap(start, size_t(fresh - start));
  if (!moved) munmap(fresh, size_t(bytes));  // only then: after the move the addresses may be another thread's
  munmap(fresh + bytes, reserved - size_t(fresh - start) - size_t(bytes));
  return moved;
}

}  // namespace

int64_t use_huge_pages(uintptr_t address, int64_t bytes, bool mapped, bool writable) {
  const uintptr_t first = (address + kHugePage - 1) / kHugePage * kHugePage,
                  last = (address + bytes) / kHugePage * kHugePage;
  int64_t huge = 0;
  for (uintptr_t at = first; at < last; at += kPiece) {
    const int64_t piece_bytes = int64_t(last - at) < kPiece ? int64_t(last - at) : kPiece;
    char* const piece = reinterpret_cast<char*>(at);
    const bool done = mapped ? replace_piece(piece, piece_bytes, writable)
                             : madvise(piece, size_t(piece_bytes), MADV_HUGEPAGE) == 0 &&
                                   madvise(piece, size_t(piece_bytes), MADV_COLLAPSE) == 0;
    if (!done) break;  // no huge page is left, or the kernel gives none: the next piece would fail too
    huge += piece_bytes;
  }
  return huge;
}

#else

int64_t use_huge_pages(uintptr_t, int64_t, bool, bool) { return 0; }

#endif

}  // namespace qvl
