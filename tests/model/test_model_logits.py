"""Logits of a training step equal stock's in value and gradient, however they are read, edited and hooked."""

import copy
import io
import pickle

import models
import pytest
import torch
from models import relative
from torch import nn
from torch.nn import functional as F
from training_steps import BATCH, LABELS, accuracy, assert_same, loss_of, mask_rare

from qvl_model.modules import lm_head
from qvl_model.modules.lazy_logits import LazyLogits


@pytest.fixture
def pair():
    return tuple(model.train() for model in models.pair("small"))


# Reading


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize(
    "read", [accuracy, lambda logits: logits.float().sum(), lambda logits: torch.stack([logits]).mean()]
)
def test_read_in_any_mode_then_used_with_gradients(pair, mode, read):
    def step(model):
        out = model(**BATCH, labels=LABELS)
        with mode():
            seen = read(out.logits).detach().clone()
        (out.loss + out.logits.square().mean() + loss_of(model, out.logits)).backward()
        return seen, out.logits

    assert_same(pair, step)


def test_used_with_gradients_then_read_without(pair):
    def step(model):
        out = model(**BATCH)
        loss = out.logits.square().mean()
        with torch.no_grad():
            top = out.logits.topk(3).indices
        loss.backward()
        return top, out["logits"], out[0].argmax(-1)

    assert_same(pair, step)


def test_what_was_read_stays_readable(pair):
    """As for an accuracy printed after the optimizer step."""

    def step(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        out = model(**BATCH, labels=LABELS)
        before = accuracy(out.logits)
        out.loss.backward()
        optimizer.step()
        model(**BATCH)
        return before, accuracy(out.logits), out.logits.detach().numpy().sum().item() > 0

    assert_same(pair, step)


def test_copies(pair):
    def step(model):
        logits = model(**BATCH).logits
        file = io.BytesIO()
        torch.save({"logits": logits}, file)
        file.seek(0)
        return (
            torch.load(file)["logits"],
            pickle.loads(pickle.dumps(logits)),
            copy.deepcopy(logits.detach()),
            copy.copy(logits),
        )

    assert_same(pair, step)
    assert repr(pair[1](**BATCH).logits).startswith("tensor([[[")
    for model in pair:
        with pytest.raises(RuntimeError, match="deepcopy"):
            copy.deepcopy(model(**BATCH).logits)


# Editing


def _data(logits):
    logits.data[..., 7] += 3.0


def _out(logits):
    with torch.no_grad():
        torch.mul(logits, 0.5, out=logits)


def _foreach(logits):
    torch._foreach_mul_([logits], 2.0)


EDITS = [
    mask_rare,
    _data,
    _out,
    _foreach,
    lambda x: x.mul_(0.3),
    lambda x: F.relu(x, inplace=True),
    lambda x: x.clamp_(-1, 1),
    lambda x: F.dropout(x, 0.0, inplace=True),
]


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_edits_count(pair, edit, mode):
    def step(model):
        out = model(**BATCH, labels=LABELS)
        with mode():
            edit(out.logits)
        loss = loss_of(model, out.logits)
        (loss + out.loss).backward()
        return loss, out.loss, out.logits

    assert_same(pair, step)


HOOKS = {
    "in place": mask_rare,
    "replaced": lambda x: x * 0.5,
    "returned": lambda x: x.add_(x.detach().roll(1, -1)),
    "read": lambda x: None,
}


@pytest.mark.parametrize("edit", HOOKS.values(), ids=HOOKS.keys())
def test_hooks_on_the_head(pair, edit):
    def step(model):
        seen = []

        def hook(module, args, output):
            seen.append(output.argmax(-1))
            return edit(output)

        handle = model.lm_head.register_forward_hook(hook)
        out = model(**BATCH, labels=LABELS)
        handle.remove()
        out.loss.backward()
        return out.loss, seen, out.logits

    assert_same(pair, step)


def test_a_cast_is_not_edited_with_what_it_was_cast_from(pair):
    """In 16 bits ``.float()`` is a copy, in fp32 it is the same tensor."""

    def step(model):
        results = []
        for dtype in (torch.bfloat16, torch.float32):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
                logits = model(**BATCH).logits
            wide = logits.float()
            wide.retain_grad(), logits.retain_grad()
            loss = loss_of(model, wide)
            mask_rare(logits)
            (loss + wide.square().mean()).backward()
            results.append((loss, wide, logits, wide.grad))
        return results

    assert_same(pair, step, limit=4e-2)


# The graph


@pytest.mark.parametrize("read_first", [False, True], ids=["unread", "read"])
@pytest.mark.parametrize("extra", [False, True], ids=["loss", "loss and more"])
@pytest.mark.parametrize("count", [None, 7], ids=["mean", "sum"])
def test_gradients_of_logits(pair, read_first, extra, count):
    def total(model, out):
        return out.loss + (out.logits[:, 1].sin().sum() if extra else 0.0)

    def forward(model):
        out = model(**BATCH, labels=LABELS, num_items_in_batch=count)
        if read_first:
            out.logits.argmax(-1)
        return out

    def retained(model):
        out = forward(model)
        out.logits.retain_grad()
        total(model, out).backward()
        model.lm_head.weight.data += 1.0  # what was kept is a value
        return out.logits.grad, out.logits.retains_grad, out.logits.is_leaf, out.logits.requires_grad

    def asked(model):
        out = forward(model)
        return torch.autograd.grad(total(model, out), [out.logits, model.lm_head.weight])

    def hooked(model):
        out, seen = forward(model), []
        out.logits.register_hook(seen.append)
        out.logits.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
        total(model, out).backward()
        return seen

    def hooked_in_place(model):
        out = forward(model)
        out.logits.register_hook(lambda gradient: None if gradient.mul_(0.25) is gradient else gradient)
        total(model, out).backward()

    def accumulated(model):
        out = forward(model)
        total(model, out).backward(inputs=[out.logits])
        return out.logits.grad

    def module_hook(model):
        seen = []

        def hook(module, grad_input, grad_output):
            seen.append((grad_input[0].clone(), grad_output[0].clone()))

        handle = model.lm_head.register_full_backward_hook(hook)
        total(model, forward(model)).backward()
        handle.remove()
        return seen

    for step in (retained, asked, hooked, hooked_in_place, accumulated, module_hook):
        assert_same(pair, step)


def test_several_losses_and_backwards(pair):
    def step(model):
        out = model(**BATCH, labels=LABELS)
        again = loss_of(model, out.logits)
        out.loss.backward(retain_graph=True)
        (out.loss + 0.5 * again).backward(retain_graph=True)
        seen = out.logits.argmax(-1)  # the graph is still there, so are the logits
        out.logits.logsumexp(-1).mean().backward()
        return seen

    assert_same(pair, step)
    with pytest.raises(RuntimeError, match="second time"):
        out = pair[1](**BATCH, labels=LABELS)
        out.loss.backward()
        out.loss.backward()


def test_gradient_accumulation(pair):
    def step(model):
        losses = [model(**BATCH, labels=LABELS).loss for _ in range(2)]
        (losses[0] + 2 * losses[1]).backward()
        model(**BATCH, labels=LABELS).loss.backward()

    assert_same(pair, step)


def test_second_derivative():
    """Second derivative of the head alone; the layers below may be once differentiable."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 5, 9, generator=generator), torch.randn(12, 9, generator=generator)
    labels = torch.randint(0, 12, (2, 5), generator=generator)
    results = []
    for lazy in (False, True):
        x, lm_head = hidden.clone().requires_grad_(), _head(weight)
        logits = lm_head(x, lazy)
        assert (type(logits) is LazyLogits) == lazy
        loss = lm_head.loss(logits, labels)
        dx, dlogits = torch.autograd.grad(loss, [x, logits], create_graph=True)
        penalty = dx.square().sum() + dlogits.sin().sum() + loss
        results.append((dx, dlogits, *torch.autograd.grad(penalty, [x, lm_head.weight])))
    for expected, ours in zip(*results):
        assert relative(ours.detach(), expected.detach()) < 1e-5


def _head(weight):
    """A head alone, called as after a forward of its model."""
    linear = nn.Linear(*weight.shape[::-1], bias=False).train()
    linear.weight = nn.Parameter(weight.clone())
    forwards = lm_head.Forwards(True)

    class Head(nn.Module):
        weight = linear.weight

        def forward(self, x, lazy):
            linear.__class__ = lm_head.Linear if lazy else nn.Linear
            if lazy:
                forwards(linear, (), {})
            return linear(x)

        def loss(self, logits, labels):
            return lm_head.causal_loss(logits, labels, logits.shape[-1])

    return Head()


@pytest.mark.parametrize("weight_grad, hidden_grad", [(True, False), (False, True)], ids=["frozen body", "frozen head"])
def test_partly_frozen(pair, weight_grad, hidden_grad):
    def step(model):
        model.requires_grad_(False)
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=weight_grad)
        model.model.visual.requires_grad_(hidden_grad)
        out = model(**BATCH, labels=LABELS)
        seen = out.logits[0, 0].clone()
        other = model(**BATCH, labels=LABELS)
        (out.loss + other.loss).backward()
        if model is pair[1]:
            with pytest.raises(RuntimeError, match="skip_logits"):
                other.logits.sum()
        return seen, out.loss

    assert_same(pair, step)


@pytest.mark.parametrize(
    "way", ["checkpoint", "reentrant checkpoint", "save_on_cpu", "loss checkpoint", "chunks of the head"]
)
def test_under_other_machinery(pair, way):
    from torch.utils.checkpoint import checkpoint

    def step(model):
        if way == "save_on_cpu":
            with torch.autograd.graph.save_on_cpu():
                loss = model(**BATCH, labels=LABELS).loss
        elif way == "loss checkpoint":
            logits = model(**BATCH).logits
            loss = checkpoint(lambda x: loss_of(model, x), logits, use_reentrant=True)
        elif way == "chunks of the head":
            hidden = model.model(**BATCH).last_hidden_state
            chunks = [
                checkpoint(lambda x: model.lm_head(x).logsumexp(-1), chunk, use_reentrant=False)
                for chunk in hidden.chunk(3, 1)
            ]
            loss = torch.cat(chunks, 1).mean() + model.lm_head(hidden).square().mean()
        else:
            embeds = model.get_input_embeddings()(BATCH["input_ids"]) if way == "checkpoint" else None
            reentrant = way != "checkpoint"
            call = lambda _: model(**BATCH, labels=LABELS).loss  # noqa: E731
            loss = checkpoint(
                call, torch.zeros(1, requires_grad=True) if embeds is None else embeds, use_reentrant=reentrant
            )
        loss.backward()
        return loss

    assert_same(pair, step)


def test_autograd_functions_and_compiled_losses(pair):
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            ctx.save_for_backward(logits)
            return logits * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2 + 0 * ctx.saved_tensors[0]

    compiled = torch.compile(lambda x: x.float().logsumexp(-1).mean(), backend="eager")

    def step(model):
        logits = model(**BATCH).logits
        loss = Doubled.apply(logits).square().mean() + compiled(logits)
        loss.backward()
        return loss

    assert_same(pair, step)


class _Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        ctx.mark_dirty(logits)
        return logits.mul_(3)

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


class _Returned(_Tripled):
    @staticmethod
    def forward(ctx, logits):
        ctx.mark_dirty(logits)
        with torch.no_grad():
            logits.mul_(3)
        return logits


class _Out(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        return logits * 3

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


WAYS = {
    "at once": lambda logits, f: f(logits),
    "after it was read": lambda logits, f: (logits.sum(), f(logits))[1],
    "after an edit": lambda logits, f: (logits.mul_(0.5), f(logits))[1],
    "after an edit of a part": lambda logits, f: (logits[:, ::2].mul_(0.5), logits.sum(), f(logits))[-1],
    "after two edits": lambda logits, f: (logits.mul_(0.5), logits.clamp_(-2, 2), f(logits))[-1],
    "before an edit": lambda logits, f: f(logits).mul_(0.5),
    "twice": lambda logits, f: f(f(logits)),
    "between edits": lambda logits, f: f(f(logits.mul_(0.5)).clamp_(-4, 4)),
    "beside what was read": lambda logits, f: logits.square().detach() + f(logits),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("function", [_Tripled, _Returned, _Out])
@pytest.mark.parametrize("loss_first", [False, True])
def test_autograd_functions_that_edit(pair, function, way, loss_first):
    def step(model):
        out = model(**BATCH, labels=LABELS)
        result = WAYS[way](out.logits, function.apply)
        loss = result.square().mean()
        ((out.loss + loss) if loss_first else loss).backward()
        return loss, out.logits, result

    assert_same(pair, step)
