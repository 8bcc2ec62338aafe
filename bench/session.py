"""One loaded model and its measurements, in a worker process (worker.py)."""

from pathlib import Path

import numpy as np
import torch

from bench import inputs, machine, timing
from bench.families import family_of
from bench.generation import timed_generate

__all__ = ["ACCELERATED", "Session"]

# Variants of a model besides "stock": the weight format given to accelerate; None for dense weights.
ACCELERATED: dict[str, str | None] = {"ours": None, "int8": "int8", "int4": "int4"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Session:
    """One variant of a model in one dtype, loaded from disk, with the benchmark's inputs."""

    def load(
        self, path: str, variant: str, dtype: str, image_size: int, long_size: int, text_tokens: int, batch: int
    ) -> dict:
        """Loads the model and makes the inputs. Returns their sizes and the bytes that one decoded token must read."""
        from transformers import AutoModelForImageTextToText

        from qvl_model.processing import load_processor

        self.model = AutoModelForImageTextToText.from_pretrained(
            path, dtype=DTYPES[dtype], attn_implementation="sdpa", trust_remote_code=False
        ).eval()
        if variant != "stock":
            import qvl_model

            self.model = qvl_model.accelerate(self.model, weights=ACCELERATED[variant])
        self.family = family_of(self.model.config)
        processor = load_processor(path)
        self.image = inputs.image_prompt(processor, inputs.photographs(image_size)[:1], text_tokens)
        length = self.image["input_ids"].shape[1]
        self.text = inputs.text_prompt(processor, length)
        self.batch = inputs.batch_prompt(processor, batch, length)
        self.long = inputs.image_prompt(processor, inputs.photographs(long_size), text_tokens)
        patches, visual = self.family.image_size(self.model, self.image)
        return {
            "patches": patches,
            "visual_tokens": visual,
            "text_tokens": length - int((self.image["input_ids"] == self.model.config.image_token_id).sum()),
            "text_only_tokens": self.text["input_ids"].shape[1],
            "long_tokens": self.long["input_ids"].shape[1],
            "long_patches": self.family.image_size(self.model, self.long)[0],
            "bytes_per_token": self.family.bytes_per_token(self.model, self.image),
            "threads": torch.get_num_threads(),
        }

    @torch.inference_mode()
    def vision(self) -> float:
        return timing.seconds(lambda: self.family.encode(self.model, self.image))

    def generate(self, prompt: str, tokens: int) -> dict[str, float | None]:
        """Greedy generation after a prompt ("image", "text", "long" or "batch"): seconds to the first token and per
        step after it.
        """
        return timed_generate(self.model, getattr(self, prompt), tokens)

    def warm_up(self) -> None:
        """Runs every timed code path once, so that weights are in memory."""
        self.generate("image", 3)
        self.generate("text", 1)

    def save_prompts(self, file: str) -> None:
        """Writes the inputs for other engines, which have no processor."""
        inputs.save({"image": self.image, "text": self.text, "long": self.long}, Path(file))

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

    def routes(self) -> list[str]:
        """Whose CPU kernel does each kind of work in the accelerated model, with both times."""
        import qvl_model

        return qvl_model.report(self.model).routes
