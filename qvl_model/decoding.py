"""Decoding on a GPU: every token is two CUDA graphs, the model's step over a static key/value cache and the choice of the next token.

``generate`` stays transformers' own: it prepares the inputs and calls ``_sample``, where the first token comes from stock
code and the rest from here. Whatever is not plain greedy or sampling decoding stays with stock code altogether.
"""

import copy
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor
from transformers.generation.stopping_criteria import MaxLengthCriteria, StoppingCriteriaList
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock

from qvl_kernels import dispatch, gpu, tuning
from qvl_kernels.ops.decoder_layer.decode_step import decode_step
from qvl_kernels.ops.decoder_layer.growing_caches import GrowingCaches
from qvl_model.compat import CACHE
from qvl_model.modules import head, text
from qvl_model.modules.decoder_layer import plan_of
from qvl_model.modules.packed import PackedLinear
from qvl_model.modules.plain import is_plain, no_global_hooks
from qvl_model.sampling import Sampler, unsupported_criterion, unsupported_processor

__all__ = ["MODES", "Step", "decode", "graphs_possible", "why_never", "why_not"]

MODES = "greedy and sampling (temperature, top-k, top-p, min-p, repetition penalty, minimum length)"
KEPT_STEPS = 2  # static caches kept per model, those used last
STOP_CHECK = 8  # tokens between two looks at whether all rows have ended
SMALLEST_CAPACITY = 512  # of a static cache; larger ones are multiples of half of it, or of an eighth of the power of two above


class Step:
    """One decoding step of a model for ``rows`` rows: buffers, and the graph over them.

    ``begin`` of a new step allocates keys and values layer by layer, so that a cache which gives its own back is never there twice, and
    captures the graph.
    """

    def __init__(self, model: nn.Module, rows: int, capacity: int) -> None:
        self.model, self.rows, self.capacity = weakref.ref(model), rows, capacity
        language_model, lm_head = model.model.language_model, model.lm_head
        self.layers = [plan_of(layer).prepared for layer in language_model.layers]
        device, dtype = language_model.norm.weight.device, language_model.norm.weight.dtype
        with _ordinary_tensors():
            self.tokens = torch.zeros(rows, 1, dtype=torch.long, device=device)
            self.positions = torch.zeros(3, rows, 1, dtype=torch.long, device=device)
            self.lengths = torch.zeros(rows, dtype=torch.int32, device=device)  # keys in the cache
            self.logits = torch.zeros(rows, lm_head.out_features, dtype=dtype, device=device)
        first = self.layers[0]
        self.caches = GrowingCaches(len(self.layers), rows, first.kv_heads, first.head_dim, dtype, device)
        self.samplers: dict[tuple, tuple[Sampler, Callable[[], None]]] = {}
        self.replay: Callable[[], None] | None = None
        self.pointers = self._pointers()

    def _run(self) -> None:
        model = self.model()
        language_model = model.model.language_model
        hidden = language_model.embed_tokens(self.tokens)
        cos, sin = language_model.rotary_emb(hidden, self.positions)
        filled = self.lengths + 1
        with tuning.decoding():
            for index, layer in enumerate(self.layers):
                hidden = decode_step(hidden, layer, cos, sin, self.caches, index, self.lengths, filled)
        self.logits.copy_(model.lm_head(language_model.norm(hidden))[:, 0])
        self.lengths.add_(1)
        self.positions.add_(1)

    def sampler(self, processors, criteria, *, do_sample: bool, pad: int) -> tuple[Sampler, Callable[[], None]]:
        key = Sampler.key(processors, criteria, do_sample=do_sample, pad=pad)
        if key not in self.samplers:
            device, vocabulary = self.logits.device, self.logits.shape[1]
            with _ordinary_tensors():
                sampler = Sampler(
                    processors, criteria, do_sample=do_sample, pad=pad, rows=self.rows, vocabulary=vocabulary, capacity=self.capacity, device=device
                )
            self.samplers[key] = sampler, _captured(lambda: sampler.step(self.logits, self.tokens), device)
        return self.samplers[key]

    def holds(self) -> bool:
        """Whether the model's layers are still those that were captured."""
        model = self.model()
        plans = [plan_of(layer) for layer in model.model.language_model.layers]
        return (
            [None if plan is None else plan.prepared for plan in plans] == self.layers
            and model.lm_head.out_features == self.logits.shape[1]
            and self._pointers() == self.pointers
        )

    def _pointers(self) -> tuple[int, ...]:
        model = self.model()
        language_model = model.model.language_model
        modules = (language_model.embed_tokens, language_model.norm, model.lm_head)
        return tuple(x.data_ptr() for module in modules for x in (*module.parameters(), *module.buffers()))

    def prepare(self) -> None:
        """Memory and graph, without anything to go on from."""
        self.caches.reserve(self.capacity)
        if self.replay is None:
            self.replay = _captured(self._run, self.tokens.device)

    def begin(self, cache: DynamicCache, positions: Tensor, visible: Tensor | None, *, release: bool = False) -> None:
        """Takes over the keys and values of ``cache`` [B rows of length L] and the positions [3, B] of the next token. ``release``: the
        cache is empty afterwards."""
        batch, length = positions.shape[1], cache.get_seq_length()
        for index, layer in enumerate(cache.layers[: len(self.layers)]):
            self.caches.take(index, layer.keys, layer.values, length=self.capacity)
            if release:
                cache.layers[index] = layer = DynamicLayer()
        self._set(batch, length, positions, visible)
        if self.replay is None:
            self.prepare()
            self._set(batch, length, positions, visible)  # the runs before the capture went on; what they wrote is written again

    def _set(self, batch: int, length: int, positions: Tensor, visible: Tensor | None) -> None:
        self.lengths.zero_()
        self.lengths[:batch] = length
        self.positions.zero_()
        self.positions[:, :batch, 0] = positions
        self.caches.show(None if visible is None else visible[:, :length])

    def end(self, cache: DynamicCache, batch: int, length: int) -> None:
        """Gives the first ``length`` keys and values back to ``cache``."""
        for index, layer in enumerate(cache.layers[: len(self.layers)]):
            layer.keys, layer.values = self.caches.give(index, batch, length)


def _ordinary_tensors() -> torch.inference_mode:
    """Inside, new tensors are none of inference mode's: a step that was made there serves calls outside of it, too."""
    return torch.inference_mode(False)


def _captured(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """``function`` as a CUDA graph over the buffers that it uses; elsewhere itself."""
    if device.type != "cuda":
        return function
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(2):  # compiles kernels and fills cuBLAS workspaces, which a capture may not do
            function()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


_steps: "weakref.WeakKeyDictionary[nn.Module, OrderedDict[tuple[int, int], Step]]" = weakref.WeakKeyDictionary()
_failed: "weakref.WeakKeyDictionary[nn.Module, str]" = weakref.WeakKeyDictionary()


def _step(model: nn.Module, batch: int, length: int) -> Step:
    """One that is there and has room for ``length`` tokens, at most twice as much as needed, or a new one."""
    rows = 1 << (batch - 1).bit_length()
    grain = max(SMALLEST_CAPACITY // 2, (1 << (length - 1).bit_length()) // 8)
    needed = max(SMALLEST_CAPACITY, -(-length // grain) * grain)
    steps = _steps.setdefault(model, OrderedDict())
    for key in [key for key, step in steps.items() if not step.holds()]:
        del steps[key]
    fitting = [key for key in steps if key[0] == rows and needed <= key[1] <= 2 * needed]
    key = min(fitting, default=(rows, needed))
    if key not in steps:
        while len(steps) >= KEPT_STEPS:
            steps.popitem(last=False)
        steps[key] = Step(model, *key)
    steps.move_to_end(key)
    return steps[key]


def _begun(model: nn.Module, length: int, cache: DynamicCache, positions: Tensor, visible: Tensor | None, release: bool, sampling: tuple, settings: dict):
    """(step, sampler, choose), or None after one warning where memory or the driver do not allow it; nothing is kept then."""
    try:
        step = _step(model, positions.shape[1], length)
        step.begin(cache, positions, visible, release=release)
        return step, *step.sampler(*sampling, **settings)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        reason = str(error)
    step = None
    # Out here the error, whose traceback holds the buffers, is gone: the slower path may need their memory.
    _steps.pop(model, None)
    _failed[model] = f"capturing a CUDA graph failed: {reason}"
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    warnings.warn(f"qvl_model: decoding goes on without CUDA graphs: {reason}", RuntimeWarning, stacklevel=4)
    return None


def graphs_possible(device: torch.device) -> str | None:
    """Why tokens on ``device`` cannot be decoded by captured steps, or None."""
    if device.type == "cuda":
        return gpu.unavailable()
    if device.type == "cpu" and dispatch.forced() == "triton":  # the interpreter: tests
        return gpu.unavailable()
    return f"tensors on {device.type} have no CUDA graphs"


def why_never(model: nn.Module, device: torch.device) -> str | None:
    """Why no call for tokens on ``device`` is decoded by captured steps, or None."""
    if not isinstance(model, stock.Qwen3VLForConditionalGeneration):
        return f"{type(model).__name__} decodes by transformers' own loop"
    return graphs_possible(device) or _failed.get(model)


def why_not(model: nn.Module, input_ids: Tensor, processors, criteria, config, options: dict) -> str | None:
    """Why this call of ``_sample`` stays with stock code, or None. ``options``: its keyword arguments, model inputs included."""
    reason = why_never(model, input_ids.device)
    if reason is not None:
        return reason
    if sum(type(processor) is RepetitionPenaltyLogitsProcessor for processor in processors) > 1:
        return "several repetition penalties"
    for judged in (*map(unsupported_processor, processors), *map(unsupported_criterion, criteria)):
        if judged is not None:
            return judged
    if any(getattr(config, name, None) for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states")):
        return "scores, attentions or hidden states were asked for"
    if options.get("synced_gpus") or torch.is_grad_enabled() or input_ids.numel() == 0:
        return "several GPUs step together, or gradients are on"
    cache, mask = options.get(CACHE), options.get("attention_mask")
    if not options.get("use_cache") or type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return f"the cache is a {type(cache).__name__}"
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return "a cache layer is not a DynamicLayer"
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        return "the attention mask is not [B, L]"
    language_model = model.model.language_model
    plain = (model, model.model, language_model, language_model.embed_tokens, language_model.norm, language_model.rotary_emb, model.lm_head)
    if any(not is_plain(module, type(module), head.Forwards) for module in plain) or not no_global_hooks():
        return "hooks, which a graph would not call"
    if type(model.lm_head) not in (head.Linear, PackedLinear) or type(language_model.norm) is not text.Qwen3VLTextRMSNorm:
        return "the head or the last norm is not plain"
    if any(plan_of(layer) is None for layer in language_model.layers):
        return "a decoder layer is not plain"
    return None


class _Silent:
    """A streamer's ``put`` without its ``end``: the first token is streamed by stock code, which must not close it."""

    def __init__(self, streamer) -> None:
        self.put = streamer.put

    def end(self) -> None:
        pass


class _Later:
    """A streamer that has had the first token already."""

    def __init__(self, streamer) -> None:
        self._streamer, self._first, self.end = streamer, True, streamer.end

    def put(self, value: Tensor) -> None:
        if not self._first:
            self._streamer.put(value)
        self._first = False


def decode(model: nn.Module, first_token: Callable, input_ids: Tensor, processors, criteria, config, *, streamer=None, **options):
    """``_sample`` of a call that ``why_not`` has nothing against. ``first_token`` is the stock ``_sample``."""
    batch, prompt = input_ids.shape
    max_length = min(criterion.max_length for criterion in criteria if type(criterion) is MaxLengthCriteria)
    pad = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)
    settings = {"do_sample": bool(config.do_sample), "pad": pad}
    stock_call = {"streamer": streamer, **options}
    if max_length - prompt <= 1:
        return first_token(input_ids, processors, criteria, config, **stock_call)
    cache, mask = options[CACHE], options.get("attention_mask")
    returned = config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
    past, generator = cache.get_seq_length(), _generator_state(input_ids.device) if config.do_sample else None
    sequences, positions = _first_token(model, first_token, input_ids, processors, criteria, config, stock_call)
    hidden = mask is not None and not bool(mask.all())
    begun = _begun(model, max_length, cache, positions, mask.bool() if hidden else None, not returned, (processors, criteria), settings)
    if begun is None:
        if returned:
            cache.crop(past - cache.get_seq_length())
        else:  # it may have given some of its keys and values back
            cache.layers[:] = DynamicCache(config=model.config.get_text_config()).layers
        if generator is not None:  # the same first token again
            _set_generator_state(generator, input_ids.device)
        return first_token(input_ids, processors, criteria, config, **stock_call | {"streamer": None if streamer is None else _Later(streamer)})
    step, sampler, choose = begun
    step.tokens.zero_()
    step.tokens[:batch] = sequences[:, -1:]
    sampler.begin(sequences, processors)
    steps = 0
    while prompt + 1 + steps < max_length:
        if (streamer is not None or steps % STOP_CHECK == 0) and bool(sampler.finished.all()):
            break
        step.replay()
        choose()
        steps += 1
        if streamer is not None:
            streamer.put(sampler.produced[:batch, steps - 1].cpu())
    produced = sampler.produced[:batch, :steps]
    steps = _used(produced, sequences[:, -1], sampler._ends)
    sequences = torch.cat((sequences, produced[:, :steps]), 1)
    if streamer is not None:
        streamer.end()
    if returned:
        step.end(cache, batch, prompt + steps)
    if config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=sequences, **{CACHE: cache})
    return sequences


def _generator_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_generator_state(state: Tensor, device: torch.device) -> None:
    torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)


def _used(produced: Tensor, first: Tensor, ends: Tensor | None) -> int:
    """How many of the produced tokens there are until every row has ended."""
    if ends is None:
        return produced.shape[1]
    ended = torch.isin(torch.cat((first[:, None], produced), 1), ends).cumsum(1) > 0
    running = int((~ended.all(0)).sum())  # columns after which some row goes on
    return min(running, produced.shape[1])


def _first_token(model, first_token, input_ids, processors, criteria, config, stock_call) -> tuple[Tensor, Tensor]:
    """The sequences with one more token, by stock code, and the rotary positions [3, B] of that token."""
    seen: list[Tensor] = []
    rotary = model.model.language_model.rotary_emb
    handle = rotary.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[1] if len(args) > 1 else kwargs["position_ids"]), with_kwargs=True)
    one = StoppingCriteriaList([MaxLengthCriteria(input_ids.shape[1] + 1)])
    one += [criterion for criterion in criteria if type(criterion) is not MaxLengthCriteria]
    config = copy.copy(config)
    config.return_dict_in_generate = False
    streamer = stock_call["streamer"]
    try:
        sequences = first_token(input_ids, processors, one, config, **stock_call | {"streamer": None if streamer is None else _Silent(streamer)})
    finally:
        handle.remove()
    positions = seen[0]
    positions = positions[None].expand(3, -1, -1) if positions.dim() == 2 else positions
    mask = stock_call.get("attention_mask")
    if mask is not None:  # whatever stands at padding does not count
        positions = positions.masked_fill(~mask.bool()[None, :, -positions.shape[2] :], -1)
    # Text goes on after the largest position of any axis (M-RoPE, arXiv:2409.12191).
    return sequences, (positions.amax((0, 2)) + 1).expand(3, -1)
