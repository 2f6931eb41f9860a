"""The Python client. `Client` blocks, `AsyncClient` is its counterpart for asyncio; both need only the address of a
server."""

from batchserve.client.aio import AsyncClient
from batchserve.client.core import AsyncJob
from batchserve.client.errors import (
    APIError,
    AuthenticationFailed,
    ConnectionFailed,
    FilesFailed,
    JobCancelled,
    JobError,
    JobFailed,
    WaitTimeout,
)
from batchserve.client.many import FileOutcome, FilesReport
from batchserve.client.results import AsyncResult
from batchserve.client.schedules import AsyncSchedule, Schedule
from batchserve.client.sync import Client, Job, Result
from batchserve.client.views import Model, Queued
from batchserve.client.webhooks import Delivery, Webhook

__all__ = [
    "APIError",
    "AsyncClient",
    "AsyncJob",
    "AsyncResult",
    "AsyncSchedule",
    "AuthenticationFailed",
    "Client",
    "ConnectionFailed",
    "Delivery",
    "FileOutcome",
    "FilesFailed",
    "FilesReport",
    "Job",
    "JobCancelled",
    "JobError",
    "JobFailed",
    "Model",
    "Queued",
    "Result",
    "Schedule",
    "WaitTimeout",
    "Webhook",
]
