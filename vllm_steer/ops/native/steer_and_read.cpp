// The op on a CPU. `ops/reference.py` specifies it, as a loop; names, shapes and the meaning of every table are there.
//
// A call finds the tables of its layer by the address of the layer's flags (`ops/layer_tables.py` connects them), so it
// carries three arguments, and a layer at which a step does nothing costs one read of them. Nothing is kept between
// calls. Results do not depend on the number of threads: a token is steered by one thread, and a column of a sum is
// added up by one thread in the order of the tokens.
//
// Written against PyTorch's stable ABI, whose headers compile in seconds. `ops/native/build.py` compiles it.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <stdexcept>
#include <unordered_map>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Values of `plan/entry_rows.py`, `plan/step_plan.py` and `ops/stream_range.py`; a test compares them.
constexpr int32_t RELATIVE = 1, KEEP_NORM = 2, CLAMP = 4, ABOVE = 8, BELOW = 16, STORED = 32, PROBE = 64, PROMPT = 128;
constexpr int HELD_SHIFT = 8;
constexpr int STEER = 0, READ = 1, TRACE = 2;
constexpr int32_t TRACED = 1, ROWS = 2;
constexpr float FLOAT16_LIMIT = 49152.0f;

constexpr int64_t GRAIN = 16384;      // elements that are worth a thread
constexpr int64_t COLUMNS = 256;      // columns of a sum at a time: their partial sum stays in registers and L1
constexpr int64_t PARTIAL = 64;       // tokens that are added up before they are added to a sum, for exactness
constexpr int64_t LONG_SEGMENT = 16;  // tokens from which a segment's columns are shared among threads

// A table of the op: elements of four bytes, up to two dimensions that are stepped through.
struct Table {
  char* data;
  int64_t rows, columns, row_bytes, column_bytes;

  template <class T = int32_t>
  T& at(int64_t row, int64_t column = 0) const {
    return *reinterpret_cast<T*>(data + row * row_bytes + column * column_bytes);
  }
  float* floats(int64_t row) const { return &at<float>(row); }
};

// In the order of `LayerTables` of `ops/layer_tables.py`.
struct Layer {
  Table bank, row_of_token, entry_slot, entry_ab, entry_mode, entry_gate, entry_threshold, probe, prompt_sums,
      prompt_part, keep, segment, sums, last, trace_slot, trace, cut, rows, flags;
};
constexpr int64_t NUM_TABLES = sizeof(Layer) / sizeof(Table);

std::shared_mutex guard;
std::unordered_map<const void*, std::unique_ptr<const Layer>> layers;  // by the address of their flags

std::optional<Layer> layer_of(const void* flags) {
  std::shared_lock lock(guard);
  const auto found = layers.find(flags);
  if (found == layers.end()) return std::nullopt;
  return *found->second;
}

// The elements of a stream, as stored and as float32.
struct Float32 {
  using Stored = float;
  static float widened(float value) { return value; }
  static float rounded(float value) { return value; }
};

struct BFloat16 {
  using Stored = uint16_t;
  static float widened(uint16_t value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
  }
  static uint16_t rounded(float value) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t near = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : near);
  }
};

struct Float16 {
  using Stored = _Float16;
  static float widened(_Float16 value) { return static_cast<float>(value); }
  static _Float16 rounded(float value) { return static_cast<_Float16>(value); }
};

// The rows of hidden or residual.
template <class Type>
struct Stream {
  typename Type::Stored* data;
  int64_t row_stride, column_stride;

  static Stream of(const Tensor& tensor) {
    return {static_cast<typename Type::Stored*>(tensor.data_ptr()), tensor.stride(0), tensor.stride(1)};
  }
  typename Type::Stored* row(int64_t token) const { return data + token * row_stride; }
};

float dot(const float* one, const float* other, int64_t size) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < size; ++d) sum += one[d] * other[d];
  return sum;
}

float norm(const float* vector, int64_t size) { return std::sqrt(dot(vector, vector, size)); }

void add_scaled(float* to, float factor, const float* vector, int64_t size) {
#pragma omp simd
  for (int64_t d = 0; d < size; ++d) to[d] += factor * vector[d];
}

// One call of the op. `Beside` is the type of residual, which may differ from that of hidden.
template <class Type, class Beside>
class Step {
 public:
  Step(const Layer& layer, const Tensor& hidden, const std::optional<Tensor>& residual)
      : layer_(layer),
        hidden_(Stream<Type>::of(hidden)),
        tokens_(hidden.size(0)),
        size_(hidden.size(1)) {
    if (residual) residual_ = Stream<Beside>::of(*residual);
  }

  void run() {
    const int32_t depth = layer_.flags.at(0, STEER), segments = layer_.flags.at(0, READ);
    const int32_t by_token = layer_.flags.at(0, TRACE);
    is_traced_ = by_token & TRACED;
    is_stored_ = (by_token & ROWS) && layer_.rows.rows;
    if (depth) look_ahead(depth);
    if (depth || is_traced_ || is_stored_) {
      const int64_t work = size_ * (1 + depth + (is_traced_ ? layer_.trace_slot.rows : 0));
      torch::stable::parallel_for(0, tokens_, std::max<int64_t>(GRAIN / work, 1), [&](int64_t first, int64_t stop) {
        per_token(first, stop, depth);
      });
    }
    if (segments) sum_segments(segments);
  }

 private:
  // Sums over prompts, which all tokens share, if any entry of the step looks at them.
  void look_ahead(int32_t depth) {
    int32_t before = -1;
    for (int64_t token = 0; token < tokens_; ++token) {
      const int32_t row = layer_.row_of_token.at(token);
      if (row < 0 || row == before) continue;
      before = row;
      for (int32_t e = 0; e < depth && layer_.entry_slot.at(row, e) >= 0; ++e) {
        if (!(layer_.entry_mode.at(row, e) & PROMPT)) continue;
        const Table &sums = layer_.prompt_sums, &part = layer_.prompt_part;
        prompt_sums_.resize(sums.rows * sums.columns);
        for (int64_t place = 0; place < sums.rows; ++place) {
          const int64_t first = part.at(place, 0), count = part.at(place, 1);
          for (int64_t probe = 0; probe < sums.columns; ++probe) {
            float sum = 0;
            for (int64_t at = first; at < first + count; ++at) sum += layer_.probe.at<float>(at, probe);
            prompt_sums_[place * sums.columns + probe] = sums.at<float>(place, probe) + sum;
          }
        }
        return;
      }
    }
  }

  void per_token(int64_t first, int64_t stop, int32_t depth) {
    thread_local std::vector<float> scratch;
    if (static_cast<int64_t>(scratch.size()) < 2 * size_) scratch.resize(2 * size_);
    float *stream = scratch.data(), *delta = stream + size_;
    int32_t row_of_delta = -1;
    for (int64_t token = first; token < stop; ++token) {
      const int32_t row = depth ? layer_.row_of_token.at(token) : -1;
      if (row >= 0 && layer_.entry_slot.at(row, 0) >= 0) {
        if (row == row_of_delta) {
          add(token, row, delta);
        } else if (is_fixed(row, depth)) {  // what is added does not depend on the token
          row_of_delta = row;
          std::fill(delta, delta + size_, 0.0f);
          for (int32_t e = 0; e < depth && layer_.entry_slot.at(row, e) >= 0; ++e) {
            add_scaled(delta, layer_.entry_ab.at<float>(row, e), direction(row, e), size_);
          }
          add(token, row, delta);
        } else {
          row_of_delta = -1;
          load(token, stream);
          std::copy(stream, stream + size_, delta);
          if (apply(token, row, depth, delta)) {
            for (int64_t d = 0; d < size_; ++d) delta[d] -= stream[d];
            add(token, row, delta);
          }
        }
      }
      if (is_traced_ || is_stored_) {
        load(token, stream);
        for (int64_t k = 0; is_traced_ && k < layer_.trace_slot.rows; ++k) {
          const int32_t slot = layer_.trace_slot.at(k);
          if (slot >= 0) layer_.trace.at<float>(token, k) = dot(stream, layer_.bank.floats(slot), size_);
        }
        if (is_stored_) std::copy(stream, stream + size_, layer_.rows.floats(token));
      }
    }
  }

  const float* direction(int32_t row, int32_t e) const { return layer_.bank.floats(layer_.entry_slot.at(row, e)); }

  bool is_fixed(int32_t row, int32_t depth) const {
    for (int32_t e = 0; e < depth && layer_.entry_slot.at(row, e) >= 0; ++e) {
      if (layer_.entry_mode.at(row, e) || (&layer_.entry_ab.at<float>(row, e))[1] != 0) return false;
    }
    return true;
  }

  // Applies the entries of a row to the stream of a token; whether any of them acted.
  bool apply(int64_t token, int32_t row, int32_t depth, float* h) {
    bool has_acted = false;
    for (int32_t e = 0; e < depth && layer_.entry_slot.at(row, e) >= 0; ++e) {
      const float* d = direction(row, e);
      const float a = (&layer_.entry_ab.at<float>(row, e))[0], b = (&layer_.entry_ab.at<float>(row, e))[1];
      const int32_t mode = layer_.entry_mode.at(row, e), gate = layer_.entry_gate.at(row, e);
      const float p = b != 0 || mode & (CLAMP | PROBE) ? dot(h, d, size_) : 0;
      if (mode & PROBE) {
        layer_.probe.at<float>(token, gate) = p;
        continue;
      }
      if (mode & (ABOVE | BELOW)) {
        const float seen = mode & PROMPT   ? prompt_sums_[gate]
                           : mode & STORED ? layer_.probe.at<float>(token, gate)
                                           : dot(h, layer_.bank.floats(gate), size_);
        const float threshold = layer_.entry_threshold.at<float>(row, e);
        const bool holds = mode & ABOVE ? seen > threshold : seen < threshold;
        if (mode >> HELD_SHIFT) layer_.trace.at<float>(token, (mode >> HELD_SHIFT) - 1) = holds;
        if (!holds) continue;
      }
      const float before = mode & (RELATIVE | KEEP_NORM) ? norm(h, size_) : 1, unit = mode & RELATIVE ? before : 1;
      float c = a * unit + b * p;
      if (mode & CLAMP) c = p < a * unit ? a * unit - p : p > b * unit ? b * unit - p : 0;
      add_scaled(h, c, d, size_);
      has_acted = true;
      if (mode & KEEP_NORM) {
        const float after = norm(h, size_);
        if (after > 0) {
          const float ratio = before / after;
          for (int64_t at = 0; at < size_; ++at) h[at] *= ratio;
        }
      }
    }
    return has_acted;
  }

  // Adds to hidden in float32 and rounds once.
  void add(int64_t token, int32_t row, const float* delta) {
    if constexpr (std::is_same_v<Type, Float16>) {
      if (add_within_limit(token, delta)) layer_.cut.at(row) = 1;
    } else if (hidden_.column_stride == 1) {
      auto* own = hidden_.row(token);
#pragma omp simd
      for (int64_t d = 0; d < size_; ++d) own[d] = Type::rounded(Type::widened(own[d]) + delta[d]);
    } else {
      auto* own = hidden_.row(token);
      for (int64_t d = 0; d < size_; ++d) {
        auto& element = own[d * hidden_.column_stride];
        element = Type::rounded(Type::widened(element) + delta[d]);
      }
    }
  }

  // `within` of the specification; whether anything was clipped.
  bool add_within_limit(int64_t token, const float* delta) {
    bool is_cut = false;
    auto* own_row = hidden_.row(token);
    const auto* beside_row = residual_ ? residual_->row(token) : nullptr;
    for (int64_t d = 0; d < size_; ++d) {
      auto& element = own_row[d * hidden_.column_stride];
      const float own = Type::widened(element);
      const float beside = beside_row ? Beside::widened(beside_row[d * residual_->column_stride]) : 0;
      const float stream = own + beside;
      const float most_own = own > FLOAT16_LIMIT ? own : FLOAT16_LIMIT;
      const float least_own = own < -FLOAT16_LIMIT ? own : -FLOAT16_LIMIT;
      const float most_stream = (stream > FLOAT16_LIMIT ? stream : FLOAT16_LIMIT) - beside;
      const float least_stream = (stream < -FLOAT16_LIMIT ? stream : -FLOAT16_LIMIT) - beside;
      const float most = most_stream < most_own ? most_stream : most_own;
      const float least = least_stream > least_own ? least_stream : least_own;
      float wanted = own + delta[d];  // NaN fails both comparisons and stays
      if (wanted > most) {
        wanted = most;
        is_cut = true;
      } else if (wanted < least) {
        wanted = least;
        is_cut = true;
      }
      element = Type::rounded(wanted);
    }
    return is_cut;
  }

  // The stream of a token in float32, from column `first` on.
  void load(int64_t token, float* to) const { load(token, 0, size_, to); }
  void load(int64_t token, int64_t first, int64_t count, float* to) const {
    const auto* own = hidden_.row(token);
    if (hidden_.column_stride == 1 && (!residual_ || residual_->column_stride == 1)) {
      if (residual_) {
        const auto* beside = residual_->row(token);
#pragma omp simd
        for (int64_t d = 0; d < count; ++d) to[d] = Type::widened(own[first + d]) + Beside::widened(beside[first + d]);
      } else {
#pragma omp simd
        for (int64_t d = 0; d < count; ++d) to[d] = Type::widened(own[first + d]);
      }
      return;
    }
    for (int64_t d = 0; d < count; ++d) {
      to[d] = Type::widened(own[(first + d) * hidden_.column_stride]);
      if (residual_) to[d] += Beside::widened(residual_->row(token)[(first + d) * residual_->column_stride]);
    }
  }

  void sum_segments(int64_t segments) {
    // Short segments are shared out among threads; of long ones each thread sums its own columns.
    bool has_long = false;
    torch::stable::parallel_for(0, segments, std::max<int64_t>(GRAIN / size_, 1), [&](int64_t first, int64_t stop) {
      for (int64_t segment = first; segment < stop; ++segment) {
        if (layer_.segment.at(segment, 1) < LONG_SEGMENT) sum(segment, 0, size_);
      }
    });
    for (int64_t segment = 0; segment < segments; ++segment) {
      has_long = has_long || layer_.segment.at(segment, 1) >= LONG_SEGMENT;
    }
    if (!has_long) return;
    const int64_t blocks = (size_ + COLUMNS - 1) / COLUMNS;
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t stop) {
      for (int64_t segment = 0; segment < segments; ++segment) {
        if (layer_.segment.at(segment, 1) < LONG_SEGMENT) continue;
        sum(segment, first * COLUMNS, std::min(stop * COLUMNS, size_));
      }
    });
  }

  // Columns [first_column, last_column) of one segment.
  void sum(int64_t segment, int64_t first_column, int64_t last_column) {
    const int32_t keep = layer_.keep.at(segment);
    const int64_t row = keep < 0 ? -static_cast<int64_t>(keep) : segment;
    const int64_t first = layer_.segment.at(segment, 0), count = layer_.segment.at(segment, 1);
    float *sums = layer_.sums.floats(row), *last = layer_.last.floats(row);
    if (keep <= 0) std::fill(sums + first_column, sums + last_column, 0.0f);
    alignas(64) float stream[COLUMNS], partial[COLUMNS];
    for (int64_t column = first_column; column < last_column && count; column += COLUMNS) {
      const int64_t columns = std::min(COLUMNS, last_column - column);
      for (int64_t token = first; token < first + count; token += PARTIAL) {
        const int64_t stop = std::min(token + PARTIAL, first + count);
        load(token, column, columns, partial);
        for (int64_t other = token + 1; other < stop; ++other) {
          load(other, column, columns, stream);
          add_scaled(partial, 1, stream, columns);
        }
        add_scaled(sums + column, 1, partial, columns);
      }
      load(first + count - 1, column, columns, last + column);
    }
  }

  const Layer& layer_;
  const Stream<Type> hidden_;
  std::optional<Stream<Beside>> residual_;
  const int64_t tokens_, size_;
  bool is_traced_ = false, is_stored_ = false;
  std::vector<float> prompt_sums_;
};

template <class Run>
void with_type(ScalarType type, const Run& run) {
  switch (type) {
    case ScalarType::Float:
      return run(Float32{});
    case ScalarType::BFloat16:
      return run(BFloat16{});
    case ScalarType::Half:
      return run(Float16{});
    default:
      throw std::runtime_error("steer_and_read: hidden and residual must be float32, bfloat16 or float16");
  }
}

void steer_and_read(const Tensor hidden, const std::optional<Tensor> residual, const Tensor flags) {
  const auto* asked = static_cast<const int32_t*>(flags.data_ptr());
  if (!(asked[STEER] | asked[READ] | asked[TRACE])) return;
  const std::optional<Layer> layer = layer_of(asked);
  if (!layer) throw std::runtime_error("steer_and_read: these flags are of no connected layer");
  with_type(hidden.scalar_type(), [&](auto type) {
    with_type(residual ? residual->scalar_type() : hidden.scalar_type(), [&](auto beside) {
      Step<decltype(type), decltype(beside)>(*layer, hidden, residual).run();
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(vllm_steer, CPU, library) { library.impl("steer_and_read", TORCH_BOX(&steer_and_read)); }

}  // namespace

// `numbers`: for each table its address, two sizes and two strides in bytes. A second layer at the same flags takes the
// first one's place.
extern "C" int64_t vllm_steer_num_tables() { return NUM_TABLES; }

extern "C" void vllm_steer_connect(const void* flags, const int64_t* numbers) {
  auto layer = std::make_unique<Layer>();
  auto* tables = reinterpret_cast<Table*>(layer.get());
  for (int64_t number = 0; number < NUM_TABLES; ++number) {
    const int64_t* of = numbers + 5 * number;
    tables[number] = {reinterpret_cast<char*>(of[0]), of[1], of[2], of[3], of[4]};
  }
  std::unique_lock lock(guard);
  layers[flags] = std::move(layer);
}

extern "C" void vllm_steer_disconnect(const void* flags) {
  std::unique_lock lock(guard);
  layers.erase(flags);
}
