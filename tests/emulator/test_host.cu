// The host side of the engine: which tier takes a call, on which device's context, with how much shared memory allowed.
// What is launched is recorded and does not run. CMakeLists.txt runs this under each FASTCOMPAT_CUDA_TIER as well.
#include <thread>

#include "device_test.h"
#include "tiers.h"

using namespace fastcompat;
using namespace device_test;

#if CUDA_ON_CPU
namespace fastcompat::cuda {
void forget_devices();
}

namespace {

struct Record {
  unsigned threads;
  std::vector<int> device;
};
std::vector<Record> launches;

void record(const void*, dim3 block, size_t) { launches.push_back({block.x, emu::current}); }

void become(int capability) {
  emu::capability = capability;
  emu::smem_limit = (capability == 90 ? 227 : 99) << 10;
  cuda::forget_devices();
}

// Threads of the largest block of a call: Hopper's kernels have 384, the portable ones at most 256.
template <class Call>
unsigned most_threads(Call call) {
  launches.clear();
  emu::recorder = record;
  try {
    call();
  } catch (...) {
    emu::recorder = nullptr;
    throw;
  }
  emu::recorder = nullptr;
  unsigned most = 0;
  for (const Record& r : launches) most = std::max(most, r.threads);
  return most;
}

struct Calls {
  std::vector<char> memory = std::vector<char>(64 << 20);
  int device = 0;
  DType dtype = DType::bf16;

  Matrix rows(int64_t n) { return {aligned(), dtype, n, 64, 64}; }
  char* aligned() { return memory.data() + (-reinterpret_cast<uintptr_t>(memory.data()) & 255); }
  template <class T>
  T* some() {
    return reinterpret_cast<T*>(aligned());
  }
  cuda::Launch launch() { return {device, nullptr, cuda::Precision::exact, nullptr, aligned()}; }
  void statistics() {
    const SoftmaxProblem p{rows(200), rows(300), 1.0f, nullptr, nullptr, nullptr, some<int64_t>(), nullptr};
    cuda::softmax_stats(p, {some<float>(), some<float>(), some<float>(), some<int64_t>(), some<float>()}, launch());
  }
  void search() {
    const Segment s{rows(200), rows(300), nullptr, 300, 1.0f, 0.0f};
    cuda::topk({s}, 5, Metric::ip, {}, some<float>(), some<int64_t>(), launch());
  }
};

}  // namespace

DEVICE_TEST_OF_VALUES(the_tier_follows_the_device_the_problem_and_the_environment) {
  const std::string chosen = cuda::tier();
  Calls calls;
  for (const int capability : {80, 90, 100}) {
    become(capability);
    const bool refused = chosen == "sm90" && capability != 90;
    expect(cuda::unusable(0).empty() != refused, "capability %d: %s", capability, cuda::unusable(0).c_str());
    if (refused) continue;
    const bool hopper = capability == 90 && chosen != "sm80";
    calls.dtype = DType::bf16;
    expect((most_threads([&] { calls.statistics(); }) == 384) == hopper, "statistics, capability %d", capability);
    expect((most_threads([&] { calls.search(); }) == 384) == hopper, "search, capability %d", capability);
    calls.dtype = DType::f32;  // which Hopper's statistics do not cover
    expect(most_threads([&] { calls.statistics(); }) == 256, "float32, capability %d", capability);
  }
  become(80);
}

DEVICE_TEST_OF_VALUES(a_fresh_thread_works_in_the_context_of_its_device_and_makes_no_other) {
  become(90);
  if (cuda::tier() == "sm90" && !cuda::unusable(0).empty()) return;
  emu::contexts.clear();
  std::vector<int> left = {7};
  std::thread([&] {
    Calls calls;
    calls.device = 1;
    most_threads([&] { calls.statistics(); });
    left = emu::current;
  }).join();
  expect(!launches.empty() && left.empty(), "a context is left behind");
  for (const Record& r : launches) expect(r.device == std::vector<int>{1}, "a launch outside of the device's context");
  expect(emu::contexts.count(0) == 0, "device 0 got a context");
  become(80);
}

DEVICE_TEST_OF_VALUES(a_device_is_asked_once_whether_it_can_run_the_kernels) {
  become(80);
  const int before = emu::driver_questions;
  for (int n = 0; n < 5; ++n) cuda::unusable(0);
  expect(emu::driver_questions == before + 1, "asked %d times", emu::driver_questions - before);
}
#endif

__global__ void fill_kernel(float* out, int words) {
  DYN_SMEM(smem);
  float* all = reinterpret_cast<float*>(smem);
  for (int i = threadIdx.x; i < words; i += 32) all[i] = static_cast<float>(i);
  __syncwarp();
  if (threadIdx.x == 0) out[blockIdx.x] = all[words - 1];
}

// What a kernel is allowed belongs to the kernel: a small launch must not take it from a large one beside it.
DEVICE_TEST_OF_VALUES(shared_memory_is_allowed_once_and_to_the_most_that_a_block_may_have) {
  device_test::Buffer<float> out(1);
#if CUDA_ON_CPU
  const int before = emu::allowances_set;
#endif
  for (const int kib : {90, 50, 10, 90, 60}) {
    cuda::launch(fill_kernel, dim3(1), dim3(32), size_t(kib) << 10, nullptr, out.data(), kib << 8);
    expect(same_bits(out)[0] == static_cast<float>((kib << 8) - 1), "%d KiB", kib);
  }
#if CUDA_ON_CPU
  expect(emu::allowances_set - before <= 1, "set %d times", emu::allowances_set - before);
  const auto* kernel = reinterpret_cast<const void*>(fill_kernel);
  expect(emu::allowance[kernel] == int(emu::smem_limit), "%d bytes are allowed", emu::allowance[kernel]);
#endif
}
