"""Why PPO-clip lets a policy drift, what the entropy ratio sees, and what ERC does about it.

    python toy_bandit.py                                           numbers, claims, figures/toy_bandit.png
    python toy_bandit.py --beta 0.2 --out wide.png                 a wider band for ERC
    python toy_bandit.py --rank 64 --out rank.png                  more features than there are states
    python toy_bandit.py --erc-mode one-sided --out one-sided.png  ERC that lets samples back

A contextual bandit on one CPU core. A state stands for a prompt, an arm for a response of one token. The
logits of all states are made of the same few features, as a language model's are, so a step on the
sampled arms also moves the arms that nobody sampled. The objective is erc.py's own `policy_loss`.

Each claim is printed beside the number that it rests on, and the exit status is 1 if one does not hold.
The claims are about the default knobs. Others may break some: predict which.

Knobs: --seed of all that is random, --seeds Z, --steps on one batch (part 2), --batches of training (part
4), --rank R, and --beta, the half-width of ERC's band.

Axes: Z seeds, each with a bandit and a policy of its own; S states of a bandit; P = Z*S states in all; K
arms; R features; G samples of a state; B = P*G samples, each a row of one token, (B, 1); T updates. Before
each update a run records one number a state, (T, Z, S). Entropies H are in nats.
"""
import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

from erc import Config, entropy_ratio, group_advantages, logp_entropy, policy_loss

# Settings, and a look: thin dark lines over wide light ones, so that none hides another. DAPO with half
# the ε is there because any stop can be compared with a tighter clip.
METHODS = {
    "DAPO": (dict(algo="dapo", erc=False), dict(color="#56B4E9", lw=7, ms=12)),
    "GPPO": (dict(algo="gppo", erc=False), dict(color="#E69F00", lw=3.5)),
    "ERC-DAPO": (dict(algo="dapo", erc=True), dict(color="#0072B2", lw=2, ms=9, ls="--")),
    "ERC-GPPO": (dict(algo="gppo", erc=True), dict(color="#D55E00", lw=2, ls=":")),
    "DAPO, ε/2": (dict(algo="dapo", erc=False, eps_low=0.1, eps_high=0.14), dict(color="black", lw=1)),
}
OLD_PI = [0.85, 0, 0.15, 0]             # the paper's opening example; the first arm was sampled
NEW_PI = [0.82, 0.064, 0.07, 0.046]
outcomes = []                           # of the claims so far: whether each holds


# --------------------------------------------------------------------------------------- The bandit

def make_bandit(a, generator, states=16, arms=64):
    """-> features of the states, weights that give one arm of each a logit of about 5, rewards 0 or 1."""
    features_ZSR = torch.randn(a.seeds, states, a.rank, generator=generator)
    features_ZSR /= features_ZSR.norm(dim=2, keepdim=True)
    likely_ZSK = torch.eye(arms)[torch.randint(arms, (a.seeds, states), generator=generator)]
    reward_PK = (torch.rand(a.seeds * states, arms, generator=generator) < 0.3).float()
    return features_ZSR, 5.0 * features_ZSR.mT @ likely_ZSK, reward_PK


def statistics(log_pi_PK, arms_PG):
    """log π, H and κ of every sample, (B, 1) each. Only one-sided ERC needs κ."""
    log_pi_BK = log_pi_PK.repeat_interleave(arms_PG.shape[1], dim=0)
    return [x_B[:, None] for x_B in logp_entropy(log_pi_BK, arms_PG.flatten(), kappa=True)]


def measure(log_pi_PK, old_log_pi_PK, arms_PG, A_PG, reward_PK, metrics):
    """How far π is from π_old, how good it is, and what share of all samples is clipped."""
    pi_PK = log_pi_PK.exp()
    old_pi_PK = old_log_pi_PK.exp()
    r_PG = (log_pi_PK - old_log_pi_PK).exp().gather(1, arms_PG)
    moved_PK = (pi_PK - old_pi_PK).abs()
    sampled_PK = torch.zeros_like(pi_PK).scatter(1, arms_PG, 1.0)
    H_P = torch.special.entr(pi_PK).sum(1)
    rho_P = entropy_ratio(H_P, torch.special.entr(old_pi_PK).sum(1))
    # (Un)sampled: Σ|π - π_old| over those arms, as a share of their old probability. What is clipped
    # is a share of all samples, the same for every state.
    return {
        "sampled": (moved_PK * sampled_PK).sum(1) / (old_pi_PK * sampled_PK).sum(1),
        "unsampled": (moved_PK * (1 - sampled_PK)).sum(1) / (old_pi_PK * (1 - sampled_PK)).sum(1),
        "ρ": rho_P,
        "|ρ-1|": (rho_P - 1).abs(),
        "gain": ((r_PG - 1) * A_PG).mean(1),
        "H": H_P,
        "reward": (pi_PK * reward_PK).sum(1),
        "by PPO": torch.full_like(H_P, metrics["ppo_clip"]),
        "by ERC": torch.full_like(H_P, metrics["erc_drop"]),
    }


def run(a, method, batches, updates, lr, samples=16):
    """Several updates on each rollout batch -> {name: what `measure` says before each update, (T, Z, S)}."""
    cfg = Config(beta_low=a.beta, beta_high=a.beta, erc_mode=a.erc_mode, **METHODS[method][0])
    generator = torch.Generator().manual_seed(a.seed)
    features_ZSR, weights_ZRK, reward_PK = make_bandit(a, generator)
    records = []
    for _ in range(batches):
        old_log_pi_PK = (features_ZSR @ weights_ZRK).flatten(0, 1).log_softmax(1)
        arms_PG = torch.multinomial(old_log_pi_PK.exp(), samples, replacement=True, generator=generator)
        A_PG = group_advantages(reward_PK.gather(1, arms_PG))
        old_logp_B1, old_H_B1, _ = statistics(old_log_pi_PK, arms_PG)
        for _ in range(updates):
            weights_ZRK.requires_grad_()
            log_pi_PK = (features_ZSR @ weights_ZRK).flatten(0, 1).log_softmax(1)
            logp_B1, H_B1, kappa_B1 = statistics(log_pi_PK, arms_PG)
            loss, metrics = policy_loss(        # norm: the samples of one seed, as each has its own policy
                logp_B1, H_B1, old_logp_B1, old_H_B1, A_PG.flatten(), torch.ones_like(logp_B1), cfg,
                norm=len(logp_B1) / a.seeds, kappa_BT=kappa_B1 if a.erc_mode == "one-sided" else None)
            loss.backward()
            records.append(measure(log_pi_PK.detach(), old_log_pi_PK, arms_PG, A_PG, reward_PK, metrics))
            weights_ZRK = (weights_ZRK - lr * weights_ZRK.grad).detach()
    return {key: torch.stack([r[key] for r in records]).unflatten(1, (a.seeds, -1)) for key in records[0]}


# --------------------------------------------------------------------------------------- The claims

def check(holds, claim):
    print(f"   {'holds' if holds else 'CLAIM FAILED'}: {claim}")
    outcomes.append(bool(holds))


def report(runs, key, low, high):
    """Print `key` at the end of each run, and claim that ERC keeps low to high of it in every seed."""
    print(f"   {key:18}", *[f"{name} {seen[key][-1].mean():.4f}" for name, seen in runs.items()], sep="  ")
    for base in "DAPO", "GPPO":
        ratio_Z = runs["ERC-" + base][key][-1].mean(1) / runs[base][key][-1].mean(1)
        check(low < ratio_Z.min() and ratio_Z.max() < high, f"in every seed ERC-{base} has {low} to {high} "
              f"of {base}'s {key} ({ratio_Z.min():.2f} to {ratio_Z.max():.2f})")


def worked_example():
    """The ratio r of the sampled arm stays in PPO's band, while the entropy ratio ρ leaves ERC's."""
    logp_2, H_2 = logp_entropy(torch.tensor([OLD_PI, NEW_PI]).log(), torch.tensor([0, 0]))
    old_logp_11, logp_11 = logp_2.view(2, 1, 1)
    old_H_11, H_11 = H_2.view(2, 1, 1)
    numbers = [old_H_11, H_11, entropy_ratio(H_11, old_H_11), (logp_11 - old_logp_11).exp()]
    for cfg in Config(erc=False), Config(erc=True):
        logp_11 = logp_11.detach().requires_grad_()
        loss, _ = policy_loss(logp_11, H_11, old_logp_11, old_H_11, torch.ones(1), torch.ones(1, 1), cfg)
        loss.backward()
        numbers.append(logp_11.grad.abs())
    numbers = [round(x.item(), 3) for x in numbers]
    check(numbers == [0.423, 0.666, 1.577, 0.965, 0.965, 0], "the worked example: H {:.3f} -> {:.3f}, "
          "ρ {:.3f}, r {:.3f}, gradient: DAPO {:.3f}, ERC-DAPO {:.3f}".format(*numbers))


# --------------------------------------------------------------------------------------- The figure

def figure(a, runs, trained):
    fig = Figure(figsize=(10, 6.6), layout="constrained")
    example, drift, rho, clips, price, training = fig.subplots(2, 3).flat
    example.set(title="The example: grey old, green new")
    drift.set(title="Unsampled arms: share moved", xlabel="steps on one batch")
    rho.set(title="ρ of 16 states; grey: ERC's band", xlabel="steps on one batch")
    clips.set(title="Share of samples clipped by PPO", xlabel="steps on one batch")
    price.set(title="Unsampled arms at equal gain", xlabel="gain on the batch: mean of (r - 1) Â")
    training.set(title="Training: entropy at equal reward", xlabel="expected reward")
    example.bar(list("abcd"), OLD_PI, color="#BBBBBB")
    example.bar(list("abcd"), NEW_PI, color="#009E73", width=0.4)
    example.text(0.6, 0.4, "a was sampled:\nr = 0.965, in PPO's band,\nρ = 1.577, out of ERC's")
    for method, (_, look) in METHODS.items():
        mean = {key: x_TZS.mean((1, 2)) for key, x_TZS in runs[method].items()}
        drift.plot(mean["unsampled"], label=method, **look)
        clips.plot(mean["by PPO"], **look)
        clips.plot(mean["by ERC"], **look)
        price.plot(mean["gain"], mean["unsampled"], marker="o", markevery=[-1], **look)
        training.plot(trained[method]["reward"].mean((1, 2)), trained[method]["H"].mean((1, 2)), **look)
    clips.text(a.steps, 0.85 * runs["ERC-DAPO"]["by ERC"][-1].mean(), "by ERC", ha="right")
    drift.plot(runs["DAPO"]["sampled"].mean((1, 2)), color="#999999", label="DAPO, sampled arms")
    rho.plot(runs["DAPO"]["ρ"][:, 0], color="#56B4E9", lw=3)
    rho.plot(runs["ERC-DAPO"]["ρ"][:, 0], color="#0072B2", lw=1, ls="--")
    rho.axhspan(1 - a.beta, 1 + a.beta, color="#DDDDDD")
    fig.legend(*drift.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    Path(a.out).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(a.out, dpi=150)


# -------------------------------------------------------------------------------------- The program

def parse_args(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(seed=0, seeds=8, steps=64, batches=30, rank=12, beta=0.05).items():
        ap.add_argument("--" + name, type=type(default), default=default, help=f"[{default}]")
    ap.add_argument("--erc-mode", choices=("two-sided", "one-sided"), default="two-sided")
    ap.add_argument("--out", default="figures/toy_bandit.png")
    a = ap.parse_args(argv)
    if not (0 <= a.seed < 2**32 and min(a.beta, a.steps, a.batches, a.rank, a.seeds - 1) > 0):
        ap.error("--seed must be in 0...2^32, --seeds 2 or more, the other numbers above 0")
    return a


def main(argv=None):
    a = parse_args(argv)
    outcomes.clear()
    torch.set_num_threads(1)
    print("1. The paper's example: {.85, 0, .15, 0} -> {.82, .064, .07, .046}, the first arm sampled, Â = 1")
    worked_example()

    # A record is made before each update, so the record after the last step takes one update more.
    runs = {method: run(a, method, batches=1, updates=a.steps + 1, lr=0.2) for method in METHODS}
    dapo = runs["DAPO"]
    erc = runs["ERC-DAPO"]
    for r in runs.values():
        r["unsampled per gain"] = r["unsampled"].mean(2, keepdim=True) / r["gain"].mean(2, keepdim=True)
    print(f"\n2. {a.steps} small steps on one batch; (un)sampled: share of the arms' probability moved")
    least = dapo["unsampled"][-1].mean(1).min()
    check(least > 0.05, f"DAPO moves over 5% of the unsampled probability in every seed (least {least:.1%}), "
          f"while PPO-clip stops {dapo['by PPO'][-1].mean():.1%} of its samples")
    report(runs, "sampled", 0.3, 0.9)
    report(runs, "unsampled", 0.3, 0.8)
    report(runs, "|ρ-1|", 0.3, 0.8)
    report(runs, "gain", 0.3, 0.85)
    report(runs, "unsampled per gain", 0.75, 1.25)

    print("\n3. What ERC cannot do. (Nor does it see arms swap probabilities: H is the same, so ρ is 1.)")
    idle = (erc["by ERC"].mean((1, 2)) == 0).sum() - 1
    leap = run(a, "ERC-DAPO", batches=1, updates=2, lr=6.0)["|ρ-1|"].max()
    worst = erc["|ρ-1|"][-1].max()
    check(idle > 0, f"inert: nothing dropped after {idle} steps (in the end {erc['by ERC'][-1].mean():.1%})")
    check(leap > a.beta, f"overshoot: one step 30 times as long takes a ρ out of the band (|ρ-1| {leap:.3f})")
    check(worst > a.beta, f"no restoring force: in the end the worst ρ is still outside (|ρ-1| {worst:.3f})")

    trained = {method: run(a, method, a.batches, updates=8, lr=1.0) for method in METHODS}
    print(f"\n4. Training: {a.batches} rollout batches of eight updates")
    report(trained, "reward", 0.85, 1.05)
    report(trained, "H", 0.9, 1.6)
    figure(a, runs, trained)
    print(f"\nfigure: {a.out}")
    print("all claims hold" if all(outcomes) else f"{outcomes.count(False)} claims failed")
    return 1 - all(outcomes)


if __name__ == "__main__":
    raise SystemExit(main())
