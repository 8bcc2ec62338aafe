"""PreparedDecoderLayer equals decoder_layer, and a model's prepared layers detect every later change."""

import models
import pytest
import torch
from models import assert_close, inputs, pair
from torch import nn

import qvl_kernels
from qvl_kernels.ops.decoder_layer.cases import CASES
from qvl_kernels.quantization import QuantizedWeight, quantize


def _prepared(arguments: dict) -> qvl_kernels.PreparedDecoderLayer:
    head_dim = arguments["k_cache"].shape[3]
    quantised = any(isinstance(weight, QuantizedWeight) for weight in arguments["weights"])
    return (qvl_kernels.QuantizedDecoderLayer if quantised else qvl_kernels.PreparedDecoderLayer)(
        arguments["weights"],
        num_heads=arguments["num_heads"],
        kv_heads=arguments["k_cache"].shape[1],
        eps=arguments.get("eps", 1e-6),
        scale=arguments.get("scale") or head_dim**-0.5,
    )


def _call(layer: qvl_kernels.PreparedDecoderLayer, arguments: dict) -> torch.Tensor:
    names = ("x", "cos", "sin", "k_cache", "v_cache")
    return layer(*(arguments[name] for name in names), past=arguments["past"], mask=arguments.get("mask"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if not case.model], ids=lambda case: case.name)
def test_equals_decoder_layer(case, dtype):
    arguments, again = (case.make(dtype, torch.Generator().manual_seed(0)) for _ in range(2))
    with torch.no_grad():
        expected = qvl_kernels.decoder_layer(**arguments)
        out = _call(_prepared(again), again)
    assert torch.equal(out, expected)
    assert torch.equal(again["k_cache"].nan_to_num(), arguments["k_cache"].nan_to_num())
    assert torch.equal(again["v_cache"].nan_to_num(), arguments["v_cache"].nan_to_num())


@pytest.mark.filterwarnings("ignore")
def test_a_trace_is_refused_and_of_a_model_holds_no_results():
    """PyTorch cannot trace the op's lists of tensors; a call past the dispatcher would bake the example's results into
    the trace.
    """
    arguments = CASES[-1].make(torch.float32, torch.Generator().manual_seed(0))
    layer = _prepared(arguments)
    with torch.no_grad(), pytest.raises(RuntimeError, match="unsupported input list"):
        torch.jit.trace(lambda x: _call(layer, arguments | {"x": x}), (arguments["x"],), check_trace=False)
    text = pair()[1].requires_grad_(False).model.language_model
    x, other = (
        torch.randn(1, 5, text.config.hidden_size, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)
    )
    tables = text.rotary_emb(x, torch.arange(5)[None, None].expand(3, 1, 5))
    with torch.no_grad():
        traced = torch.jit.trace(lambda x: text.layers[0](x, position_embeddings=tables), (x,), check_trace=False)
        assert_close(traced(other), text.layers[0](other, position_embeddings=tables))


def test_refuses_what_decoder_layer_refuses():
    arguments = CASES[-1].make(torch.float32, torch.Generator().manual_seed(0))
    layer = _prepared(arguments)
    with torch.no_grad():
        with pytest.raises(ValueError, match="do not fit a cache"):
            _call(layer, arguments | {"past": arguments["k_cache"].shape[2]})
        with pytest.raises(TypeError, match="dtype"):
            _call(layer, arguments | {"cos": arguments["cos"].half()})
        with pytest.raises(ValueError, match="contiguous"):
            _call(layer, arguments | {"x": arguments["x"].transpose(0, 1).expand(3, -1, -1).transpose(0, 1)[:, ::2]})


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("called", [False, True], ids=["before a call", "after a call"])
@pytest.mark.parametrize("change", ["replaced", "shrunk", "freed"])
@pytest.mark.parametrize("what", ["weight", "cache"])
def test_memory_that_moved_is_refused(what, change, called, quantised):
    """Handles hold addresses."""
    arguments = next(case for case in CASES if case.name == "whole_tiles").make(torch.float32, torch.Generator())
    if quantised:
        matrices = {name: quantize(getattr(arguments["weights"], name), 8) for name in ("gate", "up", "down")}
        arguments["weights"] = arguments["weights"]._replace(**matrices)
    layer = _prepared(arguments)
    cache = qvl_kernels.PreparedCache(arguments["k_cache"], arguments["v_cache"])
    inputs = {name: arguments[name][:, :1].clone() for name in ("x", "cos", "sin")}

    def run():
        with torch.no_grad():
            return qvl_kernels.PreparedDecoderLayer.run([layer], **inputs, caches=[cache], past=3)[0]

    if called:
        assert run().isfinite().all()
    x = cache.v_cache if what == "cache" else layer.weights.o
    if change == "freed":
        x.untyped_storage().resize_(0)
    else:
        x.data = x.clone() if change == "replaced" else x.new_ones(1)
    with pytest.raises((RuntimeError, ValueError), match="resized or moved|must be|must have|freed"):
        run()


def test_capacity_cannot_be_set():
    cache = qvl_kernels.PreparedCache(torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8))
    with pytest.raises(AttributeError):
        cache.capacity = 10**6


def test_weights_that_do_not_fit_are_refused():
    arguments = CASES[-1].make(torch.float32, torch.Generator().manual_seed(0))
    weights = arguments["weights"]._replace(down=arguments["weights"].down[:, 1:])
    with pytest.raises(ValueError, match="down must have shape"):
        _prepared(arguments | {"weights": weights})


def _replace_data(model):
    model.model.language_model.layers[1].self_attn.v_proj.weight.data = (
        model.model.language_model.layers[1].self_attn.v_proj.weight.data * 1.5
    )


def _replace_parameter(model):
    linear = model.model.language_model.layers[0].mlp.down_proj
    linear.weight = nn.Parameter(linear.weight.detach() * 0.5)


def _edit_in_place(model):
    with torch.no_grad():
        model.model.language_model.layers[2].post_attention_layernorm.weight.mul_(1.25)


def _hook(model):
    model.model.language_model.layers[1].mlp.up_proj.register_forward_hook(lambda module, args, out: out * 2)


def _forward_of_an_instance(model):
    mlp = model.model.language_model.layers[1].mlp
    mlp.forward = lambda x: x * 3


def _swap_module(model):
    layers = model.model.language_model.layers
    layers[0].mlp.gate_proj = nn.Linear(
        layers[0].mlp.gate_proj.in_features, layers[0].mlp.gate_proj.out_features, bias=True
    )
    nn.init.constant_(layers[0].mlp.gate_proj.weight, 0.01)
    nn.init.constant_(layers[0].mlp.gate_proj.bias, 0.5)


def _eager(model):
    model.set_attn_implementation("eager")


def _other_eps(model):
    model.model.language_model.layers[1].self_attn.k_norm.variance_epsilon = 0.1


def _other_scale(model):
    model.model.language_model.layers[2].self_attn.scaling = 0.01


def _double_and_back(model):
    model.half()
    model.float()


@pytest.mark.parametrize(
    "change",
    [
        _replace_data,
        _replace_parameter,
        _edit_in_place,
        _hook,
        _forward_of_an_instance,
        _swap_module,
        _eager,
        _other_eps,
        _other_scale,
        _double_and_back,
    ],
    ids=lambda change: change.__name__.strip("_"),
)
def test_changes_after_a_first_call_count(change):
    stock, ours = pair("odd")
    batch = inputs([5], [3])
    with torch.no_grad():
        before = ours(**batch).logits
        change(stock), change(ours)
        expected, out = stock(**batch).logits, ours(**batch).logits
    assert_close(out, expected)
    if change not in (_eager, _double_and_back):
        assert models.relative(out, before) > 1e-3
