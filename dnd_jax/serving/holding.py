"""Adapters that are in use: found by id or name, made again where they have gone, and kept from
leaving the cache meanwhile."""

import asyncio
import contextlib

from dnd_jax.serving.service import Service
from dnd_jax.serving.store import Entry


class Unknown(Exception):
    """No adapter has this id or name."""


async def held(service: Service, key: str) -> tuple[Entry, contextlib.ExitStack]:
    """(an adapter, by its id or its name; what holds it, to be closed). That of a name is made
    again where it has gone. Raises Unknown, and as `Service.order`."""
    stack, id = contextlib.ExitStack(), await asyncio.to_thread(service.find, key)

    def hold(id: str) -> Entry | None:
        return stack.enter_context(service.store.hold(id))

    if id and (entry := await asyncio.to_thread(hold, id)):
        return entry, stack
    again = await asyncio.to_thread(service.again, key)
    if again is not None:
        id = (await asyncio.wrap_future(again)).id
        if entry := await asyncio.to_thread(hold, id):
            return entry, stack
    raise not_kept(key)


def not_kept(key: str) -> Unknown:
    """What is said of an id or a name that stands for nothing."""
    return Unknown(f"no adapter {key[:80]!r} is kept here")
