"""What the page's events share: a place in the queue, a GPU on loan, and errors as one line."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps

import gradio as gr

from ..errors import DftLoraError, RequestError
from .session import Question

FRAME = 0.05  # seconds between two updates of a stream, so that the browser does not slow the model down
MODEL = {"concurrency_id": "model", "concurrency_limit": 1}


def on_gpu(function: Callable) -> Callable:
    """`spaces.GPU(function)` on a ZeroGPU Space, which lends a GPU per call; otherwise `function` itself."""
    try:
        import spaces
    except ImportError:
        return function
    return spaces.GPU(function)


def one_line_errors(function: Callable) -> Callable:
    """Show our errors as one line on the page; other errors keep their traceback on the server."""

    @wraps(function)
    def call(*arguments):
        try:
            return function(*arguments)
        except DftLoraError as error:
            raise gr.Error(str(error), print_exception=False) from None

    @wraps(function)
    def steps(*arguments):
        try:
            yield from function(*arguments)
        except DftLoraError as error:
            raise gr.Error(str(error), print_exception=False) from None

    return steps if inspect.isgeneratorfunction(function) else call


def validate(*asked) -> list:
    """Check a question before it enters the queue: mark the first field that is wrong.

    What follows the question's fields is not checked here.
    """
    fields = list(Question.__dataclass_fields__)
    try:
        Question(*asked[: len(fields)])
        reason = ""
    except RequestError as error:
        reason = str(error)
    names = [*fields, *[None] * (len(asked) - len(fields))]
    return [gr.validate(name is None or not reason.startswith(name), reason) for name in names]
