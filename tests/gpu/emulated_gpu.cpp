// For reroute.py: which GPU the emulator is until the next call.
#include "device.h"

namespace fastcompat::cuda {
void forget_devices();
}

extern "C" __attribute__((visibility("default"))) void emulate(int capability, int driver, int shared_memory) {
  emu::capability = capability;
  emu::driver = driver;
  emu::smem_limit = shared_memory;
  fastcompat::cuda::forget_devices();
}
