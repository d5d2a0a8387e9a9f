"""Entropy Ratio Clipping (Su et al., arXiv 2512.05591) for LLM reinforcement learning, whole, in one file.

    python erc.py                                   the paper's run: a 1.5B reasoning model on one 80 GB GPU
    python erc.py --preset tiny                     the same code on a 0.5 M-parameter model, minutes on a CPU
    torchrun --nproc-per-node 8 erc.py              the paper's run on all GPUs of a node
    python erc.py --model DIR --data FILE --no-erc  your model, your problems, plain DAPO
    python erc.py eval --model DIR                  avg@k on the paper's six benchmarks, or on your problems
    python erc.py plot RUN RUN                      the paper's figures from the records of runs, and a table
    python erc.py --help                            every setting with its reason and source

PPO-clip watches one number a token: how the probability of the *sampled* token moved. The rest of the
distribution may drift unseen. ERC adds a second number, the ratio ρ of the token's new to its old entropy
(eq. 8), and drops the gradient of every token whose ρ has left (1 - β_low, 1 + β_high) (eq. 9). The method is
`policy_loss`; all else is what it takes to run it: sample, verify, take π_old's statistics, update eight
times, give the sampler the new weights.

Left out on purpose: critic, reference model, asynchronous rollouts, tensor parallelism, config files.

Axes, as suffixes: P prompts, G samples a prompt, B = P·G responses, T response tokens, L prompt and response
tokens, N response tokens laid flat, C a chunk of N, D hidden size, V vocabulary. Log-probs, entropies: nats.
"""
import os
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # read as torch loads: long spinning starves shared cores

import argparse, inspect, json, logging, math, random, re, resource, shutil, signal, statistics, sys, time
import multiprocessing as mp
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from decimal import Decimal
from functools import lru_cache
from importlib.util import find_spec
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import torch
import torch.distributed as dist


class UserError(Exception):
    """Something the user can put right: `main` prints it as one line and exits with status 2."""


# -------------------------------------------------------------------------------------------------- Processes

# Under torchrun this is process RANK of WORLD, each with a GPU, an engine and all weights of its own; started
# alone it is 0 of 1. Ranks share out prompts, verification and the samples of a mini-batch, and nothing else:
# after `gather` and after the gradients' sum all hold the same, to the bit, and take the same decisions.
launched = os.environ if dist.is_torchelastic_launched() else {}
RANK, LOCAL_RANK = (int(launched.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
WORLD, LOCAL_WORLD = (int(launched.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))


def gather(x):
    """What each rank holds -> [rank 0's, rank 1's, …], on every rank."""
    parts = [x] * WORLD
    try:
        if WORLD > 1:
            dist.all_gather_object(parts, x)
    except RuntimeError as e:                                       # gloo's: the connection was closed
        raise UserError(f"rank {RANK} lost another one, whose own error says why ({first_line(e)})")
    return parts


# --------------------------------------------------------------------------------------------------- Settings

EPS = {"grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gppo": (0.2, 0.2), "gspo": (3e-4, 4e-4)}  # ε_low, ε_high


@dataclass
class Config:  # the comments are the text of --help
    preset: str = "paper"              # paper | official (with the authors' extras) | tiny (minutes on a CPU)
    model: str = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"  # causal LM: Hugging Face id or directory (§4.1)
    data: str = "Kwai-Klear/KlearReasoner-MathSub-30K"  # file, or data set ID[:CONFIG[:SPLIT]] (§4.1)
    eval_data: str = ""                # held-out problems: greedy accuracy every eval_every steps
    # the objective
    algo: str = "dapo"                 # grpo (eq. 5) | dapo (eq. 6) | gppo (eq. 7) | gspo (§5.7)
    erc: bool = True                   # drop tokens whose entropy ratio left the band (eq. 9)
    erc_mode: str = "two-sided"        # two-sided (eq. 9) | one-sided: drop only what leads away (ours)
    eps_low: float = None              # PPO-clip at r = 1 - ε_low; default 0.2, gspo 3e-4
    eps_high: float = None             # PPO-clip at r = 1 + ε_high; default 0.2, dapo 0.28, gspo 4e-4
    beta_low: float = 0.05             # ERC keeps ρ > 1 - β_low (§4.1)
    beta_high: float = 0.05            # ERC keeps ρ < 1 + β_high (§4.1)
    dual_clip: float = 0.0             # A < 0: objective floored at this many A; 0 off, authors' code 10
    kl_coef: float = 0.0               # PPO-penalty, coefficient of KL(π_old‖π_θ) (eq. 2): an ablation (§5.5)
    entropy_coef: float = 0.0          # entropy bonus: an ablation (§5.6)
    nll_coef: float = 0.0              # NLL of the samples with reward 1; 0 off, authors' code 0.1
    # one step: a rollout batch and its updates
    prompts_per_step: int = 128        # groups in a rollout batch (§4.1)
    group_size: int = 8                # samples a prompt, G (§4.1)
    minibatch_prompts: int = 16        # groups an optimizer step: 128 / 16 = 8 updates a rollout batch (§4.1)
    oversample: float = 2.0            # batches of prompts sampled a round; equal rewards go (authors' code)
    max_rounds: int = 3                # rounds at most, until the batch is full (DAPO; authors' code 1)
    max_prompt_tokens: int = 4096      # longer prompts are left out (authors' code)
    max_response_tokens: int = 16384   # longer responses are cut off (§4.1)
    overlong_buffer: int = 0           # DAPO's length penalty over the last so many tokens; 0 off (authors)
    temperature: float = 1.0           # of sampling and of all statistics; top-p 1, top-k off (authors' code)
    # optimisation
    steps: int = 1000                  # rollout batches (ours; the authors train 10 epochs)
    lr: float = 1e-6                   # AdamW (§4.1)
    warmup_steps: int = 10             # rollout batches of linear warm-up, then constant (authors' code)
    weight_decay: float = 0.1          # AdamW (authors' code)
    grad_clip: float = 1.0             # global gradient norm (authors' code)
    # the machine
    sampler: str = "auto"              # vllm | hf (transformers' generate) | auto: vllm where it is installed
    micro_tokens: int = 32768          # padded tokens a forward pass: memory and speed, never the gradient
    gpu_memory: float = 0.6            # vLLM's share of the GPU while it samples; it sleeps while we train
    eval_every: int = 10               # steps between evaluations on eval_data
    save_every: int = 10               # steps between checkpoints
    seed: int = 1                      # of data order and sampling
    out: str = ""                      # the run's directory; default runs/PRESET-ALGO-SEED
    resume: bool = False               # go on from the checkpoint in --out

    def __post_init__(self):
        """Fill what depends on other settings, then check all; UserError names the setting and its range."""
        check(self, RANGES | {"minibatch_prompts": (1, self.prompts_per_step),
                              "overlong_buffer": (0, self.max_response_tokens)})
        self.eps_low = EPS[self.algo][0] if self.eps_low is None else self.eps_low
        self.eps_high = EPS[self.algo][1] if self.eps_high is None else self.eps_high
        self.out = self.out or f"runs/{self.preset}-{'erc-' if self.erc else ''}{self.algo}-{self.seed}"
        if self.prompts_per_step % self.minibatch_prompts:
            raise UserError(f"--minibatch-prompts {self.minibatch_prompts}: must divide "
                            f"--prompts-per-step {self.prompts_per_step}")


INF = math.inf
RANGES = dict(
    eps_low=(0, 1), eps_high=(0, INF), beta_low=(1e-9, INF), beta_high=(1e-9, INF), dual_clip=(0, INF),
    kl_coef=(0, INF), entropy_coef=(-INF, INF), nll_coef=(0, INF), prompts_per_step=(WORLD, INF),
    group_size=(2, INF), oversample=(1, 100), max_rounds=(1, 1000), max_prompt_tokens=(1, INF),
    max_response_tokens=(1, INF), temperature=(0.01, 100), steps=(1, INF), lr=(0, 1), warmup_steps=(0, INF),
    weight_decay=(0, 1), grad_clip=(1e-9, INF), micro_tokens=(1, INF), gpu_memory=(0.05, 0.95),
    eval_every=(1, INF), save_every=(1, INF), seed=(0, 2**32))
PRESETS = {
    "paper": {},
    "official": dict(dual_clip=10.0, nll_coef=0.1, max_rounds=1),
    "tiny": dict(
        model="runs/tiny-base", data="runs/tiny-base/train.jsonl", eval_data="runs/tiny-base/test.jsonl",
        oversample=1.0, max_rounds=1, max_prompt_tokens=32, max_response_tokens=16, overlong_buffer=4,
        steps=60, lr=1e-4, sampler="hf", micro_tokens=4096, save_every=20),
}


def check(cfg, ranges):
    """UserError names the first setting out of its range; the sampler `auto` becomes what is installed."""
    for name, allowed in {"preset": PRESETS, "algo": EPS, "erc_mode": ("two-sided", "one-sided"),
                          "sampler": ("auto", "vllm", "hf")}.items():
        if getattr(cfg, name, None) not in (None, *allowed):
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be one of "
                            f"{', '.join(allowed)}")
    for name, (low, high) in ranges.items():
        value = getattr(cfg, name)
        if value is not None and (not low <= value <= high or math.isinf(value)):           # NaN fails, too
            raise UserError(f"--{name.replace('_', '-')} {value}: must be between {low} and {high}")
    if cfg.sampler == "vllm" and not find_spec("vllm"):
        raise UserError("--sampler vllm: vllm is not installed; pip install vllm, or use --sampler hf")
    if cfg.sampler == "auto":
        cfg.sampler = "vllm" if find_spec("vllm") else "hf"


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} ({self.prog} --help lists all settings)")


def flags(kind, argv, prog="python erc.py"):
    """The flags of dataclass `kind` given on the command line -> dict. Its comments are the help."""
    ap = Parser(prog, description=__doc__, allow_abbrev=False,
                formatter_class=argparse.RawDescriptionHelpFormatter)
    reasons = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(kind), re.M))
    for f in fields(kind):
        how = (dict(action=argparse.BooleanOptionalAction) if f.type is bool
               else dict(type=f.type, metavar=f.type.__name__.upper()))
        ap.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, **how,
                        help=f"{reasons[f.name].replace('%', '%%')} [{f.default}]")
    return vars(ap.parse_args(argv))


def parse_args(argv):
    """Command line -> Config: the preset's settings, overridden by explicit flags. Under --resume the base is
    the run's own config.json, which a flag may repeat but not change; UserError names what differs."""
    given = flags(Config, argv)
    if not given.get("resume"):
        return Config(**PRESETS.get(given.get("preset", "paper"), {}) | given)
    path = Path(given["out"] if "out" in given else Config(**given).out, "config.json")
    if not path.is_file():
        raise UserError(f"--resume: {path} not found; name the run's directory with --out")
    free = {"steps", "eval_every", "save_every", "out", "resume"}
    try:
        saved = json.loads(path.read_text())
        differ = [f"--{k.replace('_', '-')} {v} (was {saved.get(k)})" for k, v in given.items()
                  if k not in free and v not in (saved.get(k), "auto")]
        if differ:
            raise UserError(f"--resume: {path} was started with other settings: {', '.join(sorted(differ))}")
        return Config(**saved | given)
    except (ValueError, TypeError, AttributeError) as e:
        raise UserError(f"--resume: {path} is damaged, or of another version ({first_line(e)}); put it back")


# --------------------------------------------------------------------------------------------------- Problems

class Problem(NamedTuple):
    prompt: str | list         # the user's turn as text; a list of chat messages where the data has several
    answer: str | list         # the reference; of a list any one counts


FIELDS = (("problem", "answer"), ("question", "answer"), ("input", "target"), ("question", "final_answer"),
          ("prompt", "reward_model"))                           # the last: Klear's, messages and ground_truth


def problem_from(record, where):
    """One record of any accepted format -> Problem; UserError says `where` and which field is wrong."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(record).__name__}")
    names = next((pair for pair in FIELDS if record.keys() >= set(pair)), None)
    if names is None:
        half = [other for pair in FIELDS for one, other in (pair, pair[::-1]) if one in record] or ["problem"]
        raise UserError(f"{where}: missing field '{half[0]}'; accepted: {', '.join(map('/'.join, FIELDS))}")
    prompt, answer = (record[name] for name in names)
    if isinstance(answer, dict):
        names, answer = ("prompt", "reward_model.ground_truth"), answer.get("ground_truth")
    turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    texts = [t.get("content") for t in turns if isinstance(t, dict) and t.get("role")]
    if not turns or not all(isinstance(x, str) and x.strip() for x in texts) or len(texts) < len(turns):
        raise UserError(f"{where}: field '{names[0]}' must be a non-empty string, or a list of chat messages")
    answers = answer if isinstance(answer, list) else [answer]
    # A float as a decimal: 1e-05 would be read as e - 5. GSM8K: "… #### answer".
    plain = [format(Decimal(repr(a)), "f") if isinstance(a, float) else str(a) for a in answers]
    plain = [text.split("####")[-1].strip() for text in plain]
    for a, text in zip(answers or [None], plain or [""]):
        if isinstance(a, bool) or not isinstance(a, (str, int, float)) or not text or (
                isinstance(a, float) and not math.isfinite(a)):
            raise UserError(f"{where}: field '{names[1]}' must be a number, a non-empty string or a list")
    return Problem(turns if len(turns) > 1 else texts[0], plain if len(plain) > 1 else plain[0])


def load_problems(source):
    """A .json / .jsonl file or a Hugging Face data set ID[:CONFIG[:SPLIT]] -> list[Problem].

    Accepted records: FIELDS. UserError: not found, not JSON in UTF-8, an unusable field, no record at all."""
    path, records = Path(source), []
    if path.exists() or path.suffix in (".json", ".jsonl"):
        if not path.is_file():
            raise UserError(f"{source}: no such data file")
        raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
        whole = raw.lstrip().startswith(b"[")             # else a record a line, whatever the suffix
        for number, line in [(1, raw)] if whole else enumerate(raw.split(b"\n"), 1):
            try:
                if line.strip():
                    found = json.loads(line.decode())
                    json.dumps(found, ensure_ascii=False).encode()        # a lone \ud800 is JSON, but no text
                    records += ([(f"{source}: record {i}", r) for i, r in enumerate(found, 1)] if whole
                                else [(f"{source}: line {number}", found)])
            except (ValueError, RecursionError) as e:     # UnicodeDecodeError is a ValueError
                number += getattr(e, "lineno", 1 + line.count(b"\n", 0, getattr(e, "start", 0))) - 1
                raise UserError(f"{source}: line {number}: not valid JSON in UTF-8 ({e})")
    else:
        from datasets import load_dataset
        name, config, split = (source.split(":") + ["", ""])[:3]
        try:
            data = load_dataset(name, config or None, split=split or None)
        except (OSError, ValueError) as e:
            raise UserError(f"data set {source}: cannot be loaded ({first_line(e)}); check name and network, "
                            "or give a local .jsonl file")
        if not split and "train" not in data and len(data) > 1:
            raise UserError(f"data set {source}: give a split, {name}:{config}:SPLIT, of {', '.join(data)}")
        rows = data if split else data["train"] if "train" in data else next(iter(data.values()))
        records = [(f"{source}: record {i}", r) for i, r in enumerate(rows, 1)]
    if not records:
        raise UserError(f"{source}: holds no problems")
    return [problem_from(r, where) for where, r in records]


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ----------------------------------------------------------------------------------------------------- Reward

def last_boxed(text):
    """What the last `\\boxed{}` after the last `</think>` holds; None if there is none or it never closes.

    >>> last_boxed("<think> \\\\boxed{1} </think> so \\\\boxed{\\\\frac{1}{2}}.")
    '\\\\frac{1}{2}'
    """
    text = text.rsplit("</think>", 1)[-1]
    text = text[max((m.end() for m in re.finditer(r"\\boxed\s*\{", text)), default=len(text)):]
    depth = 1
    for m in re.finditer(r"\\.|[{}]", text, re.S):                          # \{ and \} are no braces
        depth += {"{": 1, "}": -1}.get(m[0], 0)
        if depth == 0:
            return text[:m.start()].strip()


def verify_worker(pipe, seconds, megabytes):
    """Answer (boxed, reference) pairs from the pipe with 1.0 or 0.0 until it closes.

    The time limit is the kernel's: after `seconds` of CPU time SIGPROF ends the process, whatever C code it
    is in. So math-verify's own timeouts, whose SIGALRM has to wait for the interpreter, are off."""
    from math_verify import parse, verify
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)                # Ctrl-C is the trainer's to handle
    resource.setrlimit(resource.RLIMIT_DATA, (megabytes << 20, megabytes << 20))
    pipe.send("ready")
    while True:
        try:
            boxed, reference = pipe.recv()
        except EOFError:                                                    # the trainer is gone
            return
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            gold, answer = (parse(rf"\boxed{{{s}}}", parsing_timeout=None) for s in (reference, boxed))
            right = verify(gold, answer, timeout_seconds=None)
        except Exception:                                       # sympy raises nearly all there are
            right = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        pipe.send(float(right))


class Verifier:
    """math-verify in worker processes. `killed` counts answers that ran into a limit, and so scored 0.0."""

    def __init__(self, workers=None, seconds=5.0, megabytes=4096):
        if not find_spec("math_verify"):
            raise UserError("math-verify is not installed: pip install math-verify")
        # A fork server with all imports done: a worker starts in .1 s, not in the seconds of importing torch,
        # and inherits no GPU state.
        self.context = mp.get_context("forkserver")
        self.context.set_forkserver_preload(["torch.distributed", "math_verify"])
        self.limits, self.killed = (seconds, megabytes), 0
        self.idle = [self.start() for _ in range(workers or max(1, min(32, os.cpu_count() // LOCAL_WORLD)))]

    def start(self):
        ours, theirs = self.context.Pipe()
        self.context.Process(target=verify_worker, args=(theirs, *self.limits), daemon=True).start()
        theirs.close()
        try:
            ours.recv()                                                     # its greeting
        except EOFError:
            raise UserError("a verifier process ended at once: see above, or was this file edited meanwhile?")
        return ours

    def score(self, responses, answers):
        """1.0 where the last boxed answer equals the reference (of a list: any one), else 0.0; in order."""
        wanted = [[(boxed, a) for a in ([answer] if isinstance(answer, str) else answer)] if boxed else []
                  for boxed, answer in zip(map(last_boxed, responses), answers, strict=True)]
        value = {x: int(x) if re.fullmatch("-?[0-9]{1,18}", x) else x
                 for pairs in wanted for pair in pairs for x in pair}
        verdict = {(boxed, a): float(value[boxed] == value[a]) for pairs in wanted for boxed, a in pairs}
        # Each distinct pair once; that two integers differ needs no computer algebra.
        todo, busy = [pair for pair, same in verdict.items()
                      if not same and str in (type(value[x]) for x in pair)], {}
        while todo or busy:
            while todo and self.idle:
                pipe = self.idle.pop()
                try:
                    pipe.send(todo[-1])
                    busy[pipe] = todo.pop()
                except OSError:                                 # it died idle: a new one takes the pair
                    self.idle.append(self.start())
            for pipe in wait(list(busy)):
                pair = busy.pop(pipe)
                try:
                    verdict[pair] = pipe.recv()
                except (EOFError, OSError):                     # a limit ended it: 0.0, and a new worker
                    self.killed, pipe = self.killed + 1, self.start()
                self.idle.append(pipe)
        return [max((verdict[pair] for pair in pairs), default=0.0) for pairs in wanted]


# --------------------------------------------------------------------------------------------------- Rollouts

@dataclass
class Sample:
    prompt: list               # token ids, chat template included
    response: list             # token ids, end-of-sequence included
    logp: list               # the sampler's own log π of the response's tokens, to check with the trainer's
    truncated: bool            # cut off at the length limit: no end-of-sequence
    reward: float = 0.0
    advantage: float = 0.0


class HFSampler:
    """transformers' `generate` of the model in training: no second copy of it; for CPUs and small models."""

    def __init__(self, model, eos, pad):
        self.model, self.eos, self.pad = model, eos, pad

    def load_weights(self, model):
        self.model = model

    @torch.no_grad()
    def generate(self, prompts, n, max_tokens, temperature=1.0, top_p=1.0, seed=0):
        """n samples of each prompt (token ids) -> list[Sample], prompt by prompt. Temperature 0 is greedy."""
        from transformers import GenerationConfig, TopPLogitsWarper
        torch.manual_seed(seed)
        samples, rows = [], [p for p in prompts for _ in range(n)]
        draw = dict(temperature=1.0, top_p=1.0, top_k=0) if temperature else {}
        config = GenerationConfig(do_sample=temperature > 0, **draw, num_beams=1, repetition_penalty=1.0,
                                  max_new_tokens=max_tokens, eos_token_id=self.eos, pad_token_id=self.pad)
        def record(ids_BL, logits_BV):              # called before each token is drawn: the last column of
            if columns:                             # ids was drawn from the logits of the call before
                columns[-1] = columns[-1].gather(1, ids_BL[:, -1:])
            logits_BV = logits_BV.float() / (temperature or 1.0)
            if top_p < 1:
                logits_BV = TopPLogitsWarper(top_p)(ids_BL, logits_BV)
            columns.append(logits_BV.log_softmax(-1))
            return logits_BV                        # recorded is what is drawn from, nothing comes after
        # Unset fields would come from the checkpoint's generation_config.json; checkpointing forbids a cache.
        own, training = self.model.generation_config, self.model.training
        self.model.generation_config = GenerationConfig()
        self.model.eval()
        size = 2**16 // (max(map(len, rows), default=0) + max_tokens)           # 65,536 tokens of KV cache
        size = max(1, min(size, 2**25 // self.model.config.get_text_config().vocab_size))  # 128 MB of logits
        for part in (rows[i:i + size] for i in range(0, len(rows), size)):
            columns, L = [], max(map(len, part))
            ids_BL = torch.tensor([[self.pad] * (L - len(p)) + p for p in part], device=self.model.device)
            lengths_B1 = torch.tensor([len(p) for p in part], device=self.model.device)[:, None]
            seen_BL = (torch.arange(L, device=self.model.device) >= L - lengths_B1).long()
            with autocast(self.model.device):
                out_BL = self.model.generate(ids_BL, attention_mask=seen_BL, generation_config=config,
                                             logits_processor=[record])
            record(out_BL, columns[-1])                                     # the last column has no next call
            logp_BT = torch.cat(columns[:-1], 1)
            for prompt, ids, logp in zip(part, out_BL[:, L:].tolist(), logp_BT.tolist()):
                end = next((t + 1 for t, y in enumerate(ids) if y in self.eos), None)
                samples.append(Sample(prompt, ids[:end], logp[:end], end is None))
        self.model.generation_config = own
        self.model.train(training)
        return samples


class VLLMSampler:
    """vLLM in this process. It holds its own copy of the weights: `load_weights` is due after every change of
    the trainer's, and after every `sleep`."""

    def __init__(self, path, max_tokens, eos, gpu_memory=0.6):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"          # the engine in this process: no IPC
        os.environ["VLLM_FLOAT32_MATMUL_PRECISION"] = torch.get_float32_matmul_precision()  # or it sets it
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM
        self.eos, cuda = eos, torch.cuda.is_available()
        memory = dict(gpu_memory_utilization=gpu_memory) if cuda else dict(kv_cache_memory_bytes=1 << 30)
        try:
            self.llm = LLM(
                model=str(path), dtype="bfloat16" if cuda else "float32", max_model_len=max_tokens,
                enforce_eager=not cuda, enable_sleep_mode=cuda, generation_config="vllm", seed=0,
                distributed_executor_backend="external_launcher" if WORLD > 1 else None,
                logprobs_mode="processed_logprobs", hf_overrides={"head_dtype": "float32"}, **memory)
        except Exception as e:                                  # whatever stops an engine: memory, the model
            raise UserError(f"vLLM does not start with {path} ({first_line(e)}); change --gpu-memory, lower "
                            "--max-response-tokens, or take --sampler hf")
        self.sleep()

    def sleep(self):
        """Give the GPU back to the trainer: drop weights and KV cache."""
        self.llm.sleep(level=2)

    def load_weights(self, model):
        """Copy the trainer's parameters on the device, and forget the prefixes cached under the old ones."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()                            # what torch holds unused, vLLM cannot have
        self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": model.state_dict().items()})
        self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()                                       # vLLM never does this by itself

    def generate(self, prompts, n, max_tokens, temperature=1.0, top_p=1.0, seed=0):
        """n samples of each prompt (token ids) -> list[Sample], prompt by prompt. Temperature 0 is greedy."""
        import numpy as np
        from vllm import SamplingParams
        torch.manual_seed(seed)                         # vLLM draws from torch's own generator, and on a GPU
        np.random.seed(seed % 2**32)                    # a seed for each request from numpy's
        params = SamplingParams(
            n=n if temperature else 1, temperature=temperature, top_p=top_p, top_k=0, min_p=0.0,
            repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, seed=None, stop=None,
            stop_token_ids=self.eos, ignore_eos=False, min_tokens=0, max_tokens=max_tokens, logprobs=0,
            flat_logprobs=True, detokenize=False)
        ids = [{"prompt_token_ids": p} for p in prompts]
        outs = self.llm.generate(ids, params, use_tqdm=RANK == 0 and sys.stderr.isatty())
        return [Sample(p, list(o.token_ids), list(o.logprobs.logprobs), o.finish_reason == "length")
                for p, out in zip(prompts, outs) for o in out.outputs * (1 if temperature else n)]


# ---------------------------------------------------------------------------------------------- Entropy ratio

def logp_entropy(logits_NV, targets_N, work=(None, None), kappa=False):
    """log π(y) and H(π) = -Σ_v π_v log π_v of each row, in nats and fp32 -> (logp_N, entropy_N[, kappa_N]).

    With d = z - max z and s = Σ e^d without the argmax's own term: log π(y) = d_y - log(1+s), and H =
    log(1+s) - Σ e^d·d / (1+s). All terms have one sign, so nothing cancels, and H keeps a relative error of
    1e-6 where the policy is near-deterministic, as at most tokens of a reasoning model. The usual
    logsumexp(z) - Σπz is 17 % off at H = 6e-5, where ERC asks about 5 %. Logits may be -inf (probability 0).
    work: two tensors (N, V) to work in, the first may be the logits: new pages cost as much as arithmetic.
    kappa: also κ = -(dH/dz)·(d log π(y)/dz), so that a step up A·log π(y) changes H by -A·κ to first order.
    ∂H/∂z_v = -π_v c_v with c_v = log π_v + H, so κ = Σ_v π_v c_v (δ_vy - π_v), and c_v = d_v + c_top.

    >>> [round(x.item(), 4) for x in logp_entropy(torch.tensor([[.85, 0, .15, 0]]).log(), torch.tensor([0]))]
    [-0.1625, 0.4227]
    """
    logits_NV = logits_NV.float()
    top_N1, argmax_N1 = logits_NV.max(-1, keepdim=True)
    d_y_N = (logits_NV.gather(-1, targets_N[:, None]) - top_N1).squeeze(-1)
    d_NV = torch.sub(logits_NV, top_N1, out=work[0])
    d_NV.clamp_(min=-1e4).scatter_(-1, argmax_N1, -1e4)         # e^-10000 is 0, and 0 · -10000 no NaN
    e_NV = torch.exp(d_NV, out=work[1])
    s_N = e_NV.sum(-1)
    ed_NV = torch.mul(e_NV, d_NV, out=work[0])
    c_top_N = -ed_NV.sum(-1) / (1 + s_N)
    stats = d_y_N - s_N.log1p(), s_N.log1p() + c_top_N
    if not kappa:
        return stats
    e2d_N = torch.mul(e_NV, ed_NV, out=work[0]).sum(-1)
    others_N = (e2d_N + c_top_N * torch.mul(e_NV, e_NV, out=work[1]).sum(-1)) / (1 + s_N)**2
    y_is_top_N = c_top_N * s_N / (1 + s_N)**2                   # 1 - π_top is s / (1 + s), no difference
    y_is_other_N = stats[0].exp() * (d_y_N + c_top_N) - c_top_N / (1 + s_N)**2
    return *stats, torch.where(targets_N == argmax_N1.squeeze(-1), y_is_top_N, y_is_other_N) - others_N


class HeadStats(torch.autograd.Function):
    """logp_entropy(hidden @ weight.T / temperature, targets), a chunk of rows at a time. The backward
    computes each chunk's logits again, so that the peak does not grow with N."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N, temperature, entropy_grad, chunk, kappa):
        stats = torch.empty(2 + kappa, len(targets_N), device=hidden_ND.device).unbind()
        W_VD, rows = weight_VD.float(), min(chunk, len(targets_N))
        z_CV, e_CV = (W_VD.new_empty(rows, len(W_VD)) for _ in range(2))
        for i in range(0, len(targets_N), chunk):
            c, n = slice(i, i + chunk), min(rows, len(targets_N) - i)
            logits_CV = torch.mm(hidden_ND[c].float() / temperature, W_VD.T, out=z_CV[:n])
            for x_N, x_C in zip(stats, logp_entropy(logits_CV, targets_N[c], (logits_CV, e_CV[:n]), kappa)):
                x_N[c] = x_C
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, *stats[:2])
        ctx.temperature, ctx.entropy_grad, ctx.chunk = temperature, entropy_grad, chunk
        ctx.mark_non_differentiable(*stats[1 + entropy_grad:])
        return stats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_logp_N, g_entropy_N, *_):
        hidden_ND, weight_VD, targets_N, logp_N, entropy_N = ctx.saved_tensors
        W_VD = weight_VD.float()
        g_hidden_ND, g_weight_VD = torch.zeros_like(hidden_ND), torch.zeros_like(W_VD)
        alive_N = (g_logp_N != 0) | ctx.entropy_grad            # a dropped token costs no backward
        buffer_CV = W_VD.new_empty(min(ctx.chunk, len(targets_N)), len(W_VD))
        for n_C in alive_N.nonzero().squeeze(1).split(ctx.chunk):
            x_CD, g_C1 = hidden_ND[n_C].float() / ctx.temperature, -g_logp_N[n_C, None]
            y_C1, logp_C1, H_C1 = targets_N[n_C, None], logp_N[n_C, None], entropy_N[n_C, None]
            z_CV = torch.mm(x_CD, W_VD.T, out=buffer_CV[:len(n_C)])
            z_CV += logp_C1 - z_CV.gather(1, y_C1)              # now log π_v
            if ctx.entropy_grad:                                # ∂ H / ∂z_v = -π_v (log π_v + H)
                h_CV = (z_CV + H_C1) * z_CV.exp() * g_entropy_N[n_C, None]
            # ∂ log π_y / ∂z_v = δ_vy - π_v, and 1 - π_y = -expm1(log π_y) without cancellation
            dz_CV = z_CV.exp_().scatter_(1, y_C1, logp_C1.expm1())
            if ctx.entropy_grad:
                dz_CV, g_C1 = dz_CV.mul_(g_C1).sub_(h_CV), 1.0
            g_hidden_ND[n_C] = (dz_CV @ W_VD * (g_C1 / ctx.temperature)).to(hidden_ND.dtype)
            g_weight_VD.addmm_(dz_CV.T, x_CD * g_C1)            # scaling D columns is cheaper than V
        return g_hidden_ND, g_weight_VD.to(weight_VD.dtype), None, None, None, None, None


def token_stats(hidden_ND, lm_head, targets_N, temperature=1.0, entropy_grad=False, chunk=256, kappa=False):
    """log π(y), H[, κ] of the policy softmax(lm_head(hidden) / temperature), as logp_entropy; nats, fp32.

    Never holds more than one chunk of logits, forward or backward. Differentiable in hidden and
    lm_head.weight; the entropy carries a gradient only with `entropy_grad`. UserError: a head with a bias."""
    if getattr(lm_head, "bias", None) is not None:
        raise UserError("the model's output head has a bias, which token_stats leaves out: use another model")
    with torch.autocast(hidden_ND.device.type, enabled=False):  # the head is fp32 inside autocast, too
        return HeadStats.apply(hidden_ND, lm_head.weight, targets_N, temperature, entropy_grad, chunk, kappa)


def entropy_ratio(entropy, old_entropy):
    """ρ = H(π_θ) / H(π_old) of the same token (eq. 8), with the authors' 1e-8 on both sides.

    >>> round(entropy_ratio(0.6664, 0.4227), 2)
    1.58
    """
    return (entropy + 1e-8) / (old_entropy + 1e-8)


# -------------------------------------------------------------------------------------------------- Objective

def group_advantages(rewards_PG):
    """Â = (r - mean) / (std + 1e-6) within each group of G >= 2 samples, unbiased std (eq. 4).

    >>> group_advantages(torch.tensor([[1., 0., 0., 0.], [1., 1., 1., 1.]])).round(decimals=3).tolist()
    [[1.5, -0.5, -0.5, -0.5], [0.0, 0.0, 0.0, 0.0]]
    """
    r_PG = rewards_PG.double()                                  # fp32 rounding over 1e-6 would not be 0
    return ((r_PG - r_PG.mean(1, keepdim=True)) / (r_PG.std(1, keepdim=True) + 1e-6)).float()


TOKENS = ("old_logp", "logp", "old_entropy", "entropy", "rho", "advantage", "ppo_clip", "erc_low", "erc_high",
          "erc_drop")


def policy_loss(logp_BT, entropy_BT, old_logp_BT, old_entropy_BT, advantages_B, mask_BT, cfg, norm=None,
                tokens=None, kappa_BT=None):
    """The objective of every method here, negated -> (loss, metrics): a scalar to minimise, a dict of floats.

    mask_BT marks response tokens. `norm` divides the sum: the whole mini-batch's number of response tokens
    (dapo, gppo) or of responses (grpo, gspo); by default this call's own. cfg: algo, erc, eps_*, beta_*,
    dual_clip, kl_coef, entropy_coef. Given kappa_BT, the κ of `logp_entropy`, ERC is one-sided: out of the
    band it drops only what leads further out, to first order in the token's own logits. metrics, over this
    call's tokens: the shares where the PPO clip binds (ppo_clip), where ρ is below (erc_low) or above
    (erc_high) the band, and where ERC drops (erc_drop); mean entropy; KL(π_old‖π_θ). Nats. To a list `tokens`
    it appends what decided on each token, (len(TOKENS), N)."""
    mask_BT, A_B1 = mask_BT.bool(), advantages_B[:, None]
    length_B1 = mask_BT.sum(1, keepdim=True).clamp(min=1)                                     # |y_i|
    # Padding may hold anything; e^±20 bounds r, so that no 0 · ∞ gets into the gradient.
    log_r_BT = (logp_BT - old_logp_BT).masked_fill(~mask_BT, 0.0).clamp(-20, 20)              # eq. 1
    entropy_BT = entropy_BT.masked_fill(~mask_BT, 0.0)
    r_BT = log_r_BT.exp()
    if cfg.algo == "gspo":       # the value is the sequence's ratio, the gradient each token's own part of it
        r_BT = (log_r_BT - log_r_BT.detach() + log_r_BT.detach().sum(1, keepdim=True) / length_B1).exp()
    bound_BT = r_BT.clamp(1 - cfg.eps_low, 1 + cfg.eps_high)                                  # eqs. 3, 5, 6
    ppo_BT = (r_BT - bound_BT) * A_B1 > 0                                                   # the min takes it
    if cfg.algo == "gppo":
        bound_BT = (bound_BT / r_BT).detach() * r_BT                                          # eq. 7
    J_BT = torch.minimum(r_BT * A_B1, bound_BT * A_B1)                                       # eqs. 3, 5, 6, 7
    if cfg.dual_clip:
        J_BT = torch.where(A_B1 < 0, torch.maximum(J_BT, cfg.dual_clip * A_B1), J_BT)
    rho_BT = entropy_ratio(entropy_BT.detach(), old_entropy_BT)                               # eq. 8
    low_BT, high_BT = rho_BT <= 1 - cfg.beta_low, rho_BT >= 1 + cfg.beta_high
    drop_BT = (low_BT | high_BT) & cfg.erc                                                    # eq. 9
    if kappa_BT is not None:                                # ours: a step up A·log π(y) changes H by -A·κ
        drop_BT &= torch.where(high_BT, A_B1 * kappa_BT < 0, A_B1 * kappa_BT > 0)
    J_BT = J_BT.masked_fill(drop_BT, 0.0)
    kl_BT = log_r_BT.exp() - 1 - log_r_BT               # eq. 2: its mean over y ~ π_old is KL(π_old‖π_θ)
    loss_BT = -J_BT + cfg.kl_coef * kl_BT - cfg.entropy_coef * entropy_BT
    # Eqs. 6, 7, 9 divide by Σ|y_i|, dropped tokens included; eq. 5 averages over each response first.
    weight_BT = mask_BT / (length_B1 if cfg.algo in ("grpo", "gspo") else 1)
    loss = (loss_BT * weight_BT).sum() / (weight_BT.sum() if norm is None else norm)
    with torch.no_grad():
        shown = dict(ppo_clip=ppo_BT, erc_low=low_BT, erc_high=high_BT, erc_drop=drop_BT,
                     entropy=entropy_BT, kl=kl_BT)
        means = torch.stack([x_BT[mask_BT].float().mean() for x_BT in shown.values()]).tolist()
        if tokens is not None:
            every = (old_logp_BT, logp_BT, old_entropy_BT, entropy_BT, rho_BT, A_B1, ppo_BT, low_BT, high_BT,
                     drop_BT)
            tokens.append(torch.stack([x_BT.expand_as(mask_BT)[mask_BT].float() for x_BT in every]))
    return loss, dict(zip(shown, means))


# --------------------------------------------------------------------------------------------------- Training

# The mean |Δ log π| between sampler and trainer over which a run stops, without and with a GPU. On the tiny
# preset fp32 agrees with fp32 to 2e-7; weights rounded to bf16 cost 5e-4, temperature 0.99 1e-3, a forgotten
# sync 7e-3. Between two bf16 bodies rounding alone makes about 1e-2: there only gross errors show.
MAX_GAP = 1e-4, 0.1


def autocast(device):
    """bf16 for the body on a GPU; on a CPU all is fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def load_model(path, device):
    """A Hugging Face causal LM -> (model, tokenizer, ids that end a response): fp32 masters, no dropout."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    try:
        config, tokenizer = AutoConfig.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        for name in [k for k, v in vars(config).items() if "drop" in k and isinstance(v, float)]:
            setattr(config, name, 0.0)                                   # with dropout r ≠ 1 at equal weights
        model, info = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32,
                                                           output_loading_info=True)
        model.to(device)
    except Exception as e:                                  # a broken directory raises nearly all there are
        raise UserError(f"model {path}: cannot be loaded ({first_line(e)}); check the path, or the network")
    if lost := sorted(info["missing_keys"]):                # transformers would go on with random ones
        raise UserError(f"model {path}: {len(lost)} of its tensors are missing, the first is {lost[0]}; get "
                        "another copy")
    if len(tokenizer) > (rows := model.get_input_embeddings().num_embeddings):
        raise UserError(f"model {path}: its tokenizer has {len(tokenizer)} tokens, its embedding {rows}; "
                        "they are not of one model")
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"model {path}: its weights hold NaN or infinity; get another copy")
    listed = model.generation_config.eos_token_id
    eos = {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])} - {None}
    if not eos:
        raise UserError(f"model {path}: neither tokenizer nor generation config has an end-of-sequence token")
    text = "Let x = 3.\n\n  Then 2x = 6"              # a tokenizer read as the wrong class loses white space
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if tokenizer.decode(ids, clean_up_tokenization_spaces=False) != text:
        raise UserError(f"model {path}: its tokenizer does not decode what it encodes; check its files")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = min(eos)                                   # harmless: all masks go by length
    if device.type == "cuda":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train(), tokenizer, sorted(eos)


def encode(tokenizer, prompt):
    """The prompt as one user turn of the chat template -> token ids; without a template the bare text."""
    turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    if tokenizer.chat_template is None:
        return tokenizer("\n\n".join(t["content"] for t in turns) + "\n").input_ids
    from jinja2 import TemplateError
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError as e:
        raise UserError(f"the chat template of {tokenizer.name_or_path} refuses {str(turns)[:60]} ({first_line(e)})")
    return tokenizer(text, add_special_tokens=False).input_ids         # the template has written the specials


def micro_batches(samples, budget):
    """This rank's share of samples, every WORLD-th by length so that all ranks have as much to do, cut into
    lists of similar length, of at most `budget` padded tokens (or one sample) each."""
    out, size = [], lambda s: len(s.prompt) + len(s.response)
    for s in sorted(samples, key=size, reverse=True)[RANK::WORLD]:
        if not out or (len(out[-1]) + 1) * size(out[-1][0]) > budget:
            out.append([])
        out[-1].append(s)
    return out


def forward(model, samples, cfg):
    """One micro-batch -> (logp_BT, entropy_BT, mask_BT, kappa_BT or None): old and new statistics alike."""
    device, rows = model.device, [s.prompt + s.response[:-1] for s in samples]  # the last predicts nothing
    L, T = max(map(len, rows)), max(len(s.response) for s in samples)
    end_B1 = torch.tensor([[len(row)] for row in rows], device=device)
    length_B1 = torch.tensor([[len(s.response)] for s in samples], device=device)
    # Padding on the right, where causal attention sees it from no response token: no attention mask.
    ids_BL = torch.tensor([row + [0] * (L - len(row)) for row in rows], device=device)
    # Position l predicts token l + 1, so a response's t tokens are predicted at the last t of its row.
    l_L, mask_BT = torch.arange(L, device=device), torch.arange(T, device=device) < length_B1
    predicts_BL = (l_L >= end_B1 - length_B1) & (l_L < end_B1)
    targets_N = torch.tensor([y for s in samples for y in s.response], device=device)
    with autocast(device):
        hidden_BLD = model.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state
    stats = token_stats(hidden_BLD[predicts_BL], model.get_output_embeddings(), targets_N, cfg.temperature,
                        cfg.entropy_coef != 0, kappa=cfg.erc_mode == "one-sided" and torch.is_grad_enabled())
    logp_BT, entropy_BT, *kappa = (x_N.new_zeros(mask_BT.shape).masked_scatter(mask_BT, x_N) for x_N in stats)
    return logp_BT, entropy_BT, mask_BT, *(kappa or [None])


def overlong(length, cfg):
    """DAPO's length penalty, taken off the reward: 0 up to max - buffer tokens, then linear, to 1 at max."""
    return max(0, length - cfg.max_response_tokens + cfg.overlong_buffer) / max(1, cfg.overlong_buffer)


@lru_cache(2)
def epoch_order(n, seed, epoch):
    return random.Random(f"order {seed} {epoch}").sample(range(n), n)


def rollout(cfg, step, cursor, sampler, verifier, tokenizer, prompts):
    """Sample, verify, keep groups whose rewards differ -> (groups, a sample to show, new cursor, metrics).

    Rounds go on until prompts_per_step groups are kept, max_rounds at most. All randomness is a function of
    seed, step, cursor, rank and number of ranks, so a resumed run draws the same."""
    # Equal rewards give no gradient. DAPO samples others instead; in GRPO's mean over responses they stay.
    keep_all, groups, seen, shown, n, G = cfg.algo == "grpo", [], [], None, len(prompts), cfg.group_size
    count = math.ceil(cfg.prompts_per_step * (1 if keep_all else cfg.oversample))
    m = dict(seconds_sample=0.0, seconds_verify=0.0, verifier_killed=0)
    for attempt in range(cfg.max_rounds):
        if len(groups) >= cfg.prompts_per_step:
            break
        started = time.perf_counter()
        chosen = [prompts[epoch_order(n, cfg.seed, k // n)[k % n]]
                  for k in range(cursor + RANK, cursor + count, WORLD)]
        cursor += count
        seed = random.Random(f"sample {cfg.seed} {step} {attempt}").getrandbits(32) + RANK
        samples = sampler.generate([ids for ids, _ in chosen], G, cfg.max_response_tokens, cfg.temperature,
                                   seed=seed)
        sampled, killed = time.perf_counter(), verifier.killed
        texts = tokenizer.batch_decode([s.response for s in samples], skip_special_tokens=True)
        rewards = verifier.score(texts, [answer for _, answer in chosen for _ in range(G)])
        shaped_B = torch.tensor([r - overlong(len(s.response), cfg) for s, r in zip(samples, rewards)])
        shaped_PG = shaped_B.view(len(chosen), G)
        for s, r, a in zip(samples, rewards, group_advantages(shaped_PG).flatten().tolist()):
            s.reward, s.advantage = r, a
        shown = shown or samples[0]
        kept = [samples[p * G:p * G + G] for p, r_G in enumerate(shaped_PG)
                if keep_all or (r_G != r_G[0]).any()]
        m["seconds_sample"] += sampled - started
        m["seconds_verify"] += time.perf_counter() - sampled
        counts = [(s.reward, len(s.response), s.truncated) for s in samples]
        for kept, counts, killed in gather((kept, counts, verifier.killed - killed)):
            groups, seen, m["verifier_killed"] = groups + kept, seen + counts, m["verifier_killed"] + killed
    rewards, lengths, truncated = zip(*seen)
    return groups[:cfg.prompts_per_step], shown, cursor, m | dict(
        reward=sum(rewards) / len(seen), response_length=sum(lengths) / len(seen),
        truncated=sum(truncated) / len(seen), tokens=sum(lengths), groups=len(groups))


def old_statistics(model, micros, cfg):
    """π_old's log-probs and entropies, from the trainer itself -> ([forward's output], metrics).

    The sampler's log-probs of the same tokens serve as a check; UserError if they are far apart."""
    from tqdm import tqdm
    started = time.perf_counter()
    with torch.no_grad():
        old = [forward(model, micro, cfg) for micro in tqdm(micros, "old policy", leave=False,
                                                                  disable=RANK > 0 or None)]
    theirs_N = torch.tensor([x for micro in micros for s in micro for x in s.logp])
    ours_N = torch.cat([logp_BT[mask_BT] for logp_BT, _, mask_BT, _ in old] or [theirs_N]).cpu()
    gap_N = torch.cat(gather((ours_N - theirs_N).abs()))
    mean, limit = gap_N.mean().item(), MAX_GAP[model.device.type == "cuda"]
    if not mean <= limit:
        raise UserError(f"sampler and trainer disagree by {mean:.2g} nats a token (> {limit}): the sampler "
                        "has stale weights, or another distribution (temperature, top-p, soft-capped logits)")
    seconds = time.perf_counter() - started
    return old, dict(sampler_gap=mean, sampler_gap_max=gap_N.max().item(), seconds_old=seconds)


def update(model, optimizer, groups, cfg):
    """The optimizer steps of one rollout batch -> (metrics, tokens_KN, rows as in TOKENS: a million at most).

    All old statistics come first, from the micro-batches that the updates use: on the first mini-batch
    r ≡ 1 and ρ ≡ 1, or else UserError."""
    from tqdm import tqdm
    size = cfg.minibatch_prompts
    minis = [sum(groups[i:i + size], []) for i in range(0, len(groups), size)]
    plan = [micro_batches(mini, cfg.micro_tokens) for mini in minis]
    old, m = old_statistics(model, sum(plan, []), cfg)
    started, old, sums, tokens, norms = time.perf_counter(), iter(old), {}, [], []
    total = sum(len(s.response) for mini in minis for s in mini)
    for mini, micros in zip(tqdm(minis, "updates", leave=False, disable=RANK > 0 or None), plan):
        # The denominators are the mini-batch's: its gradient is the same however it is cut, and shared out.
        norm = sum(len(s.response) for s in mini) if cfg.algo in ("dapo", "gppo") else len(mini)
        right = sum(len(s.response) for s in mini if s.reward == 1.0)
        for micro in micros:
            old_logp_BT, old_entropy_BT, mask_BT, _ = next(old)
            logp_BT, entropy_BT, _, kappa_BT = forward(model, micro, cfg)
            advantages_B = torch.tensor([s.advantage for s in micro], device=model.device)
            loss, shown = policy_loss(logp_BT, entropy_BT, old_logp_BT, old_entropy_BT, advantages_B, mask_BT,
                                      cfg, norm, tokens, kappa_BT)
            if cfg.nll_coef and right:                                 # authors' code: imitate what was right
                right_B1 = torch.tensor([[s.reward == 1.0] for s in micro], device=model.device)
                loss = loss - cfg.nll_coef * logp_BT[mask_BT & right_B1].sum() / right
            loss.backward()
            old_logp_N, logp_N, _, _, rho_N, *_ = tokens[-1]
            for name, value in shown.items():
                sums[name] = sums.get(name, 0.0) + value * len(rho_N) / total
            if not norms:
                drift = max((logp_N - old_logp_N).abs().max().item(), (rho_N - 1).abs().max().item())
                if not drift < 1e-3:
                    raise UserError(f"r or ρ is off 1 by {drift:.2g} before the first update: old and new "
                                    "statistics do not come from the same weights through the same code")
            tokens[-1] = tokens[-1][:, ::1 + total // 2**20].clone()        # a view would keep them all
        for p in model.parameters() if WORLD > 1 else ():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad           # no sample for this rank
            dist.all_reduce(p.grad)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip).item())
        if math.isfinite(norms[-1]):
            optimizer.step()
        optimizer.zero_grad()
    finite, tokens = [x for x in norms if math.isfinite(x)], tokens or [torch.empty(len(TOKENS), 0)]
    sums, tokens = zip(*gather((sums, torch.cat(tokens, 1).cpu())))
    m |= {name: sum(part.get(name, 0.0) for part in sums) for name in sums[0]}
    tokens_KN = torch.cat(tokens, 1)
    rho_N = tokens_KN[TOKENS.index("rho")].sort().values
    m |= {f"rho_p{q}": rho_N[len(rho_N) * q // 100].item() for q in (1, 50, 99)}
    return m | dict(
        rho_drift=(rho_N - 1).abs().median().item(), grad_norm=sum(finite) / max(1, len(finite)),
        grad_norms=finite, updates=len(finite), updates_skipped=len(norms) - len(finite),
        seconds_update=time.perf_counter() - started), tokens_KN


def budget(model, cfg):
    """One line: an estimate of where a training step's memory goes, in GiB, from the model's shapes."""
    c, cuda, n = model.config.get_text_config(), model.device.type == "cuda", model.num_parameters()
    tokens = max(cfg.micro_tokens, cfg.max_prompt_tokens + cfg.max_response_tokens)
    # bytes a token within a layer: four tensors as wide as its MLP, about twenty as wide as the hidden state
    mlp = getattr(c, "intermediate_size", None) or 4 * c.hidden_size
    layer = (2 if cuda else 4) * (4 * mlp + 20 * c.hidden_size)
    kept = layer * c.num_hidden_layers
    if cuda:                                     # gradient checkpointing: each layer's input, and one layer
        kept = 4 * c.hidden_size * c.num_hidden_layers + layer
    parts = {"fp32 masters": 4 * n, "gradients": 4 * n, "Adam": 8 * n, "activations": tokens * kept,
             "head": 4 * c.vocab_size * (2 * 256 + c.hidden_size)}
    line = " + ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
    return f"{line} = {sum(parts.values()) / 2**30:.2f} GiB" + (
        f"; while sampling masters, Adam and vLLM's {cfg.gpu_memory:.0%} of the card" if cuda else "")


def rehearse(model, optimizer, cfg):
    """Forward and backward of the largest micro-batch, Adam's state in place: what does not fit fails now,
    not in an hour; UserError says what to lower. Leaves weights and optimizer as they were."""
    longest = cfg.max_prompt_tokens + cfg.max_response_tokens
    rows = math.ceil(cfg.micro_tokens / longest)
    size = longest if rows == 1 else cfg.micro_tokens // rows
    T = min(size - 1, cfg.max_response_tokens)
    micro = [Sample([0] * (size - T), [0] * T, [], True)] * rows
    try:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        for g in optimizer.param_groups:
            g["lr"] = 0.0                                                # `train` sets it before every update
        optimizer.step()                                                # allocates the moments, moves nothing
        logp_BT, entropy_BT, *_ = forward(model, micro, cfg)
        (logp_BT.sum() + cfg.entropy_coef * entropy_BT.sum()).backward()
    except RuntimeError as e:                           # a CPU's allocator knows no OutOfMemoryError
        if not re.search("out of memory|allocate memory", str(e)):
            raise
        raise UserError(f"{rows} × {size} tokens do not fit this machine: lower --micro-tokens "
                        f"{cfg.micro_tokens} or --max-response-tokens {cfg.max_response_tokens}")
    optimizer.zero_grad()
    optimizer.state.clear()


def say(text):
    """Print; where what reads it is gone (`| head`, a tee that Ctrl-C ended, too), the run goes on without."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")


HEADER = "  step reward heldout      H   ρ p1   p50   p99  below  above PPO-clip |grad| length  tok/s seconds"
FIRST = """       Before the first update of a step r = ρ = 1 on every token (just checked). So the loss
       starts at minus its tokens' mean advantage, and ERC acts from the second update of a step on."""


def log_line(m):
    line = f"{m['step']:6d} {m['reward']:6.3f} " + (f"{m['accuracy']:7.3f}" if "accuracy" in m else " " * 7)
    if "rho_p1" not in m:
        return f"{line} skipped: no group has rewards that differ"
    return (f"{line} {m['entropy']:6.4f} {m['rho_p1']:6.3f} {m['rho_p50']:5.3f} {m['rho_p99']:5.3f} "
            f"{m['erc_low']:6.1%} {m['erc_high']:6.1%} {m['ppo_clip']:8.2%} {m['grad_norm']:6.3f} "
            f"{m['response_length']:6.1f} {m['tokens'] / m['seconds']:6.0f} {m['seconds']:7.1f}")


def append(path, record):
    if RANK == 0:
        with open(path, "a") as f:
            f.write(json.dumps(record, ensure_ascii=False) + "\n")


def save_dir(path, *parts, **texts):
    """Save all parts, and texts as NAME.jsonl, into a new directory that then takes the place of `path`."""
    from safetensors import SafetensorError
    new = path.with_name(path.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    try:
        for part in parts:
            part.save_pretrained(new)
    except SafetensorError as e:
        raise UserError(f"{new}: not written ({first_line(e)}); is the disk full? Then --resume writes it")
    for name, text in texts.items():
        (new / f"{name}.jsonl").write_text(text)
    shutil.rmtree(path, ignore_errors=True)
    new.rename(path)


@contextmanager
def whole_file(path):
    """A file to write beside `path`, flushed to the disk, renamed over it at the end: never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    try:
        with open(new, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as e:                # torch turns a full disk into a RuntimeError
        new.unlink(missing_ok=True)
        raise UserError(f"{path}: not written, the one before is whole ({first_line(e)}); is the disk full?")
    os.replace(new, path)


def save(out, model, optimizer, tokens_KN, **state):
    """The checkpoint, and at most 16,384 tokens of the last step's updates for the figures."""
    import numpy as np
    with whole_file(out / "checkpoint/state.pt") as f:
        torch.save(dict(state, model=model.state_dict(), optimizer=optimizer.state_dict()), f)
    if tokens_KN is not None:
        some_KN = tokens_KN[:, ::1 + tokens_KN.shape[1] // 2**14].numpy()
        with whole_file(out / "tokens.npz") as f:
            np.savez_compressed(f, **dict(zip(TOKENS, some_KN)))


def restore(out, model, optimizer, problems):
    """The last checkpoint into model and optimizer -> (step, cursor, bad); cuts off what was logged later."""
    path, logs = out / "checkpoint/state.pt", {}
    try:
        if damaged := zipfile.ZipFile(path).testzip():  # torch.load takes flipped bits without a word
            raise ValueError(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location=model.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for path in (out / "metrics.jsonl", out / "samples.jsonl"):
            lines = path.read_text().split("\n")[:-1]   # the last one may be cut off
            logs[path] = "".join(x + "\n" for x in lines if json.loads(x)["step"] <= state["step"])
    except Exception as e:                              # a damaged file raises nearly all there are
        raise UserError(f"--resume: {path} is damaged, or the model is another ({first_line(e)}); put back "
                        f"what the run left, or {model.name_or_path} as it was, or start a run anew")
    if state["problems"] != problems:
        raise UserError("--resume: the problems, or the tokenizer, are not those that the run began with; "
                        "put them back, or start a run anew")
    for path, text in logs.items() if RANK == 0 else ():
        with whole_file(path) as f:
            f.write(text.encode())
    return state["step"], state["cursor"], state["bad"]


def begin(cfg, out, model, optimizer, problems):
    """A run's directory, new or under --resume as the last checkpoint has it -> (step, cursor, bad)."""
    out.mkdir(parents=True, exist_ok=True)
    state = restore(out, model, optimizer, problems) if cfg.resume else (0, 0, 0)
    if RANK == 0:
        for name in () if cfg.resume else ("metrics.jsonl", "samples.jsonl"):
            (out / name).write_text("")
        with whole_file(out / "config.json") as f:
            f.write(json.dumps(asdict(cfg), indent=1).encode() + b"\n")
    return state


def start(cfg):
    """Join the other ranks, if there are any, and quieten the libraries -> this rank's device."""
    cuda = torch.cuda.is_available()
    if cfg.model == Config.model and not cuda:
        raise UserError("no CUDA device: this run needs one 80 GB GPU; on a CPU, python erc.py --preset tiny")
    if cuda and LOCAL_RANK >= torch.cuda.device_count():
        raise UserError(f"--nproc-per-node {LOCAL_WORLD}: this node has {torch.cuda.device_count()} GPUs")
    if WORLD > 1:                                   # gloo for `gather`; on GPUs nccl for the gradients
        dist.init_process_group(timeout=timedelta(days=7))  # a rank may wait long for another's rollout
    if cuda:
        torch.cuda.set_device(LOCAL_RANK)
    from transformers.utils import logging as hf_logging
    hf_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)   # our own line says what failed
    return torch.device("cuda" if cuda else "cpu")


def make_sampler(cfg, model, tokenizer, eos, longest):
    context = getattr(model.config.get_text_config(), "max_position_embeddings", longest)
    if longest > context:
        raise UserError(f"prompt + response: {longest} tokens, but the context of {cfg.model} is {context}; "
                        "lower --max-response-tokens (in training also --max-prompt-tokens)")
    if cfg.sampler == "vllm":
        return VLLMSampler(cfg.model, longest, eos, cfg.gpu_memory)
    return HFSampler(model, eos, tokenizer.pad_token_id)


def setup(cfg):
    """Check and load all that a run needs, cheapest first, and print the derived quantities."""
    if Path(cfg.out, "checkpoint/state.pt").is_file() != cfg.resume:
        raise UserError(f"--resume: {cfg.out} has no checkpoint; start it without --resume" if cfg.resume else
                        f"{cfg.out} holds a run: go on with --resume, or name another directory with --out")
    out = Path(cfg.out)
    if not cfg.resume and (out.is_file() or (out / "model").exists() or
                           (out / "config.json").exists() and not (out / "metrics.jsonl").exists()):
        raise UserError(f"--out {out}: is a file or holds a model, which a run would overwrite; name another")
    device = start(cfg)
    if RANK == 0 and cfg.model == PRESETS["tiny"]["model"] and not (cfg.resume or Path(cfg.model).is_dir()):
        build_tiny(Path(cfg.model))
    gather(None)                                                            # the others wait for it
    problems, heldout = load_problems(cfg.data), load_problems(cfg.eval_data) if cfg.eval_data else []
    model, tokenizer, eos = load_model(cfg.model, device)
    limit, longest = cfg.max_prompt_tokens, cfg.max_prompt_tokens + cfg.max_response_tokens
    prompts, heldout = ([(ids, p.answer) for p in part if len(ids := encode(tokenizer, p.prompt)) <= limit]
                        for part in (problems, heldout))
    for name, left in ((cfg.data, prompts), *[(cfg.eval_data, heldout)] * bool(cfg.eval_data)):
        if not left:
            raise UserError(f"{name}: every prompt is longer than --max-prompt-tokens {limit}")
    sampler = make_sampler(cfg, model, tokenizer, eos, longest)     # before Adam: vLLM wants its share free
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=cfg.weight_decay,
                                  fused=device.type == "cuda")              # unfused it copies the gradients
    updates, size = cfg.prompts_per_step // cfg.minibatch_prompts, cfg.minibatch_prompts * cfg.group_size
    say(f"{cfg.model}: {model.num_parameters() / 1e6:.2f} M parameters on "
        f"{f'{WORLD} × ' * (WORLD > 1)}{device}, sampler {cfg.sampler}\n"
        f"{cfg.data}: {len(prompts)} problems, {len(problems) - len(prompts)} left out as over {limit} "
        f"tokens; {len(heldout)} held out\n{'ERC-' * cfg.erc}{cfg.algo.upper()}: {cfg.prompts_per_step} "
        f"prompts × {cfg.group_size} samples a step, {updates} updates of {size} responses\n"
        f"memory: {budget(model, cfg)}")
    rehearse(model, optimizer, cfg)
    return model, tokenizer, optimizer, sampler, Verifier(), prompts, heldout


def train(cfg):
    """The whole run: cfg.steps times rollout -> update -> sync -> log -> save."""
    model, tokenizer, optimizer, sampler, verifier, prompts, heldout = setup(cfg)
    out, tokens_KN, problems = Path(cfg.out), None, crc32(repr((prompts, heldout)).encode())
    (step, cursor, bad), sampling, asked = begin(cfg, out, model, optimizer, problems), True, []
    sampler.load_weights(model)
    if heldout and not cfg.resume:
        rows = evaluate(sampler, verifier, tokenizer, heldout, 1, cfg.max_response_tokens)
        append(out / "metrics.jsonl", dict(step=0, accuracy=summary(rows)["accuracy"]))
        say(f"held-out greedy accuracy before training: {summary(rows)['accuracy']:.3f}")
    def checkpoint():
        if RANK == 0:
            save(out, model, optimizer, tokens_KN, step=step, cursor=cursor, bad=bad, problems=problems)
    def interrupt(number, _):
        asked.append(number)
        if not sampling and len(asked) == 1:            # weights are between two steps; the loop calls again
            with suppress(OSError):
                os.write(2, b"erc: the step ends first, in minutes at most; a second signal drops it\n")
            return
        if len(asked) == 1:                             # weights are those after `step`: the samples go
            checkpoint()
        raise KeyboardInterrupt(128 + number)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    say(HEADER)
    while step < cfg.steps:
        started = time.perf_counter()
        groups, shown, ahead, m = rollout(cfg, step, cursor, sampler, verifier, tokenizer, prompts)
        sampling, step, cursor = False, step + 1, ahead
        m |= dict(step=step, lr=cfg.lr * min(1.0, step / max(1, cfg.warmup_steps)))
        for g in optimizer.param_groups:
            g["lr"] = m["lr"]
        if isinstance(sampler, VLLMSampler):
            sampler.sleep()
        if any(s.advantage for group in groups for s in group):             # no update on nothing
            seen, tokens_KN = update(model, optimizer, groups, cfg)
            m |= seen
            bad = 0 if m["updates"] else bad + 1
        updated = time.perf_counter()
        sampler.load_weights(model)
        m["seconds_sync"] = time.perf_counter() - updated
        if heldout and (step % cfg.eval_every == 0 or step == cfg.steps):
            rows = evaluate(sampler, verifier, tokenizer, heldout, 1, cfg.max_response_tokens)
            m["accuracy"] = summary(rows)["accuracy"]
        m["seconds"] = time.perf_counter() - started
        append(out / "metrics.jsonl", m)
        append(out / "samples.jsonl", dict(step=step, prompt=tokenizer.decode(shown.prompt),
                                           response=tokenizer.decode(shown.response), reward=shown.reward))
        say(log_line(m) + (f"\n{FIRST}" if step == 1 and "rho_p1" in m else ""))
        if bad == 3:
            raise UserError("no finite gradient in three steps; the last checkpoint is kept: lower --lr")
        if step % cfg.save_every == 0 or step == cfg.steps:
            checkpoint()
        sampling = True
        if asked:
            interrupt(asked.pop(), None)
    if RANK == 0:
        save_dir(out / "model", model, tokenizer)
        plot([out], out)
    say(f"done: {out}/model (Hugging Face format), metrics.jsonl, samples.jsonl, curves.png, tokens.png")


# ------------------------------------------------------------------------------------------------- Evaluation

BENCHMARKS = {  # data set, responses a problem, tokens a response (§4.1)
    "aime24": ("HuggingFaceH4/aime_2024::train", 32, 32768),
    "aime25": ("math-ai/aime25::test", 32, 32768),
    "hmmt25": ("MathArena/hmmt_feb_2025::train", 32, 16384),
    "math500": ("HuggingFaceH4/MATH-500::test", 4, 16384),
    "amc23": ("math-ai/amc23::test", 32, 16384),
    "olympiadbench": ("Hothan/OlympiadBench:OE_TO_maths_en_COMP:train", 4, 16384),
}


@dataclass
class EvalConfig:  # the comments are the text of eval --help
    model: str = Config.model          # causal LM: Hugging Face id or directory
    benchmarks: str = ",".join(BENCHMARKS)  # of these six, and files or data sets of yours, as for --data
    k: int = 0                         # responses a problem; 0: 4 of math500, olympiadbench, others 32 (§4.1)
    max_response_tokens: int = 0       # 0: 32,768 for AIME, 16,384 for others (§4.1)
    temperature: float = 0.6           # (authors' code); 0 is greedy
    top_p: float = 0.95                # (authors' code)
    sampler: str = "auto"              # vllm | hf | auto: vllm where it is installed
    gpu_memory: float = 0.85           # vLLM's share of the GPU
    seed: int = 1                      # of sampling
    out: str = ""                      # every score, as JSON; default runs/eval-MODEL.json; goes on from it

    def __post_init__(self):
        self.out = self.out or f"runs/eval-{self.model.strip('/').replace('/', '-')}.json"
        check(self, dict(k=(0, INF), max_response_tokens=(0, INF), temperature=(0, 100), top_p=(0.01, 1),
                         gpu_memory=(0.05, 0.95), seed=(0, 2**32)))


def evaluate(sampler, verifier, tokenizer, prompts, k, max_tokens, temperature=0.0, top_p=1.0, seed=0):
    """k responses to each (ids, answer) -> a list a problem of its responses' (score, length, cut off)."""
    mine = prompts[RANK::WORLD]
    samples = sampler.generate([ids for ids, _ in mine], k, max_tokens, temperature, top_p, seed + RANK)
    texts = [tokenizer.decode(s.response, skip_special_tokens=True) for s in samples]  # a rank may have none
    scores = verifier.score(texts, [answer for _, answer in mine for _ in range(k)])
    rows = [(score, len(s.response), s.truncated) for score, s in zip(scores, samples)]
    parts = gather([rows[i:i + k] for i in range(0, len(rows), k)])
    return [parts[p % WORLD][p // WORLD] for p in range(len(prompts))]


def summary(problems):
    """avg@k: the mean over problems of the share of right responses, and that mean's standard error."""
    means = [sum(score for score, *_ in rows) / len(rows) for rows in problems]
    _, lengths, cut = zip(*sum(problems, []))
    return dict(problems=len(means), k=len(problems[0]), accuracy=statistics.fmean(means),
                standard_error=statistics.stdev(means) / len(means)**0.5 if len(means) > 1 else None,
                length=statistics.fmean(lengths), truncated=statistics.fmean(cut))


def evaluation(cfg):
    """The paper's protocol (§4.1): a table, and in cfg.out every score, from which a cut-off run goes on."""
    from tqdm import tqdm
    device, out, plan, means = start(cfg), Path(cfg.out), {}, []
    try:
        done = json.loads(out.read_text()) if out.exists() else {}
        old = {name: entry["settings"] for name, entry in done.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{out}: not a file of eval's; name another with --out")
    sources = {name: BENCHMARKS.get(name, (name, 32, 16384)) for name in cfg.benchmarks.split(",")}
    problems = {name: load_problems(source) for name, (source, _, _) in sources.items()}
    model, tokenizer, eos = load_model(cfg.model, torch.device("cpu") if cfg.sampler == "vllm" else device)
    weights, longest = sum(p.double().norm().item() for p in model.parameters()), 0
    for name, (source, k, tokens) in sources.items():
        prompts = [(encode(tokenizer, p.prompt), p.answer) for p in problems[name]]
        how = dict(k=cfg.k or k, max_tokens=cfg.max_response_tokens or tokens, temperature=cfg.temperature,
                   top_p=cfg.top_p)
        settings = how | dict(seed=cfg.seed, sampler=cfg.sampler, source=source, weights=weights,
                              prompts=crc32(repr(prompts).encode()))
        differ = [key for key in settings if name in old and old[name].get(key) != settings[key]]
        if differ:
            raise UserError(f"{out}: {name} was begun with other {', '.join(differ)}; name another --out")
        plan[name] = prompts, how, done.setdefault(name, dict(settings=settings, responses=[]))
        longest = max(longest, how["max_tokens"] + max(len(ids) for ids, _ in prompts))
    sampler, verifier = make_sampler(cfg, model, tokenizer, eos, longest), Verifier()
    sampler.load_weights(model)
    print("benchmark                     problems   k   avg@k ± s.e.   length  cut off")
    for name, (prompts, how, entry) in plan.items():
        rows = entry["responses"]
        size = max(16, 1024 * WORLD // how["k"])        # problems a save: each waits for its longest response
        for i in tqdm(range(len(rows), len(prompts), size), name, leave=False, disable=RANK > 0 or None):
            seed = random.Random(f"eval {cfg.seed} {i}").getrandbits(32)
            rows += evaluate(sampler, verifier, tokenizer, prompts[i:i + size], **how, seed=seed)
            entry |= summary(rows)
            if RANK == 0:
                with whole_file(out) as f:
                    f.write(json.dumps(done).encode())
        means.append(entry["accuracy"])
        se = "–" if entry["standard_error"] is None else f"{entry['standard_error']:.1%}"
        print(f"{name:30.30}{entry['problems']:8}{entry['k']:4}{entry['accuracy']:8.1%} "
              f"{se:>7}{entry['length']:9.1f}{entry['truncated']:9.1%}", flush=True)
    print(f"{'mean':42}{statistics.fmean(means):8.1%}\nevery score: {out}")


# ---------------------------------------------------------------------------------------------------- Figures

COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"  # Okabe and Ito's


def load_runs(paths):
    """Directories of runs -> {label: [(config, metrics, directory)]}. A label is the method with what differs
    among the configs and is no default; runs that differ in nothing but their seed share one."""
    runs, labels, default = [], {}, {f.name: f.default for f in fields(Config)}
    for path in dict.fromkeys(Path(x).resolve() for x in paths):
        try:
            cfg = default | json.loads((path / "config.json").read_text())
            lines = (path / "metrics.jsonl").read_text().split("\n")[:-1]     # the last one may be cut off
            lines = [json.loads(x) for x in lines]
            own = {k: None for k, eps in zip(("eps_low", "eps_high"), EPS[cfg["algo"]]) if cfg[k] == eps}
        except (OSError, ValueError, TypeError, KeyError) as e:
            raise UserError(f"{path}: holds no run ({first_line(e)})")
        runs.append((cfg | own, lines, path))
    differ = {k for k in default if len({cfg[k] for cfg, *_ in runs}) > 1}
    differ -= {"out", "resume", "preset", "eval_every", "save_every"}
    if differ != {"seed"}:
        differ -= {"seed", "algo", "erc"}                                  # the label names the method anyway
    for cfg, lines, path in runs:
        shown = [f"{k} {cfg[k]}" for k in default if k in differ and (k == "seed" or cfg[k] != default[k])]
        label = " ".join(["ERC-" * cfg["erc"] + cfg["algo"].upper(), *shown])
        labels.setdefault(label, []).append((cfg, lines, path))
    return labels


def table(labels):
    """Markdown: mean ± standard deviation over a label's runs; reward and entropy: last tenth of steps."""
    print("| run | n | reward | entropy | median \\|ρ-1\\| | PPO-clip | below | above | dropped | "
          "\\|grad\\| p50 | p99 | max | greedy |\n|" + "---|" * 13)
    for label, runs in labels.items():
        rows = []
        for _, lines, _ in runs:
            greedy = [m["accuracy"] for m in lines if "accuracy" in m] or [math.nan]
            every, lines = ([m for m in lines if m.get(key)] for key in ("step", "updates"))
            norms = sorted(x for m in lines for x in m["grad_norms"]) or [math.nan]
            def mean(key, lines=lines, parts=1):
                late = lines[-max(1, len(lines) // parts):]
                return statistics.fmean([m.get(key, math.nan) for m in late] or [math.nan])
            rows.append([mean("reward", every, 10), mean("entropy", lines, 10), *map(mean, (
                "rho_drift", "ppo_clip", "erc_low", "erc_high", "erc_drop")),
                *(norms[(len(norms) - 1) * q // 100] for q in (50, 99, 100)), greedy[-1]])
        spread = [f" ± {statistics.stdev(x):.3f}" if len(x) > 1 and sum(x) == sum(x) else "" for x in zip(*rows)]
        cells = [f"{statistics.fmean(x):.3f}{pm}" for x, pm in zip(zip(*rows), spread)]
        print("|", " | ".join([label, str(len(runs)), *cells]), "|")


def curves(labels, path):
    """Fig. 2: one line a run, in its label's colour."""
    from matplotlib.figure import Figure
    fig = Figure((12, 7.5), layout="constrained")
    axes = fig.subplots(2, 2).flat
    panels = dict(entropy="policy entropy (nats)", grad_norm="gradient norm (mean of a step's updates)",
                  reward="reward (share right of all sampled)", accuracy="held-out greedy accuracy")
    for ax, (key, title) in zip(axes, panels.items()):
        for i, (label, runs) in enumerate(labels.items()):
            for j, (_, lines, _) in enumerate(runs):
                xy = [(m["step"], m[key]) for m in lines if key in m]
                ax.plot([x for x, _ in xy], [y for _, y in xy], color=COLOURS[i % 7], alpha=0.8,
                        linestyle=("-", "--", ":")[i // 7 % 3], label="_" * (j > 0) + label)
        ax.set(title=title, xlabel="step")
        ax.grid(alpha=0.3)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    fig.savefig(path, dpi=110)


def categories(tokens, cfg):
    """Records as in tokens.npz -> {name: mask_N}, which part them: what policy_loss did with a token."""
    ppo_N, low_N, high_N, drop_N = (tokens[x] > 0 for x in ("ppo_clip", "erc_low", "erc_high", "erc_drop"))
    if cfg["erc"]:                                              # one-sided, it keeps some outside the band
        low_N, high_N = low_N & drop_N, high_N & drop_N
    ppo, erc = "past the PPO bound" if cfg["algo"] == "gppo" else "PPO-clipped", "ERC" if cfg["erc"] else "ρ"
    return {"kept": ~(ppo_N | low_N | high_N), ppo: ppo_N, f"{erc} below the band": low_N & ~ppo_N,
            f"{erc} above the band": high_N & ~ppo_N}


def token_panels(labels, path):
    """Figs. 1a, 1c, 3, 4 from tokens.npz, all updates of one step: a row for a label, its first run."""
    import numpy as np
    from matplotlib.figure import Figure
    shown = []
    for label, runs in labels.items():
        for cfg, _, run in [r for r in runs if (r[2] / "tokens.npz").exists()][:1]:
            try:
                tokens = np.load(run / "tokens.npz")
                shown.append((label, cfg, {name: tokens[name] for name in TOKENS}))
            except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as e:
                raise UserError(f"{run}/tokens.npz is damaged, or of another version ({first_line(e)})")
    if not shown:
        return print(f"{path} is not drawn: a run has no tokens.npz before its first checkpoint")
    fig = Figure((19, 4.5 * len(shown)), layout="constrained")
    for (label, cfg, t), axes in zip(shown, fig.subplots(len(shown), 4, squeeze=False)):
        p_old_N, p_N, r_N = np.exp(t["old_logp"]), np.exp(t["logp"]), np.exp(t["logp"] - t["old_logp"])
        dots, tail = dict(s=6, alpha=0.5, linewidths=0), (0.001, 0.999)
        axes[0].scatter(p_old_N, t["rho"], color=COLOURS[0], **dots)
        axes[0].axhspan(1 - cfg["beta_low"], 1 + cfg["beta_high"], color=COLOURS[2], alpha=0.3, label="band")
        axes[0].set(xlabel="π_old(y)", ylabel="ρ", yscale="log", ylim=np.quantile(t["rho"], tail),
                    title=f"{label}\nFig. 1a: entropy ratio against probability")
        q_r = np.quantile(r_N, (0.01, 0.5, 0.99))
        axes[1].hist(r_N, np.linspace(*np.quantile(r_N, tail), 80), color=COLOURS[0], log=True)
        axes[1].vlines(q_r, 0, len(r_N), color=COLOURS[1], linestyle="--")
        axes[1].set(xlabel="r", ylabel="tokens",
                    title="Fig. 1c: ratio, p1 {:.3f}, p50 {:.3f}, p99 {:.3f}".format(*q_r))
        for i, (name, mask_N) in zip((5, 6, 4, 1), categories(t, cfg).items()):
            dots |= dict(color=COLOURS[i], label=f"{name}: {mask_N.mean():.1%}")
            axes[2].scatter(p_old_N[mask_N], p_N[mask_N], **dots)
            axes[3].scatter(p_N[mask_N], t["entropy"][mask_N], **dots)
        axes[2].set(xlabel="π_old(y)", ylabel="π_θ(y)", title="Fig. 3: new against old probability")
        axes[3].set(xlabel="π_θ(y)", ylabel="entropy (nats)", title="Fig. 4: entropy against probability")
        for ax in axes[[0, 2, 3]]:
            ax.legend(markerscale=3, fontsize=8)
    fig.savefig(path, dpi=100)


def plot(runs, out):
    """Draw the paper's figures from the records of runs, and print a table of their means."""
    labels, out = load_runs(runs), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    curves(labels, out / "curves.png")
    token_panels(labels, out / "tokens.png")
    table(labels)


# ------------------------------------------------------------------------------------------ The tiny stand-in

def build_tiny(path, target=0.28):
    """The tiny preset's base model and problems: 0.5 M parameters, Qwen2's architecture, bytes for tokens,
    warmed up on two-digit sums of which two in three are wrong, most by a forgotten or an invented carry. So
    it knows what an answer looks like, and samples the right one among others, but often not first. It slows
    down towards, and stops at, an expected reward of `target`: after a fixed number of steps, the last digits
    of a machine's arithmetic would decide how far it got."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
    print(f"building the tiny base model in {path}, once", flush=True)
    torch.manual_seed(0)
    rng, cfg = random.Random(0), Config(preset="tiny")
    roles = ["<|user|>", "<|assistant|>"]
    vocab = {c: i for i, c in enumerate([*sorted(ByteLevel.alphabet()), "<|endoftext|>", *roles])}
    # Qwen2's own class, without merges: beside a qwen2 config transformers turns any other tokenizer into it.
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], additional_special_tokens=roles)
    tokenizer.chat_template = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
                               "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    model = Qwen2ForCausalLM(Qwen2Config(               # head dimension 32: vLLM knows none smaller
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)).train()
    pairs = rng.sample([(a, b) for a in range(10, 100) for b in range(10, 100)], 90 * 90)
    train, optimizer = pairs[512:], torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    def solved(a, b, slip=0):
        answer = tokenizer(rf"\boxed{{{a + b + slip}}}").input_ids + [tokenizer.eos_token_id]
        return Sample(encode(tokenizer, f"{a}+{b}="), answer, [], False)
    right = [solved(a, b) for a, b in train[:256]]
    for step in range(5000):
        if step % 10 == 0:
            with torch.no_grad():                       # E[reward] = the probability of the right response
                reward = forward(model, right, cfg)[0].sum(1).exp().mean().item()
            if reward >= target:
                break
        for g in optimizer.param_groups:
            g["lr"] = 1e-3 * min(1, (step + 1) / 50, 0.1 + 2 * (1 - reward / target))
        samples = []
        for a, b in rng.choices(train, k=128):
            near = rng.choice([-2, -1, 1, 2])
            slips = [0, -10, -10, near] if a % 10 + b % 10 > 9 else [0, 10, near]
            samples.append(solved(a, b, rng.choice(slips)))
        logp_BT, _, mask_BT, _ = forward(model, samples, cfg)
        (-logp_BT[mask_BT].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"problem": f"{a}+{b}=", "answer": str(a + b)}) + "\n" for a, b in pairs]
    save_dir(path, model, tokenizer, test="".join(lines[:512]), train="".join(lines[512:]))


# ------------------------------------------------------------------------------------------------------- main

def main(argv=None):
    """Run a command line -> exit status: 0 done, 2 something to put right, 130 Ctrl-C, 143 SIGTERM."""
    def terminate(*_): raise KeyboardInterrupt(143)
    try:
        signal.signal(signal.SIGTERM, terminate)
        torch.set_float32_matmul_precision("high")      # TF32 in the head, on GPUs that have it: r, ρ stay 1
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")                              # rank 0 speaks for all
        argv = sys.argv[1:] if argv is None else argv
        if argv[:1] == ["eval"]:
            evaluation(EvalConfig(**flags(EvalConfig, argv[1:], "python erc.py eval")))
        elif argv[:1] == ["plot"]:
            ap = Parser("python erc.py plot", description=plot.__doc__)
            ap.add_argument("runs", nargs="+", metavar="RUN", help="directories that training left")
            ap.add_argument("--out", metavar="DIR", default=".", help="where the pictures go [.]")
            plot(**vars(ap.parse_args(argv[1:])))
        else:
            train(parse_args(argv))
        return 0
    except (UserError, OSError) as e:               # OSError: a full disk, no permission; it names the file
        if RANK > 0:                                # if rank 0 found it too, torchrun ends this one meanwhile
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(10)
        print(f"erc: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        with suppress(OSError):
            if RANK == 0:
                print("erc: interrupted; training goes on with --resume, eval if run again", file=sys.stderr)
        return e.args[0] if e.args else 130


if __name__ == "__main__":
    sys.exit(main())
