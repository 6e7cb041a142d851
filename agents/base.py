"""What every agent shares: the loop of learning, evaluation, checkpoints.

An agent's own file holds its configuration and its update, and nothing else. Agents that train a
language model have more in common: :mod:`agents.policy_agent`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import shlex
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal

import gymnasium as gym
import torch

import llm_envs
from agents.batches import write_batch
from agents.checkpoints import checkpoint_folder, content, has_checkpoint, replacing
from agents.distributed import ALONE, SharedError, World
from agents.evaluation import Evaluation, evaluate
from agents.registry import agents_for
from agents.rollout import Player
from agents.settings import AgentConfig, ConfigT, Family, stored_settings
from agents.tracking import Tracker
from llm_envs.core.registration import bare_id
from llm_envs.datasets.splits import Split, did_you_mean


class Agent(ABC, Generic[ConfigT]):
    """Plays an environment and learns from it.

    Args:
        policy: What plays; ``"none"`` for an agent without a language model.
        env: Id of an environment.
        config: The agent's configuration; its defaults if left out.
        seed: Seed of the episodes and everything else.
        env_kwargs: Arguments of the environment (``dataset``, ``max_turns``, …). Its ``feedback``
            corrupts the rewards of training; a drift goes by the environment steps of the run,
            and by an episode's own steps within an update. Evaluation reads clean scores.
        device: ``"auto"`` or a torch device.
        world: The processes that train together (:func:`agents.distributed.join`).
        **settings: Single fields of the configuration, instead of ``config``.

    Raises:
        ValueError: The agent cannot play the environment, or a setting is impossible.
        TypeError: A setting is unknown.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[AgentConfig]]
    families: ClassVar[tuple[Family, ...]] = ("writing", "choosing")
    refusal: ClassVar[str] = ""
    """Why it cannot play the other family."""

    def __init__(
        self,
        policy: Any,
        env: str,
        *,
        config: ConfigT | None = None,
        seed: int = 0,
        env_kwargs: dict[str, Any] | None = None,
        device: str = "auto",
        world: World = ALONE,
        **settings: Any,
    ) -> None:
        self.config = self._configure(config, settings)
        self.world = world
        if seed < 0:
            raise ValueError(f"seed is {seed}; it cannot be negative.")
        self.env_kwargs = dict(env_kwargs or {})
        if self.env_kwargs.get("split", "train") not in ("train", "all"):
            raise ValueError(
                f"The environment's split is {self.env_kwargs['split']!r}, and what is trained on "
                "can no longer be scored honestly. Leave it out: training uses 'train' (or 'all', "
                "for data of your own)."
            )
        self.seed = seed
        self.device = device
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        self.policy_name = policy if isinstance(policy, str) else "custom"
        if self.config.default_policy == "none" and self.policy_name != "none":
            raise ValueError(
                f"{self.name} has no language model, and the policy {self.policy_name!r} was "
                "given. Use 'none'."
            )
        self.envs: Any = gym.make_vec(
            env, num_envs=self.rows, **{"split": "train", **self.env_kwargs}
        )
        self.env_id = bare_id(env)  # making it imported the module that it may name
        choosing = isinstance(self.envs.single_action_space, gym.spaces.Discrete)
        self.family: Family = "choosing" if choosing else "writing"
        if self.family not in self.families:
            raise ValueError(
                f"{self.name} cannot play {self.env_id}, a {self.family} task: {self.refusal} "
                f"Agents that can: {', '.join(agents_for(self.family))}."
            )
        self.iteration = 0
        self.env_steps = 0
        self.best_score: float | None = None
        self.batch: Any = None
        """What the update under way learns from, once it has been played."""
        self.stop_requested = False

    def _configure(self, config: ConfigT | None, settings: dict[str, Any]) -> ConfigT:
        known = {f.name for f in dataclasses.fields(self.config_class)}
        for setting in settings:
            if setting not in known:
                raise TypeError(
                    f"{type(self).__name__} has no setting {setting!r}."
                    f"{did_you_mean(setting, known)} It has {', '.join(sorted(known))}."
                )
        made = config if config is not None else self.config_class()
        return dataclasses.replace(made, **settings)  # type: ignore[return-value]

    # --- what an agent is ------------------------------------------------------------------------

    @abstractmethod
    def iterate(self) -> dict[str, float]:
        """Play and learn once, and count it in ``env_steps``; return metrics."""

    @abstractmethod
    def player(self, deterministic: bool) -> Player:
        """Return what plays as the agent does now: at its best, or as in training."""

    @abstractmethod
    def save_state(self, folder: Path) -> dict[str, Any]:
        """Write what the agent itself has to remember; return the rest of it as JSON."""

    @abstractmethod
    def load_state(self, folder: Path, state: dict[str, Any]) -> None:
        """Take back what ``save_state`` wrote and returned."""

    @classmethod
    def stored_policy(cls, folder: Path, state: dict[str, Any], device: str) -> Any:
        """Return the policy of a checkpoint, as the agent is made from it."""
        return "none"

    @property
    def rows(self) -> int:
        """Episodes that this process plays side by side.

        Raises:
            ValueError: The agent cannot share its work with the other processes.
        """
        if self.world.size > 1:
            raise ValueError(
                f"{self.name} trains no language model on several devices: it learns in one "
                f"process, and torchrun started {self.world.size}. Start it without torchrun."
            )
        return self.config.rows

    @property
    def reset_options(self) -> dict[str, Any] | None:
        """Options of the resets of training: how far the run is, for feedback that drifts.

        By them a resumed run drifts on from where it was, whatever its new environments have seen.
        """
        if self.env_kwargs.get("feedback") is None:
            return None
        return {"feedback_steps": self.env_steps}

    @property
    def parameters_bytes(self) -> int:
        """Size of what is trained, for the room that checkpoints need."""
        return 0

    def learn_from(self, batch: Any) -> dict[str, float]:
        """Learn from a batch that ``iterate`` has played; return ``train/…`` metrics.

        Agents that learn while they play have no ``batch``, and do not learn from one.

        Raises:
            FloatingPointError: A reward, the loss, the gradient or a weight is not finite.
        """
        raise NotImplementedError

    # --- learning --------------------------------------------------------------------------------

    def learn(
        self,
        total_steps: int,
        *,
        folder: Path | None = None,
        tracker: Tracker | None = None,
    ) -> Agent[ConfigT]:
        """Train until ``total_steps`` environment steps have been taken in all.

        Args:
            total_steps: Answers given, over the whole life of the agent.
            folder: Where ``checkpoints/last`` and ``checkpoints/best`` go; ``None`` for nowhere.
            tracker: What metrics are logged to.

        Returns:
            The agent itself. ``stop_requested = True``, of any process that trains with this one,
            ends learning after the current update.

        Raises:
            ValueError: All splits are trained on, and one of them is to be validated on.
            FloatingPointError: A reward, the loss, the gradient or a weight is not finite. What led
                to it lies under ``failed`` in the folder; ``checkpoints/last`` is the last good
                one.
        """
        if self.env_kwargs.get("split") == "all" and self.config.eval_every:
            raise ValueError(
                "The environment's split is 'all', so validation examples are trained on, and "
                "scores on them would say nothing of new data. Leave the split out, or score "
                "nothing: eval_every=0."
            )
        best = None if folder is None else folder / "checkpoints" / "best"
        if best is not None and not self.world.of_main(has_checkpoint(best)):
            self.best_score = None  # that of another folder would leave this one without
        stopping = self._stopping()
        while self.env_steps < total_steps and not stopping:
            if self.iteration == 0:
                self._validate(folder, tracker)
            with self._keeping_failures(folder):
                metrics = self.iterate()
            self.batch = None
            last = self.env_steps >= total_steps
            if tracker is not None:
                tracker.log(metrics, env_steps=self.env_steps)
            if self.config.eval_every and (last or self.iteration % self.config.eval_every == 0):
                self._validate(folder, tracker)
            # Stopping adds no validation: the metrics of the run, once it is resumed, have to be
            # those of a run that was not stopped. It is looked at once, and last, because a
            # signal comes at any time: whatever ends the loop has saved before.
            stopping = self._stopping()
            if folder and (last or stopping or self.iteration % self.config.checkpoint_every == 0):
                state = {} if tracker is None else {"tracker": tracker.state()}
                self.save(folder / "checkpoints" / "last", **state)
        return self

    def _stopping(self) -> bool:
        """Whether a process has been asked to stop; then all of them do."""
        stopping = any(self.world.gather(self.stop_requested))
        if stopping:
            self.stop_requested = True
        return stopping

    def _validate(self, folder: Path | None, tracker: Tracker | None) -> None:
        if not self.config.eval_every:
            return
        logged: dict[str, float] = {}
        with self._keeping_failures(folder, of="validation"):
            if self.world.is_main:
                found = self.evaluate("validation", episodes=self.config.eval_episodes)
                logged = {"eval/score": found.score}
                logged |= {f"eval/{name}": float(v.mean()) for name, v in found.parts.items()}
            logged = self.world.of_main(logged)
        if tracker is not None:
            tracker.log(logged, env_steps=self.env_steps)
        if self.best_score is None or logged["eval/score"] > self.best_score:
            self.best_score = logged["eval/score"]
            if folder is not None:
                self.save(folder / "checkpoints" / "best")

    def check_rewards(self, rewards: Sequence[float], first: int = 0) -> None:
        """Refuse to learn from rewards that are no numbers.

        Args:
            rewards: What answers of an update earned.
            first: Number of the first of them within the update.

        Raises:
            FloatingPointError: One is not finite.
        """
        for i, reward in enumerate(rewards, first):
            if not math.isfinite(reward):
                raise FloatingPointError(
                    f"The reward of answer {i} of update {self.iteration} is {reward}; nothing was "
                    "learned from it. Look at what the environment scores."
                )

    @contextlib.contextmanager
    def _keeping_failures(
        self, folder: Path | None, of: Literal["update", "validation"] = "update"
    ) -> Iterator[None]:
        """Keep what led to numbers that are none, and say where; in all processes alike."""
        try:
            yield
        except FloatingPointError as error:
            said = self.world.tell(error)
            raise FloatingPointError(f"{said} {self._keep_failure(folder, of)}") from error

    def _keep_failure(self, folder: Path | None, of: Literal["update", "validation"]) -> str:
        """Write what led to numbers that are none; return a sentence that says where.

        The agent is kept as it is now: a step that failed was not taken, but PPO may have taken
        others on the same batch. A validation changes nothing, and has no batch.
        """
        steps = f"after {self.env_steps:,} environment steps"
        update = of == "update"
        when = f"Update {self.iteration} began {steps}" if update else f"That was {steps}"
        if folder is None:
            return f"{when}."
        failed = folder / "failed"
        try:
            with self._replacing(failed) as fresh:
                self.save(fresh / "agent")
                if self.world.is_main:
                    write_batch(self.batch, fresh)
            self.world.gather(None)  # nobody leaves before it is there
        except (OSError, TypeError, SharedError) as error:
            return f"{when}; what led to it could not be kept ({self.world.tell(error)})."
        if not update:
            return f"{when}; the agent as it was is kept in {failed / 'agent'}."
        return (
            f"{when}; what led to it was kept. "
            f"Replay: python -m agents.replay {shlex.quote(str(failed))}"
        )

    # --- playing ---------------------------------------------------------------------------------

    def predict(self, observation: Any, deterministic: bool = True) -> tuple[Any, None]:
        """Answer one observation, or each of a list; as in Stable-Baselines3.

        Chat models take ``[info["messages"]]``, or a text as the user's only message.

        Returns:
            The action (or a list of them) and ``None`` for the state that there is not.
        """
        many = isinstance(observation, Sequence) and not isinstance(observation, str)
        rows = dict(enumerate(observation if many else [observation]))
        actions = self.player(deterministic).act(rows, 0)
        return ([actions[i] for i in rows] if many else actions[0]), None

    def evaluate(
        self, split: Split, *, episodes: int | None = None, deterministic: bool = True
    ) -> Evaluation:
        """Play a split once; see :func:`agents.evaluation.evaluate`.

        Args:
            split: What is played.
            episodes: How many episodes; all if left out.
            deterministic: The agent at its best; or as in training, with chance from the generator
                that training draws from too.

        Raises:
            ValueError: The agent trains on all splits, and this is one to be scored on.
        """
        if self.env_kwargs.get("split") == "all" and split in ("validation", "test"):
            raise ValueError(
                f"The environment's split is 'all', so the {split} split was trained on, and a "
                "score on it would say nothing of new data."
            )
        return evaluate(
            lambda: self.player(deterministic),
            self.env_id,
            split=split,
            episodes=episodes,
            env_kwargs=self.env_kwargs,
        )

    # --- state -----------------------------------------------------------------------------------

    def save(self, folder: str | Path, **more: Any) -> None:
        """Write everything that resuming needs: a crash leaves the old checkpoint or the new one.

        No file holds pickled code. All processes that train together have to call it, as each has
        something to remember; one writes it.
        """
        with self._replacing(Path(folder)) as fresh:
            state = {
                "version": llm_envs.__version__,
                "agent": self.name,
                "env": self.env_id,
                "env_kwargs": self.env_kwargs,
                "data": self._data,
                "policy": self.policy_name,
                "family": self.family,
                "seed": self.seed,
                "config": dataclasses.asdict(self.config),
                "processes": self.world.size,
                "iteration": self.iteration,
                "env_steps": self.env_steps,
                "best_score": self.best_score,
                "own": self.save_state(fresh),
                **more,
            }
            if self.world.is_main:
                text = json.dumps(state, indent=1, default=str)
                (fresh / "state.json").write_text(text)
        self.world.gather(None)  # nobody goes on before it is there

    def _replacing(self, folder: Path) -> contextlib.AbstractContextManager[Path]:
        """Give a new folder as :func:`replacing` does; in a process that writes nothing, a name."""
        return replacing(folder) if self.world.is_main else contextlib.nullcontext(folder)

    @classmethod
    def load(
        cls, folder: str | Path, *, device: str = "auto", world: World = ALONE
    ) -> Agent[ConfigT]:
        """Restore an agent from a checkpoint; it goes on exactly where it was.

        Args:
            folder: The checkpoint.
            device: ``"auto"`` or a torch device.
            world: The processes that train together, as many as wrote it. One alone can load any
                checkpoint; if it then learns, it draws other answers than they would have.

        Raises:
            ValueError: There is no checkpoint, or another agent, settings that are unknown here,
                another version of the environment, other data, another model or another number of
                processes than here belong to it.
        """
        folder = checkpoint_folder(folder)
        state = json.loads((folder / "state.json").read_text())
        if state["agent"] != cls.name:
            raise ValueError(
                f"The checkpoint {folder} was written by the agent {state['agent']!r} and cannot "
                f"be loaded as {cls.name!r}."
            )
        if world.size not in (1, written_by := state.get("processes", 1)):
            raise ValueError(
                f"The checkpoint {folder} was written by {written_by} processes and cannot be "
                f"continued by {world.size}. Start as many, or load it in one."
            )
        try:
            gym.spec(state["env"])
        except gym.error.Error as error:
            raise ValueError(
                f"The checkpoint {folder} was trained on {state['env']}, which is not registered "
                f"here: {error}"
            ) from error
        origin = f"The checkpoint {folder} was written by llm-envs {state.get('version')}"
        config_class: Any = cls.config_class
        agent = cls(
            cls.stored_policy(folder, state, device),
            state["env"],
            config=stored_settings(config_class, cls.name, state["config"], origin),
            seed=state["seed"],
            env_kwargs=state["env_kwargs"],
            device=device,
            world=world,
        )
        if (now := agent._data) != state["data"]:
            raise ValueError(
                f"The checkpoint {folder} was trained on {state['env']} with {state['data']}, and "
                f"here its training data are {now}. Use the data (or the version of llm-envs) "
                "that it was trained with."
            )
        agent.policy_name = state["policy"]
        agent.iteration, agent.env_steps = state["iteration"], state["env_steps"]
        agent.best_score = state["best_score"]
        agent.load_state(folder, state["own"])
        return agent

    @functools.cached_property
    def _data(self) -> str:
        """What is trained on: how many examples, and a digest of all that they hold."""
        digest, examples = hashlib.sha256(), self.envs.unwrapped.task.examples
        for example in examples:
            digest.update(content(example).encode("utf-8", "surrogatepass") + b"\n")
        return f"{len(examples):,} examples (digest {digest.hexdigest()[:12]})"
