#include <cstdlib>
#include <new>

#include "kernels.h"
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastcompat {

void prefer_large_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kPage = 2 << 20;  // bytes of a large page on x86-64 and aarch64
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory), end = begin + static_cast<uintptr_t>(bytes);
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

Workspace::~Workspace() {
  for (void* p : data_) std::free(p);
}

float* Workspace::floats(Slot slot, int64_t count) {
  const int64_t bytes = (count * static_cast<int64_t>(sizeof(float)) + 127) / 64 * 64;
  if (bytes > capacity_[slot]) {
    std::free(data_[slot]);
    data_[slot] = nullptr;
    capacity_[slot] = 0;
    if (posix_memalign(&data_[slot], 64, static_cast<size_t>(bytes)) != 0) throw std::bad_alloc();
    prefer_large_pages(data_[slot], bytes);
    capacity_[slot] = bytes;
  }
  return static_cast<float*>(data_[slot]);
}

void Workspace::trim() {
  constexpr int64_t kRetainedBytes = 1 << 20;
  for (int slot = 0; slot < kSlots; ++slot)
    if (capacity_[slot] > kRetainedBytes) {
      std::free(data_[slot]);
      data_[slot] = nullptr;
      capacity_[slot] = 0;
    }
}

}  // namespace fastcompat
