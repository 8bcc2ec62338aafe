"""qvl's kernels in another model: RMSNorm and SwiGLU of a small Llama: python examples/kernels_in_llama.py

The modules keep their parameters; only `forward` changes, so gradients, state_dict and saving stay as they are.
"""

import types

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

import qvl_kernels


def use_kernels(model: torch.nn.Module) -> torch.nn.Module:
    """Replaces `forward` of every RMSNorm and MLP, in place."""

    def norm(self: LlamaRMSNorm, hidden_states: torch.Tensor) -> torch.Tensor:
        return qvl_kernels.rms_norm(hidden_states, self.weight, eps=self.variance_epsilon)

    def mlp(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(qvl_kernels.swiglu(self.gate_proj(x), self.up_proj(x)))

    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = types.MethodType(norm, module)
        elif isinstance(module, LlamaMLP):
            module.forward = types.MethodType(mlp, module)
    return model


def main() -> float:
    """Prints the largest difference of the logits and of the gradients from stock's, relative to the largest value."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=99
    )
    stock = LlamaForCausalLM(config)
    fast = LlamaForCausalLM(config)
    fast.load_state_dict(stock.state_dict())
    use_kernels(fast)
    ids = torch.randint(99, (2, 33))
    found = []
    for model in (stock, fast):
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        found.append([out.logits.detach(), *(p.grad for p in model.parameters())])
    worst = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(*found, strict=True))
    print(f"largest relative difference: {worst:.1e}")
    return worst


if __name__ == "__main__":
    main()
