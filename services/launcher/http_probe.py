"""The smallest HTTP client: one GET on loopback, without threads and without a library."""

import asyncio

LARGEST_ANSWER = 4 * 1024 * 1024


async def get(address: str, path: str, *, timeout_s: float = 2.0) -> tuple[int, bytes]:
    """Fetches one page.

    Args:
        address: `host:port`.
        path: beginning with a slash.
        timeout_s: seconds for everything.

    Returns:
        Status and body; status 0 when nobody answers HTTP there in time.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await _get(address, path)
    except (OSError, TimeoutError, ValueError, IndexError):
        return 0, b""


async def _get(address: str, path: str) -> tuple[int, bytes]:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        # HTTP/1.0: the answer is neither chunked nor kept open.
        writer.write(f"GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n".encode())
        await writer.drain()
        answer = b""
        while len(answer) < LARGEST_ANSWER and (more := await reader.read(65536)):
            answer += more
        head, _, body = answer.partition(b"\r\n\r\n")
        return int(head.split(b" ", 2)[1]), body
    finally:
        writer.close()
