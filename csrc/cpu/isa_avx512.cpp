#define FASTCOMPAT_TABLE kernels_avx512
#define FASTCOMPAT_NAME "avx512"
#include "simd_avx512.h"
// the vector type comes first
#include "engine.inl"
