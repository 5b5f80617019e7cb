// The vector type of the instruction set that is being compiled, which isa_*.cpp names; by itself the portable one.
#pragma once
#ifdef FASTCOMPAT_SIMD
#include FASTCOMPAT_SIMD
#else
#include "simd_generic.h"
#endif
