"""What the page's events share: a place in the queue, a borrowed GPU, and errors as one line."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps

import gradio as gr

from ..errors import DftLoraError, RequestError
from .session import Question

FRAME = 0.05  # seconds between two pictures of a stream; the model is not held back by the browser
MODEL = {"concurrency_id": "model", "concurrency_limit": 1}


def on_gpu(function: Callable) -> Callable:
    """`spaces.GPU` on a ZeroGPU Space, where a GPU is lent for a call; elsewhere the function itself."""
    try:
        import spaces
    except ImportError:
        return function
    return spaces.GPU(function)


def told(function: Callable) -> Callable:
    """Our errors as one line on the page; others keep their traceback on the server."""

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


def valid(*asked) -> list:
    """Before the queue: the first field that cannot be used, by name."""
    fields = list(Question.__dataclass_fields__)[: len(asked)]
    try:
        Question(*asked)
        reason = ""
    except RequestError as error:
        reason = str(error)
    return [gr.validate(not reason.startswith(name), reason) for name in fields]
