"""What keeps the service from a request, and how clients and visitors are told of it, in a line."""

from dnd_jax.core import packages
from dnd_jax.core.errors import InputError, first_line
from dnd_jax.serving.holding import Unknown
from dnd_jax.serving.service import Busy, Closed, Failed, Unwritable
from dnd_jax.serving.store import InUse, NoRoom

responses = packages.deferred("fastapi.responses")

# The status and the line of each kind; {} is what the error says itself.
REFUSALS = {
    InputError: (422, "{}"),
    Unknown: (404, "{}"),
    Busy: (429, "{} requests wait already; try again in a moment"),
    Closed: (503, "the service is stopping"),
    NoRoom: (507, "adapters in use, and names, fill the cache; give it more by --cache-gb"),
    Unwritable: (507, "the disk of the cache takes no more; nothing was kept"),
    Failed: (500, "the service failed at it; its log says why"),
    InUse: (409, "the adapter is in use; try again in a moment"),
}


def told(error: Exception) -> tuple[int, str]:
    """(status, line) of an error of REFUSALS."""
    status, line = next(of for kind, of in REFUSALS.items() if isinstance(error, kind))
    return status, line.format(first_line(error))


def refusal(status: int, message: str, headers: dict[str, str] | None = None):
    """An error as every client is told of it, in one line."""
    if status in (429, 503):
        headers = {"Retry-After": "1", **(headers or {})}
    line = " ".join(message.split())
    return responses.JSONResponse({"error": {"message": line, "code": status}}, status, headers)
