#define FASTCOMPAT_BF16 1
#define FASTCOMPAT_SCREEN 1
#define FASTCOMPAT_AMX 1
#define FASTCOMPAT_TABLE kernels_amx
#define FASTCOMPAT_NAME "amx"
#include "simd_avx512.h"
// the vector type comes first
#include "engine.inl"
