"""Peers: the processes of a run hear from each other that they are alive, whatever their main threads do.

A collective may wait half an hour for a process that was killed or stopped. Here every process is connected to the
first one, and both send a byte per tick. An end without a goodbye, or a long silence, is a loss. Imports no torch.
"""

import contextlib
import secrets
import socket
import struct
from collections.abc import Sequence

from fleet.processes import gather_by_rank

CONNECT_S = 60.0
HELLO = struct.Struct("!16sI")  # the run's token, the rank
SIGN, GOODBYE = b".", b"E"


class Peer:
    """Another process of the run, and the connection to it."""

    def __init__(self, rank: int, connection: socket.socket):
        self.rank, self.connection = rank, connection
        self.silent_s = 0.0  # since its last sign, or since its connection closed
        self.is_closed = self.has_said_goodbye = False
        connection.setblocking(False)

    def tick(self, tick_s: float) -> None:
        """Sends a sign and reads what has come."""
        self.silent_s += tick_s
        if self.is_closed:
            return
        try:
            # read before sending: a goodbye may have come before the end that sending would meet
            content = self.connection.recv(4096)
            self.silent_s = 0.0
            self.is_closed = not content
            self.has_said_goodbye |= GOODBYE in content
        except BlockingIOError:
            pass
        except OSError:
            self.silent_s, self.is_closed = 0.0, True
        with contextlib.suppress(OSError):
            self.connection.send(SIGN)


class Peers:
    """The other processes that this one hears from: the first hears from all, all others from the first."""

    def __init__(self, peers: Sequence[Peer]):
        self.peers = tuple(peers)

    def first_lost(self, tick_s: float, silence_s: float, closed_s: float) -> str | None:
        """The first process that is lost, in words; None if none is lost. Must be called every `tick_s` seconds.

        A process is lost `silence_s` after its last sign, or `closed_s` after its connection closed without a goodbye.
        """
        for peer in self.peers:
            peer.tick(tick_s)
            if peer.has_said_goodbye:
                continue
            if peer.is_closed and peer.silent_s > closed_s:
                return f"process {peer.rank} has ended"
            if not peer.is_closed and peer.silent_s > silence_s:
                return f"process {peer.rank} has given no sign for {peer.silent_s:.0f} s: it is stopped or lost"
        return None

    def say_goodbye(self) -> None:
        """Tells the others that this process may end now."""
        for peer in self.peers:
            with contextlib.suppress(OSError):
                peer.connection.send(GOODBYE)


def connect(rank: int, num_processes: int, host: str) -> Peers:
    """This process's peers; none if the first process, at `host`, is out of reach. Every process takes part."""
    if num_processes == 1:
        return Peers([])
    if rank == 0:
        token = secrets.token_bytes(16)
        with socket.create_server(("", 0), backlog=num_processes) as server:
            gather_by_rank((server.getsockname()[1], token))
            return Peers(_accept(server, token, num_processes - 1))
    port, token = gather_by_rank(None)[0]
    try:
        connection = socket.create_connection((host, port), CONNECT_S)
        connection.sendall(HELLO.pack(token, rank))
    except OSError:
        return Peers([])
    return Peers([Peer(0, connection)])


def _accept(server: socket.socket, token: bytes, num_others: int) -> list[Peer]:
    """The other processes that connect in time."""
    peers: list[Peer] = []
    server.settimeout(CONNECT_S)
    while len(peers) < num_others:
        try:
            connection, _ = server.accept()
            connection.settimeout(CONNECT_S)
            hello = connection.recv(HELLO.size, socket.MSG_WAITALL)
        except OSError:
            return peers
        if len(hello) == HELLO.size and hello.startswith(token):
            peers.append(Peer(HELLO.unpack(hello)[1], connection))
        else:
            connection.close()
    return peers
