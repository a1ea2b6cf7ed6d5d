"""Check bit by bit that what was frozen did not move."""

from __future__ import annotations

import argparse
import json

from rich.console import Console

from megatron_ssu.io.atomic import check_writable, write_text
from megatron_ssu.packs.verify import PacksReport, verify_packs
from megatron_ssu.shield.pack_file import Pack
from megatron_ssu.shield.verify import VerifyReport, verify


def run(run_file: None, options: argparse.Namespace, console: Console) -> int:
    target = check_writable(options.json) if options.json else None
    report: VerifyReport | PacksReport
    if options.packs:
        report = verify_packs(options.source, options.adapted, [Pack(path) for path in options.packs])
    else:
        report = verify(options.source, options.adapted, options.shield)
    report.render(console)
    if target:
        write_text(target, json.dumps(report.to_dict(), indent=1) + "\n")
    return report.status
