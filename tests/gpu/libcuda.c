/* A stand-in for NVIDIA's driver on machines without one: every call gives the error of $CUDA_ERROR
 * (100, no device, by default), and there are $CUDA_DEVICES devices, none, where that is set. No
 * kernel ever runs. benchmarks/prove_gpu.py says what is shown with it.
 *
 *     gcc -shared -fPIC -Wl,-soname,libcuda.so.1 -o FOLDER/libcuda.so.1 tests/gpu/libcuda.c -ldl
 *
 * With LD_LIBRARY_PATH=FOLDER it is the driver; with LD_PRELOAD it also answers CUDA's runtime, whose
 * own count of devices asks the driver for more than can be stood in for.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int error(void) {
  const char *number = getenv("CUDA_ERROR");
  return number ? atoi(number) : 100;
}

#define FAILS(name) \
  int name(void) { return error(); }

FAILS(cuInit)
FAILS(cuDeviceGet)
FAILS(cuDeviceGetCount)
FAILS(cuDevicePrimaryCtxRetain)
FAILS(cuModuleLoadData)
FAILS(cuModuleLoadDataEx)
FAILS(cuModuleUnload)
FAILS(cuModuleGetFunction)
FAILS(cuLaunchKernel)
FAILS(cuGraphKernelNodeGetParams)
FAILS(cuGraphNodeGetType)

/* Of CUDA: $CUDA_DRIVER, by default 11.8's. */
int cuDriverGetVersion(int *version) {
  const char *number = getenv("CUDA_DRIVER");
  *version = number ? atoi(number) : 11080;
  return 0;
}

int cuGetErrorString(int number, const char **text) {
  (void)number;
  *text = "the stand-in for the driver says so";
  return 0;
}

/* "0000:NN:00.0", NN being device N's two characters of $CUDA_PLACES. */
int cuDeviceGetPCIBusId(char *text, int size, int device) {
  const char *places = getenv("CUDA_PLACES");
  if (!places || 2 * device + 2 > (int)strlen(places)) return error();
  return snprintf(text, size, "0000:%.2s:00.0", places + 2 * device) < size ? 0 : 1;
}

/* With $CUDA_DEVICES, for LD_PRELOAD: CUDA's runtime has as many, and nothing works on them. */
#define RUNTIME(name, parameters, arguments, answer)                                   \
  int name parameters {                                                                \
    int(*real) parameters = (int(*) parameters)dlsym(RTLD_NEXT, #name);                \
    if (getenv("CUDA_DEVICES")) return answer;                                         \
    return real ? real arguments : error();                                            \
  }

RUNTIME(cudaGetDeviceCount, (int *count), (count), (*count = atoi(getenv("CUDA_DEVICES")), 0))
RUNTIME(cudaSetDevice, (int device), (device), 0)
