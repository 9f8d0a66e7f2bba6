"""Listening sockets as the servers' loops want them."""

import asyncio
import socket

from loraserve.server.listen import bound_socket


def test_answers_on_asyncios_loop_are_sent_at_once() -> None:
    async def accepted_options() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted = writer.get_extra_info("socket")
            found.set_result(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listening = bound_socket("127.0.0.1", 0, "--http-port")
        server = await asyncio.start_server(accept, sock=listening)
        async with server:
            _, writer = await asyncio.open_connection(*listening.getsockname())
            no_delay = await found
            writer.close()
            await writer.wait_closed()
        return no_delay

    assert asyncio.run(accepted_options()) == 1
