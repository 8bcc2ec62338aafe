"""Named settings of QVL. Keys that a preset leaves out have the default of QVLConfig, which is that of ``qvl-2b``.

The choices of ``qvl-2b``, where the specification leaves a setting open:

- vocabulary 151,936, tied: the tokenizer of Qwen3-VL (a subword tokenizer) is used as it is; untied, its second table
  would cost 0.31 B of the 2 B parameters.
- hidden_size 2048: the width of Qwen3-VL-2B; 32 heads of 64.
- intermediate_size 5632: 2.75 x hidden_size, which with 32 layers brings the whole to 2.16 B parameters.
- num_key_value_heads 8: four query heads share keys and values, so the cache costs 64 KiB per token in 16 bit, and
  max_position_embeddings 32,768 is a cache of 2 GiB: it fits beside 4.3 GB of fp16 weights in 8 GB of GPU memory.
- rope_theta 5e6: as Qwen3-VL.
- vision 24 layers of width 1024, 16 heads, MLP 4096, patches of 16: the vision tower of Qwen3-VL-2B; vision_image_size
  448, the common size, has 28 x 28 learned positions.
- attention connector with 256 queries: an image of any size becomes 256 visual tokens, so cross-attention keys and
  values cost the same 4 MiB per image whatever its resolution; Qwen3-VL spends 196 tokens on an image of 448 x 448.
- vision_projection_dim 1024, the width of the vision tower; language_projection_dim 2048, 32 heads of 64.
- cross-attention in layers 3, 7, ..., 31: 8 of 32, so that fusion is spread over the depth and costs 3.5 % of the
  parameters.
- initializer_range 0.02, which is 2048^-0.5; in ``qvl-tiny`` 0.07, which is 192^-0.5, since what images add to the
  text goes through five matrices. Trained on digits with 0.02 and patches of 8, the loss was 1.10 after 700 steps;
  with 0.07 and patches of 16 it was 0.88 after 600. Both were changed at once, so their single effects are not
  known.
- gates begin at tanh(0.5) = 0.46: with 0 (Flamingo, whose language model was trained before) the connector and the
  vision tower would get no gradient at the first step. Vision and language are trained together here.
"""

__all__ = ["PRESETS"]

PRESETS: dict[str, dict] = {
    "qvl-2b": {},
    "qvl-tiny": dict(
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        hidden_size=192,
        intermediate_size=512,
        vocab_size=384,
        max_position_embeddings=2048,
        rope_theta=10000.0,
        vision_num_hidden_layers=4,
        vision_num_attention_heads=4,
        vision_hidden_size=128,
        vision_patch_size=16,
        vision_image_size=96,
        vision_intermediate_size=512,
        connector_type="mlp",
        num_query_tokens=0,
        vision_projection_dim=192,
        language_projection_dim=192,
        cross_attention_layers=[1, 3],
        max_num_images=4,
        image_token_id=6,
        pad_token_id=0,
        eos_token_id=2,
        initializer_range=0.07,
    ),
}
