#include <cstdlib>
#include <new>

#include "kernels.h"

namespace fastcompat {

Workspace::~Workspace() {
  for (void* p : data_) std::free(p);
}

float* Workspace::floats(int slot, int64_t count) {
  const int64_t bytes = (count * static_cast<int64_t>(sizeof(float)) + 127) / 64 * 64;
  if (bytes > capacity_[slot]) {
    std::free(data_[slot]);
    data_[slot] = nullptr;
    capacity_[slot] = 0;
    if (posix_memalign(&data_[slot], 64, static_cast<size_t>(bytes)) != 0) throw std::bad_alloc();
    capacity_[slot] = bytes;
  }
  return static_cast<float*>(data_[slot]);
}

void Workspace::trim() {
  constexpr int64_t kKept = 1 << 20;
  for (int slot = 0; slot < kSlots; ++slot)
    if (capacity_[slot] > kKept) {
      std::free(data_[slot]);
      data_[slot] = nullptr;
      capacity_[slot] = 0;
    }
}

}  // namespace fastcompat
