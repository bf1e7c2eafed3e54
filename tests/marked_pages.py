"""How does a measured table get into a page? Between `<!-- name -->` and `<!-- /name -->`."""

from collections.abc import Mapping
from pathlib import Path


def put(page: Path, tables: Mapping[str, str]) -> None:
    """Write tables into a page, in place of what stands between their markers.

    Raises:
        SystemExit: the page has no such markers; then nothing is written.
    """
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, _, rest = text.partition(begin)
        if end not in rest:
            raise SystemExit(f"{page} has no {begin} ... {end}")
        text = f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
    page.write_text(text, encoding="utf-8")
