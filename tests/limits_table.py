"""The README's table of limits, made from the server's configuration: python tests/limits_table.py writes it anew."""

import re
from pathlib import Path

from mmubusd.rpc.config import Settings

README = Path(__file__).parent.parent / "README.md"
TABLE = re.compile(r"\| option \| default \| what it bounds \|\n(?:\|.*\n)+")


def limits_table() -> str:
    """One row for each number of the configuration."""
    rows = ["| option | default | what it bounds |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        value = field.default
        if isinstance(value, int | float) and not isinstance(value, bool):
            shown = f"{value:g} s" if isinstance(value, float) else f"{value:,}"
            text = field.description or ""
            begins_with_a_name = text[1:2].isupper()
            rows.append(f"| `{name}` | {shown} | {text if begins_with_a_name else text[:1].lower() + text[1:]} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    README.write_text(TABLE.sub(lambda _: limits_table(), README.read_text()))
