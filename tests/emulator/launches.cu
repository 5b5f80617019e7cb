// What the engine launches at working sizes on the GPU that the arguments describe, for report.py: nothing runs.
//   launches CAPABILITY SHARED_MEMORY MULTIPROCESSORS
// prints "kernel D threads shared-memory" for every launch, the kernel's name mangled.
#include <dlfcn.h>

#include <cstdio>

#include "device.h"
#include "engine.h"

using namespace fastcompat;

namespace {

constexpr int64_t kQueries = 4096, kKeys = 65536;
int64_t dim;
char* anything;  // zeros, as many as are asked for

template <class T>
T* some() {
  return reinterpret_cast<T*>(anything);
}

void print(const void* kernel, dim3 block, size_t smem) {
  Dl_info symbol;
  if (!dladdr(kernel, &symbol) || !symbol.dli_sname) throw std::runtime_error("a kernel without a name");
  std::printf("%s %ld %u %zu\n", symbol.dli_sname, long(dim), block.x, smem);
}

void training(DType dtype, bool by_label) {
  const Matrix query{anything, dtype, kQueries, dim, dim}, keys{anything, dtype, kKeys, dim, dim};
  const int64_t *labels = by_label ? some<int64_t>() : nullptr, *positive = by_label ? nullptr : some<int64_t>();
  const SoftmaxProblem p{query, keys, 1.0f, some<float>(), labels, labels, positive, nullptr};
  const SoftmaxGrads grads{some<float>(), some<float>(), some<float>(), some<float>(), some<float>()};
  const cuda::Launch launch{0, nullptr, cuda::Precision::exact, nullptr, anything};
  for (float* mean : {static_cast<float*>(nullptr), some<float>()})
    cuda::softmax_stats(p, {some<float>(), some<float>(), some<float>(), some<int64_t>(), mean}, launch);
  cuda::softmax_query_grad(p, grads, some<float>(), anything, some<float>(), launch);
  cuda::softmax_key_grad(p, grads, anything, some<float>(), launch);
}

void search(DType dtype, int64_t queries) {
  constexpr int64_t kBest = 100;
  const Segment s{{anything, dtype, queries, dim, dim}, {anything, dtype, kKeys, dim, dim}, nullptr, kKeys, 1.0f, 0.0f};
  const cuda::Launch launch{0, nullptr, cuda::Precision::exact, nullptr, anything};
  cuda::topk({s}, kBest, Metric::cosine, {}, some<float>(), some<int64_t>(), launch);
  cuda::pair_scores(s, Metric::cosine, some<int64_t>(), kBest, some<float>(), launch);
  cuda::count_beats(s, Metric::cosine, some<int64_t>(), 2, some<float>(), some<int64_t>(), kBest, nullptr,
                    some<int64_t>(), launch);
}

}  // namespace

int main(int, char** arguments) {
  emu::capability = std::atoi(arguments[1]);
  emu::smem_limit = std::atoi(arguments[2]);
  emu::multiprocessors = std::atoi(arguments[3]);
  emu::recorder = print;
  anything = static_cast<char*>(
      mmap(nullptr, size_t{1} << 38, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (anything == MAP_FAILED) return 1;
  for (const int64_t d : {64, 128, 256, 512, 1024})
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      dim = d;
      training(dtype, true);
      training(dtype, false);
      search(dtype, 128);
      search(dtype, kQueries);
    }
}
