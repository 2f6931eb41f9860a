"""Answers to requests that are refused before the application sees them."""

from http import HTTPStatus

import orjson

__all__ = ["Refusal"]


class Refusal(Exception):
    """An invalid request, answered before the application sees it."""

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail = status, code, detail

    def answer(self, request_id: str) -> bytes:
        problem = {
            "type": f"/problems/{self.code}",
            "code": self.code,
            "title": self.code.replace("-", " ").capitalize(),
            "status": self.status,
            "detail": self.detail,
            "request_id": request_id,
        }
        body = orjson.dumps(problem)
        again = "retry-after: 1\r\n" if self.status in (429, 503) else ""
        head = (
            f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}\r\ncontent-type: application/problem+json\r\n"
            f"content-length: {len(body)}\r\nx-request-id: {request_id}\r\n{again}connection: close\r\n\r\n"
        )
        return head.encode() + body
