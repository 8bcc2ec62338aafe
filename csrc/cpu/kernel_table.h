// The arguments of all kernels, and the kernel table: one struct of function pointers per instruction set. csrc/ops
// splits work over threads and calls the table.
#pragma once
#include "../dtype.h"

namespace qvl {

// y = norm(x [+ residual]) * weight [+ bias], one row of `size` elements at a time. Strides in elements.
struct NormArgs {
  const void* x;
  const void* residual;  // or nullptr
  const void* weight;
  const void* bias;  // layer norm only; nullptr means RMS norm
  void* y;
  void* sum;  // x + residual, or nullptr
  int64_t size;
  int64_t x_stride, residual_stride, y_stride, sum_stride;
  float eps;
  DType dtype;
};

// How GEMM, GEMV and attention multiply: FMA on operands widened to fp32, or the dot product of bf16 pairs (vdpbf16ps).
enum class GemmBackend : int { fma = 0, bf16_dot = 1 };

// Packs activations into GEMM panels of `panel_width` rows, transposed so that rows are vector lanes.
// fma: float [K][width]; bf16_dot: uint32 [K / 2][width], each a pair (k, k + 1) of bf16 (the VNNI layout). The last
// panel is narrower, a multiple of the vector width; its unused lanes are zero.
struct GemmPackArgs {
  const void* x;  // [M, K] rows
  int64_t x_stride;
  int64_t m, k;
  DType dtype;  // of x
  GemmBackend backend;
  void* panels;
};

enum class Activation : int { none = 0, gelu_tanh = 1, swiglu = 2 };

enum class WeightFormat : int { dense = 0, int8 = 1, int4 = 2 };  // layouts: qvl_kernels/quantization.py

// A weight [n, k] of a linear layer, its bias, and the scales and zero-points of a quantised one.
struct Weight {
  const void* w;     // elements of the activations' dtype, int8 values, or nibbles
  int64_t stride;    // of rows, in elements; in bytes for int4
  const void* bias;  // [n] or nullptr
  WeightFormat format = WeightFormat::dense;
  const void* scales = nullptr;  // int8: fp32 [n]; int4: of scale_dtype [n][k padded / group]
  int64_t scale_stride = 0;
  int64_t group = 0;                // int4: inputs per scale
  DType scale_dtype = DType::bf16;  // int4: bf16 or f16
  const uint8_t* zeros = nullptr;   // int4: zero-points, two in a byte, low nibble first; nullptr: all are 8
  int64_t zero_stride = 0;          // of rows, in bytes
};
constexpr int kInt4Zero = 8;  // the zero-point of a symmetric weight

// The zero-point of a group of an int4 row whose zero-points are `zeros`, which may be nullptr.
inline int int4_zero(const uint8_t* zeros, int64_t group) {
  return zeros ? zeros[group / 2] >> (group % 2 * 4) & 15 : kInt4Zero;
}

// The scale of a group of an int4 row, of `dtype`.
inline float int4_scale(const void* scales, DType dtype, int64_t group) {
  return dtype == DType::bf16 ? to_float(static_cast<const bf16*>(scales)[group])
                              : to_float(static_cast<const f16*>(scales)[group]);
}

// out [m, n] = act(x [m, k] W^T + bias) + residual. x comes with the kernel that is called.
struct LinearCall {
  Weight weight;
  Weight up{};  // swiglu: the up projection, weight is the gate; both in one format
  int64_t n = 0;
  Activation activation = Activation::none;
  const void* residual = nullptr;  // [m, n] or nullptr
  int64_t residual_stride = 0;
  void* out = nullptr;
  int64_t out_stride = 0;
};

// What every GEMV and GEMM kernel takes besides its activations.
struct LinearArgs : LinearCall {
  int64_t m, k;
  DType dtype;  // of x, bias, residual, row-major output, and dense weights
};

// Weight rows are used as they lie in memory. out_panels: out is panels of the next GEMM, else row-major.
struct GemmArgs : LinearArgs {
  const void* panels;
  GemmBackend backend;
  bool out_panels;
};

// Up to this many activation rows go through GEMV, one pass over the weights at memory bandwidth.
constexpr int64_t kGemvMaxM = 16;
constexpr int64_t kTileGemvMaxM = 4;  // with matrix units, whose GEMM takes as long for 16 rows as for one

struct GemvArgs : LinearArgs {
  const float* x;    // m rows that gemv_prepare wrote
  int64_t x_stride;  // in floats
  GemmBackend backend;
};

constexpr int64_t kInt8Group = 128;  // activations per scale with int8 weights; int4 weights bring their own group

constexpr int64_t kTileQuantGroup = 128;  // activations per scale in quantised GEMMs on matrix units

// Inputs per scale of a quantised activation row; k_padded is a whole number of groups.
inline int64_t activation_group(WeightFormat format, int64_t weight_group) {
  return format == WeightFormat::int8 ? kInt8Group : weight_group;
}

// Quantises activations to int8, one scale per row and group: values = round(x * 127 / amax), scale = amax / 127.
// A group with an element that is not finite gets the scale NaN; one with amax below kTinyActivation becomes zeros.
struct QuantizeArgs {
  const void* x;  // [m, k] rows
  int64_t x_stride, k, group, k_padded;
  DType dtype;
  int8_t* values;  // [m][k_padded], zero from k on
  float* scales;   // [m][k_padded / group]
};
constexpr float kTinyActivation = 1e-30f;

// Packed quantised activation row, what the quantised GEMV reads: [k_padded] int8 or int16 values in the order of the
// format's dot products, fp32 scales (int8: one per chunk; int4: one per lane), and zero-point compensation. The dot
// instructions are u8s8. int8 weights carry an offset of 128: each chunk's integer sum begins at minus 128 times the
// sum of its activations, int32. int4 weights carry their zero-points: minus the sum of each lane's activations, an
// integer in fp32, is multiplied by them.
constexpr int64_t kQuantChunk = 128;  // inputs; k_padded is a whole number of chunks
inline int64_t packed_row_bytes(int64_t k_padded) { return 3 * k_padded; }

constexpr int64_t kQuantGemvMaxM = 16;  // as kGemvMaxM, over quantised weights

struct QuantGemvPrepareArgs {
  const void* x;  // [m, k] rows
  int64_t x_stride, k, k_padded, group;
  DType dtype;
  WeightFormat format;
  char* packed_rows;  // m of them, 64-byte aligned
};

// GEMV over quantised weights, whose row strides are in bytes.
struct QuantGemvArgs : LinearArgs {
  int64_t k_padded;
  int64_t group;      // inputs per activation scale, and of int4 per weight scale
  char* packed_rows;  // m rows that quant_gemv_prepare wrote
};

// Packs activations into int8 GEMM panels: 32-bit words [words][width] with a whole number of elements each
// (KernelTable::quant_per_word; K is padded to a multiple of 4), and scales [groups][width] beside them.
struct QuantGemmPackArgs {
  QuantizeArgs rows;  // without values and scales
  int64_t m;
  uint32_t* words;
  float* scales;
};

// As GemmArgs over int8 panels and quantised weights, whose row strides are in bytes. out_panels: out is the words of
// the next GEMM's panels, quantised in groups of out_group, with their scales in out_scales.
struct QuantGemmArgs : GemmArgs {
  int64_t group;  // inputs per activation scale, and of int4 per weight scale
  const float* x_scales;
  int64_t out_group;
  float* out_scales;
};

// silu(x) * up, or gelu_tanh(x + bias); rows of `size` elements.
struct ActivationArgs {
  Activation activation;
  const void* x;
  const void* up;    // swiglu
  const void* bias;  // gelu_tanh; [size] or nullptr
  void* y;
  int64_t rows, size, x_stride, up_stride, y_stride;
  DType dtype;
};

constexpr int64_t kMaxHeadDim = 512;  // of rope and attention: bounds their stack buffers

// A tensor [B, T, H, D] by its strides in elements; D is contiguous. Pointer: const void* to read, void* to write.
template <class Pointer>
struct HeadsView {
  Pointer data;
  int64_t stride_b, stride_t, stride_h;
};
using View = HeadsView<const void*>;
using MutableView = HeadsView<void*>;

inline View read_only(const MutableView& view) { return {view.data, view.stride_b, view.stride_t, view.stride_h}; }

// The cos or sin cache [B, T, D]; stride_b is 0 where one row serves the whole batch.
struct CosSinView {
  const void* data;
  int64_t stride_b, stride_t;
};

enum class MaskKind : int { none = 0, boolean = 1, additive = 2 };

// Attention mask [B, H, T, S] by its strides in elements (0 where broadcast). boolean: a nonzero byte lets the query
// see the key; additive: an attention bias of q's dtype, added to the scaled scores.
struct MaskView {
  MaskKind kind;
  const void* data;
  int64_t stride_b, stride_h, stride_t, stride_s;
};

// Rotary embedding of q [B, T, H, D] and k [B, T, Hkv, D], after an RMS norm of each head where weights are given.
// Outputs may be the inputs, or rows of a KV cache.
struct RopeArgs {
  View q, k;
  MutableView q_out, k_out;
  const void *q_weight, *k_weight;  // [D] or nullptr for no norm
  CosSinView cos, sin;
  DType cos_sin_dtype;  // f32 or dtype
  int64_t batch, time, heads, kv_heads, head_dim;
  float eps;
  DType dtype;
};

struct AttentionArgs {
  View q;           // [B, T, H, D]
  View k, v;        // [B, S, Hkv, D]
  MutableView out;  // [B, T, H, D]
  float* lse;       // log-sum-exp [B, H, T], contiguous, natural log, -inf for fully masked rows; or nullptr
  int64_t batch, queries, keys, heads, kv_heads, head_dim;
  float scale;
  bool causal;                // query i of a sequence of T sees keys <= S_b - T + i, S_b the sequence's key count
  const int64_t* key_counts;  // [B] valid keys of each sequence, a prefix (cache_seqlens); or nullptr for all
  const int32_t* cu_seqlens;  // [B + 1]: q, k, v, out are varlen [N, ...], stride_b unused; or nullptr
  MaskView mask;
  DType dtype;
};

// A tile of attention: one block of query rows of one sequence and one key/value head. Its grouped query heads share
// the block: row r is head r / queries of the group, query r % queries.
struct AttentionTile {
  const void *q, *k, *v;  // at the sequence's first query/key of this kv head's first query head / kv head
  // What attention_gather makes of this sequence and head, or both nullptr: the keys contiguous, and the values as bf16
  // pairs of neighbouring keys, [keys / 2][head_dim] words. With matrix units the values are tiles, and both end with
  // zeros up to a multiple of kGatherKeys.
  void* k_rows;
  float* v_pairs;
  void* out;
  float* lse;  // [heads of the group][queries] with stride lse_h, or nullptr
  int64_t lse_h;
  const void* mask;
  int64_t queries, keys;       // of this sequence
  int64_t row_begin, row_end;  // at most panel_width rows
  int64_t key_begin, key_end;  // the keys of this split
  float* partial;              // split: per row [row_max, row_sum, out[head_dim]] instead of out and lse; or nullptr
  GemmBackend backend;
};

constexpr int64_t kAttentionKeys = 128;  // keys per block
constexpr int64_t kGatherKeys = 32;

// GEMM blocking. A tile is kGemmTileN weight rows (half of them gate, half up for SwiGLU) by up to kGemmTilePanels
// panels. Sized so that one panel's K-block (256 KB), the tile's widened weights (384 KB) and its accumulators fit in a
// 1 MB L2 cache with AVX-512 panels.
constexpr int64_t kGemmTileN = 96;
constexpr int64_t kGemmTilePanels = 8;
constexpr int64_t kGemmKBlock = 1024;  // 32-bit words of k: floats, or bf16 pairs
constexpr int64_t kGemmKBlockFp32 = 128;
constexpr int64_t kTileKBlock = 256;  // words, on matrix units: 32 rows of it (32 KB) stay in L1, 8 panels in L2

// Over quantised weights the tile is a whole number of quantisation groups, because what it computes may be quantised
// in groups for the next GEMM. SwiGLU takes that many rows of both weights.
constexpr int64_t kQuantGemmTileN = 128;
constexpr int64_t kQuantGemmKBlockBytes = 2048;  // of an unpacked weight row
constexpr int64_t kTileQuantKBlockBytes = 1024;  // on matrix units: as kTileKBlock

inline int64_t gemm_tile_n(const GemmArgs& args) {
  return args.activation == Activation::swiglu ? kGemmTileN / 2 : kGemmTileN;
}
inline int64_t gemm_tile_n(const QuantGemmArgs&) { return kQuantGemmTileN; }

// Coordinates of one tile of a GEMM's output: weight rows by panels. Its thread goes on with rows [n_end, next_end).
struct GemmTile {
  int64_t n_begin, n_end, next_end, panel_begin, panel_end;
};

// What multiplies and adds: FMA on vectors, dot products of bf16 pairs and of bytes, and matrix units.
enum class ComputeUnit : int { fma = 0, bf16_dot = 1, int8_dot = 2, bf16_tiles = 3, int8_tiles = 4 };

struct KernelTable {
  const char* name;
  int vector_width;  // fp32 lanes
  int panel_width;   // activation rows per GEMM panel
  void (*norm_rows)(const NormArgs&, int64_t begin, int64_t end);
  void (*gemm_pack)(const GemmPackArgs&, int64_t panel);
  void (*gemm_tile)(const GemmArgs&, const GemmTile&, float* scratch);
  void (*gemv_prepare)(const void* x, DType dtype, int64_t k, GemmBackend backend, float* out);
  void (*gemv_rows)(const GemvArgs&, int64_t n_begin, int64_t n_end);
  void (*quantize_rows)(const QuantizeArgs&, int64_t begin, int64_t end);
  void (*quant_gemv_prepare)(const QuantGemvPrepareArgs&, int64_t begin, int64_t end);  // chunks of all rows
  void (*quant_gemv_rows)(const QuantGemvArgs&, int64_t n_begin, int64_t n_end);
  void (*quant_gemm_pack)(const QuantGemmPackArgs&, int64_t block, char* scratch);
  void (*quant_gemm_tile)(const QuantGemmArgs&, const GemmTile&, float* scratch);
  void (*rope_rows)(const RopeArgs&, int64_t begin, int64_t end);
  void (*activation_rows)(const ActivationArgs&, int64_t begin, int64_t end);
  // Writes the tile's k_rows and v_pairs of keys [begin, end), begin a multiple of kGatherKeys. For
  // GemmBackend::bf16_dot without a mask.
  void (*attention_gather)(const AttentionArgs&, const AttentionTile&, int64_t begin, int64_t end);
  void (*attention_tile)(const AttentionArgs&, const AttentionTile&, float* scratch);
  float (*read_bytes)(const char* data, int64_t bytes);
  int quant_per_word;  // elements of k in a word of a quantised panel
  bool has_bf16_dot;   // GemmBackend::bf16_dot is available in gemm_pack and gemm_tile
  bool has_tiles;      // GemmBackend::bf16_dot and quantised weights use matrix units in GEMM and attention
  double (*run_unit)(ComputeUnit unit, int64_t steps);  // a loop on registers; returns the operations done, or 0
};

// Scratch of one gemm_tile: accumulators and widened weights.
inline int64_t gemm_scratch_floats(const KernelTable& table) {
  return kGemmTilePanels * kGemmTileN * table.panel_width + kGemmTileN * kGemmKBlock;
}

// Scratch of one quant_gemm_tile: accumulators, unpacked weight rows, and the zero-point compensation and scales of
// groups of at least 32 inputs.
inline int64_t quant_gemm_scratch_floats(const KernelTable& table) {
  return kGemmTilePanels * 2 * kQuantGemmTileN * table.panel_width +
         kQuantGemmTileN * (kQuantGemmKBlockBytes / 4 + 2 * kQuantGemmKBlockBytes / 32);
}

// Scratch of one quant_gemm_pack: the rows' values, read a vector at a time, and scales.
inline int64_t quant_gemm_pack_scratch_bytes(const KernelTable& table, const QuantizeArgs& rows) {
  return table.vector_width * (rows.k_padded + rows.k_padded / rows.group * 4) + 64;
}

// Scratch of one attention_tile: q panel, scores, pairs of scores, widened keys or values, mask, out, softmax state.
inline int64_t attention_scratch_floats(const KernelTable& table, int64_t head_dim) {
  const int64_t padded = (head_dim + 15) / 16 * 16;
  return table.panel_width * (2 * padded + 3 * kAttentionKeys + 8) + padded * kAttentionKeys;
}

struct Target {
  const char* name;
  bool (*supported)();  // cpuid and operating-system state; baseline code
  const KernelTable* table;
  bool for_tests = false;  // used only where it is asked for by name
};

// The chosen target's table: the best supported one, or the one that QVL_CPU_ISA or use_isa names.
const KernelTable& kernels();

}  // namespace qvl
