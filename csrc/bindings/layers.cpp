// Python binding of decoder_layers, with its layer and KV-cache handles, and vision_block.
#include "../ops/layers.h"

#include <array>
#include <vector>

#include "common.h"

namespace qvl {

// KV-cache handle: where a layer's keys and values [B, Hkv, S_cap, D] lie.
struct LayerCache {
  MutableView keys, values;
};

void bind_layers(py::module_& m) {
  py::class_<DecoderLayerArgs>(
      m, "DecoderLayer",
      "Weights and sizes of a Qwen3-VL text decoder layer, for many calls; what they point to must outlive it")
      .def(py::init([](std::array<Ptr, 4> norms, std::array<Weight, 7> weights, int64_t hidden, int64_t heads,
                       int64_t kv_heads, int64_t head_dim, int64_t mlp, float eps, float scale, int dtype) {
             DecoderLayerArgs a{};
             a.input_norm = in(norms[0]), a.q_norm = in(norms[1]), a.k_norm = in(norms[2]), a.post_norm = in(norms[3]);
             a.q = weights[0], a.k = weights[1], a.v = weights[2], a.o = weights[3];
             a.gate = weights[4], a.up = weights[5], a.down = weights[6];
             a.hidden = hidden, a.heads = heads, a.kv_heads = kv_heads, a.head_dim = head_dim, a.mlp = mlp;
             a.eps = eps, a.scale = scale, a.dtype = to_dtype(dtype);
             return a;
           }),
           "norms"_a, "weights"_a, "hidden"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "mlp"_a, "eps"_a, "scale"_a,
           "dtype"_a, "norms: input, q, k, post; weights: q, k, v, o, gate, up, down");

  py::class_<LayerCache>(m, "LayerCache",
                         "Where the keys and values of a layer lie, for many calls; the memory must outlive it")
      .def(py::init([](Ptr keys, Ptr values, Strides keys_s, Strides values_s) {
             const auto cache_view = [](Ptr data, Strides s) { return mutable_view(data, {s[0], s[2], s[1]}); };
             return LayerCache{cache_view(keys, keys_s), cache_view(values, values_s)};
           }),
           "keys"_a, "values"_a, "keys_strides"_a, "values_strides"_a, "strides of batch, head and position");

  m.def(
      "decoder_layers",
      [](const std::vector<const DecoderLayerArgs*>& layers, Ptr x, const std::vector<Ptr>& outs, Ptr cos, Ptr sin,
         std::array<int64_t, 2> cos_s, std::array<int64_t, 2> sin_s, const std::vector<const LayerCache*>& caches,
         int64_t batch, int64_t queries, int64_t past, int mask_kind, Ptr mask, std::array<int64_t, 4> mask_s) {
        if (outs.size() != layers.size() || caches.size() != layers.size())
          throw std::invalid_argument("decoder_layers: every layer needs an output and a cache");
        py::gil_scoped_release release;
        for (size_t i = 0; i < layers.size(); ++i) {
          DecoderLayerArgs a = *layers[i];
          a.x = in(i ? outs[i - 1] : x), a.out = out(outs[i]);
          a.cos = cos_sin_view(cos, cos_s), a.sin = cos_sin_view(sin, sin_s);
          a.k_cache = caches[i]->keys, a.v_cache = caches[i]->values;
          a.batch = batch, a.queries = queries, a.past = past;
          a.mask = mask_view(mask_kind, mask, mask_s);
          run_decoder_layer(a);
        }
      },
      "layers"_a, "x"_a, "outs"_a, "cos"_a, "sin"_a, "cos_strides"_a, "sin_strides"_a, "caches"_a, "batch"_a,
      "queries"_a, "past"_a, "mask_kind"_a, "mask"_a, "mask_strides"_a,
      "Layers one after the other, each from the output of the one before. caches: a LayerCache each");

  m.def(
      "vision_block",
      [](Ptr x, Ptr out_, std::array<Ptr, 4> norms, std::array<Weight, 4> weights, Ptr cos, Ptr sin, int64_t cos_t,
         int64_t sin_t, Ptr cu_seqlens, int64_t sequences, int64_t tokens, int64_t hidden, int64_t heads,
         int64_t head_dim, int64_t mlp, float eps, float scale, int dtype) {
        VisionBlockArgs a{};
        a.x = in(x), a.out = out(out_);
        a.norm1_w = in(norms[0]), a.norm1_b = in(norms[1]), a.norm2_w = in(norms[2]), a.norm2_b = in(norms[3]);
        a.qkv = weights[0], a.proj = weights[1], a.fc1 = weights[2], a.fc2 = weights[3];
        a.cos = {in(cos), 0, cos_t}, a.sin = {in(sin), 0, sin_t};
        a.cu_seqlens = static_cast<const int32_t*>(in(cu_seqlens));
        a.sequences = sequences, a.tokens = tokens, a.hidden = hidden;
        a.heads = heads, a.head_dim = head_dim, a.mlp = mlp;
        a.eps = eps, a.scale = scale, a.dtype = to_dtype(dtype);
        py::gil_scoped_release release;
        run_vision_block(a);
      },
      "x"_a, "out"_a, "norms"_a, "weights"_a, "cos"_a, "sin"_a, "cos_stride"_a, "sin_stride"_a, "cu_seqlens"_a,
      "sequences"_a, "tokens"_a, "hidden"_a, "heads"_a, "head_dim"_a, "mlp"_a, "eps"_a, "scale"_a, "dtype"_a,
      "One Qwen3-VL vision block. norms: norm1 w, b, norm2 w, b; weights: qkv, proj, fc1, fc2");
}

}  // namespace qvl
