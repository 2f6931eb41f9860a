"""Whether the components that a service needs respond."""

from batchserve.db import migrate
from batchserve.errors import BatchserveError
from batchserve.service import Service
from batchserve.storage import check_access

__all__ = ["health_of"]


def health_of(service: Service) -> dict[str, str]:
    """Required components, each `ok` or the reason why not. A worker is listed only in trouble."""
    checks, runtime = {}, service.runtime
    try:
        migrate.check(runtime.database)
        checks["database"] = "ok"
    except BatchserveError as error:
        checks["database"] = error.detail
    try:
        check_access(runtime.storage)
        checks["storage"] = "ok"
    except OSError as error:
        checks["storage"] = f"{type(error).__name__}: the storage does not respond"
    except BatchserveError as error:
        checks["storage"] = error.detail
    if (trouble := service.worker_trouble()) is not None:
        checks["worker"] = trouble
    return checks
