"""How Orbax writes our arrays. In a module of its own because importing Orbax takes a second."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from orbax.checkpoint import type_handlers


class NoCopyNumpyHandler(type_handlers.NumpyHandler):
    """Writes NumPy arrays from where they lie, and raises only when no write is under way.

    Orbax copies arrays first, in case they change; ours do not. And it drops its event loop at the first error (a full
    disk), whereupon every write that is still under way prints a traceback.
    """

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._under_way = 0

    async def serialize(self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None) -> Any:
        """As the base class does, counting the writes."""
        self._under_way = len(values)
        return await super().serialize(values, infos, args)

    async def _open_and_write(self, *args: Any, **kwargs: Any) -> None:
        try:
            await super()._open_and_write(*args, **kwargs)
        except Exception:
            self._under_way -= 1
            while self._under_way:
                await asyncio.sleep(0.01)
            raise
        self._under_way -= 1
