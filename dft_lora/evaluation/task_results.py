"""One run's results on one task: from the files of an evaluation to arrays and an entry of the report.

Legend: P problems, S samples of each, E scored solutions.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import RequestError
from ..runs.folder import RunFolder, parsing, read_json
from ..tasks import get_task, task_names
from ..tasks.answers import tidy
from ..tasks.base import Attempt
from ..tasks.choice import LETTERS, normalised
from . import statistics as st
from .attempts import read_attempts
from .protocol import GREEDY, other_weights
from .token_metrics import summary
from .token_table import TokenTable, tokens_file

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskResults:
    """One run's judged answers to one task. `correct_PS` and `greedy_P` hold 0 and 1.

    `problems` are those that are judged; `texts` are the solutions of an own test set that are not.
    """

    protocol: dict[str, Any]
    problems: list[str]
    questions: dict[str, str | None]
    tags: dict[str, dict[str, Any]]
    correct_PS: np.ndarray
    greedy_P: np.ndarray
    truncated: float
    unparsable: float
    timed_out: float
    mean_tokens: float
    answers_PS: list[list[str | None]]
    """What each sample votes for (see `_vote`)."""
    greedy_text_P: list[str]
    choices: dict[str, Any] | None = None
    """Where answers are chosen by log-likelihood: accuracy by both rules, how probable the right one is."""
    texts: TokenTable | None = None

    @classmethod
    def read(cls, folder: RunFolder, task: str) -> TaskResults:
        """Raises RequestError when the evaluation is missing, damaged, incomplete, or of other weights."""
        with parsing(folder.evaluation(task)):
            metadata, attempts = _complete(folder, task)
            return cls._of(metadata, attempts, _texts(folder, task, metadata["problems"]))

    @classmethod
    def _of(cls, metadata: dict[str, Any], attempts: list[Attempt], texts: TokenTable | None) -> TaskResults:
        problems = _judged(metadata["problems"])
        samples = range(metadata["protocol"]["samples"]) or (GREEDY,)  # choices are not sampled
        answer = {(attempt.problem, attempt.sample): attempt for attempt in attempts}
        drawn_PS = [[answer[problem, sample] for sample in samples] for problem in problems]
        greedy_P = [answer[problem, GREEDY] for problem in problems]
        drawn = [attempt for row in drawn_PS for attempt in row]
        statuses = [attempt.verdict.status for attempt in drawn]
        return cls(
            protocol=metadata["protocol"],
            problems=list(problems),
            questions={problem: values.get("question") for problem, values in problems.items()},
            tags={problem: values["tags"] for problem, values in problems.items()},
            correct_PS=np.array([[attempt.verdict.correct for attempt in row] for row in drawn_PS], int),
            greedy_P=np.array([attempt.verdict.correct for attempt in greedy_P], int),
            truncated=_share(attempt.truncated for attempt in drawn),
            unparsable=_share(status == "unparsable" for status in statuses),
            timed_out=_share(status == "timed_out" for status in statuses),
            mean_tokens=_mean([attempt.tokens for attempt in drawn]),
            answers_PS=[[_vote(attempt, problems[attempt.problem]) for attempt in row] for row in drawn_PS],
            greedy_text_P=[attempt.text for attempt in greedy_P],
            choices=_choices(problems, greedy_P),
            texts=texts,
        )

    def summary(self) -> dict[str, Any]:
        """One task's entry of report.json."""
        return {
            "avg": float(self.correct_PS.mean()),
            "ci95": list(st.interval(st.avg_at_n(self.correct_PS))),
            "greedy": float(self.greedy_P.mean()),
            "greedy_ci95": list(st.interval(self.greedy_P)),
            "pass_at": {
                str(k): float(st.pass_at_k(self.correct_PS, k).mean())
                for k in _powers(self.correct_PS.shape[1])
            },
            "maj_at": {
                str(k): float(st.maj_at_k(self.answers_PS, self.correct_PS, k).mean())
                for k in _powers(self.correct_PS.shape[1])
                if self._votes
            },
            "samples": self.correct_PS.shape[1],
            "problems": len(self.problems),
            "template": self.protocol["template"],
            "truncated": self.truncated,
            "unparsable": self.unparsable,
            "timed_out": self.timed_out,
            "mean_tokens": self.mean_tokens,
            "by_tag": self._by_tag(),
        } | ({"choices": self.choices} if self.choices else {})

    @property
    def _votes(self) -> bool:
        """Whether equal answers are recognised as equal, so that a majority means something."""
        name = self.protocol["task"]
        return "file" in self.protocol or name not in task_names() or get_task(name).votes

    def text_summary(self) -> dict[str, Any] | None:
        """Metrics of the solutions without a reference answer; None if there are none."""
        if self.texts is None:
            return None
        return {"rows": len(self.texts.nll_E), **summary(self.texts), "template": self.protocol["template"]}

    def _by_tag(self) -> dict[str, dict[str, Any]]:
        """Accuracy per value of each tag that has few values: steps, level, subject."""
        groups: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for i, problem in enumerate(self.problems):
            for tag, value in self.tags[problem].items():
                groups[tag][str(value)].append(i)
        return {
            tag: {
                value: {
                    "avg": float(self.correct_PS[rows].mean()),
                    "ci95": list(st.interval(st.avg_at_n(self.correct_PS[rows]))),
                    "greedy": float(self.greedy_P[rows].mean()),
                    "problems": len(rows),
                }
                for value, rows in sorted(values.items())
            }
            for tag, values in groups.items()
            if len(values) <= 20
        }


def _complete(folder: RunFolder, task: str) -> tuple[dict[str, Any], list[Attempt]]:
    """The recorded metadata of an evaluation and all its attempts.

    Raises RequestError when it is missing, incomplete, or was made with other weights than the run has now.
    """
    from ..model.fingerprint import local_fingerprint  # late, since it imports torch

    metadata_file = folder.evaluation(task).with_suffix(".json")
    if not metadata_file.is_file():
        raise RequestError(f"{folder.path}: not evaluated on {task!r}; run dft-lora evaluate {folder.path}")
    metadata = read_json(metadata_file)
    protocol = metadata["protocol"]
    base = local_fingerprint(folder.recipe().model) or protocol.get("base")
    if why := other_weights(protocol, folder.adapter_digest, base):
        name = f"{task}.jsonl" if "file" in protocol else task
        raise RequestError(
            f"{folder.path}: its answers to {task!r} are out of date: {why}; "
            f"run dft-lora evaluate {folder.path} --task {name} --overwrite"
        )
    judged = _judged(metadata["problems"])
    unscored = len(judged) < len(metadata["problems"]) and not tokens_file(folder, task).is_file()
    attempts = read_attempts(folder.evaluation(task))
    given = {(attempt.problem, attempt.sample) for attempt in attempts}
    if (missing := len(judged) * (protocol["samples"] + 1) - len(given)) or unscored:
        what = f"{missing} answers to {task!r}" if missing else f"the scores of {task!r}"
        raise RequestError(
            f"{folder.path}: {what} are missing "
            "(the evaluation was interrupted); run dft-lora evaluate again to complete it"
        )
    return metadata, attempts


def _vote(attempt: Attempt, problem: Mapping[str, Any]) -> str | None:
    """The answer in a form in which equal ones are equal: a correct one as the reference answer, if any."""
    verdict = attempt.verdict
    if verdict.correct and problem["answer"]:
        return problem["answer"]
    return verdict.extracted and tidy(verdict.extracted)


def _judged(problems: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded problems whose answers are judged: of an own test set, those with a reference answer."""
    return {name: facts for name, facts in problems.items() if facts.get("judged", True)}


def _texts(folder: RunFolder, task: str, problems: Mapping[str, Any]) -> TokenTable | None:
    """The scored solutions of the problems that are not judged; None if there are none."""
    judged_E = np.array([facts.get("judged", True) for facts in problems.values() if facts.get("solution")])
    if judged_E.all():
        return None
    return TokenTable.load(tokens_file(folder, task)).of(~judged_E)


def complete_tasks(folder: RunFolder) -> list[str]:
    """Tasks with complete answers by the run's present weights; the others are named in the log."""
    found = []
    for task in evaluated_tasks(folder):
        try:
            _complete(folder, task)
            found.append(task)
        except RequestError as error:
            log.warning("left out of the report: %s", error)
    return found


def evaluated_tasks(folder: RunFolder) -> list[str]:
    """Tasks with answers in a run folder: those of its recipe first, in their order, then others by name.

    A dot in a file's stem marks a part of an unfinished evaluation.
    """
    files = (folder.path / "evaluation").glob("*.jsonl")
    names = sorted(file.stem for file in files if "." not in file.stem)
    own = [task for task in folder.recipe().evaluate.tasks if task in names] if names else []
    return list(dict.fromkeys([*own, *names]))


def _choices(problems: Mapping[str, Any], attempts: Sequence[Attempt]) -> dict[str, Any] | None:
    """Means over problems whose choices were scored; None if there are none.

    `p_right` is the probability of the right choice among the choices, by their summed log-probabilities.
    """
    rows = [
        (attempt.choice_logps, problems[attempt.problem]["choices"], problems[attempt.problem]["answer"])
        for attempt in attempts
        if attempt.choice_logps is not None
    ]
    if not rows:
        return None
    right = [LETTERS.index(answer) for _, _, answer in rows]
    by_sum = [int(np.argmax(logps)) for logps, _, _ in rows]
    by_norm = [int(np.argmax(normalised(logps, choices))) for logps, choices, _ in rows]
    p_right = [choice_probabilities(logps)[place] for (logps, _, _), place in zip(rows, right, strict=True)]
    return {
        "sum": _share(a == b for a, b in zip(by_sum, right, strict=True)),
        "normalised": _share(a == b for a, b in zip(by_norm, right, strict=True)),
        "p_right": float(np.mean(p_right)),
    }


def choice_probabilities(logps: Sequence[float]) -> list[float]:
    """The probability of each choice, given that it is one of them."""
    odds = np.exp(np.array(logps) - max(logps))
    return (odds / odds.sum()).tolist()


def _share(values: Iterable[bool]) -> float:
    return _mean(list(values))


def _mean(values: Sequence[float]) -> float:
    """The mean; 0 of no values, which a test set without reference answers has."""
    return float(np.mean(values)) if len(values) else 0.0


def _powers(n: int) -> list[int]:
    """1, 2, 4, ... and n itself."""
    return [*(2**i for i in range((n - 1).bit_length())), n]
