"""qvl's kernels in other models, a small Llama and a small Qwen3: python examples/kernels_in_llama.py

Attention is chosen by name. RMSNorm and MLP keep their parameters; only `forward` changes.
"""

import types

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

import qvl_kernels
import qvl_model  # noqa: F401  registers attn_implementation="qvl"


def norm(self: LlamaRMSNorm | Qwen3RMSNorm, hidden_states: torch.Tensor) -> torch.Tensor:
    return qvl_kernels.rms_norm(hidden_states, self.weight, eps=self.variance_epsilon)


def mlp(self: LlamaMLP | Qwen3MLP, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(qvl_kernels.swiglu(self.gate_proj(x), self.up_proj(x)))


def use_kernels(model: torch.nn.Module) -> torch.nn.Module:
    """Replaces attention and `forward` of every RMSNorm and MLP, in place."""
    model.set_attn_implementation("qvl")
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm | Qwen3RMSNorm):
            module.forward = types.MethodType(norm, module)
        elif isinstance(module, LlamaMLP | Qwen3MLP):
            module.forward = types.MethodType(mlp, module)
    return model


def difference(name: str) -> float:
    """The largest difference of the logits and of the gradients from stock's, relative to the largest value."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
    stock, fast = (
        AutoModelForCausalLM.from_config(AutoConfig.for_model(name, num_key_value_heads=2, **sizes)) for _ in range(2)
    )
    fast.load_state_dict(stock.state_dict())
    use_kernels(fast)
    ids, mask = torch.randint(99, (2, 33)), torch.ones(2, 33, dtype=torch.long)
    mask[0, :5] = 0
    found = []
    for model in (stock, fast):
        out = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
        out.loss.backward()
        found.append([out.logits.detach()[mask == 1], *(p.grad for p in model.parameters())])
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(*found, strict=True))


def main() -> float:
    return max(difference(name) for name in ("llama", "qwen3"))


if __name__ == "__main__":
    print(f"largest relative difference: {main():.1e}")
