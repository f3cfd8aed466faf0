"""A wire between client and server that can be made to swallow one direction, and be cut."""

import asyncio
from typing import Self


class Proxy:
    """Forwards TCP to a port of this machine.

    Attributes:
        eats_answers: what the server says does not arrive.
        eats_requests: what the client says does not arrive.
    """

    def __init__(self, target_port: int) -> None:
        self.eats_answers = False
        self.eats_requests = False
        self._target_port = target_port
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        await asyncio.sleep(0.05)

    @property
    def url(self) -> str:
        """Where clients connect."""
        assert self._server is not None
        return f"nats://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        """Ends every connection, and forwards both ways in those to come."""
        self.eats_answers = self.eats_requests = False
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            answers, requests = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            writer.transport.abort()
            return
        self._writers.add(requests)
        await asyncio.gather(
            self._pump(reader, requests, "eats_requests"), self._pump(answers, writer, "eats_answers")
        )
        self._writers -= {writer, requests}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, eats: str) -> None:
        try:
            while data := await reader.read(65536):
                if not getattr(self, eats):
                    writer.write(data)
                    await writer.drain()
        except OSError:
            pass  # the other side was cut
        writer.transport.abort()
