"""From patch features to the visual tokens that the text attends to."""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from qvl_model.qvl.base import attend, key_mask
from qvl_model.qvl.configuration import QVLConfig

__all__ = ["QVLAttentionConnector", "QVLConnectorAttention", "QVLConnectorLayer", "QVLConnectorMLP", "QVLMLPConnector"]


class QVLConnectorMLP(nn.Module):
    def __init__(self, config: QVLConfig, inputs: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, config.vision_intermediate_size)
        self.act_fn = ACT2FN[config.vision_hidden_act]
        self.fc2 = nn.Linear(config.vision_intermediate_size, config.vision_projection_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act_fn(self.fc1(x)))


class QVLMLPConnector(nn.Module):
    """Every patch becomes one visual token."""

    def __init__(self, config: QVLConfig) -> None:
        super().__init__()
        self.mlp = QVLConnectorMLP(config, config.vision_hidden_size)

    def forward(self, features: Tensor, lengths: list[int]) -> tuple[Tensor, list[int]]:
        """features [N, E] of images of ``lengths`` patches -> tokens [M, P], tokens of each image."""
        return self.mlp(features), lengths


class QVLConnectorAttention(nn.Module):
    """Queries of an image attend to its patches."""

    def __init__(self, config: QVLConfig) -> None:
        super().__init__()
        self.config = config
        width = config.vision_projection_dim
        self.num_heads, self.num_key_value_groups = config.vision_num_attention_heads, 1
        self.head_dim = width // self.num_heads
        self.scaling, self.is_causal = self.head_dim**-0.5, False
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(
            config.vision_hidden_size, width, bias=False
        )  # a bias would shift all scores of a query alike, which softmax cancels
        self.v_proj = nn.Linear(config.vision_hidden_size, width)
        self.o_proj = nn.Linear(width, width)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, self.head_dim)

    def forward(self, queries: Tensor, features: Tensor, lengths: Tensor | None) -> Tensor:
        """queries [I, Q, P], features [I, S, E] of which the first ``lengths`` [I] count -> [I, Q, P]."""
        q, k, v = (
            self._heads(self.q_proj(queries)),
            self._heads(self.k_proj(features)),
            self._heads(self.v_proj(features)),
        )
        return self.o_proj(self.read(q, k, v, lengths).reshape(queries.shape))

    def read(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
        """[I, Q, H, D] from q [I, Q, H, D], k and v [I, S, H, D]."""
        mask = key_mask(lengths, k.shape[1], q.dtype)
        return attend(self, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)[0]


class QVLConnectorLayer(GradientCheckpointingLayer):
    def __init__(self, config: QVLConfig) -> None:
        super().__init__()
        width, eps = config.vision_projection_dim, config.layer_norm_eps
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = QVLConnectorAttention(config)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = QVLConnectorMLP(config, width)

    def forward(self, queries: Tensor, features: Tensor, lengths: Tensor | None) -> Tensor:
        queries = queries + self.attn(self.norm1(queries), features, lengths)
        return queries + self.mlp(self.norm2(queries))


class QVLAttentionConnector(nn.Module):
    """Every image becomes ``num_query_tokens`` visual tokens, whatever its size."""

    def __init__(self, config: QVLConfig) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(config.num_query_tokens, config.vision_projection_dim))
        self.layers = nn.ModuleList(QVLConnectorLayer(config) for _ in range(config.connector_num_layers))
        self.norm = nn.LayerNorm(config.vision_projection_dim, eps=config.layer_norm_eps)

    def forward(self, features: Tensor, lengths: list[int]) -> tuple[Tensor, list[int]]:
        """features [N, E] of images of ``lengths`` patches -> tokens [M, P], tokens of each image (0 for those without
        patches).
        """
        counts = [length for length in lengths if length]
        features = pad_sequence(features.split(counts), batch_first=True)
        patches = None if len(set(counts)) == 1 else torch.tensor(counts, device=features.device)
        tokens = self.queries[None].expand(len(counts), -1, -1)
        for layer in self.layers:
            tokens = layer(tokens, features, patches)
        return self.norm(tokens).flatten(0, 1), [self.queries.shape[0] if length else 0 for length in lengths]
