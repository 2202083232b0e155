"""Options of the stages that criticise, refine and correct."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..config import at_least, option
from ..models.corrections import Wording
from .options import WithPolicy


@dataclass
class Worded:
    """Options of every stage that asks for critiques or further attempts."""

    wording: str = option("text", "how is asked: text, lab (for the lab's word-level models), self_refine or reflexion")
    critique_prompt: str = option("", "in place of the wording's question to a critic, with {prompt} and {draft}")
    refine_prompt: str = option("", "in place of the wording's request to refine, with {critique}")
    retry_prompt: str = option("", "in place of the wording's request to try again without a critique")

    def words(self) -> Wording:
        """The wording, with the texts that are told. Raises ValueError."""
        own = {"critique": self.critique_prompt, "refine": self.refine_prompt, "retry": self.retry_prompt}
        return Wording.named(self.wording, **own)


@dataclass
class Correcting(Worded):
    """Options of searches that correct: who criticises, and what a new attempt sees."""

    critic: str = option(
        "", "what criticises, for strategy corrections: a policy's folder, self (the policy); empty: nothing, ask again"
    )
    critic_temperature: float = option(0.0, "sampling temperature of critiques; 0 is greedy")
    critic_max_new_tokens: int = option(256, "longest critique in tokens")
    shown: int = option(1, "earlier attempts, with what was said of them, that a new one sees; 0 for all")


@dataclass
class Refining:
    """Options of searches with strategy glore: who refines, and what says where a draft goes wrong."""

    global_refiner: str = option(
        "", "for strategy glore: the policy that writes a draft anew; empty makes no global refinements"
    )
    local_refiner: str = option(
        "", "for strategy glore: the policy that goes on before the first wrong step of a draft"
    )
    locator: str = option(
        "", "what finds that step: a reward model of steps (SORM, PRM), checker (the task's own), or random (a control)"
    )
    locator_threshold: float = option(0.5, "a step with a score under it is wrong")
    refiner_temperature: float = option(0.0, "sampling temperature of refinements; 0 is greedy")


@dataclass
class Critiques(Worded, WithPolicy):
    """Writes step-by-step critiques of drafts: samples, and solutions with planted errors (Dialogue rows, kind critique)."""

    solutions: str = option("", "Solution rows: natural errors (RG1) and right ones; empty takes planted errors alone")
    drafts: str = option(
        "", "in place of solutions: Dialogue rows with drafts, such as imported ones; the task may be {kind: free} then"
    )
    wrong: int = option(1, "wrong samples of each problem at most")
    right: int = option(1, "right samples of each problem at most")
    rg2: int = option(0, "drafts of each problem with an error planted at a told step")
    rg3: int = option(0, "drafts of each problem with a told kind of error planted at a told step")
    references: bool = option(
        False, "the task's right solution of each problem is a draft too, where samples of the policy are seldom right"
    )
    more_errors: float = option(
        0.0,
        "probability with which each step behind a planted error slips too: as many wrong steps as right ones teach most",
    )
    writer: Literal["", "checker", "policy"] = option(
        "", "who writes critiques: checker or policy; empty: the checker where the task can check and plant"
    )
    samples: int = option(1, "critiques of each draft by the policy")
    annotate: bool = option(True, "PEEKS: the policy is told the reference answer and the known error, as an annotator")
    stop_at_error: bool = option(False, "the checker's critiques end behind the first wrong step")
    reason_first: bool = option(False, "the checker says of every step what should stand there, before its verdict")
    results: bool = option(
        True,
        "what the checker expects is told with its result; false ends before the equals sign, which gives no answer away",
    )
    final: bool = option(True, "the checker's critiques end with a verdict on the answer; false leaves it to the steps")
    corrupt: float = option(0.0, "share of the checker's critiques with a wrong finding, to put a filter to the test")
    strip: bool = option(True, "cut sentences that give the reference answer away")
    keep_unreadable: bool = option(
        False, "a policy's critiques without a verdict stay, to judge a critic by all it wrote"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "wrong", "right", "rg2", "rg3")
        at_least(self, 1, "samples")
        self.words()
        for name in ("corrupt", "more_errors"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], found {getattr(self, name)}")


@dataclass
class Refinements(Worded, WithPolicy):
    """Samples refinements by critiques, with verdicts (Dialogue rows, kind refine; right and wrong ones)."""

    critiques: str = option("", "Dialogue rows of data.critiques")
    only: Literal["", "right", "wrong"] = option(
        "", "criticised drafts that are right or wrong alone; empty refines both"
    )
    samples: int = option(1, "refinements by each critique")
    repair: bool = option(
        False,
        "PEEKS: not asked with the critique, but the policy goes on behind the step that should stand at the first error",
    )
    control: Literal["", "empty", "shuffled"] = option(
        "", "a control: empty (no critique is shown) or shuffled (that of another draft)"
    )
    unit_problems: int = option(64, "critiques in one unit of work, which is what a kill can cost")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "samples")
        self.words()
        if self.repair and self.control:
            raise ValueError("repair asks no refiner: control says nothing there")


@dataclass
class FilterCritiques:
    """Keeps the critiques by which refinements end right (Dialogue rows, kind critique)."""

    critiques: str = option("", "Dialogue rows of data.critiques")
    refinements: str = option("", "Dialogue rows of data.refinements by these critiques")
    mode: Literal["soft", "hard", "both", "none"] = option(
        "soft", "soft (refinements end right), hard (the verdict is right), both, or none (a control)"
    )
    threshold: float = option(0.3, "least share of right refinements")
    count: int = option(0, "keep so many, drawn with the seed; 0 for all")
    seed: int = option(0, "seed of the draw")

    def __post_init__(self) -> None:
        at_least(self, 0, "count")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must lie in (0, 1], found {self.threshold}")


@dataclass
class BestRefinements(Worded):
    """Keeps right refinements to learn from, as refinements, as plain solutions or with their critiques (Dialogue rows)."""

    refinements: str = option("", "Dialogue rows of data.refinements")
    kinds: list[str] = option(["refine"], "what is learnt: refine, solve (problem to refinement), critique")
    per_critique: int = option(1, "right refinements of each critique at most")
    repair_only: bool = option(True, "leave out refinements of drafts that are right already")
    only_right: bool = option(
        True, "false keeps refinements that end wrong: to learn to follow critiques, not to solve"
    )
    separator: str = option("\n", "text between steps")
    seed: int = option(0, "seed of the draw")

    def __post_init__(self) -> None:
        at_least(self, 1, "per_critique")
        self.words()
        if not self.kinds or set(self.kinds) - {"refine", "solve", "critique"}:
            raise ValueError(f"kinds must be some of refine, solve and critique, found {self.kinds!r}")


@dataclass
class Rise(Worded, WithPolicy):
    """Better answers at the states that the policy visits, weighted by reward (RISE; Dialogue rows, kind selfcorrect)."""

    samples: int = option(1, "trajectories of each problem")
    turns: int = option(2, "attempts in a trajectory at most; it ends at the first right one")
    best_of: int = option(16, "PEEKS: samples at each state, of which the one with the highest reward is learnt")
    tau: float = option(0.4, "the weight of a row is exp(reward / tau); 0 weighs all alike")
    select: Literal["all", "better", "best", "success"] = option(
        "all", "which answers are learnt: all, better, best or success"
    )
    teacher: str = option(
        "", "a stronger policy that writes the better answers (distillation); empty: the policy itself"
    )
    drafts: str = option("", "Solution rows in place of first attempts: a control with prefixes of another policy")
    from_problem: bool = option(
        False, "better answers are sampled from the problem alone: for a policy that has never seen a second turn"
    )
    shown: int = option(1, "earlier attempts that an attempt sees; 0 for all")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "samples", "turns", "best_of")
        at_least(self, 0, "tau", "shown")
        self.words()


@dataclass
class SelfTalk(WithPolicy):
    """Makes one train of thought of draft, critique and right refinement (self-talk; Dialogue rows, kind selfcorrect)."""

    refinements: str = option("", "Dialogue rows of kind refine; right refinements of wrong drafts are used")
    template: str = option(
        "{draft}\nWait, let me check that.\n{critique}\nSo I go through it again.\n{refinement}",
        "how draft, critique and refinement stand together",
    )
    stop_at_error: bool = option(True, "the draft breaks off behind its first wrong step, where that is known or said")
    per_problem: int = option(1, "chains of each problem at most, drawn with the seed; 0 for all")
    policy: str = option(
        "", "a model that rewrites chains as monologues, of which those that end right are kept; empty: none"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "per_problem")
        for part in ("{draft}", "{refinement}"):
            if part not in self.template:
                raise ValueError(f"template must contain {part}, found {self.template!r:.80}")


@dataclass
class GlobalRefinements(Worded):
    """Pairs wrong drafts with right solutions of their problem, for a global refiner (GLoRe; Dialogue rows, kind refine)."""

    solutions: str = option("", "Solution rows, several of each problem, right and wrong ones")
    per_draft: int = option(1, "right solutions of each draft at most, drawn with the seed")
    per_problem: int = option(0, "drafts of each problem at most, the first sampled; 0 for all")
    separator: str = option("\n", "text between steps")
    seed: int = option(0, "seed of the draw")

    def __post_init__(self) -> None:
        at_least(self, 1, "per_draft")
        at_least(self, 0, "per_problem")
        self.words()


@dataclass
class LocalRefinements(Worded, WithPolicy):
    """Ends wrong drafts right from their first wrong step on, for a local refiner (GLoRe; Dialogue rows, kind refine)."""

    labels: str = option("", "StepLabels rows of solutions: counts of continuations, or the checker's")
    samples: int = option(8, "continuations of the steps before the first wrong one")
    per_draft: int = option(1, "right ends of each draft at most")
    per_problem: int = option(0, "drafts of each problem at most, the first sampled; 0 for all")
    consistent: bool = option(True, "a right end must use the result of the step before it")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "samples", "per_draft")
        at_least(self, 0, "per_problem")
        self.words()


@dataclass
class FlipPairs:
    """Pairs what a second attempt turned round, on the plain problem (SCL; Pair rows)."""

    source: str = option("", "a search with strategy corrections or revisions (trees: -1)")
    per_problem: int = option(0, "pairs of each problem at most, drawn with the seed; 0 for all")
    task: dict[str, Any] = option({"kind": "chain"}, "the task of the search")
    split: str = option("train", "the split that the search is of")
    seed: int = option(0, "seed of the draw")

    def __post_init__(self) -> None:
        at_least(self, 0, "per_problem")


@dataclass
class InlineCorrections(WithPolicy):
    """Puts wrong steps of the policy's own, and their correction, into right solutions (S3c-Math; Dialogue rows)."""

    solutions: str = option("", "Solution rows; the right ones among them are used")
    per_problem: int = option(1, "solutions of each problem at most, the first sampled; 0 for all")
    reflections: list[str] = option(["Wait", "Oops", "Hmm"], "what stands between a wrong step and the right one")
    slips: int = option(1, "wrong steps in a solution at most")
    positions: int = option(2, "places of a solution where a wrong step is looked for; 0 for all")
    candidates: int = option(4, "steps sampled at a place")
    completions: int = option(8, "completions that judge a step where the task cannot check steps")
    clean: float = option(0.4, "share of solutions that stay without an error")
    mask: bool = option(True, "wrong steps are read and not trained; false is a control")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "slips", "candidates", "completions")
        at_least(self, 0, "per_problem", "positions")
        if not self.reflections or not all(r.strip() for r in self.reflections):
            raise ValueError("reflections is empty: what stands between a wrong step and the right one?")
        if not 0 <= self.clean <= 1:
            raise ValueError(f"clean must lie in [0, 1], found {self.clean}")


@dataclass
class EvaluateCorrections:
    """Measures corrections: accuracy of each turn, flips, votes over turns, edits; what critics find (results.json)."""

    sources: dict[str, Any] = option(
        {},
        "name -> Dialogue rows of critiques or refinements, a search with strategy corrections or revisions, "
        "or a list of Solution rows, one for each turn",
    )
    reflections: list[str] = option(
        [], "steps that take back the one before; given, solutions are measured for what they do about their own errors"
    )
    task: dict[str, Any] = option({"kind": "chain"}, "the task of searches, and of step checks")
    split: str = option("test", "the split that searches are of")
    shown: int = option(40, "chains of each source that go into the report's details")
    seed: int = option(0, "seed of the bootstrap")

    def __post_init__(self) -> None:
        at_least(self, 0, "shown")
