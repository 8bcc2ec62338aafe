"""Conversation -> tensors, through the checkpoint's own processor; labels on the assistant's tokens only."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qvl_model.training.rows import BadRow, Conversation

__all__ = ["Collator", "Encoder", "IGNORED", "pad"]

IGNORED = -100  # label of tokens that no loss is computed for


class Encoder:
    """Turns conversations into model inputs with labels.

    The chat template renders every turn as it will at generation: all that comes before an answer is one piece of text, tokenised as
    the prompt would be, and the answer with its end-of-turn token is another, which is what the model learns. Turns after the last
    answer are left out.

    Args:
        processor: as ``qvl_model.processing.load_processor`` gives it.
        max_length: longest row in tokens.
    Example:
        >>> encoder = Encoder(load_processor(path), max_length=2048)
        >>> row = encoder(parse({"image": image, "question": "Which digit is this?", "answer": "7"}), [image])
    """

    def __init__(self, processor: Any, max_length: int = 2048):
        if processor.chat_template is None:
            raise ValueError("the processor has no chat template; put its chat_template.jinja into the checkpoint directory")
        self.processor, self.max_length = processor, max_length

    def segments(self, conversation: Conversation) -> list[tuple[str, bool]]:
        """(text, whether it is learned) in order; together the rendered conversation up to the end of the last answer."""
        special = [token for token in (self.processor.image_token, self.processor.video_token) if token]
        for message in conversation.messages:
            for part in message["content"]:
                for token in special:
                    if token in part.get("text", ""):
                        raise BadRow(f"has {token} in a text, which stands for a picture")
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
        except Exception as error:  # templates raise what they like, for example for roles in an order they do not know
            raise BadRow(f"the chat template refuses it: {' '.join(str(error).split())}") from error

    def length(self, conversation: Conversation, sizes: list[tuple[int, int]]) -> int:
        """Tokens of the row, given the (width, height) of its pictures, without preparing them. Raises: BadRow."""
        count = sum(len(self.processor.tokenizer(text, add_special_tokens=i == 0).input_ids) for i, (text, _) in enumerate(self.segments(conversation)))
        image_processor = self.processor.image_processor
        for width, height in sizes:
            try:
                patches = image_processor.get_number_of_image_patches(height, width, {})
            except ValueError as error:
                raise BadRow(f"a picture of {width} x {height} pixels is refused: {' '.join(str(error).split())}") from error
            count += patches // image_processor.merge_size**2 - 1  # its place is one token of the text
        return count

    def check_length(self, conversation: Conversation, sizes: list[tuple[int, int]]) -> None:
        """Raises: BadRow if the row is too long."""
        length = self.length(conversation, sizes)
        if length > self.max_length:
            raise BadRow(f"is {length} tokens long, more than {self.max_length}")

    def __call__(self, conversation: Conversation, images: list[Image.Image]) -> dict[str, Tensor]:
        """One row: input_ids, labels, mm_token_type_ids [T] and, with pictures, pixel_values and image_grid_thw. Raises: BadRow."""
        columns: dict[str, list[Tensor]] = {}
        labels, rest = [], list(images)
        for i, (text, learned) in enumerate(self.segments(conversation)):
            count = text.count(self.processor.image_token)
            shown, rest = rest[:count], rest[count:]
            encoded = self.processor(images=shown or None, text=[text], return_tensors="pt", add_special_tokens=i == 0)
            ids = encoded["input_ids"][0]
            labels.append(ids if learned else torch.full_like(ids, IGNORED))
            for name, value in encoded.items():
                columns.setdefault(name, []).append(value[0] if name in _PER_TOKEN else value)
        columns.pop("attention_mask", None)
        row = {name: torch.cat(values) for name, values in columns.items()}
        row["labels"] = torch.cat(labels)
        if len(row["input_ids"]) > self.max_length:
            raise BadRow(f"is {len(row['input_ids'])} tokens long, more than {self.max_length}")
        return row


_PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids")
_FILLERS = {"labels": IGNORED, "mm_token_type_ids": 0}


def pad(rows: list[dict[str, Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    """Rows as ``Encoder`` makes them -> one batch: tokens padded on the right to [B, T], attention_mask added, pictures joined."""
    lengths = [len(row["input_ids"]) for row in rows]
    batch = {"attention_mask": torch.zeros(len(rows), max(lengths), dtype=torch.long)}
    for i, length in enumerate(lengths):
        batch["attention_mask"][i, :length] = 1
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if name in row]
        if values[0].dim() == 1 and name in ("input_ids", *_FILLERS):
            filler = _FILLERS.get(name, pad_token_id)
            batch[name] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=filler)
        else:
            batch[name] = torch.cat(values)
    return batch


class Collator:
    """``pad`` as the data_collator of a Trainer."""

    def __init__(self, processor: Any):
        token = processor.tokenizer.pad_token_id
        self.pad_token_id = token if token is not None else processor.tokenizer.eos_token_id

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return pad(rows, self.pad_token_id)
