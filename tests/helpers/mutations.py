"""Mutations that the tests must detect: (file, exact expression, replacement, tests of which one must fail), for
``tests/helpers/mutate.py``.

The expression stands exactly once in its file. Mutations are in Python only, so none needs a build.
"""

from typing import NamedTuple

__all__ = ["MUTATIONS", "Mutation"]


class Mutation(NamedTuple):
    file: str
    old: str
    new: str
    tests: str  # of pytest, one or several lines


TEXT, VISION, CONNECTOR, MODELING = (f"qvl_model/qvl/{name}.py" for name in ("text", "vision", "connector", "modeling"))
BASE, CONFIG, CACHE = (f"qvl_model/qvl/{name}.py" for name in ("base", "configuration", "cache"))
MODULES, TRAINING = "qvl_model/modules", "qvl_model/training"
FAST = f"{MODULES}/qvl.py"

REFERENCE = "tests/qvl/test_qvl_reference.py"
EXACT_MLP, EXACT_ATTENTION = (
    f"{REFERENCE}::test_plain_in_float64[sdpa-mlp]",
    f"{REFERENCE}::test_plain_in_float64[sdpa-attention]",
)
EPSILON, ATTENTION_EPSILON = f"{REFERENCE}::test_fp32[epsilon]", f"{REFERENCE}::test_fp32[attention epsilon]"
DROPOUT, SDPA_DROPOUT = (
    "tests/qvl/test_qvl_pins.py::test_dropout_acts_where_the_formulas_say",
    "tests/qvl/test_qvl_pins.py::test_dropout_of_sdpa",
)
CHECKPOINTS = "tests/qvl/test_qvl_pins.py::test_checkpointing_keeps_one_hidden_state_per_layer"
DEFAULTS = "tests/qvl/test_qvl_pins.py::test_every_default_of_every_preset"
ATTENTIONS = "tests/qvl/test_qvl_attentions.py"
GENERATE = "tests/qvl/test_qvl_generate.py"
PRECISION = "tests/training/test_training_precision.py"
LOOP, CHOOSING, STEP_CPU, STEP_GPU, IMAGES = (
    f"qvl_model/generation/{name}.py" for name in ("loop", "sampling", "step_cpu", "step_gpu", "images")
)
ON_CPU, ON_GPU, IMAGES_ON_GPU = (
    "tests/model/test_generation.py",
    "tests/model/test_generation_gpu.py",
    "tests/qvl/test_qvl_generate_gpu.py",
)
PADDED, PADDED_ENDS = (
    f"{ON_CPU}::test_as_stock[batch 3, left padding-{options}]" for options in ("greedy", "ends early")
)

MUTATIONS = [
    # A comparison of accelerated with plain QVL alone does not detect these.
    Mutation(f"{MODULES}/decoder_layer.py", "eps=norms[0].variance_epsilon, scale", "eps=1e-6, scale", EPSILON),
    Mutation(f"{MODULES}/vision.py", "eps=self.norm1.eps,", "eps=1e-6,", EPSILON),
    Mutation(TEXT, "self.gate.tanh() * self.dropout(out)", "self.gate.tanh() * out", DROPOUT),
    Mutation(TEXT, "values, mask, self.attention_dropout)", "values, mask)", f"{DROPOUT}\n{SDPA_DROPOUT}"),
    Mutation(
        TEXT,
        "self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))",
        "self.mlp(self.post_attention_layernorm(hidden_states))",
        DROPOUT,
    ),
    Mutation(
        TEXT,
        "self.dropout(embeddings + self.embed_token_types(token_types))",
        "embeddings + self.embed_token_types(token_types)",
        DROPOUT,
    ),
    Mutation(
        TEXT,
        "self.scaling, self.is_causal = self.head_dim**-0.5, False",
        "self.scaling, self.is_causal = 1.0, False",
        EXACT_MLP,
    ),
    Mutation(TEXT, "self.gate.tanh() *", "self.gate *", EXACT_MLP),
    Mutation(CONNECTOR, "queries = queries + self.attn(", "queries = self.attn(", EXACT_ATTENTION),
    Mutation(
        CONNECTOR,
        "self.scaling, self.is_causal = self.head_dim**-0.5, False",
        "self.scaling, self.is_causal = 1.0, False",
        EXACT_ATTENTION,
    ),
    Mutation(VISION, "weight = (position - low)", "weight = (position - low).round()", EXACT_MLP),
    Mutation(
        VISION,
        "            features = block(features",
        "            block.gradient_checkpointing = False\n            features = block(features",
        CHECKPOINTS,
    ),
    Mutation(CONFIG, "vision_num_attention_heads: int = 16", "vision_num_attention_heads: int = 8", DEFAULTS),
    Mutation(CONFIG, "rope_theta: float | int = 5000000.0", "rope_theta: float | int = 1000000.0", DEFAULTS),
    Mutation(f"{TRAINING}/run.py", 'fp16=precision == "fp16"', "fp16=False", f"{PRECISION}::test_flags"),
    # The tower.
    Mutation(VISION, ".any(4).any(2)", ".all(4).all(2)", EXACT_MLP),
    Mutation(VISION, "pixel_values = pixel_values.masked_fill(~mask[:, None], 0)", "pass", EXACT_MLP),
    Mutation(
        VISION, "torch.stack((row - top[image], column - left[image]), 1)", "torch.stack((row, column), 1)", EXACT_MLP
    ),
    Mutation(VISION, "n - line.flip(1).byte().argmax(1) - _first(line), 0)", "line.sum(1), 0)", EXACT_MLP),
    Mutation(VISION, "angles.flatten(1).repeat(1, 2)", "angles.flip(1).flatten(1).repeat(1, 2)", EXACT_MLP),
    Mutation(VISION, "angles.flatten(1).repeat(1, 2)", "angles.flatten(1).repeat_interleave(2, 1)", EXACT_MLP),
    Mutation(VISION, "self.config.vision_rope_theta", "10000.0", f"{REFERENCE}::test_plain_in_float64[sdpa-epsilon]"),
    Mutation(VISION, "return self.norm(features), lengths", "return features, lengths", EXACT_ATTENTION),
    Mutation(
        VISION,
        "self.norm1.eps = self.norm2.eps = config.layer_norm_eps",
        "pass",
        "tests/qvl/test_qvl_spec.py::test_every_norm_has_the_epsilon",
    ),
    Mutation(VISION, "[0, *(length for length in lengths if length)]", "[0, sum(lengths)]", EXACT_MLP),
    # The connector.
    Mutation(CONNECTOR, "return self.norm(tokens).flatten(0, 1)", "return tokens.flatten(0, 1)", EXACT_ATTENTION),
    Mutation(CONNECTOR, "self.attn(self.norm1(queries), features", "self.attn(queries, features", EXACT_ATTENTION),
    Mutation(CONNECTOR, "queries + self.mlp(self.norm2(queries))", "queries + self.mlp(queries)", EXACT_ATTENTION),
    Mutation(CONNECTOR, "patches = None if len(set(counts)) == 1 else", "patches = None if True else", EXACT_ATTENTION),
    Mutation(MODELING, "order = [i % per_sample for", "order = [0 for", EXACT_MLP),
    # The decoder.
    Mutation(
        TEXT, "keys = self.k_norm(self.k_proj(tokens).view(shape))", "keys = self.k_proj(tokens).view(shape)", EXACT_MLP
    ),
    Mutation(TEXT, "attention(self.norm(hidden_states), *memory)", "attention(hidden_states, *memory)", EXACT_MLP),
    Mutation(TEXT, "else (input_ids == image).long()", "else torch.zeros_like(input_ids)", EXACT_MLP),
    Mutation(
        TEXT,
        "attention_mask.long().cumsum(1) - 1",
        "torch.arange(attention_mask.shape[1])[None] + 0 * attention_mask",
        EXACT_MLP,
    ),
    Mutation(TEXT, "self.config.rope_theta)", "10000.0)", f"{REFERENCE}::test_plain_in_float64[sdpa-epsilon]"),
    Mutation(TEXT, "out = out.masked_fill(blind, 0)", "pass", EXACT_ATTENTION),
    Mutation(TEXT, "weights.masked_fill(blind, 0)", "weights", ATTENTIONS),
    Mutation(TEXT, "~mask, torch.finfo(hidden_states.dtype).min", "~mask, 0", ATTENTIONS),
    Mutation(TEXT, "residual + self.dropout(hidden_states)", "residual + hidden_states", DROPOUT),
    Mutation(BASE, "dropout=dropout if module.training else 0.0", "dropout=dropout", SDPA_DROPOUT),
    Mutation(BASE, ">= lengths.clamp(min=1)[:, None]", "> lengths.clamp(min=1)[:, None]", EXACT_MLP),
    Mutation(BASE, ">= lengths.clamp(min=1)[:, None]", ">= lengths[:, None]", ATTENTIONS),
    Mutation(BASE, "twin = copy.copy(attention)", "twin = attention", ATTENTIONS),
    Mutation(
        MODELING, "return hidden[torch.arange(batch, device=hidden.device), last]", "return hidden[:, -1]", EXACT_MLP
    ),
    # Images in the cache.
    Mutation(
        TEXT,
        "lengths = None if lengths is None else lengths.repeat_interleave(visual.repeats)",
        "pass",
        f"{GENERATE}::test_beams_and_samples",
    ),
    Mutation(
        CACHE,
        "self.lengths = None if self.lengths is None else self.lengths[indices.to(self.lengths.device)]",
        "pass",
        f"{GENERATE}::test_rows_of_a_cache_are_reordered_repeated_and_selected",
    ),
    # Accelerated modules.
    Mutation(
        FAST,
        "return qvl_kernels.cross_attention(q, k, v, kv_lens=lengths, scale=self.scaling, dropout_p=dropout), None",
        "return qvl_kernels.cross_attention(q, k, v, scale=self.scaling, dropout_p=dropout), None",
        f"{REFERENCE}::test_fp32[mlp]",
    ),
    Mutation(
        FAST,
        "return qvl_kernels.cross_attention(q, k, v, kv_lens=lengths, scale=self.scaling)\n",
        "return qvl_kernels.cross_attention(q, k, v, scale=self.scaling)\n",
        f"{REFERENCE}::test_fp32[attention]",
    ),
    Mutation(FAST, "not (dropout.training and dropout.p > 0.0)", "True", DROPOUT),
    Mutation(
        FAST,
        "return self.fc2(qvl_kernels.gelu_tanh(wide))",
        "return self.fc2(nn.functional.gelu(wide))",
        f"{REFERENCE}::test_fp32[attention]",
    ),
    Mutation(
        f"{MODULES}/decoder_layer.py",
        '"num_heads": len(q._parameters["weight"])',
        '"num_heads": len(k._parameters["weight"])',
        f"{GENERATE}::test_every_decoding_step_is_fused",
    ),
    Mutation(
        f"{MODULES}/text.py",
        "hidden_states, self.weight, eps=self.variance_epsilon",
        "hidden_states, self.weight, eps=1e-6",
        EPSILON,
    ),
    Mutation(
        f"{MODULES}/text.py",
        "causal=attention_mask is None and queries > 1",
        "causal=False",
        f"{REFERENCE}::test_gradients\n{REFERENCE}::test_fp32",
    ),
    # Decode steps.
    Mutation(
        LOOP,
        "positions[None] if positions.dim() == 2 else positions[-3:]",
        "positions[None] if positions.dim() == 2 else positions[:3]",
        f"{ON_CPU}::test_as_stock[image-greedy]",
    ),
    Mutation(LOOP, "padding_mask = mask.bool() if has_padding else None", "padding_mask = None", PADDED),
    Mutation(
        LOOP,
        "release = not (users or foreign or config.return_dict_in_generate)",
        "release = True",
        f"{ON_GPU}::test_returned_cache_goes_on_to_the_next_turn",
    ),
    Mutation(CHOOSING, "tokens = tokens * self.unfinished + self._pad * (1 - self.unfinished)", "pass", PADDED_ENDS),
    Mutation(CHOOSING, "self.unfinished.max() == 0", "self.unfinished.min() == 0", PADDED_ENDS),
    Mutation(STEP_CPU, "self._next += 1", "pass", f"{ON_CPU}::test_as_stock[text-greedy]"),
    Mutation(STEP_CPU, "[..., -1:] + 1, 0", "[..., -1:], 0", f"{ON_CPU}::test_as_stock[text-many tokens]"),
    Mutation(
        STEP_CPU,
        "_COS_SIN_POSITIONS if several else 1",
        "_COS_SIN_POSITIONS",
        f"{ON_CPU}::test_tables_that_depend_on_all_positions",
    ),
    Mutation(STEP_CPU, "(0, _ROOM), value=True)", "(0, _ROOM), value=False)", PADDED),
    Mutation(
        STEP_CPU,
        "hidden = layer.fuse(hidden, None, None, self._cache, False)",
        "pass",
        f"{GENERATE}::test_tokens_are_steps",
    ),
    Mutation(STEP_GPU, "self._positions.add_(1)", "pass", f"{ON_GPU}::test_same_as_stock[text-greedy]"),
    Mutation(
        STEP_GPU, "self._idle.remove(step)", "pass", f"{ON_GPU}::test_a_streamer_that_generates_has_a_step_of_its_own"
    ),
    Mutation(
        STEP_GPU,
        "[x.data_ptr() for x in _tensors(model)]",
        "[]",
        "tests/model/test_generation_graphs.py::test_a_change_is_noticed",
    ),
    Mutation(
        STEP_GPU,
        "if (step.rows, step.layers_with_images) == (rows, layers)",
        "if step.rows == rows",
        f"{IMAGES_ON_GPU}::test_one_step_serves_all_images",
    ),
    Mutation(
        IMAGES,
        "= keys.shape[2] if lengths is None else lengths",
        "= keys.shape[2]",
        f"{IMAGES_ON_GPU}::test_as_the_plain_model",
    ),
    # Training.
    Mutation(
        f"{TRAINING}/trainer.py",
        "if parameter.dim() >= 2",
        "if parameter.dim() >= 1",
        "tests/training/test_training_run.py::test_weight_decay_is_for_matrices",
    ),
    Mutation(f"{TRAINING}/run.py", 'bf16=precision == "bf16"', "bf16=False", f"{PRECISION}::test_flags"),
]
