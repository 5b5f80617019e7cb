#define FASTCOMPAT_INT16 1
#define FASTCOMPAT_SCREEN 1
#define FASTCOMPAT_TABLE kernels_avx2
#define FASTCOMPAT_NAME "avx2"
#define FASTCOMPAT_SIMD "simd_avx2.h"
#include "engine.inl"
