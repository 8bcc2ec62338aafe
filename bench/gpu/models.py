"""The whole model on a GPU, stock against accelerated: first token, decoding, vision, training, memory. Random weights,
made on the device.
"""

import copy
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import DynamicCache

from bench.checkpoint_files import FULL_CONFIG, special_token_ids
from bench.fp64_reference import relative_error
from bench.gpu.timing import compare, synchronize
from bench.timing import summary
from qvl_kernels.gpu import features
from qvl_kernels.gpu.device import architecture

__all__ = ["FULL", "SMALL", "Sizes", "build", "compiled", "decode", "fits", "generate", "memory", "parity", "train"]

SEED = 0


@dataclass(frozen=True)
class Sizes:
    """What is measured; the defaults are those of the targets, tests take smaller ones."""

    config: dict = field(default_factory=lambda: FULL_CONFIG)
    image: int = 448  # pixels of the square image
    large_image: int = 1024
    text: int = 66  # text tokens beside the image
    prompt: int = 262  # text tokens of the batched decode
    tokens: int = 64
    batch: int = 4  # of training
    length: int = 2048
    rounds: int = 5
    steps: int = 5
    parity_steps: int = 200
    learning_rate: float = 1e-5


FULL = Sizes()


def _model(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Stock, with seeded random weights made on the device."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    config = Qwen3VLConfig(**copy.deepcopy(sizes.config), **special_token_ids())
    torch.manual_seed(SEED)
    with torch.device(device):
        model = Qwen3VLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def _twin(model: nn.Module) -> nn.Module:
    """A second model object over the same weights."""
    return copy.deepcopy(model, {id(x): x for x in itertools.chain(model.parameters(), model.buffers())})


def _accelerated(model: nn.Module, weights: str | None = None) -> nn.Module:
    import qvl_model

    return qvl_model.accelerate(model, weights=weights)


def _image_prompt(model: nn.Module, sizes: Sizes, pixels: int, device: torch.device) -> dict[str, torch.Tensor]:
    """One square noise image between text tokens, in the processor's output format."""
    config = model.config
    vision = config.vision_config
    side = pixels // vision.patch_size
    visual = (side // vision.spatial_merge_size) ** 2
    generator = torch.Generator().manual_seed(SEED)
    text = torch.randint(
        max(special_token_ids().values()) + 1, config.text_config.vocab_size, (sizes.text - 2,), generator=generator
    )
    half = len(text) // 2
    image = torch.full((visual,), config.image_token_id)
    ids = torch.cat(
        (
            text[:half],
            torch.tensor([config.vision_start_token_id]),
            image,
            torch.tensor([config.vision_end_token_id]),
            text[half:],
        )
    )[None]
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    prompt = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_token_id).int(),
        "pixel_values": torch.rand(side * side, patch, generator=generator) * 2 - 1,
        "image_grid_thw": torch.tensor([[1, side, side]]),
    }
    return {name: x.to(device) for name, x in prompt.items()}


def _text_prompt(model: nn.Module, rows: int, length: int, device: torch.device) -> dict[str, torch.Tensor]:
    low, high = max(special_token_ids().values()) + 1, model.config.text_config.vocab_size
    ids = torch.randint(low, high, (rows, length), generator=torch.Generator().manual_seed(SEED)).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _generate(model: nn.Module, prompt: dict, tokens: int) -> torch.Tensor:
    return model.generate(**prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)


def _interleaved(functions: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, dict]:
    """Wall-clock milliseconds of interleaved runs, host overhead included."""
    times = {name: [] for name in functions}
    for index in range(rounds + 1):
        for name in list(functions)[:: 1 if index % 2 == 0 else -1]:
            synchronize(device)
            start = time.perf_counter()
            functions[name]()
            synchronize(device)
            if index:  # the first round warms up: kernels are compiled, graphs captured
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: summary(values) for name, values in times.items()}


def _per_token(models: dict[str, nn.Module], prompt: dict, sizes: Sizes, device: torch.device) -> tuple[dict, dict]:
    """(milliseconds to the first token, milliseconds per token after it) of each model."""
    first = _interleaved(
        {name: lambda m=model: _generate(m, prompt, 1) for name, model in models.items()}, device, sizes.rounds
    )
    whole = _interleaved(
        {name: lambda m=model: _generate(m, prompt, sizes.tokens + 1) for name, model in models.items()},
        device,
        sizes.rounds,
    )
    decoded = {
        name: summary([(t - first[name]["median"]) / sizes.tokens for t in whole[name]["values"]]) for name in models
    }
    return first, decoded


def _replays(model: nn.Module, rows: int, length: int, device: torch.device) -> dict[str, dict]:
    """Device milliseconds of the decode CUDA graph over ``length`` keys; also with PDL switched the other way."""
    from qvl_model.generation import step_gpu

    step_gpu.release(model)  # graphs captured by earlier calls
    steps, on = {}, features.DEFAULT.get(("decoding", architecture(device)), ())
    for name, variants in (("ours", on), ("plain", ()) if on else ("PDL", ("PDL",))):
        with features.override("decoding", *variants):
            cache, config = DynamicCache(config=model.config.text_config), model.config.text_config
            for index in range(config.num_hidden_layers):
                shape = rows, config.num_key_value_heads, length, config.head_dim
                cache.update(*(torch.randn(shape, dtype=model.dtype, device=device) for _ in range(2)), index)
            positions = torch.full((3, rows, 1), length, device=device)
            steps[name] = step_gpu.GpuStep.begin(model, cache, positions, None, limit=None)
    return compare({name: step.graph.replay for name, step in steps.items()}, device)


def _bytes_per_token(model: nn.Module, rows: int, length: int) -> int:
    """Bytes per decode step: decoder and head once, and the KV cache of all rows."""
    text, config = model.model.language_model, model.config.text_config
    weights = sum(
        p.numel() * p.element_size() for module in (text.layers, text.norm, model.lm_head) for p in module.parameters()
    )
    return (
        weights
        + 2
        * rows
        * config.num_hidden_layers
        * config.num_key_value_heads
        * config.head_dim
        * length
        * model.dtype.itemsize
    )


def generate(sizes: Sizes, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> dict:
    """Batch 1, one image: first token, decoding, vision encoding, and errors of all logits against fp32."""
    stock = _model(sizes, device, dtype)
    models = {"stock": stock, "ours": _accelerated(_twin(stock))}
    prompt = _image_prompt(stock, sizes, sizes.image, device)
    with torch.no_grad():
        first, decoded = _per_token(models, prompt, sizes, device)
        pixels = prompt["pixel_values"].to(dtype)
        vision = _interleaved(
            {name: lambda m=m: m.model.visual(pixels, grid_thw=prompt["image_grid_thw"]) for name, m in models.items()},
            device,
            sizes.rounds,
        )
        logits = {name: model(**prompt).logits for name, model in models.items()}
        golden = copy.deepcopy(stock).float()(**prompt).logits
        errors = {name: relative_error(values, golden) for name, values in logits.items()}
        length = prompt["input_ids"].shape[1] + sizes.tokens // 2
        replay = _replays(models["ours"], 1, length, device)
    return {
        "first": first,
        "decode": decoded,
        "vision": vision,
        "replay": replay,
        "variants": [name for name in replay if name != "ours"],
        "errors": errors,
        "bytes_per_token": _bytes_per_token(stock, 1, length),
    }


def decode(
    sizes: Sizes, device: torch.device, *, rows: int, weights: str | None = None, dtype: torch.dtype = torch.bfloat16
) -> dict:
    """Text prompts: the first token of ``rows`` rows and batched decode, with dense 16-bit or quantised weights."""
    stock = _model(sizes, device, dtype)
    twin = copy.deepcopy(stock) if weights else _twin(stock)  # quantising replaces the weights
    models = {"stock": stock, "ours": _accelerated(twin, weights)}
    with torch.no_grad():
        first, decoded = _per_token(models, _text_prompt(stock, rows, sizes.prompt, device), sizes, device)
        replay = _replays(models["ours"], rows, sizes.prompt + sizes.tokens // 2, device)
    return {
        "first": first,
        "decode": decoded,
        "replay": replay,
        "variants": [name for name in replay if name != "ours"],
        "bytes_per_token": _bytes_per_token(stock, rows, sizes.prompt + sizes.tokens // 2),
    }


def compiled(sizes: Sizes, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> dict:
    """The forward of the prompt: stock, accelerated, and stock under torch.compile."""
    stock = _model(sizes, device, dtype)
    models = {"stock": stock, "ours": _accelerated(_twin(stock)), "compile": torch.compile(_twin(stock))}
    prompt = _image_prompt(stock, sizes, sizes.image, device)
    with torch.no_grad():
        return {
            "forward": _interleaved(
                {name: lambda m=m: m(**prompt, logits_to_keep=1) for name, m in models.items()}, device, sizes.rounds
            )
        }


def _variant(sizes: Sizes, device: torch.device, dtype: torch.dtype, variant: str) -> nn.Module:
    """ "stock", "ours", "liger", or a weight format of ours."""
    model = _model(sizes, device, dtype)
    if variant == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3_vl

        apply_liger_kernel_to_qwen3_vl(model=model)
        return model
    return model if variant == "stock" else _accelerated(model, None if variant == "ours" else variant)


class _Peak:
    """Allocated bytes: now, and the most since the last reset."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.there = device, device.type == "cuda"

    def reset(self) -> int:
        if not self.there:
            return 0
        synchronize(self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def read(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.there else 0


def memory(sizes: Sizes, device: torch.device, variant: str, dtype: torch.dtype = torch.bfloat16) -> dict:
    """Bytes of the weights and the peak of answering about a large image. Runs in its own process, so nothing else was
    allocated.
    """
    model = _variant(sizes, device, dtype, variant)
    peak = _Peak(device)
    weights = peak.reset()
    with torch.no_grad():
        _generate(model, _image_prompt(model, sizes, sizes.large_image, device), sizes.tokens)
    return {"weights": weights, "peak": peak.read()}


def fits(sizes: Sizes, device: torch.device, limit: int) -> dict:
    """Whether accelerated fp16 answers about an image within ``limit`` bytes of device memory, the context's own left
    out.
    """
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(
            limit / torch.cuda.get_device_properties(device).total_memory, device
        )
    model = _variant(sizes, device, torch.float16, "ours")
    peak = _Peak(device)
    with torch.no_grad():
        _generate(model, _image_prompt(model, sizes, sizes.image, device), sizes.tokens)
    return {"limit": limit, "peak": peak.read()}


def _steps(model: nn.Module, sizes: Sizes, device: torch.device, count: int) -> Iterator[tuple[float, torch.Tensor]]:
    """(seconds, loss) of each training step on the same batch: AdamW, no checkpointing."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=sizes.learning_rate, fused=device.type == "cuda")
    ids = _text_prompt(model, sizes.batch, sizes.length, device)["input_ids"]
    for _ in range(count):
        synchronize(device)
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize(device)
        yield time.perf_counter() - start, loss.detach()


def train(sizes: Sizes, device: torch.device, variant: str, dtype: torch.dtype = torch.bfloat16) -> dict:
    """Milliseconds of a training step of every parameter, and the peak memory. A process of its own."""
    model = _variant(sizes, device, dtype, variant)
    peak = _Peak(device)
    peak.reset()
    steps = list(_steps(model, sizes, device, sizes.steps + 2))
    return {
        "step": summary([1e3 * seconds for seconds, _ in steps[2:]]),
        "peak": peak.read(),
        "losses": [loss.item() for _, loss in steps],
    }


TINY = {
    "tie_word_embeddings": True,
    "text_config": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 2048,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [12, 10, 10],
            "mrope_interleaved": True,
        },
    },
    "vision_config": {
        "depth": 2,
        "hidden_size": 128,
        "num_heads": 2,
        "intermediate_size": 256,
        "out_hidden_size": 256,
        "deepstack_visual_indexes": [0, 1],
        "num_position_embeddings": 64,
    },
}


def parity(sizes: Sizes, device: torch.device) -> dict:
    """Losses of a tiny model in fp32, trained with stock code and accelerated from the same weights: the largest
    relative difference.
    """
    tiny = Sizes(config=TINY, batch=2, length=64, learning_rate=1e-3)
    losses = {}
    for variant in ("stock", "ours"):
        model = _variant(tiny, device, torch.float32, variant)
        losses[variant] = (
            torch.stack([loss for _, loss in _steps(model, tiny, device, sizes.parity_steps)]).double().cpu()
        )
    difference = ((losses["ours"] - losses["stock"]).abs() / losses["stock"].abs().clamp_min(0.1)).max().item()
    return {"difference": difference, "first_loss": losses["stock"][0].item(), "last_loss": losses["stock"][-1].item()}


SMALL = Sizes(
    config=TINY,
    image=64,
    large_image=96,
    text=20,
    prompt=16,
    tokens=4,
    batch=2,
    length=24,
    rounds=1,
    steps=1,
    parity_steps=5,
)


def build(run: Callable[[Sizes, torch.device], dict]) -> dict:
    """Without a GPU: the full-size model without memory, and the whole case on the CPU with a tiny model."""
    parameters = sum(p.numel() for p in _model(FULL, torch.device("meta"), torch.bfloat16).parameters())
    return {"parameters": parameters, "measured": sorted(run(SMALL, torch.device("cpu")))}
