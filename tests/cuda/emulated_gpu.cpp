// Says which GPU the emulator is, as soon as the module is loaded.
#include "device.h"

static const bool described = [] {
  emu::capability = CAPABILITY;
  emu::smem_limit = (CAPABILITY == 90 ? 227 : 99) << 10;
  return true;
}();

// For test_failures.py: another GPU, until the next call.
extern "C" __attribute__((visibility("default"))) void emulate(int capability, int driver, int shared_memory) {
  emu::capability = capability;
  emu::driver = driver;
  emu::smem_limit = shared_memory;
}
