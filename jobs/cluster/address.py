"""Which Ray cluster a command uses, and whether anything answers there.

In: the option `--address` and the variable RAY_ADDRESS. Out: an address and where it came from, or a RequestError that
names the one of the two that is wrong and says what to do.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from jobs.cluster import environment
from jobs.errors import RequestError

LOCAL, AUTO = "local", "auto"
OPTION = "--address"
CONNECT_SECONDS = 5.0


@dataclass(frozen=True)
class Address:
    """`local` (start Ray on this machine), `auto` (the cluster that this machine is a node of) or HOST:PORT."""

    value: str
    source: str = OPTION
    """`--address` or `RAY_ADDRESS`."""

    @property
    def joins(self) -> bool:
        """Whether an existing cluster is joined."""
        return self.value != LOCAL

    def refusal(self, problem: str, otherwise: str = "") -> RequestError:
        """The error for this address; `otherwise` is what else could be done about it."""
        if self.source == OPTION:
            return RequestError(f"{OPTION}: {problem}")
        advice = f"{otherwise}, or unset {environment.ADDRESS} to run on this machine".removeprefix(", or ")
        return RequestError(f"{environment.ADDRESS} (set in the environment): {problem}; {advice}")


def chosen(option: str | None) -> Address:
    """The address that a command uses: `--address`, else RAY_ADDRESS, else `local`. As for Ray itself, `--address auto`
    means what RAY_ADDRESS names, if it names a cluster."""
    variable = environment.cluster_address()
    if option and not (option == AUTO and variable):
        return Address(option)
    return Address(variable, environment.ADDRESS) if variable else Address(LOCAL)


def check(address: Address) -> None:
    """Raises RequestError if no cluster answers at an address that is to be joined. Waits a few seconds at most."""
    if not address.joins:
        return
    if address.value == AUTO:
        _check_auto(address)
    elif address.value.startswith("ray://") and address.source != OPTION:
        raise address.refusal(
            f"{address.value} is for submitting a job from outside the cluster",
            f"pass `{OPTION} {address.value}` to do that",
        )
    else:
        _check_connects(address, address.value)


def check_answers(address: str) -> None:
    """Raises RequestError, which names `--address`, if nothing answers at HOST:PORT."""
    _check_connects(Address(address), address)


def _check_auto(address: Address) -> None:
    """Looks for a cluster on this machine as Ray does; the one that Ray remembers may have ended."""
    from ray._private import services

    if environment.cluster_address() is None:
        os.environ.pop(environment.ADDRESS, None)  # `local`, or where jobs are submitted: Ray would take that instead
    try:
        there = services.canonicalize_bootstrap_address_or_die(AUTO)
    except ConnectionError:
        raise address.refusal(
            f"{AUTO} finds no Ray cluster on this machine", "start one here with `ray start`"
        ) from None
    _check_connects(address, there)


def _check_connects(address: Address, there: str) -> None:
    """Tries a TCP connection, so that a wrong address does not hang for as long as Ray would wait."""
    host, _, port = there.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        allowed = "auto, HOST:PORT" + (" or ray://HOST:PORT" if address.source == OPTION else " or local")
        raise address.refusal(f"{there!r} is not {allowed}", "correct it")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, UnicodeError) as error:  # UnicodeError: the name of the host cannot be one
        raise address.refusal(f"no Ray cluster answers at {there} ({error})", "start the cluster") from None
