"""Several teachers that score as one: each the rows of its domain, one in memory at a time."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from opd_mcp.engine.context import Context
from opd_mcp.engine.data.sequences import Sequences
from opd_mcp.engine.runtime import Runtime
from opd_mcp.engine.scoring.local import LocalTeacher, ScoredRows, TeacherScores, open_local
from opd_mcp.identity.models import inspect_model
from opd_mcp.identity.panels import full_panel, require_domains
from opd_mcp.schemas.identity import ModelIdentity


@dataclass
class PanelTeacher:
    """Teachers by domain. One stays loaded until rows of another domain come; rollouts keep a domain's rows together.

    `loads` are the domains whose teacher was loaded, in order.
    """

    paths: Mapping[str, Path]
    identity: ModelIdentity
    vocab_size: int
    micro_batch_tokens: int
    runtime: Runtime
    context: Context | None = None
    loads: list[str] = field(default_factory=list)
    loaded: LocalTeacher | None = None

    def score(self, sequences: Sequences, topk: int) -> ScoredRows:
        """As the protocol; raises DataError `unknown_domain` for rows that are no teacher's."""
        domains = np.array(sequences.domains if sequences.domains else [""] * len(sequences), dtype=object)
        require_domains({name or None: count for name, count in Counter(domains).items()}, self.paths, "rollouts")
        total = len(sequences.response_ids)
        logprobs = np.zeros(total, dtype=np.float32)
        ids = np.zeros((total, topk), dtype=np.int32) if topk else None
        top = np.zeros((total, topk), dtype=np.float32) if topk else None
        for domain in sorted(set(domains), key=lambda name: (name != self._current, name)):
            rows = np.flatnonzero(domains == domain)
            scores = self._teacher(domain).score(sequences.take(rows), topk).scores
            spans = zip(sequences.response_offsets[rows], sequences.response_offsets[rows + 1], strict=True)
            places = np.concatenate([np.arange(start, stop) for start, stop in spans])
            logprobs[places] = scores.logprobs
            if ids is not None and top is not None and scores.topk_ids is not None:
                assert scores.topk_logprobs is not None, "ids come with their log-probs"
                ids[places], top[places] = scores.topk_ids, scores.topk_logprobs
        return ScoredRows(TeacherScores(logprobs, ids, top))

    @property
    def _current(self) -> str | None:
        return self.loads[-1] if self.loads else None

    def _teacher(self, domain: str) -> LocalTeacher:
        if self.loaded is None or self._current != domain:
            self.loaded = None  # before the next one: two would be in memory together
            self.loaded = open_local(self.paths[domain], self.runtime, self.micro_batch_tokens, self.context)
            self.loads.append(domain)
        return self.loaded

    def prove(self) -> None:
        """Its weights are read in this process."""

    def close(self) -> None:
        """Nothing is open."""


def open_panel(
    teachers: Mapping[str, Path], runtime: Runtime, micro_batch_tokens: int, context: Context | None = None
) -> PanelTeacher:
    """Several teachers by domain, none of them loaded yet; raises what `panel_identity` raises."""
    vocabulary = max(inspect_model(path).vocab_size for path in teachers.values())
    return PanelTeacher(teachers, full_panel(teachers), vocabulary, micro_batch_tokens, runtime, context)
