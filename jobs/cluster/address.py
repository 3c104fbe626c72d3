"""Which Ray cluster a command uses, and whether anything answers there.

In: the option `--address` and the variable RAY_ADDRESS. Out: an address and its source, or a RequestError that names
the wrong one of the two and says what to do.
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
        """The error for this address; `otherwise` is what the user can do besides unsetting RAY_ADDRESS."""
        if self.source == OPTION:
            return RequestError(f"{OPTION}: {problem}")
        advice = f"{otherwise}, or unset {environment.ADDRESS} to run on this machine".removeprefix(", or ")
        return RequestError(f"{environment.ADDRESS} (set in the environment): {problem}; {advice}")


def chosen(option: str | None) -> Address:
    """The address that a command uses: `--address`, else RAY_ADDRESS, else `local`. As in Ray, `--address auto` means
    the cluster in RAY_ADDRESS, if it names one."""
    variable = environment.cluster_address()
    if option and not (option == AUTO and variable):
        return Address(option)
    return Address(variable, environment.ADDRESS) if variable else Address(LOCAL)


def check(address: Address) -> None:
    """Raises RequestError if no cluster answers at an address to join. Waits a few seconds at most."""
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
    """Raises RequestError, naming `--address`, if nothing answers at HOST:PORT."""
    _check_connects(Address(address), address)


def _check_auto(address: Address) -> None:
    """Looks for a cluster on this machine as Ray does; the one that Ray remembers may be gone, so it must answer."""
    from ray._private import services

    if environment.cluster_address() is None:
        os.environ.pop(environment.ADDRESS, None)  # `local` or a jobs server, which Ray would use instead
    try:
        cluster = services.canonicalize_bootstrap_address_or_die(AUTO)
    except ConnectionError:
        raise address.refusal(
            f"{AUTO} finds no Ray cluster on this machine", "start one here with `ray start`"
        ) from None
    _check_connects(address, cluster)


def _check_connects(address: Address, target: str) -> None:
    """Tries a TCP connection, because Ray would wait long for a wrong address."""
    host, _, port = target.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        allowed = "auto, HOST:PORT" + (" or ray://HOST:PORT" if address.source == OPTION else " or local")
        raise address.refusal(f"{target!r} is not {allowed}", "correct it")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, UnicodeError) as error:  # UnicodeError: an impossible host name
        raise address.refusal(f"no Ray cluster answers at {target} ({error})", "start the cluster") from None
