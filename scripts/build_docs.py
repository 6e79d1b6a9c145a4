"""`make docs`: the Markdown pages and a reference made from docstrings, as plain HTML; fails on a link that leads nowhere."""

from __future__ import annotations

import argparse
import html
import importlib
import inspect
import os
import pkgutil
import re
import sys
from pathlib import Path

from markdown_it import MarkdownIt

import unipo

ROOT = Path(__file__).resolve().parent.parent
STYLE = """
:root { color-scheme: light dark; --line: #d9dde5; --soft: #667085; --code: #f1f3f7; }
@media (prefers-color-scheme: dark) { :root { --line: #2b313c; --soft: #9aa4b5; --code: #1e232d; } }
body { font: 16px/1.6 Inter, system-ui, sans-serif; max-width: 860px; margin: 0 auto; padding: 24px; }
nav { border-bottom: 1px solid var(--line); padding-bottom: 10px; font-size: 14px; } nav a { margin-right: 14px; }
pre { background: var(--code); padding: 12px; border-radius: 8px; overflow-x: auto; } code { font-size: .9em; }
table { border-collapse: collapse; } td, th { border: 1px solid var(--line); padding: 4px 10px; } img { max-width: 100%; }
h3 code { font-weight: 600; } .doc { white-space: pre-wrap; margin: 0 0 18px 18px; color: var(--soft); }
"""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--out", type=Path, default=ROOT / "build" / "docs")
    out: Path = arguments.parse_args().out.resolve()
    pages = sources()
    broken = [f"{page.relative_to(ROOT)}: {link}" for page in pages for link in broken_links(page)]
    if broken:
        sys.exit("links that lead nowhere:\n  " + "\n  ".join(broken))
    for page in pages:
        target = out / page.relative_to(ROOT).with_suffix(".html")
        write(target, page.stem, rendered(page.read_text(encoding="utf-8"), page, out), out, pages)
    write(out / "reference.html", "reference", reference(), out, pages)
    print(f"{len(pages)} pages and the reference: {out / 'README.html'}")


def sources() -> list[Path]:
    """The Markdown pages, README first."""
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [p for p in top if p.exists()] + sorted((ROOT / "docs").rglob("*.md"))


def broken_links(page: Path) -> list[str]:
    """Relative links of a page to files that do not exist; addresses with a scheme and anchors are not followed."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)[^)]*\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    local = [x.split("#")[0] for x in links if not re.match(r"[a-z]+:|#", x)]
    return [x for x in local if x and not (page.parent / x).exists()]


def rendered(text: str, page: Path, out: Path) -> str:
    """HTML of a page; its links to pages go to their HTML, those to other files to where they lie in the repository."""
    made = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    here = (out / page.relative_to(ROOT)).parent

    def moved(match: re.Match[str]) -> str:
        attribute, link = match.groups()
        if re.match(r"[a-z]+:|#", link):
            return match.group()
        if link.split("#")[0].endswith(".md"):
            return f'{attribute}="{link.replace(".md", ".html", 1)}"'
        return f'{attribute}="{os.path.relpath((page.parent / link).resolve(), here)}"'

    return re.sub(r'(src|href)="([^"]+)"', moved, made)


def write(target: Path, title: str, body: str, out: Path, pages: list[Path]) -> None:
    up = "../" * (len(target.relative_to(out).parts) - 1)
    names = [page.relative_to(ROOT).with_suffix(".html") for page in pages] + [Path("reference.html")]
    links = "".join(f'<a href="{up}{name.as_posix()}">{name.stem.replace("_", " ")}</a>' for name in names)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)} · UniPO</title>'
        f"<style>{STYLE}</style><nav>{links}</nav>{body}</html>\n",
        encoding="utf-8",
    )


def reference() -> str:
    """Every module with its public classes and functions, their signatures and docstrings."""
    modules = [m.name for m in pkgutil.walk_packages(unipo.__path__, "unipo.") if "__main__" not in m.name]
    return "<h1>Reference</h1>" + "".join(described(importlib.import_module(name)) for name in sorted(modules))


def described(module: object) -> str:
    name = str(getattr(module, "__name__", ""))
    own = [
        (n, x)
        for n, x in vars(module).items()
        if not n.startswith("_") and (inspect.isclass(x) or inspect.isfunction(x)) and x.__module__ == name
    ]
    if not own:
        return ""
    parts = [f'<h2 id="{name}">{name}</h2><div class="doc">{html.escape(inspect.getdoc(module) or "")}</div>']
    for n, x in own:
        parts.append(f"<h3><code>{html.escape(n + signature(x))}</code></h3>")
        parts.append(f'<div class="doc">{html.escape(inspect.getdoc(x) or "")}</div>')
    return "".join(parts)


def signature(x: object) -> str:
    try:
        return str(inspect.signature(x))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return ""


if __name__ == "__main__":
    main()
