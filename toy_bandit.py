"""Why PPO-clip lets a policy drift, what the entropy ratio sees of it, and what ERC does: a bandit on one CPU core.

    python toy_bandit.py                     the demonstration: a table, figures/toy_bandit.png, and a check of its claims
    python toy_bandit.py --beta 0.2          a wider band: predict the table before you look
    python toy_bandit.py --help              the knobs

A contextual bandit with many arms, whose logits share low-rank features as a language model's do: pushing one arm in one
state moves all arms in all states. The objective is erc.policy_loss itself; an arm is a response of one token.

Axes: Z seeds, S states, K arms, R features, G samples a state, B = Z·S·G samples. Entropies in nats.
"""
import argparse
import sys
from pathlib import Path

import torch

from erc import Config, UserError, entropy_ratio, group_advantages, logp_entropy, policy_loss

METHODS = {"DAPO": dict(algo="dapo", erc=False), "ERC-DAPO": dict(algo="dapo", erc=True),
           "GPPO": dict(algo="gppo", erc=False), "ERC-GPPO": dict(algo="gppo", erc=True)}


# -------------------------------------------------------------------------------------------------- 1. The worked example

def worked_example():
    """The paper's opening example -> (H_old, H, ρ, r, gradient under DAPO, gradient under ERC-DAPO)."""
    old_K, new_K = torch.tensor([.85, 0, .15, 0]), torch.tensor([.82, .064, .07, .046])
    a = torch.tensor([0])                                                                     # the first action was sampled
    (old_logp, old_H), (logp, H) = logp_entropy(old_K.log()[None], a), logp_entropy(new_K.log()[None], a)
    gradients = []
    for erc in False, True:
        logp_BT = logp[:, None].clone().requires_grad_()
        loss, _ = policy_loss(logp_BT, H[:, None], old_logp[:, None], old_H[:, None], torch.ones(1), torch.ones(1, 1),
                              Config(erc=erc))
        loss.backward()
        gradients.append(-logp_BT.grad.item())                                                # of the objective
    return old_H.item(), H.item(), entropy_ratio(H, old_H).item(), (logp - old_logp).exp().item(), *gradients


# --------------------------------------------------------------------------------------------------------- 2. The bandit

def make_bandit(a):
    """-> (X_ZSR, W_ZRK, reward_ZSK): features, weights that make one arm of each state likely, and 0/1 rewards."""
    g = torch.Generator().manual_seed(a.seed)
    X_ZSR = torch.nn.functional.normalize(torch.randn(a.seeds, a.states, a.rank, generator=g), dim=-1)
    likely_ZSK = torch.nn.functional.one_hot(torch.randint(a.arms, (a.seeds, a.states), generator=g), a.arms).float()
    reward_ZSK = (torch.rand(a.seeds, a.states, a.arms, generator=g) < 0.3).float()
    return X_ZSR, a.confidence * X_ZSR.transpose(1, 2) @ likely_ZSK, reward_ZSK


def policy(X_ZSR, W_ZRK):
    return (X_ZSR @ W_ZRK).log_softmax(-1)                                                    # log π_ZSK


def sample(log_pi_ZSK, reward_ZSK, G, g):
    """G arms of each state from π_old -> (arms_ZSG, advantages_B)."""
    Z, S, K = log_pi_ZSK.shape
    arms_ZSG = torch.multinomial(log_pi_ZSK.exp().view(Z * S, K), G, replacement=True, generator=g).view(Z, S, G)
    return arms_ZSG, group_advantages(reward_ZSK.gather(2, arms_ZSG).view(Z * S, G)).flatten()


def stats(log_pi_ZSK, arms_ZSG):
    """log π of the sampled arms and the entropy of their states, each as (B, 1)."""
    logp, H = logp_entropy(log_pi_ZSK.repeat_interleave(arms_ZSG.shape[2], 1).flatten(0, 1), arms_ZSG.flatten())
    return logp[:, None], H[:, None]


def step(X_ZSR, W_ZRK, arms_ZSG, advantages_B, old, cfg, lr):
    """One plain gradient step of every seed's own policy -> (new W_ZRK, metrics)."""
    W_ZRK = W_ZRK.detach().requires_grad_()
    logp_B1, H_B1 = stats(policy(X_ZSR, W_ZRK), arms_ZSG)
    norm = advantages_B.numel() / len(W_ZRK)                                                  # the seeds do not share a batch
    loss, metrics = policy_loss(logp_B1, H_B1, *old, advantages_B, torch.ones_like(logp_B1), cfg, norm)
    loss.backward()
    return (W_ZRK - lr * W_ZRK.grad).detach(), metrics


def drift(log_pi_ZSK, old_log_pi_ZSK, arms_ZSG, advantages_B):
    """How far π is from π_old, a number a seed each: dict of (Z,) tensors, and ρ of each state (Z, S)."""
    pi, old = log_pi_ZSK.exp(), old_log_pi_ZSK.exp()
    sampled_ZSK = torch.zeros_like(pi).scatter(2, arms_ZSG, 1.0)
    r_ZSG = (log_pi_ZSK - old_log_pi_ZSK).gather(2, arms_ZSG).exp()
    H, old_H = (torch.special.entr(p).sum(-1) for p in (pi, old))
    return dict(r=(r_ZSG - 1).abs().amax((1, 2)), inside=((r_ZSG > 0.8) & (r_ZSG < 1.28)).float().mean((1, 2)),
                tv=0.5 * ((pi - old).abs() * (1 - sampled_ZSK)).sum(-1).mean(-1),
                kl=(old * (old_log_pi_ZSK - log_pi_ZSK)).sum(-1).mean(-1),
                gain=((r_ZSG - 1).flatten(1) * advantages_B.view(len(pi), -1)).mean(1),
                rho=(entropy_ratio(H, old_H) - 1).abs().mean(-1), rho_ZS=entropy_ratio(H, old_H))


def one_batch(a, steps, **settings):
    """Many small steps on one batch from π_old -> list of drift() after 0, 1, … steps, with policy_loss's shares."""
    X_ZSR, W_ZRK, reward_ZSK = make_bandit(a)
    old_log_pi = policy(X_ZSR, W_ZRK)
    arms_ZSG, advantages_B = sample(old_log_pi, reward_ZSK, a.samples, torch.Generator().manual_seed(a.seed + 1))
    old, cfg = stats(old_log_pi, arms_ZSG), Config(**dict(beta_low=a.beta, beta_high=a.beta) | settings)
    out = [drift(old_log_pi, old_log_pi, arms_ZSG, advantages_B) | dict(ppo_clip=0.0, erc_clip=0.0, W=W_ZRK)]
    for _ in range(steps):
        W_ZRK, m = step(X_ZSR, W_ZRK, arms_ZSG, advantages_B, old, cfg, a.lr)
        out.append(drift(policy(X_ZSR, W_ZRK), old_log_pi, arms_ZSG, advantages_B) | dict(
            ppo_clip=m["ppo_clip"], erc_clip=m["erc_low"] + m["erc_high"], W=W_ZRK))
    return out


# -------------------------------------------------------------------------------------------- 3. The price, at equal progress

def at_gain(run, gain_Z, key):
    """`key` of each seed, interpolated where that seed's gain first reaches gain_Z; NaN where it never does."""
    gains, values, out = torch.stack([d["gain"] for d in run]), torch.stack([d[key] for d in run]), []
    for z, target in enumerate(gain_Z.tolist()):
        i = next((i for i in range(1, len(run)) if gains[i, z] >= target), None)
        if i is None:
            out.append(float("nan"))
            continue
        w = (target - gains[i - 1, z]) / (gains[i, z] - gains[i - 1, z])
        out.append((values[i - 1, z] + w * (values[i, z] - values[i - 1, z])).item())
    return torch.tensor(out)


def tightened(a, gain):
    """The share of DAPO's ε at which it ends with the same mean gain (bisection) -> (share, its run)."""
    low, high = 0.0, 1.0
    for _ in range(12):
        share = (low + high) / 2
        run = one_batch(a, a.steps, algo="dapo", erc=False, eps_low=0.2 * share, eps_high=0.28 * share)
        low, high = (low, share) if run[-1]["gain"].mean() > gain else (share, high)
    return share, run


# --------------------------------------------------------------------------------------------------------- 4. Training

def training(a, **settings):
    """a.batches rollout batches of eight updates -> reward, entropy and |ρ - 1| of each batch, (batches, Z) each."""
    X_ZSR, W_ZRK, reward_ZSK = make_bandit(a)
    g, cfg = torch.Generator().manual_seed(a.seed + 2), Config(**dict(beta_low=a.beta, beta_high=a.beta) | settings)
    out = dict(reward=[], entropy=[], rho=[])
    for _ in range(a.batches):
        old_log_pi = policy(X_ZSR, W_ZRK)
        arms_ZSG, advantages_B = sample(old_log_pi, reward_ZSK, a.samples, g)
        old = stats(old_log_pi, arms_ZSG)
        for _ in range(8):
            W_ZRK, _ = step(X_ZSR, W_ZRK, arms_ZSG, advantages_B, old, cfg, a.train_lr)
        out["reward"].append((old_log_pi.exp() * reward_ZSK).sum(-1).mean(-1))
        out["entropy"].append(torch.special.entr(old_log_pi.exp()).sum(-1).mean(-1))
        out["rho"].append(drift(policy(X_ZSR, W_ZRK), old_log_pi, arms_ZSG, advantages_B)["rho"])
    return {name: torch.stack(values) for name, values in out.items()}
