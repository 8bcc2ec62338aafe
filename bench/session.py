"""One loaded model and what is measured on it. Lives in a worker process; see worker.py for how it is driven."""

import time

import numpy as np
import torch
from transformers.generation.streamers import BaseStreamer

from bench import inputs, machine, timing

__all__ = ["Session"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class _Clock(BaseStreamer):
    """When each token came out. ``generate`` puts the prompt first, which is left out."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt_seen = False

    def put(self, value) -> None:
        if self._prompt_seen:
            self.times.append(time.perf_counter())
        self._prompt_seen = True

    def end(self) -> None:
        pass


class Session:
    """A stock or accelerated model in one dtype, loaded from disk, with the benchmark's inputs."""

    def load(self, path: str, accelerated: bool, dtype: str, image_size: int, long_size: int, text_tokens: int) -> dict:
        """Loads the model and makes the inputs. Returns their sizes and the bytes that one decoded token must read."""
        from transformers import Qwen3VLForConditionalGeneration

        from qvl_model.processing import load_processor

        self.dtype = DTYPES[dtype]
        self.model = Qwen3VLForConditionalGeneration.from_pretrained(
            path, dtype=self.dtype, attn_implementation="sdpa").eval()
        if accelerated:
            import qvl_model

            self.model = qvl_model.accelerate(self.model)
        processor = load_processor(path)
        self.image = inputs.image_prompt(processor, inputs.photographs(image_size)[:1], text_tokens)
        length = self.image["input_ids"].shape[1]
        self.text = inputs.text_prompt(processor, length)
        self.long = inputs.image_prompt(processor, inputs.photographs(long_size), text_tokens)
        visual = int((self.image["input_ids"] == self.model.config.image_token_id).sum())
        return {
            "patches": self.image["pixel_values"].shape[0],
            "visual_tokens": visual,
            "text_tokens": length - visual,
            "text_only_tokens": self.text["input_ids"].shape[1],
            "long_tokens": self.long["input_ids"].shape[1],
            "long_patches": self.long["pixel_values"].shape[0],
            "bytes_per_token": self._bytes_per_token(length),
            "threads": torch.get_num_threads(),
        }

    def _bytes_per_token(self, length: int) -> int:
        """Weights of the decoder and of the output projection, once, and the key/value cache of ``length`` tokens."""
        text = self.model.model.language_model
        modules = [text.layers, text.norm, self.model.lm_head]
        weights = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
        config = self.model.config.text_config
        cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * length * self.dtype.itemsize
        return weights + cache

    @torch.inference_mode()
    def vision(self) -> float:
        pixels = self.image["pixel_values"].to(self.dtype)
        return timing.seconds(lambda: self.model.model.visual(pixels, grid_thw=self.image["image_grid_thw"]))

    def generate(self, prompt: str, tokens: int) -> dict[str, float | None]:
        """Greedy generation after a prompt ("image", "text" or "long"): seconds to the first token and per token after it."""
        clock = _Clock()
        start = time.perf_counter()
        self.model.generate(
            **getattr(self, prompt), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, streamer=clock)
        first, last = clock.times[0], clock.times[-1]
        return {"first": first - start, "per_token": (last - first) / (tokens - 1) if tokens > 1 else None}

    def warm_up(self) -> None:
        """Touches every weight and every code path that is timed later."""
        self.generate("image", 3)
        self.generate("text", 1)

    @torch.inference_mode()
    def logits(self, file: str) -> None:
        """Saves the logits of every position of the image prompt in fp32."""
        np.save(file, self.model(**self.image).logits[0].float().numpy())

    def peak_rss(self) -> int:
        return machine.peak_rss_bytes()

    def fallbacks(self) -> list[str]:
        """Cases that took the slow reference; the benchmark of an accelerated model should show none."""
        import qvl_kernels

        return qvl_kernels.fallbacks()
