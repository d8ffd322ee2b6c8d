"""How a worker's messages cross the pipe: heatmaps one by one beside the message, so that none is held twice."""

from __future__ import annotations

import pickle
from multiprocessing.connection import Connection

from service.workers.messages import ToParent


def send(connection: Connection, message: ToParent) -> None:
    """Send a message. What cannot be pickled raises before anything is sent."""
    beside: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(message, protocol=5, buffer_callback=beside.append)
    connection.send((pickled, len(beside)))
    for data in beside:
        connection.send_bytes(data)


def receive(connection: Connection) -> ToParent:
    """Wait for the next message. Raises EOFError when the worker is gone, also in the midst of one."""
    pickled, count = connection.recv()
    beside = [connection.recv_bytes() for _ in range(count)]
    message: ToParent = pickle.loads(pickled, buffers=beside)  # noqa: S301  # of our own process
    return message
