// SGD with momentum, plain or Nesterov's, in one pass over memory: momentum.py explains it.
//
// Both round as MXNet's sgd_mom_update and nag_mom_update do, so that the bits are the same.

#include <algorithm>
#include <cstdint>

#include <omp.h>

namespace {

constexpr int64_t kBlock = 2048;  // numbers: a block of sums stays in the first-level cache

// from[0] + from[1] + ..., in this order, of count numbers from start.
const float* sum(const float* const* from, int rows, int64_t start, int64_t count, float* to) {
  if (rows == 1) return from[0] + start;
  const float *first = from[0] + start, *second = from[1] + start;
  for (int64_t i = 0; i < count; ++i) to[i] = first[i] + second[i];
  for (int row = 2; row < rows; ++row) {
    const float* next = from[row] + start;
    for (int64_t i = 0; i < count; ++i) to[i] += next[i];
  }
  return to;
}

struct Step {
  float lr, decay, momentum, scale;

  void plain(float* __restrict__ w, float* __restrict__ m, const float* __restrict__ g,
             int64_t count) const {
    const float of_weight = lr * decay, of_gradient = lr * scale;
    for (int64_t i = 0; i < count; ++i) {
      m[i] = momentum * m[i] - of_weight * w[i] - of_gradient * g[i];
      w[i] += m[i];
    }
  }

  void nesterov(float* __restrict__ w, float* __restrict__ m, const float* __restrict__ g,
                int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      const float old = momentum * m[i], gradient = scale * g[i];
      w[i] = w[i] - old + (momentum + 1) * (old - lr * (gradient + decay * w[i]));
      m[i] = old - lr * (gradient + decay * w[i]);  // of the new weight, as MXNet has it
    }
  }
};

}  // namespace

// Updates `arrays` weights and momenta of sizes[i] numbers. An array's gradient is the sum of its
// `rows` gradients, which follow each other in `gradients`, times `scale`.
extern "C" __attribute__((visibility("default"))) void update(
    int arrays, int rows, const int64_t* sizes, float* const* weights, float* const* momenta,
    const float* const* gradients, const float* lrs, const float* decays, float momentum,
    float scale, int nesterov) {
#pragma omp parallel
  {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    float sums[kBlock];
    for (int array = 0; array < arrays; ++array) {
      const Step step{lrs[array], decays[array], momentum, scale};
      const int64_t end = sizes[array] * (thread + 1) / threads;
      for (int64_t at = sizes[array] * thread / threads; at < end; at += kBlock) {
        const int64_t count = std::min(kBlock, end - at);
        const float* gradient = sum(gradients + array * rows, rows, at, count, sums);
        float *w = weights[array] + at, *m = momenta[array] + at;
        if (nesterov) step.nesterov(w, m, gradient, count);
        else step.plain(w, m, gradient, count);
      }
    }
  }
}
