#define FASTCOMPAT_TABLE kernels_avx512
#define FASTCOMPAT_NAME "avx512"
#define FASTCOMPAT_SIMD "simd_avx512.h"
#include "engine.inl"
