"""What goes wrong between the playground and its server, in words for people."""

from __future__ import annotations

from openai import APIConnectionError, APIError, APIStatusError

FAILURES = (APIError, OSError, RuntimeError, ValueError)


def in_plain_words(error: Exception, url: str) -> str:
    """A message for whoever asked: what happened, and the way out.

    Args:
        error: one of `FAILURES`
        url: of the server
    """
    if isinstance(error, APIStatusError):
        if error.status_code == 401:
            return (
                f"The server at {url} wants a key. Stop the playground and start it with "
                "OPENAI_API_KEY set to that key."
            )
        if error.status_code < 500:
            return f"The server refuses this request: {error_message(error)}"
        return f"The server failed (status {error.status_code}): {error_message(error)}"
    if isinstance(error, APIConnectionError | OSError):
        return (
            f"The server at {url} does not answer, or stopped in the middle. Look at its log, "
            "start it again, then try once more."
        )
    return str(error)


def error_message(error: APIError) -> str:
    """The server's own words."""
    body = error.body
    if isinstance(body, dict) and isinstance(body.get("message"), str):
        message: str = body["message"]
        return message
    return error.message
