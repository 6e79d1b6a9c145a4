"""Calling a function of somebody else's with a time limit."""

from __future__ import annotations

import asyncio
import inspect
import signal
import threading
from collections.abc import Awaitable, Callable
from typing import Any


class Hung(Exception):
    """A call took longer than its limit."""


class _Expired(BaseException):
    """Unwinds the interrupted call; not an Exception, so that `except Exception` inside the call lets it through."""


def limited(call: Callable[[], Any], seconds: float) -> Any:
    """`call()`, awaited where it is asynchronous. Raises Hung after `seconds`.

    In the main thread the call runs here and is interrupted (so that functions which set alarms of their own work, and
    nothing is left behind); elsewhere it runs in a thread that is abandoned when it hangs. Only a call that is stuck in C
    code cannot be interrupted: give such code a process of its own.
    """
    here = threading.current_thread() is threading.main_thread() and hasattr(signal, "pthread_kill")
    result = _interruptible(call, seconds) if here else _in_thread(call, seconds)
    return (
        _in_thread(lambda: asyncio.run(_awaited(result, seconds)), seconds + 5)
        if inspect.isawaitable(result)
        else result
    )


def _interruptible(call: Callable[[], Any], seconds: float) -> Any:
    """In the main thread: a watchdog signals it. SIGUSR2, since calls may use SIGALRM themselves."""
    running, expired, caller = False, False, threading.get_ident()

    def expire(number: int, frame: Any) -> None:
        nonlocal expired
        expired = True
        if running:
            raise _Expired

    before = signal.signal(signal.SIGUSR2, expire)
    watchdog = threading.Timer(seconds, lambda: signal.pthread_kill(caller, signal.SIGUSR2))
    watchdog.daemon = True
    watchdog.start()
    try:
        try:
            running = True
            if expired:
                raise _Expired
            return call()
        finally:
            running = False
    except _Expired:
        raise Hung(f"no answer after {seconds:g} s") from None
    finally:
        watchdog.cancel()
        watchdog.join()  # a signal that is on its way has to meet our handler, not the one before
        signal.signal(signal.SIGUSR2, before)


def _in_thread(call: Callable[[], Any], seconds: float) -> Any:
    outcome: list[Any] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise Hung(f"no answer after {seconds:g} s")
    if failure:
        raise failure[0]
    return outcome[0]


async def _awaited(result: Awaitable[Any], seconds: float) -> Any:
    task = asyncio.ensure_future(result)
    done, _ = await asyncio.wait({task}, timeout=seconds)
    if not done:
        task.cancel()
        raise Hung(f"no answer after {seconds:g} s")
    return task.result()
