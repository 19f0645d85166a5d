#pragma once

// The loops of winograd_conv.cpp over vectors of any width. Included by one file per instruction
// set, after it is set; so everything here is in an unnamed namespace.

#include <algorithm>
#include <cstring>
#include <utility>

#include "simd.h"
#include "winograd_conv.h"

namespace fastdiff::cpu {
namespace {

// Calls body(i) with a constant i = 0 .. kCount-1: arrays indexed by it stay in registers.
template <int kCount, typename Body>
FASTDIFF_HD void unrolled(const Body& body) {
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) FASTDIFF_LAMBDA {
    (body(std::integral_constant<int, kIndex>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

template <typename V>
FASTDIFF_HD V load(const float* x) {
  V value;
  std::memcpy(&value, x, sizeof(V));
  return value;
}

template <typename V>
FASTDIFF_HD void store(float* y, V value) {
  std::memcpy(y, &value, sizeof(V));
}

// B^T d of one axis. Doubled pixels are d = (a, b, b, c): b - b is left out, and the factor 2 of
// b + b is in the weights.
template <int kPoints, typename V>
FASTDIFF_HD void transform_axis(const V* d, int stride, V* out) {
  const V a = d[0], b = d[stride], c = d[2 * stride];
  if constexpr (kPoints == 3) {
    out[0] = a - b, out[stride] = b, out[2 * stride] = b - c;
  } else {
    out[0] = a - c, out[stride] = b + c, out[2 * stride] = c - b;
    out[3 * stride] = b - d[3 * stride];
  }
}

// A^T m of one axis.
template <int kPoints, typename V>
FASTDIFF_HD void combine_axis(const V* m, int stride, V& first, V& second) {
  const V b = m[stride], c = m[2 * stride];
  if constexpr (kPoints == 3) {
    first = m[0] + b, second = b - c;
  } else {
    first = m[0] + b + c, second = b - c - m[3 * stride];
  }
}

struct Tile {
  int64_t sample, row, column;  // of the tile's first result

  Tile(const WinogradConvArgs& args, int64_t index) {
    const int64_t across = args.width / 2, down = args.height / 2;
    sample = index / (across * down);
    row = index / across % down * 2;
    column = index % across * 2;
  }
};

// V is a vector of kWinogradLanes or fewer floats; the accumulators of kRows rows and two vectors
// are registers, and two or three more.
template <typename V, int kRows>
struct Winograd {
  static constexpr int kLanes = sizeof(V) / sizeof(float);
  static constexpr int64_t kLine = 64 / sizeof(float);

  template <int kPoints>
  static void transform_tiles(const WinogradConvArgs& args, const WinogradLayout& layout,
                              int64_t first, int64_t begin, int64_t end, const float* zeros,
                              float* inputs) {
    constexpr int kAll = kPoints * kPoints;
    const int64_t channels = args.channels, stride = layout.point_stride();
    const int64_t shrink = kPoints == 3 ? 2 : 1;
    const int64_t height = args.height / shrink, width = args.width / shrink;
    for (int64_t t = begin; t < end; ++t) {
      const Tile tile(args, t);
      const float* pixels[kAll];
      for (int i = 0; i < kAll; ++i) {
        const int64_t y = tile.row / shrink - 1 + i / kPoints;
        const int64_t x = tile.column / shrink - 1 + i % kPoints;
        const bool inside = y >= 0 && y < height && x >= 0 && x < width;
        pixels[i] = inside ? args.x + ((tile.sample * height + y) * width + x) * channels : zeros;
      }
      for (int64_t c = 0; c < channels; c += kLanes) {
        V d[kAll], e[kAll];
        unrolled<kAll>([&](auto i) FASTDIFF_LAMBDA { d[i] = load<V>(pixels[i] + c); });
        unrolled<kPoints>([&](auto i)
                              FASTDIFF_LAMBDA { transform_axis<kPoints>(d + i, kPoints, e + i); });
        unrolled<kPoints>([&](auto i) FASTDIFF_LAMBDA {
          transform_axis<kPoints>(e + i * kPoints, 1, d + i * kPoints);
        });
        float* out = inputs + c / kWinogradLanes * layout.rows * kWinogradLanes +
                     (t - first) * kWinogradLanes + c % kWinogradLanes;
        unrolled<kAll>([&](auto i) FASTDIFF_LAMBDA { store(out + i * stride, d[i]); });
      }
    }
  }

  // kCount rows of a product: (kCount, channels) times (channels, width), kVectors of its columns.
  // Meanwhile asks for `lines` lines of memory from `ahead` on for every 16 channels.
  template <int kCount, int kVectors>
  static void product(const float* a, int64_t block_stride, const float* b, int64_t width,
                      int64_t channels, const float* ahead, int64_t lines, float* out) {
    V sum[kCount * kVectors]{};
    for (int64_t block = 0; block < channels; block += kWinogradLanes, a += block_stride) {
      for (int64_t i = 0; i < lines; ++i, ahead += kLine) __builtin_prefetch(ahead, 0, 2);
#pragma GCC unroll 4
      for (int k = 0; k < kWinogradLanes; ++k, b += width) {
        V columns[kVectors];
        unrolled<kVectors>([&](auto v) FASTDIFF_LAMBDA { columns[v] = load<V>(b + v * kLanes); });
        unrolled<kCount>([&](auto r) FASTDIFF_LAMBDA {
          const float value = a[r * kWinogradLanes + k];
          unrolled<kVectors>([&](auto v)
                                 FASTDIFF_LAMBDA { sum[r * kVectors + v] += value * columns[v]; });
        });
      }
    }
    unrolled<kCount>([&](auto r) FASTDIFF_LAMBDA {
      unrolled<kVectors>([&](auto v) FASTDIFF_LAMBDA {
        store(out + r * kWinogradBlock + v * kLanes, sum[r * kVectors + v]);
      });
    });
  }

  using Product = void (*)(const float*, int64_t, const float*, int64_t, int64_t, const float*,
                           int64_t, float*);

  template <int kVectors, int... kCount>
  static Product choose(int64_t count, std::integer_sequence<int, kCount...>) {
    static constexpr Product kProducts[] = {product<kCount + 1, kVectors>...};
    return kProducts[count - 1];
  }

  // The products of all tiles and a block of output channels, of one point.
  template <int kVectors>
  static void products(const WinogradLayout& layout, const float* inputs, const float* weight,
                       int64_t width, float* out) {
    const int64_t panels = (layout.rows + kRows - 1) / kRows;
    // The weights of the next point or block come from memory: nothing else hides how long that
    // takes. They lie behind these, and every step asks for its part of them.
    const int64_t columns = kVectors * kLanes, steps = panels * (width / columns);
    const int64_t lines = (width + steps - 1) / steps;  // of width for every 16 channels
    const float* ahead = weight + layout.channels * width;
    for (int64_t panel = 0; panel < panels; ++panel) {
      // Panels of about the same size: a last one of few rows would wait for its weights.
      const int64_t row = layout.rows * panel / panels;
      const int64_t count = layout.rows * (panel + 1) / panels - row;
      const Product run = choose<kVectors>(count, std::make_integer_sequence<int, kRows>{});
      for (int64_t column = 0; column < width; column += columns) {
        run(inputs + row * kWinogradLanes, layout.rows * kWinogradLanes, weight + column, width,
            layout.channels, ahead, lines, out + row * kWinogradBlock + column);
        ahead += layout.channels * lines;
      }
    }
  }

  template <int kPoints>
  static void combine_tiles(const WinogradConvArgs& args, const WinogradLayout& layout,
                            int64_t first, int64_t channel, int64_t width, const float* products) {
    constexpr int kAll = kPoints * kPoints;
    const int64_t stride = layout.product_stride();
    for (int64_t t = 0; t < layout.rows; ++t) {
      const Tile tile(args, first + t);
      const int64_t across = args.width * args.out_channels;
      const int64_t start = (tile.sample * args.height + tile.row) * across +
                            tile.column * args.out_channels + channel;
      const int64_t pixels[] = {start, start + args.out_channels, start + across,
                                start + across + args.out_channels};
      for (int64_t c = 0; c < width; c += kLanes) {
        V m[kAll], rows[2 * kPoints], y[4];
        unrolled<kAll>([&](auto i) FASTDIFF_LAMBDA {
          m[i] = load<V>(products + i * stride + t * kWinogradBlock + c);
        });
        unrolled<kPoints>([&](auto i) FASTDIFF_LAMBDA {
          combine_axis<kPoints>(m + i, kPoints, rows[i], rows[kPoints + i]);
        });
        unrolled<2>([&](auto i) FASTDIFF_LAMBDA {
          combine_axis<kPoints>(rows + i * kPoints, 1, y[2 * i], y[2 * i + 1]);
        });
        const V bias = args.bias ? load<V>(args.bias + channel + c) : V{};
        unrolled<4>([&](auto i) FASTDIFF_LAMBDA {
          y[i] += bias;
          if (args.residual) y[i] += load<V>(args.residual + pixels[i] + c);
          store(args.y + pixels[i] + c, y[i]);
        });
      }
    }
  }

  static void transform(const WinogradConvArgs& args, const WinogradLayout& layout, int64_t first,
                        int64_t begin, int64_t end, const float* zeros, float* inputs) {
    const auto run = args.upsample ? transform_tiles<3> : transform_tiles<4>;
    run(args, layout, first, begin, end, zeros, inputs);
  }

  static void multiply(const WinogradConvArgs& args, const WinogradLayout& layout, int64_t first,
                       int64_t block, const float* inputs, float* results) {
    const int64_t channel = block * kWinogradBlock;
    const int64_t width = std::min(kWinogradBlock, args.out_channels - channel);
    const float* weight = args.weight + channel * layout.points * args.channels;
    for (int64_t p = 0; p < layout.points; ++p) {
      const float* point = inputs + p * layout.point_stride();
      const float* b = weight + p * args.channels * width;
      float* out = results + p * layout.product_stride();
      if (width % (2 * kLanes) == 0) {
        products<2>(layout, point, b, width, out);
      } else {
        products<1>(layout, point, b, width, out);
      }
    }
    const auto combine = args.upsample ? combine_tiles<3> : combine_tiles<4>;
    combine(args, layout, first, channel, width, results);
  }

  static constexpr WinogradLoops loops() { return {transform, multiply, kRows}; }
};

}  // namespace
}  // namespace fastdiff::cpu
