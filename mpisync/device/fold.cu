// Sums, means, updates, copies and norms of gradients on a device, with the bits that mpisync.kernels gives on a CPU.
//
// kernel.py plans the launches. Every thread works for itself: no barrier, no shared memory, no warp intrinsic, and
// nothing that spins. So the same text compiled as C++ computes the same bits, one thread after the other, and is
// compared with the CPU's there; and what compiles for one card is right on the next.
//
// Every operation is rounded by itself. The intrinsics __fadd_rn, __fmul_rn and their like are never contracted to a
// fused multiply-add, whatever the compiler is told; where one is wanted, __fmaf_rn says so.
//
// Arrays come as addresses, in a struct that a launch passes by value, and lengths in 64 bits. Where that is possible
// they are read and written by packs of 16 bytes: kernel.py finds after how many elements, the `head`, all arrays of a
// launch are aligned, and how many whole `packs` follow. What stands before and behind the packs goes element by
// element. So does everything where the arrays are nowhere aligned together: then there are no packs.

constexpr int LINK = 8;           // gradients that a launch takes; more go through several
constexpr int PEAKS = 1024;       // words over which a largest magnitude is spread
constexpr int NORM_BLOCK = 4096;  // elements of a partial sum of squares

// -- Elements: as they are stored, and the type that they are summed in --------------------------------------------

struct Float16 {
  unsigned short bits;
};
struct BFloat16 {
  unsigned short bits;
};

__device__ inline double widen(double x) { return x; }
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(BFloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }

// The exponent's bias goes from 15 to 127 by a product with 2^112, which is exact, for subnormal numbers too. The
// largest exponent means Inf or NaN in both formats.
__device__ inline float widen(Float16 x) {
  const unsigned magnitude = x.bits & 0x7fffu, sign = (x.bits & 0x8000u) << 16;
  const float scaled = __fmul_rn(__uint_as_float(magnitude << 13), 0x1p112f);
  const unsigned special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return __uint_as_float(__float_as_uint(scaled) | special | sign);
}

template <typename Element>
using SumOf = decltype(widen(Element()));

// -- Arithmetic, in both types of sums ------------------------------------------------------------------------------

__device__ inline float add(float a, float b) { return __fadd_rn(a, b); }
__device__ inline float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ inline float divide(float a, float b) { return __fdiv_rn(a, b); }
__device__ inline float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ inline double add(double a, double b) { return __dadd_rn(a, b); }
__device__ inline double multiply(double a, double b) { return __dmul_rn(a, b); }
__device__ inline double divide(double a, double b) { return __ddiv_rn(a, b); }
__device__ inline double fused(double a, double b, double c) { return __fma_rn(a, b, c); }

// Bits without the sign are ordered as magnitudes are, Inf above every number and NaN above Inf.
__device__ inline unsigned bits_of(float x) { return __float_as_uint(x); }
__device__ inline unsigned long long bits_of(double x) { return __double_as_longlong(x); }

template <typename Bits>
__device__ Bits magnitude(Bits bits) {
  return bits & Bits(Bits(~Bits(0)) >> 1);
}

template <typename Bits>
__device__ Bits larger(Bits a, Bits b) {
  return a > b ? a : b;
}

// -- Memory ---------------------------------------------------------------------------------------------------------

template <typename T, int LANES>
struct alignas(LANES * sizeof(T) < 16 ? LANES * sizeof(T) : 16) Pack {
  T lane[LANES];
};

template <typename T, int LANES>
__device__ Pack<T, LANES> load(const void* array, long long i) {
  return *reinterpret_cast<const Pack<T, LANES>*>(static_cast<const T*>(array) + i);
}

template <typename T, int LANES>
__device__ void store(void* array, long long i, const Pack<T, LANES>& elements) {
  *reinterpret_cast<Pack<T, LANES>*>(static_cast<T*>(array) + i) = elements;
}

// This thread's number, and how many there are in the launch: it takes the packs that many apart, from its number on.
__device__ inline long long thread() { return blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x; }
__device__ inline long long threads() { return gridDim.x * static_cast<long long>(blockDim.x); }

// A thread's largest magnitude goes to one of many words, so that few threads queue for the same; the host takes the
// largest of them. Most find a larger one there already, and only look.
template <typename Bits>
__device__ void record_peak(unsigned long long* peaks, Bits peak) {
  if (!peaks) return;
  unsigned long long* word = peaks + thread() % PEAKS;
  if (peak > *const_cast<volatile unsigned long long*>(word)) atomicMax(word, static_cast<unsigned long long>(peak));
}

// -- The fold -------------------------------------------------------------------------------------------------------

// sum = (((base + weights[0] * gradients[0]) + weights[1] * gradients[1]) + ...) / divisor, element by element
template <typename Sum>
struct FoldArguments {
  const void* gradients[LINK];
  const void* base;           // the sum so far; null where it starts, from -0.0, to which every x adds up to x
  void* target;               // where the sum goes, which may be `base`; in an update the parameters
  unsigned long long* peaks;  // the largest magnitudes of the sum; null: not asked for
  long long size, head, packs;
  int count;          // of gradients: 0 to LINK
  Sum weights[LINK];  // weights of 1 leave every bit as it is
  Sum divisor, rate;
};

// LANES elements from the i-th on; returns the largest magnitude of the sum. All loads come before the arithmetic, so
// that they are under way together. `count` is the same for all threads: its branches diverge nowhere.
template <typename Element, bool UPDATE, int LANES, typename Sum>
__device__ auto fold_pack(const FoldArguments<Sum>& a, long long i) {
  Pack<Element, LANES> gradients[LINK];
  Pack<Sum, LANES> sum, parameters;
#pragma unroll
  for (int j = 0; j < LINK; ++j) {
    if (j < a.count) gradients[j] = load<Element, LANES>(a.gradients[j], i);
  }
  if (a.base) {
    sum = load<Sum, LANES>(a.base, i);
  } else {
    for (Sum& x : sum.lane) x = Sum(-0.0);
  }
  if (UPDATE) parameters = load<Sum, LANES>(a.target, i);

#pragma unroll
  for (int j = 0; j < LINK; ++j) {
    if (j >= a.count) continue;
    for (int lane = 0; lane < LANES; ++lane) {
      sum.lane[lane] = add(sum.lane[lane], multiply(a.weights[j], widen(gradients[j].lane[lane])));
    }
  }
  if (a.divisor != Sum(1)) {
    for (Sum& x : sum.lane) x = divide(x, a.divisor);
  }
  auto peak = magnitude(bits_of(sum.lane[0]));
  for (int lane = 1; lane < LANES; ++lane) peak = larger(peak, magnitude(bits_of(sum.lane[lane])));

  if (UPDATE) {
    for (int lane = 0; lane < LANES; ++lane) sum.lane[lane] = fused(-a.rate, sum.lane[lane], parameters.lane[lane]);
  }
  store(a.target, i, sum);
  return peak;
}

template <typename Element, bool UPDATE, typename Sum>
__device__ void fold_all(const FoldArguments<Sum>& a) {
  constexpr int LANES = 16 / sizeof(Element);
  decltype(bits_of(Sum())) peak = 0;
#pragma unroll 1
  for (long long p = thread(); p < a.packs; p += threads()) {
    peak = larger(peak, fold_pack<Element, UPDATE, LANES>(a, a.head + p * LANES));
  }
#pragma unroll 1
  for (long long i = thread(); i < a.size - a.packs * LANES; i += threads()) {
    peak = larger(peak, fold_pack<Element, UPDATE, 1>(a, i < a.head ? i : i + a.packs * LANES));
  }
  record_peak(a.peaks, peak);
}

template <typename Element>
__global__ void __launch_bounds__(256) fold(FoldArguments<SumOf<Element>> a) {
  fold_all<Element, false>(a);
}

// parameters -= rate * sum, rounded once, as torch's SGD does on a device; the sum goes nowhere.
template <typename Element>
__global__ void __launch_bounds__(256) fused_sgd_step(FoldArguments<Element> a) {
  fold_all<Element, true>(a);
}

// -- Copies ---------------------------------------------------------------------------------------------------------

struct PackArguments {
  const void* source;
  void* target;               // null: only look
  unsigned long long* peaks;  // the largest magnitudes, as bits of an element
  long long size, head, packs;
};

template <typename Bits, int LANES>
__device__ Bits copy_pack(const PackArguments& a, long long i) {
  const Pack<Bits, LANES> elements = load<Bits, LANES>(a.source, i);
  if (a.target) store(a.target, i, elements);
  Bits peak = 0;
  for (Bits bits : elements.lane) peak = larger(peak, magnitude(bits));
  return peak;
}

// Copies elements of as many bits as an unsigned integer has, and finds the largest magnitude.
template <typename Bits>
__global__ void __launch_bounds__(256) pack(PackArguments a) {
  constexpr int LANES = 16 / sizeof(Bits);
  Bits peak = 0;
#pragma unroll 1
  for (long long p = thread(); p < a.packs; p += threads()) {
    peak = larger(peak, copy_pack<Bits, LANES>(a, a.head + p * LANES));
  }
#pragma unroll 1
  for (long long i = thread(); i < a.size - a.packs * LANES; i += threads()) {
    peak = larger(peak, copy_pack<Bits, 1>(a, i < a.head ? i : i + a.packs * LANES));
  }
  record_peak(a.peaks, peak);
}

// -- Norms ----------------------------------------------------------------------------------------------------------

struct SquaresArguments {
  const void* source;
  double* partials;  // one for each NORM_BLOCK elements; the host adds them in order
  long long size;
  int aligned;  // whether the source is, to 16 bytes
};

__device__ inline double square(double x) { return __dmul_rn(x, x); }  // exact for a float32

// The sum of squares of each block in float64, in the CPU's order: a running sum for each lane of its vectors, the
// lanes from first to last, then what is left one by one. A block is one thread's: several would wait for each other.
template <typename Element>
__global__ void __launch_bounds__(256) squares(SquaresArguments a) {
  constexpr int LANES = 64 / sizeof(SumOf<Element>);
#pragma unroll 1
  for (long long block = thread(); block * NORM_BLOCK < a.size; block += threads()) {
    const long long begin = block * NORM_BLOCK, end = begin + NORM_BLOCK < a.size ? begin + NORM_BLOCK : a.size;
    double sums[LANES] = {}, total = 0;
    long long i = begin;
    for (; i + LANES <= end; i += LANES) {
      Pack<Element, LANES> elements;
      if (a.aligned) {
        elements = load<Element, LANES>(a.source, i);
      } else {
        for (int lane = 0; lane < LANES; ++lane) elements.lane[lane] = static_cast<const Element*>(a.source)[i + lane];
      }
      for (int lane = 0; lane < LANES; ++lane) sums[lane] = add(sums[lane], square(widen(elements.lane[lane])));
    }
    for (double sum : sums) total = add(total, sum);
    for (; i < end; ++i) total = add(total, square(widen(static_cast<const Element*>(a.source)[i])));
    a.partials[block] = total;
  }
}
