#define FASTCOMPAT_TABLE kernels_generic
#define FASTCOMPAT_NAME "generic"
#define FASTCOMPAT_SIMD "simd_generic.h"
#include "engine.inl"
