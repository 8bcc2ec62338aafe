"""QVLModel (vision, connector, decoder) and QVLForConditionalGeneration (with the language head)."""

import functools
import os
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.utils import can_return_tuple

from qvl_model import loader
from qvl_model.checkpoint_files import check_attention
from qvl_model.compat import CACHE, CACHE_NAMES, CacheOutput, takes_cache
from qvl_model.qvl.base import QVLPreTrainedModel
from qvl_model.qvl.cache import holds_images
from qvl_model.qvl.configuration import QVLConfig
from qvl_model.qvl.connector import QVLAttentionConnector, QVLMLPConnector
from qvl_model.qvl.inputs import check_keywords, check_pixel_mask, check_prompt
from qvl_model.qvl.text import QVLTextModel, Visual
from qvl_model.qvl.vision import QVLVisionModel

__all__ = ["QVLCausalOutput", "QVLForConditionalGeneration", "QVLModel", "QVLModelOutput"]


@dataclass
class QVLModelOutput(CacheOutput):
    """Output of QVLModel. B samples, T tokens, C hidden size, L layers.

    Attributes:
        last_hidden_state: [B, T, C], after the last norm.
        pooler_output: [B, C], the last hidden state of each sample's last token that is not padding.
        cache: the keys and values so far, with use_cache; past_key_values reads it too.
        hidden_states: with output_hidden_states, L + 1 of [B, T, C]: embeddings and the output of each layer, the last
            one normed.
        attentions: with output_attentions, L of [B, H, T, S]. Such a call computes attention by the eager formula,
            which has these weights, whatever attn_implementation is.
        cross_attentions: likewise, one [B, H, T, S] per cross-attention layer, over visual tokens: 0 for samples
            without images, and empty if there are no images at all.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


@dataclass
class QVLCausalOutput(CacheOutput):
    """As QVLModelOutput, and: loss (with labels), a mean over learned tokens; logits [B, T or logits_to_keep, V]."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: Cache | None = None
    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


class QVLModel(QVLPreTrainedModel):
    """Vision transformer, connector and language decoder; without a head.

    Example:
        >>> model = QVLModel(QVLConfig.from_preset("qvl-tiny")).eval()
        >>> out = model(input_ids=ids, pixel_values=torch.rand(1, 3, 64, 96))
        >>> out.last_hidden_state.shape, out.pooler_output.shape
    """

    def __init__(self, config: QVLConfig) -> None:
        super().__init__(config)
        self.visual = QVLVisionModel(config)
        self.connector = (QVLAttentionConnector if config.connector_type == "attention" else QVLMLPConnector)(config)
        self.image_embed = nn.Embedding(
            config.max_num_images, config.vision_projection_dim
        )  # by the index of the image in its sample
        self.language_model = QVLTextModel(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.embed_tokens = value  # type: ignore[assignment]  # any module that maps ids to embeddings

    def get_image_features(self, pixel_values: Tensor, pixel_attention_mask: Tensor | None = None) -> Visual | None:
        """The visual tokens of each sample; None if no pixel belongs to an image.

        Args: as ``forward``.
        Raises: ValueError for shapes that do not fit and a mask with other values; TypeError for what are no tensors.
        """
        pixels, mask, samples, per_sample = self._images(pixel_values, pixel_attention_mask)
        features, lengths = self.visual(pixels, mask)
        if not sum(lengths):
            return None
        tokens, lengths = self.connector(features, lengths)
        order = [i % per_sample for i, length in enumerate(lengths) for _ in range(length)]
        tokens = tokens + self.image_embed(torch.tensor(order, device=tokens.device))
        totals = [sum(lengths[i * per_sample : (i + 1) * per_sample]) for i in range(samples)]
        if len(set(totals)) == 1:
            return Visual(tokens.view(samples, totals[0], -1), None)
        return Visual(pad_sequence(tokens.split(totals), batch_first=True), torch.tensor(totals, device=tokens.device))

    def _images(self, pixel_values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None, int, int]:
        """(pixels [I, C, H, W] and mask [I, H, W] of all images, samples, images per sample)"""
        for name, value in (("pixel_values", pixel_values), ("pixel_attention_mask", mask)):
            if not isinstance(value, Tensor) and not (value is None and name == "pixel_attention_mask"):
                raise TypeError(f"QVL: {name} must be a torch.Tensor, got {type(value).__name__}")
        channels = self.config.vision_num_channels
        if pixel_values.dim() not in (4, 5) or pixel_values.shape[-3] != channels or 0 in pixel_values.shape:
            raise ValueError(
                f"QVL: pixel_values must be [batch, {channels}, height, width], or [batch, images, {channels}, "
                f"height, width] for "
                f"several images per sample; got {tuple(pixel_values.shape)}"
            )
        samples, per_sample = pixel_values.shape[0], pixel_values.shape[1] if pixel_values.dim() == 5 else 1
        if per_sample > self.config.max_num_images:
            raise ValueError(f"QVL: {per_sample} images per sample, max_num_images is {self.config.max_num_images}")
        expected = (*pixel_values.shape[:-3], *pixel_values.shape[-2:])
        if mask is not None and mask.shape != expected:
            raise ValueError(
                f"QVL: pixel_attention_mask must be {list(expected)} for these pixel_values, got {list(mask.shape)}"
            )
        if mask is not None:
            check_pixel_mask(mask)
        return pixel_values.flatten(0, -4), None if mask is None else mask.flatten(0, -3), samples, per_sample

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> QVLModelOutput:
        """Hidden states of text that sees images.

        Args:
            input_ids: int64 [B, T]; or inputs_embeds [B, T, C].
            attention_mask: [B, past + T], 1 for tokens and 0 on padding; or [B, 1, T, keys] as attention takes it.
            position_ids: [B or 1, T]; counted from attention_mask if left out.
            cache: a cache; past_key_values is its older name. Keys and values of images are in it after the first call:
                give pixel_values once.
            token_type_ids: [B, T]; by default 1 where input_ids is image_token_id, else 0.
            pixel_values: [B, C, H, W], any H and W, or [B, images, C, H, W]; with B / n rows each serves n rows of text
                (beams).
            pixel_attention_mask: [B, H, W] (or [B, images, H, W]), 0 on padding, which cannot change the result. An
                image that is all padding is no image: samples without images are text only.
            output_hidden_states, output_attentions: see QVLModelOutput.
        Raises: ValueError for shapes that do not fit, a mask with other values, or a cache that already holds images;
            TypeError for pixels that are no tensors, and unknown keywords. Text longer than
            max_position_embeddings gets a warning, once, and the positions that follow.
        """
        check_keywords(kwargs)
        text = input_ids if input_ids is not None else inputs_embeds
        visual = None
        if pixel_values is not None:
            if holds_images(cache, self.config.num_hidden_layers):
                raise ValueError(
                    "QVL: the cache already holds images; give pixel_values with the first call only, or a new cache"
                )
            visual = self.get_image_features(pixel_values, pixel_attention_mask)
            if visual is not None and text is not None:
                repeats, rest = divmod(text.shape[0], pixel_values.shape[0])
                if rest or not repeats:
                    raise ValueError(
                        f"QVL: {pixel_values.shape[0]} samples in pixel_values do not fit {text.shape[0]} rows of text"
                    )
                visual = visual._replace(repeats=repeats)
        elif pixel_attention_mask is not None:
            raise ValueError("QVL: pixel_attention_mask without pixel_values")
        out = self.language_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
            inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids,
            use_cache=use_cache,
            visual=visual,
            **kwargs,
        )
        pooled = _last_token(out.last_hidden_state, attention_mask)
        return QVLModelOutput(
            last_hidden_state=out.last_hidden_state,
            pooler_output=pooled,
            cache=getattr(out, CACHE),
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            cross_attentions=out.cross_attentions,
        )


def _last_token(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """[B, C] of hidden [B, T, C]: the last token of each sample that is not padding."""
    batch, queries = hidden.shape[:2]
    if attention_mask is None or attention_mask.dim() != 2:
        return hidden[:, -1]
    seen = attention_mask[:, -queries:].bool()
    last = (seen * torch.arange(queries, device=hidden.device)).amax(1)
    return hidden[torch.arange(batch, device=hidden.device), last]


class QVLForConditionalGeneration(QVLPreTrainedModel, GenerationMixin):
    """QVLModel with a language head: answers questions about images, or continues text.

    Example:
        >>> model = QVLForConditionalGeneration.from_pretrained(path, dtype=torch.bfloat16)
        >>> model = qvl_model.accelerate(model)
        >>> answer = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=20)
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: QVLConfig) -> None:
        super().__init__(config)
        self.model = QVLModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(  # type: ignore[override]  # stock's also takes None for the path, with a state_dict
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> Self:
        """As every model's; from a directory of quantised weights it returns an accelerated model."""
        check_attention(pretrained_model_name_or_path, **kwargs)
        quantised = loader.load_quantized(pretrained_model_name_or_path, cls, **kwargs)
        if quantised is not None:
            return quantised
        return super().from_pretrained(pretrained_model_name_or_path, *args, **{"trust_remote_code": False, **kwargs})

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def get_image_features(self, pixel_values: Tensor, pixel_attention_mask: Tensor | None = None) -> Visual | None:
        """As QVLModel.get_image_features."""
        return self.model.get_image_features(pixel_values, pixel_attention_mask)

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> QVLCausalOutput:
        """Logits, and the loss if there are labels.

        Args: as QVLModel.forward, and
            labels: int64 [B, T], the tokens to learn at their own places (shifted inside); -100 where nothing is
                learned.
            logits_to_keep: only so many last positions (or these positions) get logits; 0 for all.
        """
        counted = kwargs.pop("num_items_in_batch", None)
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
            inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids,
            pixel_values=pixel_values,
            pixel_attention_mask=pixel_attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, num_items_in_batch=counted
            )
        return QVLCausalOutput(
            loss=loss,
            logits=logits,
            cache=out.cache,
            last_hidden_state=out.last_hidden_state,
            pooler_output=out.pooler_output,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            cross_attentions=out.cross_attentions,
        )

    @functools.wraps(GenerationMixin.generate)
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        text = next((kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), inputs)
        cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        check_prompt(text, kwargs.get("attention_mask"), cache)
        return super().generate(inputs, *args, **kwargs)

    @takes_cache
    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, cache: Cache | None = None, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict:
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, **{CACHE: cache}, is_first_iteration=is_first_iteration, **kwargs
        )
        # Pixels are read once; then the cache has keys and values of the images. forward refuses pixels together with
        # such a cache.
        if not is_first_iteration and holds_images(cache, self.config.num_hidden_layers):
            inputs.pop("pixel_values", None)
        if inputs.get("pixel_values") is None:
            inputs.pop("pixel_attention_mask", None)
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        """Images are not repeated for beams: the model reads each once and repeats keys and values."""
        names = ("pixel_values", "pixel_attention_mask")
        images: dict[str, Any] = {name: kwargs.pop(name) for name in names if name in kwargs}
        # transformers types ``self`` for its own type checker: its models do not fit.
        input_ids, kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size, is_encoder_decoder, input_ids, **kwargs
        )
        return input_ids, {**kwargs, **images}
