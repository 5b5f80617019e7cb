// Everything an instruction set exports: a file that includes this defines FASTCOMPAT_TABLE, FASTCOMPAT_NAME
// and FASTCOMPAT_SIMD first. All else stays in anonymous namespaces and no STL is used, so the linker can never pick
// this file's copy of a shared inline function for code that runs on older machines.
#pragma once
#include "amx.inl"
#include "cached_probs.inl"
#include "int16.inl"
#include "ranks.inl"
#include "softmax.inl"
#include "topk.inl"

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

void pair_scores_item(const PairItem& item, Workspace& ws) {
  with_search_arithmetic(item.segment->keys, item.metric, [&](auto a) { pair_scores_with<decltype(a)>(item, ws); });
}

void forward_item(const ForwardItem& item, Workspace& ws) {
  with_softmax_arithmetic(item.keys.matrix, [&](auto a) { forward_with<decltype(a)>(item, ws); });
}

void gradient_item(const GradientItem& item, Workspace& ws) {
  with_softmax_arithmetic(item.lanes.matrix, [&](auto a) { gradient_with<decltype(a)>(item, ws); });
}

}  // namespace

#ifdef FASTCOMPAT_TABLE
namespace fastcompat {

extern const Kernels FASTCOMPAT_TABLE;
const Kernels FASTCOMPAT_TABLE = {
    FASTCOMPAT_NAME,
    NB,
    forward_item,
    gradient_item,
    cached_gradient_item,
    topk_item,
    packed_floats,
    pack_item,
    beats_item,
    pair_scores_item,
    factors,
    store_row,
    load_row,
};

}  // namespace fastcompat
#endif
