// CUDA C++ as plain C++, for `g++ -x c++ -include cuda_shim.h`: device code is host code, threads run one after the
// other, and an intrinsic is the operation that it names, rounded to nearest.
#include <cmath>
#include <cstring>

#define __global__
#define __device__
#define __launch_bounds__(threads)

struct Index {
  unsigned x;
};
inline thread_local Index gridDim, blockDim, blockIdx, threadIdx;

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }

template <typename To, typename From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(unsigned bits) { return same_bits<float>(bits); }
inline unsigned __float_as_uint(float x) { return same_bits<unsigned>(x); }
inline long long __double_as_longlong(double x) { return same_bits<long long>(x); }

inline unsigned long long atomicMax(unsigned long long* word, unsigned long long value) {
  const unsigned long long old = *word;
  if (value > old) *word = value;
  return old;
}
