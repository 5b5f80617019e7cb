#define FASTCOMPAT_BF16 1
#define FASTCOMPAT_SCREEN 1
#define FASTCOMPAT_TABLE kernels_avx512bf16
#define FASTCOMPAT_NAME "avx512bf16"
#define FASTCOMPAT_SIMD "simd_avx512.h"
#include "engine.inl"
