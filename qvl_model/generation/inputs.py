"""What the first decoder layer is given for one new token per row."""

from torch import Tensor, nn

from qvl_model.qvl.text import QVLTextModel

__all__ = ["token_inputs"]


def token_inputs(body: nn.Module, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [B, 1, C], cos and sin [B, 1, D] of ``tokens`` int64 [B, 1] at ``positions``, int64 [3, B, 1] (QVL: [B, 1])."""
    hidden = body.embed_text(tokens) if isinstance(body, QVLTextModel) else body.embed_tokens(tokens)
    return hidden.contiguous(), *body.rotary_emb(hidden, positions)
