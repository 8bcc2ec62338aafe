"""fp64 reference of QVL, written from the formulas of docs/qvl_formulas.md.

It shares no code with the package and none with transformers. Rows of text and images are computed one by one, without
padding.
"""

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swish": lambda x: x / (1 + torch.exp(-x)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_pytorch_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0),
}


class Reference:
    """A QVL model.

    Args:
        state: the model's state_dict; converted to fp64.
        config: the model's config as a dict.
        drop: what dropout does to a tensor x with probability p; nothing by default.
    """

    def __init__(
        self, state: dict[str, Tensor], config: dict, drop: Callable[[Tensor, float], Tensor] = lambda x, p: x
    ):
        self.state = {name.removeprefix("model."): tensor.double() for name, tensor in state.items()}
        self.config, self.drop = SimpleNamespace(**config), drop

    # --- parts --------------------------------------------------------------------------------------------------------

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.state[f"{name}.weight"].T
        return y + self.state[f"{name}.bias"] if f"{name}.bias" in self.state else y

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + self.config.layer_norm_eps).sqrt()
        return centred / scale * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def rms_norm(self, name: str, x: Tensor) -> Tensor:
        return (
            x / (x.square().mean(-1, keepdim=True) + self.config.layer_norm_eps).sqrt() * self.state[f"{name}.weight"]
        )

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, dropout: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """[T, H * D] and weights [H, T, S] from q [T, H, D], k and v [S, Hkv, D]; causal: the last query sees every
        key.
        """
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(q.shape[-1])
        if causal:
            later = torch.arange(k.shape[0])[None] > torch.arange(k.shape[0] - q.shape[0], k.shape[0])[:, None]
            scores = scores.masked_fill(later, -math.inf)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        return torch.einsum("hts,shd->thd", self.drop(weights, dropout), v).flatten(1), weights

    @staticmethod
    def rotate(x: Tensor, angles: Tensor) -> Tensor:
        """RoPE: elements i and i + D / 2 of x [T, H, D] are one point of the plane, rotated by angles [T, D / 2]."""
        first, second = x.chunk(2, -1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    # --- images -------------------------------------------------------------------------------------------------------

    def tower(self, pixels: Tensor, mask: Tensor | None) -> Tensor | None:
        """Features [patches, E] of one image [C, H, W]; None if all of it is padding (mask [H, W] zero)."""
        c, side = self.config, self.config.vision_patch_size
        seen = torch.ones(pixels.shape[1:], dtype=torch.bool) if mask is None else mask != 0
        rows, columns = (math.ceil(size / side) for size in seen.shape)
        canvas, touched = (
            torch.zeros(pixels.shape[0], rows * side, columns * side).double(),
            torch.zeros(rows * side, columns * side),
        )
        canvas[:, : seen.shape[0], : seen.shape[1]] = torch.where(seen, pixels.double(), 0.0)
        touched[: seen.shape[0], : seen.shape[1]] = seen.float()
        squares = [
            (slice(row * side, (row + 1) * side), slice(column * side, (column + 1) * side))
            for row in range(rows)
            for column in range(columns)
        ]
        squares = [square for square in squares if touched[square].any()]
        if not squares:
            return None
        weight, bias = self.state["visual.patch_embed.proj.weight"], self.state["visual.patch_embed.proj.bias"]
        x = (
            torch.stack([torch.einsum("echw,chw->e", weight, canvas[:, down, across]) for down, across in squares])
            + bias
        )
        places = torch.tensor([(down.start // side, across.start // side) for down, across in squares])
        places = places - places.amin(0)
        table = self.positions(*(places.amax(0) + 1).tolist())
        x = x + table[places[:, 0], places[:, 1]]
        head = c.vision_hidden_size // c.vision_num_attention_heads
        frequencies = c.vision_rope_theta ** (-torch.arange(head // 4).double() * 4 / head)
        angles = torch.cat([places[:, i, None] * frequencies for i in (0, 1)], 1)
        for i in range(c.vision_num_hidden_layers):
            name = f"visual.blocks.{i}"
            q, k, v = (
                self.linear(f"{name}.attn.qkv", self.layer_norm(f"{name}.norm1", x)).view(len(x), 3, -1, head).unbind(1)
            )
            x = x + self.linear(
                f"{name}.attn.proj", self.attention(self.rotate(q, angles), self.rotate(k, angles), v)[0]
            )
            x = x + self.mlp(f"{name}.mlp.linear_fc", self.layer_norm(f"{name}.norm2", x))
        return self.layer_norm("visual.norm", x)

    def positions(self, height: int, width: int) -> Tensor:
        """[height, width, E]: the learned table [side, side, E], interpolated bilinearly with aligned corners."""
        table = self.state["visual.position_embed.positions"]
        side = table.shape[0]

        def shares(count: int) -> Tensor:
            at = torch.arange(count).double() * (side - 1) / max(count - 1, 1)
            return (1 - (at[:, None] - torch.arange(side)).abs()).clamp(min=0)

        return torch.einsum("hr,wc,rce->hwe", shares(height), shares(width), table)

    def mlp(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}2", ACTIVATIONS[self.config.vision_hidden_act](self.linear(f"{name}1", x)))

    def connect(self, features: Tensor) -> Tensor:
        """Visual tokens [M, P] of one image's features [N, E]."""
        if self.config.connector_type == "mlp":
            return self.mlp("connector.mlp.fc", features)
        x, heads = self.state["connector.queries"], self.config.vision_num_attention_heads
        for i in range(self.config.connector_num_layers):
            name = f"connector.layers.{i}"
            q = self.linear(f"{name}.attn.q_proj", self.layer_norm(f"{name}.norm1", x))
            k, v = (self.linear(f"{name}.attn.{part}_proj", features) for part in "kv")
            read, _ = self.attention(*(y.view(len(y), heads, -1) for y in (q, k, v)))
            x = x + self.linear(f"{name}.attn.o_proj", read)
            x = x + self.mlp(f"{name}.mlp.fc", self.layer_norm(f"{name}.norm2", x))
        return self.layer_norm("connector.norm", x)

    def visual_tokens(self, pixels: Tensor, masks: Tensor | None) -> Tensor | None:
        """[S, P] of all images [images, C, H, W] of one row; None without any."""
        parts = []
        for i, image in enumerate(pixels):
            features = self.tower(image, None if masks is None else masks[i])
            if features is not None:
                parts.append(self.connect(features) + self.state["image_embed.weight"][i])
        return torch.cat(parts) if parts else None

    # --- text ---------------------------------------------------------------------------------------------------------

    def row(
        self, ids: Tensor, tokens: Tensor | None = None, types: Tensor | None = None, cache: dict | None = None
    ) -> SimpleNamespace:
        """Logits [T, V], hidden_states, pooler [C] and attention weights of one row of ids [T].

        With ``cache``, keys and values are appended to it and read from it, and each token is passed once.
        """
        c, h, a = self.config, self.config.hidden_dropout_prob, self.config.attention_probs_dropout_prob
        cache = {} if cache is None else cache
        head, past = c.hidden_size // c.num_attention_heads, cache.get("length", 0)
        types = (ids == (-1 if c.image_token_id is None else c.image_token_id)).long() if types is None else types
        x = self.drop(
            self.state["language_model.embed_tokens.weight"][ids]
            + self.state["language_model.embed_token_types.weight"][types],
            h,
        )
        angles = torch.arange(past, past + len(ids))[:, None] * c.rope_theta ** (
            -torch.arange(head // 2).double() * 2 / head
        )
        states, attentions, crossed = [x], [], []
        for i in range(c.num_hidden_layers):
            name = f"language_model.layers.{i}"
            if i in c.cross_attention_layers:
                if tokens is not None:
                    cache[f"visual {i}"] = self.visual_keys_values(f"{name}.fusion.attn", tokens)
                if f"visual {i}" in cache:
                    q = self.linear(f"{name}.fusion.attn.q_proj", self.rms_norm(f"{name}.fusion.norm", x))
                    q = self.rms_norm(f"{name}.fusion.attn.q_norm", q.view(len(x), c.num_attention_heads, -1))
                    out, weights = self.attention(q, *cache[f"visual {i}"], dropout=a)
                    x = x + torch.tanh(self.state[f"{name}.fusion.gate"]) * self.drop(
                        self.linear(f"{name}.fusion.attn.o_proj", out), h
                    )
                    crossed.append(weights)
            normed = self.rms_norm(f"{name}.input_layernorm", x)
            q, k, v = (self.linear(f"{name}.self_attn.{part}_proj", normed).view(len(x), -1, head) for part in "qkv")
            q, k = (
                self.rotate(self.rms_norm(f"{name}.self_attn.{part}_norm", y), angles)
                for part, y in (("q", q), ("k", k))
            )
            k, v = (torch.cat((old, new)) for old, new in zip(cache.get(i, (k[:0], v[:0])), (k, v)))
            cache[i] = k, v
            out, weights = self.attention(q, k, v, causal=True, dropout=a)
            attentions.append(weights)
            x = x + self.drop(self.linear(f"{name}.self_attn.o_proj", out), h)
            normed = self.rms_norm(f"{name}.post_attention_layernorm", x)
            gated = ACTIVATIONS[c.hidden_act](self.linear(f"{name}.mlp.gate_proj", normed)) * self.linear(
                f"{name}.mlp.up_proj", normed
            )
            x = x + self.drop(self.linear(f"{name}.mlp.down_proj", gated), h)
            states.append(x)
        states[-1] = self.rms_norm("language_model.norm", x)
        cache["length"] = past + len(ids)
        return SimpleNamespace(
            logits=self.linear("lm_head", states[-1]),
            hidden_states=states,
            pooler=states[-1][-1],
            attentions=attentions,
            cross_attentions=crossed,
        )

    def visual_keys_values(self, name: str, tokens: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (
            self.linear(f"{name}.{part}_proj", tokens).view(len(tokens), self.config.num_key_value_heads, -1)
            for part in "kv"
        )
        return self.rms_norm(f"{name}.k_norm", k), v

    # --- batches ------------------------------------------------------------------------------------------------------

    def rows(self, batch: dict[str, Tensor]) -> Iterator[dict]:
        """Arguments of ``row`` for each row of a model's inputs: its tokens without padding, its visual tokens."""
        pixels, masks = batch.get("pixel_values"), batch.get("pixel_attention_mask")
        if pixels is not None and pixels.dim() == 4:
            pixels, masks = pixels[:, None], None if masks is None else masks[:, None]
        for i, ids in enumerate(batch["input_ids"]):
            seen = batch["attention_mask"][i].bool() if "attention_mask" in batch else torch.ones_like(ids).bool()
            tokens = None if pixels is None else self.visual_tokens(pixels[i], None if masks is None else masks[i])
            types = batch["token_type_ids"][i][seen] if "token_type_ids" in batch else None
            yield {"ids": ids[seen], "tokens": tokens, "types": types}

    def generate(self, batch: dict[str, Tensor], steps: int, *, use_cache: bool) -> Tensor:
        """Greedy tokens [B, steps]; without a cache the whole sequence is recomputed for each token."""
        found = []
        for row in self.rows(batch):
            ids, tokens, cache, new = row["ids"], row["tokens"], {} if use_cache else None, []
            last = self.row(ids, tokens, cache=cache).logits[-1].argmax()
            for _ in range(steps):
                new.append(last)
                ids = torch.cat((ids, last[None]))
                last = (self.row(last[None], cache=cache) if use_cache else self.row(ids, tokens)).logits[-1].argmax()
            found.append(torch.stack(new))
        return torch.stack(found)
