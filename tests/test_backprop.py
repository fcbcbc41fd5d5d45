"""The analytic backward against autograd in float64: each layer alone, then whole models, and training with it."""

import math
import weakref

import pytest
import torch
import torch.nn as nn
from torch.nn import functional as F

import backprop
import loss as loss_module
from backprop import (
    attention_backward,
    block_backward,
    block_forward,
    cross_entropy,
    embedding_backward,
    gelu_backward,
    linear_backward,
    loss_and_gradients,
    norm_backward,
    rope_backward,
)
from model import Block, GPTConfig
from rope import rope_table, rotate
from sus_attn import SAMPLERS, fold_in, sus_attention, sus_attention_and_backward
from sus_backends import reference
from test_model import GPT2_LIKE, LONG, tiny, tokens
from training.lora import LoRALinear, add_adapters


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(got, want, tolerance=1e-10):
    """Within tolerance of the largest element; the same shape and dtype."""
    assert got.shape == want.shape and got.dtype == want.dtype
    assert (got - want).abs().max() <= tolerance * want.abs().max()


def randomize(module, seed=0):
    """Fresh biases and norms are zeros and ones, and LoRA's B zero: make every weight count."""
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)
    return module


def check_layer(layer, x, backward, forward=None):
    """dx and the gradients of layer's parameters, twice (they add up), of backward(x, dy) against autograd's."""
    x = x.requires_grad_()
    y = (forward or layer)(x)
    dy = randn(*y.shape, seed=9)
    parameters = [p for p in layer.parameters() if p.requires_grad] if layer else []
    want_x, *want = torch.autograd.grad(y, [x, *parameters], dy)
    with torch.no_grad():
        for _ in range(2):
            close(backward(x.detach(), dy), want_x)
    for p, gradient in zip(parameters, want, strict=True):
        close(p.grad, 2 * gradient)
    assert layer is None or all(p.grad is None for p in layer.parameters() if not p.requires_grad)


# -- layers ----------------------------------------------------------------------------------------

SHAPES = [(2, 7, 12), (1, 1, 12), (3, 5, 12)]
NORMS = {
    "layernorm": lambda: nn.LayerNorm(12),
    "layernorm without bias": lambda: nn.LayerNorm(12, bias=False),
    "rmsnorm": lambda: nn.RMSNorm(12, eps=1e-5),
    "identity": nn.Identity,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(shape, bias):
    layer = randomize(nn.Linear(12, 5, bias=bias).double())
    check_layer(layer, randn(*shape), lambda x, dy: linear_backward(layer, x, dy))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("trained", ["lora", "lora_a", "lora_b", "all"])
def test_lora(shape, trained):
    layer = randomize(LoRALinear(nn.Linear(12, 5), 3, 7.0).double())
    for name, p in layer.named_parameters():
        p.requires_grad_(trained == "all" or name.startswith(trained))
    check_layer(layer, randn(*shape), lambda x, dy: linear_backward(layer, x, dy))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", NORMS)
def test_norms(shape, kind):
    layer = randomize(NORMS[kind]().double())
    x = 0.01 * randn(*shape)  # so small that eps counts
    check_layer(layer, x, lambda x, dy: norm_backward(layer, x, dy))


def test_gelu():
    x = torch.cat([randn(200), torch.linspace(-30, 30, 61, dtype=torch.float64)])
    check_layer(None, x, gelu_backward, nn.GELU(approximate="tanh"))


@pytest.mark.parametrize("T, D", [(9, 8), (1, 2)])
def test_rope(T, D):
    table = rope_table(D, T, rope_theta=100.0).double()
    check_layer(None, randn(2, 3, T, D), lambda x, dy: rope_backward(dy, table), lambda x: rotate(x, table))


def test_embedding():
    layer, index, dy = nn.Embedding(11, 4).double(), tokens(T=9, V=11), randn(2, 9, 4)
    (want,) = torch.autograd.grad(layer(index), layer.weight, dy)
    with torch.no_grad():
        embedding_backward(layer, index, dy)
        embedding_backward(layer, index, dy)
    close(layer.weight.grad, 2 * want)


ATTENTION = [(2, 4, 4, 37, 8), (1, 4, 2, 20, 6), (3, 3, 1, 1, 4), (1, 2, 2, 130, 4)]


@pytest.mark.parametrize("block_rows", [1, 7, 1000])
@pytest.mark.parametrize("B, H, K, T, D", ATTENTION)
def test_attention(monkeypatch, B, H, K, T, D, block_rows):
    monkeypatch.setattr(backprop, "BLOCK_ROWS", block_rows)
    q, k, v, do = randn(B, H, T, D), randn(B, K, T, D, seed=1), randn(B, K, T, D, seed=2), randn(B, H, T, D, seed=3)
    out = F.scaled_dot_product_attention(*(x.requires_grad_() for x in (q, k, v)), is_causal=True, enable_gqa=True)
    want = torch.autograd.grad(out, (q, k, v), do)
    with torch.no_grad():
        for a, b in zip(attention_backward(q, k, v, do), want):
            close(a, b) if T > 1 else torch.testing.assert_close(a, b, rtol=0, atol=1e-12)  # of one key dq, dk are 0


def test_attention_holds_nothing_of_size_T_squared(monkeypatch):
    class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.numel = max(self.numel, out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    T, D, rows = 256, 4, 8
    monkeypatch.setattr(backprop, "BLOCK_ROWS", rows)
    q, k, v, do = (randn(1, 2, T, D, seed=seed) for seed in range(4))
    with LargestTensor() as largest:
        attention_backward(q, k, v, do)
    assert largest.numel == 2 * rows * T


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("B, T", [(2, 25), (1, 1)])
def test_cross_entropy_with_targets_to_ignore(monkeypatch, B, T, chunk):
    monkeypatch.setattr(loss_module, "LOSS_CHUNK", chunk * 61)
    head = randomize(nn.Linear(8, 61, bias=False).double())
    targets = tokens(B, T)
    targets[0, 3:9] = -1

    def forward(x):
        losses = loss_module.chunked_cross_entropy(x, head.weight, targets)
        return losses.sum() / (targets != -1).sum()

    x = randn(B, T, 8)
    with torch.no_grad():
        assert torch.equal(cross_entropy(head, x, targets)[0], forward(x))
    head.weight.grad = None
    check_layer(head, x, lambda x, dy: cross_entropy(head, x, targets, dy)[1], forward)


# -- SUS: the operator against the closed form with a dense W~ ------------------------------------------


def multipliers(q, k, v, do, c, sampler, seed):
    """M (B, H, T, T) as the reference draws it; what its thinning knows is made here, from its definitions."""
    B, H, T, D = q.shape
    k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    W = (q @ k.mT / math.sqrt(D)).masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
    dW = do @ v.mT
    score_gradient = (dW - (dW * W).sum(-1, keepdim=True)) / math.sqrt(D)
    distance = torch.cdist(W @ v, v, compute_mode="donot_use_mm_for_euclid_dist").square()
    square = do.square().sum(-1, keepdim=True) + score_gradient.square() * (
        k.square().sum(-1)[:, :, None] + q.square().sum(-1, keepdim=True)
    )
    norm = do.norm(dim=-1, keepdim=True)
    row_weight = (norm / norm.mean(2, keepdim=True)).clamp(*reference.ROW_WEIGHTS)
    draw = reference.sus_multiplier(torch.tensor(c), c, sampler, seed, None, T)
    m, dropped = draw(W, range(T), reference.Known(row_weight, lambda: square, lambda: distance))
    assert dropped == 0
    return m


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("B, H, K, T, D", [(2, 4, 2, 150, 8), (1, 1, 1, 1, 4), (1, 2, 2, 67, 6)])
def test_sus_is_the_closed_form_with_a_sparse_W(sampler, B, H, K, T, D):
    q, k, v, do = 2 * randn(B, H, T, D), randn(B, K, T, D, seed=1), randn(B, K, T, D, seed=2), randn(B, H, T, D, seed=3)
    c, seed = 0.8 if sampler == "tiles" else 3.0, torch.tensor(5)
    m = multipliers(q, k, v, do, c, sampler, seed)
    kept = (m != 0).double().sum() / (B * H * T * (T + 1) / 2)
    assert T == 1 or kept < 0.9
    out = sus_attention(*(x.requires_grad_() for x in (q, k, v)), c, seed=seed, sampler=sampler, backend="reference")
    want = torch.autograd.grad(out, (q, k, v), do)
    with torch.no_grad():
        got = attention_backward(q, k, v, do, m)
    for a, b in zip(got, want):
        close(a, b) if T > 1 else torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampler, backend", [("tiles", "auto"), ("weighted", "reference")])
def test_sus_without_autograd_has_the_same_bits(sampler, backend):
    q, k, v, do = (randn(2, 4, 150, 16, seed=seed).float() for seed in range(4))
    stats = torch.zeros(2, 3)
    keys = dict(seed=7, sampler=sampler, backend=backend)
    out = sus_attention(*(x.requires_grad_() for x in (q, k, v)), 1.5, stats=stats[0], **keys)
    want = torch.autograd.grad(out, (q, k, v), do)
    got_out, backward = sus_attention_and_backward(q, k, v, 1.5, stats=stats[1], **keys)
    assert torch.equal(got_out, out) and not got_out.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(backward(do), want, strict=True))
    assert torch.equal(stats[0], stats[1]) and stats[0, 0] > 0


# -- the whole model -----------------------------------------------------------------------------------

ARCHITECTURES = {
    "gpt2": GPT2_LIKE,
    "gpt2-no-bias": {**GPT2_LIKE, "bias": False},
    "rope": dict(pos="rope", bias=True),
    "rmsnorm": dict(norm="rmsnorm", bias=False),
    "gqa": dict(n_kv_head=1, bias=True),
    "qk-norm": dict(qk_norm=True, bias=False),
    "all": LONG,
}
BACKWARDS = {
    "exact": {},
    "sus": dict(attn_backward="sus", sus_c=0.4, sus_backend="reference"),
    "poisson": dict(attn_backward="sus", sus_c=3.0, sus_sampler="poisson", sus_backend="reference"),
    "recomputed": dict(activation_checkpointing=True),
    "sus-recomputed": dict(attn_backward="sus", sus_c=0.4, sus_backend="reference", activation_checkpointing=True),
}


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def both(model, x, y, seed=3, scale=1.0):
    """(loss, gradients) by autograd, and by hand."""
    sus_seed = torch.tensor(seed)
    _, loss = model(x, y, sus_seed=sus_seed)
    (scale * loss).backward()
    want = loss.detach(), gradients(model)
    loss = loss_and_gradients(model, x, y, sus_seed=sus_seed, scale=scale)
    assert not loss.requires_grad
    return want, (loss, gradients(model))


def check_model(model, x, y, tolerance=1e-10, **keys):
    """The loss bit for bit; each parameter's gradient within tolerance of its largest element."""
    (loss, want), (got_loss, got) = both(model, x, y, **keys)
    assert torch.equal(got_loss, loss)
    assert any(gradient is not None for gradient in want.values())
    for name, gradient in want.items():
        assert (gradient is None) == (got[name] is None), name
        if gradient is not None:
            assert got[name].dtype == gradient.dtype
            assert (got[name] - gradient).abs().max() <= tolerance * gradient.abs().max(), name


@pytest.fixture
def small_blocks(monkeypatch):
    """Several chunks of the cross-entropy, and several blocks of attention, the last of each ragged."""
    monkeypatch.setattr(loss_module, "LOSS_CHUNK", 11 * 61)
    monkeypatch.setattr(backprop, "BLOCK_ROWS", 5)


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_whole_model(small_blocks, architecture, backward):
    model = randomize(tiny(**ARCHITECTURES[architecture], **BACKWARDS[backward])).double()
    x, y = tokens(T=37), tokens(T=37, seed=1)
    y[0, 5:9] = -1
    check_model(model, x, y)


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("keys", [GPT2_LIKE, LONG], ids=["gpt2", "all"])
@pytest.mark.parametrize("names", [("c_attn",), ("c_attn", "c_proj", "c_fc")], ids=["c_attn", "all layers"])
def test_whole_model_with_lora(small_blocks, names, keys, backward):
    model = tiny(**keys, **BACKWARDS[backward])
    add_adapters(model, 3, 4.0, ",".join(names))
    model = randomize(model).double()
    assert sum(p.requires_grad for p in model.parameters()) == 2 * 2 * {1: 1, 3: 4}[len(names)]
    check_model(model, tokens(T=37), tokens(T=37, seed=1))


@pytest.mark.parametrize("B, T", [(1, 1), (3, 1), (3, 48)])
def test_whole_model_by_shape(B, T):
    for keys in (GPT2_LIKE, LONG):
        (loss, want), (got_loss, got) = both(randomize(tiny(**keys)).double(), tokens(B, T), tokens(B, T, seed=1))
        assert torch.equal(got_loss, loss)
        for name in want:  # at T = 1 queries and keys have no gradient
            torch.testing.assert_close(got[name], want[name], rtol=1e-10, atol=1e-12)


def test_frozen_parameters_get_no_gradient():
    model = randomize(tiny(**GPT2_LIKE)).double()
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith(("wpe.weight", "h.1.ln_2.weight", "h.0.mlp.c_fc.bias")))
    check_model(model, tokens(), tokens(seed=1))


def test_gradients_add_up_and_scale():
    model, x, y = randomize(tiny(**GPT2_LIKE)).double(), tokens(), tokens(seed=1)
    model(x, y)[1].mul(3 + 0.5).backward()
    want = gradients(model)
    loss_and_gradients(model, x, y, scale=3.0)
    loss_and_gradients(model, x, y, scale=torch.tensor(0.5))
    for name, gradient in gradients(model).items():
        close(gradient, want[name])


def test_evaluation_mode_is_exact():
    model = randomize(tiny(**LONG, attn_backward="sus", sus_c=0.4)).double().eval()
    check_model(model, tokens(), tokens(seed=1))


def test_float32_losses_have_autograds_bits():
    """By the CPU's kernels, in which SUS trains; and gradients to float32's rounding."""
    for keys in (GPT2_LIKE, LONG):
        for backward in ({}, dict(attn_backward="sus", sus_c=0.4)):
            model = tiny(**keys, **backward)
            check_model(model, tokens(), tokens(seed=1), tolerance=2e-5)


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("keys", [GPT2_LIKE, LONG], ids=["gpt2", "all"])
def test_bfloat16_autocast(keys, backward):
    """Losses bit for bit; gradients no further from float64's than twice autograd's own are, over the model."""
    model, x, y = tiny(**keys, **BACKWARDS[backward]), tokens(), tokens(seed=1)
    seed = torch.tensor(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x, y, sus_seed=seed)[1]
    loss.backward()
    autograds = gradients(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got_loss = loss_and_gradients(model, x, y, sus_seed=seed)
    by_hand = gradients(model)
    assert torch.equal(loss, got_loss)
    flat = lambda found: torch.cat([g.double().flatten() for g in found.values()])
    assert all(g.dtype == torch.float32 for g in by_hand.values())
    if "sus" not in backward and backward != "poisson":  # whose mask float64 would draw differently here and there
        model.double()
        model(x, y, sus_seed=seed)[1].backward()
        truth = flat(gradients(model))
        assert (flat(by_hand) - truth).norm() <= 2 * (flat(autograds) - truth).norm()
    assert (flat(by_hand) - flat(autograds)).norm() <= 0.02 * flat(autograds).norm()


def test_a_block_keeps_less_than_autograd():
    """What stands between forward and backward: 10 C a token for GPT-2's block. Autograd keeps more."""
    torch.manual_seed(0)
    block = Block(GPTConfig(n_embd=32, n_head=4, block_size=64), 0)
    x = torch.randn(2, 64, 32)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x.requires_grad_(), None)
    for p in block.parameters():
        kept.pop(p.untyped_storage().data_ptr(), None)
    with torch.no_grad():
        _, a = block_forward(block, x, None, None)
    stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (a.x, a.heads, a.o, a.x_mid, a.h)}
    assert sum(stored.values()) == 10 * x.nbytes < 0.7 * sum(kept.values())
    block_backward(block, a, torch.ones_like(x), None)


@pytest.mark.parametrize("again", ["none", "attention", "full"])
def test_activation_checkpointing_keeps_inputs_only(monkeypatch, again):
    """Then those of one block are alive, and each block's forward runs twice."""
    alive, most = weakref.WeakSet(), []

    def forward(*args):
        y, activations = block_forward(*args)
        alive.add(activations.h)
        most.append(len(alive))
        return y, activations

    monkeypatch.setattr(backprop, "block_forward", forward)
    loss_and_gradients(tiny(n_layer=5, activation_checkpointing=again), tokens(), tokens())
    assert (len(most), max(most)) == ((5, 5) if again == "none" else (10, 1))


def test_no_seed_is_drawn_from_torchs_generator():
    model, x = tiny(attn_backward="sus", sus_c=0.4), tokens()
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        loss_and_gradients(model, x, x)
        found.append(gradients(model)["transformer.wte.weight"])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_sus_fills_its_statistics():
    model, x = tiny(attn_backward="sus", sus_c=0.4), tokens()
    stats = {}
    for name in ("autograd", "analytic"):
        for block in model.transformer.h:
            block.attn.attend.stats = torch.zeros(3)
        if name == "autograd":
            model(x, x, sus_seed=torch.tensor(1))[1].backward()
        else:
            loss_and_gradients(model, x, x, sus_seed=torch.tensor(1))
        stats[name] = torch.stack([block.attn.attend.stats for block in model.transformer.h])
    assert torch.equal(stats["analytic"][:, :2], stats["autograd"][:, :2]) and (stats["analytic"][:, 0] > 0).all()
    torch.testing.assert_close(stats["analytic"], stats["autograd"])


def test_the_seed_of_each_layer_is_its_own(monkeypatch):
    seeds = []

    def spy(*args, seed, **kwargs):
        seeds.append(int(seed))
        return sus_attention_and_backward(*args, seed=seed, **kwargs)

    monkeypatch.setattr(backprop, "sus_attention_and_backward", spy)
    loss_and_gradients(tiny(attn_backward="sus", sus_c=0.4), tokens(), tokens(), sus_seed=torch.tensor(4))
    assert seeds == [fold_in(4, 0), fold_in(4, 1)]


# -- refusals ------------------------------------------------------------------------------------------


def test_what_is_not_covered_is_refused_by_name():
    x = tokens()
    with pytest.raises(ValueError, match="dropout, which is 0.1"):
        loss_and_gradients(tiny(dropout=0.1), x, x)
    loss_and_gradients(tiny(dropout=0.1).eval(), x, x)  # which drops nothing
    model = tiny()
    add_adapters(model, 2, 1.0, "c_fc", dropout=0.2)
    with pytest.raises(ValueError, match="dropout, which is 0.2"):
        loss_and_gradients(model, x, x)
    model = tiny()
    model.config.attn_backward = "another"
    with pytest.raises(ValueError, match="attn_backward='another'"):
        loss_and_gradients(model, x, x)
    with pytest.raises(ValueError, match="block_size"):
        loss_and_gradients(tiny(), tokens(T=49), tokens(T=49))
