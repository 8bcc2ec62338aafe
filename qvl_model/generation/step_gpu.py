"""A decode step on a GPU: one CUDA graph over buffers at fixed addresses, and KV caches that may grow."""

import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock

from qvl_kernels import config, dispatch
from qvl_kernels.gpu import device as gpu_device
from qvl_kernels.gpu import features
from qvl_kernels.ops.decoder_layer.decode_step import decode_step
from qvl_kernels.ops.decoder_layer.growing_caches import GrowingCaches
from qvl_model.generation import graphs, images, sampling_gpu
from qvl_model.generation.images import Images
from qvl_model.generation.inputs import body_why_not, cache_indices, token_inputs
from qvl_model.generation.kv_cache import forget
from qvl_model.generation.sampling import Chooser
from qvl_model.generation.sampling_gpu import Sampler
from qvl_model.modules import lm_head as head
from qvl_model.modules import text
from qvl_model.modules.decoder_layer import fused_layer_of
from qvl_model.modules.fast_path import autocast_dtype, is_eligible
from qvl_model.quantization.modules import PackedLinear
from qvl_model.qvl import QVLForConditionalGeneration, QVLTextModel

__all__ = ["DEPENDS_ON", "GpuStep", "StepFailed", "release", "why_failed", "why_no_graphs", "why_not"]

KEPT_STEPS = 2  # idle captured steps kept per model, those used last
KEPT_SAMPLERS = 4  # captured samplers kept per step, those used last
FIRST_ROOM = 256  # least number of positions beyond the prompt for which KV caches have room before they grow


class StepFailed(RuntimeError):
    """Memory, or the driver, did not allow a captured step."""


def _modules(model: nn.Module) -> list[nn.Module]:
    return [*model.model.language_model.modules(), model.lm_head]


def _attributes(model: nn.Module, *names: str) -> tuple:
    return tuple((name, getattr(module, name)) for module in _modules(model) for name in names if hasattr(module, name))


def _tensors(model: nn.Module) -> list[Tensor]:
    return [
        x
        for module in _modules(model)
        for own in (module._parameters, module._buffers)
        for x in own.values()
        if x is not None
    ]


# The guard of a captured step: after a change of any of these values its graph would compute wrong results. Contents of
# tensors are read at every replay, so they are not among them.
DEPENDS_ON: dict[str, Callable[[nn.Module], object]] = {
    "classes": lambda model: [type(module) for module in _modules(model)],
    "replaced forwards": lambda model: [id(module.__dict__.get("forward")) for module in _modules(model)],
    "hooks": lambda model: [(*module._forward_pre_hooks, *module._forward_hooks) for module in _modules(model)],
    "memory": lambda model: [x.data_ptr() for x in _tensors(model)],
    "shapes": lambda model: [(x.shape, x.stride()) for x in _tensors(model)],
    "dtypes": lambda model: [x.dtype for x in _tensors(model)],
    "devices": lambda model: [x.device for x in _tensors(model)],
    "norm of embeddings": lambda model: _attributes(model, "max_norm", "norm_type"),
    "epsilons": lambda model: _attributes(model, "variance_epsilon"),
    "rotary positions": lambda model: _attributes(model, "attention_scaling", "mrope_section", "rope_type"),
    "attention": lambda model: _attributes(
        model, "scaling", "is_causal", "head_dim", "num_key_value_groups", "layer_idx"
    ),
    "attention implementation": lambda model: [
        module.config._attn_implementation for module in _modules(model) if hasattr(module, "config")
    ],
    "numbers of QVL's config": lambda model: [
        getattr(model.model.language_model.config, name, None) for name in ("rope_theta", "head_dim", "image_token_id")
    ],
    "dropout": lambda model: _attributes(model, "training", "attention_dropout"),
    "autocast": lambda model: autocast_dtype(next(model.model.language_model.parameters()).device),
    "backend": lambda model: dispatch.forced(),
    "precision of matmuls": lambda model: (
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        torch.backends.cuda.matmul.allow_fp16_accumulation,
    ),
}


def _state(model: nn.Module) -> dict[str, object]:
    return {name: state_of(model) for name, state_of in DEPENDS_ON.items()}


def why_no_graphs(device: torch.device) -> str | None:
    """Why ``device`` cannot run captured decode steps now, independent of the model, or None."""
    if dispatch.forced() not in (None, "triton"):
        return f"the backend {dispatch.forced()} is forced"
    if device.type == "cuda":
        return gpu_device.unavailable(device)
    if device.type == "cpu" and dispatch.forced() == "triton" and config.interpreted():  # tests
        return gpu_device.unavailable(device)
    return f"tensors on {device.type} have no CUDA graphs"


def why_not(model: nn.Module) -> str | None:
    """Why the model as it is now cannot run captured decode steps, or None."""
    if not isinstance(model, (stock.Qwen3VLForConditionalGeneration, QVLForConditionalGeneration)):
        return f"{type(model).__name__} has no captured steps"
    body, lm_head = model.model.language_model, model.lm_head
    device = next(body.parameters()).device
    reason = why_no_graphs(device)
    if reason is not None:
        return reason
    if any(x.device != device for x in _tensors(model)):
        return "the language model lies on several devices"
    if isinstance(body, QVLTextModel):
        parts = (body.embed_tokens, body.embed_token_types, body.dropout)
        if body.dropout.training and body.dropout.p > 0.0:
            return "dropout is on"
    else:
        parts, kind = (body.embed_tokens, body.rotary_emb), getattr(body.rotary_emb, "rope_type", None)
        if kind is None:
            return "the rotary embedding is not eligible for the fast path"
        if "dynamic" in kind or kind == "longrope":
            return f"rotary frequencies of {kind} change with the length"
    if any(not is_eligible(module, type(module)) for module in (*parts, body.norm, lm_head)) or any(
        "inv_freq" in vars(part) for part in parts
    ):
        return "hooks, which a graph would not call, or tensors that are no parameters or buffers"
    if type(body.norm) is not text.Qwen3VLTextRMSNorm or type(lm_head) not in (head.Linear, PackedLinear):
        return "the last norm or the head is not eligible for the fast path"
    if lm_head._parameters.get("weight") is None:
        return "the head is not eligible for the fast path"
    if lm_head._parameters["weight"].dtype is not body.norm.weight.dtype:
        return "the head has another dtype"
    reason = body_why_not(body) or images.why_not(body)
    if reason is None and len({fused_layer_of(layer).handle.kv_heads for layer in body.layers}) > 1:
        return "decoder layers differ in their key/value heads"
    return reason


def why_failed(model: nn.Module, batch: int, length: int) -> str | None:
    """Why a step for ``batch`` sequences that continues from ``length`` keys, or a smaller one, failed, or None."""
    pool = _pools.get(model)
    return None if pool is None else pool.failure(_rows(batch), length + 1)


def release(model: nn.Module) -> None:
    """Frees the captured steps of a model, or of those that it is part of, and forgets what failed. Steps in use now
    are freed when their call ends.
    """
    with _lock:
        pools = [_pools.pop(owner) for owner in list(_pools) if any(module is model for module in owner.modules())]
    for pool in pools:
        pool.clear()


class _Pool:
    """The idle captured steps of a model, those used last at the end, and the sizes that failed."""

    def __init__(self) -> None:
        self._lock, self._idle, self._failed, self._open = threading.Lock(), [], {}, True

    def check_out(self, model: nn.Module, rows: int, layers: tuple[int, ...] = ()) -> "GpuStep | None":
        """An idle step for ``rows`` sequences and images in ``layers``, used by one caller until it is checked in, or
        None. Steps that the guard refuses are freed.
        """
        state = _state(model)
        with self._lock:
            self._idle = [step for step in self._idle if step.state == state]
            step = next(
                (step for step in reversed(self._idle) if (step.rows, step.layers_with_images) == (rows, layers)), None
            )
            if step is not None:
                self._idle.remove(step)
            return step

    def check_in(self, step: "GpuStep") -> None:
        with self._lock:
            if self._open:
                self._idle = [*self._idle, step][-KEPT_STEPS:]

    def clear(self) -> None:
        """Frees idle steps, and closes the pool: a step that is checked in later is freed."""
        with self._lock:
            self._idle, self._open = [], False

    def free_idle(self) -> bool:
        """Frees idle steps; whether there were any."""
        with self._lock:
            idle, self._idle = self._idle, []
            return bool(idle)

    def failed(self, rows: int, length: int, reason: str) -> None:
        with self._lock:
            self._failed[rows, length] = reason

    def failure(self, rows: int, length: int) -> str | None:
        """Why a step for this batch and length, or a smaller one, failed, or None."""
        with self._lock:
            found = (reason for (r, n), reason in self._failed.items() if r <= rows and n <= length)
            return next((f"{reason} (for {rows} x {length} keys or fewer)" for reason in found), None)


_pools: "weakref.WeakKeyDictionary[nn.Module, _Pool]" = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _pool(model: nn.Module) -> _Pool:
    with _lock:
        return _pools.setdefault(model, _Pool())


def _rows(batch: int) -> int:
    """Batch sizes that steps are captured for: 1, 2, 4, 8, 16, 24, 32, ..."""
    return 1 << (batch - 1).bit_length() if batch <= 16 else -(-batch // 8) * 8


def _reason(error: BaseException) -> str | None:
    """The message of an error that is due to memory, capture or the compilation of a kernel, or None for all others,
    which the caller raises.
    """
    of_triton = type(error).__module__.partition(".")[0] == "triton"
    if of_triton or isinstance(error, (torch.OutOfMemoryError, graphs.CaptureFailed)):
        return str(error)
    message = str(error)
    short = "out of memory" in message or "ALLOC_FAILED" in message or "can't allocate memory" in message
    return message if isinstance(error, RuntimeError) and short else None


def _attempt(pool: _Pool, device: graphs.Device, function: Callable) -> tuple[Any, str | None]:
    """(what ``function`` returns, None), or (None, reason) if memory is short even without idle steps, or a kernel or
    the capture fails.
    """
    while True:
        try:
            return function(), None
        except Exception as error:
            reason = _reason(error)
            if reason is None:
                raise
        # Outside of the handler, so that the traceback no longer keeps buffers alive.
        freed = pool.free_idle()
        device.return_freed_memory()
        if not freed:
            return None, reason


class GpuStep:
    """The decode steps of one call of ``generate``: made by ``begin``, and used by this call only until ``end``.

    Attributes:
        length: keys and values that it holds of every sequence.
        layers_with_images: indices of the decoder layers that attend to images; the graph of a text without images has
            none.
        graph: the captured decode step.
    """

    def __init__(self, model: nn.Module, rows: int, state: dict, layers_with_images: tuple[int, ...] = ()) -> None:
        self.rows, self.state, self.layers_with_images, self.length = rows, state, layers_with_images, 0
        self._model = weakref.ref(model)  # weak, since the model's pool refers to this step
        body, lm_head = model.model.language_model, model.lm_head
        self._layers = [fused_layer_of(layer).handle for layer in body.layers]
        self._cache_indices = cache_indices(body)
        first, weight = self._layers[0], body.norm.weight
        self._device, self._stream, self.graph = graphs.of(weight.device), None, None
        self._samplers: OrderedDict[tuple, Sampler | None] = OrderedDict()
        with torch.inference_mode(False):  # serves calls outside of inference mode, too
            self._tokens = torch.zeros(rows, 1, dtype=torch.long, device=weight.device)
            axes = () if isinstance(body, QVLTextModel) else (3,)
            self._positions = torch.zeros(*axes, rows, 1, dtype=torch.long, device=weight.device)
            self._lengths = torch.zeros(rows, dtype=torch.int32, device=weight.device)
            self._logits = torch.zeros(rows, lm_head.out_features, dtype=weight.dtype, device=weight.device)
        self._caches = GrowingCaches(
            len(self._layers), rows, first.kv_heads, first.head_dim, weight.dtype, weight.device
        )
        self._images = Images(body, layers_with_images, rows) if layers_with_images else None

    @classmethod
    def begin(
        cls,
        model: nn.Module,
        cache: DynamicCache,
        positions: Tensor,
        mask: Tensor | None,
        *,
        limit: int | None,
        release: bool = False,
    ) -> "GpuStep":
        """A step that continues from a cache of L keys.

        Args:
            model: one that ``why_not`` accepts.
            cache: of B sequences.
            positions: int64 [3, B, 1] (QVL: [B, 1]), of the next token; every run adds 1.
            mask: bool [B, L + 1], attention mask of the next token, or None if it sees all keys.
            limit: most keys that there will be at the end, if known.
            release: the cache is not read afterwards, so that its memory is freed layer by layer.
        Raises: StepFailed if memory is short or the capture fails; the cache is unchanged. ``why_failed`` reports the
            size from then on, until ``release``.
        """
        rows, length, pool, device = (
            _rows(positions.shape[-2]),
            cache.get_seq_length(),
            _pool(model),
            graphs.of(positions.device),
        )
        layers = images.layers_with_images(model.model.language_model, cache)

        def begun() -> GpuStep:
            step = pool.check_out(model, rows, layers) or cls(model, rows, _state(model), layers)
            try:
                step._begin(pool, cache, positions, mask, limit, release)
            except BaseException:
                step._hand_over(step._emptied, length)
                raise
            return step

        with device.active():
            step, reason = _attempt(pool, device, begun)
        if reason is not None:
            pool.failed(rows, length + 1, reason)
            raise StepFailed(reason)
        return step

    def _begin(
        self,
        pool: _Pool,
        cache: DynamicCache,
        positions: Tensor,
        mask: Tensor | None,
        limit: int | None,
        release: bool,
    ) -> None:
        self._pool, self._cache, self._limit, self._batch = pool, cache, limit, positions.shape[-2]
        self._release, self._emptied, self._failed = release, 0, False
        self.length = cache.get_seq_length()
        self._alive = [
            x.detach() for x in _tensors(self._model())
        ]  # keeps the memory that the graph reads, if a weight's data is swapped meanwhile
        self._follow()
        room = self.length + max(FIRST_ROOM, self.length // 2)
        room = room if limit is None else max(self.length + 1, min(limit, room))
        for index, layer in enumerate(self._cache_layers()):
            self._caches.take(index, layer.keys, layer.values, length=room)
            if release:
                self._emptied = index + 1
                layer.keys, layer.values = (
                    x.new_empty((*x.shape[:2], 0, x.shape[3])) for x in (layer.keys, layer.values)
                )
                forget(layer)
        if self._images is not None:
            self._images.load(cache, self._batch)
        self._set(positions, mask)
        if self.graph is None:
            self.graph = self._device.captured(self._token)
            self._set(positions, mask)  # warm-up runs have changed the buffers

    def _cache_layers(self) -> list:
        return [self._cache.layers[index] for index in self._cache_indices]

    def _set(self, positions: Tensor, mask: Tensor | None) -> None:
        self._tokens.zero_()
        self._lengths.zero_()
        self._lengths[: self._batch] = self.length
        self._positions.zero_()
        self._positions[..., : self._batch, :] = positions
        self._caches.set_mask(mask)

    def _follow(self) -> None:
        """Makes the current stream wait for earlier work of the step on another stream."""
        self._stream = self._device.follow(self._stream, self._tensors)

    def _tensors(self) -> list[Tensor]:
        caches = self._caches
        samplers = [x for sampler in self._samplers.values() if sampler is not None for x in sampler.tensors()]
        small = [self._tokens, self._positions, self._lengths, self._logits, caches.table, caches.mask]
        seen = [] if self._images is None else self._images.tensors()
        return small + caches.keys + caches.values + seen + samplers

    def run(self, tokens: Tensor) -> Tensor:
        """The logits [B, V] after ``tokens`` int64 [B, 1], in a buffer that the next run overwrites.

        Raises: StepFailed if there is no memory for one more key. Nothing has changed then, and ``end`` returns all
            keys and values to the cache, also if it was released.
        """
        with self._device.active():
            self._follow()
            if self.length >= self._caches.capacity:
                self._grow()
            if tokens.data_ptr() != self._tokens.data_ptr():
                self._tokens[: self._batch].copy_(tokens)
            self.graph.replay()
        self.length += 1
        return self._logits[: self._batch]

    def _grow(self) -> None:
        needed = self.length + 1
        _, reason = _attempt(self._pool, self._device, lambda: self._caches.reserve(needed, limit=self._limit))
        if reason is not None:
            self._pool.failed(self.rows, needed, reason)
            self._failed = True
            raise StepFailed(reason)

    def _token(self) -> None:
        """The captured function: from the tokens to the logits."""
        model = self._model()
        body = model.model.language_model
        hidden, cos, sin = token_inputs(body, self._tokens, self._positions)
        cache_seqlens = self._lengths + 1
        with features.decoding():
            for index, layer in enumerate(self._layers):
                if self._images is not None:
                    hidden = self._images.add(index, hidden)
                hidden = decode_step(hidden, layer, cos, sin, self._caches, index, self._lengths, cache_seqlens)
        self._logits.copy_(model.lm_head(body.norm(hidden))[:, 0])
        self._lengths.add_(1)
        self._positions.add_(1)

    def sampler(self, chooser: Chooser) -> Sampler | None:
        """A sampler that chooses as ``chooser`` does, without waiting for the device, or None.

        Args:
            chooser: has chosen a token.
        """
        if sampling_gpu.why_not(chooser) is not None or chooser.sequences.device != self._logits.device:
            return None
        key, reason = Sampler.key(chooser), None
        with self._device.active():
            if key not in self._samplers:
                self._samplers[key], reason = _attempt(self._pool, self._device, lambda: self._new_sampler(chooser))
            self._samplers.move_to_end(key)
            while len(self._samplers) > KEPT_SAMPLERS:
                self._samplers.popitem(last=False)
            sampler = self._samplers[key]
            if sampler is not None:
                sampler.begin(chooser)
        if reason is not None:
            warnings.warn(f"qvl_model: tokens are chosen without a CUDA graph: {reason}", RuntimeWarning, stacklevel=2)
        return sampler

    def _new_sampler(self, chooser: Chooser) -> Sampler:
        logits, tokens, embedding = (
            self._logits[: self._batch],
            self._tokens[: self._batch],
            self._model().model.language_model.embed_tokens,
        )
        return Sampler(chooser, logits, tokens, embedding.num_embeddings, self._device, self.graph.pool)

    def check(self) -> bool:
        """The guard: whether the model is as it was at capture, and the images are as they were at ``begin``."""
        model = self._model()
        layers = images.layers_with_images(model.model.language_model, self._cache)
        return (
            self.state == _state(model)
            and layers == self.layers_with_images
            and (self._images is None or self._images.are_in(self._cache))
        )

    def end(self, length: int) -> None:
        """Copies the first ``length`` keys and values back to the cache of ``begin``, unless it was released, and
        checks the step in.
        """
        if self._cache is None:
            return
        with self._device.active():
            self._follow()
            sound = not self._failed and (self._release or self._copied_back(length))
            if self._release or not sound:
                self._hand_over(len(self._layers), length)
        pool, self._pool, self._cache, self._alive = self._pool, None, None, None
        for sampler in self._samplers.values():
            if sampler is not None:
                sampler.leave()
        if sound:
            self._caches.clear()
            if self._images is not None:
                self._images.clear()
            pool.check_in(self)

    def _copied_back(self, length: int) -> bool:
        """Copies keys and values back to the cache; False if memory is short."""
        for index, layer in enumerate(self._cache_layers()):
            try:
                layer.keys, layer.values = self._caches.give(index, self._batch, length)
            except RuntimeError as error:
                if _reason(error) is None:
                    raise
                return False
        return True

    def _hand_over(self, layers: int, length: int) -> None:
        """Gives the cache this step's own memory for keys and values of the first layers, without a copy. The step
        cannot be used any more.
        """
        for layer, keys, values in zip(self._cache_layers()[:layers], self._caches.keys, self._caches.values):
            layer.keys, layer.values = keys[: self._batch, :, :length], values[: self._batch, :, :length]
