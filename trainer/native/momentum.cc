// SGD with momentum, plain or Nesterov's, in one pass over memory: momentum.py explains it.
//
// Both round as MXNet's sgd_mom_update and nag_mom_update do, so that the bits are the same.

#include <cstdint>

#include <omp.h>

namespace {

struct Step {
  float lr, decay, momentum, scale;
};

// Updates numbers start to end; the gradient is from[0] + from[1] + ..., in this order.
template <int Rows>
void plain(const Step& step, int64_t start, int64_t end, float* __restrict__ w,
           float* __restrict__ m, const float* const* from) {
  const float of_weight = step.lr * step.decay, of_gradient = step.lr * step.scale;
  const float* rows[Rows];
  for (int row = 0; row < Rows; ++row) rows[row] = from[row];
  for (int64_t i = start; i < end; ++i) {
    float sum = rows[0][i];
    for (int row = 1; row < Rows; ++row) sum += rows[row][i];
    m[i] = step.momentum * m[i] - of_weight * w[i] - of_gradient * sum;
    w[i] += m[i];
  }
}

template <int Rows>
void nesterov(const Step& step, int64_t start, int64_t end, float* __restrict__ w,
              float* __restrict__ m, const float* const* from) {
  const float* rows[Rows];
  for (int row = 0; row < Rows; ++row) rows[row] = from[row];
  for (int64_t i = start; i < end; ++i) {
    float sum = rows[0][i];
    for (int row = 1; row < Rows; ++row) sum += rows[row][i];
    const float old = step.momentum * m[i], gradient = step.scale * sum;
    w[i] = w[i] - old + (step.momentum + 1) * (old - step.lr * (gradient + step.decay * w[i]));
    m[i] = old - step.lr * (gradient + step.decay * w[i]);  // of the new weight, as MXNet has it
  }
}

using Update = void (*)(const Step&, int64_t, int64_t, float*, float*, const float* const*);
constexpr Update kPlain[] = {plain<1>, plain<2>, plain<3>, plain<4>};
constexpr Update kNesterov[] = {nesterov<1>, nesterov<2>, nesterov<3>, nesterov<4>};

}  // namespace

// Updates `arrays` weights and momenta of sizes[i] numbers. An array's gradient is the sum of its
// `rows` gradients, 1 to 4, which follow each other in `gradients`, times `scale`.
extern "C" __attribute__((visibility("default"))) void update(
    int arrays, int rows, const int64_t* sizes, float* const* weights, float* const* momenta,
    const float* const* gradients, const float* lrs, const float* decays, float momentum,
    float scale, int nesterov) {
  const Update kernel = (nesterov ? kNesterov : kPlain)[rows - 1];
#pragma omp parallel
  {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    for (int array = 0; array < arrays; ++array) {
      const int64_t size = sizes[array];
      kernel({lrs[array], decays[array], momentum, scale}, size * thread / threads,
             size * (thread + 1) / threads, weights[array], momenta[array],
             gradients + array * rows);
    }
  }
}
