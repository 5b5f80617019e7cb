// The only file that knows pybind11: integers become pointers, exceptions become Python's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>

#include "fastcompat.h"
#ifdef FASTCOMPAT_CUDA
#include "cuda/engine.h"
#endif

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

Metric metric_of(int number) {
  if (number < 0 || number > static_cast<int>(Metric::l2)) throw std::invalid_argument("unknown metric");
  return static_cast<Metric>(number);
}

// What only the values of a tensor tell. Kernels follow these numbers unchecked; on a GPU only their caller knows them.
void check_rows(const Segment& s) {
  const int64_t* rows = s.rows;
  const uint64_t N = s.keys.rows;
  bool good = true;  // no early exit, so that the loop is vectorised
  for (int64_t i = 0; rows && i < s.count; ++i) good &= static_cast<uint64_t>(rows[i]) < N;
  if (!good)
    throw std::invalid_argument("`rows` must hold row numbers of the keys, from 0 to " + std::to_string(N) + " - 1");
}

void check_bounds(const int64_t* bounds, int64_t blocks, int64_t count) {
  bool good = blocks < 0 || (bounds[0] >= 0 && bounds[blocks] <= count);
  for (int64_t t = 0; t < blocks; ++t) good &= bounds[t] <= bounds[t + 1];
  if (!good)
    throw std::invalid_argument("`bounds` must ascend from 0 or more to the number of keys, " + std::to_string(count) +
                                ", at most");
}

void check_packed(const Segment& s, Metric metric, int64_t packed) {
  if (packed && packed != packed_size(s.keys, s.count, metric))
    throw std::invalid_argument("`packed` must be what pack() made of these keys with the instruction set in use");
}

// (query, keys, dtype, D, query stride, keys stride, N, rows, count, scale, offset, packed, numbers in packed, items)
using SegmentTuple = std::tuple<Address, Address, int, int64_t, int64_t, int64_t, int64_t, Address, int64_t, float,
                                float, Address, int64_t, Address>;

Segment segment_of(const SegmentTuple& t, int64_t B, Metric metric, bool readable) {
  const auto& [query, keys, dtype, D, query_stride, keys_stride, N, rows, count, scale, offset, packed, numbers,
               items] = t;
  const DType type = static_cast<DType>(dtype);
  const Segment s{{pointer<void>(query), type, B, D, query_stride},
                  {pointer<void>(keys), type, N, D, keys_stride},
                  pointer<int64_t>(rows),
                  count,
                  scale,
                  offset,
                  pointer<float>(packed),
                  pointer<int32_t>(items)};
  if (readable) {
    check_rows(s);
    check_packed(s, metric, numbers);
  }
  return s;
}

#ifdef FASTCOMPAT_CUDA
struct GpuRun {
  cuda::Launch launch;   // without scratch
  py::function scratch;  // bytes -> address of that much device memory, which stays until the caller lets it go

  cuda::Launch with(size_t bytes) const {
    cuda::Launch full = launch;
    if (bytes) {
      py::gil_scoped_acquire gil;
      full.scratch = pointer<void>(scratch(bytes).cast<Address>());
    }
    return full;
  }
};

void softmax_stats(const SoftmaxProblem& problem, const SoftmaxStats& out, const GpuRun& run) {
  cuda::softmax_stats(problem, out, run.with(cuda::softmax_stats_scratch(problem, out.mean, run.launch)));
}

void softmax_query_grad(const SoftmaxProblem& problem, const SoftmaxGrads& grads, const float* mean, void* dquery,
                        float* dscale, const GpuRun& run) {
  const size_t bytes = cuda::softmax_query_grad_scratch(problem, grads, run.launch);
  cuda::softmax_query_grad(problem, grads, mean, dquery, dscale, run.with(bytes));
}

void softmax_key_grad(const SoftmaxProblem& problem, const SoftmaxGrads& grads, void* dkeys, float* dbias,
                      const GpuRun& run) {
  const size_t bytes = cuda::softmax_key_grad_scratch(problem, grads, dkeys, dbias, run.launch);
  cuda::softmax_key_grad(problem, grads, dkeys, dbias, run.with(bytes));
}

void topk(const std::vector<Segment>& segments, int64_t k, Metric metric, const TopkFilter& filter, float* scores,
          int64_t* ids, const GpuRun& run) {
  const size_t bytes = cuda::topk_scratch(segments, k, metric, filter, run.launch);
  cuda::topk(segments, k, metric, filter, scores, ids, run.with(bytes));
}

void pair_scores(const Segment& segment, Metric metric, const int64_t* ids, int64_t targets, float* out,
                 const GpuRun& run) {
  const size_t bytes = cuda::pair_scores_scratch(segment, metric, targets, run.launch);
  cuda::pair_scores(segment, metric, ids, targets, out, run.with(bytes));
}

void count_beats(const Segment& segment, Metric metric, const int64_t* bounds, int64_t blocks, const float* thresholds,
                 const int64_t* threshold_ids, int64_t targets, const int64_t* exclude, int64_t* out,
                 const GpuRun& run) {
  const size_t bytes = cuda::count_beats_scratch(segment, metric, blocks, targets, run.launch);
  cuda::count_beats(segment, metric, bounds, blocks, thresholds, threshold_ids, targets, exclude, out, run.with(bytes));
}
#endif

using Release = py::call_guard<py::gil_scoped_release>;

// The six kernels of one engine. Run is how they are run: a number of threads on the CPU, a GpuRun on a GPU.
template <class Run>
void define_kernels(py::module_ m) {
  constexpr bool readable = std::is_same_v<Run, int>;
  m.def(
      "softmax_stats",
      [](const ProblemTuple& problem, bool want_mean, Address neg_lse, Address pos_lse, Address pos_sum,
         Address pos_count, Address mean, const Run& run) {
        const SoftmaxStats out{pointer<float>(neg_lse), pointer<float>(pos_lse), pointer<float>(pos_sum),
                               pointer<int64_t>(pos_count), want_mean ? pointer<float>(mean) : nullptr};
        softmax_stats(problem_of(problem), out, run);
      },
      Release());
  m.def(
      "softmax_query_grad",
      [](const ProblemTuple& problem, Address neg_lse, Address pos_lse, Address mean, Address g_neg, Address g_pos,
         Address g_sum, Address dquery, Address dscale, const Run& run) {
        const SoftmaxGrads grads{pointer<float>(neg_lse), pointer<float>(pos_lse), pointer<float>(g_neg),
                                 pointer<float>(g_pos), pointer<float>(g_sum)};
        softmax_query_grad(problem_of(problem), grads, pointer<float>(mean), pointer<void>(dquery),
                           pointer<float>(dscale), run);
      },
      Release());
  m.def(
      "softmax_key_grad",
      [](const ProblemTuple& problem, Address neg_lse, Address pos_lse, Address g_neg, Address g_pos, Address g_sum,
         Address dkeys, Address dbias, const Run& run) {
        const SoftmaxGrads grads{pointer<float>(neg_lse), pointer<float>(pos_lse), pointer<float>(g_neg),
                                 pointer<float>(g_pos), pointer<float>(g_sum)};
        softmax_key_grad(problem_of(problem), grads, pointer<void>(dkeys), pointer<float>(dbias), run);
      },
      Release());
  m.def(
      "topk",
      [](const std::vector<SegmentTuple>& tuples, int64_t k, int metric, int64_t B, Address query_labels,
         Address key_labels, Address exclude, Address scores, Address ids, const Run& run) {
        std::vector<Segment> segments;
        for (const SegmentTuple& t : tuples) segments.push_back(segment_of(t, B, metric_of(metric), readable));
        topk(segments, k, metric_of(metric),
             {pointer<int64_t>(query_labels), pointer<int64_t>(key_labels), pointer<int64_t>(exclude)},
             pointer<float>(scores), pointer<int64_t>(ids), run);
      },
      Release());
  m.def(
      "pair_scores",
      [](const SegmentTuple& segment, int metric, int64_t B, Address ids, int64_t targets, Address out,
         const Run& run) {
        pair_scores(segment_of(segment, B, metric_of(metric), readable), metric_of(metric), pointer<int64_t>(ids),
                    targets, pointer<float>(out), run);
      },
      Release());
  m.def(
      "count_beats",
      [](const SegmentTuple& segment, int metric, int64_t B, Address bounds, int64_t blocks, Address thresholds,
         Address threshold_ids, int64_t targets, Address exclude, Address out, const Run& run) {
        const Segment s = segment_of(segment, B, metric_of(metric), readable);
        if (readable) check_bounds(pointer<int64_t>(bounds), blocks, s.count);
        count_beats(s, metric_of(metric), pointer<int64_t>(bounds), blocks, pointer<float>(thresholds),
                    pointer<int64_t>(threshold_ids), targets, pointer<int64_t>(exclude), pointer<int64_t>(out), run);
      },
      Release());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastcompat's native engine; use it through the fastcompat package";

  static PyObject* non_finite = PyErr_NewException("fastcompat._C.NonFinite", PyExc_ValueError, nullptr);
  m.attr("NonFinite") = py::handle(non_finite);
  static PyObject* overflow = PyErr_NewException("fastcompat._C.Overflow", PyExc_ValueError, nullptr);
  m.attr("Overflow") = py::handle(overflow);
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const NonFinite& e) {
      PyErr_SetObject(non_finite, py::make_tuple(e.side, e.segment, e.row).ptr());
    } catch (const Overflow& e) {
      PyErr_SetObject(overflow, py::make_tuple(e.query).ptr());
    }
  });

  m.def("build", [] {
    py::dict d;
    d["version"] = FASTCOMPAT_VERSION;
    d["compiler"] = FASTCOMPAT_COMPILER;
#ifdef FASTCOMPAT_CUDA
    d["cuda"] = FASTCOMPAT_CUDA_VERSION;
    d["cuda_archs"] = py::str(FASTCOMPAT_CUDA_ARCHS).attr("split")(",");
#else
    d["cuda"] = py::none();
    d["cuda_archs"] = py::list();
#endif
    d["simd_built"] = simd_built();
    return d;
  });
  m.def("cuda_tier", []() -> py::object {  // None: the device decides, or there are no kernels
#ifdef FASTCOMPAT_CUDA
    if (const std::string tier = cuda::tier(); !tier.empty()) return py::str(tier);
#endif
    return py::none();
  });
  m.def("simd_levels", &simd_levels);
  m.def("simd", &simd);
  m.def("set_simd", &set_simd);

  m.def("lowest", [](Address x, int64_t count) {
    const int64_t* first = pointer<int64_t>(x);
    int64_t low = std::numeric_limits<int64_t>::max();
    for (int64_t i = 0; i < count; ++i) low = std::min(low, first[i]);
    return low;
  });
  m.def("packed_size", [](const SegmentTuple& t, int metric) {
    const Segment segment = segment_of(t, 0, metric_of(metric), true);
    return packed_size(segment.keys, segment.count, metric_of(metric));
  });
  m.def(
      "pack",
      [](const SegmentTuple& segment, int metric, Address out, int threads) {
        pack(segment_of(segment, 0, metric_of(metric), true), metric_of(metric), pointer<float>(out), threads);
      },
      Release());
  m.def(
      "softmax_loss",
      [](const ProblemTuple& problem, bool mean, Address loss, Address dquery, Address dkeys, int threads) {
        softmax_loss(problem_of(problem), mean, pointer<float>(loss), pointer<void>(dquery), pointer<void>(dkeys),
                     threads);
      },
      Release());
  define_kernels<int>(m);
#ifdef FASTCOMPAT_CUDA
  py::module_ gpu = m.def_submodule("cuda", "the same kernels on a GPU");
  gpu.def("unusable", &cuda::unusable, py::arg("device"));
  // What nonfinite_code() put into the flag word of a search call: (side, segment, row).
  gpu.def("nonfinite", [](unsigned long long code) {
    return py::make_tuple(code >> 48 & 1 ? "keys" : "query", code >> 49, code & ((1ull << 48) - 1));
  });
  py::class_<GpuRun>(gpu, "Run")
      .def(py::init([](int device, Address stream, int precision, Address scale_factor, py::function scratch) {
        const auto level = static_cast<cuda::Precision>(precision);
        return GpuRun{{device, pointer<void>(stream), level, pointer<float>(scale_factor), nullptr}, scratch};
      }));
  define_kernels<GpuRun>(gpu);
#endif
}
