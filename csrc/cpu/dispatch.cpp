// Which instruction set runs: the best this machine has, or the one FASTCOMPAT_SIMD names.
#include <atomic>
#include <cstdlib>

#include "kernels.h"

#ifdef FASTCOMPAT_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace fastcompat {

extern const Kernels kernels_generic;
#ifdef FASTCOMPAT_X86
extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512bf16, kernels_amx;
#endif

namespace {

struct Level {
  const Kernels* table;
  bool usable;
  bool slower = false;  // than the level before it
};

#ifdef FASTCOMPAT_X86
// Features that __builtin_cpu_supports does not know in every compiler; it does know whether the system saves AVX
// registers.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);  // leaf 1, ECX: F16C
}

bool has_avx512bf16() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);  // leaf 7.1, EAX: AVX512_BF16
}

// A process must ask the kernel for the tile registers before it may use them.
bool has_amx() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  // Leaf 7, EDX: AMX-BF16, AMX-TILE.
  const bool tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);
  return tiles && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

std::vector<Level> detect() {
  std::vector<Level> all = {{&kernels_generic, true}};
#ifdef FASTCOMPAT_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
#ifdef FASTCOMPAT_EMULATE
  for (const Kernels* table : {&kernels_avx2, &kernels_avx512, &kernels_avx512bf16, &kernels_amx})
    all.push_back({table, avx2, table != &kernels_avx2});
  return all;
#endif
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  all.push_back({&kernels_avx2, avx2});
  all.push_back({&kernels_avx512, avx512});
  // Intel issues vdpbf16ps every second cycle: 107 against 214 GFLOP/s of fp32 FMA measured on one core, so widening
  // wins.
  all.push_back({&kernels_avx512bf16, avx512 && has_avx512bf16(), __builtin_cpu_is("intel") != 0});
  all.push_back({&kernels_amx, avx512 && has_avx512bf16() && has_amx()});
#endif
  return all;
}

const std::vector<Level>& levels() {
  static const std::vector<Level> once = detect();
  return once;
}

const Kernels* find(const std::string& name, const std::string& source = "") {
  std::string known;
  for (const Level& level : levels()) {
    if (name == level.table->name) {
      if (level.usable) return level.table;
      throw std::invalid_argument(source + "this machine cannot run the instruction set '" + name + "'");
    }
    known += std::string(known.empty() ? "" : ", ") + level.table->name;
  }
  throw std::invalid_argument(source + "unknown instruction set '" + name + "': expected one of " + known);
}

const Kernels* first_choice() {
  const char* forced = std::getenv("FASTCOMPAT_SIMD");
  if (forced && *forced) return find(forced, "FASTCOMPAT_SIMD: ");
  const Kernels* best = nullptr;
  for (const Level& level : levels())
    if (level.usable && !level.slower) best = level.table;
  return best;
}

std::atomic<const Kernels*> in_use{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* table = in_use.load(std::memory_order_acquire);
  if (!table) {
    table = first_choice();
    in_use.store(table, std::memory_order_release);
  }
  return *table;
}

std::vector<std::string> simd_built() {
  std::vector<std::string> names;
  for (const Level& level : levels()) names.push_back(level.table->name);
  return names;
}

std::vector<std::string> simd_levels() {
  std::vector<std::string> names;
  for (const Level& level : levels())
    if (level.usable) names.push_back(level.table->name);
  return names;
}

std::string simd() { return kernels().name; }

void set_simd(const std::string& name) { in_use.store(find(name), std::memory_order_release); }

}  // namespace fastcompat
