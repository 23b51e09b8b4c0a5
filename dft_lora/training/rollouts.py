"""Answers sampled from a model and judged: what RFT, DPO and the online objectives learn from.

`sample_answers` asks, `correct_ones` and `pairs_of` choose, `Rollouts` serves the steps of a run. A draw
depends on (run seed, rollout, prompt, sample) alone: each request has a random stream of its own.

The answers of a rollout are a pure function of the adapter at its start. While steps still learn from them,
they belong to the checkpoint, so a run that is resumed in the middle goes on with the same ones.

Shapes: E answers of a rollout, T tokens of one answer.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any

import torch

from ..config import SEEDS, RolloutConfig
from ..data.batches import Group, examples_of, step_indices, ungrouped
from ..data.templates import Example, Renderer
from ..errors import RunError
from ..model.generate import Completion, Request, generate
from ..tasks import judge_of
from ..tasks.base import Judge, Problem, Verdict
from .plan import Plan, mark_pair
from .steps import FixedGroups

if TYPE_CHECKING:
    from .learner import Learner

ADAPTER = "default"
"""peft's name of the adapter in training."""
SAMPLES = 1_000_003
"""More than the samples of a prompt in a rollout: seeds of different rollouts never coincide."""


@dataclass(frozen=True)
class Answer:
    """One judged answer. `example` holds the tokens as they were drawn, up to and with what ended it.

    That is an end token, or the words of the task's stop rule; `text` ends before either.
    """

    problem: Problem
    example: Example
    text: str
    verdict: Verdict
    reward: float
    truncated: bool


def sample_answers(
    model: Any,
    renderer: Renderer,
    judge: Judge,
    problems: Sequence[Problem],
    config: RolloutConfig,
    *,
    seed: int,
    rollout: int = 0,
    adapter: str | None = None,
    title: str | None = None,
    mine: slice = slice(None),
) -> list[list[Answer]]:
    """`config.samples` judged answers to each of the problems `mine`, in order.

    A prompt that is asked again among all `problems` goes on with its next samples. `adapter` None asks the
    bare base. `title`: that of the progress bar; None shows none.
    """
    from tqdm import tqdm

    prompts = ((problem, tuple(renderer.prompt_ids(problem.messages))) for problem in problems)
    numbers: defaultdict[tuple[int, ...], Iterator[int]] = defaultdict(count)
    each = [[(problem, ids, next(numbers[ids])) for _ in range(config.samples)] for problem, ids in prompts]
    asked = [request for some in each[mine] for request in some]
    if not asked:
        return []
    requests = [
        Request(
            prompt_ids=prompt,
            adapter=adapter,
            seed=stream_seed(seed, rollout, sample),
            temperature=config.temperature,
            max_new_tokens=config.max_new_tokens,
        )
        for _, prompt, sample in asked
    ]
    with tqdm(total=len(requests), desc=title, unit="answer", leave=False, disable=title is None) as bar:
        completions = generate(
            model,
            requests,
            stop_ids=renderer.stop_ids,
            pad_id=renderer.pad_id,
            batch_rows=config.rows,
            on_progress=lambda *_: bar.update(),
        )
    drawn, texts, stopped = zip(
        *(up_to_the_stop(completion, renderer, judge) for completion in completions), strict=True
    )
    verdicts = judge.judge_many([(text, problem) for text, (problem, _, _) in zip(texts, asked, strict=True)])
    answers = []
    for (problem, prompt, sample), tokens, text, ended, verdict in zip(
        asked, drawn, texts, stopped, verdicts, strict=True
    ):
        truncated = not ended
        if truncated and config.truncated == "wrong" and verdict.correct:
            verdict = Verdict("wrong", verdict.extracted)
        example = Example(f"{problem.id}/{rollout}.{sample}", (*prompt, *tokens), len(prompt))
        answers.append(Answer(problem, example, text, verdict, judge.reward(verdict), truncated))
    return [answers[i : i + config.samples] for i in range(0, len(answers), config.samples)]


def up_to_the_stop(completion: Completion, renderer: Renderer, judge: Judge) -> tuple[list[int], str, bool]:
    """The tokens of an answer, its text, and whether it ended: by itself, or by the task's stop rule.

    Where the stop rule cuts the text, the tokens are those that were drawn until it did: the run learns from
    nothing that came later.
    """
    whole = renderer.decode(completion.ids)
    text = judge.cut(whole)
    if text == whole:
        end = [] if completion.end is None else [completion.end]
        return [*completion.ids, *end], text, bool(end)

    def is_cut(count: int) -> bool:
        start = renderer.decode(completion.ids[:count])
        return start != text and judge.cut(start) == text

    counts = range(len(completion.ids) + 1)
    return completion.ids[: bisect_left(counts, True, key=is_cut)], text, True


def stream_seed(seed: int, rollout: int, sample: int) -> int:
    """A request's seed; with its prompt it determines the random stream. Different for all arguments."""
    return (rollout * SEEDS + seed) * SAMPLES + sample


def refuse_all_truncated(answers: Iterable[Sequence[Answer]], config: RolloutConfig, what: str) -> None:
    """Raises RunError, beginning with `what`, if no answer reached its end."""
    cut = [answer.truncated for some in answers for answer in some]
    if all(cut):
        raise RunError(
            f"{what}: all {len(cut)} answers were cut at rollouts.max_new_tokens {config.max_new_tokens}, so "
            "there is nothing to learn from; raise that limit"
        )


def correct_ones(answers: Sequence[Answer]) -> list[Answer]:
    """The finished, correct answers to one problem; equal texts are kept once."""
    return _each_text_once(a for a in answers if a.verdict.correct and not a.truncated)


def pairs_of(answers: Sequence[Answer]) -> list[tuple[Answer, Answer]]:
    """(correct, wrong) answers to one problem, both finished; each text is in one pair at most."""
    wrong = _each_text_once(a for a in answers if not a.verdict.correct and not a.truncated)
    return list(zip(correct_ones(answers), wrong, strict=False))


def _each_text_once(answers: Iterable[Answer]) -> list[Answer]:
    first: dict[str, Answer] = {}
    for answer in answers:
        first.setdefault(answer.text, answer)
    return list(first.values())


class Rollouts:
    """A StepSource of answers that the policy in training wrote itself.

    An online objective takes a new batch of answers every `rollouts.updates` steps; each step learns from its
    own part. Any other objective samples `rollouts.rounds` times in the run, each time for all problems, and
    learns from the correct answers, or from pairs, in epochs.
    """

    def __init__(self, plan: Plan, learner: Learner):
        self.plan, self.learner, self.config = plan, learner, plan.rollouts
        self.judge = judge_of(plan.recipe.data.source).allowed(plan.recipe.evaluate.allow_code)
        self.online = plan.objective.learns_from == "rollouts"
        self.rollout = -1
        self.fixed = self._fixed([])
        self.figures: Mapping[str, float] = {}

    def groups(self, step: int) -> list[Group]:
        """See StepSource. Samples where a new rollout begins."""
        rollout, within = divmod(step, self.plan.steps_each)
        if rollout != self.rollout:
            self._sample(rollout, step + 1)
        return self.fixed.groups(within)

    def _fixed(self, known: list[Group]) -> FixedGroups:
        """The steps of a rollout: each learns from its own part of it, or from all of it in epochs."""
        settings = self.plan.recipe.train
        return FixedGroups(known, settings.batch_size, None if self.online else settings.seed)

    def upcoming(self, step: int) -> Sequence[Group]:
        """See StepSource. Empty where `step` begins a rollout, which has yet to be sampled."""
        rollout, within = divmod(step, self.plan.steps_each)
        return self.fixed.upcoming(within) if within and rollout == self.rollout else []

    def kept(self, step: int) -> dict[str, Any]:
        """See StepSource."""
        if not self.upcoming(step):
            return {}
        known = pack_groups(self.fixed.known)
        return {"rollout": self.rollout, "figures": dict(self.figures), "groups": known}

    def restore(self, kept: dict[str, Any]) -> None:
        """See StepSource."""
        if kept:
            self.rollout, self.figures = kept["rollout"], kept["figures"]
            self.fixed = self._fixed(unpack_groups(kept["groups"]))

    def _sample(self, rollout: int, step: int) -> None:
        """Sample, judge, make groups. Raises RunError if there is nothing to learn from."""
        plan, what = self.plan, f"step {step}"
        answers = self.learner.ranks.everyone(self._answers(self._asked(rollout), rollout))
        refuse_all_truncated(answers, self.config, what)
        answers = self._marked(answers, step)
        every = [answer for some in answers for answer in some]
        if self.online:
            known = ungrouped(self._with_signals(answers))
        elif plan.objective.learns_from == "pairs":
            known = [mark_pair((a.example, b.example)) for some in answers for a, b in pairs_of(some)]
        else:
            known = ungrouped(answer.example for some in answers for answer in correct_ones(some))
        if not known:
            wanted = (
                "pair of a correct and a wrong one"
                if plan.objective.learns_from == "pairs"
                else "correct one"
            )
            raise RunError(f"{what}: there is no {wanted} among {len(every)} answers; nothing to learn from")
        self.rollout, self.fixed = rollout, self._fixed(known)
        self.figures = {
            "rollout": rollout,
            "reward": sum(answer.reward for answer in every) / len(every),
            "truncated": sum(answer.truncated for answer in every) / len(every),
            "answers": len(every),
            "answers_used": len(examples_of(known)),
            "generated_tokens": sum(answer.example.supervised for answer in every),
        }

    def _asked(self, rollout: int) -> Sequence[Problem]:
        """The problems of a rollout: all, or as many as an online objective's steps have answers to."""
        if not self.online:
            return self.plan.problems
        settings = self.plan.recipe.train
        count = self.config.updates * settings.batch_size // self.config.samples
        chosen = step_indices(len(self.plan.problems), count, settings.seed, rollout)
        return [self.plan.problems[i] for i in chosen]

    def _answers(self, problems: Sequence[Problem], rollout: int) -> list[list[Answer]]:
        """The answers to this rank's share of the problems."""
        model, ranks = self.learner.adapter_model.eval(), self.learner.ranks
        seed = self.plan.recipe.train.seed
        try:
            return sample_answers(
                model,
                self.plan.renderer,
                self.judge,
                problems,
                self.config,
                seed=seed,
                rollout=rollout,
                adapter=ADAPTER,
                title=f"answers, rollout {rollout + 1}" if ranks.is_main else None,
                mine=slice(ranks.rank, None, ranks.world),
            )
        finally:
            model.train()

    def _marked(self, answers: list[list[Answer]], step: int) -> list[list[Answer]]:
        """The answers with what only the policy that wrote them can say: their log-probabilities and values.

        A rollout for a single step needs no log-probabilities: there the ratio to the old policy is 1.
        """
        has_value = "value" in self.plan.objective.signals
        if not self.online or not (has_value or self.config.updates > 1):
            return answers
        examples = [answer.example for some in answers for answer in some]
        scored = iter(self.learner.example_logps(examples, step))

        def marked(answer: Answer) -> Answer:
            logp_T, value_T = next(scored)
            signals = {"old_logp": tuple(logp_T.tolist())} if self.config.updates > 1 else {}
            if has_value and value_T is not None:
                signals["old_value"] = tuple(value_T.tolist())
            return replace(answer, example=replace(answer.example, signals=signals))

        return [[marked(answer) for answer in some] for some in answers]

    def _with_signals(self, answers: list[list[Answer]]) -> list[Example]:
        """The answers' examples, with the signals that the objective makes of all rewards."""
        every = [answer for some in answers for answer in some]
        signals = self.plan.objective.rollout_signals(
            torch.tensor([answer.reward for answer in every], dtype=torch.float64),
            torch.tensor([i for i, some in enumerate(answers) for _ in some]),
            [torch.tensor(answer.example.signals.get("old_value", ())) for answer in every],
        )
        return [
            replace(
                answer.example,
                signals={**answer.example.signals, **{name: values[i] for name, values in signals.items()}},
            )
            for i, answer in enumerate(every)
        ]


def pack_groups(groups: Sequence[Group]) -> dict[str, Any]:
    """Groups as plain values and a few tensors, for a checkpoint; signals as the float32 that steps read."""
    examples = examples_of(groups)
    signals = {}
    for name, first in examples[0].signals.items():
        values = [torch.as_tensor(e.signals[name], dtype=torch.float32).reshape(-1) for e in examples]
        signals[name] = {"per_token": not isinstance(first, float | int), "values": torch.cat(values)}
    return {
        "sizes": [len(group) for group in groups],
        "names": [example.id for example in examples],
        "prompt_lengths": [example.prompt_length for example in examples],
        "lengths": [len(example.ids) for example in examples],
        "ids": torch.tensor([i for example in examples for i in example.ids], dtype=torch.int32),
        "signals": signals,
    }


def unpack_groups(packed: dict[str, Any]) -> list[Group]:
    """The reverse of `pack_groups`."""
    ids = iter(packed["ids"].tolist())
    signals = {name: (s["per_token"], iter(s["values"].tolist())) for name, s in packed["signals"].items()}

    def example(name: str, length: int, prompt_length: int) -> Example:
        bare = Example(name, tuple(next(ids) for _ in range(length)), prompt_length)
        return replace(
            bare,
            signals={
                key: tuple(next(values) for _ in range(bare.supervised)) if per_token else next(values)
                for key, (per_token, values) in signals.items()
            },
        )

    facts = zip(packed["names"], packed["lengths"], packed["prompt_lengths"], strict=True)
    examples = iter([example(*some) for some in facts])
    return [tuple(next(examples) for _ in range(size)) for size in packed["sizes"]]
