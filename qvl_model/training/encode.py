"""Conversation -> tensors, through the checkpoint's own processor; labels on the assistant's tokens only."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qvl_model.qvl.processing import QVLImageProcessor
from qvl_model.training.rows import BadRow, Conversation

__all__ = ["Collator", "Encoder", "IGNORED", "pad"]

IGNORED = -100  # label of tokens that no loss is computed for


class Encoder:
    """Turns conversations into model inputs with labels.

    The chat template renders every turn as at generation. The text before an answer is one segment, tokenised as the
    prompt would be; the answer with its end-of-turn token is the next, and the model learns it. Turns after the last
    answer are left out.

    Args:
        processor: as ``qvl_model.processing.load_processor`` gives it.
        max_length: longest row in tokens.
        max_images: most images that a row may have; None for any number.
    Example:
        >>> encoder = Encoder(load_processor(path), max_length=2048)
        >>> row = encoder(parse({"image": image, "question": "Which digit is this?", "answer": "7"}), [image])
    """

    def __init__(self, processor: Any, max_length: int = 2048, max_images: int | None = None) -> None:
        if processor.chat_template is None:
            raise ValueError(
                "the processor has no chat template; put its chat_template.jinja into the checkpoint directory"
            )
        self.processor, self.max_length, self.max_images = processor, max_length, max_images

    def segments(self, conversation: Conversation) -> list[tuple[str, bool]]:
        """(text, whether it is learned) in order; joined, the conversation up to the end of the last answer."""
        special = [token for token in (self.processor.image_token, self.processor.video_token) if token]
        for message in conversation.messages:
            for part in message["content"]:
                for token in special:
                    if token in part.get("text", ""):
                        raise BadRow(f"has {token} in a text, which stands for an image")
        pieces, done, end = [], "", self.processor.tokenizer.eos_token
        messages = conversation.messages
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt, full = self._render(messages[:i], prompt=True), self._render(messages[: i + 1])
            if not prompt.startswith(done) or not full.startswith(prompt):
                raise BadRow("the chat template renders its earlier turns in another way once later ones are there")
            answer = full[len(prompt) :]
            if end and end in answer:
                answer = answer[: answer.rindex(end) + len(end)]
            pieces += [(prompt[len(done) :], False), (answer, True)]
            done = prompt + answer
        return pieces

    def _render(self, messages: list[dict], prompt: bool = False) -> str:
        try:
            return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # templates may raise anything, for example for an unexpected order of roles
            raise BadRow(f"the chat template refuses it: {' '.join(str(error).split())}") from error

    def length(self, conversation: Conversation, sizes: list[tuple[int, int]]) -> int:
        """Tokens of the row, from the (width, height) of its images, without their pixels. Raises: BadRow."""
        count = sum(
            len(self.processor.tokenizer(text, add_special_tokens=i == 0).input_ids)
            for i, (text, _) in enumerate(self.segments(conversation))
        )
        for width, height in sizes:
            try:
                count += self._image_tokens(height, width) - 1  # its placeholder is one token of the text
            except ValueError as error:
                raise BadRow(
                    f"an image of {width} x {height} pixels is refused: {' '.join(str(error).split())}"
                ) from error
        return count

    def _image_tokens(self, height: int, width: int) -> int:
        """Tokens of an image in the text: one per merged patch in Qwen3-VL, one in QVL."""
        image_processor = self.processor.image_processor
        if isinstance(image_processor, QVLImageProcessor):
            image_processor.target_size(height, width)
            return 1
        return image_processor.get_number_of_image_patches(height, width, {}) // image_processor.merge_size**2

    def check(self, conversation: Conversation, sizes: list[tuple[int, int]]) -> None:
        """Raises: BadRow if the row is too long or has too many images."""
        if self.max_images is not None and len(sizes) > self.max_images:
            raise BadRow(f"has {len(sizes)} images, more than the model's {self.max_images}")
        length = self.length(conversation, sizes)
        if length > self.max_length:
            raise BadRow(f"is {length} tokens long, more than {self.max_length}")

    def __call__(self, conversation: Conversation, images: list[Image.Image]) -> dict[str, Tensor]:
        """One row: input_ids and labels [T], and the other inputs of the family's model. Raises: BadRow.

        Qwen3-VL: mm_token_type_ids [T]; with images pixel_values [patches, ...] and image_grid_thw. QVL: with
        images pixel_values [1, images, C, H, W] and pixel_attention_mask [1, images, H, W].
        """
        columns: dict[str, list[Tensor]] = {}
        labels, rest = [], list(images)
        for i, (text, learned) in enumerate(self.segments(conversation)):
            count = text.count(self.processor.image_token)
            shown, rest = rest[:count], rest[count:]
            encoded = self.processor(images=shown or None, text=[text], return_tensors="pt", add_special_tokens=i == 0)
            ids = encoded["input_ids"][0]
            labels.append(ids if learned else torch.full_like(ids, IGNORED))
            for name, value in encoded.items():
                if name in _PIXELS and "pixel_attention_mask" in encoded and encoded["pixel_values"].dim() == 4:
                    value = value[:, None]  # the only image of its text
                columns.setdefault(name, []).append(value[0] if name in _PER_TOKEN else value)
        columns.pop("attention_mask", None)
        row = {name: _joined(name, values, dim=1) for name, values in columns.items()}
        row["labels"] = torch.cat(labels)
        if len(row["input_ids"]) > self.max_length:
            raise BadRow(f"is {len(row['input_ids'])} tokens long, more than {self.max_length}")
        return row


_PIXELS = ("pixel_values", "pixel_attention_mask")
_PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids")
_FILLERS = {"labels": IGNORED, "mm_token_type_ids": 0}


def pad(rows: list[dict[str, Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    """Rows as ``Encoder`` makes them -> one batch: tokens padded on the right to [B, T], attention_mask added, images
    joined.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    batch = {"attention_mask": torch.zeros(len(rows), max(lengths), dtype=torch.long)}
    for i, length in enumerate(lengths):
        batch["attention_mask"][i, :length] = 1
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if name in row]
        if values[0].dim() == 1 and name in ("input_ids", *_FILLERS):
            filler = _FILLERS.get(name, pad_token_id)
            batch[name] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=filler)
        elif (
            name in _PIXELS and values[0].dim() > 3
        ):  # of each row, [1, images, ...]: rows without images get masked ones
            blank = values[0].new_zeros((1, 1, *values[0].shape[2:]))
            batch[name] = _joined(name, [row.get(name, blank) for row in rows], dim=0)
        else:
            batch[name] = torch.cat(values)
    return batch


def _joined(name: str, values: list[Tensor], dim: int) -> Tensor:
    """Joins values of several texts or rows. Pixels [1, images, (channels,) H, W] are padded with zeros to one size and
    joined along ``dim`` (1 for images of a row, 0 for rows of a batch); tokens and patches are concatenated.
    """
    if name not in _PIXELS or values[0].dim() <= 3:
        return torch.cat(values)
    largest = [max(value.shape[i] for value in values) for i in range(values[0].dim())]
    padded = []
    for value in values:
        gaps = [
            0 if i == dim or i == values[0].dim() - 3 and name == "pixel_values" else size - value.shape[i]
            for i, size in enumerate(largest)
        ]
        padded.append(torch.nn.functional.pad(value, [amount for gap in reversed(gaps) for amount in (0, gap)]))
    return torch.cat(padded, dim)


class Collator:
    """``pad`` as the data_collator of a Trainer."""

    def __init__(self, processor: Any) -> None:
        token = processor.tokenizer.pad_token_id
        self.pad_token_id = token if token is not None else processor.tokenizer.eos_token_id

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return pad(rows, self.pad_token_id)
