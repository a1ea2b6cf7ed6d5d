"""The demo's starting point, a Hugging Face directory: a tokenizer of both languages and an untrained tiny OLMo-2.


python make_model.py --world DIR --output HF_DIR [--seed N]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, Olmo2Config, Olmo2ForCausalLM, PreTrainedTokenizerFast

END, USER, ASSISTANT, PAD = "<|endoftext|>", "<|user|>", "<|assistant|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{{ '" + END + "' }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '" + USER + "\\n' + message['content'] + '\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '" + ASSISTANT + "\\n' + message['content'] + '" + END + "' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + "\\n' }}{% endif %}"
)
VOCABULARY = 1536
MAX_LENGTH = 256


def read_jsonl(path: Path) -> Iterator[dict]:
    """The objects of a JSONL file, line by line."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def make_tokenizer(world: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE over both languages and the chats' words; adds no special token of its own accord."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, USER, ASSISTANT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_texts(world), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _texts(world: Path) -> Iterator[str]:
    for name in ("source_train.jsonl", "target_train.jsonl"):
        for row in read_jsonl(world / name):
            yield row["text"]
    for row in read_jsonl(world / "chat.jsonl"):
        for message in row["messages"]:
            yield message["content"]


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Olmo2ForCausalLM:
    """A tiny OLMo-2 (fp32, about 1.2 million parameters) with random weights drawn by `seed`."""
    torch.manual_seed(seed)
    config = Olmo2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    model = Olmo2ForCausalLM(config)
    _draw_weights(model)
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


@torch.no_grad()
def _draw_weights(model: Olmo2ForCausalLM) -> None:
    """Embeddings as large as the normed outputs that the layers add to them, or copying takes long to learn."""
    for name, weight in model.named_parameters():
        if "embed_tokens" in name:
            weight.normal_(0, 1.0)
        elif "lm_head" in name:
            weight.normal_(0, 0.02)
        elif weight.ndim == 2:
            weight.normal_(0, weight.shape[1] ** -0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the demo's tokenizer and its untrained model.")
    parser.add_argument("--world", type=Path, required=True, help="folder that world.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="the Hugging Face directory to write")
    parser.add_argument("--seed", type=int, default=7, help="of the random weights (default 7)")
    args = parser.parse_args()
    tokenizer = make_tokenizer(args.world)
    model = make_model(tokenizer, args.seed)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"{args.output}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
