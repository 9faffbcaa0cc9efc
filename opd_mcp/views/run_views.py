"""The latest used views of a workspace's runs, so that a poll folds only the new lines of a journal."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

from opd_mcp.schemas.runs import RunRecord
from opd_mcp.store.run_view import RunView
from opd_mcp.store.runs import read_record, run_directory
from opd_mcp.store.workspace import Workspace

MAX_VIEWS = 64
Answer = TypeVar("Answer")


class RunViews:
    """The latest used views of a workspace's runs; safe to share between threads."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._views: OrderedDict[str, tuple[threading.Lock, RunView, RunRecord]] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, run_id: str, answer: Callable[[RunView, RunRecord], Answer]) -> Answer:
        """What `answer` makes of the refreshed view and the record; raises UnknownIdError `unknown_run`."""
        with self._lock:
            if run_id not in self._views:
                directory = run_directory(self._workspace, run_id)
                self._views[run_id] = (threading.Lock(), RunView(directory), read_record(directory))
            self._views.move_to_end(run_id)
            while len(self._views) > MAX_VIEWS:
                self._views.popitem(last=False)
            lock, view, record = self._views[run_id]
        with lock:
            return answer(view.refresh(), record)
