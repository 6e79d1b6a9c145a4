"""docs/methods.md from the catalog: every method and result that is built, beside its kin, with what it trains on."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from unipo.methods.catalog import PAGES, STUDY_PAGES, verdict_of
from unipo.methods.method import Method, Study

INTRODUCTION = """\
# Methods

Everything that `unipo run` trains with and `unipo reproduce` checks, by page of the source: kin stand together, and a page
begins with what tells them apart. `unipo show METHOD` prints equation, settings, needs and evidence. *Rows* are what its terms
claim: rollouts (fresh or replayed), demos, pairs, labels. The verdict is that of [claims.md](claims.md); baselines have none.

This page is written by `python -m unipo.reproduce.page`.
"""


def catalog_page() -> str:
    """The Markdown of the whole page."""
    pages = dict.fromkeys((*PAGES, *STUDY_PAGES))
    return "\n".join([INTRODUCTION, *(line for module in pages for line in _section(module))])


def _section(module: Any) -> Iterator[str]:
    heading, _, rest = (inspect.getdoc(module) or "").partition("\n")
    name = module.__name__.rpartition(".")[2]
    yield f"## [{name}](../unipo/methods/{name}.py)"
    yield f"\n{heading}\n"
    if rest.strip():
        yield f"```text{rest.rstrip()}\n```\n"
    yield "| method | work | rows | for | verdict |\n|---|---|---|---|---|"
    yield from (_method(m) for m in getattr(module, "METHODS", ()))
    yield from (_study(s) for s in getattr(module, "STUDIES", ()))
    yield ""


def _method(method: Method) -> str:
    recipe = method.build()
    acting = method.builder(environment=True)().control is not None
    places = " and ".join(p for p, fits in (("text", recipe.for_text), ("environments", acting)) if fits)
    kinds = ["rollouts"] * recipe.samples + [f"{kind}s" for kind in recipe.kinds if kind != "rollout"]
    return f"| `{method.slug}` | {_work(method)} | {', '.join(kinds)} | {places} | {_verdict(method.slug)} |"


def _study(study: Study) -> str:
    return f"| `{study.slug}` | {_work(study)} | | `{study.function.__name__}` | {_verdict(study.slug)} |"


def _work(work: Method | Study) -> str:
    return f"{work.title}, {work.paper}".replace("|", "\\|")


def _verdict(slug: str) -> str:
    found = verdict_of(slug)
    return f"[{found['verdict']}](claims.md#{slug})" if found else ""
