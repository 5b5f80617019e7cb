#define FASTCOMPAT_BF16 1
#define FASTCOMPAT_SCREEN 1
#define FASTCOMPAT_AMX 1
#define FASTCOMPAT_TABLE kernels_amx
#define FASTCOMPAT_NAME "amx"
#define FASTCOMPAT_SIMD "simd_avx512.h"
#include "engine.inl"
