#include "group_norm_silu.h"

#include <cmath>

#include "kernels.h"

namespace fastdiff::cpu {
namespace {

// Elements whose mean is the center of a group's sums: few where reading them twice would cost.
int64_t center_elements(const GroupNormLayout& layout) {
  return std::clamp<int64_t>(layout.group_numel() / 16, 16, 256);
}

// Sums are taken of h - center, in F within a piece and in double over pieces. The center, a mean
// of M of the group's N elements, is within sqrt(N / M) standard deviations of the mean whatever
// the data: what E[h^2] - E[h]^2 loses for large means is not lost here. In a constant group the
// center is within some ulps of the value, and all differences are the same small number of ulps,
// whose sums are exact: so are mean and variance.
//
// Channel biases are taken relative to that of the group's first channel, and centers likewise: the
// center becomes the group's base (fastdiff/group_norm_silu.h) once the mean is known.
template <typename F>
class Forward {
 public:
  explicit Forward(const GroupNormSiluArgs& args)
      : args_(args),
        layout_(args.layout),
        size_(size_of(args.x_type)),
        x_(static_cast<const char*>(args.residual ? args.sum : args.x)),
        stream_(is_streamed(layout_, 2 * size_)),
        kernels_(group_norm_kernels<F>(args.x_type, args.activation)) {
    if (!args.residual) return;
    sum_bias_memory_.resize(layout_.channels);
    sum_bias_ = read_channels(args.sum_bias, 0, layout_.channels, F(0), sum_bias_memory_.data());
  }

  void run() const { layout_.channels_last ? run_pixels() : run_rows(); }

 private:
  // Groups are runs of rows: one per channel, or a single one if nothing differs between channels.
  void run_rows() const {
    const int64_t depth = layout_.group_channels(), numel = layout_.group_numel();
    const int64_t units = layout_.batch * layout_.groups;
    const int64_t rows = args_.channel_bias.data ? depth : 1;
    const Pieces in(numel / rows, kPiece), out(layout_.pixels, kPiece);
    const int64_t in_count = rows * in.per_run, out_count = depth * out.per_run;
    if (one_thread_each(units, numel)) {
      const int64_t block = groups_per_block(layout_);
      parallel_items(units, numel, [&](int64_t begin, int64_t end) {
        F* memory = thread_scratch<F>(block * (2 * in_count + kPerChannel * depth + 1));
        F *sums = memory + kPerChannel * depth * block, *squares = sums + in_count * block;
        F* centers = squares + in_count * block;
        DropoutBits bits(args_.dropout, layout_);
        Gains<F> gains(bits, kernels_.evens_first);
        for_each_block(layout_, begin, end, [&](int64_t unit, int64_t count) {
          if (args_.residual) add_rows(unit, out, 0, out_count * count);
          if (bits.any()) make_bits(bits, unit, count, false);
          const Operands<F> operands = group_operands(unit, count, memory);
          F* coefficients = memory + Operands<F>::kCount * depth * count;
          find_centers(unit, count, in, rows, operands, centers, squares, coefficients);
          sum_pieces(unit, in, 0, in_count * count, coefficients, sums, squares);
          for (int64_t g = 0; g < count; ++g) {
            finish(unit + g, operands.channel_bias[g * depth], centers + g, in_count,
                   sums + g * in_count, squares + g * in_count);
          }
          apply_pieces(unit, count, out, 0, out_count * count, operands, centers, coefficients,
                       gains);
        });
        finish_streaming();
      });
      return;
    }
    std::vector<F> sums(2 * in_count);
    DropoutBits bits(args_.dropout, layout_);
    for (int64_t unit = 0; unit < units; ++unit) {
      if (args_.residual) {
        parallel_items(out_count, out.length,
                       [&](int64_t begin, int64_t end) { add_rows(unit, out, begin, end); });
      }
      if (bits.any()) make_bits(bits, unit, 1, true);
      F center = 0, added = 0;  // of the first channel
      parallel_items(in_count, in.length, [&](int64_t begin, int64_t end) {
        F* memory = thread_scratch<F>(kPerChannel * depth);
        F* k = memory + Operands<F>::kCount * depth;
        F found, square;
        const Operands<F> operands = group_operands(unit, 1, memory);
        find_centers(unit, 1, in, rows, operands, &found, &square, k);
        sum_pieces(unit, in, begin, end, k, sums.data() + begin, sums.data() + in_count + begin);
        if (begin == 0) center = found, added = operands.channel_bias[0];
      });
      finish(unit, added, &center, in_count, sums.data(), sums.data() + in_count);
      parallel_items(out_count, out.length, [&](int64_t begin, int64_t end) {
        F* memory = thread_scratch<F>(kPerChannel * depth);
        Gains<F> gains(bits, kernels_.evens_first);
        apply_pieces(unit, 1, out, begin, end, group_operands(unit, 1, memory), &center,
                     memory + Operands<F>::kCount * depth, gains);
        finish_streaming();
      });
    }
  }

  // Values per channel: operands and coefficients.
  static constexpr int64_t kPerChannel = Operands<F>::kCount + 3;

  Operands<F> group_operands(int64_t unit, int64_t count, F* memory) const {
    const int64_t depth = layout_.group_channels();
    return {args_, unit / layout_.groups, unit % layout_.groups * depth, depth * count, memory};
  }

  int64_t first_channel(int64_t unit) const {
    return unit % layout_.groups * layout_.group_channels();
  }

  // The mask of `count` groups.
  void make_bits(DropoutBits& bits, int64_t unit, int64_t count, bool shared) const {
    bits.make(unit / layout_.groups, first_channel(unit), count * layout_.group_channels(), shared);
  }

  // Writes the sum, which takes the place of x, in the pieces [begin, end) of the rows from a
  // group's first on.
  void add_rows(int64_t unit, const Pieces& pieces, int64_t begin, int64_t end) const {
    const int64_t base = unit * layout_.group_numel();
    const F* bias = sum_bias_ + first_channel(unit);
    if (pieces.per_run == 1) {
      return add(kernels_.row_add, base + begin * pieces.run, end - begin, pieces.run,
                 bias + begin);
    }
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t row = piece / pieces.per_run;
      add(kernels_.row_add, base + row * pieces.run + pieces.begin(piece), 1, pieces.size(piece),
          bias + row);
    }
  }

  void add_pixels(int64_t sample, const Pieces& pieces, int64_t begin, int64_t end) const {
    const int64_t channels = layout_.channels, base = sample * channels * layout_.pixels;
    for (int64_t piece = begin; piece < end; ++piece) {
      add(kernels_.pixel_add, base + pieces.begin(piece) * channels, pieces.size(piece), channels,
          sum_bias_);
    }
  }

  template <typename Loop>
  void add(const Loop& loop, int64_t first, int64_t lines, int64_t n, const F* bias) const {
    const int64_t at = first * size_;
    loop(static_cast<const char*>(args_.x) + at, static_cast<const char*>(args_.residual) + at,
         static_cast<char*>(args_.sum) + at, lines, n, bias);
  }

  const char* x_of(int64_t element) const { return x_ + element * size_; }
  char* y_of(int64_t element) const { return static_cast<char*>(args_.y) + element * size_; }

  // The centers of `count` groups, and what to subtract from x in each of their rows. `squares`:
  // for what is not needed of their sums.
  void find_centers(int64_t unit, int64_t count, const Pieces& pieces, int64_t rows,
                    const Operands<F>& operands, F* centers, F* squares, F* k) const {
    const int64_t depth = layout_.group_channels();
    const int64_t sampled = std::min(pieces.run, center_elements(layout_));
    std::fill(k, k + count, F(0));
    kernels_.row_sums(x_of(unit * layout_.group_numel()), count, sampled, layout_.group_numel(), k,
                      centers, squares);
    for (int64_t g = 0; g < count; ++g) {
      const F* added = operands.channel_bias + g * depth;
      centers[g] /= static_cast<F>(sampled);
      for (int64_t row = 0; row < rows; ++row) {
        k[g * rows + row] = centers[g] - (added[row] - added[0]);
      }
    }
  }

  // Sums of the pieces [begin, end) of the rows from a group's first on.
  void sum_pieces(int64_t unit, const Pieces& pieces, int64_t begin, int64_t end, const F* k,
                  F* sums, F* squares) const {
    const int64_t first = unit * layout_.group_numel();
    if (pieces.per_run == 1) {
      kernels_.row_sums(x_of(first + begin * pieces.run), end - begin, pieces.run, pieces.run,
                        k + begin, sums, squares);
      return;
    }
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t row = piece / pieces.per_run;
      kernels_.row_sums(x_of(first + row * pieces.run + pieces.begin(piece)), 1, pieces.size(piece),
                        0, k + row, sums + (piece - begin), squares + (piece - begin));
    }
  }

  // Mean and rstd of a group from sums about its center, and its base in the center's place.
  // `added`: the bias of the group's first channel.
  void finish(int64_t unit, F added, F* center, int64_t count, const F* sums,
              const F* squares) const {
    double sum = 0, square = 0;
    for (int64_t i = 0; i < count; ++i) {
      sum += sums[i];
      square += squares[i];
    }
    store_statistics(unit, added, center, sum, square);
  }

  void store_statistics(int64_t unit, double added, F* center, double sum, double square) const {
    const double numel = static_cast<double>(layout_.group_numel());
    const double mean = sum / numel;
    const double variance = std::max(0.0, square / numel - mean * mean);
    const double base = *center + mean;
    *center = static_cast<F>(base);
    static_cast<F*>(args_.mean)[unit] = static_cast<F>(base + added);
    static_cast<F*>(args_.rstd)[unit] = static_cast<F>(1.0 / std::sqrt(variance + args_.eps));
  }

  void set_affine(const Operands<F>& operands, int64_t unit, int64_t groups, const F* bases, F* k,
                  F* slope, F* offset) const {
    clones<affines_loop<F>>(operands, groups, layout_.group_channels(), bases,
                            static_cast<const F*>(args_.rstd) + unit, k, slope, offset);
  }

  // The pieces [begin, end) of the rows of `count` groups. `memory`: 3 per channel.
  void apply_pieces(int64_t unit, int64_t count, const Pieces& pieces, int64_t begin, int64_t end,
                    const Operands<F>& operands, const F* bases, F* memory, Gains<F>& gains) const {
    const int64_t channel = first_channel(unit);
    const int64_t first = unit * layout_.group_numel(), depth = layout_.group_channels();
    F *k = memory, *slope = k + depth * count, *offset = slope + depth * count;
    set_affine(operands, unit, count, bases, k, slope, offset);
    if (pieces.per_run == 1) {
      const int64_t start = first + begin * pieces.run;
      write_parts(y_of(start), end - begin, pieces.run, size_, stream_, kernels_.streams,
                  [&](char* y, int64_t row, int64_t rows, bool stream) {
                    gains.for_parts(channel + begin + row, rows, 0, pieces.run,
                                    [&](int64_t part, int64_t count, const F* gain) {
                                      const int64_t at = row + part, c = begin + at;
                                      kernels_.row_apply(x_of(start + at * pieces.run),
                                                         y + part * pieces.run * size_, count,
                                                         pieces.run, k + c, slope + c, offset + c,
                                                         gain, stream);
                                    });
                  });
      return;
    }
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t row = piece / pieces.per_run;
      const int64_t start = first + row * pieces.run + pieces.begin(piece);
      write_parts(y_of(start), 1, pieces.size(piece), size_, stream_, kernels_.streams,
                  [&](char* y, int64_t, int64_t, bool stream) {
                    const F* gain =
                        gains.of(channel + row, 1, pieces.begin(piece), pieces.size(piece));
                    kernels_.row_apply(x_of(start), y, 1, pieces.size(piece), k + row, slope + row,
                                       offset + row, gain, stream);
                  });
    }
  }

  // Channels_last: pieces are runs of pixels, with sums per channel.
  void run_pixels() const {
    const int64_t channels = layout_.channels, numel = channels * layout_.pixels;
    const Pieces pieces(layout_.pixels, piece_pixels(channels));
    if (one_thread_each(layout_.batch, numel)) {
      parallel_items(layout_.batch, numel, [&](int64_t begin, int64_t end) {
        std::vector<F> sums(2 * channels * pieces.per_run);
        DropoutBits bits(args_.dropout, layout_);
        for (int64_t sample = begin; sample < end; ++sample) {
          if (args_.residual) add_pixels(sample, pieces, 0, pieces.per_run);
          if (bits.any()) bits.make(sample, 0, layout_.pixels, false);
          F* memory = thread_scratch<F>(10 * channels);
          F* centers = memory + 8 * channels;
          sum_pixels(sample, pieces, 0, pieces.per_run, memory, centers, sums.data());
          finish_pixels(sample, centers, pieces.per_run, sums.data());
          apply_pixels(sample, pieces, 0, pieces.per_run, centers, memory, bits);
        }
      });
      return;
    }
    std::vector<F> sums(2 * channels * pieces.per_run), centers(2 * layout_.groups);
    const int64_t elements = pieces.length * channels;
    DropoutBits bits(args_.dropout, layout_);
    for (int64_t sample = 0; sample < layout_.batch; ++sample) {
      if (args_.residual) {
        parallel_items(pieces.per_run, elements,
                       [&](int64_t begin, int64_t end) { add_pixels(sample, pieces, begin, end); });
      }
      if (bits.any()) bits.make(sample, 0, layout_.pixels, true);
      parallel_items(pieces.per_run, elements, [&](int64_t begin, int64_t end) {
        F* memory = thread_scratch<F>(10 * channels);
        F* found = memory + 8 * channels;
        sum_pixels(sample, pieces, begin, end, memory, found, sums.data());
        if (begin == 0) std::copy(found, found + 2 * layout_.groups, centers.data());
      });
      finish_pixels(sample, centers.data(), pieces.per_run, sums.data());
      parallel_items(pieces.per_run, elements, [&](int64_t begin, int64_t end) {
        apply_pixels(sample, pieces, begin, end, centers.data(), thread_scratch<F>(8 * channels),
                     bits);
      });
    }
  }

  // Sums of pieces [begin, end) of a sample into rows of `sums`, and the groups' centers, after
  // them the biases of their first channels. `memory`: 8 per channel.
  void sum_pixels(int64_t sample, const Pieces& pieces, int64_t begin, int64_t end, F* memory,
                  F* centers, F* sums) const {
    const int64_t channels = layout_.channels, depth = layout_.group_channels();
    const int64_t first = sample * channels * layout_.pixels;
    const Operands<F> operands(args_, sample, 0, channels, memory);
    F* k = memory + Operands<F>::kCount * channels;
    F *sum = k + channels, *square = sum + channels;
    const int64_t sampled = std::min(layout_.pixels, 1 + center_elements(layout_) / depth);
    std::fill(k, k + channels, F(0));
    kernels_.pixel_sums(x_of(first), sampled, channels, k, sum, square);
    for (int64_t g = 0; g < layout_.groups; ++g) {
      const F* added = operands.channel_bias + g * depth;
      F total = 0;
      for (int64_t c = 0; c < depth; ++c) {
        total += sum[g * depth + c] / static_cast<F>(sampled) + (added[c] - added[0]);
      }
      centers[g] = total / static_cast<F>(depth);
      centers[layout_.groups + g] = added[0];
      for (int64_t c = 0; c < depth; ++c) k[g * depth + c] = centers[g] - (added[c] - added[0]);
    }
    for (int64_t piece = begin; piece < end; ++piece) {
      F* row = sums + 2 * channels * piece;
      kernels_.pixel_sums(x_of(first + pieces.begin(piece) * channels), pieces.size(piece),
                          channels, k, row, row + channels);
    }
  }

  void finish_pixels(int64_t sample, F* centers, int64_t count, const F* sums) const {
    const int64_t channels = layout_.channels, depth = layout_.group_channels();
    std::vector<double> totals(2 * channels);
    for (int64_t piece = 0; piece < count; ++piece) {
      const F* row = sums + 2 * channels * piece;
      for (int64_t i = 0; i < 2 * channels; ++i) totals[i] += row[i];
    }
    for (int64_t g = 0; g < layout_.groups; ++g) {
      double sum = 0, square = 0;
      for (int64_t c = g * depth; c < (g + 1) * depth; ++c) {
        sum += totals[c];
        square += totals[channels + c];
      }
      store_statistics(sample * layout_.groups + g, centers[layout_.groups + g], centers + g, sum,
                       square);
    }
  }

  void apply_pixels(int64_t sample, const Pieces& pieces, int64_t begin, int64_t end,
                    const F* bases, F* memory, const DropoutBits& bits) const {
    const int64_t channels = layout_.channels, first = sample * channels * layout_.pixels;
    const Operands<F> operands(args_, sample, 0, channels, memory);
    F* k = memory + Operands<F>::kCount * channels;
    F *slope = k + channels, *offset = slope + channels;
    set_affine(operands, sample * layout_.groups, layout_.groups, bases, k, slope, offset);
    Gains<F> gains(bits, false);
    // Backwards: what the sums read last is still in the cache.
    for (int64_t piece = end - 1; piece >= begin; --piece) {
      const int64_t start = first + pieces.begin(piece) * channels;
      write_parts(y_of(start), pieces.size(piece), channels, size_, stream_, kernels_.streams,
                  [&](char* y, int64_t pixel, int64_t pixels, bool stream) {
                    gains.for_parts(pieces.begin(piece) + pixel, pixels, 0, channels,
                                    [&](int64_t part, int64_t count, const F* gain) {
                                      kernels_.pixel_apply(x_of(start + (pixel + part) * channels),
                                                           y + part * channels * size_, count,
                                                           channels, k, slope, offset, gain,
                                                           stream);
                                    });
                  });
    }
    finish_streaming();
  }

  const GroupNormSiluArgs& args_;
  const GroupNormLayout& layout_;
  const int64_t size_;   // bytes of an element
  const char* const x_;  // what is normalized
  const bool stream_;
  const GroupNormKernels<F> kernels_;
  const F* sum_bias_ = nullptr;  // with a residual: of all channels
  std::vector<F> sum_bias_memory_;
};

}  // namespace

void group_norm_silu(const GroupNormSiluArgs& args) {
  args.x_type == DType::kFloat64 ? Forward<double>(args).run() : Forward<float>(args).run();
}

}  // namespace fastdiff::cpu
