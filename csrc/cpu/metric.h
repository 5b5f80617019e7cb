// What a metric is to the CPU engine. Kernels ask its form and never its name, so that the compiler points at the one
// place that a new metric must fill (-Werror=switch).
#pragma once
#include "../fastcompat.h"

namespace {

struct MetricForm {
  bool differences;  // sums (q - k)^2, and the score falls as the sum grows; otherwise sums q * k
  bool normalised;   // both rows are divided by their norms
};

constexpr MetricForm form_of(fastcompat::Metric metric) {
  switch (metric) {
    case fastcompat::Metric::cosine:
      return {false, true};
    case fastcompat::Metric::ip:
      return {false, false};
    case fastcompat::Metric::l2:
      return {true, false};
  }
  __builtin_unreachable();
}

}  // namespace
