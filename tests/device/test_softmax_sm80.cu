// Softmax statistics and gradients of the portable tier. The rule: the error is at most twice that of the eager
// expression in the same dtype (every product's operands and result rounded to it; statistics: of the embeddings as
// floats), plus a few roundings of the largest number met.
#include "softmax_sm80.h"
#include "softmax_truth.h"

using namespace softmax_truth;

namespace {

// Every kernel on one problem; scratch of exactly the size asked for.
Results run(const Setup& s, bool want_mean = true, const char* without = "") {
  const Case& c = s.c;
  const Buffer<float> bias(s.bias), factor(s.factor);
  const Buffer<int64_t> query_labels(s.query_labels), key_labels(s.key_labels), positive(s.positive),
      exclude(s.exclude);
  const SoftmaxProblem p{s.query.matrix,
                         s.keys.matrix,
                         c.scale,
                         c.bias ? bias.data() : nullptr,
                         c.labels ? query_labels.data() : nullptr,
                         c.labels ? key_labels.data() : nullptr,
                         c.positive ? positive.data() : nullptr,
                         c.exclude ? exclude.data() : nullptr};
  Launch launch{0, nullptr, c.precision, factor.data(), nullptr};
  Buffer<float> neg_lse(c.B), pos_lse(c.B), pos_sum(c.B), mean(want_mean ? size_t(c.B) * c.D : 0), dscale(c.B),
      dbias(c.N);
  Buffer<int64_t> count(c.B);
  Results r;
  const SoftmaxStats stats{neg_lse.data(), pos_lse.data(), pos_sum.data(), count.data(),
                           want_mean ? mean.data() : nullptr};
  {
    const Buffer<uint8_t> scratch(sm80::softmax_stats_scratch(p, want_mean, launch));
    launch.scratch = scratch.data();
    sm80::softmax_stats(p, stats, launch);
  }
  r.neg_lse = doubles(same_bits(neg_lse));
  r.pos_lse = doubles(same_bits(pos_lse));
  r.pos_sum = doubles(same_bits(pos_sum));
  r.count = doubles(same_bits(count));
  r.mean = doubles(same_bits(mean));
  if (!want_mean) return r;

  // NaN arrives at rows whose set is empty.
  auto arriving = [&](std::vector<float> g, const std::vector<double>& lse) {
    for (int i = 0; i < c.B; ++i)
      if (lse[i] == -kInfinity) g[i] = NAN;
    return g;
  };
  const Buffer<float> g_neg(arriving(s.g_neg, r.neg_lse)), g_pos(arriving(s.g_pos, r.pos_lse)),
      g_sum(arriving(s.g_sum, r.pos_lse));
  const SoftmaxGrads grads{neg_lse.data(), pos_lse.data(), s.none_arrives ? nullptr : g_neg.data(), g_pos.data(),
                           g_sum.data()};
  const size_t size = c.dtype == DType::f32 ? 4 : 2;
  const bool want_keys = std::string(without) != "dkeys", want_bias = std::string(without) != "dbias";
  const Buffer<uint8_t> dquery(size * c.B * c.D), dkeys(want_keys ? size * c.N * c.D : 0);
  {
    const Buffer<uint8_t> scratch(sm80::softmax_query_grad_scratch(p, grads, launch));
    launch.scratch = scratch.data();
    sm80::softmax_query_grad(p, grads, mean.data(), dquery.data(), dscale.data(), launch);
  }
  {
    const Buffer<uint8_t> scratch(sm80::softmax_key_grad_scratch(p, grads, want_keys, want_bias, launch));
    launch.scratch = scratch.data();
    sm80::softmax_key_grad(p, grads, want_keys ? dkeys.data() : nullptr, want_bias ? dbias.data() : nullptr, launch);
  }
  r.dquery = numbers(dquery, c.dtype);
  r.dscale = doubles(same_bits(dscale));
  r.dkeys = numbers(dkeys, c.dtype);
  if (want_bias) r.dbias = doubles(same_bits(dbias));
  return r;
}

void check(const Setup& s) {
  const Results got = run(s), eager = s.eager(), upcast = s.upcast(), truth = s.truth();
  const double eps = std::ldexp(1.0, -23), z = 4.0 * s.c.scale;
  compare("neg_lse", got.neg_lse, upcast.neg_lse, truth.neg_lse, eps * z);
  compare("pos_lse", got.pos_lse, upcast.pos_lse, truth.pos_lse, eps * z);
  compare("pos_sum", got.pos_sum, upcast.pos_sum, truth.pos_sum, eps * z);
  compare("count", got.count, truth.count, truth.count, 0);
  compare("mean", got.mean, eager.mean, truth.mean, 2 * eps);
  compare("dquery", got.dquery, eager.dquery, truth.dquery, 2 * eps * s.c.scale);
  compare("dscale", got.dscale, eager.dscale, truth.dscale, 2 * eps);
  compare("dkeys", got.dkeys, eager.dkeys, truth.dkeys, 2 * eps * s.c.scale);
  compare("dbias", got.dbias, eager.dbias, truth.dbias, 2 * eps);
  const Results alone = run(s, false);
  compare("neg_lse alone", alone.neg_lse, upcast.neg_lse, truth.neg_lse, eps * z);
  compare("pos_lse alone", alone.pos_lse, upcast.pos_lse, truth.pos_lse, eps * z);
  compare("pos_sum alone", alone.pos_sum, upcast.pos_sum, truth.pos_sum, eps * z);
}
void check(const Case& c) { check(Setup(c)); }

}  // namespace

// Every kernel, with more pieces than the ring has stages.
DEVICE_TEST(every_kernel) {
  for (Case c : {Case{2, 130, 8}, Case{66, 70, 8, DType::f16}, Case{2, 5, 8, DType::f32}}) {
    c.labels = kFew;
    c.bias = c.exclude = true;
    check(c);
  }
}

// {B, N, D}: one tile and its tails; wide and narrow tiles.
DEVICE_TEST_OF_SIZES(bf16_sizes) {
  for (const Case& c : {Case{1, 1, 1}, Case{3, 65, 7}, Case{66, 130, 72}}) check(c);
}

// More than one split of the streamed rows, of keys and of queries.
DEVICE_TEST_OF_SIZES(bf16_splits) {
  for (Case c : {Case{3, 900, 8}, Case{66, 450, 8}, Case{900, 5, 8}}) {
    c.labels = kMany;
    c.bias = true;
    check(c);
  }
}

// More columns than one block's registers hold.
DEVICE_TEST_OF_SIZES(bf16_many_columns) {
  for (Case c : {Case{66, 3, 264}, Case{2, 3, 520}, Case{2, 3, 1030}}) {
    c.labels = kFew;
    check(c);
  }
}

DEVICE_TEST_OF_SIZES(fp16_sizes) {
  for (Case c : {Case{1, 3, 8}, Case{66, 70, 33}}) {
    c.dtype = DType::f16;
    c.exclude = true;
    check(c);
  }
}

// Gradients from 1e-12 to 1e9 meet fp16's narrow range.
DEVICE_TEST_OF_VALUES(fp16_scales_of_gradients) {
  for (const float size : {1e-12f, 3e-6f, 1e9f}) {
    Case c{5, 20, 8, DType::f16};
    c.labels = kFew;
    Setup s(c);
    for (auto* g : {&s.g_neg, &s.g_pos, &s.g_sum})
      for (float& x : *g) x *= size;
    const Results got = run(s), truth = s.truth();
    double largest = 0;
    for (const double x : truth.dbias) largest = std::fmax(largest, std::fabs(x));
    compare("dbias", got.dbias, truth.dbias, truth.dbias, 1e-3 * largest);
    for (size_t i = 0; i < truth.dkeys.size(); ++i)
      if (std::fabs(truth.dkeys[i]) < 6e4)
        expect_close(got.dkeys[i], truth.dkeys[i], 2e-3 * largest * c.scale + 3e-8, "dkeys", long(i));
  }
}

DEVICE_TEST_OF_SIZES(fp32_exact) {
  for (Case c : {Case{1, 2, 3}, Case{66, 70, 20}, Case{2, 5, 130}}) {
    c.dtype = DType::f32;
    c.labels = kFew;
    check(c);
  }
}

DEVICE_TEST_OF_VALUES(fp32_high_and_fast) {
  for (const Precision precision : {Precision::high, Precision::fast}) {
    Case c{5, 70, 65, DType::f32, precision};
    c.labels = kMany;
    check(c);
  }
}

DEVICE_TEST_OF_VALUES(members) {
  for (const Labels labels : {kNone, kFew, kMany, kSingle, kNegative})
    for (int options = 0; options < 8; options += labels == kFew ? 1 : 5) {
      Case c{20, 70, 8};
      c.labels = labels;
      c.bias = options & 1;
      c.positive = options & 2;
      c.exclude = options & 4;
      check(c);
    }
}

DEVICE_TEST_OF_SIZES(strides) {
  for (const auto& [dtype, padding, offset] :
       {std::tuple{DType::bf16, 8, 8}, {DType::bf16, 8, 1}, {DType::bf16, 3, 0}, {DType::f32, 3, 1}}) {
    Case c{5, 20, 16, dtype};
    c.padding = padding;
    c.offset = offset;
    c.labels = kFew;
    check(c);
  }
}

// Every row of the keys is the same one: a stride of 0.
DEVICE_TEST_OF_VALUES(stride_zero) {
  const Case c{5, 70, 24};
  Setup s(c);
  s.keys.matrix.stride = 0;
  for (size_t i = c.D; i < s.keys.value.size(); ++i) s.keys.value[i] = s.keys.value[i - c.D];
  check(s);
}

DEVICE_TEST_OF_SIZES(empty) {
  for (Case c : {Case{0, 5, 8}, Case{5, 0, 8}, Case{0, 0, 8}}) {
    c.labels = kFew;
    check(c);
  }
}

// A caller who wants less gets the same of what is left.
DEVICE_TEST_OF_SIZES(outputs_left_out) {
  for (const bool positive : {false, true}) {
    Case c{20, 30, 8, positive ? DType::f32 : DType::bf16};
    c.labels = kMany;
    c.positive = positive;
    Setup s(c);
    const Results all = run(s);
    compare("dbias", run(s, true, "dkeys").dbias, all.dbias, all.dbias, 0);
    compare("dkeys", run(s, true, "dbias").dkeys, all.dkeys, all.dkeys, 0);
    s.none_arrives = true;
    check(s);
  }
}

// Tiles without a positive are skipped, the ones with one are found wherever it lies.
DEVICE_TEST_OF_VALUES(rare_positives) {
  Case c{70, 900, 8};
  c.labels = kMany;
  Setup s(c);
  s.none_arrives = true;
  for (auto& label : s.key_labels) label = -1;
  for (const int j : {0, 127, 128, 700, 899}) s.key_labels[j] = s.query_labels[j % c.B];
  check(s);
}

// As in the reference: the row's statistics are NaN, and it sends no gradient, whatever arrives at it.
DEVICE_TEST_OF_SIZES(index_out_of_range) {
  for (const DType dtype : {DType::bf16, DType::f16})
    for (const bool of_positive : {true, false}) {
      Case c{13, 20, 8, dtype};
      c.positive = c.exclude = true;
      Setup s(c);
      s.positive[11] = 3, s.exclude[11] = 5;
      for (auto* g : {&s.g_neg, &s.g_pos, &s.g_sum}) (*g)[11] = 0;
      const Results good = run(s);
      (of_positive ? s.positive : s.exclude)[11] = of_positive ? 20 : -(int64_t{1} << 62);
      for (auto* g : {&s.g_neg, &s.g_pos, &s.g_sum}) (*g)[11] = of_positive ? NAN : 1e30f;
      const Results got = run(s);
      for (int i = 0; i < c.B; ++i) {
        expect_close(got.neg_lse[i], i == 11 ? NAN : good.neg_lse[i], 0, "neg_lse", i);
        expect_close(got.pos_lse[i], i == 11 ? NAN : good.pos_lse[i], 0, "pos_lse", i);
        expect_close(got.pos_sum[i], i == 11 ? NAN : good.pos_sum[i], 0, "pos_sum", i);
        for (int d = 0; d < c.D; ++d) {
          const size_t at = size_t(i) * c.D + d;
          expect_close(got.mean[at], i == 11 ? NAN : good.mean[at], 0, "mean", i, d);
        }
      }
      compare("count", got.count, good.count, good.count, 0);
      compare("dquery", got.dquery, good.dquery, good.dquery, 0);
      compare("dscale", got.dscale, good.dscale, good.dscale, 0);
      compare("dkeys", got.dkeys, good.dkeys, good.dkeys, 0);
      compare("dbias", got.dbias, good.dbias, good.dbias, 0);
    }
}

// Logits of thousands, in rising order: the maximum moves with every tile.
DEVICE_TEST_OF_VALUES(large_logits) {
  for (const DType dtype : {DType::bf16, DType::f16, DType::f32}) {
    Case c{3, 300, 4, dtype};
    c.scale = 1.0f;
    c.bias = true;
    Setup s(c);
    for (int j = 0; j < c.N; ++j) s.bias[j] = 4.0f * float(j) - 500;
    const Results got = run(s), truth = s.truth();
    compare("neg_lse", got.neg_lse, truth.neg_lse, truth.neg_lse, 2e-4);
    compare("mean", got.mean, truth.mean, truth.mean, dtype == DType::f32 ? 1e-3 : 8e-3);
  }
}

// Tiles and splits without a negative or a positive, logits far from zero, keys that never count: as the formulas say
// where float has digits for that, and never NaN.
DEVICE_TEST_OF_VALUES(sorted_keys_far_from_zero) {
  for (const DType dtype : {DType::f16, DType::f32}) {
    const Case c{2, 530, 4, dtype};
    sorted_keys(c, {-1000.0f, 1000.0f, -INFINITY}, [](const Setup& s, float level) {
      const Results got = run(s), eager = s.eager(), truth = s.truth();
      const double size = std::ldexp(std::isfinite(level) ? 1000.0 : 32.0, -20),
                   eps = size + (s.c.dtype != DType::f32) * 0.02;
      compare("neg_lse", got.neg_lse, truth.neg_lse, truth.neg_lse, size);
      compare("pos_lse", got.pos_lse, truth.pos_lse, truth.pos_lse, size);
      compare("pos_sum", got.pos_sum, truth.pos_sum, truth.pos_sum, size * s.c.N);
      compare("count", got.count, truth.count, truth.count, 0);
      compare("mean", got.mean, truth.mean, truth.mean, eps);
      compare("dkeys", got.dkeys, truth.dkeys, truth.dkeys, s.c.scale * eps);
      compare("dbias", got.dbias, truth.dbias, truth.dbias, 4 * eps);
      compare("dquery", got.dquery, eager.dquery, truth.dquery, s.c.scale * s.c.N * eps / 8);
    });
    sorted_keys(c, {-1e30f, 1e30f}, [](const Setup& s, float) {
      const Results got = run(s);
      for (const auto& values :
           {got.neg_lse, got.pos_lse, got.pos_sum, got.mean, got.dquery, got.dkeys, got.dscale, got.dbias})
        expect_numbers("a result", values);
    });
  }
}

// Logits of 1e28 that come out of products: the two passes may round them differently.
DEVICE_TEST_OF_VALUES(huge_products) {
  for (const DType dtype : {DType::bf16, DType::f32}) {
    Case c{20, 300, 72, dtype};
    c.labels = kFew;
    c.scale = 1e28f;
    const Results got = run(Setup(c));
    for (const auto& values :
         {got.neg_lse, got.pos_lse, got.pos_sum, got.mean, got.dquery, got.dkeys, got.dscale, got.dbias})
      expect_numbers("a result", values);
  }
}
