"""Tokenize JSONL files into an indexed dataset: `megatron-ssu prepare` under the name that Megatron-LM gives it.

  python tools/preprocess_data.py --input a.jsonl b.jsonl.gz --output-prefix data/target \
      --tokenizer-model models/OLMo-2-1124-7B-Instruct --workers 16
"""

from __future__ import annotations

import argparse

from megatron_ssu.cli import main


def arguments() -> list[str]:
    """This script's options as those of `megatron-ssu prepare`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="JSONL, also .gz and .zst")
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="write PREFIX.bin and PREFIX.idx")
    parser.add_argument("--tokenizer-model", required=True, metavar="DIR", help="Hugging Face directory")
    parser.add_argument("--json-keys", default="text", metavar="KEY", help="key of the text (default text)")
    parser.add_argument("--workers", default="2", metavar="N", help="tokenizer processes (default 2)")
    parser.add_argument("--skip-bad-lines", action="store_true", help="skip and count bad lines instead of stopping")
    o = parser.parse_args()
    flags = ["--skip-bad-lines"] if o.skip_bad_lines else []
    options = ["--model", o.tokenizer_model, "--output", o.output_prefix, "--text-key", o.json_keys]
    return ["prepare", *o.input, *options, "--workers", o.workers, *flags]


if __name__ == "__main__":
    main(arguments())
