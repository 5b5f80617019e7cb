# FASTCOMPAT_CUDA decides what CUDA may do; this file says in one line what it did. It leaves behind
# FASTCOMPAT_CUDA_ARCHS (empty: no CUDA kernels) and, with FASTCOMPAT_NVCC=pypi, uses the nvcc that pip has installed.
if(NOT FASTCOMPAT_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "FASTCOMPAT_CUDA must be AUTO, ON or OFF, not '${FASTCOMPAT_CUDA}'")
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

if(FASTCOMPAT_CUDA STREQUAL "OFF")
  message(STATUS "fastcompat: CUDA kernels are not built (FASTCOMPAT_CUDA=OFF)")
  return()
endif()
if(FASTCOMPAT_NVCC STREQUAL "pypi")
  # pip puts nvidia/cu13/{bin,lib} somewhere on sys.path; nvcc itself would look for the libraries in lib64.
  find_package(Python REQUIRED COMPONENTS Interpreter)
  execute_process(COMMAND "${Python_EXECUTABLE}" -c "import glob, sys
print(next((nvcc for path in sys.path for nvcc in glob.glob(path + '/nvidia/cu*/bin/nvcc')), ''))"
    OUTPUT_VARIABLE nvcc OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(NOT nvcc)
    message(FATAL_ERROR "FASTCOMPAT_NVCC=pypi, but Python finds no nvidia/cu*/bin/nvcc; build with pip and without --no-build-isolation")
  endif()
  cmake_path(GET nvcc PARENT_PATH bin)
  cmake_path(GET bin PARENT_PATH toolkit)
  set(CMAKE_CUDA_COMPILER "${nvcc}")
  link_directories("${toolkit}/lib")
  set(ENV{LIBRARY_PATH} "${toolkit}/lib:$ENV{LIBRARY_PATH}") # for CMake's own try at linking
endif()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  set(advice "put nvcc on PATH, set CUDACXX, or take it from PyPI with the environment variable FASTCOMPAT_NVCC=pypi")
  if(FASTCOMPAT_CUDA STREQUAL "ON")
    message(FATAL_ERROR "FASTCOMPAT_CUDA=ON, but there is no CUDA compiler that works; ${advice}")
  endif()
  message(STATUS "fastcompat: CUDA kernels are not built: no CUDA compiler that works; ${advice}")
  return()
endif()

if(DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(archs ${CMAKE_CUDA_ARCHITECTURES})
else()
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
message(STATUS "fastcompat: CUDA kernels are built by ${CMAKE_CUDA_COMPILER} ${CMAKE_CUDA_COMPILER_VERSION} for ${FASTCOMPAT_CUDA_ARCHS}")
