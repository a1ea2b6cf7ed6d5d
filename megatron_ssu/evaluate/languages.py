"""Which language a text is in: by langid, by a function of the user's, or by its script."""

from __future__ import annotations

import importlib
import unicodedata
from collections import Counter
from collections.abc import Callable

from megatron_ssu.errors import UserError, named_line
from megatron_ssu.io.extras import installed, require

Identify = Callable[[str], str]
_SHARE = 0.8  # of a text's letters


def script_of(text: str) -> str:
    """The script that at least 80 % of the letters are of, by their names in Unicode (latin, ethiopic, cjk, ...), else mixed;
    none without letters."""
    scripts = Counter(unicodedata.name(letter, "?").split()[0].lower() for letter in text if letter.isalpha())
    if not scripts:
        return "none"
    script, count = scripts.most_common(1)[0]
    return script if count >= _SHARE * scripts.total() else "mixed"


def langid_of(text: str) -> str:
    """The language that langid takes a text for, as ISO 639-1; none without letters."""
    import langid

    return str(langid.classify(text)[0]) if any(letter.isalpha() for letter in text) else "none"


def identifier(name: str) -> Identify:
    """auto: langid where it is installed, else script; script; langid; or MODULE:FUNCTION, which gives a text its label.

    Raises UserError for another name.
    """
    if name == "auto":
        name = "langid" if installed("langid") else "script"
    if name == "langid":
        require("--identifier langid", "langid", "language")
        return langid_of
    if name == "script":
        return script_of
    module, _, function = name.partition(":")
    if not function:
        raise UserError(f"--identifier: must be auto, script, langid or MODULE:FUNCTION, got {name!r}")
    try:
        found: Identify = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the user's module raises
        raise UserError(f"--identifier: {name} cannot be had ({named_line(error)})") from error
    return found
