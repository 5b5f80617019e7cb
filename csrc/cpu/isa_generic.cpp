#define FASTCOMPAT_TABLE kernels_generic
#define FASTCOMPAT_NAME "generic"
#include "simd_generic.h"
// the vector type comes first
#include "engine.inl"
