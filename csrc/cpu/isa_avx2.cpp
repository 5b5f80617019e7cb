#define FASTCOMPAT_INT16 1
#define FASTCOMPAT_SCREEN 1
#define FASTCOMPAT_TABLE kernels_avx2
#define FASTCOMPAT_NAME "avx2"
#include "simd_avx2.h"
// the vector type comes first
#include "engine.inl"
