# FASTCOMPAT_CUDA decides what CUDA may do; this file says in one line, the last one of the configuration, what it did
# and why. It leaves behind FASTCOMPAT_CUDA_ARCHS (empty: no CUDA kernels).
if(NOT FASTCOMPAT_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "FASTCOMPAT_CUDA must be AUTO, ON or OFF, not '${FASTCOMPAT_CUDA}'")
endif()
include(cmake/nvcc.cmake)

# A plain include() of this file returns to CMakeLists.txt after this.
macro(without_cuda reason)
  if(FASTCOMPAT_CUDA STREQUAL "ON")
    message(FATAL_ERROR "fastcompat: FASTCOMPAT_CUDA=ON, but ${reason}")
  endif()
  cmake_language(DEFER CALL message STATUS "fastcompat: CUDA kernels are not built: ${reason}")
  return()
endmacro()

if(FASTCOMPAT_CUDA STREQUAL "OFF")
  without_cuda("FASTCOMPAT_CUDA=OFF")
endif()
find_nvcc(nvcc reason)
if(reason)
  without_cuda("${reason}")
endif()
set(CMAKE_CUDA_COMPILER "${nvcc}")
include(CheckLanguage)
check_language(CUDA) # CMake's own trial, which also links
if(NOT CMAKE_CUDA_COMPILER)
  without_cuda("${nvcc} compiles, but CMake's trial of it fails: ${CMAKE_BINARY_DIR}/CMakeFiles has its log")
endif()

# The portable kernels become PTX for compute capability 8.0 once, and that machine code for each generation; the PTX is
# kept too: the driver compiles it for every other GPU from 8.0 on. CMAKE_CUDA_ARCHITECTURES replaces the list.
set(archs
  80   # A100, A30
  86   # RTX 30, A10, A40: half of A100's shared memory per multiprocessor
  89   # RTX 40, L4, L40S
  90   # H100, H200: what the Hopper kernels do not cover
  100  # B200, GB200
  120) # RTX 50, RTX PRO Blackwell
set(why "every GPU from 8.0 on")
if(DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(archs ${CMAKE_CUDA_ARCHITECTURES})
  set(why "CMAKE_CUDA_ARCHITECTURES")
else()
  # Six generations take five minutes of processor time. Where the machine has GPUs, they are what the build is for, and
  # the PTX serves others; where it has none (an image, a package to hand on) the build must suit any. ON is the latter.
  if(FASTCOMPAT_CUDA STREQUAL "AUTO")
    gpus_at_hand(found)
    if(found)
      set(archs ${found})
      set(why "the GPUs of this machine; FASTCOMPAT_CUDA=ON builds for every GPU")
    endif()
  endif()
  set(CMAKE_CUDA_ARCHITECTURES OFF)
  # A toolkit older than an architecture builds the others.
  execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-arch OUTPUT_VARIABLE known)
  set(codes compute_80)
  foreach(arch ${archs})
    if(known MATCHES "compute_${arch}\n")
      list(APPEND codes sm_${arch})
    else()
      list(REMOVE_ITEM archs ${arch})
    endif()
  endforeach()
  list(APPEND archs 80-virtual)
  list(JOIN codes "," codes)
  set(portable_code -gencode=arch=compute_80,code=[${codes}] --threads=0)
endif()
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static) # the wheel imports where there is no driver and no toolkit

# wgmma exists in machine code for 9.0a alone, which runs on that generation and no other.
file(GLOB sm90 CONFIGURE_DEPENDS csrc/cuda/*_sm90.cu)
file(GLOB sources CONFIGURE_DEPENDS csrc/cuda/*.cu)
list(REMOVE_ITEM sources ${sm90})
add_library(cuda_sm90 OBJECT ${sm90})
set_target_properties(cuda_sm90 PROPERTIES CUDA_ARCHITECTURES 90a-real)
add_library(cuda_engine STATIC ${sources} $<TARGET_OBJECTS:cuda_sm90>)
target_compile_options(cuda_engine PRIVATE ${portable_code})

set(FASTCOMPAT_CUDA_ARCHS ${archs} 90a-real)
list(TRANSFORM FASTCOMPAT_CUDA_ARCHS REPLACE "-real" "")
list(TRANSFORM FASTCOMPAT_CUDA_ARCHS REPLACE "(.*)-virtual" "PTX \\1")
list(JOIN FASTCOMPAT_CUDA_ARCHS "," FASTCOMPAT_CUDA_ARCHS)
cmake_language(DEFER CALL message STATUS
  "fastcompat: CUDA kernels are built by ${CMAKE_CUDA_COMPILER} ${CMAKE_CUDA_COMPILER_VERSION} for ${FASTCOMPAT_CUDA_ARCHS} (${why})")
