"""Why PPO-clip lets a policy drift, what the entropy ratio sees, what ERC does: a bandit on one CPU core.

    python toy_bandit.py               four parts on the terminal, a figure, and a check of all claims
    python toy_bandit.py --beta 0.2    a wider band: predict the table before you look
    python toy_bandit.py --erc-mode one-sided --out one-sided.png
    python toy_bandit.py --help        the knobs

A contextual bandit with many arms, whose logits share low-rank features as a language model's do: pushing one
arm in one state moves all arms in all states. The objective is erc.policy_loss itself; an arm is a response
of one token.

Axes: Z seeds, S states, K arms, R features, G samples a state, B = Z·S·G samples. Entropies in nats.
"""
import argparse
import copy
import sys
from pathlib import Path

import torch

from erc import Config, entropy_ratio, group_advantages, logp_entropy, policy_loss

METHODS = {"DAPO": dict(algo="dapo", erc=False), "ERC-DAPO": dict(algo="dapo", erc=True),
           "GPPO": dict(algo="gppo", erc=False), "ERC-GPPO": dict(algo="gppo", erc=True)}


# -------------------------------------------------------------------------------------- 1. The worked example

def worked_example():
    """The paper's opening example -> (H_old, H, ρ, r, gradient under DAPO, gradient under ERC-DAPO)."""
    old_K, new_K = torch.tensor([.85, 0, .15, 0]), torch.tensor([.82, .064, .07, .046])
    a = torch.tensor([0])                                                          # the first one was sampled
    (old_logp, old_H), (logp, H) = logp_entropy(old_K.log()[None], a), logp_entropy(new_K.log()[None], a)
    gradients = []
    for erc in False, True:
        logp_BT = logp[:, None].clone().requires_grad_()
        loss, _ = policy_loss(logp_BT, H[:, None], old_logp[:, None], old_H[:, None], torch.ones(1),
                              torch.ones(1, 1), Config(erc=erc))
        loss.backward()
        gradients.append(-logp_BT.grad.item())                                      # of the objective
    return old_H.item(), H.item(), entropy_ratio(H, old_H).item(), (logp - old_logp).exp().item(), *gradients


# ---------------------------------------------------------------------------------------------- 2. The bandit

def make_bandit(a):
    """-> (X_ZSR, W_ZRK, reward_ZSK): features, weights that make one arm a state likely, 0/1 rewards."""
    g = torch.Generator().manual_seed(a.seed)
    X_ZSR = torch.nn.functional.normalize(torch.randn(a.seeds, a.states, a.rank, generator=g), dim=-1)
    likely_ZS = torch.randint(a.arms, (a.seeds, a.states), generator=g)
    likely_ZSK = torch.nn.functional.one_hot(likely_ZS, a.arms).float()
    reward_ZSK = (torch.rand(a.seeds, a.states, a.arms, generator=g) < 0.3).float()
    return X_ZSR, a.confidence * X_ZSR.transpose(1, 2) @ likely_ZSK, reward_ZSK


def policy(X_ZSR, W_ZRK):
    return (X_ZSR @ W_ZRK).log_softmax(-1)                                          # log π_ZSK


def sample(log_pi_ZSK, reward_ZSK, G, g):
    """G arms of each state from π_old -> (arms_ZSG, advantages_B)."""
    Z, S, K = log_pi_ZSK.shape
    arms_BG = torch.multinomial(log_pi_ZSK.exp().view(Z * S, K), G, replacement=True, generator=g)
    arms_ZSG = arms_BG.view(Z, S, G)
    return arms_ZSG, group_advantages(reward_ZSK.gather(2, arms_ZSG).view(Z * S, G)).flatten()


def stats(log_pi_ZSK, arms_ZSG):
    """log π of the sampled arms, the entropy of their states, and the arms' κ, each as (B, 1)."""
    log_pi_BK = log_pi_ZSK.repeat_interleave(arms_ZSG.shape[2], 1).flatten(0, 1)
    return [x_B[:, None] for x_B in logp_entropy(log_pi_BK, arms_ZSG.flatten(), kappa=True)]


def step(X_ZSR, W_ZRK, arms_ZSG, advantages_B, old, cfg, lr):
    """One plain gradient step of every seed's own policy -> (new W_ZRK, metrics)."""
    W_ZRK = W_ZRK.detach().requires_grad_()
    logp_B1, H_B1, kappa_B1 = stats(policy(X_ZSR, W_ZRK), arms_ZSG)
    norm = advantages_B.numel() / len(W_ZRK)                                      # each seed is its own batch
    kappa_B1 = kappa_B1.detach() if cfg.erc_mode == "one-sided" else None
    loss, metrics = policy_loss(logp_B1, H_B1, *old, advantages_B, torch.ones_like(logp_B1), cfg, norm,
                                kappa_BT=kappa_B1)
    loss.backward()
    return (W_ZRK - lr * W_ZRK.grad).detach(), metrics


def drift(log_pi_ZSK, old_log_pi_ZSK, arms_ZSG, advantages_B):
    """How far π is from π_old, a number a seed each: dict of (Z,) tensors, and ρ of each state (Z, S)."""
    pi, old = log_pi_ZSK.exp(), old_log_pi_ZSK.exp()
    sampled_ZSK = torch.zeros_like(pi).scatter(2, arms_ZSG, 1.0)
    r_ZSG = (log_pi_ZSK - old_log_pi_ZSK).gather(2, arms_ZSG).exp()
    H, old_H = (torch.special.entr(p).sum(-1) for p in (pi, old))
    return dict(r=(r_ZSG - 1).abs().amax((1, 2)),
                inside=((r_ZSG > 0.8) & (r_ZSG < 1.28)).float().mean((1, 2)),
                tv=0.5 * ((pi - old).abs() * (1 - sampled_ZSK)).sum(-1).mean(-1),
                kl=(old * (old_log_pi_ZSK - log_pi_ZSK)).sum(-1).mean(-1),
                gain=((r_ZSG - 1).flatten(1) * advantages_B.view(len(pi), -1)).mean(1),
                rho=(entropy_ratio(H, old_H) - 1).abs().mean(-1), rho_ZS=entropy_ratio(H, old_H))


def objective(a, settings):
    return Config(beta_low=a.beta, beta_high=a.beta, erc_mode=a.erc_mode, **settings)


def one_batch(a, steps, **settings):
    """Many small steps on one batch from π_old -> drift() after 0, 1, … steps, with policy_loss's shares."""
    X_ZSR, W_ZRK, reward_ZSK = make_bandit(a)
    old_log_pi = policy(X_ZSR, W_ZRK)
    g, cfg = torch.Generator().manual_seed(a.seed + 1), objective(a, settings)
    arms_ZSG, advantages_B = sample(old_log_pi, reward_ZSK, a.samples, g)
    old = stats(old_log_pi, arms_ZSG)[:2]
    out = [drift(old_log_pi, old_log_pi, arms_ZSG, advantages_B) | dict(ppo_clip=0.0, erc_clip=0.0, W=W_ZRK)]
    for _ in range(steps):
        W_ZRK, m = step(X_ZSR, W_ZRK, arms_ZSG, advantages_B, old, cfg, a.lr)
        out.append(drift(policy(X_ZSR, W_ZRK), old_log_pi, arms_ZSG, advantages_B) | dict(
            ppo_clip=m["ppo_clip"], erc_clip=m["erc_drop"], W=W_ZRK))
    return out


# ---------------------------------------------------------------------------- 3. The price, at equal progress

def at_gain(run, gain_Z, key):
    """`key` of each seed where its gain first reaches gain_Z, interpolated; NaN where it never does."""
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


# ------------------------------------------------------------------------------------------------ 4. Training

def training(a, **settings):
    """a.batches rollout batches of eight updates -> reward, entropy, |ρ - 1| of each batch: (batches, Z)."""
    X_ZSR, W_ZRK, reward_ZSK = make_bandit(a)
    g, cfg = torch.Generator().manual_seed(a.seed + 2), objective(a, settings)
    out = dict(reward=[], entropy=[], rho=[])
    for _ in range(a.batches):
        old_log_pi = policy(X_ZSR, W_ZRK)
        arms_ZSG, advantages_B = sample(old_log_pi, reward_ZSK, a.samples, g)
        old = stats(old_log_pi, arms_ZSG)[:2]
        for _ in range(8):
            W_ZRK, _ = step(X_ZSR, W_ZRK, arms_ZSG, advantages_B, old, cfg, a.train_lr)
        out["reward"].append((old_log_pi.exp() * reward_ZSK).sum(-1).mean(-1))
        out["entropy"].append(torch.special.entr(old_log_pi.exp()).sum(-1).mean(-1))
        out["rho"].append(drift(policy(X_ZSR, W_ZRK), old_log_pi, arms_ZSG, advantages_B)["rho"])
    return {name: torch.stack(values) for name, values in out.items()}


# ------------------------------------------------------------------------------------------------- The figure

def figure(a, runs, trained, tight, path):
    """Nine panels. Blue is DAPO, orange GPPO, dashed with ERC. Means over the seeds, shaded ± spread."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                         "axes.titlesize": 9.5, "legend.fontsize": 8, "legend.frameon": False})
    blue, orange, green = "#0072B2", "#D55E00", "#009E73"                 # Okabe and Ito's, colour-blind-safe
    look = {name: dict(color=blue if "DAPO" in name else orange, ls="--" if "ERC" in name else "-", lw=1.8)
            for name in METHODS}
    fig, axes = plt.subplots(3, 3, figsize=(11.5, 9), layout="constrained")
    def draw(ax, y_of, title, ylabel, x_of=None, xlabel="steps on one batch"):
        for name in METHODS:
            y = y_of(name)                                                          # (steps, Z)
            x, mean, spread = x_of(name).mean(1) if x_of else range(len(y)), y.mean(1), y.std(1)
            ax.plot(x, mean, label=name, **look[name])
            ax.fill_between(x, mean - spread, mean + spread, color=look[name]["color"], alpha=0.10, lw=0)
        ax.set(title=title, ylabel=ylabel, xlabel=xlabel)
    def of(key): return lambda name: torch.stack([d[key] for d in runs[name]])
    draw(axes[0, 0], of("r"), "sampled arms: the largest ratio", "max |r − 1|")
    axes[0, 0].legend()
    draw(axes[0, 1], of("tv"), "unsampled arms: probability moved", "total variation")
    draw(axes[0, 2], of("kl"), "the whole distribution", "KL(π_old‖π_θ), nats")
    ax = axes[1, 0]
    for name, color in ("DAPO", blue), ("ERC-DAPO", green):
        rho = torch.stack([d["rho_ZS"].flatten() for d in runs[name]])
        low, middle, high = torch.quantile(rho, torch.tensor([0.1, 0.5, 0.9]), dim=1)
        ax.fill_between(range(len(rho)), low, high, alpha=0.3, color=color, label=f"{name}: 10–90 %")
        ax.plot(middle, color=color, ls=look[name]["ls"], label=f"{name}: median")
    for bound in 1 - a.beta, 1 + a.beta:
        ax.axhline(bound, color="black", lw=0.8, ls=":")
    ax.set(title="entropy ratio of the states", ylabel="ρ = H / H_old", xlabel="steps on one batch")
    ax.legend(loc="lower left")
    ax = axes[1, 1]
    for name in "DAPO", "ERC-DAPO":
        ax.plot([100 * d["ppo_clip"] for d in runs[name]], **look[name], label=f"{name}: by PPO-clip")
    ax.plot([100 * d["erc_clip"] for d in runs["ERC-DAPO"]], color=green, lw=1.8, label="ERC-DAPO: by ERC")
    ax.set(title="who clips", ylabel="% of samples", xlabel="steps on one batch")
    ax.legend()
    draw(axes[1, 2], of("tv"), "the price: unsampled TV at equal progress", "total variation", of("gain"),
         "gain on the batch, mean (r − 1) Â")
    ends = {key: max(run[-1][key].mean().item() for run in runs.values()) for key in ("gain", "tv")}
    axes[1, 2].plot(*(torch.stack([d[key].mean() for d in tight]) for key in ("gain", "tv")), color="black",
                    ls=":", label="DAPO, tighter ε")
    axes[1, 2].set(xlim=(0, ends["gain"]), ylim=(0, 1.2 * ends["tv"]))
    axes[1, 2].legend()
    for ax, key, label in zip(axes[2], ("reward", "entropy", "rho"), ("E_π[reward]", "H, nats", "|ρ − 1|")):
        draw(ax, lambda name: trained[name][key], f"training: {key}", label, xlabel="batches of 8 updates")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=100)


# ------------------------------------------------------------------------------------------------------- main

def parse_args(argv):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, least, text in (
            ("seed", 0, 0, "of the bandits and of sampling"), ("seeds", 8, 2, "bandits, a policy each"),
            ("steps", 64, 1, "gradient steps on one batch (parts 2, 3)"),
            ("batches", 100, 1, "rollout batches (part 4)"), ("states", 16, 1, "S"), ("arms", 64, 2, "K"),
            ("rank", 12, 1, "features that all logits share"), ("samples", 16, 2, "arms sampled a state, G"),
            ("confidence", 5.0, 0, "logit of the likely arm at the start"),
            ("lr", 0.2, 1e-9, "of the steps on one batch"), ("train-lr", 1.0, 1e-9, "of training (part 4)"),
            ("beta", 0.05, 1e-9, "half-width of ERC's band")):
        def number(text, kind=type(default), least=least):
            if not least <= kind(text) < 1e9:
                raise argparse.ArgumentTypeError(f"must be at least {least}")
            return kind(text)
        ap.add_argument(f"--{name}", type=number, default=default, help=f"{text} [{default}]")
    ap.add_argument("--erc-mode", choices=("two-sided", "one-sided"), default="two-sided",
                    help="one-sided: keep gradients that lead back into the band [%(default)s]")
    ap.add_argument("--out", default="figures/toy_bandit.png", help="where the figure goes [%(default)s]")
    return ap.parse_args(argv)


def show_price(runs, tight, share):
    """Print part 3: what each method moved where the gain on the batch is the same."""
    print("\n3. The price: smaller steps. Where each ERC run ends, and its baseline at the same gain")
    for base in "DAPO", "GPPO":
        erc, gain = runs[f"ERC-{base}"][-1], runs[f"ERC-{base}"][-1]["gain"]
        print(f"   gain {gain.mean():.4f}, without ERC {runs[base][-1]['gain'].mean():.4f} in as many steps")
        for key, label in ("tv", "unsampled TV"), ("kl", "KL"), ("rho", "|ρ-1|"):
            x = at_gain(runs[base], gain, key)
            ratio = (erc[key] / x)[x.isfinite()]
            print(f"     {label:13s}{base} {x.nanmean():.4f}   ERC-{base} {erc[key].mean():.4f}   "
                  f"ratio {ratio.mean():.2f} ± {ratio.std():.2f}")
    d = tight[-1]
    print(f"   DAPO with ε × {share:.2f} ends at ERC-DAPO's gain: unsampled TV {d['tv'].mean():.4f}, "
          f"KL {d['kl'].mean():.4f}, |ρ-1| {d['rho'].mean():.4f}")


def show_limits(a, runs, old_H, claim):
    """Print what the indicator cannot do, and check it."""
    same = [torch.equal(x["W"], y["W"]) for x, y in zip(runs["DAPO"], runs["ERC-DAPO"])]
    inert = (same + [False]).index(False) - 1
    off = [(d["rho_ZS"] - 1).abs().max().item() for d in runs["ERC-DAPO"]]
    large = copy.copy(a)
    large.lr = 30 * a.lr
    leap = (one_batch(large, 1, **METHODS["ERC-DAPO"])[-1]["rho_ZS"] - 1).abs().max().item()
    swapped = logp_entropy(torch.tensor([[.15, .85, 0, 0]]).log(), torch.tensor([0]))[1].item()
    print(f"   inert: for {inert} steps, until a first ρ has left the band, ERC-DAPO is DAPO bit for bit\n"
          f"   overshoot: one step 30 times as long takes a state to |ρ-1| = {leap:.3f} before ERC sees it\n"
          f"   no restoring force: after {a.steps} small steps the worst state is at |ρ-1| = {off[-1]:.3f}, "
          "dragged by others' updates\n   blind: a permutation {.85, 0, .15, 0} -> {.15, .85, 0, 0} has ρ = "
          f"{entropy_ratio(swapped, old_H):.3f}, and TV .85")
    claim(inert >= 1, "ERC-DAPO equals DAPO until ρ leaves the band")
    claim(leap > a.beta and off[-1] > a.beta, "ERC keeps no state inside the band by force")
    claim(abs(entropy_ratio(swapped, old_H) - 1) < 1e-6, "ρ is 1 for a permutation")


def main(argv=None):
    """Print the four parts, draw the figure, check the claims -> exit status: 0, or 1 if a claim fails."""
    a, failed = parse_args(argv), []
    torch.set_num_threads(1)
    def claim(holds, text): failed.extend([] if holds else [text])
    def pm(x, digits=3): return f"{x.mean():.{digits}f} ± {x.std():.{digits}f}"
    example = old_H, H, rho, r, g_dapo, g_erc = worked_example()
    print("1. The worked example: {.85, 0, .15, 0} -> {.82, .064, .07, .046}, the first one sampled, Â = 1\n"
          f"   H_old {old_H:.3f}   H {H:.3f}   ρ {rho:.3f}   r {r:.3f}   gradient: DAPO {g_dapo:.3f}, "
          f"ERC-DAPO {abs(g_erc):.3f}")
    claim([round(x, 3) for x in example] == [0.423, 0.666, 1.577, 0.965, 0.965, 0.0],
          "the worked example: H .423 -> .666, ρ 1.577, r .965, gradient .965 with DAPO, 0 with ERC-DAPO")

    runs = {name: one_batch(a, a.steps, **settings) for name, settings in METHODS.items()}
    print(f"\n2. {a.steps} small steps on one off-policy batch: {a.states} states, {a.arms} arms, "
          f"rank {a.rank}, {a.samples} samples a state, mean ± spread of {a.seeds} seeds\n"
          f"   {'':9s}{'max|r-1|':>14s}{'r in band':>11s}{'unsampled TV':>17s}{'KL':>17s}{'|ρ-1|':>15s}"
          f"{'PPO-clip':>10s}{'ERC':>7s}")
    for name, run in runs.items():
        d = run[-1]
        print(f"   {name:9s}{pm(d['r']):>14s}{d['inside'].mean():11.1%}{pm(d['tv'], 4):>17s}"
              f"{pm(d['kl'], 4):>17s}{pm(d['rho']):>15s}{d['ppo_clip']:10.1%}"
              f"{d['erc_clip']:7.1%}")
    dapo, erc = runs["DAPO"][-1], runs["ERC-DAPO"][-1]
    claim((dapo["inside"] > 0.75).all() and (dapo["tv"] > 0.005).all(),
          "DAPO, every seed: over 75 % of sampled ratios end in PPO's band, over .005 unsampled mass moved")
    claim(all((erc[key] < 0.75 * dapo[key]).all() for key in ("tv", "kl", "rho")),
          "ERC-DAPO, every seed: under 3/4 of DAPO's unsampled TV, of its KL and of its |ρ-1|")

    share, tight = tightened(a, erc["gain"].mean())
    show_price(runs, tight, share)
    show_limits(a, runs, old_H, claim)

    trained = {name: training(a, **settings) for name, settings in METHODS.items()}
    print(f"\n4. Training: {a.batches} rollout batches of eight updates; the last batch")
    for name, t in trained.items():
        print(f"   {name:9s} reward {pm(t['reward'][-1])} (from {t['reward'][0].mean():.3f})   "
              f"entropy {pm(t['entropy'][-1])}   |ρ-1| (all batches) {pm(t['rho'].mean(0))}")
    figure(a, runs, trained, tight, Path(a.out))
    print(f"\nfigure: {a.out}")
    print(*[f"CLAIM FAILED: {text}" for text in failed] or ["all claims hold"], sep="\n")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
