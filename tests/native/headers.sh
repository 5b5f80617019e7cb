#!/usr/bin/env bash
# Every .h and .inl of csrc/cpu compiles by itself, for the portable kernels and for the two sets with products of their
# own. usage: tests/native/headers.sh [COMPILER]
set -euo pipefail
cd "$(dirname "$0")/../../csrc/cpu"
compiler=${1:-c++}
avx2="-mavx2 -mfma -mf16c"
flags() {
  case $1 in
    generic) ;;
    avx2) echo "$avx2" ;;
    amx) echo "$avx2 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -mamx-tile -mamx-bf16" ;;
  esac
}
sets=generic
if [ "$(uname -m)" = x86_64 ]; then sets="generic avx2 amx"; fi
for set in $sets; do
  for file in *.h *.inl; do
    case $file in simd_*.h) if [ "$set" != generic ]; then continue; fi ;; esac
    isa=$set
    case $file in simd_avx2.h) isa=avx2 ;; simd_avx512.h) isa=amx ;; esac
    if [ "$isa" != generic ] && [ "$(uname -m)" != x86_64 ]; then continue; fi
    # shellcheck disable=SC2046
    { grep '^#define' "isa_$set.cpp" | grep -v TABLE; echo "#include \"$file\""; } |
      $compiler -std=c++17 -fsyntax-only -Wall -Wno-unused-function -Wno-psabi $(flags $isa) -I. -x c++ - ||
      { echo "$file does not compile by itself for $set"; exit 1; }
  done
done
