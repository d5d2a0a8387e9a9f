"""Entropy Ratio Clipping (Su et al., arXiv 2512.05591) for LLM reinforcement learning, whole, in one file.

    python erc.py                                        the paper's run: DeepSeek-R1-Distill-Qwen-1.5B, one 80 GB GPU
    python erc.py --preset tiny                          the same code on a 0.5 M-parameter model, minutes on a CPU
    python erc.py --model DIR --data FILE --no-erc       your model, your problems, plain DAPO
    python erc.py --help                                 every setting with its reason and source

PPO-clip looks at one number a token: how the probability of the *sampled* token moved. The rest of the distribution may
drift unseen. ERC adds a second number, the ratio ρ of the token's new to its old entropy (eq. 8), and drops the gradient
of every token whose ρ has left (1 - β_low, 1 + β_high) (eq. 9). The method is `policy_loss` below; all else is what it
takes to run it: sample, verify, compute π_old's statistics, update eight times, hand the weights back to the sampler.

Left out on purpose: a critic, a reference model, asynchronous rollouts, tensor parallelism, a config system, a logger.

Axes, as suffixes: P prompts, G samples a prompt, B = P·G responses, T response tokens, L prompt + response tokens,
N response tokens laid flat, C a chunk of N, D hidden size, V vocabulary. Entropies and log-probs are in nats.
"""
import os
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # read when torch loads: threads that spin for long starve shared cores

import inspect, json, logging, math, random, re, resource, shutil, signal, sys, time
import multiprocessing as mp
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from importlib.util import find_spec
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import torch


class UserError(Exception):
    """Something the user can put right; `main` prints it as one line and exits with status 2."""


# ---------------------------------------------------------------------------------------------------------- Settings

EPS = {"grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gppo": (0.2, 0.2), "gspo": (3e-4, 4e-4)}  # (ε_low, ε_high), §4.1; GSPO


@dataclass
class Config:  # the comments are the text of --help
    preset: str = "paper"              # paper | official (adds what only the authors' code does) | tiny (minutes on a CPU)
    model: str = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"  # Hugging Face id or directory of a causal LM (§4.1)
    data: str = "Kwai-Klear/KlearReasoner-MathSub-30K"  # .json/.jsonl file, or a data set as ID[:CONFIG[:SPLIT]] (§4.1)
    eval_data: str = ""                # held-out problems, same formats; greedy accuracy every eval_every steps
    # the objective
    algo: str = "dapo"                 # grpo (eq. 5) | dapo (eq. 6) | gppo (eq. 7) | gspo (sequence ratio, §5.7)
    erc: bool = True                   # drop tokens whose entropy ratio left the band (eq. 9)
    eps_low: float = None              # PPO-clip: lower bound 1 - ε_low; default by algo: 0.2, gspo 3e-4
    eps_high: float = None             # PPO-clip: upper bound 1 + ε_high; default by algo: 0.2, dapo 0.28, gspo 4e-4
    beta_low: float = 0.05             # ERC: keep ρ > 1 - β_low (§4.1)
    beta_high: float = 0.05            # ERC: keep ρ < 1 + β_high (§4.1)
    dual_clip: float = 0.0             # for A < 0 floor the objective at this many A; 0 off, the authors' code 10
    kl_coef: float = 0.0               # PPO-penalty: coefficient of KL(π_old‖π_θ) (eq. 2), an ablation (§5.5)
    entropy_coef: float = 0.0          # entropy bonus, an ablation (§5.6)
    nll_coef: float = 0.0              # NLL of the samples with reward 1; 0 in the paper, the authors' code 0.1
    # one step: a rollout batch and its updates
    prompts_per_step: int = 128        # groups in a rollout batch (§4.1)
    group_size: int = 8                # samples a prompt, G (§4.1)
    minibatch_prompts: int = 16        # groups an optimizer step: 128 / 16 = 8 updates a rollout batch (§4.1)
    oversample: float = 2.0            # prompts sampled a round, in batches; groups of equal reward go (DAPO; authors 2)
    max_rounds: int = 3                # rounds of sampling until the batch is full (authors 1; then it may stay smaller)
    max_prompt_tokens: int = 4096      # longer prompts are left out (authors' code)
    max_response_tokens: int = 16384   # longer responses are cut off (§4.1)
    overlong_buffer: int = 0           # DAPO's length penalty over the last so many tokens; 0 off, as the authors
    temperature: float = 1.0           # of sampling and of all statistics; top-p 1, top-k off (authors' code)
    # optimisation
    steps: int = 1000                  # rollout batches; ours (the paper trains 10 epochs)
    lr: float = 1e-6                   # AdamW (§4.1)
    warmup_steps: int = 10             # rollout batches of linear warm-up, then constant (authors' code)
    weight_decay: float = 0.1          # AdamW (authors' code)
    grad_clip: float = 1.0             # global gradient norm (authors' code)
    # the machine
    sampler: str = "auto"              # vllm | hf (transformers' generate) | auto: vllm where it is installed
    micro_tokens: int = 32768          # padded tokens a forward pass; never changes the gradient, only memory and speed
    gpu_memory: float = 0.6            # vLLM's share of the GPU while it samples; it sleeps while we train
    eval_every: int = 10               # steps between evaluations on eval_data
    save_every: int = 10               # steps between checkpoints
    seed: int = 1                      # of data order and sampling
    out: str = ""                      # where the run is kept; default runs/PRESET-ALGO-SEED
    resume: bool = False               # go on from the checkpoint in --out

    def __post_init__(self):
        """Fill what depends on other settings, then check every range; UserError names the setting."""
        choices = {"preset": PRESETS, "algo": EPS, "sampler": ("auto", "vllm", "hf")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"--{name} {getattr(self, name)}: must be one of {', '.join(allowed)}")
        self.eps_low = EPS[self.algo][0] if self.eps_low is None else self.eps_low
        self.eps_high = EPS[self.algo][1] if self.eps_high is None else self.eps_high
        self.out = self.out or f"runs/{self.preset}-{'erc-' if self.erc else ''}{self.algo}-{self.seed}"
        for name, (low, high) in RANGES.items():
            if not low <= getattr(self, name) <= high or math.isinf(getattr(self, name)):  # NaN fails, too
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be between {low} and {high}")
        if self.prompts_per_step % self.minibatch_prompts:
            raise UserError(f"--minibatch-prompts {self.minibatch_prompts}: must divide "
                            f"--prompts-per-step {self.prompts_per_step}")
        if self.overlong_buffer > self.max_response_tokens:
            raise UserError(f"--overlong-buffer {self.overlong_buffer}: must be between 0 and "
                            f"--max-response-tokens {self.max_response_tokens}")


INF = math.inf
RANGES = dict(eps_low=(0, 1), eps_high=(0, INF), beta_low=(0, INF), beta_high=(0, INF), dual_clip=(0, INF),
              kl_coef=(0, INF), entropy_coef=(-INF, INF), nll_coef=(0, INF), prompts_per_step=(1, INF),
              group_size=(2, INF), minibatch_prompts=(1, INF), oversample=(1, 100), max_rounds=(1, 1000),
              max_prompt_tokens=(1, INF), max_response_tokens=(1, INF), overlong_buffer=(0, INF), temperature=(0.01, 100),
              steps=(1, INF), lr=(0, 1), warmup_steps=(0, INF), weight_decay=(0, 1), grad_clip=(1e-9, INF),
              micro_tokens=(1, INF), gpu_memory=(0.05, 0.95), eval_every=(1, INF), save_every=(1, INF), seed=(0, 2**32))
PRESETS = {
    "paper": {},
    "official": dict(dual_clip=10.0, nll_coef=0.1, max_rounds=1),
    "tiny": dict(model="runs/tiny-base", data="runs/tiny-base/train.jsonl", eval_data="runs/tiny-base/test.jsonl",
                 prompts_per_step=64, minibatch_prompts=8, oversample=1.0, max_rounds=1, max_prompt_tokens=32,
                 max_response_tokens=16, steps=300, lr=1e-4, micro_tokens=8192, sampler="hf", eval_every=50, save_every=50),
}


def parse_args(argv):
    """Command line -> Config. Flags are Config's fields and --help is Config's comments; explicit flags override the
    preset, and under --resume they may repeat but not change what the run in --out was started with."""
    import argparse
    ap = argparse.ArgumentParser(prog="erc.py", description=__doc__, allow_abbrev=False,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    def fail(message): raise UserError(f"{message} (python erc.py --help lists all settings)")
    ap.error = fail
    reasons = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(Config), re.M))
    for f in fields(Config):
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type, metavar=f.type.__name__)
        ap.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                        help=f"{reasons[f.name].replace('%', '%%')} [{f.default}]", **kind)
    given = vars(ap.parse_args(argv))
    cfg = Config(**PRESETS.get(given.get("preset", "paper"), {}) | given)
    if cfg.resume:
        path = Path(cfg.out, "config.json")
        if not path.is_file():
            raise UserError(f"--resume: {path} not found; name the run's directory with --out")
        saved = json.loads(path.read_text())
        free = {"steps", "eval_every", "save_every", "out", "resume"}
        differ = [f"--{k.replace('_', '-')} {v} (was {saved[k]})" for k, v in given.items() if k not in free and v != saved[k]]
        if differ:
            raise UserError(f"--resume: {path} was started with other settings: {', '.join(differ)}")
        cfg = Config(**saved | given)
    return cfg


# ---------------------------------------------------------------------------------------------------------- Problems

class Problem(NamedTuple):
    prompt: str | list         # the user's turn as text; a list of chat messages where the data has several
    answer: str | list         # the reference; of a list any one counts


FIELDS = ("problem", "answer"), ("question", "answer"), ("input", "target"), ("question", "final_answer")


def problem_from(record, where):
    """One record of any accepted format -> Problem; UserError names `where` and the field."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(record).__name__}")
    if isinstance(record.get("reward_model"), dict) and isinstance(record.get("prompt"), list):  # the Klear format
        names, turns = ("prompt", "reward_model.ground_truth"), record["prompt"]
        if not turns or not all(isinstance(t, dict) and {"role", "content"} <= t.keys() for t in turns):
            raise UserError(f"{where}: field 'prompt' must be a list of messages with 'role' and 'content'")
        prompt, answer = turns[0]["content"] if len(turns) == 1 else turns, record["reward_model"].get("ground_truth")
    else:
        names = next((p for p in FIELDS if p[0] in record and p[1] in record), None)
        if names is None:
            partial = [p[1] for p in FIELDS if p[0] in record] + [p[0] for p in FIELDS if p[1] in record]
            raise UserError(f"{where}: missing field " + (" or ".join(f"'{p}'" for p in dict.fromkeys(partial)) if partial
                            else "'problem' and 'answer' (or " + ", ".join(f"{q}/{a}" for q, a in FIELDS[1:]) + ")"))
        prompt, answer = record[names[0]], record[names[1]]
    if not prompt or not isinstance(prompt, str | list) or isinstance(prompt, str) and not prompt.strip():
        raise UserError(f"{where}: field '{names[0]}' must be a non-empty string")
    answers = []
    for a in answer if isinstance(answer, list) else [answer]:
        if isinstance(a, bool) or not isinstance(a, str | int | float) or not str(a).strip() or a != a:
            raise UserError(f"{where}: field '{names[1]}' must be a number, a non-empty string or a list of such")
        answers.append(str(a).split("####")[-1].strip())                    # GSM8K ends its solutions in "#### answer"
    if not answers:
        raise UserError(f"{where}: field '{names[1]}' is an empty list")
    return Problem(prompt, answers[0] if len(answers) == 1 else answers)


def load_problems(source):
    """A .json / .jsonl file or a Hugging Face data set ID[:CONFIG[:SPLIT]] -> list[Problem].

    Every record is problem/answer, question/answer, input/target, question/final_answer, or the Klear format (`prompt`
    messages and `reward_model.ground_truth`). UserError: not found, malformed, a missing field, nothing in it."""
    path = Path(source)
    if path.is_file() or path.suffix in (".json", ".jsonl") or path.is_dir():
        if not path.is_file():
            raise UserError(f"{source}: no such data file")
        raw = path.read_bytes()
        try:
            text, records = raw.decode("utf-8-sig"), []
            if text.lstrip().startswith("["):
                records = [(f"{source}: record {i}", r) for i, r in enumerate(json.loads(text), 1)]
            else:
                for number, line in enumerate(text.split("\n"), 1):
                    if line.strip():
                        records.append((f"{source}: line {number}", json.loads(line)))
        except UnicodeDecodeError as e:
            raise UserError(f"{source}: line {raw.count(10, 0, e.start) + 1}: not UTF-8 text")
        except (json.JSONDecodeError, RecursionError) as e:
            line = number if records or "number" in locals() else getattr(e, "lineno", 1)
            raise UserError(f"{source}: line {line}: not valid JSON ({getattr(e, 'msg', 'nested too deeply')})")
    else:
        from datasets import load_dataset
        name, config, split = (source.split(":") + ["", ""])[:3]
        try:
            data = load_dataset(name, config or None, split=split or None)
        except (OSError, ValueError) as e:
            raise UserError(f"data set {source}: cannot be loaded ({str(e).splitlines()[0]}); check the name and the network, "
                            "or give a local .jsonl file with --data")
        if not split:
            if "train" not in data and len(data) != 1:
                raise UserError(f"data set {source}: has splits {', '.join(data)}; name one as {name}:{config}:SPLIT")
            data = data["train"] if "train" in data else next(iter(data.values()))
        records = [(f"{source}: record {i}", r) for i, r in enumerate(data, 1)]
    if not records:
        raise UserError(f"{source}: holds no problems")
    return [problem_from(r, where) for where, r in records]


# ------------------------------------------------------------------------------------------------------------ Reward

def last_boxed(text):
    """Contents of the last `\\boxed{}` after the last `</think>`; None if there is none or it never closes.

    >>> last_boxed(r"<think>\\boxed{1}</think> so \\boxed{\\frac{1}{2}}.")
    '\\\\frac{1}{2}'
    """
    text = text.rsplit("</think>", 1)[-1]
    start = max((m.end() for m in re.finditer(r"\\boxed\s*\{", text)), default=None)
    depth = 1
    for m in re.finditer(r"\\.|[{}]", text[start:] if start is not None else "", re.S):  # \{ and \} are no braces
        depth += {"{": 1, "}": -1}.get(m[0], 0)
        if depth == 0:
            return text[start:start + m.start()].strip()
    return None


def verify_worker(pipe, seconds, megabytes):
    """Answers (boxed, reference) pairs from the pipe with 1.0 or 0.0 until it closes.

    The time limit is the kernel's: at `seconds` of CPU time SIGPROF ends the process, in whatever C code it is. So
    math-verify's own SIGALRM timeouts, which wait for the interpreter, are off."""
    from math_verify import parse, verify
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)                            # Ctrl-C is the trainer's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
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
        except Exception:                                                   # sympy raises almost anything: not accepted
            right = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        pipe.send(float(right))


class Verifier:
    """math-verify in worker processes. `killed` counts answers that ran into a limit and so scored 0.0."""

    def __init__(self, workers=None, seconds=5.0, megabytes=4096):
        if find_spec("math_verify") is None:
            raise UserError("math-verify is not installed: pip install math-verify")
        # A fork server that has imported all of it once: workers start in milliseconds and inherit no GPU state.
        self.context = mp.get_context("forkserver")
        self.context.set_forkserver_preload(["__main__", "math_verify"])
        self.limits, self.killed = (seconds, megabytes), 0
        self.idle = [self.start() for _ in range(workers or os.cpu_count())]

    def start(self):
        ours, theirs = self.context.Pipe()
        self.context.Process(target=verify_worker, args=(theirs, *self.limits), daemon=True).start()
        theirs.close()
        try:
            ours.recv()                                                     # its greeting: it has imported math-verify
        except EOFError:
            raise UserError("a verifier process ends at once: `python -c 'import math_verify'` should say why")
        return ours

    def score(self, responses, answers):
        """1.0 for each response whose last boxed answer equals its reference (of a list: any one), else 0.0; in order."""
        wanted = [[(boxed, a) for a in ([answer] if isinstance(answer, str) else answer)] if boxed else []
                  for boxed, answer in zip(map(last_boxed, responses), answers, strict=True)]
        verdict = {(boxed, a): float(boxed == a) for pairs in wanted for boxed, a in pairs}
        todo, busy = [pair for pair, same in verdict.items() if not same], {}  # each distinct pair is checked once
        while todo or busy:
            while todo and self.idle:
                pipe = self.idle.pop()
                try:
                    pipe.send(todo[-1])
                    busy[pipe] = todo.pop()
                except OSError:                                             # died while idle: another one takes the pair
                    self.idle.append(self.start())
            for pipe in wait(list(busy)):
                pair = busy.pop(pipe)
                try:
                    verdict[pair] = pipe.recv()
                except (EOFError, OSError):                                 # ended by a limit: 0.0, and a new worker
                    self.killed, pipe = self.killed + 1, self.start()
                self.idle.append(pipe)
        return [max((verdict[p] for p in pairs), default=0.0) for pairs in wanted]


# ---------------------------------------------------------------------------------------------------------- Rollouts

@dataclass
class Sample:
    prompt: list               # token ids, chat template included
    response: list             # token ids, end-of-sequence included
    logp: list                 # the sampler's own log π(y_t) of the response, for comparison with the trainer's
    truncated: bool            # cut off by the length limit: no end-of-sequence
    reward: float = 0.0
    advantage: float = 0.0


class HFSampler:
    """transformers' `generate` of the model being trained: no second copy, no second engine; for CPUs and small models."""

    def __init__(self, model, eos, pad):
        self.model, self.eos, self.pad = model, eos, pad

    def load_weights(self, model):
        self.model = model

    @torch.no_grad()
    def generate(self, prompts, n, max_tokens, temperature=1.0, top_p=1.0, seed=0):
        """n samples of each prompt (token ids) -> list[Sample], prompt by prompt. Temperature 0 is greedy."""
        from transformers import GenerationConfig
        torch.manual_seed(seed)
        greedy, logits, columns = temperature == 0, None, []
        def record(ids_BL, logits_BV):             # called before each token: the last column was drawn from the last call
            nonlocal logits
            if logits is not None:
                columns.append(logits.log_softmax(-1).gather(1, ids_BL[:, -1:]))
            logits = logits_BV.float() / (1.0 if greedy else temperature)
            return logits
        own, self.model.generation_config = self.model.generation_config, GenerationConfig()  # it would fill unset fields
        config = GenerationConfig(do_sample=not greedy, temperature=None if greedy else 1.0, top_p=None if greedy else top_p,
                                  top_k=None if greedy else 0, repetition_penalty=1.0, num_beams=1, max_new_tokens=max_tokens,
                                  eos_token_id=self.eos, pad_token_id=self.pad)
        rows = [p for p in prompts for _ in range(n)]
        size = max(1, 2**16 // (max(map(len, rows)) + max_tokens))          # 65,536 tokens of KV cache at a time
        samples, training = [], self.model.training
        self.model.eval()                                                   # gradient checkpointing would turn the cache off
        for i in range(0, len(rows), size):
            part, logits, columns = rows[i:i + size], None, []
            width = max(map(len, part))
            ids_BL = torch.tensor([[self.pad] * (width - len(p)) + p for p in part], device=self.model.device)
            seen_BL = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part], device=self.model.device)
            with autocast(self.model.device):
                out_BL = self.model.generate(ids_BL, attention_mask=seen_BL, generation_config=config, logits_processor=[record])
            record(out_BL, logits)                                          # the last column has no next call
            logp_BT, out_BT = torch.cat(columns, 1).tolist(), out_BL[:, width:].tolist()
            for prompt, ids, logp in zip(part, out_BT, logp_BT):
                end = next((t + 1 for t, token in enumerate(ids) if token in self.eos), None)
                samples.append(Sample(prompt, ids[:end], logp[:end], end is None))
        self.model.generation_config = own
        self.model.train(training)
        return samples


class VLLMSampler:
    """vLLM in this process. It holds its own copy of the weights, so after every update `load_weights` must be called."""

    def __init__(self, path, max_tokens, eos, gpu_memory=0.6):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"                  # the engine in this process: weights need no IPC
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM
        self.eos, cuda = eos, torch.cuda.is_available()
        memory = dict(gpu_memory_utilization=gpu_memory) if cuda else dict(kv_cache_memory_bytes=1 << 28)
        self.llm = LLM(model=str(path), dtype="bfloat16" if cuda else "float32", max_model_len=max_tokens,
                       enforce_eager=not cuda, enable_sleep_mode=cuda, generation_config="vllm",
                       logprobs_mode="processed_logprobs", hf_overrides={"head_dtype": "float32"}, seed=0, **memory)
        self.llm.sleep(level=2)                                             # awake only between load_weights and generate

    def load_weights(self, model):
        """Copy the trainer's parameters, on the device, and forget prefixes cached under the old ones."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": model.state_dict().items()})
        self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()                                       # vLLM never does this by itself

    def generate(self, prompts, n, max_tokens, temperature=1.0, top_p=1.0, seed=0):
        """n samples of each prompt (token ids) -> list[Sample], prompt by prompt. Temperature 0 is greedy."""
        from vllm import SamplingParams
        torch.manual_seed(seed)                                             # vLLM draws from torch's global generator
        params = SamplingParams(n=n, temperature=temperature, top_p=top_p, top_k=0, min_p=0.0, repetition_penalty=1.0,
                                presence_penalty=0.0, frequency_penalty=0.0, seed=None, stop=None, stop_token_ids=self.eos,
                                ignore_eos=False, min_tokens=0, max_tokens=max_tokens, logprobs=0, detokenize=False)
        outs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=sys.stderr.isatty())
        return [Sample(p, list(o.token_ids), [l[y].logprob for l, y in zip(o.logprobs, o.token_ids)], o.finish_reason == "length")
                for p, out in zip(prompts, outs) for o in out.outputs]

    def sleep(self):
        self.llm.sleep(level=2)


# ----------------------------------------------------------------------------------------------------- Entropy ratio

def logp_entropy(logits_NV, targets_N):
    """log π(y) and H(π) = -Σ_v π_v log π_v of each row, in nats and fp32 -> (logp_N, entropy_N).

    With d = z - max z and s = Σ e^d over all but the argmax's own term:  log π(y) = d_y - log(1+s),
    H = log(1+s) - Σ e^d·d / (1+s).  All terms have one sign, so nothing cancels: H stays good to 1e-6 relative where the
    policy is near-deterministic (most tokens of a reasoning model), as the ratio ρ of two such H needs. The textbook
    logsumexp(z) - Σπz is off by 17 % at H = 6e-5. Logits may be -inf: probability 0.

    >>> [round(x.item(), 4) for x in logp_entropy(torch.tensor([[.85, 0, .15, 0]]).log(), torch.tensor([0]))]
    [-0.1625, 0.4227]
    """
    top_N1, argmax_N1 = logits_NV.float().max(-1, keepdim=True)
    d_NV = logits_NV.float() - top_N1
    d_y_N = d_NV.gather(-1, targets_N[:, None]).squeeze(-1)
    d_NV = d_NV.clamp(min=-1e4).scatter(-1, argmax_N1, -1e4)                # e^-10000 is 0, and 0 · -10000 is no NaN
    e_NV = d_NV.exp()
    s_N = e_NV.sum(-1)
    return d_y_N - s_N.log1p(), s_N.log1p() - torch.linalg.vecdot(e_NV, d_NV) / (1 + s_N)


class HeadStats(torch.autograd.Function):
    """logp_entropy(hidden @ weight.T / temperature, targets), chunk by chunk; the backward computes each chunk again."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N, temperature, entropy_grad, chunk):
        logp_N, entropy_N = (torch.empty(len(targets_N), device=hidden_ND.device) for _ in range(2))
        for i in range(0, len(targets_N), chunk):
            x_CD = hidden_ND[i:i + chunk].float() / temperature
            logp_N[i:i + chunk], entropy_N[i:i + chunk] = logp_entropy(x_CD @ weight_VD.float().T, targets_N[i:i + chunk])
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, logp_N, entropy_N)
        ctx.temperature, ctx.entropy_grad, ctx.chunk = temperature, entropy_grad, chunk
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_logp_N, g_entropy_N):
        hidden_ND, weight_VD, targets_N, logp_N, entropy_N = ctx.saved_tensors
        g_hidden_ND, g_weight_VD = torch.zeros_like(hidden_ND), torch.zeros_like(weight_VD, dtype=torch.float32)
        alive_N = (g_logp_N != 0) | (g_entropy_N != 0) if ctx.entropy_grad else g_logp_N != 0
        for n_C in alive_N.nonzero().squeeze(1).split(ctx.chunk):           # a dropped token costs no backward
            x_CD, y_C1, g_C1 = hidden_ND[n_C].float() / ctx.temperature, targets_N[n_C, None], g_logp_N[n_C, None]
            z_CV = x_CD @ weight_VD.float().T
            z_CV -= z_CV.gather(1, y_C1) - logp_N[n_C, None]                # z = log π
            h_CV = (z_CV + entropy_N[n_C, None]) * z_CV.exp() * g_entropy_N[n_C, None] if ctx.entropy_grad else 0.0
            # ∂ log π(y) / ∂z_v = δ_vy - π_v, where 1 - π_y = -expm1(log π_y) keeps its digits;  ∂H / ∂z_v = -π_v (log π_v + H)
            dz_CV = z_CV.exp_().scatter_(1, y_C1, logp_N[n_C, None].expm1()).mul_(-g_C1).sub_(h_CV)
            g_hidden_ND[n_C] = (dz_CV @ weight_VD.float() / ctx.temperature).to(hidden_ND.dtype)
            g_weight_VD.addmm_(dz_CV.T, x_CD)
        return g_hidden_ND, g_weight_VD.to(weight_VD.dtype), None, None, None, None


def token_stats(hidden_ND, lm_head, targets_N, temperature=1.0, entropy_grad=False, chunk=256):
    """log π(y) and H of the policy softmax(lm_head(hidden) / temperature) -> (logp_N, entropy_N), nats, fp32.

    Never more than one chunk of logits is alive, forward or backward. Differentiable in hidden and in lm_head.weight;
    entropy carries a gradient only with `entropy_grad`. UserError: a head with a bias."""
    if getattr(lm_head, "bias", None) is not None:
        raise UserError("the model's output head has a bias, which token_stats does not compute: use another model")
    with torch.autocast(hidden_ND.device.type, enabled=False):              # the head is fp32 also inside autocast
        return HeadStats.apply(hidden_ND, lm_head.weight, targets_N, temperature, entropy_grad, chunk)


def entropy_ratio(entropy, old_entropy):
    """ρ = H(π_θ) / H(π_old) (eq. 8), with the authors' 1e-8 on both sides.

    >>> round(entropy_ratio(0.6664, 0.4227), 3)
    1.577
    """
    return (entropy + 1e-8) / (old_entropy + 1e-8)


# --------------------------------------------------------------------------------------------------------- Objective

def group_advantages(rewards_PG):
    """Â = (r - mean) / (std + 1e-6) over each group of samples of one prompt, unbiased std (eq. 4) -> advantages_PG.

    >>> group_advantages(torch.tensor([[1., 0., 0., 1.], [1., 1., 1., 1.]]))[:, 0].tolist()
    [0.8660238981246948, 0.0]
    """
    r_PG = rewards_PG.double()                                              # equal rewards give 0, not rounding / 1e-6
    return ((r_PG - r_PG.mean(1, keepdim=True)) / (r_PG.std(1, keepdim=True) + 1e-6)).float()


def policy_loss(logp_BT, entropy_BT, old_logp_BT, old_entropy_BT, advantages_B, mask_BT, cfg, norm=None):
    """The objective J of every method here, negated -> (loss, metrics): a scalar to minimise, a dict of floats.

    mask_BT is 1 on response tokens. `norm` is the number the sum is divided by: response tokens (dapo, gppo) or responses
    (grpo, gspo) of the whole mini-batch; by default this call's own. cfg: algo, erc, eps_*, beta_*, dual_clip, kl_coef,
    entropy_coef. metrics: shares of tokens where the PPO clip binds (ppo_clip) and where ρ is at or below (erc_low), at or
    above (erc_high) the band, whether or not cfg.erc drops them; mean entropy; KL(π_old‖π_θ)."""
    mask_BT, A_B1 = mask_BT.bool(), advantages_B[:, None]
    length_B1 = mask_BT.sum(1, keepdim=True).clamp(min=1)                                           # |y_i|
    # padding may hold anything; e^±20 bounds r so that no 0 · ∞ enters the gradient
    log_r_BT = (logp_BT - old_logp_BT).masked_fill(~mask_BT, 0.0).clamp(-20, 20)                    # eq. 1: log r
    entropy_BT = entropy_BT.masked_fill(~mask_BT, 0.0)
    r_BT = log_r_BT.exp()
    if cfg.algo == "gspo":           # the value is the sequence's ratio, the gradient each token's own share of it
        r_BT = (log_r_BT.detach().sum(1, keepdim=True) / length_B1 + log_r_BT - log_r_BT.detach()).exp()
    bounded_BT = r_BT.clamp(1 - cfg.eps_low, 1 + cfg.eps_high)                                      # eqs. 3, 5, 6
    ppo_BT = (r_BT - bounded_BT) * A_B1 > 0                                  # where the min below takes the bound
    if cfg.algo == "gppo":
        bounded_BT = (bounded_BT / r_BT).detach() * r_BT                                            # eq. 7
    J_BT = torch.minimum(r_BT * A_B1, bounded_BT * A_B1)
    if cfg.dual_clip:
        J_BT = torch.where(A_B1 < 0, torch.maximum(J_BT, cfg.dual_clip * A_B1), J_BT)
    rho_BT = entropy_ratio(entropy_BT.detach(), old_entropy_BT)                                     # eq. 8
    low_BT, high_BT = rho_BT <= 1 - cfg.beta_low, rho_BT >= 1 + cfg.beta_high
    if cfg.erc:
        J_BT = J_BT.masked_fill(low_BT | high_BT, 0.0)                                              # eq. 9: I_{i,t}
    kl_BT = log_r_BT.exp() - 1 - log_r_BT                          # eq. 2: its mean over y ~ π_old is KL(π_old‖π_θ)
    loss_BT = -J_BT + cfg.kl_coef * kl_BT - cfg.entropy_coef * entropy_BT
    # eqs. 6, 7, 9 sum over tokens and divide by Σ|y_i|, dropped tokens counted; eq. 5 averages over each response first
    weight_BT = mask_BT / (length_B1 if cfg.algo in ("grpo", "gspo") else 1)
    loss = (loss_BT * weight_BT).sum() / (weight_BT.sum() if norm is None else norm)
    with torch.no_grad():
        names = "ppo_clip", "erc_low", "erc_high", "entropy", "kl"
        means = [x_BT[mask_BT].float().mean() for x_BT in (ppo_BT, low_BT, high_BT, entropy_BT, kl_BT)]
        return loss, dict(zip(names, torch.stack(means).tolist()))


# ---------------------------------------------------------------------------------------------------------- Training

def autocast(device):
    """bf16 for the body on a GPU; fp32 on a CPU, where bf16 would be no faster."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def load_model(path, device):
    """Hugging Face causal LM and tokenizer -> (model, tokenizer, eos): fp32 masters, no dropout, all end-of-sequence ids."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    try:
        config, tokenizer = AutoConfig.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        for name in [k for k, v in vars(config).items() if ("drop" in k) and isinstance(v, float)]:
            setattr(config, name, 0.0)                                      # dropout would make r ≠ 1 at equal weights
        model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32).to(device)
    except (OSError, ValueError) as e:
        raise UserError(f"model {path}: cannot be loaded ({str(e).strip().splitlines()[0]}); check the path or the network")
    listed = model.generation_config.eos_token_id
    eos = {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])} - {None}
    if not eos:
        raise UserError(f"model {path}: its tokenizer names no end-of-sequence token, so no response could end")
    probe = "Let x = 3.\n\n  Then 2x = 6"
    if tokenizer.decode(tokenizer(probe, add_special_tokens=False).input_ids, clean_up_tokenization_spaces=False) != probe:
        raise UserError(f"model {path}: its tokenizer does not give back the text {probe!r} that it encodes: check its files")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = min(eos)                                   # masks go by length, so it may be the same
    if device.type == "cuda":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train(), tokenizer, sorted(eos)


def encode(tokenizer, prompt):
    """The prompt as one user turn through the chat template -> token ids; the bare text for a model without a template."""
    turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    if tokenizer.chat_template is None:
        return tokenizer("\n\n".join(t["content"] for t in turns) + "\n").input_ids
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids              # the template has written the specials


def micro_batches(samples, budget):
    """Cut samples into lists of similar length that fit `budget` padded tokens each (or hold one sample)."""
    out, size = [], lambda s: len(s.prompt) + len(s.response)
    for s in sorted(samples, key=size, reverse=True):                       # longest first: an out-of-memory shows at once
        if not out or (len(out[-1]) + 1) * size(out[-1][0]) > budget:
            out.append([])
        out[-1].append(s)
    return out


def forward(model, samples, cfg, entropy_grad=False):
    """One micro-batch through the model -> (logp_BT, entropy_BT, mask_BT); old and new statistics both come from here."""
    rows = [s.prompt + s.response for s in samples]
    L, T = max(map(len, rows)), max(len(s.response) for s in samples)
    ids_BL = torch.tensor([r + [0] * (L - len(r)) for r in rows], device=model.device)  # right padding: causal attention
    # The hidden state at position l predicts token l+1: of response tokens p … p+T-1 these are positions p-1 … p+T-2.
    start_B1, length_B1 = (torch.tensor(x, device=model.device)[:, None] for x in
                           ([len(s.prompt) for s in samples], [len(s.response) for s in samples]))
    l_1L, t_1T = torch.arange(L, device=model.device)[None], torch.arange(T, device=model.device)[None]
    predicts_BL = (l_1L >= start_B1 - 1) & (l_1L < start_B1 - 1 + length_B1)
    mask_BT = t_1T < length_B1
    with autocast(model.device):
        hidden_BLD = model.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state  # never sees padding before it
    stats = token_stats(hidden_BLD[predicts_BL], model.get_output_embeddings(), ids_BL.roll(-1, 1)[predicts_BL],
                        cfg.temperature, entropy_grad)
    logp_BT, entropy_BT = (torch.zeros(mask_BT.shape, device=model.device).masked_scatter(mask_BT, x_N) for x_N in stats)
    return logp_BT, entropy_BT, mask_BT


def shaped(sample, cfg):
    """The reward plus DAPO's overlong penalty: 0 up to max - buffer tokens, then falling linearly to -1 at the limit."""
    over = len(sample.response) - (cfg.max_response_tokens - cfg.overlong_buffer)
    return sample.reward - (max(0, over) / cfg.overlong_buffer if cfg.overlong_buffer else 0.0)


@lru_cache(2)
def epoch_order(n, seed, epoch):
    return random.Random(f"order {seed} {epoch}").sample(range(n), n)


def rollout(cfg, step, cursor, sampler, verifier, tokenizer, prompts):
    """Sample, verify, keep the groups whose rewards differ -> (groups, one sample, new cursor, metrics).

    Rounds go on until prompts_per_step groups are kept, at most max_rounds; the first so many are returned."""
    groups, seen, G, killed = [], [], cfg.group_size, verifier.killed
    seconds = dict(seconds_sample=0.0, seconds_verify=0.0)
    for round in range(cfg.max_rounds):
        if len(groups) >= cfg.prompts_per_step:
            break
        started, count, n = time.perf_counter(), math.ceil(cfg.oversample * cfg.prompts_per_step), len(prompts)
        chosen = [prompts[epoch_order(n, cfg.seed, k // n)[k % n]] for k in range(cursor, cursor + count)]
        cursor += count
        seed = random.Random(f"sample {cfg.seed} {step} {round}").getrandbits(32)  # no hidden state: resuming is exact
        samples = sampler.generate([ids for ids, _ in chosen], G, cfg.max_response_tokens, cfg.temperature, seed=seed)
        sampled = time.perf_counter()
        texts = tokenizer.batch_decode([s.response for s in samples], skip_special_tokens=True)
        for s, s.reward in zip(samples, verifier.score(texts, [answer for _, answer in chosen for _ in range(G)])):
            s.advantage = shaped(s, cfg)
        rewards_PG = torch.tensor([s.advantage for s in samples]).view(count, G)
        for s, s.advantage in zip(samples, group_advantages(rewards_PG).flatten().tolist()):
            seen.append(s)
        # Equal rewards give no gradient: DAPO samples others instead; in GRPO's mean over responses they count as zeros.
        groups += [samples[p * G:p * G + G] for p, rewards_G in enumerate(rewards_PG)
                   if cfg.algo == "grpo" or (rewards_G != rewards_G[0]).any()]
        seconds["seconds_sample"] += sampled - started
        seconds["seconds_verify"] += time.perf_counter() - sampled
    mean = lambda values: sum(values) / len(seen)
    return groups[:cfg.prompts_per_step], seen[0], cursor, seconds | dict(
        reward=mean(s.reward for s in seen), response_length=mean(len(s.response) for s in seen),
        truncated=mean(s.truncated for s in seen), tokens=sum(len(s.response) for s in seen),
        groups=len(groups), verifier_killed=verifier.killed - killed)


def update(model, optimizer, groups, cfg, bar):
    """The optimizer steps of one rollout batch -> metrics. All old statistics first, then mini-batch after mini-batch through
    the same micro-batches, so that on the first one r ≡ 1 and ρ ≡ 1; UserError if not."""
    started, device = time.perf_counter(), model.device
    minis = [sum(groups[i:i + cfg.minibatch_prompts], []) for i in range(0, len(groups), cfg.minibatch_prompts)]
    plan = [micro_batches(mini, cfg.micro_tokens) for mini in minis]
    bar.total = 2 * sum(map(len, plan))
    old = []
    with torch.no_grad():
        for micro in sum(plan, []):
            old.append(forward(model, micro, cfg))
            bar.update()
    gap_N = torch.cat([old_logp_BT[mask_BT].cpu() - torch.tensor([x for s in micro for x in s.logp])
                       for micro, (old_logp_BT, _, mask_BT) in zip(sum(plan, []), old)]).abs()
    gap, limit = gap_N.mean().item(), MAX_GAP[device.type == "cuda"]
    if not gap <= limit:
        raise UserError(f"sampler and trainer disagree: |Δ log π| of the sampled tokens is {gap:.2g} on average, over {limit}. "
                        "The sampler's weights are stale, or it samples another distribution (temperature, top-p)")
    middle, old, totals, rhos, norms, skipped = time.perf_counter(), iter(old), {}, [], [], 0
    for k, (mini, micros) in enumerate(zip(minis, plan)):
        tokens = sum(len(s.response) for s in mini)
        norm = tokens if cfg.algo in ("dapo", "gppo") else len(mini)        # of the mini-batch, however it is cut
        right = sum(len(s.response) for s in mini if s.reward == 1.0)
        drift = 0.0
        for micro in micros:
            old_logp_BT, old_entropy_BT, mask_BT = next(old)
            logp_BT, entropy_BT, _ = forward(model, micro, cfg, entropy_grad=cfg.entropy_coef != 0)
            advantages_B = torch.tensor([s.advantage for s in micro], device=device)
            loss, metrics = policy_loss(logp_BT, entropy_BT, old_logp_BT, old_entropy_BT, advantages_B, mask_BT, cfg, norm)
            if cfg.nll_coef and right:                                      # authors' code: imitate the samples that were right
                right_B1 = torch.tensor([[s.reward == 1.0] for s in micro], device=device)
                loss = loss - cfg.nll_coef * logp_BT[mask_BT & right_B1].sum() / right
            loss.backward()
            rhos.append(entropy_ratio(entropy_BT.detach(), old_entropy_BT)[mask_BT])
            drift = max(drift, (logp_BT - old_logp_BT).abs().max().item(), (rhos[-1] - 1).abs().max().item())
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + value * len(rhos[-1])
            bar.update()
        if k == 0 and not drift < 1e-3:
            raise UserError(f"before the first update r and ρ are off 1 by {drift:.2g}: old and new statistics do not come from "
                            "the same weights and code, so ratios mean nothing")
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip).item())
        if math.isfinite(norms[-1]):
            optimizer.step()
        else:
            skipped += 1
        optimizer.zero_grad()
    rho_N = torch.cat(rhos)
    rho_N = rho_N[::1 + len(rho_N) // 2**20].sort().values                  # quantiles of at most a million tokens
    count, finite = sum(map(len, rhos)), [x for x in norms if math.isfinite(x)]
    return {name: total / count for name, total in totals.items()} | {
        f"rho_p{q}": rho_N[min(len(rho_N) - 1, len(rho_N) * q // 100)].item() for q in (1, 50, 99)} | dict(
        grad_norm=sum(finite) / max(1, len(finite)), grad_norm_max=max(norms), updates=len(norms) - skipped,
        updates_skipped=skipped, sampler_gap=gap, sampler_gap_max=gap_N.max().item(),
        seconds_old=middle - started, seconds_update=time.perf_counter() - middle)


# Mean |Δ log π| between sampler and trainer that stops a run: fp32 on both sides agrees to 1e-6, and one missed update of the
# tiny preset gives 1e-2; bf16 against bf16 differs by about 1e-2 through rounding alone, so there only gross errors show.
MAX_GAP = {False: 1e-3, True: 0.1}


def budget(model, cfg):
    """One line: where the memory of a training step goes, in GiB, from the model's shapes."""
    c, cuda, gib = model.config, model.device.type == "cuda", 2**30
    n = sum(p.numel() for p in model.parameters())
    tokens = max(cfg.micro_tokens, cfg.max_prompt_tokens + cfg.max_response_tokens)
    layer = 2 * (4 * getattr(c, "intermediate_size", 4 * c.hidden_size) + 8 * c.hidden_size) + 4 * 6 * c.hidden_size
    body = tokens * (c.num_hidden_layers * 4 * c.hidden_size + layer if cuda else 2 * c.num_hidden_layers * layer)
    parts = {"fp32 masters": 4 * n, "gradients": 4 * n, "Adam": 8 * n, "activations": body,
             "head": 3 * 4 * 256 * c.vocab_size + 4 * c.vocab_size * c.hidden_size}
    line = " + ".join(f"{k} {v / gib:.2f}" for k, v in parts.items())
    share = f"; while sampling masters, Adam and vLLM's {cfg.gpu_memory:.0%} of the card" if cuda else ""
    return f"{line} = {sum(parts.values()) / gib:.2f} GiB while training{share}"


def rehearse(model, optimizer, cfg):
    """Forward and backward of the largest micro-batch, with Adam's state in place: what does not fit fails now, not later."""
    length = cfg.max_prompt_tokens + cfg.max_response_tokens
    sample = Sample([0] * cfg.max_prompt_tokens, [0] * cfg.max_response_tokens, [], True)
    try:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        for g in optimizer.param_groups:
            g["lr"] = 0.0
        optimizer.step()                                                    # lr 0: allocates Adam's moments, moves nothing
        logp_BT, entropy_BT, _ = forward(model, [sample] * max(1, cfg.micro_tokens // length), cfg, cfg.entropy_coef != 0)
        (logp_BT.sum() + cfg.entropy_coef * entropy_BT.sum()).backward()
    except torch.OutOfMemoryError:
        raise UserError(f"out of GPU memory in a micro-batch of {max(cfg.micro_tokens, length)} tokens: lower --micro-tokens (now "
                        f"{cfg.micro_tokens}), then --max-response-tokens")
    optimizer.zero_grad()
    optimizer.state.clear()


def evaluate(cfg, sampler, verifier, tokenizer, prompts):
    """Share of held-out problems that the greedy response answers right."""
    samples = sampler.generate([ids for ids, _ in prompts], 1, cfg.max_response_tokens, temperature=0)
    texts = tokenizer.batch_decode([s.response for s in samples], skip_special_tokens=True)
    return sum(verifier.score(texts, [answer for _, answer in prompts])) / len(prompts)


def append(path, record):
    with open(path, "a") as f:
        f.write(json.dumps(record, ensure_ascii=False) + "\n")


def replace_dir(path, write):
    """Call write(temporary directory), then put the result in the place of `path`."""
    new = path.with_name(path.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    write(new)
    shutil.rmtree(path, ignore_errors=True)
    new.rename(path)


def save(path, **state):
    """One file, written beside the old one, flushed to the disk and renamed over it: it is whole or it is the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".tmp"), "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path.with_suffix(".tmp"), path)


HEADER = "  step  reward  heldout       H   ρ: p1   p50   p99  below  above  PPO-clip  |grad|  length   tok/s  seconds"


def log_line(m):
    accuracy = f"{m['accuracy']:7.3f}" if "accuracy" in m else " " * 7
    if "grad_norm" not in m:
        return f"{m['step']:6d}  {m['reward']:6.3f}  {accuracy}  skipped: every group's rewards are equal"
    return (f"{m['step']:6d}  {m['reward']:6.3f}  {accuracy} {m['entropy']:7.4f}  {m['rho_p1']:6.3f} {m['rho_p50']:5.3f} "
            f"{m['rho_p99']:5.3f} {m['erc_low']:6.1%} {m['erc_high']:6.1%} {m['ppo_clip']:9.2%} {m['grad_norm']:7.3f} "
            f"{m['response_length']:7.1f} {m['tokens'] / m['seconds']:7.0f} {m['seconds']:8.1f}")


def setup(cfg):
    """Load and check everything a run needs, cheapest first -> SimpleNamespace; prints the derived quantities."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and cfg.model == Config.model:
        raise UserError("no CUDA device: this preset needs one 80 GB GPU. On a CPU try: python erc.py --preset tiny")
    if Path(cfg.out, "checkpoint/state.pt").is_file() and not cfg.resume:
        raise UserError(f"{cfg.out} holds a run already: go on with --resume, or name another directory with --out")
    kind = cfg.sampler if cfg.sampler != "auto" else "vllm" if find_spec("vllm") else "hf"
    if kind == "vllm" and not find_spec("vllm"):
        raise UserError("--sampler vllm: vllm is not installed; pip install vllm, or use --sampler hf")
    if cfg.model == PRESETS["tiny"]["model"] and not Path(cfg.model).is_dir():
        build_tiny(Path(cfg.model))
    problems, heldout = load_problems(cfg.data), load_problems(cfg.eval_data) if cfg.eval_data else []
    model, tokenizer, eos = load_model(cfg.model, device)
    total, longest = len(problems), cfg.max_prompt_tokens + cfg.max_response_tokens
    prompts, heldout = ([(ids, p.answer) for p in part if len(ids := encode(tokenizer, p.prompt)) <= cfg.max_prompt_tokens]
                        for part in (problems, heldout))
    if not prompts:
        raise UserError(f"{cfg.data}: every prompt is longer than --max-prompt-tokens {cfg.max_prompt_tokens}")
    if longest > getattr(model.config, "max_position_embeddings", longest):
        raise UserError(f"--max-prompt-tokens + --max-response-tokens is {longest}: the model's context is "
                        f"{model.config.max_position_embeddings} tokens")
    verifier = Verifier()
    if kind == "vllm":
        sampler = VLLMSampler(cfg.model, longest, eos, cfg.gpu_memory)      # before Adam's state: it wants its share free
    else:
        sampler = HFSampler(model, eos, tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=device.type == "cuda")
    n = sum(p.numel() for p in model.parameters())
    print(f"{cfg.model}: {n / 1e6:.2f} M parameters on {device}, sampler {kind}, torch {torch.__version__}\n"
          f"{cfg.data}: {len(prompts)} problems ({total - len(prompts)} left out, over {cfg.max_prompt_tokens} tokens)"
          f", {len(heldout)} held out\n"
          f"{'ERC-' if cfg.erc else ''}{cfg.algo.upper()}: {cfg.prompts_per_step} prompts × {cfg.group_size} samples a step, "
          f"{cfg.prompts_per_step // cfg.minibatch_prompts} updates of {cfg.minibatch_prompts * cfg.group_size} responses\n"
          f"memory: {budget(model, cfg)}", flush=True)
    rehearse(model, optimizer, cfg)
    return model, tokenizer, optimizer, sampler, verifier, prompts, heldout


def resume(out, model, optimizer):
    """Load the last complete checkpoint -> (step, cursor, bad), and cut off what the run logged after it."""
    state = torch.load(out / "checkpoint/state.pt", map_location=model.device, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for path in (out / "metrics.jsonl", out / "samples.jsonl"):
        lines = path.read_text().splitlines(True)
        path.write_text("".join(line for line in lines if json.loads(line)["step"] <= state["step"]))
    return state["step"], state["cursor"], state["bad"]


def train(cfg):
    """The whole run: cfg.steps times rollout -> update -> sync -> log -> save."""
    from tqdm import tqdm
    model, tokenizer, optimizer, sampler, verifier, prompts, heldout = setup(cfg)
    out, step, cursor, bad = Path(cfg.out), 0, 0, 0
    out.mkdir(parents=True, exist_ok=True)
    if cfg.resume:
        step, cursor, bad = resume(out, model, optimizer)
    else:
        for name in ("metrics.jsonl", "samples.jsonl"):
            (out / name).write_text("")
    (out / "config.json").write_text(json.dumps(asdict(cfg), indent=1) + "\n")
    sampler.load_weights(model)
    if heldout and step == 0:
        m = dict(step=0, accuracy=evaluate(cfg, sampler, verifier, tokenizer, heldout))
        append(out / "metrics.jsonl", m)
        print(f"held-out greedy accuracy before training: {m['accuracy']:.3f}")
    print(HEADER, flush=True)
    while step < cfg.steps:
        started = time.perf_counter()
        groups, shown, cursor, m = rollout(cfg, step, cursor, sampler, verifier, tokenizer, prompts)
        step += 1
        m |= dict(step=step, lr=cfg.lr * min(1.0, step / max(1, cfg.warmup_steps)))
        for g in optimizer.param_groups:
            g["lr"] = m["lr"]
        if any(s.advantage for g in groups for s in g):                     # no update on nothing
            with tqdm(desc=f"step {step}", leave=False, disable=None) as bar:
                m |= update(model, optimizer, groups, cfg, bar)
            bad = bad + 1 if m["updates"] == 0 else 0
            updated = time.perf_counter()
            sampler.load_weights(model)
            m["seconds_sync"] = time.perf_counter() - updated
            if step == 1:
                print("  r and ρ were exactly 1 before the first update, as they must be: old and new policy are then the same.\n"
                      "  So the loss starts at the mean advantage, 0, and ERC acts from the second update of a step on.")
        if heldout and (step % cfg.eval_every == 0 or step == cfg.steps):
            m["accuracy"] = evaluate(cfg, sampler, verifier, tokenizer, heldout)
        m["seconds"] = time.perf_counter() - started
        append(out / "metrics.jsonl", m)
        append(out / "samples.jsonl", dict(step=step, reward=shown.reward, prompt=tokenizer.decode(shown.prompt),
                                           response=tokenizer.decode(shown.response)))
        print(log_line(m), flush=True)
        if bad == 3:
            raise UserError("three steps in a row had no update with a finite gradient: the last checkpoint is kept; lower --lr")
        if step % cfg.save_every == 0 or step == cfg.steps:
            save(out / "checkpoint/state.pt", model=model.state_dict(), optimizer=optimizer.state_dict(),
                 step=step, cursor=cursor, bad=bad)
    replace_dir(out / "model", lambda path: (model.save_pretrained(path), tokenizer.save_pretrained(path)))
    print(f"done: {out}/model (Hugging Face format), {out}/metrics.jsonl, {out}/samples.jsonl")


# --------------------------------------------------------------------------------------------------- The tiny stand-in

def build_tiny(path):
    """A base model for the tiny preset: 0.5 M parameters of the Qwen2 architecture, bytes as tokens, and a warm-up on two-digit
    sums of which half are wrong, so that it knows the form of an answer but only sometimes the answer itself."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
    print(f"building the tiny base model in {path} (once)", flush=True)
    torch.manual_seed(0)
    rng = random.Random(0)
    vocab = {c: i for i, c in enumerate(sorted(ByteLevel.alphabet()) + ["<|endoftext|>", "<|user|>", "<|assistant|>"])}
    # Qwen2's own tokenizer class with no merges: transformers would turn any other into it beside a qwen2 config.
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], additional_special_tokens=["<|user|>", "<|assistant|>"])
    tokenizer.chat_template = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
                               "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    config = Qwen2Config(vocab_size=len(vocab), hidden_size=128, intermediate_size=256, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
                         bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model = Qwen2ForCausalLM(config).train()                                # head dimension 32: vLLM knows no smaller one
    pairs = rng.sample([(a, b) for a in range(10, 100) for b in range(10, 100)], 90 * 90)
    train, test = pairs[512:], pairs[:512]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    steps, cfg = 260, Config(preset="tiny")
    for step in range(steps):
        for g in optimizer.param_groups:                                    # 50 steps up, half of all down
            g["lr"] = 2e-3 * min(1, (step + 1) / 50, 2 * (steps - step) / steps)
        samples = []
        for a, b in rng.choices(train, k=128):
            slip = rng.choice([-11, -10, -9, -2, -1, 1, 2, 9, 10, 11]) if rng.random() < 0.5 else 0
            answer = tokenizer(rf"\boxed{{{a + b + slip}}}").input_ids + [tokenizer.eos_token_id]
            samples.append(Sample(encode(tokenizer, f"{a}+{b}="), answer, [], False))
        logp_BT, _, mask_BT = forward(model, samples, cfg)
        (-logp_BT[mask_BT].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    def write(path):
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        for name, part in (("train", train), ("test", test)):
            (path / f"{name}.jsonl").write_text("".join(json.dumps({"problem": f"{a}+{b}=", "answer": str(a + b)}) + "\n"
                                                        for a, b in part))
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_dir(path, write)


# ------------------------------------------------------------------------------------------------------------- main

def main(argv=None):
    """Run the command line -> exit status: 0 done, 2 something to put right (one line says what), 130 Ctrl-C, 143 SIGTERM."""
    def terminate(*_): raise SystemExit(143)
    try:
        signal.signal(signal.SIGTERM, terminate)
        torch.set_float32_matmul_precision("high")      # TF32 inputs suffice for the head: its hidden states are bf16 on a GPU
        train(parse_args(argv))
        return 0
    except UserError as e:
        print(f"erc: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("erc: interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
