"""`describe`: what is asked can only be answered by who sees; who reasons well sees a description only.

    prompt             sort 731 then +258=        what the policy is trained to answer: 395
    describe_prompt    sort 731=                  what it describes, without the question: 137
    reason_prompt      {description}+258=         what a frozen reasoner is asked, who never sees 731

The shipped model sorts digits, rarely without mistakes, and has never seen the prompts: its descriptions are its own. A model
that adds well is a reasoner; the embedded one (`--teacher task`) adds rightly nine times out of ten.
"""

from __future__ import annotations

import re
from random import Random

from unipo.rewards.answers import MARK
from unipo.tasks.base import Draft, GeneratedTask, Problem, same_text

DESCRIPTION = "{description}"
"""Where the description goes in a `reason_prompt`."""
CARELESS = 0.1
"""Share of the embedded reasoner's answers that are off by one."""


def _draw(random: Random, level: int) -> Draft:
    digits = [random.randint(1, 9) for _ in range(level + 2)]
    seen, addend = "".join(map(str, digits)), random.randint(10 ** (level + 1), 10 ** (level + 2) - 1)
    described = "".join(map(str, sorted(digits)))
    columns = {
        "describe_prompt": f"sort {seen}=",
        "reason_prompt": f"{DESCRIPTION}+{addend}=",
        "description": described,
    }
    canonical = f"{described}+{addend}"
    prompt = f"sort {seen} then +{addend}="
    return Draft(prompt=prompt, answer=str(int(described) + addend), canonical=canonical, columns=columns)


def _steps(problem: Problem) -> str:
    return str(problem.columns["reason_prompt"]).replace(DESCRIPTION, problem.columns["description"]).rstrip("=")


def _mistake(problem: Problem, random: Random) -> str:
    return str(int(problem.answer) + random.choice((-100, -10, -1, 1, 10, 100)))


def reason(prompt: str, random: Random) -> str:
    """The embedded reasoner: the sum of what it reads, in its words or at once; a question mark where it can read nothing."""
    found = re.fullmatch(r"(\d+)\+(\d+)=", prompt)
    if found is None:
        return "?"
    total = int(found[1]) + int(found[2]) + (random.choice((-1, 1)) if random.random() < CARELESS else 0)
    return str(total) if random.random() < 0.5 else f"{prompt.rstrip('=')}{MARK}{total}"


DESCRIBE = GeneratedTask(
    name="describe",
    description="Sort level + 2 digits, add a number to what they make: sort 731 then +258=",
    all_levels=(1, 2, 3),
    levels=(1,),
    draw=_draw,
    steps=_steps,
    mistake=_mistake,
    verify=same_text,
    budget=lambda level: 3 * level + 10,
    reason=reason,
)
