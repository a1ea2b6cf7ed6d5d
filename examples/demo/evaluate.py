"""How well Hugging Face models of the demo's world do: loss in both languages, exact match of chat answers.

Plain transformers, nothing of the trainer: what is measured is what anybody gets who loads the exported directories.

  python evaluate.py --world DIR --output results.json NAME=HF_DIR [NAME=HF_DIR ...]
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from megatron_ssu.io.atomic import write_text

ANSWER_TOKENS = 16  # more than the longest answer


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@torch.no_grad()
def text_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int = 128) -> float:
    """Mean loss (nats per token) over windows of `length` tokens of the joined texts, an end token before each text."""
    ids = [token for text in tokenizer(texts)["input_ids"] for token in (tokenizer.eos_token_id, *text)]
    windows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    total = 0.0
    for batch in windows.split(32):
        logits = model(input_ids=batch).logits[:, :-1].float()
        total += cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return total / windows[:, 1:].numel()


@torch.no_grad()
def chat_matches(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chats: list[dict], limit: int = ANSWER_TOKENS
) -> dict[str, float]:
    """Share of each task's chats whose whole greedy answer is the expected one, letter for letter."""
    tokenizer.padding_side = "left"
    hits: Counter[str] = Counter()
    for start in range(0, len(chats), 100):
        part = chats[start : start + 100]
        prompts = [
            tokenizer.apply_chat_template(chat["messages"][:1], tokenize=False, add_generation_prompt=True)
            for chat in part
        ]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        answers = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=limit,
            do_sample=False,
        )[:, batch["input_ids"].shape[1] :]
        for chat, answer in zip(part, answers.tolist()):
            end = answer.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in answer else None
            hits[chat["task"]] += tokenizer.decode(answer[:end]) == chat["messages"][1]["content"]
    asked = Counter(chat["task"] for chat in chats)
    return {task: hits[task] / asked[task] for task in sorted(asked)}


def evaluate(directory: Path, world: Path) -> dict[str, Any]:
    """All measures of the model in `directory`: source_loss, target_loss, chat (all tasks) and chat_tasks (each)."""
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).float().eval()
    losses = {
        f"{language}_loss": text_loss(
            model, tokenizer, [row["text"] for row in read_jsonl(world / f"{language}_valid.jsonl")]
        )
        for language in ("source", "target")
    }
    chats = read_jsonl(world / "heldout_chat.jsonl")
    tasks = chat_matches(model, tokenizer, chats)
    return {**losses, "chat": sum(tasks[chat["task"]] for chat in chats) / len(chats), "chat_tasks": tasks}


def main() -> None:
    parser = argparse.ArgumentParser(description="Evaluate models of the demo's world.")
    parser.add_argument("models", nargs="+", metavar="NAME=HF_DIR", help="a name for the table and a directory")
    parser.add_argument("--world", type=Path, required=True, help="folder that world.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    results = {}
    for entry in args.models:
        name, separator, directory = entry.partition("=")
        if not separator:
            parser.error(f"{entry}: write NAME=HF_DIR")
        results[name] = evaluate(Path(directory), args.world)
        print(f"{name}: {json.dumps(results[name])}", flush=True)
    write_text(args.output, json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
