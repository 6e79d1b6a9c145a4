"""How many threads of the processor a run uses."""

from __future__ import annotations

import torch

WIDE = 256
"""Units from which on layers of control networks repay a second thread; narrower ones wait for it longer than it works."""
_usual: list[int] = []


def use_threads(asked: int, width: int = WIDE) -> None:
    """`asked` threads; 0: one for networks narrower than `WIDE`, otherwise what was usual before such a run."""
    if asked:
        torch.set_num_threads(asked)
    elif width < WIDE:
        if torch.get_num_threads() > 1:
            _usual[:] = [torch.get_num_threads()]
        torch.set_num_threads(1)
    elif _usual:
        torch.set_num_threads(_usual.pop())
