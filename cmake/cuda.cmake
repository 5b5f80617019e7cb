# FASTCOMPAT_CUDA decides what CUDA may do; this file says in one line what it did. The CUDA engine's sources live in
# csrc/cuda; a tree without them builds the CPU engine alone.
file(GLOB FASTCOMPAT_CUDA_SOURCES CONFIGURE_DEPENDS csrc/cuda/*.cu)
if(NOT FASTCOMPAT_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "FASTCOMPAT_CUDA must be AUTO, ON or OFF, not '${FASTCOMPAT_CUDA}'")
elseif(FASTCOMPAT_CUDA STREQUAL "ON" AND NOT FASTCOMPAT_CUDA_SOURCES)
  message(FATAL_ERROR "FASTCOMPAT_CUDA=ON, but this version of fastcompat has no CUDA kernels yet; use AUTO or OFF")
endif()
message(STATUS "fastcompat: CUDA kernels are not built (none in this version)")
