"""qvl-2b at its full size: on 16 GB of RAM, and its computed GPU memory."""

import resource

import pytest
import torch
from models import relative

import qvl_model
from qvl_model import capacity
from qvl_model.qvl import QVLConfig, QVLForConditionalGeneration

GB = 1e9


def test_fp16_fits_8_gb_of_gpu_memory():
    """Weights, KV cache of the longest text, keys and values of an image, and the workspace of its vision tower, all in
    16 bits.
    """
    config = QVLConfig.from_preset("qvl-2b")
    with torch.device("meta"):
        model = QVLForConditionalGeneration(config)
    weights = 2 * sum(parameter.numel() for parameter in model.parameters())
    per_token = 2 * 2 * config.num_key_value_heads * config.head_dim
    text = per_token * config.num_hidden_layers * config.max_position_embeddings
    image = per_token * len(config.cross_attention_layers) * config.num_query_tokens
    patches = (config.vision_image_size // config.vision_patch_size) ** 2
    vision = 2 * patches * (8 * config.vision_hidden_size + 2 * config.vision_intermediate_size)
    logits = 6 * config.vocab_size  # fp16 and fp32, of one position
    assert 4.2 * GB < weights < 4.4 * GB and text == 2**31
    assert weights + text + image + vision + logits < 7 * GB


def random_qvl_2b() -> QVLForConditionalGeneration:
    """Random bf16 weights, written at once in bf16: fp32 ones would need 8.6 GB first."""
    with torch.device("meta"):
        model = QVLForConditionalGeneration(QVLConfig.from_preset("qvl-2b"))
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
    model.tie_weights()
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    turn = 0  # no two weights may be equal: the capacity check would fail
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
            flat, block = parameter.view(-1), (noise * scale).bfloat16()
            for part in flat.split(len(block)):
                turn += 131
                part.copy_(block.roll(turn)[: len(part)])
            if key.endswith(("norm.weight", "norm1.weight", "norm2.weight", "layernorm.weight", "gate")):
                parameter.add_(1)
    return model


@pytest.mark.slow
@torch.no_grad()
def test_forward_generate_and_verify():
    model = random_qvl_2b()
    config = model.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 1000, (1, 12), generator=generator)
    ids[0, 2] = config.image_token_id
    batch = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 448, 448, generator=generator).bfloat16()}
    expected = model(**batch, output_hidden_states=True)
    assert qvl_model.accelerate(model) is model
    out = model(**batch, output_hidden_states=True)
    assert len(out.hidden_states) == 33 and out.pooler_output.shape == (1, 2048) and out.logits.shape == (1, 12, 151936)
    assert relative(out.logits, expected.logits) < 0.05
    tokens = model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 16) and tokens[0, 12] == out.logits[0, -1].argmax()
    facts = capacity.verify(model, "qvl-2b").facts
    assert facts["parameters"] == 2_159_034_376
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < 16 * GB
