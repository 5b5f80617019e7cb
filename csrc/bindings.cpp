// The only file that knows pybind11: integers become pointers, exceptions become Python's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "fastcompat.h"

namespace py = pybind11;
using namespace fastcompat;

namespace {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address a) {
  return reinterpret_cast<T*>(a);
}

// (query, keys, dtype, B, N, D, query stride, keys stride, scale, bias, query_labels, key_labels, positive, exclude)
using ProblemTuple = std::tuple<Address, Address, int, int64_t, int64_t, int64_t, int64_t, int64_t, float, Address,
                                Address, Address, Address, Address>;

SoftmaxProblem problem_of(const ProblemTuple& t) {
  const auto& [query, keys, dtype, B, N, D, query_stride, keys_stride, scale, bias, query_labels, key_labels, positive,
               exclude] = t;
  const DType type = static_cast<DType>(dtype);
  return {{pointer<void>(query), type, B, D, query_stride},
          {pointer<void>(keys), type, N, D, keys_stride},
          scale,
          pointer<float>(bias),
          pointer<int64_t>(query_labels),
          pointer<int64_t>(key_labels),
          pointer<int64_t>(positive),
          pointer<int64_t>(exclude)};
}

// (query, keys, dtype, D, query stride, keys stride, N, rows, count, scale, offset)
using SegmentTuple =
    std::tuple<Address, Address, int, int64_t, int64_t, int64_t, int64_t, Address, int64_t, float, float>;

Segment segment_of(const SegmentTuple& t, int64_t B) {
  const auto& [query, keys, dtype, D, query_stride, keys_stride, N, rows, count, scale, offset] = t;
  const DType type = static_cast<DType>(dtype);
  return {{pointer<void>(query), type, B, D, query_stride},
          {pointer<void>(keys), type, N, D, keys_stride},
          pointer<int64_t>(rows),
          count,
          scale,
          offset};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastcompat's native engine; use it through the fastcompat package";

  static PyObject* non_finite = PyErr_NewException("fastcompat._C.NonFinite", PyExc_ValueError, nullptr);
  m.attr("NonFinite") = py::handle(non_finite);
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const NonFinite& e) {
      PyErr_SetObject(non_finite, py::make_tuple(e.side, e.segment, e.row).ptr());
    }
  });

  m.def("build", [] {
    py::dict d;
    d["version"] = FASTCOMPAT_VERSION;
    d["compiler"] = FASTCOMPAT_COMPILER;
    d["cuda"] = py::none();
    d["cuda_archs"] = py::list();
    d["simd_built"] = simd_built();
    return d;
  });
  m.def("simd_levels", &simd_levels);
  m.def("simd", &simd);
  m.def("set_simd", &set_simd);

  using Release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "softmax_stats",
      [](const ProblemTuple& problem, bool want_mean, Address neg_lse, Address pos_lse, Address pos_sum,
         Address pos_count, Address mean, int threads) {
        const SoftmaxStats out{pointer<float>(neg_lse), pointer<float>(pos_lse), pointer<float>(pos_sum),
                               pointer<int64_t>(pos_count), want_mean ? pointer<float>(mean) : nullptr};
        softmax_stats(problem_of(problem), out, threads);
      },
      Release());
  m.def(
      "softmax_query_grad",
      [](const ProblemTuple& problem, Address neg_lse, Address pos_lse, Address mean, Address g_neg, Address g_pos,
         Address g_sum, Address dquery, Address dscale, int threads) {
        const SoftmaxGrads grads{pointer<float>(neg_lse), pointer<float>(pos_lse), pointer<float>(g_neg),
                                 pointer<float>(g_pos), pointer<float>(g_sum)};
        softmax_query_grad(problem_of(problem), grads, pointer<float>(mean), pointer<void>(dquery),
                           pointer<float>(dscale), threads);
      },
      Release());
  m.def(
      "softmax_key_grad",
      [](const ProblemTuple& problem, Address neg_lse, Address pos_lse, Address g_neg, Address g_pos, Address g_sum,
         Address dkeys, Address dbias, int threads) {
        const SoftmaxGrads grads{pointer<float>(neg_lse), pointer<float>(pos_lse), pointer<float>(g_neg),
                                 pointer<float>(g_pos), pointer<float>(g_sum)};
        softmax_key_grad(problem_of(problem), grads, pointer<void>(dkeys), pointer<float>(dbias), threads);
      },
      Release());
  m.def(
      "topk",
      [](const std::vector<SegmentTuple>& tuples, int64_t k, int metric, int64_t B, Address query_labels,
         Address key_labels, Address exclude, Address scores, Address ids, int threads) {
        std::vector<Segment> segments;
        for (const SegmentTuple& t : tuples) segments.push_back(segment_of(t, B));
        topk(segments, k, static_cast<Metric>(metric),
             {pointer<int64_t>(query_labels), pointer<int64_t>(key_labels), pointer<int64_t>(exclude)},
             pointer<float>(scores), pointer<int64_t>(ids), threads);
      },
      Release());
  m.def(
      "pair_scores",
      [](const SegmentTuple& segment, int metric, int64_t B, Address ids, int64_t targets, Address out, int threads) {
        pair_scores(segment_of(segment, B), static_cast<Metric>(metric), pointer<int64_t>(ids), targets,
                    pointer<float>(out), threads);
      },
      Release());
  m.def(
      "count_beats",
      [](const SegmentTuple& segment, int metric, int64_t B, Address bounds, int64_t blocks, Address thresholds,
         Address threshold_ids, int64_t targets, Address exclude, Address out, int threads) {
        count_beats(segment_of(segment, B), static_cast<Metric>(metric), pointer<int64_t>(bounds), blocks,
                    pointer<float>(thresholds), pointer<int64_t>(threshold_ids), targets, pointer<int64_t>(exclude),
                    pointer<int64_t>(out), threads);
      },
      Release());
}
