"""Methods side by side, several seeds each: a table with 95 % intervals, and compare.png.

    python figures/compare.py RUN RUN ...

Runs that differ in the number at the end of their directory's name are seeds of one method. The
others are compared with the first method, seed by seed.
"""
import statistics
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import erc

# Student's t, two-sided 95 %, by the number of seeds
T = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
KEYS = "reward accuracy entropy rho_drift kl erc_drop ppo_clip".split()
DIGITS = {"rho_drift": 4, "kl": 4, "grad p50": 1, "p99": 1, "max": 1}   # of the others three


def summary(metrics):
    """One run: means over the last tenth of its steps; quantiles of the norms of all its updates."""
    late = [m for m in metrics if m["step"] > 0.9 * metrics[-1]["step"]]
    found = {key: statistics.fmean(m[key] for m in late if key in m) for key in KEYS}
    norms = [norm for m in metrics for norm in m.get("grad_norms", [])]
    return found | dict(zip(("grad p50", "p99", "max"), np.quantile(norms, (0.5, 0.99, 1))))


def interval(values):
    """Mean and half width of its 95 % interval."""
    if len(values) == 1:
        return values[0], 0.0
    error = statistics.stdev(values) / len(values)**0.5
    return statistics.fmean(values), T.get(len(values), 2.1) * error


def windows(metrics, size=10):
    """e^H and reward, means of ten steps each."""
    steps = [m for m in metrics if "entropy" in m]
    parts = [steps[i:i + size] for i in range(0, len(steps) - size + 1, size)]
    return np.array([[statistics.fmean(np.exp(m["entropy"]) for m in part),
                      statistics.fmean(m["reward"] for m in part)] for part in parts])


def main(paths, out):
    methods = {name: {path.name.removeprefix(name): metrics for path, metrics in runs.items()}
               for name, runs in erc.load_runs(paths).items()}
    base = next(iter(methods))
    found = {name: {seed: summary(m) for seed, m in runs.items()} for name, runs in methods.items()}
    # Cui et al. (2505.22617): R = -a e^H + b. How far does a method lie above the first one's line?
    points = {name: [windows(m) for m in runs.values()] for name, runs in methods.items()}
    slope, level = np.polyfit(*np.concatenate(points[base]).T, 1)
    above = {name: [(w[:, 1] - slope * w[:, 0] - level).mean() for w in parts]
             for name, parts in points.items()}

    columns = list(next(iter(found[base].values())))
    header = [*columns, "Δ reward", "Δ accuracy", "above the line"]
    print(f"||n|{'|'.join(header)}|\n{'|---' * (len(header) + 2)}|")
    for name, runs in found.items():
        cells = [interval([run[column] for run in runs.values()]) for column in columns]
        both = runs.keys() & found[base].keys()
        for column in "reward", "accuracy":
            cells.append(interval([runs[seed][column] - found[base][seed][column] for seed in both]))
        cells.append(interval(above[name]))
        texts = [f"{mean:.{d}f}±{half:.{d}f}" for (mean, half), d in
                 zip(cells, [DIGITS.get(column, 3) for column in header])]
        print(f"|{name}|{len(runs)}|{'|'.join(texts)}|")
    print(f"the line of {base}: reward = {slope:.2f} e^H + {level:.2f}")

    fig = Figure((15, 1.5 + 0.3 * len(found)), layout="constrained")
    *bars, line = fig.subplots(1, 4, width_ratios=[1, 1, 1, 1.6])
    for ax, column in zip(bars, ("accuracy", "reward", "p99")):
        for y, runs in enumerate(found.values()):               # a dot a seed, and a bar at the mean
            values = [run[column] for run in runs.values()]
            ax.plot(values, [y] * len(values), "o", ms=4, alpha=0.5, color=erc.COLOURS[0])
            ax.plot(statistics.fmean(values), y, "|", ms=14, color=erc.COLOURS[1])
        ax.axvline(statistics.fmean(run[column] for run in found[base].values()), color="0.7", lw=1, zorder=0)
        ax.set(title=column, yticks=range(len(found)), ylim=(len(found) - 0.5, -0.5))
        ax.set_yticklabels(found if ax is bars[0] else [])
    bars[2].set(title="gradient norm, p99", xscale="log")
    bars[2].set_xticks([5, 10, 20, 50], ["5", "10", "20", "50"])
    bars[2].minorticks_off()
    family = [name for name in methods if "dapo" in name] or [base]
    for i, name in enumerate(family):
        shortest = min(map(len, points[name]))
        xy = np.mean([w[:shortest] for w in points[name]], axis=0)
        line.plot(np.log(xy[:, 0]), xy[:, 1], ("-o", ":s")[i // 7], ms=3, color=erc.COLOURS[i % 7], label=name)
    line.set(title="reward against entropy", xlabel="entropy (nats)", ylabel="reward")
    line.legend(fontsize=7)
    fig.savefig(out, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:], Path(__file__).with_name("compare.png"))
