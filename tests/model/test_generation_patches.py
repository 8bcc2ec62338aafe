"""What users replace for all models, also with ``functools.wraps``, and what their code changes at the first token,
counts as in stock, by the CPU's and the GPU's step.
"""

import functools
import subprocess
import sys

import pytest
import torch
from generation_runs import GREEDY, logits_of, same_logits
from gpu_steps import offer
from models import assert_close, inputs, pair
from torch import nn
from transformers import DynamicCache, GenerationMixin, LogitsProcessor, RepetitionPenaltyLogitsProcessor
from transformers.cache_utils import DynamicLayer
from transformers.generation.stopping_criteria import EosTokenCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock_module
from triton.runtime.errors import OutOfResources

from qvl_model.compat import CACHE
from qvl_model.generation import loop, step_gpu


@pytest.fixture(params=["CPU step", "GPU step"])
def step(request, monkeypatch):
    if request.param == "GPU step":
        offer(monkeypatch)


def _halved(own):
    return lambda *args, **kwargs: own(*args, **kwargs) * 0.5


def _reversed_angles(own):
    def forward(*args, **kwargs):
        cos, sin = own(*args, **kwargs)
        return cos.flip(-1), sin

    return forward


def _scaled_logits(own):
    def forward(*args, **kwargs):
        out = own(*args, **kwargs)
        out.logits = out.logits * torch.linspace(-1, 1, out.logits.shape[-1])
        return out

    return forward


def _reversed_hidden(own):
    def forward(*args, **kwargs):
        out = own(*args, **kwargs)
        out.last_hidden_state = out.last_hidden_state.flip(-1)
        return out

    return forward


def _masked_prompt(own):
    def prepare(*args, **kwargs):
        out = own(*args, **kwargs)
        if out.get("attention_mask") is not None:
            out["attention_mask"] = out["attention_mask"].clone()
            out["attention_mask"][:, 1:3] = 0
        return out

    return prepare


def _shifted_positions(own):
    def update(*args, **kwargs):
        out = own(*args, **kwargs)
        if out.get("position_ids") is not None:
            out["position_ids"] = out["position_ids"] + 3
        return out

    return update


MODEL = stock_module.Qwen3VLForConditionalGeneration
PATCHES = {  # owner, name, what makes the replacement
    "logits": (MODEL, "forward", _scaled_logits),
    "hidden states": (stock_module.Qwen3VLModel, "forward", _reversed_hidden),
    "rotary embedding": (stock_module.Qwen3VLTextRotaryEmbedding, "forward", _reversed_angles),
    "linear layers": (nn.Linear, "forward", _halved),
    "embeddings": (nn.Embedding, "forward", _halved),
    "inputs of a token": (MODEL, "prepare_inputs_for_generation", _masked_prompt),
    "arguments of a token": (MODEL, "_update_model_kwargs_for_generation", _shifted_positions),
}


@pytest.mark.parametrize("name", PATCHES)
def test_wrapped_patches_count(name, step, monkeypatch):
    """``functools.wraps`` makes a user's function look like the one that it replaces."""
    models, batch = pair("odd"), inputs([9], [4])
    before = same_logits(models, batch)
    owner, attribute, replacement = PATCHES[name]
    own = getattr(owner, attribute)
    monkeypatch.setattr(owner, attribute, functools.wraps(own)(replacement(own)))
    assert not torch.allclose(same_logits(models, batch), before, atol=1e-3)


def test_a_wrapped_mask_function_counts(step, monkeypatch):
    models = pair("odd")
    own = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

    @functools.wraps(own)
    def masked(*args, **kwargs):
        mask = own(*args, **{**kwargs, "allow_is_causal_skip": False})
        return mask & (torch.arange(mask.shape[-1]) != 2)

    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS, "sdpa", masked)
    same_logits(models)


BEFORE_THE_IMPORT = """
    import functools
    from transformers.models.qwen3_vl import modeling_qwen3_vl as stock
    own = stock.Qwen3VLTextMLP.forward
    stock.Qwen3VLTextMLP.forward = functools.wraps(own)(lambda self, x: own(self, x) / 2)
    import qvl_model
    from qvl_model.modules import fast_path
    print(fast_path.stock_is_patched())
"""


def test_a_wrapped_patch_before_the_import_counts():
    program = "\n".join(line.strip() for line in BEFORE_THE_IMPORT.splitlines())
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_a_loop_on_transformers_class(step, monkeypatch):
    """As decoding methods install themselves: ours makes way for it."""

    def sample(self, input_ids, *args, **kwargs):
        for _ in range(5):
            logits = self(input_ids=input_ids).logits[:, -1]
            input_ids = torch.cat([input_ids, logits.argmin(-1, keepdim=True)], 1)
        return input_ids

    models = pair("small")
    monkeypatch.setattr(GenerationMixin, "_sample", sample)
    expected, found = (model.generate(**inputs([9]), **GREEDY) for model in models)
    assert expected.shape[1] == 14 and found.equal(expected)


class _AtTheFirstToken(BaseStreamer, LogitsProcessor):
    """Changes the model when the first new token is chosen, as a processor, or shown, as a streamer."""

    def __init__(self, change):
        self.change, self.count = change, 0

    def put(self, value):
        self.count += 1
        if self.count == 2:
            self.change()

    def end(self):
        pass

    def __call__(self, ids, scores):
        self.put(None)
        return scores


CHANGES = {
    "a hook": lambda layer, body: layer.mlp.down_proj.register_forward_hook(lambda module, args, out: out * 2),
    "an epsilon that is a tensor": lambda layer, body: setattr(
        layer.input_layernorm, "variance_epsilon", torch.tensor(0.5)
    ),
    "a norm that is the identity": lambda layer, body: setattr(body, "norm", nn.Identity()),
    "another MLP": lambda layer, body: setattr(layer, "mlp", nn.Tanh()),
}


@pytest.mark.parametrize("role", ["streamer", "logits_processor"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_at_the_first_token(name, role, step):
    outs = []
    for model in pair("odd"):
        body = model.model.language_model
        part = _AtTheFirstToken(lambda body=body: CHANGES[name](body.layers[1], body))
        part.count = int(role == "logits_processor")  # streamers are shown the prompt first
        outs.append(logits_of(model, **{role: part if role == "streamer" else [part]}))
        assert part.count > 1
    assert_close(outs[1], outs[0])


def test_patched_processors_and_criteria(step, monkeypatch):
    penalty, ends = RepetitionPenaltyLogitsProcessor.__call__, EosTokenCriteria.__call__
    monkeypatch.setattr(
        RepetitionPenaltyLogitsProcessor, "__call__", lambda self, ids, scores: penalty(self, ids[:, 9:], scores)
    )
    monkeypatch.setattr(
        EosTokenCriteria,
        "__call__",
        lambda self, ids, scores, **kw: ends(self, ids, scores, **kw) & (ids.shape[1] > 13),
    )
    options = {**GREEDY, "repetition_penalty": 1.7, "eos_token_id": list(range(160)), "pad_token_id": 0}
    expected, found = (model.generate(**inputs([9]), **options) for model in pair("odd"))
    assert expected.shape[1] == 14 and found.equal(expected)


def test_positions_between_integers(step):
    positions = (torch.arange(9).float() / 2).expand(3, 2, -1) + 5.3
    same_logits(pair("odd"), inputs([9], [4]), position_ids=positions)


class _HalfKeys(DynamicLayer):
    def update(self, key_states, *args, **kwargs):
        return super().update(key_states * 0.5, *args, **kwargs)


def test_layers_that_a_cache_makes(step):
    """Their class is not known before the prompt has run."""
    outs = []
    for model in pair("odd"):
        cache = DynamicCache()
        cache.layer_class_to_replicate = _HalfKeys
        outs.append(logits_of(model, **{CACHE: cache}))
    assert_close(outs[1], outs[0])


def test_a_streamer_that_holds_itself(step):
    part = _AtTheFirstToken(lambda: None)
    part.owner = part
    same_logits(pair("small"), streamer=part)
    penalty = RepetitionPenaltyLogitsProcessor(1.5)
    penalty.owner = penalty
    assert not loop._is_foreign(penalty)


def test_a_kernel_that_cannot_be_compiled(monkeypatch):
    """The decode step of a GPU then makes way for stock code, and the size is remembered."""
    offer(monkeypatch)
    captured = type(step_gpu.graphs.of(torch.device("cpu"))).captured

    def run_once(self, function, pool=None):
        function()
        return captured(self, function, pool)

    def broken(*args, **kwargs):
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(step_gpu.graphs.Device, "captured", run_once)
    monkeypatch.setattr(step_gpu, "decode_step", broken)
    stock, ours = pair("small")
    with pytest.warns(RuntimeWarning, match="goes on without CUDA graphs: .*out of resource"):
        found = ours.generate(**inputs([5]), **GREEDY)
    assert found.equal(stock.generate(**inputs([5]), **GREEDY))
    assert step_gpu.why_failed(ours, 1, 8) is not None
