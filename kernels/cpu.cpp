// The kernels' loops for tensors on the CPU: every input is read once, every result written once.
//
// Compiled by cpu.py. A name ends in its dtypes, as residual_apply_bf16_fp32; the Python file of that name says what
// the arguments mean. Sizes and strides count elements. Arithmetic stays in the order written (no -ffast-math,
// no contraction), so that a result depends neither on the machine nor on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <system_error>
#include <thread>
#include <vector>

namespace {

constexpr int64_t TILE = 1024;          // elements whose sums stay in the fastest cache
constexpr int64_t PER_THREAD = 1 << 17; // elements below which starting a thread costs more than it saves

template <class To, class From> To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

struct bfloat16 {
  uint16_t bits;
  bfloat16() = default;
  explicit bfloat16(float value) {  // to nearest, ties to even
    const uint32_t wide = bits_of<uint32_t>(value);
    const uint32_t rounded = (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16;
    bits = static_cast<uint16_t>((wide & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
  }
  operator float() const { return bits_of<float>(static_cast<uint32_t>(bits) << 16); }
};

using Work = std::function<void(int64_t first, int64_t last)>;

void in_parallel(int64_t tiles, int64_t elements, int64_t threads, const Work& work) {
  threads = std::max<int64_t>(1, std::min({threads, tiles, elements / PER_THREAD}));
  std::vector<std::thread> others;
  int64_t begun = 0;
  for (int64_t t = 1; t < threads; t++) {
    const int64_t end = tiles * t / threads;
    try {
      others.emplace_back(std::cref(work), begun, end);
    } catch (const std::system_error&) {  // no more threads to be had
      work(begun, end);
    }
    begun = end;
  }
  work(begun, tiles);
  for (auto& other : others) other.join();
}

template <class T> struct Strided {
  const T* data;  // null if there is no such tensor
  int64_t sample, row;
};

struct Layout {
  int64_t samples, rows, cols;

  int64_t tiles_of_row() const { return (cols + TILE - 1) / TILE; }
  int64_t tiles() const { return samples * rows * tiles_of_row(); }
  int64_t elements() const { return samples * rows * cols; }
};

struct Tile {
  int64_t sample, row, col, size, at;  // `at`: where it begins in a contiguous tensor

  Tile(const Layout& layout, int64_t number) {
    const int64_t row_number = number / layout.tiles_of_row();
    sample = row_number / layout.rows;
    row = row_number % layout.rows;
    col = number % layout.tiles_of_row() * TILE;
    size = std::min(TILE, layout.cols - col);
    at = row_number * layout.cols + col;
  }

  template <class T> const T* of(const Strided<T>& tensor) const {
    return tensor.data ? tensor.data + sample * tensor.sample + row * tensor.row + col : nullptr;
  }
};

template <class S> struct Sum { using type = float; };
template <> struct Sum<double> { using type = double; };

// out = base + sum_j weights[j] * stored[j]
template <class T, class S>
void residual_apply(Layout layout, Strided<T> base, const S* const* stored, const double* weights, int64_t terms,
                    T* out, int64_t threads) {
  using A = typename Sum<S>::type;
  in_parallel(layout.tiles(), layout.elements(), threads, [=](int64_t first, int64_t last) {
    A total[TILE];
    for (int64_t number = first; number < last; number++) {
      const Tile tile(layout, number);
      if (const T* values = tile.of(base)) {
        for (int64_t i = 0; i < tile.size; i++) total[i] = static_cast<A>(values[i]);
      } else {
        std::fill_n(total, tile.size, static_cast<A>(-0.0));  // what leaves every number as it is
      }
      for (int64_t j = 0; j < terms; j++) {
        const S* values = stored[j] + tile.at;
        const A weight = static_cast<A>(weights[j]);
        for (int64_t i = 0; i < tile.size; i++) total[i] += weight * static_cast<A>(values[i]);
      }
      for (int64_t i = 0; i < tile.size; i++) out[tile.at + i] = static_cast<T>(total[i]);
    }
  });
}

// out = result - base
template <class T, class S>
void residual_store(Layout layout, Strided<T> result, Strided<T> base, S* out, int64_t threads) {
  using A = typename Sum<S>::type;
  in_parallel(layout.tiles(), layout.elements(), threads, [=](int64_t first, int64_t last) {
    for (int64_t number = first; number < last; number++) {
      const Tile tile(layout, number);
      const T *values = tile.of(result), *before = tile.of(base);
      S* written = out + tile.at;
      for (int64_t i = 0; i < tile.size; i++) {
        written[i] = static_cast<S>(static_cast<A>(values[i]) - static_cast<A>(before[i]));
      }
    }
  });
}

using Lanes = float __attribute__((vector_size(64)));
using LaneBits = uint32_t __attribute__((vector_size(64)));
constexpr int64_t LANES = sizeof(Lanes) / sizeof(float);

Lanes magnitude(Lanes values) { return bits_of<Lanes>(bits_of<LaneBits>(values) & 0x7FFFFFFF); }

// |previous - r| and |previous| of a tile, added up side by side.
void add_differences(const float* previous, const float* r, int64_t count, double sums[2]) {
  Lanes change = {}, size = {}, before = {}, now = {};
  for (; count >= LANES; count -= LANES, previous += LANES, r += LANES) {
    std::memcpy(&before, previous, sizeof before);
    std::memcpy(&now, r, sizeof now);
    change += magnitude(before - now);
    size += magnitude(before);
  }
  before = now = Lanes{};
  std::memcpy(&before, previous, count * sizeof(float));
  std::memcpy(&now, r, count * sizeof(float));
  change += magnitude(before - now);
  size += magnitude(before);
  sums[0] = sums[1] = 0;
  for (int64_t lane = 0; lane < LANES; lane++) {
    sums[0] += change[lane];
    sums[1] += size[lane];
  }
}

// r = hidden - base, written to `out` if there is a base; for each group of tiles and each of `previous`, the sums of
// |previous - r| and |previous|
template <class T>
void l1_sums(Layout layout, Strided<T> hidden, Strided<T> base, const float* const* previous, int64_t count, float* out,
             double* sums, int64_t groups, int64_t threads) {
  const int64_t tiles = layout.tiles();
  std::vector<double> partial_sums(tiles * count * 2);
  double* partial = partial_sums.data();
  in_parallel(tiles, layout.elements(), threads, [=](int64_t first, int64_t last) {
    float held[TILE];
    for (int64_t number = first; number < last; number++) {
      const Tile tile(layout, number);
      const T *values = tile.of(hidden), *before = tile.of(base);
      float* r = out ? out + tile.at : held;
      for (int64_t i = 0; i < tile.size; i++) {
        r[i] = before ? static_cast<float>(values[i]) - static_cast<float>(before[i]) : static_cast<float>(values[i]);
      }
      for (int64_t k = 0; k < count; k++) {
        add_differences(previous[k] + tile.at, r, tile.size, partial + (number * count + k) * 2);
      }
    }
  });
  for (int64_t group = 0; group < groups; group++) {
    for (int64_t k = 0; k < count; k++) {
      double change = 0, size = 0;
      for (int64_t number = tiles / groups * group; number < tiles / groups * (group + 1); number++) {
        change += partial[(number * count + k) * 2];
        size += partial[(number * count + k) * 2 + 1];
      }
      sums[(group * count + k) * 2] = change;
      sums[(group * count + k) * 2 + 1] = size;
    }
  }
}

// Rows are heads of tokens; those lie at three sizes and strides, the first size of which nobody needs.
struct Tokens {
  int64_t rows, heads, head_dim, size_1, size_2, stride_0, stride_1, stride_2;

  int64_t at(int64_t token) const {
    const int64_t rest = token / size_2;
    return rest / size_1 * stride_0 + rest % size_1 * stride_1 + token % size_2 * stride_2;
  }
};

// quant_fp8_triton.py explains these two.
uint8_t to_e4m3(float x) {
  const uint32_t bits = bits_of<uint32_t>(x), size = bits & 0x7FFFFFFF;
  const uint32_t kept = std::min<uint32_t>(size, 0x43E00000);
  const uint32_t normal = ((kept + 0x7FFFF + ((kept >> 20) & 1)) >> 20) - (120 << 3);
  const uint32_t small = bits_of<uint32_t>(bits_of<float>(kept) + 16384.0f) - 0x46800000;
  const uint32_t code = size > 0x7F800000 ? 0x7F : kept < (121 << 23) ? small : normal;
  return static_cast<uint8_t>(code | ((bits >> 24) & 0x80));
}

float from_e4m3(uint8_t code) {
  const uint32_t size = code & 0x7F;
  const uint32_t small = bits_of<uint32_t>(bits_of<float>((size << 20) + (121 << 23)) - 0.015625f);
  const uint32_t normal = (size << 20) + (120 << 23);
  const uint32_t bits = size == 0x7F ? 0x7FC00000 : size < 8 ? small : normal;
  return bits_of<float>(bits | static_cast<uint32_t>(code & 0x80) << 24);
}

template <class T>
void quant_fp8(Tokens tokens, const T* x, int64_t head_stride, uint8_t* packed, int64_t row_bytes, int64_t threads) {
  in_parallel(tokens.rows, tokens.rows * tokens.head_dim, threads, [=](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const int64_t token = row / tokens.heads, head = row % tokens.heads, head_dim = tokens.head_dim;
      const T* values = x + tokens.at(token) + head * head_stride;
      uint32_t largest = 0;  // of non-negative floats the bits are in their order
      for (int64_t i = 0; i < head_dim; i++) {
        const uint32_t size = bits_of<uint32_t>(static_cast<float>(values[i])) & 0x7FFFFFFF;
        largest = std::max(largest, size & -static_cast<uint32_t>(size < 0x7F800000));
      }
      const float amax = std::max(bits_of<float>(largest), 0x1p-100f), scale = amax / 448, factor = 448 / amax;
      uint8_t* codes = packed + token * row_bytes;
      std::memcpy(codes + tokens.heads * head_dim + head * sizeof scale, &scale, sizeof scale);
      codes += head * head_dim;
      for (int64_t i = 0; i < head_dim; i++) codes[i] = to_e4m3(static_cast<float>(values[i]) * factor);
    }
  });
}

template <class T> void dequant_fp8(Tokens tokens, const uint8_t* packed, T* out, int64_t threads) {
  in_parallel(tokens.rows, tokens.rows * tokens.head_dim, threads, [=](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const uint8_t* codes = packed + tokens.at(row / tokens.heads);
      const int64_t head = row % tokens.heads;
      float scale;
      std::memcpy(&scale, codes + tokens.heads * tokens.head_dim + head * sizeof scale, sizeof scale);
      codes += head * tokens.head_dim;
      T* values = out + row * tokens.head_dim;
      for (int64_t i = 0; i < tokens.head_dim; i++) values[i] = static_cast<T>(from_e4m3(codes[i]) * scale);
    }
  });
}

}  // namespace

#define PER_PAIR(T, t, S, s)                                                                                           \
  extern "C" void residual_apply_##t##_##s(Layout layout, Strided<T> base, const S* const* stored,                     \
                                           const double* weights, int64_t terms, T* out, int64_t threads) {            \
    residual_apply<T, S>(layout, base, stored, weights, terms, out, threads);                                          \
  }                                                                                                                    \
  extern "C" void residual_store_##t##_##s(Layout layout, Strided<T> result, Strided<T> base, S* out,                  \
                                           int64_t threads) {                                                          \
    residual_store<T, S>(layout, result, base, out, threads);                                                          \
  }

#define PER_TYPE(T, t)                                                                                                 \
  extern "C" void l1_sums_##t##_fp32(Layout layout, Strided<T> hidden, Strided<T> base, const float* const* previous,  \
                                     int64_t count, float* out, double* sums, int64_t groups, int64_t threads) {       \
    l1_sums<T>(layout, hidden, base, previous, count, out, sums, groups, threads);                                     \
  }                                                                                                                    \
  extern "C" void quant_fp8_##t(Tokens tokens, const T* x, int64_t head_stride, uint8_t* packed, int64_t row_bytes,    \
                                int64_t threads) {                                                                     \
    quant_fp8<T>(tokens, x, head_stride, packed, row_bytes, threads);                                                  \
  }                                                                                                                    \
  extern "C" void dequant_fp8_##t(Tokens tokens, const uint8_t* packed, T* out, int64_t threads) {                     \
    dequant_fp8<T>(tokens, packed, out, threads);                                                                      \
  }

PER_TYPE(bfloat16, bf16)
PER_TYPE(float, fp32)
PER_PAIR(bfloat16, bf16, float, fp32)
PER_PAIR(bfloat16, bf16, bfloat16, bf16)
PER_PAIR(float, fp32, double, fp64)
PER_PAIR(float, fp32, float, fp32)
