// Says which GPU the emulator is, as soon as the module is loaded.
#include "device.h"

static const bool described = [] {
  emu::capability = CAPABILITY;
  emu::smem_limit = (CAPABILITY == 90 ? 227 : 99) << 10;
  return true;
}();
