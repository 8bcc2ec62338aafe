// Splits attention into tiles and, in decoding, over keys; combines the splits.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "../threads.h"
#include "../workspace.h"
#include "linear.h"

namespace qvl {

namespace {

constexpr int64_t kMinSplitKeys = 1024;  // of a split: with fewer, combining the splits costs more than they gain
constexpr int64_t kMinGatherBlocks = 4;  // query blocks of a head, from which on gathering its keys and values pays

struct Sequence {
  int64_t query_begin, queries, key_begin, keys;  // begins are token offsets of varlen tensors, else 0
  int64_t first_tile;
  int64_t first_row;  // of gathered keys
};

// Rows that the gathered keys of a sequence take.
int64_t gathered_rows(int64_t keys) { return (keys + kGatherKeys - 1) / kGatherKeys * kGatherKeys; }

int64_t blocks_of(const AttentionArgs& a, int64_t queries) {
  const int64_t rows = a.heads / a.kv_heads * queries, width = kernels().panel_width;
  return (rows + width - 1) / width;
}

// The sequences of a call; returns the number of (kv head, row block) tiles of all. Lengths are checked here, because
// under torch.compile the callers cannot see them, and a wrong one would read foreign memory.
int64_t list_sequences(const AttentionArgs& a, std::vector<Sequence>& sequences) {
  sequences.resize(size_t(a.batch));
  int64_t tiles = 0, rows = 0;
  for (int64_t b = 0; b < a.batch; ++b) {
    Sequence& s = sequences[size_t(b)];
    if (a.cu_seqlens) {
      s.query_begin = s.key_begin = a.cu_seqlens[b];
      s.queries = s.keys = a.cu_seqlens[b + 1] - a.cu_seqlens[b];
      if (s.query_begin < 0 || s.queries < 0 || s.query_begin + s.queries > a.queries)
        throw std::invalid_argument("attention: cu_seqlens must rise from 0 to " + std::to_string(a.queries) +
                                    " (the total length)");
    } else {
      s.query_begin = s.key_begin = 0;
      s.queries = a.queries;
      s.keys = a.key_counts ? a.key_counts[b] : a.keys;
      if (s.keys < 0 || s.keys > a.keys)
        throw std::invalid_argument("attention: key lengths must lie in [0, " + std::to_string(a.keys) + "], got " +
                                    std::to_string(s.keys));
    }
    s.first_row = rows;
    rows += gathered_rows(s.keys);
    s.first_tile = tiles;
    tiles += s.queries ? blocks_of(a, s.queries) * a.kv_heads : 0;
  }
  return tiles;
}

AttentionTile make_tile(const AttentionArgs& a, const Sequence& s, int64_t b, int64_t index, GemmBackend backend) {
  const int64_t blocks = blocks_of(a, s.queries), kv_head = index / blocks, block = index % blocks;
  const int64_t group = a.heads / a.kv_heads, head = kv_head * group, size = dtype_bytes(a.dtype);
  const int64_t batch = a.cu_seqlens ? 0 : b;
  AttentionTile t{};
  t.q = static_cast<const char*>(a.q.data) +
        (batch * a.q.stride_b + s.query_begin * a.q.stride_t + head * a.q.stride_h) * size;
  t.k = static_cast<const char*>(a.k.data) +
        (batch * a.k.stride_b + s.key_begin * a.k.stride_t + kv_head * a.k.stride_h) * size;
  t.v = static_cast<const char*>(a.v.data) +
        (batch * a.v.stride_b + s.key_begin * a.v.stride_t + kv_head * a.v.stride_h) * size;
  t.out = static_cast<char*>(a.out.data) +
          (batch * a.out.stride_b + s.query_begin * a.out.stride_t + head * a.out.stride_h) * size;
  if (a.lse) {
    t.lse = a.cu_seqlens ? a.lse + head * a.queries + s.query_begin : a.lse + (b * a.heads + head) * a.queries;
    t.lse_h = a.queries;
  }
  if (a.mask.kind != MaskKind::none) {
    const int64_t mask_size = a.mask.kind == MaskKind::boolean ? 1 : size;
    t.mask = static_cast<const char*>(a.mask.data) + (b * a.mask.stride_b + head * a.mask.stride_h) * mask_size;
  }
  t.queries = s.queries, t.keys = s.keys;
  t.row_begin = block * kernels().panel_width;
  t.row_end = std::min(t.row_begin + kernels().panel_width, group * s.queries);
  t.key_begin = 0, t.key_end = s.keys;
  t.backend = backend;
  return t;
}

void store(float value, DType dtype, void* base, int64_t index) {
  for_dtype(dtype, [&](auto element) { from_float(value, static_cast<decltype(element)*>(base)[index]); });
}

// Combines the splits of one tile (flash-decoding): each row's [row_max, row_sum, out] partials.
void combine_splits(const AttentionArgs& a, const AttentionTile& t, const float* partials, int64_t splits,
                    int64_t stride) {
  for (int64_t r = 0; r < t.row_end - t.row_begin; ++r) {
    const int64_t row = t.row_begin + r;
    float max = -INFINITY, sum = 0.0f;
    for (int64_t i = 0; i < splits; ++i) max = std::max(max, partials[i * stride + r * (a.head_dim + 2)]);
    const float base = max == -INFINITY ? 0.0f : max;
    float out[kMaxHeadDim] = {};
    for (int64_t i = 0; i < splits; ++i) {
      const float* partial = partials + i * stride + r * (a.head_dim + 2);
      const float alpha = std::exp(partial[0] - base);
      sum += partial[1] * alpha;
      for (int64_t d = 0; d < a.head_dim; ++d) out[d] += partial[2 + d] * alpha;
    }
    const float inverse = sum > 0.0f ? 1.0f / sum : (sum != sum ? sum : 0.0f);
    const int64_t offset = row / t.queries * a.out.stride_h + row % t.queries * a.out.stride_t;
    for (int64_t d = 0; d < a.head_dim; ++d) store(out[d] * inverse, a.dtype, t.out, offset + d);
    if (t.lse) t.lse[row / t.queries * t.lse_h + row % t.queries] = max + std::log(sum);
  }
}

}  // namespace

void run_attention(const AttentionArgs& a) {
  const KernelTable& table = kernels();
  thread_local std::vector<Sequence> sequences_storage;
  std::vector<Sequence>& sequences = sequences_storage;
  const int64_t tiles = list_sequences(a, sequences);
  if (tiles == 0) return;
  const GemmBackend backend = gemm_backend(a.dtype, a.head_dim, 2);
  const int64_t scratch_floats = attention_scratch_floats(table, a.head_dim);
  const auto find = [&](int64_t tile) {
    const auto after = std::upper_bound(sequences.begin(), sequences.end(), tile,
                                        [](int64_t value, const Sequence& s) { return value < s.first_tile; });
    return int64_t(after - sequences.begin()) - 1;
  };
  bf16* k_rows = nullptr;  // of all heads and sequences, where they are gathered
  float* v_pairs = nullptr;
  const int64_t rows = sequences.back().first_row + gathered_rows(sequences.back().keys);
  const auto tile_at = [&](int64_t tile) {
    const int64_t b = find(tile);
    const Sequence& s = sequences[size_t(b)];
    AttentionTile t = make_tile(a, s, b, tile - s.first_tile, backend);
    if (k_rows) {
      const int64_t row = (tile - s.first_tile) / blocks_of(a, s.queries) * rows + s.first_row;
      t.k_rows = k_rows + row * a.head_dim;
      t.v_pairs = v_pairs + row / 2 * a.head_dim;
    }
    return t;
  };
  const auto scratch = [&] {
    thread_local Workspace workspace;
    return workspace.get<float>(scratch_floats);
  };

  int64_t splits = 1;
  if (tiles < 2 * max_threads() && !a.cu_seqlens)
    splits = std::min((2 * int64_t(max_threads()) + tiles - 1) / tiles, a.keys / kMinSplitKeys);
  if (splits <= 1) {
    // Matrix units read values in an order of their own.
    const bool pays =
        (table.has_tiles || a.k.stride_t > a.head_dim) && tiles >= kMinGatherBlocks * a.batch * a.kv_heads;
    if (backend == GemmBackend::bf16_dot && a.mask.kind == MaskKind::none && pays) {
      thread_local Workspace k_rows_ws, v_pairs_ws;
      k_rows = k_rows_ws.get<bf16>(a.kv_heads * rows * a.head_dim);
      v_pairs = v_pairs_ws.get<float>(a.kv_heads * rows / 2 * a.head_dim);
      // Each tile gathers its share of the keys and values that all tiles of its head then read.
      parallel_tasks(tiles, [&](int64_t tile) {
        const AttentionTile t = tile_at(tile);
        const int64_t blocks = blocks_of(a, t.queries), block = t.row_begin / table.panel_width,
                      steps = gathered_rows(t.keys) / kGatherKeys;
        const int64_t begin = steps * block / blocks * kGatherKeys, end = steps * (block + 1) / blocks * kGatherKeys;
        table.attention_gather(a, t, begin, std::min(end, t.keys));
      });
    }
    return parallel_tasks(tiles, [&](int64_t tile) { table.attention_tile(a, tile_at(tile), scratch()); });
  }
  const int64_t stride = table.panel_width * (a.head_dim + 2);
  thread_local Workspace partials_ws;
  float* partials = partials_ws.get<float>(tiles * splits * stride);
  parallel_tasks(tiles * splits, [&](int64_t index) {
    AttentionTile t = tile_at(index / splits);
    const int64_t split = index % splits, keys = t.keys;
    const int64_t block_count = (keys + kAttentionKeys - 1) / kAttentionKeys;
    t.key_begin = std::min(keys, block_count * split / splits * kAttentionKeys);
    t.key_end = std::min(keys, block_count * (split + 1) / splits * kAttentionKeys);
    t.partial = partials + index * stride;
    table.attention_tile(a, t, scratch());
  });
  parallel_tasks(tiles, [&](int64_t tile) {
    combine_splits(a, tile_at(tile), partials + tile * splits * stride, splits, stride);
  });
}

}  // namespace qvl
