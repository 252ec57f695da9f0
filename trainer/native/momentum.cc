// SGD with momentum, plain or Nesterov's, in one pass over memory: momentum.py explains it.
//
// Both round as MXNet's sgd_mom_update and nag_mom_update do, so that the bits are the same.

#include <atomic>
#include <cstdint>

#include <omp.h>

namespace {

struct Step {
  float lr, decay, momentum, scale;
};

// Both update numbers start to end, by the gradients g.
void plain(const Step& step, int64_t start, int64_t end, float* __restrict__ w,
           float* __restrict__ m, const float* __restrict__ g) {
  const float of_weight = step.lr * step.decay, of_gradient = step.lr * step.scale;
  for (int64_t i = start; i < end; ++i) {
    m[i] = step.momentum * m[i] - of_weight * w[i] - of_gradient * g[i];
    w[i] += m[i];
  }
}

void nesterov(const Step& step, int64_t start, int64_t end, float* __restrict__ w,
              float* __restrict__ m, const float* __restrict__ g) {
  for (int64_t i = start; i < end; ++i) {
    const float old = step.momentum * m[i], gradient = step.scale * g[i];
    w[i] = w[i] - old + (step.momentum + 1) * (old - step.lr * (gradient + step.decay * w[i]));
    m[i] = old - step.lr * (gradient + step.decay * w[i]);  // of the new weight, as MXNet has it
  }
}

}  // namespace

// DLPack's deleter of arrays around memory that they share: one fewer uses it (array_memory.py).
struct Managed {
  char tensor[48];
  std::atomic<int64_t>* uses;
};

extern "C" __attribute__((visibility("default"))) void leave(Managed* array) { --*array->uses; }

// Updates `arrays` weights and momenta of sizes[i] numbers; their gradients are multiplied by `scale`.
extern "C" __attribute__((visibility("default"))) void update(
    int arrays, const int64_t* sizes, float* const* weights, float* const* momenta,
    const float* const* gradients, const float* lrs, const float* decays, float momentum,
    float scale, int is_nesterov) {
  const auto kernel = is_nesterov ? nesterov : plain;
#pragma omp parallel
  {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    for (int array = 0; array < arrays; ++array) {
      const int64_t size = sizes[array];
      kernel({lrs[array], decays[array], momentum, scale}, size * thread / threads,
             size * (thread + 1) / threads, weights[array], momenta[array], gradients[array]);
    }
  }
}
