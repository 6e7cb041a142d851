"""What ``python -m benchmarks.throughput`` measures: ours and the peers', each in its own process.

A contender is a function that builds what it needs and then does the same work again and again;
after each repetition it tells how much that was (:class:`Work`) and waits for the next signal. So
contenders take turns, and none meets the threads, patches or memory of another.

Run by ``benchmarks.throughput``: ``python -m benchmarks.contenders NAME ARGUMENTS_AS_JSON``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np

MISSING = 3
"""Exit status of a contender whose packages are not installed."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one repetition did.

    Attributes:
        units: Episodes, tokens, steps, pairs: what is counted a second.
        flops: Floating-point operations that it needs at least, as far as that is known.
        bytes: Bytes that it has to move at least.
        seconds: What it took, where only a part of the repetition counts.
    """

    units: float
    flops: float = 0.0
    bytes: float = 0.0
    seconds: float | None = None


Report = Callable[[Work], None]


def _report(out: IO[str]) -> Report:
    began = 0.0

    def report(work: Work) -> None:
        nonlocal began
        seconds = time.perf_counter() - began
        told = asdict(replace(work, seconds=work.seconds or seconds))
        print(json.dumps(told), file=out, flush=True)
        if not sys.stdin.readline():
            os._exit(0)  # the measuring is over, in the middle of somebody's training loop
        began = time.perf_counter()

    return report


def repeat(once: Callable[[], Work], report: Report) -> NoReturn:
    """Do the same again and again."""
    while True:
        report(once())


# --- models --------------------------------------------------------------------------------------


def sizes(model: Any) -> tuple[int, int]:
    """Return how many weights of a model multiply every token, and every token it guesses at."""
    embeddings = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in model.parameters()) - embeddings.numel()
    tied = model.get_output_embeddings().weight is embeddings
    return body if tied else body - head, head


def gpt2(folder: Path) -> str:
    """Write a GPT-2 of 4 M random weights with the embedded model's tokenizer; return its name."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    from agents.policies.models import TINY

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    torch.manual_seed(0)
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=256, n_embd=256, n_layer=4, n_head=4, **ends
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# --- the workloads -------------------------------------------------------------------------------


def questions(
    count: int, *, first: int = 0, **kwargs: Any
) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return first prompts of DialogueQA, drawn by seeds from ``first`` on, and their answers."""
    import gymnasium as gym

    import llm_envs  # noqa: F401

    envs: Any = gym.make_vec("DialogueQA-v0", num_envs=count, split="train", **kwargs)
    observations, _ = envs.reset(seed=list(range(first, first + count)))
    return list(observations), list(envs.references)


def words(count: int) -> list[str]:
    """Return prompts of 8 to 40 words, cut from the passages of DialogueQA."""
    rng = np.random.default_rng(0)
    texts = [prompt.split() for prompt in questions(count)[0]]
    return [" ".join(text[: int(rng.integers(8, 41))]) for text in texts]


def register_long_answers() -> str:
    """Register a task of such prompts, with a score that costs nothing; return its id."""
    from llm_envs.core import registration
    from llm_envs.core.task import Outcome, WritingTask

    @dataclass(frozen=True)
    class Prompt:
        id: str
        text: str

        @property
        def unit(self) -> str:
            return self.id

    class LongAnswers(WritingTask[Prompt]):
        def __init__(self, split: str = "train") -> None:
            super().__init__()
            self.examples = tuple(Prompt(f"{split} {i}", t) for i, t in enumerate(words(512)))

        def turns(self, example: Prompt) -> int:
            return 1

        def ask(self, example: Prompt, turn: int) -> str:
            return example.text

        def answers(self, example: Prompt, turn: int) -> tuple[str, ...]:
            return (example.text,)

        def score_answers(
            self, answers: Sequence[str], references: Sequence[tuple[str, ...]]
        ) -> list[Outcome]:
            return [Outcome((len(answer) % 7) / 6) for answer in answers]

    registration.register("LongAnswers-v0", LongAnswers)
    return "LongAnswers-v0"


TRAIN: dict[str, dict[str, Any]] = {
    "single turns": {"prompts": 16, "group_size": 8, "max_new_tokens": 20, "max_turns": 1},
    "dialogues": {"prompts": 16, "group_size": 8, "max_new_tokens": 20},
    "long answers": {"prompts": 8, "group_size": 4, "max_new_tokens": 32},
}
"""Shapes of the training workloads."""


def train(report: Report, *, workload: str, share: bool = True, autocast: str = "none") -> None:
    """Episodes of REINFORCE, leave-one-out: rollout, update, optimizer step.

    The learning rate is 0, so that every repetition does the same work.

    Args:
        report: Told of each update.
        workload: Key of ``TRAIN``.
        share: Whether the update reads what the answers to a prompt share once.
        autocast: Precision of the forward passes.
    """
    from agents.reinforce import Reinforce

    shape = dict(TRAIN[workload])
    kwargs = {"max_turns": shape.pop("max_turns")} if "max_turns" in shape else {}
    env, model = "DialogueQA-v0", "tiny"
    if workload == "long answers":
        env, model = register_long_answers(), gpt2(Path(tempfile.mkdtemp()))
    agent = Reinforce(
        model,
        env,
        env_kwargs=kwargs,
        seed=1,
        device="cpu",
        eval_every=0,
        learning_rate=0.0,
        autocast=autocast,
        **shape,
    )
    policy: Any = agent.policy
    body, head = sizes(policy.model)

    def once() -> Work:
        before, began = policy.read_tokens, time.perf_counter()
        policy.trees = share
        agent.iterate()
        seconds = time.perf_counter() - began
        # Counting what was needed, whatever was done, does not count.
        policy.trees = True
        assert agent.batch is not None
        read, sampled = policy.read_tokens - before, agent.batch.tokens
        laid_out = policy.lay_out(agent.batch.sequences)
        distinct = len(np.unique(np.concatenate(laid_out.forest.nodes)))
        guesses = len(laid_out.sampled.places)
        flops = 2 * (body * read + head * sampled) + 6 * (body * distinct + head * guesses)
        return Work(agent.batch.episodes, flops, seconds=seconds)

    repeat(once, report)


def rloo_trainer(
    prompts: Sequence[str],
    references: Sequence[tuple[str, ...]],
    *,
    name: str,
    shape: dict[str, int],
    callbacks: Sequence[Any] = (),
    **settings: Any,
) -> Any:
    """Return TRL's ``RLOOTrainer`` on a workload; answers are scored as DialogueQA scores them.

    Args:
        prompts: Prompts.
        references: The accepted answers to each; of (``""``,) any answer is, more or less.
        name: Folder of the model.
        shape: Prompts, answers to each and tokens of each: one of ``TRAIN``.
        callbacks: Of TRL.
        **settings: Of TRL's ``RLOOConfig``.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import RLOOConfig, RLOOTrainer

    from llm_envs.scoring.qa import token_f1

    data = [{"prompt": p, "accepted": list(r)} for p, r in zip(prompts, references, strict=True)]

    def reward(completions: list[str], accepted: list[list[str]], **_: Any) -> list[float]:
        scores = [
            token_f1(said.strip(), known) if known[0] else (len(said) % 7) / 6
            for said, known in zip(completions, accepted, strict=True)
        ]
        return [2 * score - 1 for score in scores]

    config = RLOOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=shape["prompts"] * shape["group_size"],
        num_generations=shape["group_size"],
        max_completion_length=shape["max_new_tokens"],
        beta=0.0,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **settings,
    )
    return RLOOTrainer(
        model=AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(data),
        processing_class=AutoTokenizer.from_pretrained(name),
        callbacks=[*callbacks],
    )


def train_trl(report: Report, *, workload: str) -> None:
    """The same with TRL's ``RLOOTrainer``: same model, prompts, lengths, group and batch."""
    from transformers import TrainerCallback

    from agents.policies.models import TINY

    shape = TRAIN[workload]

    class Reporter(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            report(Work(shape["prompts"] * shape["group_size"]))

    long = workload == "long answers"
    prompts, references = (words(512), [("",)] * 512) if long else questions(512, max_turns=1)
    rloo_trainer(
        prompts,
        references,
        name=gpt2(Path(tempfile.mkdtemp())) if long else str(TINY),
        shape=shape,
        callbacks=[Reporter()],
        max_steps=10_000,
        learning_rate=0.0,
    ).train()


def train_processes(report: Report, *, count: int, updates: int = 6) -> None:
    """Answers of ``torchrun -m agents.train``, one thread a process; start-up does not count."""
    from agents.runs import read_metrics

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def once() -> Work:
        folder = Path(tempfile.mkdtemp()) / "run"
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command = [
            *(launch if count > 1 else []),
            *("-m", "agents.train", "--env", "DialogueQA-v0", "--agent", "reinforce"),
            *("--prompts", "16", "--group-size", "8", "--steps", str(updates * 512)),
            *("--eval-every", "0", "--report", "none", "--track", "jsonl", "--quiet"),
            *("--samples", "0", "--threads", "1", "--device", "cpu", "--out", str(folder)),
        ]
        subprocess.run([sys.executable, *command], check=True, capture_output=True, env=environment)
        rows = read_metrics(folder / "metrics.jsonl")
        rates = [r[name] for r in rows if (name := "perf/env_steps_per_second") in r][1:]
        return Work(sorted(rates)[len(rates) // 2], seconds=1.0)

    repeat(once, report)


# --- sampling ------------------------------------------------------------------------------------


def _prompts_of(batch: int, group: int) -> list[str]:
    distinct = questions(max(1, batch // group))[0]
    return [prompt for prompt in distinct for _ in range(group)][:batch]


def sample(
    report: Report,
    *,
    model: str,
    batch: int,
    group: int,
    tokens: int = 32,
    compiled: bool = False,
) -> None:
    """Tokens sampled by ours; prompts of mixed lengths, and none ends before ``tokens``."""
    from agents.policies.causal_lm import CausalLMPolicy
    from agents.sampling import Sampler, SamplingConfig, compiled_step

    policy = CausalLMPolicy.from_pretrained(model, device="cpu", chat=False)
    policy.model.eval()
    body, head = sizes(policy.model)
    prompts = policy.tokenizer(_prompts_of(batch, group))["input_ids"]
    config = SamplingConfig(tokens)
    step = compiled_step("cpu") if compiled else None
    size = policy.model.config.num_key_value_heads * policy.model.config.head_dim
    slot_bytes = 2 * 4 * policy.model.config.num_hidden_layers * size

    def once() -> Work:
        # No token is the end of sequence, so that both sides sample as many.
        sampler = Sampler(policy.model, -1, policy.pad, policy.generator, step)
        sampler.answer(dict(enumerate(prompts)), config)
        read = sampler.read_tokens
        held = sum(len(p) + tokens / 2 for p in prompts) * slot_bytes
        moved = tokens * (4 * (body + head) + held)
        return Work(batch * tokens, 2 * (body * read + head * batch * tokens), moved)

    repeat(once, report)


def sample_transformers(
    report: Report, *, model: str, batch: int, group: int, tokens: int = 32
) -> None:
    """The same by ``transformers``' ``generate``, prompts padded on the left."""
    import torch

    from agents.policies.models import load_model

    loaded, tokenizer = load_model(model, "cpu", "float32")
    loaded.eval()
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    given = tokenizer(_prompts_of(batch, group), return_tensors="pt", padding=True)
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "do_sample": True,
        "top_k": 0,
        "top_p": 1.0,
        "temperature": 1.0,
        "max_new_tokens": tokens,
        "min_new_tokens": tokens,
        "pad_token_id": tokenizer.pad_token_id,
        "return_dict_in_generate": True,
        "output_logits": True,  # log-probabilities are needed by whoever trains on the tokens
    }

    def once() -> Work:
        with torch.no_grad():
            found = loaded.generate(
                input_ids=given["input_ids"], attention_mask=given["attention_mask"], **settings
            )
            new = found.sequences[:, -tokens:]
            torch.stack(found.logits, 1).log_softmax(-1).gather(2, new[..., None])
        return Work(batch * tokens)

    repeat(once, report)


# --- environments --------------------------------------------------------------------------------


def env_steps(report: Report, *, env: str, n: int, sync: bool = False) -> None:
    """Steps of a vector environment, resets included; actions are short texts or choices."""
    import gymnasium as gym

    import llm_envs  # noqa: F401

    mode: dict[str, Any] = {"vectorization_mode": "sync"} if sync else {}
    envs: Any = gym.make_vec(env, num_envs=n, **mode)
    envs.reset(seed=list(range(n)))
    choosing = isinstance(envs.single_action_space, gym.spaces.Discrete)
    texts = ["it is a word", "unknown", "the kind of thing that it is", "a capital"]
    batches = [
        [i % 5 if choosing else texts[(i + step) % 4] for i in range(n)] for step in range(8)
    ]
    rounds = max(1, 2048 // (8 * n))

    def once() -> Work:
        for actions in batches * rounds:
            envs.step(actions)
        return Work(8 * rounds * n)

    repeat(once, report)


def env_steps_gem(report: Report) -> None:
    """Episodes of GEM's ``QaEnv`` (one step each) on the questions of DialogueQA, one by one."""
    from datasets import Dataset, disable_progress_bars
    from gem.envs.qa_env import QaEnv

    disable_progress_bars()
    prompts, references = questions(512, max_turns=1)
    data = {"question": prompts, "answer": [list(r) for r in references]}
    env = QaEnv(dataset=Dataset.from_dict(data))
    env.reset()
    count = 2048

    def once() -> Work:
        for i in range(count):
            env.step(f"<answer>{('it is a word', 'unknown')[i % 2]}</answer>")
            env.reset()
        return Work(count)

    repeat(once, report)


def _summaries() -> tuple[list[str], list[list[str]]]:
    import gymnasium as gym

    import llm_envs  # noqa: F401

    envs: Any = gym.make_vec("Summarization-v0", num_envs=512, split="train")
    observations, _ = envs.reset(seed=list(range(512)))
    said = [" ".join(o.split()[i % 5 : i % 5 + 12]) for i, o in enumerate(observations)]
    return said, [list(r) for r in envs.references]


def rouge(report: Report) -> None:
    """ROUGE-1, -2 and -L of pairs by ours."""
    from llm_envs.scoring.rouge import rouge_batch

    said, references = _summaries()

    def once() -> Work:
        rouge_batch(said, references)
        return Work(sum(map(len, references)))

    repeat(once, report)


def rouge_google(report: Report) -> None:
    """The same by the package ``rouge-score``."""
    from rouge_score.rouge_scorer import RougeScorer

    said, references = _summaries()
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])

    def once() -> Work:
        for text, accepted in zip(said, references, strict=True):
            for reference in accepted:
                scorer.score(reference, text)
        return Work(sum(map(len, references)))

    repeat(once, report)


# --- turns, latency ------------------------------------------------------------------------------


def turns(report: Report, *, turns: int, again: bool = False, rows: int = 16) -> None:
    """Gradient of dialogues of many turns, each with its own reward; the unit is a dialogue.

    Args:
        report: Told of each pass.
        turns: Turns of a dialogue: 48 tokens of prompt, then 12 of question and 12 of answer each.
        again: Read the history anew for every turn, as one example a turn does.
        rows: Dialogues.
    """
    from agents.policies.causal_lm import CausalLMPolicy, TokenSequence
    from agents.sampling import Completion

    policy = CausalLMPolicy.from_pretrained("tiny", device="cpu")
    rng = np.random.default_rng(0)
    body, head = sizes(policy.model)

    def ids(count: int) -> list[int]:
        return [int(i) for i in rng.integers(10, 4000, count)]

    sequences = []
    for row in range(rows):
        whole = TokenSequence(row)
        whole.read(ids(48))
        for turn in range(turns):
            whole.read(ids(12))
            if again:
                whole = TokenSequence(row, list(whole.ids), [-1] * len(whole))
            whole.wrote(turn, Completion(ids(12), [0.0] * 12, False))
            if again:
                sequences.append(whole)
        if not again:
            sequences.append(whole)
    policy.trees = False

    def once() -> Work:
        for members in policy.micro_batches(sequences):
            policy.score([sequences[i] for i in members]).log_probs.sum().backward()  # type: ignore[no-untyped-call]
        policy.model.zero_grad()
        tokens = sum(map(len, sequences))
        return Work(rows, 6 * (body * tokens + head * 12 * turns * rows))

    repeat(once, report)


def latency(report: Report, *, rows: int) -> None:
    """From feedback to changed weights and the next answers begun: one update, one first token."""
    from agents.reinforce import Reinforce
    from agents.sampling import SamplingConfig

    agent = Reinforce(
        "tiny",
        "DialogueQA-v0",
        env_kwargs={"max_turns": 1},
        seed=1,
        device="cpu",
        eval_every=0,
        prompts=rows,
        group_size=1,
        baseline="none",
        max_new_tokens=20,
    )
    policy: Any = agent.policy
    rollout = agent.collect()
    prompts = dict(enumerate(questions(rows)[0]))
    body, head = sizes(policy.model)
    known = sum(map(len, rollout.sequences))

    def once() -> Work:
        agent.learn_from(rollout)
        policy.begin(SamplingConfig(1)).act(prompts, 0)
        flops = 8 * body * known + 8 * head * rollout.tokens
        weights = 4 * (body + head)
        return Work(1, flops, 12 * weights)  # weight, gradient and two moments: read and written

    repeat(once, report)


# --- the machine ---------------------------------------------------------------------------------


def gemm(report: Report, *, dtype: str = "float32", size: int = 1024) -> None:
    """Multiplications and additions a second of a square matrix product."""
    import torch

    kind = getattr(torch, dtype)
    a, b = (torch.randn(size, size).to(kind) for _ in range(2))

    def once() -> Work:
        for _ in range(8):
            a @ b
        return Work(8 * 2 * size**3)

    repeat(once, report)


def bandwidth(report: Report, *, megabytes: int = 256) -> None:
    """Bytes a second that a sum over memory reads."""
    import torch

    data = torch.ones(megabytes * 2**18)

    def once() -> Work:
        for _ in range(4):
            data.sum()
        return Work(4 * data.numel() * 4)

    repeat(once, report)


# --- start-up ------------------------------------------------------------------------------------


def startup(report: Report, *, code: str) -> None:
    """Fresh interpreters that run some code; the unit is one of them."""

    def once() -> Work:
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        return Work(1)

    repeat(once, report)


CONTENDERS: dict[str, Callable[..., None]] = {
    f.__name__: f
    for f in (
        train,
        train_trl,
        train_processes,
        sample,
        sample_transformers,
        env_steps,
        env_steps_gem,
        rouge,
        rouge_google,
        turns,
        latency,
        gemm,
        bandwidth,
        startup,
    )
}


def main() -> None:
    """Serve repetitions of one contender; what it prints itself goes to stderr."""
    _, name, arguments = sys.argv
    report, sys.stdout = _report(sys.stdout), sys.stderr
    try:
        CONTENDERS[name](report, **json.loads(arguments))
    except ImportError as error:
        print(error, file=sys.stderr)
        raise SystemExit(MISSING) from error


if __name__ == "__main__":
    main()
