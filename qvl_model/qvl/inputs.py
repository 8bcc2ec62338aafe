"""Checks of QVL's text inputs: errors for bad shapes and values, a warning for too long texts."""

import difflib

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.utils import TransformersKwargs, logging

from qvl_model.compat import CACHE_NAMES
from qvl_model.qvl.configuration import QVLConfig

__all__ = ["check_keywords", "check_pixel_mask", "check_prompt", "check_text"]

logger = logging.get_logger(__name__)


# Keywords of a call beside the arguments of ``forward``: for attention functions, or passed along by transformers,
# trainers and qvl.
_PASSED_ALONG = {
    *TransformersKwargs.__annotations__,
    *CACHE_NAMES,
    "cache_position",
    "position_bias",
    "return_dict",
    "s_aux",
    "skip_logits",
    "sliding_window",
    "softcap",
}
_ARGUMENTS = (
    "attention_mask",
    "cache",
    "input_ids",
    "inputs_embeds",
    "labels",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
    "pixel_attention_mask",
    "pixel_values",
    "position_ids",
    "token_type_ids",
    "use_cache",
)


def check_keywords(kwargs: dict) -> None:
    """Raises TypeError for unknown keyword arguments of a call."""
    for name, value in kwargs.items():
        if value is not None and name not in _PASSED_ALONG:
            nearest = next(iter(difflib.get_close_matches(name, _ARGUMENTS, n=1)), None)
            hint = f"did you mean {nearest}?" if nearest else f"known are {', '.join(_ARGUMENTS)}"
            raise TypeError(f"QVL: {name} is no argument of the model; {hint}")


def check_text(
    config: QVLConfig,
    embeddings: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    token_types: Tensor,
    cache: Cache | None,
) -> None:
    """Checks the arguments of QVLModel.forward that belong to embeddings [B, T, C].

    Values of the mask are read where that needs no wait for a GPU: on the CPU, and elsewhere at the prefill only.
    Raises: TypeError for lists and arrays; ValueError for shapes that do not fit, and a mask with other values than 0
    and 1.
    """
    batch, queries = embeddings.shape[:2]
    by_tokens = (("position_ids", position_ids), ("token_type_ids", token_types))
    for name, value in (("attention_mask", attention_mask), *by_tokens):
        if isinstance(value, (list, tuple, np.ndarray)):
            raise TypeError(f"QVL: {name} must be a torch.Tensor, got {type(value).__name__}")
    for name, tensor in by_tokens:
        if tensor is not None and tuple(tensor.shape) not in ((batch, queries), (1, queries)):
            raise ValueError(f"QVL: {name} must be [{batch}, {queries}], as the text, got {list(tensor.shape)}")
    past = _past(cache)
    if isinstance(attention_mask, Tensor):
        _check_mask(attention_mask, batch, queries, past)
    # As in stock Qwen3-VL, positions beyond the maximum are computed, and generate gives the same warning.
    if past is not None and past + queries > config.max_position_embeddings and not torch.compiler.is_compiling():
        logger.warning_once(
            f"QVL: the text is longer than max_position_embeddings ({config.max_position_embeddings}), the longest "
            f"that the model is meant "
            "for; positions go on beyond it, and what it makes of them it may never have learned"
        )


def _past(cache: Cache | None) -> int | None:
    """Tokens in the cache; None if the number is on a GPU, or symbolic during compilation."""
    past = cache.get_seq_length() if cache is not None else 0
    if isinstance(past, Tensor):  # of static caches
        past = int(past) if past.is_cpu and not torch.compiler.is_compiling() else None
    return past


def _check_mask(mask: Tensor, batch: int, queries: int, past: int | None) -> None:
    if mask.dim() == 4:  # as attention takes it: generate makes such masks for static caches
        if mask.shape[0] not in (1, batch) or mask.shape[2] != queries:
            raise ValueError(
                f"QVL: an attention_mask of four dimensions must be [{batch}, 1, {queries}, keys], got "
                f"{list(mask.shape)}"
            )
        return
    length = mask.shape[-1] if past is None else past + queries
    if tuple(mask.shape) != (batch, length):
        tokens = f"{past} tokens in the cache and {queries} new ones" if past else f"{queries} tokens"
        raise ValueError(
            f"QVL: attention_mask must be [{batch}, {length}] for {batch} rows of {tokens}, got {list(mask.shape)}"
        )
    if mask.is_cpu or past == 0:
        _check_values(
            "attention_mask",
            mask,
            "for tokens and 0 for padding, and has other values; a mask to be added has four dimensions",
        )


def check_pixel_mask(mask: Tensor) -> None:
    """Raises ValueError for other values than 0 and 1."""
    _check_values("pixel_attention_mask", mask, "for pixels of the image and 0 for padding, and has other values")


def check_prompt(text: Tensor | None, attention_mask: Tensor | None, cache: Cache | None) -> None:
    """Checks the mask of ``generate``, which may drop it before the model gets it.

    Args:
        text: input_ids [B, T] or inputs_embeds [B, T, C]: all of the text, or the part that is not in the cache.
        attention_mask: [B, T], or [B, past + T].
    Raises: ValueError for other shapes, and other values than 0 and 1.
    """
    if not isinstance(attention_mask, Tensor) or not isinstance(text, Tensor):
        return
    (batch, length), past = text.shape[:2], _past(cache)
    shape = tuple(attention_mask.shape)
    if (
        len(shape) != 2
        or shape[0] != batch
        or (shape[1] not in (length, past + length) if past is not None else shape[1] < length)
    ):
        raise ValueError(
            f"QVL: attention_mask must be [{batch}, {length}{' + what the cache holds' if past else ''}], as the "
            f"prompt, got {list(shape)}"
        )
    _check_values(
        "attention_mask",
        attention_mask,
        "for tokens and 0 for padding, and has other values; a mask to be added has four dimensions",
    )


def _check_values(name: str, mask: Tensor, meaning: str) -> None:
    if mask.dtype == torch.bool or mask.is_meta or torch.compiler.is_compiling():
        return
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"QVL: {name} must hold 1 {meaning}")
