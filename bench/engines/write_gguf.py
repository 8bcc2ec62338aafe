"""Writes the text model of a Qwen3-VL checkpoint in bf16 as GGUF, the format of llama.cpp. Runs in an environment that
has ``gguf``.

python -m bench.engines.write_gguf CHECKPOINT FILE
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench.engines.checkpoints import rope_parameters

__all__ = ["metadata", "read_tensors", "tensor_name", "write"]

ARCHITECTURE = "qwen3vl"
MOSTLY_BF16 = 32  # llama.cpp's number for the type of a file
PREFIX = "model.language_model."
OUTER = {
    f"{PREFIX}embed_tokens.weight": "token_embd.weight",
    f"{PREFIX}norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",  # absent where it is tied to the embedding; llama.cpp then uses that
}
LAYER = re.compile(re.escape(PREFIX) + r"layers\.(\d+)\.(.+)\.weight")
IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def metadata(config: dict) -> dict[str, str | int | float | list[int]]:
    """GGUF metadata from a config.json. No tokenizer: the measured calls need none."""
    text = config["text_config"]
    rope = rope_parameters(text)
    sizes = {
        "vocab_size": text["vocab_size"],
        "context_length": text["max_position_embeddings"],
        "embedding_length": text["hidden_size"],
        "block_count": text["num_hidden_layers"],
        "feed_forward_length": text["intermediate_size"],
        "attention.head_count": text["num_attention_heads"],
        "attention.head_count_kv": text["num_key_value_heads"],
        "attention.key_length": text["head_dim"],
        "attention.value_length": text["head_dim"],
        "attention.layer_norm_rms_epsilon": float(text["rms_norm_eps"]),
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_sections": [*rope["mrope_section"], 0],
    }
    return {
        "general.file_type": MOSTLY_BF16,
        "tokenizer.ggml.model": "none",
        **{f"{ARCHITECTURE}.{key}": value for key, value in sizes.items()},
    }


def tensor_name(name: str) -> str | None:
    """llama.cpp's name of a tensor of the text model; None for the vision tower."""
    if name in OUTER:
        return OUTER[name]
    if layer := LAYER.fullmatch(name):
        return f"blk.{layer[1]}.{IN_LAYER[layer[2]]}.weight"
    if name.startswith(PREFIX):
        raise ValueError(f"no GGUF name is known for {name}")
    return None


def read_tensors(checkpoint: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, mapped tensor) of all bf16 safetensors files; the bits of a bf16 number are a uint16 here, as numpy has no
    such type.
    """
    for file in sorted(checkpoint.glob("*.safetensors")):
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] != "BF16":
                raise ValueError(f"{name} in {file} is {entry['dtype']}; only BF16 checkpoints are written as GGUF")
            yield name, np.memmap(file, np.uint16, "r", 8 + length + entry["data_offsets"][0], tuple(entry["shape"]))


def _text_tensors(checkpoint: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Under llama.cpp's names. Vectors become fp32: it takes norms in no other type."""
    for name, tensor in read_tensors(checkpoint):
        if (renamed := tensor_name(name)) is not None:
            yield renamed, (tensor.astype(np.uint32) << 16).view(np.float32) if tensor.ndim == 1 else tensor


def write(checkpoint: Path, file: Path) -> None:
    """One tensor in memory at a time."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(file, ARCHITECTURE)
    add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
    for key, value in metadata(json.loads((checkpoint / "config.json").read_text())).items():
        add[type(value)](key, value)
    for name, tensor in _text_tensors(checkpoint):
        kind = GGMLQuantizationType.F32 if tensor.ndim == 1 else GGMLQuantizationType.BF16
        writer.add_tensor_info(name, tensor.shape, tensor.dtype, tensor.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor in _text_tensors(checkpoint):
        writer.write_tensor_data(tensor)
    writer.close()


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
