"""Outlier channels as trained large models have them, put into a model without changing what it computes."""

import torch
from torch import Tensor, nn

FACTORS = (32.0, 64.0)  # powers of two: exact in every dtype
SHARE = 0.02  # of the channels


@torch.no_grad()
def inject(model: nn.Module, seed: int = 0) -> nn.Module:
    """Multiplies a few channels that linear layers read by 32 or 64, and divides their columns by it, in place: after
    norms, values and up projections of a Qwen3-VL or QVL model. The function is exactly the same.
    """
    random = torch.Generator().manual_seed(seed)

    def factors(channels: int) -> Tensor:
        chosen = torch.randperm(channels, generator=random)[: max(1, round(SHARE * channels))]
        found = torch.ones(channels)
        found[chosen] = torch.tensor(FACTORS)[torch.randint(2, (len(chosen),), generator=random)]
        return found

    def multiply(source: nn.Module, rows: slice, factor: Tensor) -> None:
        for tensor in (source.weight, source.bias if hasattr(source, "bias") else None):
            if tensor is not None:
                tensor[rows].mul_(factor.to(tensor.dtype).view(-1, *[1] * (tensor.dim() - 1)))

    def divide(reader: nn.Linear, factor: Tensor) -> None:
        reader.weight.div_(factor.to(reader.weight.dtype))

    def after_norm(norm: nn.Module, *readers: nn.Linear, tiles: int = 1) -> None:
        factor = factors(norm.weight.numel())
        multiply(norm, slice(None), factor)
        for reader in readers:
            divide(reader, factor.repeat(tiles))

    def after_rows(source: nn.Linear, reader: nn.Linear, begin: int = 0, head: int = 1, repeats: int = 1) -> None:
        factor = factors(source.out_features - begin)
        multiply(source, slice(begin, None), factor)
        divide(reader, factor.view(-1, 1, head).expand(-1, repeats, -1).flatten())

    def attention(module: nn.Module) -> None:
        after_rows(module.v_proj, module.o_proj, head=module.head_dim, repeats=module.num_key_value_groups)

    for layer in model.model.language_model.layers:
        attention(layer.self_attn)
        after_norm(layer.input_layernorm, layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        after_norm(layer.post_attention_layernorm, layer.mlp.gate_proj, layer.mlp.up_proj)
        after_rows(layer.mlp.up_proj, layer.mlp.down_proj)
        if getattr(layer, "fusion", None) is not None:
            attention(layer.fusion.attn)
            after_norm(layer.fusion.norm, layer.fusion.attn.q_proj)
    for block in model.model.visual.blocks:
        after_rows(block.attn.qkv, block.attn.proj, begin=2 * block.attn.proj.in_features)
        after_norm(block.norm1, block.attn.qkv)
        after_norm(block.norm2, block.mlp.linear_fc1)
    visual = model.model.visual
    for merger in (visual.merger, *visual.deepstack_merger_list) if hasattr(visual, "merger") else ():
        after_norm(merger.norm, merger.linear_fc1, tiles=merger.linear_fc1.in_features // merger.norm.weight.numel())
    if hasattr(visual, "norm"):
        connector = model.model.connector
        layers = getattr(connector, "layers", ())
        readers = [one for layer in layers for one in (layer.attn.k_proj, layer.attn.v_proj)]
        after_norm(visual.norm, *(readers or [connector.mlp.fc1]))
        for layer in layers:
            after_norm(layer.norm1, layer.attn.q_proj)
            after_rows(layer.attn.v_proj, layer.attn.o_proj)
            after_norm(layer.norm2, layer.mlp.fc1)
    return model
