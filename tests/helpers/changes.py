"""Ways of changing a model between two calls, for small Qwen3-VL and QVL models."""

import torch
from torch import nn

# One of every kind of tensor that a fused layer or a cos/sin cache reads.
TENSORS = {
    "qwen3_vl": [
        "model.visual.pos_embed.weight",
        "model.visual.patch_embed.proj.weight",
        "model.visual.blocks.1.norm1.weight",
        "model.visual.blocks.1.attn.qkv.weight",
        "model.visual.blocks.1.mlp.linear_fc1.bias",
        "model.visual.merger.linear_fc2.weight",
        "model.language_model.layers.1.input_layernorm.weight",
        "model.language_model.layers.1.self_attn.k_proj.weight",
        "model.language_model.layers.1.self_attn.q_norm.weight",
        "model.language_model.layers.2.mlp.up_proj.weight",
        "model.language_model.norm.weight",
        "model.language_model.embed_tokens.weight",
    ],
    "qvl": [
        "model.visual.position_embed.positions",
        "model.visual.patch_embed.proj.weight",
        "model.visual.blocks.1.norm1.weight",
        "model.visual.blocks.1.attn.qkv.weight",
        "model.visual.blocks.1.mlp.linear_fc1.bias",
        "model.visual.norm.weight",
        "model.language_model.layers.1.fusion.attn.k_proj.weight",
        "model.language_model.layers.1.fusion.gate",
        "model.language_model.layers.1.input_layernorm.weight",
        "model.language_model.layers.1.self_attn.k_proj.weight",
        "model.language_model.layers.1.self_attn.q_norm.weight",
        "model.language_model.layers.2.mlp.up_proj.weight",
        "model.language_model.norm.weight",
        "model.language_model.embed_tokens.weight",
    ],
}


def names(model) -> list[str]:
    return TENSORS[model.config.model_type]


def tensors(model) -> list[nn.Parameter]:
    return [model.get_parameter(name) for name in names(model)]


def noise(x: torch.Tensor, seed: int) -> torch.Tensor:
    return 1 + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.dtype)


def in_place(model):
    with torch.no_grad():
        for i, x in enumerate(tensors(model)):
            x.mul_(noise(x, i))


def data(model):
    for i, x in enumerate(tensors(model)):
        x.data.mul_(noise(x, i))


def new_data(model):
    for i, x in enumerate(tensors(model)):
        x.data = x.data * noise(x, i)


def numpy(model):
    for i, x in enumerate(tensors(model)):
        x.detach().numpy()[...] *= noise(x, i).numpy()


def fused_step(model):
    parameters = tensors(model)
    for i, x in enumerate(parameters):
        x.grad = noise(x, i) - 1
    torch.optim.AdamW(parameters, lr=0.05, fused=True).step()
    for x in parameters:
        x.grad = None


def _changed_state(model):
    return {
        name: x * noise(x, i) if x.is_floating_point() else x for i, (name, x) in enumerate(model.state_dict().items())
    }


def load(model):
    model.load_state_dict(_changed_state(model))


def assign(model):
    model.load_state_dict(_changed_state(model), assign=True)
    model.tie_weights()


def ema_swap(model):
    average = torch.optim.swa_utils.AveragedModel(model)
    in_place(average.module)
    for x, y in zip(tensors(model), tensors(average.module), strict=True):
        x.data, y.data = y.data, x.data


def new_parameters(model):
    for i, name in enumerate(names(model)[:-1]):  # the embedding is tied
        module, _, leaf = name.rpartition(".")
        x = model.get_parameter(name)
        setattr(model.get_submodule(module), leaf, nn.Parameter(x.detach() * noise(x, i)))


def new_linear(model):
    for parent, name in (
        (model.model.language_model.layers[1].mlp, "down_proj"),
        (model.model.visual.blocks[0].attn, "proj"),
    ):
        old = getattr(parent, name)
        new = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)
        with torch.no_grad():
            for i, x in enumerate(new.parameters()):
                x.copy_(noise(x, i) - 1)
        setattr(parent, name, new)


def hooked(*names, pre=False):
    def changed(model):
        for name in names:
            module = model.get_submodule(name)
            if pre:
                module.register_forward_pre_hook(lambda module, args: (args[0] * 1.2, *args[1:]))
            else:
                module.register_forward_hook(
                    lambda module, args, out: (
                        tuple(o if o is None else o * 1.2 for o in out) if isinstance(out, tuple) else out * 1.2
                    )
                )

    return changed


WEIGHTS = {
    "in place": in_place,
    "data": data,
    "new data": new_data,
    "numpy": numpy,
    "fused step": fused_step,
    "load": load,
    "assign": assign,
    "ema swap": ema_swap,
    "new parameters": new_parameters,
    "new linear": new_linear,
}
