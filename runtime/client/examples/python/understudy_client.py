#!/usr/bin/env python3
"""A client of an Understudy cluster, with nothing but Python's standard library.

Written from docs/protocol.md, and a measure of that page. It streams one completion, and goes on with it when the connection or
the gateway dies:

    understudy_client.py --addr 127.0.0.1:7600 --addr 127.0.0.1:7601 --prompt "count from 1 to 20"
    understudy_client.py --addr 127.0.0.1:7600 --prompt "hello" --json
    understudy_client.py --addr 127.0.0.1:7600 --status

Exit codes: 0 done, 1 the server or the network refused, 2 wrong usage, 130 interrupted.
"""

import argparse
import contextlib
import json
import math
import random
import socket
import struct
import sys
import time

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 16 * 1024 * 1024
WINDOW = 64  # token events that may be under way
CONNECT_TIMEOUT_S = 5.0
KEEPALIVE_INTERVAL_S = 2.0  # a ping is sent after this much silence
KEEPALIVE_TIMEOUT_S = 6.0  # a connection this silent is dead
MAX_DEPTH = 16  # nesting of a message
CANCEL_TIMEOUT_S = 2.0  # for the server to say that a request has been cancelled
MAX_FRUITLESS = 16  # times that a request is accepted again, and its connection lost before a token comes
MAX_RESUBMISSIONS = 3  # after connections that were lost with a submit that may be what the gateways die of


class ProtocolError(Exception):
    """The server sent what the protocol does not allow."""


class ServerError(Exception):
    """An `error` message of the server."""

    def __init__(self, body):
        super().__init__(f"{body['code']}: {body['message']}")
        self.body = body
        self.code = body["code"]
        self.retriable = body["retriable"]


class TooLarge(Exception):
    """The request does not fit the frame that the gateway accepts."""


class Cancelled(Exception):
    """The request was cancelled, but not by this stream: its output is not complete."""


# --- MessagePack: the part that the protocol uses -----------------------------------------------------------------


def pack(value):
    """A value as MessagePack bytes."""
    out = bytearray()
    _pack(value, out)
    return bytes(out)


def _pack(value, out):
    if value is None:
        out.append(0xC0)
    elif isinstance(value, bool):
        out.append(0xC3 if value else 0xC2)
    elif isinstance(value, int):
        _pack_int(value, out)
    elif isinstance(value, float):
        out += struct.pack(">Bd", 0xCB, value)
    elif isinstance(value, str):
        data = value.encode("utf-8")
        _pack_header(len(data), 0xA0, 31, (0xD9, 0xDA, 0xDB), out)
        out += data
    elif isinstance(value, (list, tuple)):
        _pack_header(len(value), 0x90, 15, (None, 0xDC, 0xDD), out)
        for item in value:
            _pack(item, out)
    elif isinstance(value, dict):
        _pack_header(len(value), 0x80, 15, (None, 0xDE, 0xDF), out)
        for key, item in value.items():
            _pack(key, out)
            _pack(item, out)
    else:
        raise TypeError(f"no MessagePack form for {type(value).__name__}")


def _pack_int(value, out):
    if 0 <= value <= 0x7F:
        out.append(value)
    elif -32 <= value < 0:
        out.append(value & 0xFF)
    elif 0 <= value < 1 << 64:
        for marker, form, bits in ((0xCC, ">BB", 8), (0xCD, ">BH", 16), (0xCE, ">BI", 32), (0xCF, ">BQ", 64)):
            if value < 1 << bits:
                out += struct.pack(form, marker, value)
                return
    elif -(1 << 63) <= value < 0:
        out += struct.pack(">Bq", 0xD3, value)
    else:
        raise ValueError(f"{value} does not fit 64 bits")


def _pack_header(length, fixed, fixed_max, markers, out):
    """The header of a string, an array or a map: in one byte, or with a length of 1, 2 or 4 bytes."""
    if length <= fixed_max:
        out.append(fixed | length)
        return
    for marker, form, limit in zip(markers, (">BB", ">BH", ">BI"), (1 << 8, 1 << 16, 1 << 32)):
        if marker is not None and length < limit:
            out += struct.pack(form, marker, length)
            return
    raise ValueError("too long for MessagePack")


def unpack(data):
    """The value that `data` is, all of it."""
    value, end = _unpack(data, 0, 0)
    if end != len(data):
        raise ProtocolError("bytes follow the message")
    return value


_SCALARS = {
    0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
    0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q",
}  # fmt: skip
_LENGTHS = {
    0xD9: ("text", ">B"), 0xDA: ("text", ">H"), 0xDB: ("text", ">I"),
    0xDC: ("array", ">H"), 0xDD: ("array", ">I"), 0xDE: ("map", ">H"), 0xDF: ("map", ">I"),
}  # fmt: skip
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


def _unpack(data, at, depth):
    """The value at `at`, and where it ends."""
    if depth > MAX_DEPTH:
        raise ProtocolError("nested too deep")
    marker, at = _read(">B", data, at)
    if marker <= 0x7F:
        return marker, at
    if marker >= 0xE0:
        return marker - 0x100, at
    if marker in _CONSTANTS:
        return _CONSTANTS[marker], at
    if marker in _SCALARS:
        return _read(_SCALARS[marker], data, at)
    if marker <= 0x8F:
        return _unpack_many("map", marker & 0x0F, data, at, depth)
    if marker <= 0x9F:
        return _unpack_many("array", marker & 0x0F, data, at, depth)
    if marker <= 0xBF:
        return _unpack_many("text", marker & 0x1F, data, at, depth)
    if marker in _LENGTHS:
        kind, form = _LENGTHS[marker]
        length, at = _read(form, data, at)
        return _unpack_many(kind, length, data, at, depth)
    raise ProtocolError(f"MessagePack type {marker:#x} has no place in the protocol")


def _unpack_many(kind, length, data, at, depth):
    if kind == "text":
        end = at + length
        if end > len(data):
            raise ProtocolError("message ends inside a string")
        try:
            return data[at:end].decode("utf-8"), end
        except UnicodeDecodeError as error:
            raise ProtocolError(f"text that is not UTF-8: {error.reason}") from None
    items = []
    for _ in range(length if kind == "array" else 2 * length):
        item, at = _unpack(data, at, depth + 1)
        items.append(item)
    if kind == "map":
        if not all(isinstance(key, str) for key in items[::2]):
            raise ProtocolError("a key that is not text")
        return dict(zip(items[::2], items[1::2])), at
    return items, at


def _read(form, data, at):
    size = struct.calcsize(form)
    if at + size > len(data):
        raise ProtocolError("message ends inside a value")
    return struct.unpack_from(form, data, at)[0], at + size


# --- a connection -------------------------------------------------------------------------------------------------


class Connection:
    """One connection to one gateway, after its handshake."""

    def __init__(self, address, token=None):
        host, port = address.rsplit(":", 1)
        self.socket = socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.received = bytearray()
        self.limits = None
        hello = {"type": "hello", "version": PROTOCOL_VERSION, "client": "understudy-python/1"}
        if token is not None:
            hello["token"] = token
        self.send(hello)
        welcome = self.receive()
        if welcome["type"] != "welcome" or welcome.get("version") != PROTOCOL_VERSION:
            raise ProtocolError("no welcome in this version")
        limits = welcome.get("limits")
        if not isinstance(limits, dict) or not all(isinstance(limits.get(key), int) for key in ("max_frame_bytes", "max_credit")):
            raise ProtocolError("no limits in the welcome")
        self.limits = limits

    def close(self):
        self.socket.close()

    def send(self, message):
        payload = pack(message)
        # Before the welcome only hello is sent, which fits.
        if self.limits is not None and len(payload) > self.limits["max_frame_bytes"]:
            limit = self.limits["max_frame_bytes"]
            raise TooLarge(f"request of {len(payload)} bytes is over the gateway's frame limit of {limit}; shorten the prompt")
        self.socket.settimeout(KEEPALIVE_TIMEOUT_S)
        self.socket.sendall(struct.pack(">I", len(payload)) + payload)

    def receive(self, give_up=math.inf):
        """The next message that is no answer to a ping. A connection-wide `error` is raised."""
        while True:
            message = unpack(self._frame(give_up))
            if not isinstance(message, dict) or not isinstance(message.get("type"), str):
                raise ProtocolError("a frame that is no message")
            if message["type"] == "error" and message.get("stream") is None:
                raise ServerError(message)
            if message["type"] != "pong":
                return message

    def _frame(self, give_up):
        header = self._bytes(4, give_up)
        (length,) = struct.unpack(">I", header)
        if not 0 < length <= MAX_FRAME_BYTES:
            raise ProtocolError(f"frame of {length} bytes; is this port an Understudy gateway?")
        return self._bytes(length, give_up)

    def _bytes(self, count, give_up):
        """Exactly `count` bytes, by the time `give_up`; asks for a sign of life when there is silence."""
        silent_since = last_ping = time.monotonic()
        while len(self.received) < count:
            now = time.monotonic()
            if now >= give_up:
                raise TimeoutError("nothing came in time")
            if now - silent_since >= KEEPALIVE_TIMEOUT_S:
                raise TimeoutError(f"nothing came for {KEEPALIVE_TIMEOUT_S} s")
            if now - last_ping >= KEEPALIVE_INTERVAL_S:
                self.send({"type": "ping", "nonce": random.getrandbits(63)})
                last_ping = now
            self.socket.settimeout(KEEPALIVE_INTERVAL_S / 4)
            try:
                piece = self.socket.recv(65536)
            except socket.timeout:
                continue
            if not piece:
                raise ConnectionError("closed by the gateway")
            self.received += piece
            silent_since = last_ping = time.monotonic()
        taken = bytes(self.received[:count])
        del self.received[:count]
        return taken


# --- a request that outlives its connection -----------------------------------------------------------------------

# What may pass by trying again, here or at another gateway.
_TRY_ELSEWHERE = (OSError, EOFError)


class Stream:
    """The events of one request: `accepted`, then `token`s, then `finished`, each a dict as on the wire.

    An iteration that ends early cancels the request: close the iterator (`contextlib.closing`), or let it go out of scope.

    There is no thread behind it, so nothing is read, granted or answered while the caller does something else. A gateway takes
    a client for gone that says nothing for 300 s, and cancels the request 30 s after that (`idle_timeout_ms`,
    `resume_grace_ms`): whoever pauses for longer collects the events in a thread of its own.
    """

    STREAM = 1  # one request on a connection, so one number will do

    def __init__(self, addresses, request, token=None, recovery_timeout_s=30.0):
        self.addresses = addresses
        self.request = request
        self.token = token
        self.recovery_timeout_s = recovery_timeout_s
        self.accepted = None
        self.next_position = 0
        self.recoveries = 0
        self._consumed = 0
        self._gateway = 0
        self._unknown_at = set()
        self._accepted_at = None  # when the connection in use accepted the request
        self._submits_lost = 0
        self._settled = False  # whether nothing is left to cancel

    def __iter__(self):
        try:
            yield from self._events()
        except (GeneratorExit, KeyboardInterrupt):
            if not self._settled:
                self._cancel_elsewhere()
            raise

    def _events(self):
        """Events from one connection after the other."""
        deadline = None  # of the recovery, which begins with a loss
        attempt = fruitless = 0
        while True:
            before = self.next_position
            address = self.addresses[self._gateway % len(self.addresses)]
            try:
                yield from self._read(address)
                return
            except ServerError as error:
                if not self._is_elsewhere(error, address):
                    raise
                last = error
            except _TRY_ELSEWHERE as error:
                last = error
            now = time.monotonic()
            if deadline is None or self.next_position > before:
                deadline = now + self.recovery_timeout_s
                attempt = fruitless = 0
                self._unknown_at.clear()
            elif self._accepted_at is not None:
                deadline += now - self._accepted_at  # the time with a connection does not count
                fruitless += 1
            attempt += 1
            if fruitless >= MAX_FRUITLESS or self._submits_lost > MAX_RESUBMISSIONS:
                raise last
            self._pause(attempt, deadline, last)

    def _pause(self, attempt, deadline, last):
        """The same gateway once more, then the others, then a pause before each further round."""
        rounds, step = divmod(attempt, len(self.addresses))
        if attempt > 1 or len(self.addresses) == 1 or isinstance(last, TimeoutError):
            self._gateway += 1
        delay = min(1.0, 0.02 * 2 ** min(rounds, 10)) * random.uniform(0.5, 1.0) if step == 0 else 0.0
        if time.monotonic() + delay >= deadline:
            raise last
        time.sleep(delay)

    def _is_elsewhere(self, error, address):
        """Whether the request may be found at another gateway, or here later."""
        if error.code == "shutting_down":
            return True
        if self.accepted is None:
            return False
        if error.code == "unknown_request":
            self._unknown_at.add(address)
            return len(self._unknown_at) < len(set(self.addresses))
        # On a stream that has been accepted an error is the request's own, but for the gateway's patience with its reader.
        own = error.body.get("stream") is not None and self._accepted_at is not None
        return error.code == "timeout" or (error.retriable and not own)

    def _read(self, address):
        self._accepted_at = None
        submitted = False
        connection = Connection(address, self.token)
        try:
            window = max(1, min(WINDOW, connection.limits["max_credit"]))
            opening = self._opening(window)
            connection.send(opening)
            submitted = opening["type"] == "submit"
            self._consumed = 0
            while True:
                message = connection.receive()
                if message.get("stream") != self.STREAM:
                    raise ProtocolError(f"event of a stream that is not open: {message['type']}")
                kind = message["type"]
                if kind == "error":
                    raise ServerError(message)
                if kind == "accepted":
                    yield from self._accept(message)
                elif kind == "token":
                    yield from self._token(connection, message, window)
                elif kind == "finished":
                    self._settled = True
                    yield self._finished(message)
                    return
                else:
                    raise ProtocolError(f"no event of a stream: {kind}")
        except _TRY_ELSEWHERE:
            self._submits_lost += submitted and self.accepted is None
            raise
        except (GeneratorExit, KeyboardInterrupt):
            # The caller does not want the rest.
            self._settled = self._settled or self._cancel(connection)
            raise
        except KeyError as error:
            raise ProtocolError(f"a message without {error}") from None
        finally:
            connection.close()

    def _cancel(self, connection):
        """Cancels the request on a connection, and waits until it has ended: a socket that is closed with bytes in it is
        reset, and the reset could overtake the cancel. What still comes is thrown away, with credit for all of it. False
        where it did not work."""
        give_up = time.monotonic() + CANCEL_TIMEOUT_S
        with contextlib.suppress(OSError, ProtocolError, ServerError):
            connection.send({"type": "cancel", "stream": self.STREAM})
            connection.send({"type": "credit", "stream": self.STREAM, "tokens": connection.limits["max_credit"]})
            while True:
                kind = connection.receive(give_up)["type"]
                if kind in ("finished", "error"):
                    return kind == "finished"
        return False

    def _cancel_elsewhere(self):
        """Cancels a request that no connection holds: resumes it for that alone, at the first gateway that knows it."""
        if self.accepted is None:
            return
        for address in self.addresses:
            with contextlib.suppress(OSError, ProtocolError, ServerError), contextlib.closing(
                Connection(address, self.token)
            ) as connection:
                connection.send(self._opening(0))
                if self._cancel(connection):
                    return

    def _opening(self, window):
        if self.accepted is None:
            return {"type": "submit", "stream": self.STREAM, "resumable": True, "credit": window, **self.request}
        return {
            "type": "resume",
            "stream": self.STREAM,
            "request": self.accepted["request"],
            "next_position": self.next_position,
            "credit": window,
        }

    def _accept(self, message):
        if self._accepted_at is not None:
            raise ProtocolError("accepted came twice on one stream")
        self._accepted_at = time.monotonic()
        if self.accepted is None:
            self.accepted = message
            yield message
            return
        if any(message[key] != self.accepted[key] for key in ("request", "prompt_tokens", "seed")):
            raise ProtocolError("the resumed request is another one")
        self.recoveries += 1

    def _token(self, connection, message, window):
        self._consumed += 1
        if self._consumed >= (window + 1) // 2:
            connection.send({"type": "credit", "stream": self.STREAM, "tokens": self._consumed})
            self._consumed = 0
        position = message["position"]
        if position > self.next_position:
            raise ProtocolError(f"token {position} came where {self.next_position} was due")
        if position == self.next_position:
            self.next_position += 1
            yield message

    def _finished(self, message):
        if message["finish_reason"] == "cancelled":
            raise Cancelled(
                f"request {self.accepted['request']} was cancelled after {self.next_position} tokens, and not by this client: "
                "by another one, or by the gateway because nobody read it; submit it again"
            )
        return message


def status(address, token=None):
    """The state of the cluster, as the gateway at `address` sees it."""
    connection = Connection(address, token)
    try:
        connection.send({"type": "status"})
        return connection.receive()
    finally:
        connection.close()


# --- command line -------------------------------------------------------------------------------------------------


def unsigned(bits):
    """The type of an argument that is sent as an unsigned integer."""

    def parse(text):
        if not text.isascii() or not text.isdigit() or int(text) >= 1 << bits:
            raise argparse.ArgumentTypeError(f"{text} is no number from 0 to 2^{bits} - 1")
        return int(text)

    return parse


def token_ids(text):
    return [unsigned(32)(number) for number in text.split(",")]


def arguments():
    parser = argparse.ArgumentParser(description="Streams one completion from an Understudy cluster.")
    parser.add_argument("--addr", action="append", required=True, metavar="HOST:PORT", help="a gateway; repeat for several")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="text to complete")
    what.add_argument("--token-ids", type=token_ids, metavar="ID,ID,…", help="token ids to complete")
    what.add_argument("--message", action="append", metavar="ROLE:TEXT", help="a chat message; repeat for several")
    what.add_argument("--status", action="store_true", help="print the state of the cluster instead")
    parser.add_argument("--model")
    parser.add_argument("--max-tokens", type=unsigned(32))
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--seed", type=unsigned(64))
    parser.add_argument("--stop", action="append", metavar="TEXT", help="text that ends the output; repeat for several")
    parser.add_argument("--logprobs", action="store_true")
    parser.add_argument("--deadline-ms", type=unsigned(64))
    parser.add_argument("--token", help="access token")
    parser.add_argument("--recovery-timeout", type=float, default=30.0, metavar="SECONDS")
    parser.add_argument("--json", action="store_true", help="print events, one JSON object a line")
    return parser.parse_args()


def request_of(options):
    if options.prompt is not None:
        source = {"prompt": options.prompt}
    elif options.token_ids is not None:
        source = {"token_ids": options.token_ids}
    else:
        if any(":" not in message for message in options.message):
            raise ValueError("a --message is ROLE:TEXT")
        pairs = [message.split(":", 1) for message in options.message]
        source = {"messages": [{"role": role, "content": content} for role, content in pairs]}
    sampling = {
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "seed": options.seed,
        "logprobs": options.logprobs or None,
    }
    request = {
        "input": source,
        "sampling": {key: value for key, value in sampling.items() if value is not None},
        "model": options.model,
        "stop": options.stop,
        "deadline_ms": options.deadline_ms,
    }
    return {key: value for key, value in request.items() if value is not None}


def show(event, as_json):
    if as_json:
        shown = {key: value for key, value in event.items() if key != "stream"}
        # In one piece: whoever reads lines gets whole ones, though a Ctrl-C may come at any time.
        sys.stdout.write(json.dumps(shown, ensure_ascii=False) + "\n")
        sys.stdout.flush()
    else:
        print(event.get("text", ""), end="", flush=True)


def main():
    options = arguments()
    try:
        if options.status:
            print(json.dumps(status(options.addr[0], options.token), indent=None if options.json else 2))
            return 0
        stream = Stream(options.addr, request_of(options), options.token, options.recovery_timeout)
        with contextlib.closing(iter(stream)) as events:
            for event in events:
                show(event, options.json)
        if not options.json:
            print()
        return 0
    except ServerError as error:
        if options.json:
            show(error.body, True)
        print(f"error: {error}", file=sys.stderr)
    except (ProtocolError, TooLarge, Cancelled, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    except ValueError as error:
        print(f"error: {error}; see --help", file=sys.stderr)
        return 2
    return 1


if __name__ == "__main__":
    sys.exit(main())
