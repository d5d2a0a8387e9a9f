"""Is it learning or rounding that carries ρ out of the band?

    python figures/rounding.py MODEL DATA [LR ...]

Takes the eight updates of a step of ERC-DAPO, rewards by lot, in four precisions. Before each
update it looks twice at ρ of that update's tokens: as trained, and of the very same weights in
fp32. Weights are anywhere within their bf16 cell, as after some training ("dithered"), or exact in
bf16, as a released checkpoint's. Prints a table and draws rounding-NAME.png beside itself.
"""
import itertools
import sys
from copy import deepcopy
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import erc

WAYS = "fp32", "fp16 body", "bf16 body", "bf16 body and logits"
erc.max_gap = lambda *_: 0.1                                    # the sampler's log-probs are of fp32
real_forward, real_stats, real_linear = erc.forward, erc.token_stats, torch.nn.functional.linear


def fp16_linear(x, weight, bias=None):
    """What a GPU does; a CPU's own fp16 is thirty times slower than its fp32."""
    return real_linear(x.half().float(), weight.half().float(), bias).half().float()


def bf16_stats(hidden_ND, lm_head, targets_N, *_, **__):
    """What many trainers do: logits in bf16, H = logsumexp(z) - Σ π z."""
    z_NV = (hidden_ND.bfloat16() @ lm_head.weight.bfloat16().T).float()
    lse_N = z_NV.logsumexp(-1)
    logp_N = z_NV.gather(1, targets_N[:, None]).squeeze(1) - lse_N
    return logp_N, (lse_N - (z_NV.softmax(-1) * z_NV).sum(-1)).detach()


@torch.no_grad()
def log_pi(model, samples):
    """The full distribution at each response token, in fp32: a list of (T, V), one a sample."""
    torch.nn.functional.linear = real_linear
    ids_BL = pad_sequence([torch.tensor(s.prompt + s.response[:-1]) for s in samples], True)
    rows = zip(model(input_ids=ids_BL).logits.log_softmax(-1), samples)
    return [row_LV[len(s.prompt) - 1:][:len(s.response)].clone() for row_LV, s in rows]


@torch.no_grad()
def with_weights(model, kind, seed):
    torch.manual_seed(seed)
    model = deepcopy(model)
    for p in model.parameters():
        exact = p.bfloat16().float()
        cell = torch.exp2(exact.abs().clamp(min=1e-30).log2().floor() - 7)
        p.copy_(exact + (torch.rand_like(p) - 0.5) * cell * (kind == "dithered"))
    return model


def eight_updates(start, groups, old, lr, way):
    """-> {name: (N,)} of all tokens: what `update` saw; ρ and the exact KL of the weights in fp32."""
    cfg = erc.Config(lr=lr, minibatch_prompts=1, micro_tokens=10**6, precision="bf16" if "bf16" in way else "fp32")
    model, parts = deepcopy(start), []

    def forward(model, samples, cfg):
        if torch.is_grad_enabled():                             # a new policy's: one call an update
            new_NV = torch.cat(log_pi(model, samples))
            old_NV = torch.cat([old[id(s)] for s in samples])
            H_N, H_old_N = (erc.logp_entropy(x_NV, x_NV.argmax(-1))[1] for x_NV in (new_NV, old_NV))
            rho_N, kl_N = erc.entropy_ratio(H_N, H_old_N), (old_NV.exp() * (old_NV - new_NV)).sum(-1)
            parts.append((rho_N, ((rho_N - 1).abs() >= 0.05).float(), kl_N, torch.full_like(kl_N, len(parts) + 1)))
        torch.nn.functional.linear = fp16_linear if "fp16" in way else real_linear
        return real_forward(model, samples, cfg)

    erc.forward = forward
    erc.token_stats = bf16_stats if "logits" in way else real_stats
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=cfg.weight_decay)
    tokens = erc.update(model, optimizer, groups, cfg, torch.amp.GradScaler("cpu", enabled="fp16" in way))[1]
    return tokens | dict(zip(("rho_fp32", "erc_drop_fp32", "kl_fp32", "update"), map(torch.cat, zip(*parts))))


def row(t):
    """One run's figures in the table: of updates 2 to 8, since ρ = 1 at the first."""
    t = {name: x_N[t["update"] > 1] for name, x_N in t.items()}
    drop_N, kl_N = t["erc_drop"] > 0, t["kl_fp32"]
    correlation = torch.corrcoef(torch.stack([t["rho"].log(), t["rho_fp32"].log()]))[0, 1]
    return (t["erc_drop"].mean(), t["erc_drop_fp32"].mean(), correlation, kl_N.mean(), kl_N[drop_N].sum() / kl_N.sum(),
            t["old_logp"][drop_N].median().exp(), t["old_entropy"][drop_N].median())


def draw(found, lrs, path):
    """The share out of the band by update, of dithered weights: a panel a learning rate."""
    fig = Figure((4 * len(lrs) + 4, 4), layout="constrained")
    panels = zip(fig.subplots(1, len(lrs), sharey=True, squeeze=False)[0], lrs)
    lines = [("erc_drop", "-o", ""), ("erc_drop_fp32", ":s", ", its weights in fp32")]
    for (ax, lr), (way, colour), (name, style, note) in itertools.product(panels, zip(WAYS, erc.COLOURS), lines):
        shares = [torch.cat([t[name][t["update"] == k] for t in found["dithered", lr, way]]).mean()
                  for k in range(1, 9)]
        ax.plot(range(1, 9), shares, style, color=colour, ms=4, label=way + note)
        ax.set(title=f"tokens out of the band, lr {lr:.0e}", xlabel="update")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right")
    fig.savefig(path, dpi=110)


def main(path, data, *lrs):
    lrs = [float(lr) for lr in lrs or ("1e-6", "3e-6", "1e-5")]
    model, tokenizer, eos = erc.load_model(path, torch.device("cpu"))
    prompts = [ids for ids, _ in erc.load_prompts(data, tokenizer, erc.Config(max_prompt_tokens=512))]
    found = {}                                                  # (kind, lr, way): a run a seed
    for seed, kind in itertools.product((1, 2, 3), ("dithered", "exact")):
        start = with_weights(model, kind, seed)
        sampler = erc.HFSampler(start, eos)
        samples = sampler.generate(prompts[8 * seed:][:8], 4, 48, seed=seed)
        for i, s in enumerate(samples):
            s.advantage = (-0.866, 0.866)[i % 2]                # of the rewards 0, 1, 0, 1 (eq. 4)
        old = {id(s): log_pi(start, [s])[0] for s in samples}
        groups = [samples[i:i + 4] for i in range(0, len(samples), 4)]
        for key in itertools.product([kind], lrs if kind == "dithered" else lrs[:1], WAYS):
            found.setdefault(key, []).append(eight_updates(start, groups, old, *key[1:]))
    print("| weights | lr | precision | out of the band | weights in fp32 | correlation | KL | share of KL | π | H |")
    print("|" + "---|" * 10)
    for key, runs in found.items():
        cells = [f"{x.mean():.2g} ({x.min():.2g} … {x.max():.2g})" for x in torch.tensor([*map(row, runs)]).T]
        print("|", " | ".join([*map(str, key), *cells]), "|")
    draw(found, lrs, Path(__file__).with_name(f"rounding-{Path(path).name}.png"))


main(*sys.argv[1:])
