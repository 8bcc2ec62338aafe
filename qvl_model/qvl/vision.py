"""The vision transformer: images of any size, padded or not, as varlen sequences of patches (cu_seqlens).

Patches of padding are dropped before the first block, so they cost nothing and have no effect. An image is the bounding
box of the patches that its mask touches, positions count within that box, and masked pixels are zero.
"""

import torch
from torch import Tensor, nn
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig

from qvl_model.qvl.base import QVLPreTrainedModel, rotary_angles
from qvl_model.qvl.configuration import QVLConfig

__all__ = ["QVLPatchEmbed", "QVLVisionBlock", "QVLVisionModel"]


class QVLPatchEmbed(nn.Module):
    """[I, C, H, W] -> [I, H / p, W / p, E], H and W multiples of the patch size p."""

    def __init__(self, config: QVLConfig) -> None:
        super().__init__()
        self.patch_size = config.vision_patch_size
        self.proj = nn.Conv2d(config.vision_num_channels, config.vision_hidden_size, self.patch_size, self.patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.proj(pixel_values.to(self.proj.weight.dtype)).permute(0, 2, 3, 1)


class QVLVisionPositions(nn.Module):
    """One learned vector per patch of a square image of the native size; other sizes interpolate between them."""

    def __init__(self, config: QVLConfig) -> None:
        super().__init__()
        self.side = config.vision_image_size // config.vision_patch_size
        self.positions = nn.Parameter(torch.empty(self.side, self.side, config.vision_hidden_size))

    def forward(self, height: int, width: int) -> Tensor:
        """[height, width, E]; bilinear, corners on corners, in fp32."""
        table = self.positions
        if (height, width) == (self.side, self.side):
            return table
        return self._between(self._between(table.float(), height, 0), width, 1).to(table.dtype)

    def _between(self, table: Tensor, count: int, dim: int) -> Tensor:
        position = torch.linspace(0, self.side - 1, count, dtype=table.dtype, device=table.device)
        low = position.long()
        high = (low + 1).clamp(max=self.side - 1)
        weight = (position - low).to(table.dtype).view([-1 if i == dim else 1 for i in range(3)])
        return torch.lerp(table.index_select(dim, low), table.index_select(dim, high), weight)


def _block_config(config: QVLConfig) -> Qwen3VLVisionConfig:
    """The settings of one block as a config of the stock class."""
    return Qwen3VLVisionConfig(
        hidden_size=config.vision_hidden_size,
        num_heads=config.vision_num_attention_heads,
        intermediate_size=config.vision_intermediate_size,
        hidden_act=config.vision_hidden_act,
    )


class QVLVisionBlock(stock.Qwen3VLVisionBlock):
    """The stock vision block with QVL's epsilon and its config."""

    def __init__(self, config: QVLConfig) -> None:
        super().__init__(_block_config(config))
        self.attn.config = config
        self.norm1.eps = self.norm2.eps = config.layer_norm_eps


class QVLVisionModel(QVLPreTrainedModel):
    """Pixels -> varlen patch features."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: QVLConfig) -> None:
        super().__init__(config)
        self.patch_embed = QVLPatchEmbed(config)
        self.position_embed = QVLVisionPositions(config)
        self.blocks = nn.ModuleList(QVLVisionBlock(config) for _ in range(config.vision_num_hidden_layers))
        self.norm = nn.LayerNorm(config.vision_hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.patch_embed.proj

    def forward(self, pixel_values: Tensor, pixel_attention_mask: Tensor | None = None) -> tuple[Tensor, list[int]]:
        """Features of images.

        Args:
            pixel_values: [I, C, H, W], any H and W; sides that are no multiple of the patch size are padded.
            pixel_attention_mask: [I, H, W], nonzero where a pixel belongs to the image; None if all do.
        Returns:
            features [N, E] of the patches of all images, one image after the other, row by row; patches of each image,
            0 for images that are all padding.
        """
        pixel_values, mask = _whole_patches(pixel_values, pixel_attention_mask, self.config.vision_patch_size)
        patches = self.patch_embed(pixel_values)
        images, rows, columns, width = patches.shape
        if mask is None:
            boxes, lengths = [(rows, columns)] * images, [rows * columns] * images
            coordinates = _grid(rows, columns, patches.device).repeat(images, 1)
            features = patches.reshape(-1, width)
        else:
            seen = mask.view(images, rows, self.config.vision_patch_size, columns, -1).any(4).any(2)
            image, row, column = seen.nonzero(as_tuple=True)
            features = patches[image, row, column]
            top, left = _first(seen.any(2)), _first(seen.any(1))
            coordinates = torch.stack((row - top[image], column - left[image]), 1)
            lengths = seen.sum((1, 2)).tolist()
            boxes = list(zip(_extent(seen.any(2)), _extent(seen.any(1))))
        if not sum(lengths):
            return features, lengths
        features = features + self._positions(boxes, lengths, coordinates)
        angles = rotary_angles(
            coordinates, width // self.config.vision_num_attention_heads // 2, self.config.vision_rope_theta
        )
        angles = angles.flatten(1).repeat(1, 2)
        cu_seqlens = torch.tensor([0, *(length for length in lengths if length)], dtype=torch.int32).cumsum(
            0, dtype=torch.int32
        )
        cos_sin, cu_seqlens = (angles.cos(), angles.sin()), cu_seqlens.to(features.device)
        for block in self.blocks:
            features = block(features, cu_seqlens, position_embeddings=cos_sin)
        return self.norm(features), lengths

    def _positions(self, boxes: list[tuple[int, int]], lengths: list[int], coordinates: Tensor) -> Tensor:
        tables: dict[tuple[int, int], Tensor] = {}
        parts, start = [], 0
        for box, length in zip(boxes, lengths):
            if length:
                table = tables[box] if box in tables else tables.setdefault(box, self.position_embed(*box))
                row, column = coordinates[start : start + length].unbind(1)
                parts.append(table[row, column])
                start += length
        return torch.cat(parts)


def _whole_patches(pixel_values: Tensor, mask: Tensor | None, patch: int) -> tuple[Tensor, Tensor | None]:
    """Pixels and bool mask, padded to multiples of ``patch``; masked pixels are set to zero."""
    height, width = pixel_values.shape[-2:]
    missing = (0, -width % patch, 0, -height % patch)
    if mask is not None:
        mask = mask.bool()
        pixel_values = pixel_values.masked_fill(~mask[:, None], 0)
    if any(missing):
        pixel_values = nn.functional.pad(pixel_values, missing)
        mask = None if mask is None else nn.functional.pad(mask, missing)
    return pixel_values, mask


def _grid(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(columns, device=device)).view(-1, 2)


def _first(line: Tensor) -> Tensor:
    """First True of each row [I, n]; 0 where there is none."""
    return line.byte().argmax(1)


def _extent(line: Tensor) -> list[int]:
    """From the first True of each row [I, n] to the last; 0 where there is none."""
    n = line.shape[1]
    return torch.where(line.any(1), n - line.flip(1).byte().argmax(1) - _first(line), 0).tolist()
