"""The source of groups that a run asks for."""

from collections.abc import Callable, Mapping

from dgpo_fast.config.options import Config
from dgpo_fast.distributed import Processes
from dgpo_fast.models.policy import Weights
from dgpo_fast.prompts import PromptSets
from dgpo_fast.prompts.dealing import GroupSampler
from dgpo_fast.rollout.judged import JudgedSource
from dgpo_fast.rollout.offline import OfflineSource
from dgpo_fast.rollout.online import OnlineSource, RolloutWorker
from dgpo_fast.rollout.source import Source
from dgpo_fast.run.depends import WEIGHTS


def make_source(
    config: Config,
    worker: RolloutWorker,
    prompts: PromptSets,
    model: Mapping[str, str],
    weights: Callable[[], Weights],
    processes: Processes,
    *,
    single_images: bool,
) -> Source:
    """What `data.source` names.

    Args:
        config: the run's.
        worker: draws and scores.
        prompts: the run's.
        model: fingerprints of what the base model draws with.
        weights: gives those that draw online.
        processes: those that share the run.
        single_images: `Traits.single_images` of the objective.
    """
    if config.data.source == "preferences":
        return JudgedSource(config, worker, model[WEIGHTS], single_images=single_images, processes=processes)
    if config.data.source == "offline":
        return OfflineSource(config, worker, prompts.train, model, processes)
    dealt = GroupSampler(prompts.train, config.rollout.groups, config.seed)
    return OnlineSource(worker, dealt, config.seed, weights, processes)
