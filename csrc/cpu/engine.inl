// Everything an instruction set exports: a file that includes this defines FASTCOMPAT_TABLE (and includes its simd_*.h
// first). All else stays in anonymous namespaces and no STL is used, so the linker can never pick this file's copy of a
// shared inline function for code that runs on older machines.
#include <cstring>

#include "half.h"
#include "tile.inl"
// order matters
#ifdef FASTCOMPAT_AMX
#include "amx.inl"
#endif
#ifdef FASTCOMPAT_INT16
#include "int16.inl"
#endif
// order matters
#include "softmax.inl"
// order matters
#include "kept.inl"
// order matters
#include "select.inl"
// order matters
#include "scores.inl"
// order matters
#include "screen.inl"
// order matters
#include "candidates.inl"
// order matters
#include "few.inl"
// order matters
#include "rounded.inl"
// order matters
#include "topk.inl"
// order matters
#include "intervals.inl"
// order matters
#include "ranks.inl"

namespace {

// Calls fn(A{}) with the arithmetic that this matrix wants.
template <class Fn>
inline auto with_softmax_arithmetic(const Matrix& m, Fn&& fn) {
#if defined(FASTCOMPAT_AMX)
  if (m.dtype == DType::bf16) return fn(Amx{});
#elif defined(FASTCOMPAT_BF16)
  if (m.dtype == DType::bf16) return fn(Bf16{});
#endif
  (void)m;
  return fn(Fp32{});
}

void beats_item(const BeatsItem& item, Workspace& ws) {
  with_search_arithmetic(item.segment->keys, item.metric, [&](auto a) { beats_with<decltype(a)>(item, ws); });
}

void pairs_item(const PairItem& item, Workspace& ws) {
  with_search_arithmetic(item.segment->keys, item.metric, [&](auto a) { pairs_with<decltype(a)>(item, ws); });
}

void forward_item(const ForwardItem& item, Workspace& ws) {
  with_softmax_arithmetic(item.keys.matrix, [&](auto a) { forward_with<decltype(a)>(item, ws); });
}

void gradient_item(const GradientItem& item, Workspace& ws) {
  with_softmax_arithmetic(item.lanes.matrix, [&](auto a) { gradient_with<decltype(a)>(item, ws); });
}

}  // namespace

namespace fastcompat {

extern const Kernels FASTCOMPAT_TABLE;
const Kernels FASTCOMPAT_TABLE = {
    FASTCOMPAT_NAME, NB,         forward_item, gradient_item, kept_item, topk_item, packed_floats,
    pack_item,       beats_item, pairs_item,   factors,       store_row, load_row,
};

}  // namespace fastcompat
