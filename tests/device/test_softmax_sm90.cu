// The Hopper tier's softmax kernels against float64. Allowed: twice the error of the eager expression in the same
// dtype.
#include "softmax_sm90.h"
#include "softmax_truth.h"

using namespace softmax_truth;

namespace {

struct Problem {
  Buffer<float> bias, factor;
  Buffer<int64_t> query_labels, key_labels, positive, exclude;
  SoftmaxProblem p;

  explicit Problem(const Setup& s)
      : bias(s.bias),
        factor(s.factor),
        query_labels(s.query_labels),
        key_labels(s.key_labels),
        positive(s.positive),
        exclude(s.exclude),
        p{s.query.matrix,
          s.keys.matrix,
          s.c.scale,
          s.c.bias ? bias.data() : nullptr,
          s.c.labels ? query_labels.data() : nullptr,
          s.c.labels ? key_labels.data() : nullptr,
          s.c.positive ? positive.data() : nullptr,
          s.c.exclude ? exclude.data() : nullptr} {}
};

Results stats(const Setup& s, bool want_mean) {
  const Problem problem(s);
  const int64_t B = s.c.B;
  Launch launch{0, nullptr, Precision::exact, problem.factor.data(), nullptr};
  const Buffer<float> neg_lse(B), pos_lse(B), pos_sum(B), mean(want_mean ? B * s.c.D : 0);
  const Buffer<int64_t> count(B);
  expect(sm90::covers_stats(problem.p), "statistics are not covered");
  const Buffer<uint8_t> scratch(sm90::softmax_stats_scratch(problem.p, want_mean, launch));
  launch.scratch = scratch.data();
  sm90::softmax_stats(problem.p,
                      {neg_lse.data(), pos_lse.data(), pos_sum.data(), count.data(), want_mean ? mean.data() : nullptr},
                      launch);
  Results r;
  r.neg_lse = doubles(same_bits(neg_lse));
  r.pos_lse = doubles(same_bits(pos_lse));
  r.pos_sum = doubles(same_bits(pos_sum));
  r.count = doubles(same_bits(count));
  r.mean = doubles(same_bits(mean));
  return r;
}

// Log-sum-exps are the true ones; NaN arrives at rows whose set is empty.
Results key_grad(const Setup& s, const Results& truth, bool want_bias = true) {
  const Problem problem(s);
  auto floats = [](const std::vector<double>& v) { return std::vector<float>(v.begin(), v.end()); };
  auto arriving = [&](std::vector<float> g, const std::vector<double>& lse) {
    for (int i = 0; i < s.c.B; ++i)
      if (lse[i] == -kInfinity) g[i] = NAN;
    return g;
  };
  const Buffer<float> neg_lse(floats(truth.neg_lse)), pos_lse(floats(truth.pos_lse)),
      g_neg(arriving(s.g_neg, truth.neg_lse)), g_pos(arriving(s.g_pos, truth.pos_lse)),
      g_sum(arriving(s.g_sum, truth.pos_lse)), dbias(want_bias ? s.c.N : 0);
  const SoftmaxGrads grads{neg_lse.data(), pos_lse.data(), s.none_arrives ? nullptr : g_neg.data(), g_pos.data(),
                           g_sum.data()};
  const Buffer<uint8_t> dkeys(size_t(2) * s.c.N * s.c.D);
  Launch launch{0, nullptr, Precision::exact, problem.factor.data(), nullptr};
  expect(sm90::covers_key_grad(problem.p, true), "the key gradient is not covered");
  const Buffer<uint8_t> scratch(sm90::softmax_key_grad_scratch(problem.p, grads, true, want_bias, launch));
  launch.scratch = scratch.data();
  sm90::softmax_key_grad(problem.p, grads, dkeys.data(), want_bias ? dbias.data() : nullptr, launch);
  Results r;
  r.dkeys = numbers(dkeys, s.c.dtype);
  r.dbias = doubles(same_bits(dbias));
  return r;
}

void compare_stats(const Results& got, const Results& upcast, const Results& truth, double scale) {
  const double floor = std::ldexp(4.0 * std::fabs(scale), -23);
  compare("neg_lse", got.neg_lse, upcast.neg_lse, truth.neg_lse, floor);
  compare("pos_lse", got.pos_lse, upcast.pos_lse, truth.pos_lse, floor);
  compare("pos_sum", got.pos_sum, upcast.pos_sum, truth.pos_sum, floor);
  compare("count", got.count, truth.count, truth.count, 0);
}

void check(const Setup& s) {
  device_test::allow_hopper();
  const Results eager = s.eager(), upcast = s.upcast(), truth = s.truth();
  const double eps = std::ldexp(1.0, -23);
  compare_stats(stats(s, false), upcast, truth, s.c.scale);
  const Results got = stats(s, true), keys = key_grad(s, truth);
  compare_stats(got, upcast, truth, s.c.scale);
  compare("mean", got.mean, eager.mean, truth.mean, 2 * eps);
  compare("dkeys", keys.dkeys, eager.dkeys, truth.dkeys, 2 * eps * std::fabs(s.c.scale));
  compare("dbias", keys.dbias, eager.dbias, truth.dbias, 2 * eps);
}
void check(const Case& c) { check(Setup(c)); }

}  // namespace

// Every kernel, with more tiles than most rings have stages.
DEVICE_TEST(every_kernel) {
  for (Case c :
       {Case{70, 900, 16}, Case{130, 500, 72, DType::f16}, Case{140, 330, 136}, Case{70, 300, 264, DType::f16}}) {
    c.labels = kFew;
    c.bias = c.exclude = true;
    check(c);
  }
}

// {B, N, D}: one row, one column, tails of rows, tiles and columns; several tiles, splits and clusters.
DEVICE_TEST_OF_SIZES(sizes) {
  for (const Case& c : {Case{1, 2, 64}, Case{33, 65, 8}, Case{130, 200, 72}, Case{20, 700, 128}, Case{140, 100, 256},
                        Case{70, 300, 200}, Case{70, 300, 512}})
    check(c);
}

DEVICE_TEST_OF_SIZES(many_tiles) {
  for (const Case& c : {Case{270, 900, 16}, Case{900, 270, 16}}) check(c);
}

DEVICE_TEST_OF_SIZES(fp16_sizes) {
  for (Case c : {Case{33, 270, 64}, Case{130, 70, 136}, Case{20, 300, 264}}) {
    c.dtype = DType::f16;
    c.labels = kFew;
    c.exclude = true;
    check(c);
  }
}

DEVICE_TEST_OF_VALUES(members) {
  for (const Labels labels : {kNone, kFew, kMany, kSingle, kNegative})
    for (int options = 0; options < 8; options += labels == kFew ? 1 : 3) {
      Case c{37, 200, 24};
      c.labels = labels;
      c.bias = options & 1;
      c.positive = options & 2;
      c.exclude = options & 4;
      check(c);
    }
}

// The same choices where two warpgroups share a row.
DEVICE_TEST_OF_SIZES(members_of_wide_rows) {
  for (int options = 0; options < 8; options += 3) {
    Case c{70, 150, 264};
    c.labels = options ? kMany : kNone;
    c.bias = options & 1;
    c.positive = options & 2;
    c.exclude = options & 4;
    check(c);
  }
}

DEVICE_TEST_OF_SIZES(strides) {
  Case c{140, 70, 120};
  c.padding = 16;
  c.offset = 8;
  check(c);
}

DEVICE_TEST_OF_VALUES(negative_scale) {
  Case c{20, 300, 64};
  c.scale = -8.0f;
  check(c);
}

// As in the reference: the row's statistics are NaN, and it sends no gradient, whatever arrives at it.
DEVICE_TEST_OF_SIZES(index_out_of_range) {
  for (const DType dtype : {DType::bf16, DType::f16})
    for (const bool of_positive : {true, false}) {
      device_test::allow_hopper();
      Case c{37, 75, 24, dtype};
      c.positive = c.exclude = true;
      Setup s(c);
      s.positive[11] = 3, s.exclude[11] = 5;
      const Results truth = s.truth(), good = stats(s, true);
      for (auto* g : {&s.g_neg, &s.g_pos, &s.g_sum}) (*g)[11] = 0;
      const Results good_keys = key_grad(s, truth);
      (of_positive ? s.positive : s.exclude)[11] = of_positive ? 75 : -(int64_t{1} << 40);
      for (auto* g : {&s.g_neg, &s.g_pos, &s.g_sum}) (*g)[11] = of_positive ? NAN : 1e30f;
      const Results got = stats(s, true);
      Results found = truth;
      found.neg_lse[11] = found.pos_lse[11] = NAN;
      const Results got_keys = key_grad(s, found);
      compare("count", got.count, good.count, good.count, 0);
      compare("dkeys", got_keys.dkeys, good_keys.dkeys, good_keys.dkeys, 0);
      compare("dbias", got_keys.dbias, good_keys.dbias, good_keys.dbias, 0);
      for (int i = 0; i < c.B; ++i) {
        expect_close(got.neg_lse[i], i == 11 ? NAN : good.neg_lse[i], 0, "neg_lse", i);
        expect_close(got.pos_lse[i], i == 11 ? NAN : good.pos_lse[i], 0, "pos_lse", i);
        expect_close(got.pos_sum[i], i == 11 ? NAN : good.pos_sum[i], 0, "pos_sum", i);
        for (int d = 0; d < c.D; ++d) {
          const size_t at = size_t(i) * c.D + d;
          expect_close(got.mean[at], i == 11 ? NAN : good.mean[at], 0, "mean", i, d);
        }
      }
    }
}

// Logits of thousands, in rising order: the maximum moves with every tile.
DEVICE_TEST_OF_VALUES(large_logits) {
  device_test::allow_hopper();
  for (const DType dtype : {DType::bf16, DType::f16}) {
    Case c{5, 700, dtype == DType::bf16 ? 64 : 264, dtype};
    c.scale = 1.0f;
    c.bias = true;
    Setup s(c);
    for (int j = 0; j < c.N; ++j) s.bias[j] = 4.0f * float(j) - 1000;
    const Results got = stats(s, true), truth = s.truth();
    compare("neg_lse", got.neg_lse, truth.neg_lse, truth.neg_lse, 4e-4);
    compare("mean", got.mean, truth.mean, truth.mean, 8e-3);
  }
}

// Infinities and NaN come through: a key that is NaN makes every row NaN, +inf makes it +inf.
DEVICE_TEST_OF_VALUES(not_finite) {
  device_test::allow_hopper();
  for (const float value : {float(NAN), INFINITY})
    for (int j : {0, 5, 130, 299}) {
      Case c{20, 300, 64};
      c.bias = true;
      Setup s(c);
      s.bias[j] = value;
      for (const bool want_mean : {false, true}) {
        const Results got = stats(s, want_mean);
        for (int i = 0; i < c.B; ++i) expect_close(got.neg_lse[i], value, 0, "neg_lse", i, j);
      }
    }
}

// Gradients from 1e-12 to 1e9 meet fp16's narrow range.
DEVICE_TEST_OF_VALUES(fp16_scales_of_gradients) {
  device_test::allow_hopper();
  for (const float size : {1e-12f, 3e-6f, 1e4f, 1e9f}) {
    Case c{20, 70, 16, DType::f16};
    c.labels = kFew;
    Setup s(c);
    for (auto* g : {&s.g_neg, &s.g_pos, &s.g_sum})
      for (float& x : *g) x *= size;
    const Results truth = s.truth(), got = key_grad(s, truth);
    double largest = 0;
    for (const double x : truth.dbias) largest = std::fmax(largest, std::fabs(x));
    compare("dbias", got.dbias, truth.dbias, truth.dbias, 1e-3 * largest);
    for (size_t i = 0; i < truth.dkeys.size(); ++i)
      if (std::fabs(truth.dkeys[i]) < 6e4)
        expect_close(got.dkeys[i], truth.dkeys[i], 2e-3 * largest * c.scale + 3e-8, "dkeys", long(i));
  }
}

DEVICE_TEST_OF_VALUES(not_covered) {
  Case c{20, 30, 64};
  const Setup s(c);
  const Problem problem(s);
  const auto refused = [&](auto change) {
    SoftmaxProblem p = problem.p;
    change(p);
    return !sm90::covers_stats(p) && !sm90::covers_key_grad(p, true);
  };
  expect(!refused([](SoftmaxProblem&) {}), "a plain problem is refused");
  expect(refused([](SoftmaxProblem& p) { p.query.dtype = p.keys.dtype = DType::f32; }), "float32 is taken");
  expect(refused([](SoftmaxProblem& p) { p.query.dim = p.keys.dim = 520; }), "520 columns are taken");
  expect(refused([](SoftmaxProblem& p) { p.query.dim = p.keys.dim = 60; }), "60 columns are taken");
  expect(refused([](SoftmaxProblem& p) { p.keys.stride = 0; }), "stride 0 is taken");
  expect(refused([](SoftmaxProblem& p) { p.keys.stride = 68; }), "stride 68 is taken");
  expect(refused([](SoftmaxProblem& p) { p.query.rows = 0; }), "no queries are taken");
  expect(refused([](SoftmaxProblem& p) { p.keys.data = static_cast<const char*>(p.keys.data) + 2; }), "2 bytes off");
  expect(!sm90::covers_key_grad(problem.p, false), "a key gradient nobody wants is taken");
}

// Tiles and splits without a negative or a positive, logits far from zero, keys that never count: as the formulas say
// where float has digits for that, and never NaN.
DEVICE_TEST_OF_VALUES(sorted_keys_far_from_zero) {
  device_test::allow_hopper();
  for (const Case& c : {Case{2, 400, 16}, Case{2, 300, 264, DType::f16}}) {
    sorted_keys(c, {-1000.0f, 1000.0f, -INFINITY}, [](const Setup& s, float level) {
      const Results truth = s.truth(), got = stats(s, true), alone = stats(s, false), keys = key_grad(s, truth);
      const double size = std::ldexp(std::isfinite(level) ? 1000.0 : 32.0, -20);
      for (const Results& r : {got, alone}) {
        compare("neg_lse", r.neg_lse, truth.neg_lse, truth.neg_lse, size);
        compare("pos_lse", r.pos_lse, truth.pos_lse, truth.pos_lse, size);
        compare("pos_sum", r.pos_sum, truth.pos_sum, truth.pos_sum, size * s.c.N);
        compare("count", r.count, truth.count, truth.count, 0);
      }
      compare("mean", got.mean, truth.mean, truth.mean, size + 0.02);
      compare("dkeys", keys.dkeys, truth.dkeys, truth.dkeys, s.c.scale * (size + 0.02));
      compare("dbias", keys.dbias, truth.dbias, truth.dbias, 4 * (size + 0.02));
    });
    sorted_keys(c, {-1e30f, 1e30f}, [](const Setup& s, float) {
      const Results got = stats(s, true), keys = key_grad(s, got);
      for (const auto& values : {got.neg_lse, got.pos_lse, got.pos_sum, got.mean, keys.dkeys, keys.dbias})
        expect_numbers("a result", values);
    });
  }
}

// Logits of 1e28 that come out of products, and log-sum-exps of them that change their base twice.
DEVICE_TEST_OF_VALUES(huge_products) {
  device_test::allow_hopper();
  for (const int D : {64, 512}) {
    Case c{20, 300, D};
    c.labels = kFew;
    c.scale = 1e28f;
    const Setup s(c);
    const Results got = stats(s, true), keys = key_grad(s, got);
    for (const auto& values : {got.neg_lse, got.pos_lse, got.pos_sum, got.mean, keys.dkeys, keys.dbias})
      expect_numbers("a result", values);
    for (const double x : keys.dbias) expect(std::fabs(x) < 1e4, "a coefficient is %g", x);
  }
}
