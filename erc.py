"""Entropy Ratio Clipping (Su et al., arXiv 2512.05591) for LLM reinforcement learning, in one file.

    python erc.py                       the paper's run: a 1.5B reasoning model, all GPUs of a node
    python erc.py --preset tiny         the same code on a 0.5 M-parameter model, minutes on a CPU
    python erc.py --model DIR --data FILE --no-erc      your model, your problems, plain DAPO
    python erc.py eval --model DIR      avg@k on the paper's six benchmarks, or on your problems
    python erc.py plot RUN RUN          the paper's figures from the records of runs
    python erc.py --help                every setting with its reason and source

PPO-clip watches one number a token: how far the probability of the *sampled* token has moved. The
rest of the distribution may drift unseen. ERC watches a second one, the ratio ρ of the token's new
entropy to its old one (eq. 8), and drops the gradient of every token whose ρ has left
(1 - β_low, 1 + β_high) (eq. 9).

Part I is the method; read it from top to bottom. Part II is what it takes to run it; look things up
there. Left out on purpose: critic, reference model, asynchronous rollouts, tensor parallelism.

Names end in the axes of their tensors: P prompts, G samples a prompt, B responses, T response
tokens, L prompt and response tokens, N response tokens laid flat, C a chunk of N, D hidden size,
V vocabulary, 1 an axis to broadcast. Log-probs and entropies are in nats. Under torchrun this is
process RANK of WORLD; else 0 of 1.
"""
import os
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # read as torch loads: long spinning starves cores

import argparse
import gzip
import inspect
import json
import logging
import math
import multiprocessing as mp
import random
import re
import resource
import signal
import statistics
import sys
import time
import unicodedata
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from importlib.util import find_spec
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Literal, NamedTuple, get_args
from zlib import crc32

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence


# ==================================================================================================
# Part I: the method
# ==================================================================================================

# ---------------------------------------------------------------------------------------- Settings

# PPO-clip's (ε_low, ε_high): of dapo and gppo as in §4.1, of grpo as in PPO, of gspo as in the
# authors' code.
EPS = {"grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gppo": (0.2, 0.2), "gspo": (3e-4, 4e-4)}


@dataclass
class Config:  # the comments are the text of --help
    preset: Literal["paper", "tiny"] = "paper"              # tiny: minutes on a CPU
    model: str = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"  # causal LM: hub id, folder (§4.1)
    data: str = "Kwai-Klear/KlearReasoner-MathSub-30K"      # file, or ID[:CONFIG[:SPLIT]] (§4.1)
    eval_data: str = ""                 # held-out problems: greedy accuracy every eval_every steps
    prompt_field: str = ""              # of a record, a.b for b within a; default: the usual names
    answer_field: str = ""              # the same for the reference answer
    instruction: str = ""             # put behind the last user turn, such as a wish for a \boxed{}
    template_kwargs: str = "{}"         # for the chat template, as JSON: {"enable_thinking": false}
    # the objective
    algo: Literal["grpo", "dapo", "gppo", "gspo"] = "dapo"  # eq. 5, eq. 6, eq. 7, §5.7
    erc: bool = True                    # drop tokens whose entropy ratio has left the band (eq. 9)
    erc_mode: Literal["two-sided", "one-sided"] = "two-sided"   # eq. 9; ours: keeps what leads back
    eps_low: float = None               # PPO-clip at r = 1 - ε_low; default 0.2, gspo 3e-4
    eps_high: float = None              # at r = 1 + ε_high; default 0.2, dapo 0.28, gspo 4e-4
    beta_low: float = 0.05              # ERC keeps ρ > 1 - β_low (§4.1)
    beta_high: float = 0.05             # ERC keeps ρ < 1 + β_high (§4.1)
    dual_clip: float = 0.0              # c: where A < 0, J >= c·A; 0: off (authors' code: 10)
    kl_coef: float = 0.0                # KL(π_old‖π_θ), eq. 2's β; the clip stays: ablation (§5.5)
    entropy_coef: float = 0.0           # entropy bonus: an ablation (§5.6)
    # one step: a rollout batch and its updates
    prompts_per_step: int = 128         # groups in a rollout batch (§4.1)
    group_size: int = 8                 # samples a prompt, G (§4.1)
    minibatch_prompts: int = 16         # groups an update: 128 / 16 = 8 updates a batch (§4.1)
    oversample: float = 2.0             # batches of prompts sampled a round (authors' code)
    max_rounds: int = 3                 # rounds at most to fill the batch (authors' code: 1)
    max_prompt_tokens: int = 4096       # longer prompts are left out (authors' code)
    max_response_tokens: int = 16384    # longer responses are cut off (§4.1)
    overlong_buffer: int = 0            # DAPO's penalty on the last so many tokens; 0 off (authors)
    temperature: float = 1.0            # of sampling and of all statistics (authors' code)
    # optimisation
    steps: int = 1000                   # rollout batches (ours; the authors train 10 epochs)
    lr: float = 1e-6                    # AdamW (§4.1)
    warmup_steps: int = 10              # rollout batches of linear warm-up (authors' code)
    weight_decay: float = 0.1           # AdamW (authors' code)
    grad_clip: float = 1.0              # global gradient norm (authors' code)
    # the machine
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # of the body; bf16, on a CPU fp32
    sampler: Literal["auto", "vllm", "hf"] = "auto"      # hf: transformers; auto: vllm if installed
    micro_tokens: int = 0               # padded tokens a forward pass; 0: what fits the free memory
    gpu_memory: float = 0.6             # vLLM's share of the GPU while it samples
    eval_every: int = 10                # steps between evaluations on eval_data
    save_every: int = 1                 # steps between checkpoints
    seed: int = 1                       # of data order and sampling
    out: str = ""                       # the run's directory; default runs/PRESET-[erc-]ALGO-SEED
    resume: bool = False                # go on from the checkpoint in --out

    def __post_init__(self):
        eps_low, eps_high = EPS[self.algo]
        self.eps_low = eps_low if self.eps_low is None else self.eps_low
        self.eps_high = eps_high if self.eps_high is None else self.eps_high
        if self.precision == "auto":
            self.precision = "bf16" if torch.cuda.is_available() else "fp32"
        if self.sampler == "auto":
            self.sampler = "vllm" if find_spec("vllm") else "hf"
        method = f"erc-{self.algo}" if self.erc else self.algo
        self.out = self.out or f"runs/{self.preset}-{method}-{self.seed}"


PRESETS = {
    "paper": {},
    "tiny": dict(
        model="runs/tiny-base",
        data="runs/tiny-base/train.jsonl",
        eval_data="runs/tiny-base/test.jsonl",
        prompts_per_step=32,
        minibatch_prompts=4,                # eight updates a batch, as in the paper
        oversample=1.0,
        max_rounds=1,
        max_prompt_tokens=32,
        max_response_tokens=16,
        overlong_buffer=4,                  # or nothing teaches the model to stop
        steps=200,
        lr=3e-5,                            # the paper's 1e-6 × 1536 / 128 (widths) is 1.2e-5
        sampler="hf",
        eval_every=20,
        save_every=10,
    ),
}


# ----------------------------------------------------------------------------------- Entropy ratio

def logp_entropy(logits_NV, targets_N, kappa=False):
    """log π(y) and the entropy H(π) = -Σ_v π_v log π_v of each row, in nats and fp32.

    Returns (logp_N, entropy_N), with `kappa` also kappa_N. Logits may be -inf: probability 0.

    Most tokens of a reasoning model are near-deterministic, H < 0.01, and ERC asks whether H moved
    by 5 %. The usual logsumexp(z) - Σ πz is then a difference of two large numbers, 17 % off at
    H = 6e-5. So let d = z - max z <= 0, and let s be the sum of e^d over all tokens but the
    likeliest, whose own e^d is 1. Then log π_v = d_v - log(1 + s), and as Σ π_v = 1,

        log π(y) = d_y - log(1 + s)         H = log(1 + s) - Σ e^d d / (1 + s).

    No term of H is negative, so nothing cancels: its relative error is 1e-6 down to H = 1e-10.

    κ is for one-sided ERC (ours). With c_v = log π_v + H we have ∂H/∂z_v = -π_v c_v, and
    ∂log π(y)/∂z_v = δ_vy - π_v. A small step dz_v = A (δ_vy - π_v), which is the policy gradient's
    in the logits, changes H by Σ_v ∂H/∂z_v dz_v = -A·κ, where
    κ = Σ_v π_v c_v (δ_vy - π_v) = π_y c_y - Σ_v π_v² c_v.

    >>> logp, H = logp_entropy(torch.tensor([[.85, 0, .15, 0]]).log(), torch.tensor([0]))
    >>> round(logp.item(), 4), round(H.item(), 4)
    (-0.1625, 0.4227)
    """
    logits_NV = logits_NV.float()
    top_N1, argmax_N1 = logits_NV.max(-1, keepdim=True)
    d_NV = logits_NV - top_N1
    d_y_N = d_NV.gather(-1, targets_N[:, None]).squeeze(-1)
    d_NV = d_NV.clamp(min=-1e4)                                 # or e^d d = 0 · ∞ where z is -inf
    d_NV = d_NV.scatter(-1, argmax_N1, -1e4)                    # e^-10000 = 0: not the likeliest
    e_NV = d_NV.exp()
    s_N = e_NV.sum(-1)
    c_top_N = -(e_NV * d_NV).sum(-1) / (1 + s_N)                # log π_top + H
    logp_N = d_y_N - s_N.log1p()
    entropy_N = s_N.log1p() + c_top_N
    if not kappa:
        return logp_N, entropy_N

    # Here c_v is d_v + c_top; for the likeliest token it is c_top, and π_top is 1 / (1 + s). If
    # that token is y, π_y c_y and its own part of Σ π² c nearly cancel. Taken together they are
    # c_top π_top (1 - π_top), where 1 - π_top is s / (1 + s).
    others_N = (e_NV**2 * (d_NV + c_top_N[:, None])).sum(-1) / (1 + s_N)**2
    if_top_N = c_top_N * s_N / (1 + s_N)**2
    if_other_N = logp_N.exp() * (d_y_N + c_top_N) - c_top_N / (1 + s_N)**2
    kappa_N = torch.where(targets_N == argmax_N1[:, 0], if_top_N, if_other_N) - others_N
    return logp_N, entropy_N, kappa_N


def entropy_ratio(entropy, old_entropy):
    """ρ = H(π_θ) / H(π_old) of the same token (eq. 8), with the authors' 1e-8 on both sides.

    >>> round(entropy_ratio(0.6664, 0.4227), 2)
    1.58
    """
    return (entropy + 1e-8) / (old_entropy + 1e-8)


# --------------------------------------------------------------------------------------- Objective

def group_advantages(rewards_PG):
    """Â = (r - mean) / std within each group of G >= 2 samples (eq. 4).

    The paper leaves open which std: here it is the unbiased one, plus 1e-6.

    >>> A = group_advantages(torch.tensor([[1., 0., 0., 0.], [1., 1., 1., 1.]]))
    >>> A.round(decimals=3).tolist()
    [[1.5, -0.5, -0.5, -0.5], [0.0, 0.0, 0.0, 0.0]]
    """
    r_PG = rewards_PG.double()          # equal rewards give 0, not the rounding of fp32 over 1e-6
    mean_P1 = r_PG.mean(1, keepdim=True)
    std_P1 = r_PG.std(1, keepdim=True)
    return ((r_PG - mean_P1) / (std_P1 + 1e-6)).float()


def policy_loss(logp_BT, entropy_BT, old_logp_BT, old_entropy_BT, advantages_B, mask_BT, cfg,
                norm=None, kappa_BT=None, tokens=None):
    """The objective of every method here, negated -> (loss, metrics): a scalar to minimise, floats.

    mask_BT marks response tokens. `norm` divides the sum over them: the whole mini-batch's number
    of tokens (dapo, gppo) or of responses (grpo, gspo), by default this call's own. With kappa_BT,
    the κ of `logp_entropy`, ERC is one-sided. To the list `tokens` is added what each token had."""
    mask_BT = mask_BT.bool()
    A_B1 = advantages_B[:, None]
    length_B1 = mask_BT.sum(1, keepdim=True).clamp(min=1)                   # |y_i|
    log_r_BT = (logp_BT - old_logp_BT).masked_fill(~mask_BT, 0.0)       # padding may hold anything
    log_r_BT = log_r_BT.clamp(-20, 20)          # else r = ∞, where clipped, has the gradient 0 · ∞
    entropy_BT = entropy_BT.masked_fill(~mask_BT, 0.0)

    r_BT = log_r_BT.exp()                                                   # eq. 1
    if cfg.algo == "gspo":
        # Every token has the sequence's ratio (Π_t r_t)^(1/|y|) for its value, and that ratio times
        # its own ∇log π for its gradient. Their mean then has the gradient of the sequence's ratio.
        sequence_B1 = log_r_BT.detach().sum(1, keepdim=True) / length_B1
        r_BT = (sequence_B1 + log_r_BT - log_r_BT.detach()).exp()
    bound_BT = r_BT.clamp(1 - cfg.eps_low, 1 + cfg.eps_high)
    ppo_clip_BT = (r_BT - bound_BT) * A_B1 > 0  # True where the minimum picks the clipped side
    if cfg.algo == "gppo":
        bound_BT = (bound_BT / r_BT).detach() * r_BT                       # eq. 7: keeps a gradient
    J_BT = torch.minimum(r_BT * A_B1, bound_BT * A_B1)                      # eqs. 3, 5, 6, 7
    if cfg.dual_clip:
        J_BT = torch.where(A_B1 < 0, torch.maximum(J_BT, cfg.dual_clip * A_B1), J_BT)

    # ERC: a token whose entropy has left the band adds nothing to J, and gets no gradient from J.
    rho_BT = entropy_ratio(entropy_BT.detach(), old_entropy_BT)             # eq. 8
    low_BT = rho_BT <= 1 - cfg.beta_low
    high_BT = rho_BT >= 1 + cfg.beta_high
    drop_BT = low_BT | high_BT
    if kappa_BT is not None:
        # One-sided (ours): drop only what would raise H further above the band, or lower it below.
        drop_BT = (high_BT & (A_B1 * kappa_BT < 0)) | (low_BT & (A_B1 * kappa_BT > 0))
    drop_BT = drop_BT & cfg.erc
    J_BT = J_BT.masked_fill(drop_BT, 0.0)                                   # eq. 9

    # The next two terms are outside of J, so a dropped token keeps them. (Eq. 2 has r·A for J.)
    kl_BT = log_r_BT.exp() - 1 - log_r_BT       # its mean over y ~ π_old is KL(π_old‖π_θ)
    loss_BT = -J_BT + cfg.kl_coef * kl_BT - cfg.entropy_coef * entropy_BT   # eq. 2, §5.6
    # Eqs. 6, 7, 9 divide by Σ|y_i|, dropped tokens included; eq. 5 has each response's mean first.
    # The paper's sums are over a group, ours over a mini-batch: each of its tokens weighs as much.
    weight_BT = mask_BT / length_B1 if cfg.algo in ("grpo", "gspo") else mask_BT.float()
    loss = (loss_BT * weight_BT).sum() / (weight_BT.sum() if norm is None else norm)
    seen = dict(old_logp=old_logp_BT, logp=logp_BT, old_entropy=old_entropy_BT, entropy=entropy_BT,
                rho=rho_BT, advantage=A_B1, ppo_clip=ppo_clip_BT, erc_low=low_BT, erc_high=high_BT,
                erc_drop=drop_BT, kl=kl_BT)
    return loss, record(seen, mask_BT, tokens)


MEANS = "ppo_clip erc_low erc_high erc_drop entropy kl".split()     # metrics: means over tokens


def record(seen, mask_BT, tokens):
    """What was seen of each token, {name: (B, T) or (B, 1)} -> the means named in MEANS. The list
    `tokens`, if there is one, gets all of it as {name: (N,)}."""
    seen = {name: x.detach().expand_as(mask_BT)[mask_BT].float().cpu() for name, x in seen.items()}
    if tokens is not None:
        tokens.append(seen)
    return {name: seen[name].mean().item() for name in MEANS}


# ---------------------------------------------------------------------------------------- One step

@dataclass
class Sample:
    prompt: list                # token ids, chat template included
    response: list              # token ids, end-of-sequence included
    logp: list                  # the sampler's own log π of each, to compare with the trainer's
    truncated: bool             # cut off at the length limit: no end-of-sequence
    reward: float = 0.0
    boxed: bool = False         # has a \boxed{} to read an answer from
    advantage: float = 0.0


def respond(metrics, sampler, verifier, tokenizer, prompts, n, max_tokens, temperature, **how):
    """n responses to each of the prompts, (token ids, answer), with their rewards -> list[Sample].

    `how` is the sampler's: seed, top_p. The time that it takes is added to the metrics.
    """
    what = "sampling failed; if the weights have diverged, lower --lr"
    with timed(metrics, "seconds_sample"), explained(what):
        samples = sampler.generate([ids for ids, _ in prompts], n, max_tokens, temperature, **how)
    texts = tokenizer.batch_decode([s.response for s in samples], skip_special_tokens=True)
    with timed(metrics, "seconds_verify"):
        rewards = verifier.score(texts, [answer for _, answer in prompts for _ in range(n)])
    for s, text, reward in zip(samples, texts, rewards):
        s.reward = reward
        s.boxed = last_boxed(text) is not None
    return samples


def rollout(cfg, step, cursor, sampler, verifier, tokenizer, prompts):
    """Sample, verify, keep the groups that teach -> (groups, one sample, new cursor, metrics).

    These are the groups of unequal rewards; for grpo, all. `prompts` are (token ids, answer), and
    `cursor` counts those drawn so far. Rounds go on until prompts_per_step groups are kept, but no
    longer than max_rounds. What is drawn depends on seed, step, cursor, rank and number of ranks
    alone: a resumed run draws it too.
    """
    G = cfg.group_size
    keep_all = cfg.algo == "grpo"       # eq. 5 averages over all responses; DAPO filters groups
    count = cfg.prompts_per_step if keep_all else math.ceil(cfg.oversample * cfg.prompts_per_step)
    n = len(prompts)
    all_samples = []                    # of all ranks and rounds
    metrics = dict(step=step)
    verifier.killed = 0
    for attempt in range(cfg.max_rounds):
        mine = []
        for i in range(cursor + RANK, cursor + count, WORLD):
            order = epoch_order(n, cfg.seed, i // n)
            mine.append(prompts[order[i % n]])
        cursor += count
        seed = random.Random(f"sample {cfg.seed} {step} {attempt}").getrandbits(32) + RANK
        samples = respond(metrics, sampler, verifier, tokenizer, mine, G, cfg.max_response_tokens,
                          cfg.temperature, seed=seed)
        shaped = [s.reward - overlong(len(s.response), cfg) for s in samples]
        advantages_PG = group_advantages(torch.tensor(shaped).view(-1, G))  # eq. 4
        for s, advantage in zip(samples, advantages_PG.flatten().tolist()):
            s.advantage = advantage
        all_samples += sum(gather(samples), [])
        groups = batched(all_samples, G)
        if not keep_all:                # equal rewards, after the length penalty, give no gradient
            groups = [group for group in groups if any(s.advantage for s in group)]
        if len(groups) >= cfg.prompts_per_step:
            break
    for name in "reward", "boxed", "truncated":
        metrics[name] = statistics.fmean(getattr(s, name) for s in all_samples)
    lengths = [len(s.response) for s in all_samples]
    metrics["response_length"] = statistics.fmean(lengths)
    metrics["tokens"] = sum(lengths)
    metrics["groups"] = len(groups)
    metrics["verifier_killed"] = sum(gather(verifier.killed))
    return groups[:cfg.prompts_per_step], samples[0], cursor, metrics


def forward(model, samples, cfg):
    """One micro-batch through the model -> (logp_BT, entropy_BT, mask_BT, kappa_BT or None).

    Old and new statistics both come from here, so that equal weights give equal numbers.
    """
    # The last response token predicts nothing. Padding is on the right, where causal attention
    # shows it to no response token; so there is no attention mask.
    rows = [torch.tensor(s.prompt + s.response[:-1]) for s in samples]
    ids_BL = pad_sequence(rows, batch_first=True).to(model.device)
    responses = [torch.tensor(s.response) for s in samples]
    y_BT = pad_sequence(responses, batch_first=True, padding_value=-1).to(model.device)
    mask_BT = y_BT >= 0
    # Token t of response b is predicted at the position before its own, len(prompt) + t - 1.
    b_N, t_N = mask_BT.nonzero(as_tuple=True)
    prompt_length_B = torch.tensor([len(s.prompt) for s in samples], device=model.device)

    with autocast(model.device, cfg.precision):
        hidden_BLD = model.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state
    hidden_ND = hidden_BLD[b_N, prompt_length_B[b_N] + t_N - 1]
    kappa = cfg.erc_mode == "one-sided" and torch.is_grad_enabled()    # not for π_old
    stats = token_stats(hidden_ND, model.get_output_embeddings(), y_BT[mask_BT],
                        cfg.temperature, entropy_grad=cfg.entropy_coef != 0, kappa=kappa)
    zeros_BT = torch.zeros(mask_BT.shape, device=model.device)
    logp_BT, entropy_BT, *more = [zeros_BT.masked_scatter(mask_BT, x_N) for x_N in stats]
    return logp_BT, entropy_BT, mask_BT, more[0] if more else None


def old_statistics(model, micros, cfg):
    """π_old's log-probs and entropies, from the trainer itself -> ([forward's output], metrics).

    The sampler has its own log-probs of the same tokens. UserError if they are far from these.
    """
    metrics = {}
    with timed(metrics, "seconds_old"), torch.no_grad():
        old = [forward(model, micro, cfg) for micro in progress(micros, "old policy")]
    gaps = []
    for micro, (logp_BT, _, mask_BT, _) in zip(micros, old):
        theirs_N = torch.tensor([x for s in micro for x in s.logp])
        gaps.append((logp_BT[mask_BT].cpu() - theirs_N).abs())
    gap_N = torch.cat(sum(gather(gaps), []))
    metrics["sampler_gap"] = gap_N.mean().item()
    limit = max_gap(model.device, cfg.precision)
    need(metrics["sampler_gap"] <= limit,
         f"sampler and trainer disagree by {metrics['sampler_gap']:.2g} nats a token (> {limit}): "
         "the sampler has stale weights, or another temperature or top-p")
    return old, metrics


def update(model, optimizer, groups, cfg, scaler):
    """The optimizer steps of one rollout batch -> (metrics, tokens: {name: (N,)} of all of them).

    All old statistics come first, from the same micro-batches as the new ones. So r ≡ 1 and ρ ≡ 1
    on the first mini-batch, or else UserError. The GradScaler is fp16's, against underflow.
    """
    minis = [sum(part, []) for part in batched(groups, cfg.minibatch_prompts)]
    plan = [micro_batches(mini, cfg.micro_tokens) for mini in minis]    # this rank's share
    old, metrics = old_statistics(model, sum(plan, []), cfg)
    old = iter(old)
    tokens = []
    grad_norms = []
    with timed(metrics, "seconds_update"):
        for mini, micros in zip(progress(minis, "updates"), plan):
            # Divided by the whole mini-batch's count, gradients do not depend on the micro-batches.
            per_token = cfg.algo in ("dapo", "gppo")
            norm = sum(len(s.response) for s in mini) if per_token else len(mini)
            for micro in micros:
                old_logp_BT, old_entropy_BT, mask_BT, _ = next(old)
                logp_BT, entropy_BT, _, kappa_BT = forward(model, micro, cfg)
                advantages_B = torch.tensor([s.advantage for s in micro], device=model.device)
                loss, _ = policy_loss(logp_BT, entropy_BT, old_logp_BT, old_entropy_BT,
                                      advantages_B, mask_BT, cfg, norm, kappa_BT, tokens)
                scaler.scale(loss).backward()
                if not grad_norms:
                    check_on_policy(tokens[-1])     # no update yet: π_θ is π_old
            sum_gradients(model)
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip).item()
            grad_norms.append(grad_norm)
            if math.isfinite(grad_norm):
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    tokens = sum(gather(tokens), [])
    tokens = {name: torch.cat([part[name] for part in tokens]) for name in tokens[0]}
    return metrics | summed_up(tokens, grad_norms), tokens


def check_on_policy(tokens):
    """UserError if r or ρ is not 1 for every token."""
    off_N = (tokens["logp"] - tokens["old_logp"]).abs() + (tokens["rho"] - 1).abs()
    need(off_N.max() < 1e-3, f"r or ρ is off 1 by {off_N.max():.2g} before the first update: old "
                             "and new statistics are not of one policy, through the same code")


# ----------------------------------------------------------------------------------------- The run

def train(cfg):
    """The whole run: cfg.steps times sample, verify, update, log, save."""
    model, tokenizer, optimizer, scaler, sampler, verifier, prompts, heldout = setup(cfg)
    out = Path(cfg.out)
    problems = crc32(repr((prompts, heldout)).encode())     # a run goes on only with those it had
    done, cursor = begin(out, cfg, model, optimizer, scaler, problems)
    failed = 0                                  # steps in a row without a finite gradient
    tokens = {}                                             # of the last step with an update
    sampler.load_weights(model)
    if heldout and not cfg.resume:
        accuracy = greedy_accuracy(sampler, verifier, tokenizer, heldout, cfg)
        append(out / "metrics.jsonl", dict(step=0, accuracy=accuracy))
        say(f"held-out greedy accuracy before training: {accuracy:.3f}")
    say(HEADER)
    for step in progress(range(done + 1, cfg.steps + 1), "steps"):
        started = time.perf_counter()
        groups, shown, cursor, metrics = rollout(cfg, step, cursor, sampler, verifier, tokenizer,
                                                 prompts)
        sampler.sleep()                                     # the GPU's memory is the trainer's now

        metrics["lr"] = cfg.lr * min(1.0, step / max(1, cfg.warmup_steps))
        for param_group in optimizer.param_groups:
            param_group["lr"] = metrics["lr"]
        if any(s.advantage for group in groups for s in group):     # else J has no gradient
            updated, tokens = update(model, optimizer, groups, cfg, scaler)
            metrics |= updated
            failed = 0 if metrics["updates"] else failed + 1
            need(failed < 3, "no finite gradient in three steps; lower --lr")

        with timed(metrics, "seconds_sync"):
            sampler.load_weights(model)
        if heldout and (step % cfg.eval_every == 0 or step == cfg.steps):
            metrics["accuracy"] = greedy_accuracy(sampler, verifier, tokenizer, heldout, cfg)
        metrics["seconds"] = time.perf_counter() - started
        log(out, metrics, shown, tokenizer, quiet=bool(heldout))
        if step % cfg.save_every == 0 or step == cfg.steps:
            save(out, model, optimizer, scaler, tokens, step=step, cursor=cursor, problems=problems)
    finish(out, model, tokenizer)


# ==================================================================================================
# Part II: the machinery
# ==================================================================================================

# ---------------------------------------------------------------------- Command line and processes

# Under torchrun this is process RANK of WORLD, with a GPU, an engine and all weights of its own;
# started alone it is 0 of 1. Ranks share out prompts, verification and the samples of a mini-batch,
# nothing else: after `gather` and `sum_gradients` all hold the same, to the bit, and do the same.
launched = os.environ if dist.is_torchelastic_launched() else {}
RANK, WORLD = int(launched.get("RANK", 0)), int(launched.get("WORLD_SIZE", 1))


class UserError(Exception):
    """Something the user can put right: `main` prints it as one line and exits with status 2."""


def need(holds, message):
    if not holds:
        raise UserError(message)


def as_list(x):
    return x if isinstance(x, list) else [x]


def batched(items, n):
    """As itertools.batched of Python 3.12: n items at a time; of the last there may be fewer."""
    return [items[i:i + n] for i in range(0, len(items), n)]


@contextmanager
def explained(what):
    """What goes wrong inside becomes one line for the user: libraries raise errors of any class."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        why = f"{e} {e.__cause__ or ''}".strip() or type(e).__name__    # `datasets` hides the cause
        raise UserError(f"{what} ({why.splitlines()[0]})") from e


def gather(x):
    """What each rank holds -> [rank 0's, rank 1's, …], on every rank."""
    parts = [x] * WORLD
    if WORLD > 1:
        with explained(f"rank {RANK} lost another one, whose own error says why"):
            dist.all_gather_object(parts, x)
    return parts


def sum_gradients(model):
    """Each rank has the gradient of its share of the mini-batch; all need that of the whole."""
    for p in model.parameters():
        if p.grad is None:                                      # this rank may have had no sample
            p.grad = torch.zeros_like(p)
        if WORLD > 1:
            dist.all_reduce(p.grad)


@contextmanager
def timed(metrics, name):
    started = time.perf_counter()
    yield
    metrics[name] = metrics.get(name, 0.0) + time.perf_counter() - started


def progress(items, name):
    """A bar on rank 0's terminal, gone when done; none where the output goes to a file."""
    from tqdm import tqdm
    return tqdm(items, name, leave=False, disable=RANK > 0 or None)


def say(text):
    """Print lines, above the progress bars. Rank 0 speaks for all."""
    from tqdm import tqdm
    if RANK == 0:
        tqdm.write(text)
        sys.stdout.flush()


ABOVE_0 = "beta_low beta_high temperature grad_clip gpu_memory".split()
AT_LEAST_1 = ("prompts_per_step minibatch_prompts oversample max_rounds max_prompt_tokens "
              "max_response_tokens steps eval_every save_every").split()


def check_settings(cfg):
    """UserError names the first setting out of range, or an --out that a run would overwrite."""
    for name, value in vars(cfg).items():
        least = 1 if name in AT_LEAST_1 else 1e-6 if name in ABOVE_0 else 0
        if isinstance(value, int | float) and name != "entropy_coef":
            need(least <= value < math.inf, f"{flag(name)} {value}: must be finite and >= {least}")
    need(cfg.group_size > 1, "--group-size: must be at least 2, to have something to compare with")
    need(cfg.prompts_per_step % cfg.minibatch_prompts == 0 and cfg.prompts_per_step >= WORLD,
         f"--prompts-per-step: must be a multiple of --minibatch-prompts, and at least {WORLD}")
    need(cfg.overlong_buffer <= cfg.max_response_tokens,
         f"--overlong-buffer: must be at most --max-response-tokens {cfg.max_response_tokens}")
    with explained(f"--out {cfg.out}: cannot be made; name another"):
        os.makedirs(cfg.out, exist_ok=True)
    others = set(os.listdir(cfg.out)) - {"config.json", *LOGS}
    need(cfg.resume or not others,
         f"--out {cfg.out}: holds a run or a model; go on with --resume, or name another")


def flag(name):
    return "--" + name.replace("_", "-")


def parser(command, names, **defaults):
    """Flags for these fields of Config, whose comments are the help; errors are UserErrors. Help
    names these defaults, or else Config's."""
    ap = argparse.ArgumentParser(f"python erc.py {command}", None, __doc__, allow_abbrev=False,
                                 argument_default=argparse.SUPPRESS,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.error = lambda message: need(False, f"{message} (--help lists all settings)")
    defaults = vars(Config) | defaults
    reasons = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(Config), re.M))
    for name in names:
        kind = Config.__annotations__[name]
        how = dict(type=kind)
        if kind is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        elif get_args(kind):
            how = dict(choices=get_args(kind))
        ap.add_argument(flag(name), help=f"{reasons[name]} [{defaults[name]}]", **how)
    return ap


def parse_train(argv):
    """Command line of a run -> Config: the preset's settings, overridden by flags. Under --resume
    the run's own config.json, which flags may repeat but not change; UserError names what differs.
    """
    given = vars(parser("", Config.__annotations__).parse_args(argv))
    cfg = Config(**PRESETS[given.get("preset", "paper")] | given)
    if not cfg.resume:
        return cfg
    path = Path(cfg.out, "config.json")
    with explained(f"--resume: {path} is not there, damaged, or of another version"):
        saved = json.loads(path.read_text())
        need(Path(cfg.out, "checkpoint/state.pt").exists(),
             f"--resume: {cfg.out} has no checkpoint; start it again without --resume")
        cfg = Config(**saved | given)
        free = "steps eval_every save_every micro_tokens out resume".split()
        differ = [f"{flag(name)} {value} (was {saved[name]})" for name, value in vars(cfg).items()
                  if name not in free and value != saved[name]]
    need(not differ, f"--resume: {path} has other settings: {', '.join(differ)}")
    return cfg


def start(cfg):
    """Check what needs no model, join the other ranks, if there are any, and quieten the libraries
    -> this rank's device."""
    import transformers
    cuda = torch.cuda.is_available()
    need(cfg.data.strip(", "), "--data or --benchmarks: names nothing")
    need(isinstance(unpacked(cfg.template_kwargs), dict),
         f"--template-kwargs {cfg.template_kwargs}: must be a JSON object")
    need(cfg.sampler != "vllm" or find_spec("vllm"),
         "--sampler vllm: it is not installed; pip install vllm, or take --sampler hf")
    need(cuda or cfg.model != Config.model,
         "no CUDA device: this run needs an 80 GB GPU; on a CPU, python erc.py --preset tiny")
    if cuda:
        torch.cuda.set_device(int(launched.get("LOCAL_RANK", 0)))
        torch.backends.cuda.enable_cudnn_sdp(False)             # it plans anew for every new shape
    if WORLD > 1:
        dist.init_process_group(timeout=timedelta(days=7))      # a rank may wait long for another
    # TF32 in the head is finer than a bf16 body; it rounds old and new alike, so r, ρ stay 1.
    torch.set_float32_matmul_precision("highest" if cfg.precision == "fp32" else "high")
    transformers.logging.disable_progress_bar()
    for library in "huggingface_hub", "datasets.packaged_modules":
        logging.getLogger(library).setLevel(logging.CRITICAL)   # our line says what failed
    return torch.device("cuda" if cuda else "cpu")


def setup(cfg):
    """Check and load all that a run needs, and print the derived quantities."""
    check_settings(cfg)
    device = start(cfg)
    if cfg.model == PRESETS["tiny"]["model"] and RANK == 0 and not Path(cfg.model).is_dir():
        build_tiny(Path(cfg.model))
    gather("the others wait for rank 0's model")
    model, tokenizer, eos = load_model(cfg.model, device)
    check_head(model)
    prompts = load_prompts(cfg.data, tokenizer, cfg)
    heldout = load_prompts(cfg.eval_data, tokenizer, cfg) if cfg.eval_data else []
    longest = cfg.max_response_tokens + max(len(ids) for ids, _ in prompts + heldout)
    say(f"{cfg.model}: {model.num_parameters() / 1e6:.2f} M parameters on {WORLD} × {device}, "
        f"{cfg.precision}, sampler {cfg.sampler}\n"
        f"{'ERC-' * cfg.erc}{cfg.algo.upper()}: {cfg.prompts_per_step} prompts × {cfg.group_size} "
        f"samples a step, {cfg.prompts_per_step // cfg.minibatch_prompts} updates of "
        f"{cfg.minibatch_prompts * cfg.group_size} responses")
    plan_memory(model, cfg, longest)
    # vLLM wants its share of the GPU free when it starts, so it comes before Adam.
    sampler = make_sampler(cfg, model, eos, longest)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=cfg.weight_decay,
                                  fused=device.type == "cuda")  # `train` sets lr at every step
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")
    rehearse(model, optimizer, cfg, longest)
    return model, tokenizer, optimizer, scaler, sampler, Verifier(), prompts, heldout


def overlong(length, cfg):
    """DAPO's length penalty, taken off the reward: 0 up to max - buffer, then linear, 1 at max."""
    over = length - (cfg.max_response_tokens - cfg.overlong_buffer)
    return max(0, over) / max(1, cfg.overlong_buffer)


@cache
def epoch_order(n, seed, epoch):
    """Every epoch has all of n problems, in an order of its own."""
    return random.Random(f"order {seed} {epoch}").sample(range(n), n)


def micro_batches(samples, budget):
    """This rank's share of a mini-batch, cut into lists of similar length, of at most `budget`
    padded tokens (or one sample) each. Every WORLD-th by length: all ranks have as much to do."""
    def size(s):
        return len(s.prompt) + len(s.response)
    todo = sorted(samples, key=size, reverse=True)[RANK::WORLD]
    batches = []
    while todo:
        rows = max(1, budget // size(todo[0]))
        batches.append(todo[:rows])
        todo = todo[rows:]
    return batches


def summed_up(tokens, grad_norms):
    """The metrics of a step's updates, from all of its tokens and the norm of each gradient."""
    metrics = {name: tokens[name].mean().item() for name in MEANS}
    rho_N = tokens["rho"].sort().values
    for q in (1, 50, 99):
        metrics[f"rho_p{q}"] = rho_N[len(rho_N) * q // 100].item()
    finite_norms = [x for x in grad_norms if math.isfinite(x)]
    return metrics | dict(
        rho_drift=(rho_N - 1).abs().median().item(),
        grad_norms=finite_norms,
        grad_norm=statistics.fmean(finite_norms or [0.0]),
        updates=len(finite_norms),
        updates_skipped=len(grad_norms) - len(finite_norms))


HEADER = """\
  step reward heldout      H   ρ p1   p50   p99  below  above PPO-clip |grad| length  tok/s seconds
       Before the first update of a step r = ρ = 1 on every token (checked). So the loss starts
       at minus its mean advantage, and ERC acts from a step's second update on."""


def log(out, m, shown, tokenizer, quiet):
    """Append a step's records and print its line; of a `quiet` run only where it is evaluated, or
    where something is wrong."""
    append(out / "metrics.jsonl", m)
    append(out / "samples.jsonl", dict(
        step=m["step"], prompt=tokenizer.decode(shown.prompt),
        response=tokenizer.decode(shown.response), reward=shown.reward))
    skipped, unboxed, first = "rho_p1" not in m, m["boxed"] < 0.5, m["step"] == 1
    accuracy = f"{m['accuracy']:.3f}" if "accuracy" in m else ""
    line = f"{m['step']:6d} {m['reward']:6.3f} {accuracy:>7} "
    line += "skipped: no group has rewards that differ" if skipped else (
        f"{m['entropy']:6.4f} {m['rho_p1']:6.3f} {m['rho_p50']:5.3f} {m['rho_p99']:5.3f} "
        f"{m['erc_low']:6.1%} {m['erc_high']:6.1%} {m['ppo_clip']:8.2%} {m['grad_norm']:6.3f} "
        f"{m['response_length']:6.1f} {m['tokens'] / m['seconds']:6.0f} {m['seconds']:7.1f}")
    if unboxed:
        line += f"; {m['boxed']:.0%} of the responses are boxed: ask for it with --instruction"
    if skipped or unboxed or first or accuracy or not quiet:
        say(line)


# ---------------------------------------------------------------------------------------- Problems

class Problem(NamedTuple):
    prompt: str | list          # the user's turn as text, or chat messages
    answer: str | list          # the reference; of several any one is accepted


PROMPTS = "problem question prompt input messages".split()
ANSWERS = ("answer final_answer target expected_answer ground_truth label "
           "reward_model.ground_truth solution").split()
CHOICES = ("choices", "options", "endings")
NO_ANSWER = {"", "proof", "notfound", "null", "nan", "n/a"}     # what data sets write for none
KINDS = dict(json="json", jsonl="json", ndjson="json", parquet="parquet", csv="csv", arrow="arrow")


def unpacked(value):
    """A JSON text of an object, messages or alternative answers -> what it holds. A number stays a
    text, and so does "[1, 2]", an interval."""
    try:
        held = json.loads(value)
    except (TypeError, ValueError, RecursionError):             # no text, or none of JSON
        return value
    texts = isinstance(held, list) and all(isinstance(x, str | dict) for x in held)
    return held if texts or isinstance(held, dict) else value


def lookup(record, names):
    """The first of these fields that a record has -> (name, value). "a.b" is b in a; any case."""
    for name in names:
        value = record
        for part in name.lower().split("."):
            found = value.items() if isinstance(value, dict) else ()
            value = unpacked(next((x for key, x in found if key.lower() == part), None))
        if value is not None:
            return name, value
    raise UserError(f"it has none of the fields {', '.join(names)}")


def problem_from(record, prompt_fields, answer_fields):
    """One record -> Problem; UserError, TypeError or ValueError says why it is none."""
    need(isinstance(record, dict), "it is no JSON object")
    name, prompt = lookup(record, prompt_fields)
    if isinstance(prompt, list):
        prompt = [turn for turn in prompt if turn != dict(role="system", content="")]
    turns = as_turns(prompt)
    with explained(f"{name} is neither a text nor a list of messages"):
        texts = [turn["role"] and turn["content"].strip() for turn in turns]
    need(texts and all(texts), f"{name} is empty")
    told = turns[-1]["role"] == "assistant" and last_boxed(texts[-1])
    need(not told, f"the last of {name} tells the answer")
    name, answer = lookup(record, answer_fields)
    boxed = name == "solution" and answer_fields is ANSWERS     # only its box is the answer
    answers = [answer_text(x, name, boxed) for x in as_list(answer)]
    need(answers, f"{name} is empty")
    for choices in (x for key, x in record.items() if key.lower() in CHOICES and x):
        index = re.fullmatch(r"\d|[A-J]", answers[0])
        need(not index or isinstance(answer, str) and answers[0] in choices,
             f"{name} is an index into the choices")
    "".join(texts + answers).encode()                           # a lone surrogate is no text
    return Problem(prompt, answers if len(answers) > 1 else answers[0])


def answer_text(value, name, only_boxed):
    """A number or a text -> the reference; UserError if it is neither, or says there is none."""
    text = str(value).split("####")[-1].strip()                 # GSM8K: "… #### answer"
    boxed = last_boxed(text)
    no_answer = boxed is None if only_boxed else text.lower().replace(" ", "") in NO_ANSWER
    need(type(value) in (str, int, float) and not no_answer, f"{name} holds no answer")
    return boxed or text


def read_rows(source):
    """A file, a directory or a hub data set NAME[:CONFIG[:SPLIT]] -> its records as dicts, or as
    lines of JSON."""
    name, config, split = source, "", ""
    if not Path(source).exists():                               # a path may have colons of its own
        name, config, split = (source + "::").split(":", 2)
    split = split.rstrip(":") or "train"
    path = Path(name)
    kind = KINDS.get(path.name.lower().removesuffix(".gz").rpartition(".")[2])
    need(path.exists() or not kind, f"{source}: no such data file")
    need(kind or not path.is_file(), f"{source}: of an unknown kind; known are {', '.join(KINDS)}")
    with explained(f"{source}: cannot be loaded; check name, split and network"):
        if kind == "json" and split == "train":
            raw = gzip.open(path).read() if path.suffix.lower() == ".gz" else path.read_bytes()
            listed = raw.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")  # behind a byte order mark
            return json.loads(raw) if listed else raw.splitlines()
        from datasets import load_dataset, load_from_disk
        if kind:
            # Without the filter a blank makes floats of a whole column of integers.
            how = dict(na_filter=False) if kind == "csv" else {}
            data = load_dataset(kind, data_files=str(path), split=split, **how)
        elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            data = load_from_disk(path)
            data = data[split] if isinstance(data, dict) else data
        else:
            data = load_dataset(name, config or None, split=split)
        return list(data)


def load_problems(source, prompt_field="", answer_field=""):
    """A file, a directory or a hub data set -> list[Problem]. Records that cannot be used are left
    out and counted. UserError: not found, of an unknown kind, or none can be used."""
    prompt_fields = [prompt_field] if prompt_field else PROMPTS
    answer_fields = [answer_field] if answer_field else ANSWERS
    problems = []
    left_out = []
    for number, row in enumerate(read_rows(source), 1):
        if row == b"":                                          # a blank line still counts
            continue
        record = unpacked(row)
        try:
            problems.append(problem_from(record, prompt_fields, answer_fields))
        except (UserError, TypeError, ValueError) as e:
            fields = ", ".join(record) if isinstance(record, dict) else "no fields"
            left_out.append(f"line or record {number}: {e}; it has {fields}")
    need(problems, f"{source}: holds no problems; {(left_out or ['it is empty'])[0]}")
    if left_out:
        total = len(problems) + len(left_out)
        say(f"{source}: {len(left_out)} of {total} records left out; {left_out[0]}")
    return problems


def load_prompts(source, tokenizer, cfg):
    """-> [(token ids, answer)] of the source's problems within cfg.max_prompt_tokens; UserError if
    none is."""
    limit = cfg.max_prompt_tokens
    problems = load_problems(source, cfg.prompt_field, cfg.answer_field)
    kwargs = json.loads(cfg.template_kwargs)
    prompts = [(encode(tokenizer, p.prompt, cfg.instruction, kwargs), p.answer) for p in problems]
    short = [(ids, answer) for ids, answer in prompts if 0 < len(ids) <= limit]
    need(short, f"{source}: every prompt is longer than --max-prompt-tokens {limit}")
    say(f"{source}: {len(short)} problems, {len(prompts) - len(short)} others are too long")
    return short


def as_turns(prompt):
    """A text becomes the user's turn; chat messages stay what they are."""
    return prompt if isinstance(prompt, list) else [dict(role="user", content=prompt)]


def encode(tokenizer, prompt, instruction="", template_kwargs={}):
    """A text, as the user's turn, or chat messages -> token ids of the chat template; without one,
    of the bare text. A last turn of the assistant's is continued."""
    turns = [dict(turn) for turn in as_turns(prompt)]           # the problem itself stays as it is
    users = [turn for turn in turns if turn["role"] == "user"]
    if instruction and users:
        users[-1]["content"] += f"\n{instruction}"
    go_on = turns[-1]["role"] == "assistant"
    if tokenizer.chat_template is None:
        text = "\n\n".join(turn["content"] for turn in turns)
        return tokenizer(text if go_on else text + "\n").input_ids
    with explained(f"the chat template of {tokenizer.name_or_path} refuses {str(turns)[:60]}"):
        return tokenizer.apply_chat_template(turns, return_dict=False, **template_kwargs,
                                             add_generation_prompt=not go_on,
                                             continue_final_message=go_on)


# ------------------------------------------------------------------------------------------ Reward

def last_boxed(text):
    """What the last `\\boxed{}` or `\\fbox{}` after the last `</think>` holds; None if there is no
    such, or no end to it. Without braces it is the number, as in `\\boxed 42`, or letter behind it.

    >>> last_boxed("<think> \\\\boxed{1} </think> so \\\\boxed{\\\\frac{1}{2}}.")
    '\\\\frac{1}{2}'
    """
    text = text.rsplit("</think>", 1)[-1]
    number_or_letter = r"(-?\d+(?:[.,/]\d+)*|(?<=\s)[A-Za-z](?![A-Za-z]))"
    boxes = [*re.finditer(r"\\(?:boxed|fbox)\s*(?:\{|" + number_or_letter + ")", text)]
    if not boxes:
        return None
    last = boxes[-1]
    if last[1]:
        return last[1]
    depth = 1
    for m in re.compile(r"\\.|[{}]", re.S).finditer(text, last.end()):     # \{, \} are no braces
        depth += {"{": 1, "}": -1}.get(m[0], 0)
        if depth == 0:
            return text[last.end():m.start()].strip()


# Signs that people type for LaTeX, and that Unicode's compatibility form keeps.
SIGNS = dict(zip("−–⁄÷°×·⋅±√π∞≤≥≠∪∩∈∅≈", (
    r"-|-|/|/|^{\circ} |\times |\cdot |\cdot |\pm |sqrt|\pi |\infty |\le |\ge |\ne |\cup |\cap |"
    r"\in |\emptyset |\approx ").split("|")))
# The lines of an environment, as members of a list; an array between brackets is a matrix.
LINES = (r"(?:\\\{ *)?(?<![(\[])(?<![(\[] )\\begin\{(?:cases|aligned|array)\}(?:\{\w*\})?(.*?)"
         r"\\end\{(?:cases|aligned|array)\}(?: *\.)?")
SPELLINGS = [
    (r"\\?[$€£¥₹]|(?<!\\)\\[()\[\]]|\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])", ""),  # \$18
    (r"(?:(?<!\\)\\(?:[,;:> ]|(?:q?quad|displaystyle|bf|rm|it)(?![A-Za-z]))|~|\s)+", " "),
    (r"\\(?:text[a-z]*|math(?:rm|bf|it|sf)|boldsymbol|bm|mbox|emph|underline|operatorname) *"
     r"\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}",                           # \textbf{(A)} -> (‹A)
     lambda m: " " + re.sub("[A-Za-z]+", r"‹\g<0>", m[1]) + " "),
    (r"(?<=\\\\)\[[\d.]+ ?[a-z]+\]", ""),                               # \\[4pt]
    (r"\\\\ ?(?=\\end)", ""),                                           # no line is behind it
    (LINES, lambda m: " " + re.sub(r",? *\\\\", ", ", m[1]).replace("&", " ") + " "),
    (r"(?:(?<![\\A-Za-z])|\\)sqrt *(?:(\d+)|\(([^()]*)\)|\{([^{}]*)\})", r"\\sqrt{\1\2\3}"),
    (r"(?<![\\A-Za-z])‹?(pi|(?:arc)?(?:sin|cos|tan)|log|ln)(?![A-Za-z])", r"\\\1 "),
    (r"^ *[A-Za-z]? *\\approx|\\approx.*", ""),                         # x ≈ 3.14  \frac13 ≈ 0.333
    (r"\\lg(?![A-Za-z])", r"\\log "), (r"\\varnothing", r"\\emptyset "),
    (r";|(?: *,)? +‹?and ", ", "),                                      # (0; 3]  A, B, and C
    (" +", " "), (r"(?<![., ])(?: ?\\+)? ?[.,:]? ?$", ""),             # a full stop at the end
]
# These words make another number of it (4 or seven, 5 million), or another statement.
OTHER = (r"\b(?:or|not|to|than|at|plus|minus|hundred|thousand|\w*illion|dozen|lakh|crore|if|when|"
         r"for|of|is|times|squared|cubed|factorial|(?:hal|thir|four|fif|six|seven|eigh|nin|ten)\w*|"
         r"quarters?|theta|alpha|beta|gamma|delta|lambda|omega|sigma)\b")
# A unit, or the base 7 in 1202_7, stands behind a number. Of bare letters only long words and these
# are units: 2 ab is none.
SHORT = "(?:[kcm]m|kg|mL|ft|in|lbs?|oz|hrs|mins?|secs?|mph|[ck]?m/s|km/h|per)(?![A-Za-z])"
POWER = r"(?: ?\^\{?\d\}?)?"
UNIT = (rf"(?:(?<=\d)(?<![_^]\d)_\{{?\d+\}}?|"
        rf"(?:(?<=[\d}}%])|(?<=\\pi))(?!.*{OTHER}) ?(?:\^\{{?\\circ ?\}}? ?‹?[CF]|/? ?\(?"
        rf"(?:‹[A-Za-z]+|(?<= )[a-z]{{4,}}|[a-z]{{5,}}|{SHORT}){POWER}"
        rf"(?:(?:[ /.]+‹?|‹)[A-Za-z]+{POWER})*\)?))$")
NUMBERS = [
    ("‹", ""), (r"(?<![^ ])([A-Za-z]) (?=[A-Za-z](?: |$))", r"\1"),                   # a b c
    (r"(?<=\d)(?<!\d{4})(?: |\{,\}|,\\! ?)(?=\d{3}(?![\d/]))|\\!", ""),   # 10 000  10{,}000
    (r"(?<![\d.,/^}])(\d+) (\d+)/(\d+)", r"\1\\frac{\2}{\3}"),                         # 2 1/3
    (r"^(-?\d+\.?\d*)[eE]([+-]?\d+)$", r"\1\\cdot 10^{\2}"),         # 1.5e3
    # Commas group digits only where no bracket or other comma could make them a list: x = 1,000.
    (r"^([^,([{]*[^,([{\d])?\d{1,3}(,\d{3})+([^,\d][^,]*)?$", lambda m: m[0].replace(",", "")),
]
# A choice's letter, and what the choice says unless that names another letter: (A) 12.
CHOICE = r"(?:(?:option|choice|answer):? )?\(?((?-i:[A-Z]))(?:[).:]+ ?((?!.*\b(?-i:[A-Z])\b).*))?"
# In a formula: letters that are a name and no product; i, the imaginary unit, save as an index.
NAME = (r"\\(?:begin|end)\{\w*\}|\\?(gcd|lcm|(?<![\\A-Za-z])(?:[A-Za-z]{4,}|[A-Z]{2,}))"
        r"|\\[A-Za-z]+|(?<!_)(?<!_\{)(i)")


def tidy(text):
    """An answer -> (in a spelling that math-verify reads as people do, the words of its unit)."""
    # NFKC makes full-width signs and odd spaces plain, but x² would be x2, and 2½ would be 21/2.
    text = re.sub("[˚º]", "°", text)
    text = re.sub("[⁰¹²³⁴-⁹⁺⁻ⁿ]+", r"^{\g<0>}", re.sub("[₀-₉]+", r"_{\g<0>}", text))
    text = unicodedata.normalize("NFKC", re.sub("[¼-¾⅐-⅞]", r" \g<0>", text))
    text = text.translate(str.maketrans(SIGNS))
    for old, new in SPELLINGS:
        text = re.sub(old, new, text)
    number = re.sub(UNIT, "", text)
    unit = re.findall(r"[a-z]+|\d+", text[len(number):].casefold())
    for old, new in NUMBERS:
        number = re.sub(old, new, number.strip())
    return number, unit


def words(text):
    """The words of an answer in words, as BDAC or no solution; None for a formula, as xy. A run of
    letters is a word if it has three, a capital, or one of e, i, o, which hardly name factors."""
    letters = re.fullmatch(r"[^\W\d_](?:[^\W\d_]|[ ,.'-])*", text)
    if letters and re.search(r"[^\W\d_][A-Zeio]|[A-Zeio][^\W\d_]|[^\W\d_]{3}", text):
        return sorted(re.findall(r"[^\W\d_]+", part) for part in text.casefold().split(","))


def squash(text):
    """Without the spaces and braces that separate nothing."""
    text = re.sub(r"\{(\w)\}", r"\1", text)
    return re.sub(r"(?<![A-Za-z0-9]) +| +(?![A-Za-z0-9])", "", text)


def formula(text, any_case):
    """A formula -> sympy's expression; an error where latex2sympy cannot read all of it. `parse` of
    math-verify would take a part of it, or 2t for 2: t is a unit to it."""
    from latex2sympy2_extended import NormalizationConfig, latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    def symbol(m):
        return rf"\text{{{m[1]}}}" if m[1] else "{I}" if m[2] else m[0]
    text = re.sub(NAME, symbol, text)
    if text.count(r"\pm") == 1:                                 # two answers
        text = text.replace(r"\pm", "+") + ", " + text.replace(r"\pm", "-")
    spelling = NormalizationConfig(malformed_operators=True, nits=True, boxed="none")
    case = ConversionConfig(lowercase_symbols=any_case)
    return latex2sympy(text, None, True, normalization_config=spelling, conversion_config=case)


def equal(boxed, reference):
    """Do both say the same? Choices by their letter, words as words, formulas by math-verify."""
    if all(re.fullmatch("-?[0-9]{1,18}", text) for text in (boxed, reference)):
        return int(boxed) == int(reference)                     # needs no computer algebra
    if squash(boxed) == squash(reference):
        return squash(boxed) != ""
    from math_verify import verify
    (boxed, unit), (reference, its_unit) = tidy(boxed), tidy(reference)
    if unit and its_unit and unit != its_unit:                  # 5 AM, 5 PM
        return False
    one_percent = boxed.endswith("%") != reference.endswith("%")        # 12.5\% and 12.5
    if one_percent and equal(boxed.rstrip(r" \%"), reference.rstrip(r" \%")):
        return True
    if choice := re.fullmatch(CHOICE, reference, re.I):
        reference = choice[1]
    if choice := re.fullmatch(CHOICE, boxed, re.I):
        boxed = choice[1] if re.fullmatch("[A-Z]", reference) else choice[2] or choice[1]
    if squash(boxed) == squash(reference):
        return squash(boxed) != ""
    if words(boxed) or words(reference):
        return words(boxed) == words(reference)
    if re.search(r"(?<!\^)(?:\d_|(?<![a-z] )\b\d+ \d)", f"{boxed}, {reference}"):
        return False                        # to math-verify 4_7 is 4, and 7 2 0 0 a product: 0

    # R and r are the same letter, unless an answer has both: R - r.
    commands = r"\\(?:begin|end)\{\w*\}|\\[A-Za-z]+"
    letters = [re.sub(commands, "", text) for text in (boxed, reference)]
    any_case = all(len(set(x)) == len(set(x.lower())) for x in letters)
    gold, answer = formula(reference, any_case), formula(boxed, any_case)
    if not verify(gold, answer, allow_set_relation_comp=True, timeout_seconds=None):
        return False
    # It rounds to six places, and so 2^-100 would be 2^-99; and \infty!! would be any number.
    numbers = getattr(gold, "is_number", False) and getattr(answer, "is_number", False)
    if gold == answer or not numbers:
        return True
    return bool(abs((gold - answer).doit().n()) <= 1e-6 * abs(gold.doit().n()))


def verify_worker(pipe, seconds):
    """Answer (boxed, reference) pairs from the pipe with True or False until it closes.

    The time limit is the kernel's: after `seconds` of CPU time SIGPROF ends the process, whatever C
    code it is in. math-verify's own timeouts have to wait for the interpreter, and are off."""
    logging.disable()                                           # math-verify's warnings
    signal.signal(signal.SIGINT, signal.SIG_IGN)                # Ctrl-C is the trainer's to handle
    resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30))
    while True:
        signal.setitimer(signal.ITIMER_PROF, seconds)           # of which waiting takes none
        try:
            right = equal(*pipe.recv())
        except EOFError:                                        # the trainer is gone
            return
        except Exception:                                       # sympy raises nearly all there are
            right = False
        with suppress(BrokenPipeError):
            pipe.send(right)


class Verifier:
    """math-verify in worker processes. `killed` counts answers that ran into a limit: scored 0."""

    def __init__(self, workers=max(1, min(32, os.cpu_count() // WORLD)), seconds=5.0):
        self.seconds, self.killed = seconds, 0
        self.idle = [self.start() for _ in range(workers)]

    def start(self):
        """A new worker -> our end of its pipe."""
        # The fork server imports once what workers need: one starts in .1 s, without GPU state.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed", "math_verify"])
        ours, theirs = context.Pipe()
        with explained("a verifier process does not start: was this file edited meanwhile? Or is "
                       "TMPDIR's name too long?"):
            args = theirs, self.seconds
            context.Process(target=verify_worker, args=args, daemon=True).start()
            theirs.close()
            ours.send((r"\frac{1}{2}", "0.5"))
            need(ours.recv(),
                 "math-verify fails at 1/2 = 0.5: is it installed, and has it room in 4 GiB?")
        return ours

    def check(self, pair):
        """Ask an idle worker whether the two are equal."""
        pipe = self.idle.pop()
        if pipe.poll():                                         # idle, it can only say that it died
            pipe = self.start()                                 # of the last pair, or by itself
        right = False
        try:
            pipe.send(pair)
            right = pipe.recv()
        except (EOFError, OSError):                             # a limit ended it
            self.killed += 1
        self.idle.append(pipe)
        return right

    def score(self, responses, answers):
        """1.0 where the last boxed answer equals the reference, else 0.0; in order. If an answer is
        a list, any one of it counts."""
        pairs = []                                              # of a response: (boxed, reference)
        for response, answer in zip(responses, answers, strict=True):
            boxed = last_boxed(response)
            pairs.append([(boxed, reference) for reference in as_list(answer) if boxed])
        distinct = set(sum(pairs, []))
        with ThreadPool(len(self.idle)) as threads:             # each waits for a worker of its own
            right = dict(zip(distinct, threads.map(self.check, distinct, 1)))
        return [float(any(right[pair] for pair in some)) for some in pairs]


# ---------------------------------------------------------------------------------------- Samplers

@dataclass
class HFSampler:
    """transformers' `generate` of the model in training itself; for CPUs and small models."""
    model: object
    eos: list
    precision: str = "fp32"

    def load_weights(self, model):
        self.model = model

    def sleep(self):
        """Nothing to give back: the weights are the trainer's own."""

    def generate(self, prompts, n, max_tokens, temperature=1.0, top_p=1.0, seed=0):
        """n samples of each prompt (ids) -> list[Sample], in order. Temperature 0 is greedy."""
        from transformers import GenerationConfig, TopPLogitsWarper
        torch.manual_seed(seed)
        columns = []                                            # log π of each position's tokens
        def choose(ids_BL, logits_BV):
            """`generate` calls this at each position, and takes the largest of what it returns."""
            logits_BV = logits_BV / (temperature or 1.0)
            if top_p < 1:
                logits_BV = TopPLogitsWarper(top_p)(ids_BL, logits_BV)
            logp_BV = logits_BV.log_softmax(-1)
            y_B1 = logp_BV.exp().multinomial(1) if temperature else logp_BV.argmax(-1, keepdim=True)
            columns.append(logp_BV.gather(1, y_B1))
            return logp_BV.scatter(1, y_B1, 1.0)                # all others are at most 0
        # `generate` takes unset fields from the checkpoint's.
        own = self.model.generation_config
        self.model.generation_config = GenerationConfig(
            do_sample=False, max_new_tokens=max_tokens, eos_token_id=self.eos,
            pad_token_id=self.eos[0])                           # `end` cuts it off
        self.model.eval()                   # or gradient checkpointing would do without a cache
        rows = [torch.tensor(p) for p in prompts for _ in range(n)]
        samples = []
        longest = max_tokens + max(map(len, prompts), default=0)
        size = max(1, min(256, 2**14 // longest))       # rows of logits, and tokens of cache
        for part in progress(batched(rows, size), "sampling"):
            ids_BL = pad_sequence(part, True, -1, "left").to(self.model.device)
            seen_BL = (ids_BL >= 0).long()                      # not the padding
            columns.clear()
            with autocast(self.model.device, self.precision):
                out_BL = self.model.generate(ids_BL.clamp(min=0), attention_mask=seen_BL,
                                             logits_processor=[choose])
            ids_BT = out_BL[:, -len(columns):]
            logp_BT = torch.cat(columns, 1)
            for prompt, ids, logp in zip(part, ids_BT.tolist(), logp_BT.tolist()):
                end = next((t + 1 for t, y in enumerate(ids) if y in self.eos), None)
                samples.append(Sample(prompt.tolist(), ids[:end], logp[:end], end is None))
        self.model.generation_config = own
        self.model.train()
        return samples


class VLLMSampler:
    """vLLM in this process. It holds its own copy of the weights: `load_weights` is due after every
    change of the trainer's, and after every `sleep`."""

    def __init__(self, path, max_tokens, eos, gpu_memory=0.6, precision="fp32"):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"      # the engine in this process: no IPC
        os.environ["VLLM_FLOAT32_MATMUL_PRECISION"] = torch.get_float32_matmul_precision()
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM
        self.eos, cuda = eos, torch.cuda.is_available()
        with explained(f"vLLM does not start with {path}; change --gpu-memory, lower "
                       "--max-response-tokens, or take --sampler hf"):
            self.llm = LLM(
                model=path, dtype=DTYPES[precision], max_model_len=max_tokens,
                enforce_eager=not cuda, enable_sleep_mode=cuda,
                generation_config="vllm", logprobs_mode="processed_logprobs", watermark=0.05,
                distributed_executor_backend="external_launcher" if WORLD > 1 else None,
                hf_overrides={"head_dtype": "float32"}, gpu_memory_utilization=gpu_memory,
                kv_cache_memory_bytes=None if cuda else 2**30)
        self.sleep()

    def sleep(self):
        """Give the GPU back to the trainer: drop weights and KV cache."""
        self.llm.sleep(level=2)

    def load_weights(self, model):
        """Copy the trainer's parameters, and forget the prefixes cached under the old ones."""
        torch.cuda.empty_cache()                         # what torch holds unused, vLLM cannot have
        with explained("vLLM does not wake up; lower --gpu-memory"):
            self.llm.wake_up(tags=["weights"])
            weights = model.state_dict().items()
            self.llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=weights))
            self.llm.wake_up(tags=["kv_cache"])
            self.llm.reset_prefix_cache()                       # vLLM never does this by itself

    def generate(self, prompts, n, max_tokens, temperature=1.0, top_p=1.0, seed=0):
        """n samples of each prompt (ids) -> list[Sample], in order. Temperature 0 is greedy."""
        from transformers import set_seed
        from vllm import SamplingParams
        set_seed(seed % 2**32)      # vLLM draws from torch's, on a GPU seeds requests from numpy's
        params = SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_tokens,
                                stop_token_ids=self.eos, logprobs=0, flat_logprobs=True,
                                detokenize=False)
        rows = [dict(prompt_token_ids=p) for p in prompts for _ in range(n)]
        outs = self.llm.generate(rows, params, use_tqdm=RANK == 0 and sys.stderr.isatty())
        return [Sample(out.prompt_token_ids, o.token_ids, o.logprobs.logprobs,
                       o.finish_reason == "length") for out in outs for o in out.outputs]


# -------------------------------------------------------------------------------------------- Head

class HeadStats(torch.autograd.Function):
    """logp_entropy(x @ W.T, targets), a chunk of rows at a time. The backward computes each chunk's
    logits again, so that the peak does not grow with N."""

    @staticmethod
    def forward(ctx, x_ND, W_VD, targets_N, entropy_grad, chunk, kappa):
        parts = [logp_entropy(x_CD @ W_VD.T, y_C, kappa)
                 for x_CD, y_C in zip(x_ND.split(chunk), targets_N.split(chunk))]
        stats = tuple(torch.cat(column) for column in zip(*parts))
        ctx.save_for_backward(x_ND, W_VD, targets_N, *stats[:2])
        ctx.settings = entropy_grad, chunk
        ctx.mark_non_differentiable(*stats[1 + entropy_grad:])
        return stats

    @staticmethod
    def backward(ctx, g_logp_N, g_entropy_N, *_):
        x_ND, W_VD, targets_N, logp_N, entropy_N = ctx.saved_tensors
        entropy_grad, chunk = ctx.settings
        g_x_ND = torch.zeros_like(x_ND)
        g_W_VD = torch.zeros_like(W_VD)
        needed_N = (g_logp_N != 0) | entropy_grad               # a dropped token costs no backward
        for n_C in needed_N.nonzero().squeeze(1).split(chunk):
            x_CD = x_ND[n_C]
            y_C1 = targets_N[n_C, None]
            logp_C1 = logp_N[n_C, None]
            z_CV = x_CD @ W_VD.T
            z_CV += logp_C1 - z_CV.gather(1, y_C1)              # now log π_v
            pi_CV = z_CV.exp()
            if entropy_grad:                                    # ∂H / ∂z_v = -π_v (log π_v + H)
                h_CV = (z_CV + entropy_N[n_C, None]) * pi_CV * g_entropy_N[n_C, None]
            # ∂ log π_y / ∂z_v = δ_vy - π_v; 1 - π_y is -expm1(log π_y), where nothing cancels.
            dz_CV = pi_CV.scatter_(1, y_C1, logp_C1.expm1()).mul_(-g_logp_N[n_C, None])
            if entropy_grad:
                dz_CV -= h_CV
            g_x_ND[n_C] = dz_CV @ W_VD
            g_W_VD.addmm_(dz_CV.T, x_CD)
        return g_x_ND, g_W_VD, None, None, None, None


def token_stats(hidden_ND, lm_head, targets_N, temperature=1.0, entropy_grad=False, chunk=256,
                kappa=False):
    """log π(y), H[, κ] of softmax(lm_head(hidden) / temperature), as logp_entropy; nats, fp32.

    Never holds more than a few tensors of one chunk of logits, forward or backward. Differentiable
    in hidden and lm_head.weight; the entropy has a gradient only with `entropy_grad`. UserError: a
    head with a bias."""
    need(getattr(lm_head, "bias", None) is None,
         "the model's output head has a bias, which the loss leaves out")
    with torch.autocast(hidden_ND.device.type, enabled=False):  # the head is fp32 in autocast, too
        return HeadStats.apply(hidden_ND.float() / temperature, lm_head.weight.float(), targets_N,
                               entropy_grad, chunk, kappa)


# -------------------------------------------------------------------------- Models and checkpoints

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device, precision):
    """The body in this precision; masters, head and logits are fp32."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def max_gap(device, precision):
    """The mean |Δ log π| of sampler and trainer over which a run stops. On the tiny preset fp32
    agrees with fp32 to 2e-7; weights rounded to bf16 cost 5e-4, temperature 0.99 1e-3, a forgotten
    sync 7e-3. Between two bf16 bodies rounding alone makes 1e-2: there only gross errors show."""
    return 1e-4 if device.type == "cpu" and precision == "fp32" else 0.1


def load_model(path, device):
    """A Hugging Face causal LM -> (model, tokenizer, ids that end a response): fp32, no dropout."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    with explained(f"model {path}: cannot be loaded; check path and network"):
        tokenizer = AutoTokenizer.from_pretrained(path)
        config = AutoConfig.from_pretrained(path)
        for name, value in vars(config).items():
            if re.search("drop|jitter", name) and isinstance(value, float):
                setattr(config, name, 0.0)                      # with noise r ≠ 1 at equal weights
        model, info = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32,
                                                           output_loading_info=True)
        model.to(device)
    lost = info["missing_keys"]
    need(not lost, f"model {path}: {len(lost)} of its tensors are missing, as {sorted(lost)[:1]}")
    rows = model.get_input_embeddings().num_embeddings
    need(len(tokenizer) <= rows,
         f"model {path}: its tokenizer has {len(tokenizer)} tokens, its embedding {rows}")
    need(all(p.isfinite().all() for p in model.parameters()),
         f"model {path}: its weights hold NaN or infinity; get another copy")
    eos = {tokenizer.eos_token_id, *as_list(model.generation_config.eos_token_id)} - {None}
    need(eos, f"model {path}: neither tokenizer nor generation config has an end-of-sequence token")
    text = "Let x = 3.\n\n  Then 2x = 6"                        # the wrong class loses white space
    need(text in tokenizer.decode(tokenizer(text).input_ids),
         f"model {path}: its tokenizer does not decode what it encodes; check its files")
    if device.type == "cuda":
        model.gradient_checkpointing_enable()
    return model.train(), tokenizer, sorted(eos)


def check_head(model):
    """UserError if more is done to the logits than the head does: `token_stats` leaves it out."""
    found = [f"{key} {value}" for key, value in vars(model.config.get_text_config()).items()
             if re.match("(?!attn).*logit.*(cap|scal)|.*head_mult", key) and value not in (None, 1)]
    need(not found, f"model {model.name_or_path}: has {', '.join(found)}: the loss leaves that out")


def make_sampler(cfg, model, eos, longest):
    context = getattr(model.config.get_text_config(), "max_position_embeddings", longest)
    need(longest <= context, f"prompt + response: {longest} tokens, but the context of {cfg.model} "
                             f"is {context}; lower --max-response-tokens")
    if cfg.sampler == "vllm":
        return VLLMSampler(cfg.model, longest, eos, cfg.gpu_memory, cfg.precision)
    return HFSampler(model, eos, cfg.precision)


def free_memory(device):
    """Bytes that this process may have, its weights included. On a CPU those of an fp32 file still
    lie in the page cache, which counts as free. Others do not: the plan has them twice."""
    if device.type == "cuda":
        torch.cuda.empty_cache()                                # what loading has left behind
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_allocated(device)
    free = int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    container = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):                         # no container, or its limit is max
        limit = int((container / "memory.max").read_text())
        used = re.search(r"^anon (\d+)", (container / "memory.stat").read_text(), re.M)
        free = min(free, limit - int(used[1]))
    return free // WORLD                                        # as if all were on this machine


def step_memory(model, precision, tokens):
    """The peak of an update with micro-batches of so many tokens -> {part: bytes}, which add up."""
    config = model.config.get_text_config()
    V, D = model.get_output_embeddings().weight.shape
    mlp = getattr(config, "intermediate_size", None) or 4 * D
    weights = 4 * model.num_parameters()
    # A layer saves four tensors as wide as its MLP, in the body's precision, and some ten as wide
    # as its hidden state. The attention's matrix is never held: it is computed in tiles.
    layer = tokens * (36 * D + 4 * DTYPES[precision].itemsize * mlp)
    copies = 0                                                  # autocast's, of the body's weights
    if precision != "fp32":
        copies = 2 * (model.base_model.num_parameters() - V * D)
    saved = 1.2 * config.num_hidden_layers * layer + copies     # malloc adds about a fifth
    if model.is_gradient_checkpointing:                         # only the layers' inputs are saved
        saved = config.num_hidden_layers * 4 * tokens * D
    # The head's gradient, five chunks of logits, three times the hidden states.
    head = 4 * (V * D + 5 * 256 * V + 3 * tokens * D)
    return dict(weights=weights, gradients=weights, Adam=2 * weights, activations=saved,
                working=max(head, copies + layer, 2 * layer))


def plan_memory(model, cfg, longest):
    """Set cfg.micro_tokens, if it is 0, to the largest budget that fits, and in any case to no more
    than a mini-batch and no less than a row; print the plan. UserError if no row fits."""
    gather("all have loaded their weights")
    free = min(gather(free_memory(model.device)))
    rows = math.ceil(cfg.minibatch_prompts * cfg.group_size / WORLD)
    tokens = max(longest, min(cfg.micro_tokens or rows * longest, rows * longest))
    parts = step_memory(model, cfg.precision, tokens)
    if cfg.sampler == "vllm":
        need(parts["weights"] + parts["Adam"] < (1 - cfg.gpu_memory) * free,
             f"--gpu-memory {cfg.gpu_memory}: leaves too little of {free / 2**30:.1f} GiB for "
             "weights and Adam; lower it")
        free -= 2**30                                           # which vLLM keeps asleep
        if model.device.type == "cpu":
            free -= parts["weights"]                            # vLLM's own copy
    room = 0.9 * free                                           # the allocators waste some
    while sum(parts.values()) > room and rows > 1 and not cfg.micro_tokens:
        rows = math.ceil(rows / 2)      # in halves: free memory then rarely changes how it is cut
        tokens = rows * longest
        parts = step_memory(model, cfg.precision, tokens)
    line = " + ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
    line += (f" = {sum(parts.values()) / 2**30:.2f} of {room / 2**30:.2f} GiB, nine tenths of what "
             f"is free; micro-batches of {tokens:,} tokens")
    remedy = "lower --micro-tokens" if tokens > longest else "lower --max-response-tokens"
    if 4 * parts["weights"] > room:
        remedy = "take a smaller --model"
    need(sum(parts.values()) <= room, f"out of memory: {line}; {remedy}")
    cfg.micro_tokens = tokens
    say(f"memory: {line}")


def rehearse(model, optimizer, cfg, longest):
    """Forward and backward of the largest micro-batch, Adam's moments in place: what does not fit
    fails now, not in an hour. At lr 0 it leaves weights and optimizer as they were."""
    rows = math.ceil(cfg.micro_tokens / longest)
    response = [0] * (cfg.micro_tokens // rows - 1)
    with explained(f"{cfg.micro_tokens} tokens do not fit: lower --micro-tokens or "
                   "--max-response-tokens"):
        sum_gradients(model)                                    # there is none yet: zeros
        optimizer.step()                                        # allocates moments, moves nothing
        logp_BT, *_ = forward(model, [Sample([0], response, [], True)] * rows, cfg)
        logp_BT.sum().backward()
    optimizer.zero_grad()
    for state in optimizer.state.values():                      # the moments stay in place: made
        state["step"].zero_()                                   # later, they lie amid vLLM's memory


LOGS = "metrics.jsonl", "samples.jsonl"


def append(path, record):
    if RANK == 0:
        with open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps(record, ensure_ascii=False) + "\n")


@contextmanager
def whole_file(path):
    """A file to write beside `path`, flushed to the disk, then renamed to it: never half of one."""
    new = path.with_name(path.name + ".new")
    with explained(f"{path}: not written, the one before is whole; is the disk full?"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(new, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(new, path)


def rewrite(path, text):
    if RANK == 0:
        with whole_file(path) as f:
            f.write(text.encode())


def save(out, model, optimizer, scaler, tokens, **state):
    """The checkpoint; and at most 16,384 tokens of the last step's updates, for the figures."""
    import numpy as np
    if RANK > 0:
        return
    with whole_file(out / "checkpoint/state.pt") as f:
        torch.save(dict(state, model=model.state_dict(), optimizer=optimizer.state_dict(),
                        scaler=scaler.state_dict()), f)
    if tokens:
        stride = 1 + len(tokens["rho"]) // 2**14
        with whole_file(out / "tokens.npz") as f:
            np.savez(f, **{name: x_N[::stride].numpy() for name, x_N in tokens.items()})


def begin(out, cfg, model, optimizer, scaler, problems):
    """Begin a run's records, or load its last checkpoint -> (steps done, cursor). What was logged
    after the checkpoint is cut off."""
    if not cfg.resume:
        rewrite(out / "config.json", json.dumps(vars(cfg), indent=1) + "\n")
        for name in LOGS:                                       # of a run without a checkpoint yet
            (out / name).unlink(missing_ok=True)
        return 0, 0
    path = out / "checkpoint/state.pt"
    optimizer.state.clear()
    with explained(f"--resume: {out} is damaged, or {model.name_or_path} has changed; put them "
                   "back, or start a run anew"):
        # torch.load takes flipped bits silently.
        need(not zipfile.ZipFile(path).testzip(), f"--resume: {path} is damaged; start anew")
        state = torch.load(path, map_location=model.device, weights_only=True)
        need(state["problems"] == problems, "--resume: problems or tokenizer are not those "
                                            "that the run began with; put them back, or start anew")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        for name in LOGS:
            lines = (out / name).read_text("utf-8").split("\n")[:-1]   # the last one may be cut off
            lines = [line + "\n" for line in lines if json.loads(line)["step"] <= state["step"]]
            rewrite(out / name, "".join(lines))
    return state["step"], state["cursor"]


def finish(out, model, tokenizer):
    """The trained model in Hugging Face format, and the figures."""
    if RANK > 0:
        return
    with explained(f"{out}/model: not written; is the disk full? Then --resume writes it"):
        model.save_pretrained(out / "model")
        tokenizer.save_pretrained(out / "model")
    plot([out], out)
    say(f"done: {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


# -------------------------------------------------------------------------------------- Evaluation

BENCHMARKS = {  # data set, responses a problem, tokens a response (§4.1)
    "aime24": ("HuggingFaceH4/aime_2024::train", 32, 32768),
    "aime25": ("math-ai/aime25::test", 32, 32768),
    "hmmt25": ("MathArena/hmmt_feb_2025::train", 32, 16384),
    "math500": ("HuggingFaceH4/MATH-500::test", 4, 16384),
    "amc23": ("math-ai/amc23::test", 32, 16384),
    "olympiadbench": ("Hothan/OlympiadBench:OE_TO_maths_en_COMP:train", 4, 16384),
}


def evaluate(sampler, verifier, tokenizer, prompts, k, max_tokens, temperature=0.0, top_p=1.0,
             seed=0):
    """k responses to each (ids, answer) -> a list a problem of (score, length, cut off)."""
    samples = respond({}, sampler, verifier, tokenizer, prompts[RANK::WORLD], k, max_tokens,
                      temperature, top_p=top_p, seed=seed + RANK)
    rows = [(s.reward, len(s.response), s.truncated) for s in samples]
    parts = gather(batched(rows, k))
    return [parts[p % WORLD][p // WORLD] for p in range(len(prompts))]


def summary(problems):
    """avg@k: the mean over problems of the share of right responses; that mean's standard error."""
    means = [statistics.fmean(score for score, _, _ in rows) for rows in problems]
    _, lengths, cut = zip(*sum(problems, []))
    error = statistics.stdev(means) / len(means)**0.5 if len(means) > 1 else None
    return dict(problems=len(means), k=len(problems[0]), accuracy=statistics.fmean(means),
                standard_error=error, length=statistics.fmean(lengths),
                truncated=statistics.fmean(cut))


def greedy_accuracy(sampler, verifier, tokenizer, heldout, cfg):
    rows = evaluate(sampler, verifier, tokenizer, heldout, 1, cfg.max_response_tokens)
    return summary(rows)["accuracy"]


def parse_eval(argv):
    """Command line of eval -> Config: `data` holds the benchmarks, `group_size` k, and `out` the
    file of all scores."""
    defaults = dict(data=", ".join(BENCHMARKS), group_size=0, max_prompt_tokens=math.inf,
                    max_response_tokens=0, temperature=0.6, gpu_memory=0.85)
    names = ("model prompt_field answer_field instruction template_kwargs "
             "max_response_tokens temperature precision sampler gpu_memory seed")
    ap = parser("eval", names.split(), **defaults)
    ap.add_argument("--benchmarks", dest="data",
                    help=f"of these, and data of yours as for --data [{defaults['data']}]")
    ap.add_argument("--k", dest="group_size", type=int,
                    help="responses a problem; 0 here and for --max-response-tokens: as in "
                         "the paper (§4.1) [0]")
    ap.add_argument("--out", help="the file of all scores [runs/eval-MODEL.json]")
    given = defaults | vars(ap.parse_args(argv))
    given.setdefault("out", f"runs/eval-{Path(given.get('model', Config.model)).name}.json")
    cfg = Config(**given)
    least = min(cfg.group_size, cfg.max_response_tokens, cfg.temperature)
    need(least >= 0 and cfg.temperature < math.inf,
         "--k, --max-response-tokens and --temperature: must be at least 0, and finite")
    return cfg


def evaluation(cfg):
    """The paper's protocol (§4.1): a line a benchmark of cfg.data, cfg.group_size responses a
    problem, top-p 0.95 (authors' code). Every score goes into cfg.out under a key of all that
    decides on it; what is in there already is not sampled again."""
    device = start(cfg)
    out = Path(cfg.out)
    with explained(f"{out}: not a file of eval's; name another with --out"):
        done = json.loads(out.read_text()) if out.exists() else {}
        need(all("responses" in found for found in done.values()), f"{out}: holds something else")
    where = torch.device("cpu") if cfg.sampler == "vllm" else device     # vLLM has its own copy
    model, tokenizer, eos = load_model(cfg.model, where)
    weights = sum(p.sum().item() for p in model.parameters())
    plan = []
    for name in filter(None, map(str.strip, cfg.data.split(","))):
        source, k, limit = BENCHMARKS.get(name, (name, 32, 16384))
        prompts = load_prompts(source, tokenizer, cfg)
        how = cfg.group_size or k, cfg.max_response_tokens or limit, cfg.temperature, 0.95, cfg.seed
        key = f"{name} {how} {crc32(repr((prompts, weights, cfg.precision)).encode()):x}"
        plan.append((name, key, prompts, how))
    longest = max(how[1] + len(ids) for _, _, prompts, how in plan for ids, _ in prompts)
    sampler, verifier = make_sampler(cfg, model, eos, longest), Verifier()
    sampler.load_weights(model)
    say("benchmark                     problems   k   avg@k ± s.e.   length  cut off")
    for name, key, prompts, how in plan:
        if key not in done:
            rows = evaluate(sampler, verifier, tokenizer, prompts, *how)
            done[key] = summary(rows) | dict(responses=rows)
            rewrite(out, json.dumps(done))
        got = done[key]
        say(f"{name[-30:]:30}{got['problems']:8}{got['k']:4}{got['accuracy']:8.1%} "
            f"{float(got['standard_error'] or 0):7.1%}{got['length']:9.1f}{got['truncated']:9.1%}")
    mean = statistics.fmean(done[key]["accuracy"] for _, key, _, _ in plan)
    say(f"{'mean':42}{mean:8.1%}\nevery score: {out}")


# ----------------------------------------------------------------------------------------- Figures

def load_runs(paths):
    """Directories of runs -> {label: {directory: metrics}}. A run's label is the name of its
    directory without the seed, so that runs/dapo-1 and runs/dapo-2 share one."""
    labels = {}
    for path in [Path(x).resolve() for x in paths]:
        runs = labels.setdefault(re.sub(r"-\d+$", "", path.name), {})
        with explained(f"{path}: holds no run"):
            lines = (path / "metrics.jsonl").read_text("utf-8").split("\n")
            runs[path] = [json.loads(line) for line in lines[:-1]]      # the last may be cut off
    return labels


# Okabe and Ito's
COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"


def curves(labels, path):
    """Fig. 2, a line a run in its label's colour; and reward against entropy."""
    from matplotlib.figure import Figure
    fig = Figure((14, 7.5), layout="constrained")
    panels = [("step", "entropy"), ("step", "grad_norm"), ("step", "erc_drop"),
              ("step", "reward"), ("step", "accuracy"), ("entropy", "reward")]
    for ax, (x, y) in zip(fig.subplots(2, 3).flat, panels):
        for i, (label, runs) in enumerate(labels.items()):
            points = []
            for metrics in runs.values():
                points += [(m[x], m[y]) for m in metrics if x in m and y in m]
                points.append((math.nan, math.nan))             # no line from one run to the next
            mark = "-" if x == "step" else "."
            ax.plot(*zip(*points), mark, ms=3, alpha=0.7, color=COLOURS[i % 7], label=label)
        ax.set(title=f"{y} against {x}", xlabel=x)
    ax.legend()
    fig.savefig(path, dpi=110)


def token_panels(labels, path):
    """Figs. 1a, 3, 4, 1c from tokens.npz, the updates of one step: a row a label, its first run.
    The colours show which tokens are out of the band, also where they are not dropped: in a run
    without ERC, or if one-sided ERC keeps them."""
    import numpy as np
    from matplotlib.figure import Figure
    files = [next(iter(runs)) / "tokens.npz" for runs in labels.values()]
    files = [file for file in files if file.exists()]
    if not files:
        say(f"{path} is not drawn: no run has a tokens.npz yet")
        return
    fig = Figure((19, 4.5 * len(files)), layout="constrained")
    panels = [("π_old", "rho", "1a"), ("π_old", "π_θ", "3"), ("π_θ", "entropy", "4")]
    for file, (*axes, histogram) in zip(files, fig.subplots(len(files), 4, squeeze=False)):
        with explained(f"{file} is damaged, or of another version"):
            t = dict(np.load(file))
            t["π_old"] = np.exp(t["old_logp"])
            t["π_θ"] = np.exp(t["logp"])
            t["all tokens"] = np.ones_like(t["rho"])
            for ax, (x, y, number) in zip(axes, panels):
                for colour, name in zip(COLOURS, ("all tokens", "erc_high", "erc_low", "ppo_clip")):
                    mask_N = t[name] > 0
                    ax.plot(t[x][mask_N], t[y][mask_N], ".", ms=3, color=colour,
                            label=f"{name}: {mask_N.mean():.1%}")
                ax.set(title=f"{file.parent.name}: Fig. {number}", xlabel=x, ylabel=y)
            axes[0].set(yscale="log", ylim=np.quantile(t["rho"], (0.001, 0.999)) * (0.99, 1.01))
            axes[1].legend(markerscale=3)
            r_N = t["π_θ"] / t["π_old"]
            histogram.hist(r_N, 80, range=np.quantile(r_N, (0.001, 0.999)), log=True)
            histogram.set(title=f"{file.parent.name}: Fig. 1c", xlabel="r", ylabel="tokens")
    fig.savefig(path, dpi=100)


def plot(runs, out):
    """Draw the paper's figures from the records of runs."""
    labels, out = load_runs(runs), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    curves(labels, out / "curves.png")
    token_panels(labels, out / "tokens.png")


# ------------------------------------------------------------------------------ The tiny stand-in

def build_tiny(path, target=0.30, seed=0):
    """The tiny preset's base model and problems: 0.5 M parameters, Qwen2's architecture, bytes for
    tokens, warmed up on two-digit sums of which two in three are wrong, half of these by a
    forgotten or an invented carry. So it samples the right answer among others, but often not
    first. It slows down towards an expected reward of `target`, and stops there: after a fixed
    number of steps, the last digits of a machine's arithmetic would decide how far it got."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
    say(f"building the tiny base model in {path}, once")
    torch.manual_seed(seed)
    rng = random.Random(seed)
    # Qwen2's own class, without merges: beside a qwen2 config transformers makes it of any other.
    tokens = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|user|>", "<|assistant|>"]
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[],
        additional_special_tokens=tokens[-2:],
        chat_template="{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
                      "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    model = Qwen2ForCausalLM(Qwen2Config(               # head dimension 32: vLLM knows none smaller
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    rng.shuffle(pairs)
    step = 0
    reward = 0.0                                        # its expectation: P(the right response)
    while reward < target:
        step += 1
        samples, right = [], []
        for a, b in rng.choices(pairs[512:], k=64):
            carry = -10 if a % 10 + b % 10 > 9 else 10
            slip = rng.choice([0, carry, rng.choice([-2, -1, 1, 2])])
            answer = tokenizer(rf"\boxed{{{a + b + slip}}}<|endoftext|>").input_ids
            samples.append(Sample(encode(tokenizer, f"{a}+{b}="), answer, [], False))
            right.append(slip == 0)
        logp_BT, _, mask_BT, _ = forward(model, samples, Config(precision="fp32"))
        (-logp_BT[mask_BT].mean()).backward()
        slow_down = 0.1 + 2 * (1 - reward / target)
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, step / 50, slow_down)
        optimizer.step()
        optimizer.zero_grad()
        reward = 0.9 * reward + 0.1 * logp_BT[right].sum(1).exp().mean().item()
    new = path.with_name(path.name + ".new")             # so that a directory of that name is whole
    model.save_pretrained(new)
    tokenizer.save_pretrained(new)
    lines = [json.dumps({"problem": f"{a}+{b}=", "answer": str(a + b)}) + "\n" for a, b in pairs]
    rewrite(new / "test.jsonl", "".join(lines[:512]))
    rewrite(new / "train.jsonl", "".join(lines[512:]))
    os.rename(new, path)


# -------------------------------------------------------------------------------------------- main

def on_all_gpus(argv):
    """The command that runs this one with a process for each visible GPU."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
            str(torch.cuda.device_count()), __file__, *argv]


def main(argv=None):
    """Run a command line -> exit status: 0 done, 2 to be put right, 130 Ctrl-C, 143 SIGTERM."""
    def terminate(*_):
        raise KeyboardInterrupt(143)
    signal.signal(signal.SIGTERM, terminate)
    argv = sys.argv[1:] if argv is None else argv
    sys.stdout = sys.stdout or open(os.devnull, "w")            # it may be closed
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")                # a terminal without ρ gets a ?
    try:
        if argv[:1] == ["plot"]:
            ap = parser("plot", [])
            ap.add_argument("runs", nargs="+", metavar="RUN", help="directories that training left")
            ap.add_argument("--out", default=".", metavar="DIR", help="where the pictures go [.]")
            plot(**vars(ap.parse_args(argv[1:])))
            return 0
        evaluating = argv[:1] == ["eval"]
        cfg = parse_eval(argv[1:]) if evaluating else parse_train(argv)
        if torch.cuda.device_count() > 1 and not launched:
            say(f"one process a GPU: {' '.join(on_all_gpus(argv))}")
            os.execv(sys.executable, on_all_gpus(argv))
        elif evaluating:
            evaluation(cfg)
        else:
            train(cfg)
        return 0
    except (UserError, OSError) as e:                   # a full disk, no permission: names the file
        if RANK > 0:                                         # if rank 0 found it too, torchrun ends
            signal.signal(signal.SIGTERM, signal.SIG_DFL)       # this one meanwhile
            time.sleep(10)
        print(f"erc: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        if RANK == 0:
            print("erc: interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return e.args[0] if e.args else 130


if __name__ == "__main__":
    sys.exit(main())
