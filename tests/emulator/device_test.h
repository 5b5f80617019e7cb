// Harness of the device tests. A test is a function that fills Buffers, launches and compares with float64; on the CPU
// it runs under several schedules (emu::seed) and the bits of all `same_bits` buffers must agree, on a GPU it runs
// twice.
//   DEVICE_TEST(name) { ... }
// The program takes --seeds 0,1,2,3 and names of tests; it prints a line per test and exits with 1 if any failed.
#pragma once
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "device.h"

namespace device_test {

struct Test {
  const char* name;
  void (*run)();
};
inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}
struct Registered {
  Registered(const char* name, void (*run)()) { tests().push_back({name, run}); }
};

struct Progress {
  long checks = 0, failures = 0;
  double worst = 0;  // error over allowed error
  uint64_t digest = 14695981039346656037u;
};
inline Progress progress;

template <class... A>
void expect(bool ok, const char* format, A... values) {
  ++progress.checks;
  if (ok) return;
  if (++progress.failures > 10) return;
  std::printf("  wrong: ");
  if constexpr (sizeof...(A) == 0)
    std::printf("%s", format);
  else
    std::printf(format, values...);
  std::printf("\n");
}

// |got - truth| <= allowed; infinities and NaN must be equal.
inline void expect_close(double got, double truth, double allowed, const char* what, long i = 0, long j = 0) {
  const bool same = got == truth || (std::isnan(got) && std::isnan(truth));
  const double error = same ? 0 : std::isfinite(got) && std::isfinite(truth) ? std::fabs(got - truth) : INFINITY;
  if (error > 0 && error <= allowed) progress.worst = std::fmax(progress.worst, error / allowed);
  expect(error <= allowed, "%s[%ld, %ld] is %.9g, truth %.9g, allowed error %.3g", what, i, j, got, truth, allowed);
}

// Device memory of exactly this size, at first filled with 0xff (NaN, -1).
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t size) : size_(size) {
    fastcompat::cuda::check(cudaMalloc(&data_, size * sizeof(T)), "cudaMalloc");
    const std::vector<unsigned char> poison(size * sizeof(T), 0xff);
    copy(data_, poison.data(), cudaMemcpyHostToDevice);
  }
  explicit Buffer(const std::vector<T>& host) : Buffer(host.size()) {
    copy(data_, host.data(), cudaMemcpyHostToDevice);
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() const { return data_; }
  size_t size() const { return size_; }
  std::vector<T> host() const {
    std::vector<T> out(size_);
    copy(out.data(), data_, cudaMemcpyDeviceToHost);
    return out;
  }

 private:
  void copy(void* to, const void* from, cudaMemcpyKind kind) const {
    if (size_) fastcompat::cuda::check(cudaMemcpy(to, from, size_ * sizeof(T), kind), "cudaMemcpy");
  }
  T* data_ = nullptr;
  size_t size_;
};

// The values of a result; its bits belong to what every schedule must agree on.
template <class T>
std::vector<T> same_bits(const Buffer<T>& result) {
  auto out = result.host();
  const auto* bytes = reinterpret_cast<const unsigned char*>(out.data());
  for (size_t i = 0; i < out.size() * sizeof(T); ++i) progress.digest = (progress.digest ^ bytes[i]) * 1099511628211u;
  return out;
}

// Normally distributed, the same for the same arguments; rounded to T.
template <class T>
std::vector<T> normal(size_t size, unsigned seed, float sigma = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> values(0, sigma);
  std::vector<T> out(size);
  for (T& v : out) v = T(values(random));
  return out;
}

// For tests of Hopper's kernels: the emulated device is one.
inline void allow_hopper() {
#if CUDA_ON_CPU
  emu::smem_limit = 227 << 10;
  emu::capability = 90;
#endif
}

inline int main(int argc, char** argv) {
  std::vector<unsigned> seeds = {0, 1, 2, 3};
  std::vector<std::string> names;
  for (int i = 1; i < argc; ++i) {
    if (std::string(argv[i]) == "--seeds" && i + 1 < argc) {
      seeds.clear();
      for (char* s = argv[++i]; *s; s += *s == ',') seeds.push_back(static_cast<unsigned>(std::strtoul(s, &s, 10)));
    } else {
      names.push_back(argv[i]);
    }
  }
#if !CUDA_ON_CPU
  seeds.resize(2);  // nothing to choose: the same bits when run again
#endif
  bool ok = true;
  for (const Test& test : tests()) {
    bool wanted = names.empty();
    for (const auto& name : names) wanted |= name == test.name;
    if (!wanted) continue;
    const auto start = std::chrono::steady_clock::now();
    progress = {};
    uint64_t digest = 0;
    for (size_t i = 0; i < seeds.size(); ++i) {
#if CUDA_ON_CPU
      emu::seed = seeds[i];
      emu::counters = {};
#endif
      progress.digest = Progress().digest;
      try {
        test.run();
        fastcompat::cuda::check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
      } catch (const std::exception& e) {
        expect(false, "seed %u: %s", seeds[i], e.what());
        break;
      }
      if (i == 0) digest = progress.digest;
      expect(progress.digest == digest, "seed %u: other bits than seed %u", seeds[i], seeds[0]);
    }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    ok &= progress.failures == 0;
    std::printf("%-6s %-40s %8ld checks, error %.2f of allowed", progress.failures ? "FAILED" : "ok", test.name,
                progress.checks, progress.worst);
#if CUDA_ON_CPU
    std::printf(", %zu bytes shared", emu::counters.smem);
    if (emu::counters.ldmatrix)
      std::printf(", ldmatrix in %.2f rounds", double(emu::counters.ldmatrix_ways) / emu::counters.ldmatrix);
#endif
    std::printf(", %.1f s\n", seconds);
    std::fflush(stdout);
  }
  return ok ? 0 : 1;
}

}  // namespace device_test

#define DEVICE_TEST(name)                                              \
  static void name();                                                  \
  static const device_test::Registered registered_##name(#name, name); \
  static void name()
// What a sanitizer sees in other tests already is left out of its build. Values depend on none of it; races depend
// neither on values nor on sizes, memory depends on sizes.
#define DEVICE_TEST_LEFT_OUT(name) [[maybe_unused]] static void name()
#ifdef __SANITIZE_THREAD__
#define DEVICE_TEST_OF_SIZES DEVICE_TEST_LEFT_OUT
#else
#define DEVICE_TEST_OF_SIZES DEVICE_TEST
#endif
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define DEVICE_TEST_OF_VALUES DEVICE_TEST_LEFT_OUT
#else
#define DEVICE_TEST_OF_VALUES DEVICE_TEST
#endif

int main(int argc, char** argv) { return device_test::main(argc, argv); }
